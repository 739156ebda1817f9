"""Predicting labels from predictors: ridge across folds, nuisances, nulls, comparisons (section 3.8)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sae_research import stats
from sae_research.studies.side_effects import predictors

if TYPE_CHECKING:
    import pandas as pd

FOLDS = 5
ALPHA = 1.0
SPREAD = ("C", "C_per_E", "L2", "moved")
STABILITY = ("S", "S_abs", "S_loo", "pair", "pair_abs")
TARGETS = ("S_abs", "S", "pair_abs", "pair", "E_cv", "L2", "moved", "C")
"""The eight primary targets of the published code for GPT-2, Pythia and Gemma."""
NUISANCES = ("E", "natural_mean", "final_frequency")
"""Effect size, natural activation and frequency: what the replication controls for, on both axes."""
AUTHOR_NUISANCES = ("E", "E_cv", "natural_mean", "natural_max")
"""The paper's, used on stability only; its fifth, the dose, is constant."""


def folds(n: int, seed: int, k: int = FOLDS) -> list[tuple[np.ndarray, np.ndarray]]:
    """Shuffled train and test rows, as scikit-learn deals them."""
    from sklearn.model_selection import KFold

    return list(KFold(k, shuffle=True, random_state=seed).split(np.arange(n)))


class Ridge:
    """Standardise the columns, then minimise |y - X b|^2 + alpha |b|^2 with a free intercept; several y at once."""

    def __init__(self, X: np.ndarray, Y: np.ndarray, alpha: float = ALPHA):
        self.mean, self.scale = X.mean(0), X.std(0)
        self.scale = np.where(
            self.scale > 1e-12 * (1 + np.abs(self.mean)), self.scale, np.inf
        )  # constants say nothing
        Z = (X - self.mean) / self.scale
        self.intercept = Y.mean(0)
        self.b = np.linalg.solve(Z.T @ Z + alpha * np.eye(Z.shape[1]), Z.T @ (Y - self.intercept))

    def __call__(self, X: np.ndarray) -> np.ndarray:
        return (X - self.mean) / self.scale @ self.b + self.intercept


