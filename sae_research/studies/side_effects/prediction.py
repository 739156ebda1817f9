"""Predicting labels from predictors: ridge across folds, nuisances, nulls (section 3.8).

All scores are rank correlations (Spearman) of out-of-fold predictions with the label.
"""

from collections.abc import Sequence
from itertools import product

import numpy as np
import pandas as pd
from scipy.stats import rankdata
from sklearn.ensemble import GradientBoostingRegressor
from sklearn.model_selection import cross_val_predict

from sae_research import stats
from sae_research.screening import predictors
from sae_research.screening.ridge import (
    Splits,
    cross_predict,
    get_columns,
    make_folds,
    rank_correlation,
)

FULL_SET = "full_no_magnitude"
TARGETS = ("S_abs", "S", "pair_abs", "pair", "E_cv", "L2", "moved", "C")
"""The eight primary targets of the published code for GPT-2, Pythia and Gemma."""
NUISANCES = ("E", "natural_mean", "final_frequency")
"""Effect size, natural activation and frequency: the replication's controls, on both axes."""
AUTHOR_NUISANCES = ("E", "E_cv", "natural_mean", "natural_max")
"""The paper's, used on stability only; its fifth, the dose, is constant."""


def score(target: np.ndarray, predicted: np.ndarray, splits: Splits) -> dict[str, float]:
    """Pooled Spearman (published code), its mean over folds (replication), R2 and mean error."""
    spread = float(np.sum((target - target.mean()) ** 2))
    per_fold = [rank_correlation(target[test], predicted[test]) for _, test in splits]
    return {
        "pooled": rank_correlation(target, predicted),
        "per_fold": float(np.mean(per_fold)),
        "R2": 1 - float(np.sum((target - predicted) ** 2)) / spread if spread > 0 else float("nan"),
        "MAE": float(np.mean(np.abs(target - predicted))),
    }


