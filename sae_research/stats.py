"""Error bars and tests over seeds, clusters and pairs; every draw has an explicit seed."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sae_research.errors import ResearchError

if TYPE_CHECKING:
    import numpy as np

    Statistic = Callable[..., np.ndarray | float]

DRAWS = 10_000
LEVEL = 0.95
_BATCH_ELEMENTS = 2_000_000


@dataclass(frozen=True)
class Interval:
    """A number with its confidence interval and the count of independent units that it rests on."""

    value: float
    """The estimate on the data as they are."""
    low: float
    """Lower end."""
    high: float
    """Upper end."""
    n: int
    """Independent units: seeds, clusters or pairs."""

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}], n {self.n}"


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean over independent runs (seeds) with Student's t interval."""
    from scipy.stats import t

    (values,) = _columns(values=values)
    n = _at_least(2, len(values), "an interval over seeds")
    margin = t.ppf((1 + LEVEL) / 2, n - 1) * values.std(ddof=1) / n**0.5
    mean = values.mean()
    return Interval(float(mean), float(mean - margin), float(mean + margin), n)


def cluster_means(values: "np.ndarray", clusters: Sequence[Hashable] | None) -> "np.ndarray":
    """Mean of every cluster, in order of first appearance: the units of every test here."""
    import numpy as np

    if clusters is None:
        return values
    groups = _group_ids(clusters, len(values))
    return np.bincount(groups, weights=values) / np.bincount(groups)


def cluster_bootstrap(
    values: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    statistic: "Statistic | None" = None,
    *,
    seed: int,
    draws: int = DRAWS,
) -> Interval:
    """Percentile interval of `statistic` (mean by default) of the means of each cluster.

    `statistic` takes an array and `axis`, as `np.median` does. Without `clusters` every value is
    its own.
    """
    (values,) = _columns(values=values)
    return _percentile(_or_mean(statistic), [cluster_means(values, clusters)], seed, draws)


def paired_bootstrap(
    first: Sequence[float],
    second: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    statistic: "Statistic | None" = None,
    *,
    seed: int,
    draws: int = DRAWS,
) -> Interval:
    """The same of statistic(first) - statistic(second), both on the same resampled clusters."""
    first, second = _columns(first=first, second=second)
    statistic = _or_mean(statistic)
    means = [cluster_means(first, clusters), cluster_means(second, clusters)]

    def difference(a, b, axis):
        return statistic(a, axis=axis) - statistic(b, axis=axis)

    return _percentile(difference, means, seed, draws)


def bootstrap(
    statistic: Callable[..., float],
    *columns: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    seed: int,
    draws: int = 2_000,
) -> Interval:
    """Percentile interval of any `statistic(*columns)`, resampling whole clusters of rows; slow."""
    import numpy as np

    columns = _columns(**{f"column {i + 1}": column for i, column in enumerate(columns)})
    groups = _group_ids(clusters, len(columns[0]))
    order = np.argsort(groups, kind="stable")
    rows = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)
    n = _at_least(2, len(rows), "a bootstrap")
    rng = np.random.default_rng(seed)
    drawn = np.empty(draws)
    for i in range(draws):
        sample = np.concatenate([rows[j] for j in rng.integers(0, n, n)])
        drawn[i] = statistic(*(column[sample] for column in columns))
    return _interval(float(statistic(*columns)), drawn, n)


def spearman(x: Sequence[float], y: Sequence[float], *, seed: int, draws: int = DRAWS) -> Interval:
    """Spearman's rank correlation with a bootstrap interval over pairs."""
    return _percentile(_rank_correlation, _varying(x=x, y=y), seed, draws)


def spearman_difference(
    first: Sequence[float],
    second: Sequence[float],
    y: Sequence[float],
    *,
    seed: int,
    draws: int = DRAWS,
) -> Interval:
    """Spearman(first, y) - Spearman(second, y), both on the same resampled items."""

    def difference(a, b, target, axis):
        return _rank_correlation(a, target, axis) - _rank_correlation(b, target, axis)

    return _percentile(difference, _varying(first=first, second=second, y=y), seed, draws)


def partial_spearman(
    x: Sequence[float],
    y: Sequence[float],
    controls: Sequence[Sequence[float]],
    *,
    seed: int,
    draws: int = DRAWS,
) -> Interval:
    """Rank correlation of x and y after least squares has removed every control's ranks from both.

    `controls` is a list of columns. Each resample is ranked and residualised anew.
    """
    data = _varying(x=x, y=y, **{f"control {i + 1}": control for i, control in enumerate(controls)})
    what = f"a partial correlation with {len(controls)} control(s)"
    _at_least(len(controls) + 3, len(data[0]), what)
    return _percentile(_partial_rank_correlation, data, seed, draws)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: reject where at most the error rate."""
    from statsmodels.stats.multitest import multipletests

    (p,) = _columns(p_values=p_values)
    if (p < 0).any() or (p > 1).any():
        raise ResearchError("p-values must lie between 0 and 1.")
    return [float(value) for value in multipletests(p, method="holm")[1]]


def wilson(successes: int, trials: int) -> Interval:
    """A share with Wilson's score interval."""
    from scipy.stats import binomtest

    whole = trials == int(trials) and successes == int(successes)
    if not (whole and 0 <= successes <= trials and trials > 0):
        raise ResearchError(
            f"a share needs 0 <= successes <= trials and a trial, not {successes} of {trials}."
        )
    bounds = binomtest(int(successes), int(trials)).proportion_ci(LEVEL, method="wilson")
    return Interval(successes / trials, float(bounds.low), float(bounds.high), int(trials))


