"""Intervals of scores of survey answers: clusters of questions and training seeds are resampled.

Predicted answers are [seeds, groups, questions, options].
"""

from collections.abc import Callable

import numpy as np

from sae_research.errors import ResearchError
from sae_research.stats import Interval
from sae_research.surveys.scores import EvalSet, identify_groups
from sae_research.surveys.survey import deviations, divergence

_DRAWS = 2000


def _draw_counts(draws: np.random.Generator, n: int) -> np.ndarray:
    """How often each of `n` units is in each bootstrap sample, [draws, n]."""
    return draws.multinomial(n, np.full(n, 1 / n), _DRAWS)


def resample_clusters(
    statistic: Callable[[np.ndarray], np.ndarray], sums: np.ndarray, clusters: np.ndarray, seed: int
) -> Interval:
    """Percentile interval that resamples clusters of questions and training seeds.

    `sums` is [seeds, questions, columns]; `statistic` takes [..., columns] of totals.
    """
    names = np.unique(clusters)
    if len(names) < 2:
        raise ResearchError("an interval over questions needs at least two clusters of questions.")
    table = np.stack([sums[:, clusters == name].sum(1) for name in names], 1)
    draws = np.random.default_rng(seed)
    runs = _draw_counts(draws, len(table))
    picks = _draw_counts(draws, len(names))
    drawn = statistic(np.einsum("ds,dc,sck->dk", runs, picks, table, optimize=True))
    value = float(statistic(table.sum((0, 1))))
    low, high = np.quantile(drawn[np.isfinite(drawn)], [0.025, 0.975])
    return Interval(value, min(value, float(low)), max(value, float(high)), len(names))


def _ratio(s: np.ndarray) -> np.ndarray:
    return s[..., 0] / np.maximum(s[..., 1], 1e-12)


def distance_interval(
    eval_set: EvalSet,
    predicted: np.ndarray,
    seed: int,
    minus: np.ndarray | None = None,
    metric: str = "wd",
) -> Interval:
    """Mean WD, or KL(pi || P); with `minus`, the paired difference to another method's."""

    def measure(p: np.ndarray) -> np.ndarray:
        found = (
            eval_set.distance(p, eval_set.truth)
            if metric == "wd"
            else divergence(eval_set.truth, p)
        )
        return found.mean(1)

    gap = measure(predicted) if minus is None else measure(predicted) - measure(minus)
    return resample_clusters(
        _ratio, np.stack([gap, np.ones_like(gap)], -1), eval_set.clusters, seed
    )


def wd_ratio_interval(
    eval_set: EvalSet, predicted: np.ndarray, seed: int, other: np.ndarray
) -> Interval:
    """Mean WD of one method over that of another on the same questions."""
    table = np.stack([eval_set.distance(p, eval_set.truth).mean(1) for p in (predicted, other)], -1)
    return resample_clusters(_ratio, table, eval_set.clusters, seed)


def slope_interval(eval_set: EvalSet, predicted: np.ndarray, seed: int) -> Interval:
    """beta_dev: slope of predicted on true deviations."""

    def regressed(s: np.ndarray) -> np.ndarray:
        n, a, b, _, bb, ab = np.moveaxis(s, -1, 0)
        return (ab - a * b / n) / np.maximum(bb - b * b / n, 1e-12)

    return resample_clusters(regressed, _products(eval_set, predicted), eval_set.clusters, seed)


def identification_interval(eval_set: EvalSet, predicted: np.ndarray, seed: int) -> Interval:
    """Share of cells in which the nearest sibling is the group itself."""
    table = np.stack([identify_groups(eval_set, p) for p in predicted])
    return resample_clusters(_ratio, table, eval_set.clusters, seed)


def worst_change_interval(
    eval_set: EvalSet, predicted: np.ndarray, seed: int, before: np.ndarray
) -> Interval:
    """The largest change of any group's mean WD, so that below 0 every group has gained."""
    truth = eval_set.truth
    change = eval_set.distance(predicted, truth) - eval_set.distance(before, truth)
    table = np.concatenate([change.transpose(0, 2, 1), np.ones((*change.shape[::2], 1))], -1)
    return resample_clusters(
        lambda s: (s[..., :-1] / s[..., -1:]).max(-1), table, eval_set.clusters, seed
    )


def quietest_share_interval(eval_set: EvalSet, predicted: np.ndarray, seed: int) -> Interval:
    """RMS deviation predicted for the attribute that truly deviates least over that of the rest."""
    weights = eval_set.survey.weights
    names = np.array([g.attribute for g in eval_set.survey.groups])
    true = deviations(eval_set.truth, weights) ** 2 * eval_set.mask
    own = names == min(dict.fromkeys(names), key=lambda a: true[names == a].mean())
    table = []
    for one in predicted:
        ours = deviations(one, weights) ** 2 * eval_set.mask
        table.append(np.stack([ours[own].mean(0).sum(-1), ours[~own].mean(0).sum(-1)], -1))
    return resample_clusters(lambda s: np.sqrt(_ratio(s)), np.stack(table), eval_set.clusters, seed)


def rho_dev_interval(
    eval_set: EvalSet, predicted: np.ndarray, seed: int, minus: np.ndarray | None = None
) -> Interval:
    """rho_dev; with `minus`, the paired difference to another method's."""
    tables = [_products(eval_set, p) for p in (predicted, minus) if p is not None]

    def correlate(s: np.ndarray) -> np.ndarray:
        rho = [_rho(part) for part in np.split(s, len(tables), axis=-1)]
        return (rho[0] if minus is None else rho[0] - rho[1]) / eval_set.reliability**0.5

    return resample_clusters(correlate, np.concatenate(tables, -1), eval_set.clusters, seed)


def _products(eval_set: EvalSet, predicted: np.ndarray) -> np.ndarray:
    """Sums over groups and options of n, a, b, aa, bb and ab, [seeds, questions, 6]."""
    weights, mask = eval_set.survey.weights, eval_set.mask
    b = deviations(eval_set.truth, weights) * mask
    found = []
    for one in predicted:
        a = deviations(one, weights) * mask
        columns = (np.ones_like(a), a, b, a * a, b * b, a * b)
        found.append(np.stack([(x * mask).sum((0, 2)) for x in columns], -1))
    return np.stack(found)


def _rho(s: np.ndarray) -> np.ndarray:
    n, a, b, aa, bb, ab = np.moveaxis(s, -1, 0)
    scale = np.maximum(aa - a * a / n, 0) * np.maximum(bb - b * b / n, 0)
    return np.where(scale > 1e-12, (ab - a * b / n) / np.sqrt(np.maximum(scale, 1e-12)), 0.0)