def predict_sets(
    frame: pd.DataFrame,
    targets: Sequence[str],
    sets: Sequence[str] = tuple(predictors.SETS),
    *,
    seed: int = 0,
    nuisances: Sequence[str] = (),
    everywhere: bool = False,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each predictor set, (targets, predictions), both [features, targets]."""
    splits = make_folds(len(frame), seed)
    Y = frame[list(targets)].to_numpy(float)
    Z = frame[list(nuisances)].to_numpy(float) if nuisances else None
    return {
        name: cross_predict(get_columns(frame, name), Y, splits, Z, everywhere) for name in sets
    }


def score_sets(
    frame: pd.DataFrame,
    targets: Sequence[str],
    *,
    seed: int = 0,
    draws: int = 2000,
    nuisances: Sequence[str] = (),
    everywhere: bool = False,
) -> pd.DataFrame:
    """One row per predictor set and target: scores, the pooled one with its interval."""
    splits = make_folds(len(frame), seed)
    found = predict_sets(frame, targets, seed=seed, nuisances=nuisances, everywhere=everywhere)
    rows = []
    for name, (target, predicted) in found.items():
        for i, label in enumerate(targets):
            scores = score(target[:, i], predicted[:, i], splits)
            interval = spearman(predicted[:, i], target[:, i], seed, draws)
            ends = {"low": interval.low, "high": interval.high, "n": len(frame)}
            rows.append({"set": name, "target": label, **scores, **ends})
    return pd.DataFrame(rows)


def spearman(x: np.ndarray, y: np.ndarray, seed: int, draws: int) -> stats.Interval:
    """Spearman's rho with its bootstrap interval, not a number throughout where it is undefined."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return stats.Interval(float("nan"), float("nan"), float("nan"), len(x))
    return stats.spearman(x, y, seed=seed, draws=draws)


def compare_sets(
    frame: pd.DataFrame,
    targets: Sequence[str],
    better: str = FULL_SET,
    baselines: Sequence[str] = predictors.BASELINES,
    *,
    seed: int = 0,
    draws: int = 2000,
) -> pd.DataFrame:
    """rho(better) - rho(baseline): paired bootstrap over features, permutation p-value, Holm."""
    found = predict_sets(frame, targets, (better, *baselines), seed=seed)
    rows = []
    for baseline in baselines:
        for i, label in enumerate(targets):
            y = found[better][0][:, i]
            a = found[better][1][:, i]
            b = found[baseline][1][:, i]
            if np.ptp(y) == 0 or np.ptp(a) == 0 or np.ptp(b) == 0:
                continue
            gain = stats.spearman_difference(a, b, y, seed=seed, draws=draws)
            row = {"baseline": baseline, "target": label, "gain": gain.value, "low": gain.low}
            rows.append(row | {"high": gain.high, "p": _swap_p_value(a, b, y, seed, draws)})
    table = pd.DataFrame(rows)
    return table.assign(holm=stats.holm(table["p"]), n=len(frame)) if len(table) else table


def _swap_p_value(a: np.ndarray, b: np.ndarray, y: np.ndarray, seed: int, draws: int) -> float:
    """P-value of equal rank correlations with y: two predictions' ranks trade places at random."""
    a, b, y = (rankdata(v) - (len(v) + 1) / 2 for v in (a, b, y))
    rng = np.random.default_rng(seed)
    swapped = (rng.integers(0, 2, (draws, len(y))) * 2 - 1) @ ((a - b) * y)
    return float((1 + np.sum(np.abs(swapped) >= abs((a - b) @ y) - 1e-9)) / (draws + 1))


def compare_with_random(
    frame: pd.DataFrame,
    labels: Sequence[str],
    *,
    suffixes: tuple[str, str] = ("", "@random"),
    seed: int = 0,
    draws: int = 2000,
) -> pd.DataFrame:
    """Scores of the full set for SAE directions and for random directions of the same norm, raw
    and residualised, and their difference on the same resampled features; `suffixes` say which
    columns hold the two.
    """

    def subtract(x1, y1, x2, y2) -> float:
        # a resample that leaves one side constant has no correlation
        rhos = np.nan_to_num([rank_correlation(x1, y1), rank_correlation(x2, y2)])
        return float(rhos[0] - rhos[1])

    rows = []
    given = {"seed": seed, "draws": draws}
    for residualised, label in product((False, True), labels):
        pairs = {}
        for name, suffix in zip(("SAE", "random"), suffixes, strict=True):
            nuisances = ("E" + suffix, *NUISANCES[1:]) if residualised else ()
            found = predict_sets(
                frame, [label + suffix], (FULL_SET,), seed=seed, nuisances=nuisances
            )
            pairs[name] = [values[:, 0] for values in found[FULL_SET]]
        intervals = {name: spearman(*pair, **given) for name, pair in pairs.items()}
        intervals["difference"] = stats.bootstrap(
            subtract, *pairs["SAE"], *pairs["random"], **given
        )
        key = {"target": label, "residualised": residualised}
        rows += [{**key, "direction": name, **as_row(i)} for name, i in intervals.items()]
    return pd.DataFrame(rows)


def as_row(interval: stats.Interval, value: str = "rho") -> dict[str, float]:
    """An interval as columns of a table."""
    return {value: interval.value, "low": interval.low, "high": interval.high, "n": interval.n}


def find_leaders(
    frame: pd.DataFrame, target: str, *, seed: int = 0, draws: int = 100
) -> pd.DataFrame:
    """The strongest single predictor of a label in each of many resamples of the features."""
    rng = np.random.default_rng(seed)
    names = [name for name in predictors.ALL if np.ptp(frame[name].to_numpy(float)) > 0]
    X = frame[names].to_numpy(float)
    y = frame[target].to_numpy(float)
    rows = []
    for draw in range(draws):
        chosen = rng.integers(0, len(y), len(y))
        ranks = rankdata(X[chosen], axis=0)
        label = rankdata(y[chosen])
        ranks = ranks - ranks.mean(0)
        label = label - label.mean()
        strength = np.abs(label @ ranks) / np.maximum(np.linalg.norm(ranks, axis=0), 1e-12)
        rows.append({"draw": draw, "predictor": names[int(strength.argmax())]})
    return pd.DataFrame(rows)


def compare_boosted_trees(
    frame: pd.DataFrame, targets: Sequence[str], *, seed: int = 0, draws: int = 2000
) -> pd.DataFrame:
    """The paper's second model, 100 trees of depth 2 at rate .05, beside the ridge: same folds."""

    X = get_columns(frame, FULL_SET)
    splits = make_folds(len(frame), seed)
    linear = predict_sets(frame, targets, (FULL_SET,), seed=seed)[FULL_SET][1]
    rows = []
    for i, label in enumerate(targets):
        y = frame[label].to_numpy(float)
        trees = GradientBoostingRegressor(max_depth=2, learning_rate=0.05, random_state=seed)
        boosted = cross_val_predict(trees, X, y, cv=splits)
        if np.ptp(y) == 0 or np.ptp(boosted) == 0:
            continue
        gain = stats.spearman_difference(boosted, linear[:, i], y, seed=seed, draws=draws)
        row = {"target": label, "ridge": rank_correlation(y, linear[:, i])}
        row |= {"boosted": rank_correlation(y, boosted), "gain": gain.value}
        rows.append(row | {"low": gain.low, "high": gain.high})
    return pd.DataFrame(rows)


def score_permuted(
    frame: pd.DataFrame, target: str, *, seed: int = 0, draws: int = 200
) -> np.ndarray:
    """Pooled Spearman of the full set on permuted labels: what it finds where there is nothing."""
    rng = np.random.default_rng(seed)
    y = frame[target].to_numpy(float)
    Y = np.stack([rng.permutation(y) for _ in range(draws)], axis=1)
    splits = make_folds(len(frame), seed)
    truth, predicted = cross_predict(get_columns(frame, FULL_SET), Y, splits)
    return np.array([rank_correlation(truth[:, i], predicted[:, i]) for i in range(draws)])


def correlate_predictors(
    frame: pd.DataFrame,
    targets: Sequence[str],
    names: Sequence[str] = predictors.ALL,
    *,
    controls: Sequence[str] = (),
    seed: int = 0,
    draws: int = 2000,
) -> pd.DataFrame:
    """Spearman of each predictor with each target; with `controls`, of what their ranks leave."""
    given = [frame[control].to_numpy(float) for control in controls]
    rows = []
    for label in targets:
        y = frame[label].to_numpy(float)
        for name in names:
            x = frame[name].to_numpy(float)
            if np.ptp(x) == 0 or np.ptp(y) == 0 or name in controls:
                continue
            if controls:
                rho = stats.partial_spearman(x, y, given, seed=seed, draws=draws)
            else:
                rho = stats.spearman(x, y, seed=seed, draws=draws)
            rows.append({"target": label, "predictor": name, **as_row(rho)})
    return pd.DataFrame(rows)


def measure_reliability(
    frame: pd.DataFrame, labels: Sequence[str], *, seed: int = 0, draws: int = 2000
) -> pd.DataFrame:
    """Rank correlation of each label between two disjoint pools of contexts, `@a` and `@b`."""
    rows = []
    for label in labels:
        first, second = (frame[f"{label}@{side}"].to_numpy(float) for side in "ab")
        rows.append({"label": label, **as_row(spearman(first, second, seed, draws))})
    return pd.DataFrame(rows)