def _columns(**named: Sequence[float]) -> "list[np.ndarray]":
    """Finite one-dimensional float columns of one length, or an error that says which is not."""
    import numpy as np

    if not named:
        raise ResearchError("no data given.")
    columns = {}
    for name, values in named.items():
        try:
            column = np.asarray(values, dtype=float)
        except (TypeError, ValueError) as error:
            raise ResearchError(f"{name} must be a list of numbers.") from error
        if column.ndim != 1:
            raise ResearchError(f"{name} must be one-dimensional, not of shape {column.shape}.")
        if not column.size:
            raise ResearchError(f"{name} is empty: there is nothing to measure.")
        if not np.isfinite(column).all():
            bad = int((~np.isfinite(column)).sum())
            raise ResearchError(
                f"{name} holds {bad} NaN or infinite value(s) of {column.size}; remove them."
            )
        columns[name] = column
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ResearchError(
            "lengths differ: " + ", ".join(f"{name} {n}" for name, n in lengths.items()) + "."
        )
    return list(columns.values())


def _varying(**named: Sequence[float]) -> "list[np.ndarray]":
    columns = _columns(**named)
    for name, column in zip(named, columns, strict=True):
        if (column == column[0]).all():
            raise ResearchError(f"{name} is constant: it has no rank correlation.")
    _at_least(3, len(columns[0]), "a rank correlation")
    return columns


def _at_least(least: int, n: int, what: str) -> int:
    if n < least:
        raise ResearchError(f"{what} needs at least {least} units, not {n}.")
    return n


def _or_mean(statistic: "Statistic | None") -> "Statistic":
    import numpy as np

    return statistic or np.mean


def _group_ids(clusters: Sequence[Hashable] | None, rows: int) -> "np.ndarray":
    """Cluster numbers 0, 1, ... in order of first appearance."""
    import numpy as np

    if clusters is None:
        return np.arange(rows)
    names = [item.item() if isinstance(item, np.generic) else item for item in clusters]
    if len(names) != rows:
        raise ResearchError(f"lengths differ: {rows} values, {len(names)} cluster names.")
    if any(name is None or name != name for name in names):
        raise ResearchError("cluster names hold NaN or None; name every cluster.")
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return np.array([number[name] for name in names])


def _percentile(
    statistic: "Statistic", columns: "list[np.ndarray]", seed: int, draws: int
) -> Interval:
    """Percentile interval of a vectorised statistic over jointly resampled rows."""
    import numpy as np
    from scipy.stats import bootstrap as resample

    n = _at_least(2, len(columns[0]), "a bootstrap")
    drawn = resample(
        columns,
        statistic,
        n_resamples=draws,
        batch=max(1, _BATCH_ELEMENTS // (n * len(columns))),
        vectorized=True,
        paired=True,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).bootstrap_distribution
    return _interval(float(statistic(*columns, axis=-1)), drawn, n)


def _interval(value: float, drawn: "np.ndarray", n: int) -> Interval:
    import numpy as np

    if not (np.isfinite(value) and np.isfinite(drawn).all()):
        raise ResearchError(
            "the statistic is not finite on the data or on a resample; "
            "use one that is always defined."
        )
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high), n)


def _pearson(x: "np.ndarray", y: "np.ndarray", axis: int = -1) -> "np.ndarray":
    """Correlation along `axis`; 0 where a resample left one side constant."""
    import numpy as np

    x, y = (v - v.mean(axis=axis, keepdims=True) for v in (x, y))
    norm = np.sqrt((x * x).sum(axis=axis) * (y * y).sum(axis=axis))
    return (x * y).sum(axis=axis) / np.where(norm > 0, norm, 1.0)


def _rank_correlation(x: "np.ndarray", y: "np.ndarray", axis: int = -1) -> "np.ndarray":
    from scipy.stats import rankdata

    return _pearson(rankdata(x, axis=axis), rankdata(y, axis=axis), axis)


def _partial_rank_correlation(x, y, *controls, axis: int = -1) -> "np.ndarray":
    import numpy as np
    from scipy.stats import rankdata

    x, y, *controls = (rankdata(np.moveaxis(v, axis, -1), axis=-1) for v in (x, y, *controls))
    x, y = (_residual(v - v.mean(-1, keepdims=True), controls) for v in (x, y))
    return _pearson(x, y)


def _residual(ranks: "np.ndarray", controls: "list[np.ndarray]") -> "np.ndarray":
    """What least squares on the centred controls leaves; they may be collinear."""
    import numpy as np

    basis: list[np.ndarray] = []
    for control in controls:
        direction = control - control.mean(-1, keepdims=True)
        size = np.sqrt((direction**2).sum(-1, keepdims=True))
        for b in basis:
            direction = direction - (direction * b).sum(-1, keepdims=True) * b
        rest = np.sqrt((direction**2).sum(-1, keepdims=True))
        basis.append(np.where(rest > 1e-9 * size, direction / np.where(rest > 0, rest, 1.0), 0.0))
    left = ranks
    for b in basis:
        left = left - (left * b).sum(-1, keepdims=True) * b
    # what rounding leaves of a vector that the controls explain wholly is zero
    whole = np.sqrt((ranks**2).sum(-1, keepdims=True))
    return np.where(np.sqrt((left**2).sum(-1, keepdims=True)) > 1e-9 * whole, left, 0.0)