def cross_predict(
    X: np.ndarray,
    Y: np.ndarray,
    splits: Sequence[tuple[np.ndarray, np.ndarray]],
    nuisance: np.ndarray | None = None,
    everywhere: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Out-of-fold (targets, predictions), each row predicted by a model that never saw it.

    With `nuisance`, both are what a ridge on the nuisances leaves, fitted inside the training fold (or, as published,
    on all rows: `everywhere`).
    """
    target, predicted = np.array(Y, dtype=float), np.zeros(Y.shape)
    for train, test in splits:
        y = np.array(Y, dtype=float)
        if nuisance is not None:
            rows = slice(None) if everywhere else train
            y = y - Ridge(nuisance[rows], y[rows])(nuisance)
        target[test] = y[test]
        predicted[test] = Ridge(X[train], y[train])(X[test])
    return target, predicted


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rho; not a number where one side is constant, since it has no order."""
    from scipy.stats import rankdata

    x, y = rankdata(x), rankdata(y)
    return float(np.corrcoef(x, y)[0, 1]) if x.std() > 0 and y.std() > 0 else float("nan")


def scores(target: np.ndarray, predicted: np.ndarray, splits: Sequence) -> dict[str, float]:
    """Pooled Spearman (published code), its mean over folds (replication), R2 and mean absolute error."""
    spread = float(np.sum((target - target.mean()) ** 2))
    return {
        "pooled": rank_correlation(target, predicted),
        "per_fold": float(
            np.mean([rank_correlation(target[test], predicted[test]) for _, test in splits])
        ),
        "R2": 1 - float(np.sum((target - predicted) ** 2)) / spread if spread > 0 else float("nan"),
        "MAE": float(np.mean(np.abs(target - predicted))),
    }


def columns_of(frame: "pd.DataFrame", name: str) -> np.ndarray:
    """The predictors of one of the ten sets, or of a set named by its columns joined with '+'."""
    names = predictors.SETS.get(name) or tuple(name.split("+"))
    return frame[list(names)].to_numpy(float)


def predictions(
    frame: "pd.DataFrame",
    targets: Sequence[str],
    sets: Sequence[str] = tuple(predictors.SETS),
    *,
    seed: int = 0,
    nuisances: Sequence[str] = (),
    everywhere: bool = False,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each predictor set, (targets, predictions), both [features, targets]."""
    splits, Y = folds(len(frame), seed), frame[list(targets)].to_numpy(float)
    Z = frame[list(nuisances)].to_numpy(float) if nuisances else None
    return {name: cross_predict(columns_of(frame, name), Y, splits, Z, everywhere) for name in sets}


def score_table(
    frame: "pd.DataFrame",
    targets: Sequence[str],
    sets: Sequence[str] = tuple(predictors.SETS),
    *,
    seed: int = 0,
    draws: int = 2000,
    nuisances: Sequence[str] = (),
    everywhere: bool = False,
) -> "pd.DataFrame":
    """One row a predictor set and target: scores, with a bootstrap interval of the pooled Spearman over features."""
    import pandas as pd

    splits, rows = folds(len(frame), seed), []
    found = predictions(frame, targets, sets, seed=seed, nuisances=nuisances, everywhere=everywhere)
    for name, (target, predicted) in found.items():
        for i, label in enumerate(targets):
            row = {"set": name, "target": label, **scores(target[:, i], predicted[:, i], splits)}
            interval = interval_of(predicted[:, i], target[:, i], seed, draws)
            rows.append(row | {"low": interval.low, "high": interval.high, "n": len(frame)})
    return pd.DataFrame(rows)


def interval_of(x: np.ndarray, y: np.ndarray, seed: int, draws: int) -> stats.Interval:
    """Spearman's rho with its bootstrap interval, or not-a-number throughout where it is undefined."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return stats.Interval(float("nan"), float("nan"), float("nan"), len(x))
    return stats.spearman(x, y, seed=seed, draws=draws)


def gains(
    frame: "pd.DataFrame",
    targets: Sequence[str],
    better: str = "full_no_magnitude",
    baselines: Sequence[str] = predictors.BASELINES,
    *,
    seed: int = 0,
    draws: int = 2000,
    nuisances: Sequence[str] = (),
) -> "pd.DataFrame":
    """rho(better) - rho(baseline): paired bootstrap over features, permutation p-value, Holm over the table."""
    import pandas as pd

    found, rows = (
        predictions(frame, targets, (better, *baselines), seed=seed, nuisances=nuisances),
        [],
    )
    for baseline in baselines:
        for i, label in enumerate(targets):
            y, a, b = found[better][0][:, i], found[better][1][:, i], found[baseline][1][:, i]
            if np.ptp(y) == 0 or np.ptp(a) == 0 or np.ptp(b) == 0:
                continue
            gain = stats.spearman_difference(a, b, y, seed=seed, draws=draws)
            p = _swap_test(a, b, y, seed, draws)
            rows.append(
                {
                    "baseline": baseline,
                    "target": label,
                    "gain": gain.value,
                    "low": gain.low,
                    "high": gain.high,
                    "p": p,
                }
            )
    frame = pd.DataFrame(rows)
    return frame.assign(holm=stats.holm(frame["p"]), n=len(y)) if len(frame) else frame


def _swap_test(a: np.ndarray, b: np.ndarray, y: np.ndarray, seed: int, draws: int) -> float:
    """Two-sided p-value of equal rank correlations with y: the two predictions' ranks change places at random."""
    from scipy.stats import rankdata

    a, b, y = (rankdata(v) - (len(v) + 1) / 2 for v in (a, b, y))
    rng = np.random.default_rng(seed)
    swapped = (rng.integers(0, 2, (draws, len(y))) * 2 - 1) @ ((a - b) * y)
    return float((1 + np.sum(np.abs(swapped) >= abs((a - b) @ y) - 1e-9)) / (draws + 1))


def leaders(
    frame: "pd.DataFrame",
    target: str,
    names: Sequence[str] = predictors.ALL,
    *,
    seed: int = 0,
    draws: int = 100,
) -> "pd.DataFrame":
    """The strongest single predictor of a label in each of many resamples of the features: how far it is chance."""
    import pandas as pd
    from scipy.stats import rankdata

    rng, names = (
        np.random.default_rng(seed),
        [name for name in names if np.ptp(frame[name].to_numpy(float)) > 0],
    )
    X, y = frame[names].to_numpy(float), frame[target].to_numpy(float)
    found = []
    for draw in range(draws):
        rows = rng.integers(0, len(y), len(y))
        ranks, label = rankdata(X[rows], axis=0), rankdata(y[rows])
        ranks, label = ranks - ranks.mean(0), label - label.mean()
        strength = np.abs(label @ ranks) / np.maximum(np.linalg.norm(ranks, axis=0), 1e-12)
        found.append({"draw": draw, "predictor": names[int(strength.argmax())]})
    return pd.DataFrame(found)


def boosted(
    frame: "pd.DataFrame",
    targets: Sequence[str],
    name: str = "full_no_magnitude",
    *,
    seed: int = 0,
    draws: int = 2000,
) -> "pd.DataFrame":
    """The paper's secondary model beside the ridge, same folds: 100 boosted trees of depth 2, learning rate .05."""
    import pandas as pd
    from sklearn.ensemble import GradientBoostingRegressor

    X, splits, rows = columns_of(frame, name), folds(len(frame), seed), []
    linear = predictions(frame, targets, (name,), seed=seed)[name][1]
    for i, label in enumerate(targets):
        y, predicted = frame[label].to_numpy(float), np.zeros(len(frame))
        for train, test in splits:
            trees = GradientBoostingRegressor(
                max_depth=2, n_estimators=100, learning_rate=0.05, random_state=seed
            )
            predicted[test] = trees.fit(X[train], y[train]).predict(X[test])
        if np.ptp(y) == 0 or np.ptp(predicted) == 0:
            continue
        gain = stats.spearman_difference(predicted, linear[:, i], y, seed=seed, draws=draws)
        rows.append(
            {
                "target": label,
                "ridge": rank_correlation(y, linear[:, i]),
                "boosted": rank_correlation(y, predicted),
            }
            | {"gain": gain.value, "low": gain.low, "high": gain.high}
        )
    return pd.DataFrame(rows)


def permuted(
    frame: "pd.DataFrame",
    target: str,
    name: str = "full_no_magnitude",
    *,
    seed: int = 0,
    draws: int = 200,
) -> np.ndarray:
    """Pooled Spearman of the same model on permuted labels: what it finds where there is nothing."""
    rng, y, X = np.random.default_rng(seed), frame[target].to_numpy(float), columns_of(frame, name)
    Y = np.stack([rng.permutation(y) for _ in range(draws)], axis=1)
    truth, predicted = cross_predict(X, Y, folds(len(frame), seed))
    return np.array([rank_correlation(truth[:, i], predicted[:, i]) for i in range(draws)])


def univariate(
    frame: "pd.DataFrame",
    targets: Sequence[str],
    names: Sequence[str] = predictors.ALL,
    *,
    controls: Sequence[str] = (),
    seed: int = 0,
    draws: int = 2000,
) -> "pd.DataFrame":
    """Spearman of each predictor with each target, and, with `controls`, of what their ranks leave of both."""
    import pandas as pd

    rows = []
    for label in targets:
        y = frame[label].to_numpy(float)
        for name in names:
            x = frame[name].to_numpy(float)
            if np.ptp(x) == 0 or np.ptp(y) == 0 or name in controls:
                continue
            if controls:
                rho = stats.partial_spearman(
                    x, y, [frame[c].to_numpy(float) for c in controls], seed=seed, draws=draws
                )
            else:
                rho = stats.spearman(x, y, seed=seed, draws=draws)
            rows.append(
                {
                    "target": label,
                    "predictor": name,
                    "rho": rho.value,
                    "low": rho.low,
                    "high": rho.high,
                    "n": rho.n,
                }
            )
    return pd.DataFrame(rows)


def reliability(
    frame: "pd.DataFrame", labels: Sequence[str], *, seed: int = 0, draws: int = 2000
) -> "pd.DataFrame":
    """Rank correlation of each label measured on two disjoint pools of contexts (columns `label@a` and `label@b`)."""
    import pandas as pd

    rows = []
    for label in labels:
        rho = interval_of(
            frame[f"{label}@a"].to_numpy(float), frame[f"{label}@b"].to_numpy(float), seed, draws
        )
        rows.append(
            {"label": label, "rho": rho.value, "low": rho.low, "high": rho.high, "n": rho.n}
        )
    return pd.DataFrame(rows)
