"""Choosing features by prediction, among features whose labels the predictor never saw.

Published code, phase 4. Rows of the feature table are given by number.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import mannwhitneyu

from sae_research import stats
from sae_research.errors import ResearchError
from sae_research.screening.labels import ALL_ROWS, compute_clean_score
from sae_research.screening.ridge import get_columns, predict_by_ridge
from sae_research.studies.side_effects.settings import Settings

METRICS = ("S_abs", "S", "C_per_E", "C", "E", "KL_per_E")
"""What the groups are compared on; the paper's payoff is on S_abs and C_per_E."""


@dataclass
class Split:
    """One split of the features, and which ones the predictor chose."""

    train: np.ndarray
    """Features whose labels the predictor saw."""
    held_out: np.ndarray
    """The others."""
    candidates: np.ndarray
    """Held-out features left after effect matching, cleanest prediction first."""
    clean: np.ndarray
    """Predicted cleanest."""
    messy: np.ndarray
    """Predicted messiest."""
    random: np.ndarray
    """Drawn from the others."""


def split_features(
    frame: pd.DataFrame, settings: Settings, seed: int, permutation: int | None = None
) -> Split:
    """Train clean score and effect on some features, predict the others, match on predicted effect,
    form three groups.

    `permutation` seeds a shuffle of the training labels: what the protocol itself produces. As
    published, held-out labels enter the standardisation of the score; in the replication none do.
    """
    n = len(frame)
    rng = np.random.default_rng(seed)
    order = rng.permutation(n)
    n_held_out = round(settings.holdout_fraction * n)
    held_out = order[:n_held_out]
    train = order[n_held_out:]
    seen = train if settings.protocol == "replication" else ALL_ROWS
    score = compute_clean_score(frame, settings.clean_score, seen)
    Y = np.stack([score, frame["E"].to_numpy(float)], axis=1)[train]
    if permutation is not None:
        Y = np.random.default_rng([seed, permutation]).permutation(Y)
    X = get_columns(frame, settings.selector)
    score, effect = predict_by_ridge(X[train], Y, X[held_out]).T
    low, high = np.quantile(effect, settings.effect_quantiles)
    matched = (effect >= low) & (effect <= high)
    ranked = held_out[matched][np.argsort(-score[matched], kind="stable")]
    k = min(settings.group_size, len(ranked) // 3)
    if k < 2:
        raise ResearchError(
            f"{n} features leave groups of {k} for screening; label more features or widen the "
            "effect_quantiles."
        )
    random = rng.choice(ranked[k : len(ranked) - k], k, replace=False)
    return Split(train, held_out, ranked, ranked[:k], ranked[-k:], random)


def measure_payoff(frame: pd.DataFrame, groups: Split) -> dict[str, float]:
    """Differences of group means, clean - messy and clean - random, per metric."""
    found = {}
    for metric in METRICS:
        y = frame[metric].to_numpy(float)
        clean = y[groups.clean].mean()
        found[f"{metric}: clean - messy"] = clean - y[groups.messy].mean()
        found[f"{metric}: clean - random"] = clean - y[groups.random].mean()
    return found


def compare_with_oracle(frame: pd.DataFrame, groups: Split, settings: Settings) -> dict[str, float]:
    """Clean score of the chosen: lift over the candidates' mean, regret to the best choice (the
    oracle's), and the share of the oracle's lift that was reached.
    """
    truth = compute_clean_score(frame, settings.clean_score)
    mean = truth[groups.candidates].mean()
    chosen = truth[groups.clean].mean()
    best = np.sort(truth[groups.candidates])[-len(groups.clean) :].mean()
    return {
        "lift": chosen - mean,
        "regret": best - chosen,
        "share_of_oracle": (chosen - mean) / (best - mean + 1e-12),
    }


def repeat_splits(
    frame: pd.DataFrame, settings: Settings, n_splits: int, seed: int, permute: bool = False
) -> pd.DataFrame:
    """One row per random split: payoff, lift and regret; labels exist, so a split costs nothing."""
    rows = []
    for i in range(n_splits):
        groups = split_features(frame, settings, seed + i, 0 if permute else None)
        row = measure_payoff(frame, groups) | compare_with_oracle(frame, groups, settings)
        rows.append({"split": i, **row})
    return pd.DataFrame(rows)


def measure_top_k(
    frame: pd.DataFrame, settings: Settings, ks: tuple[int, ...], n_splits: int, seed: int
) -> pd.DataFrame:
    """Lift of the clean score over the candidates' mean when k are chosen, predicted and oracle."""
    truth = compute_clean_score(frame, settings.clean_score)
    rows = []
    for i in range(n_splits):
        scores = truth[split_features(frame, settings, seed + i).candidates]
        best = np.sort(scores)[::-1]
        for k in (k for k in ks if k <= len(scores)):
            lifts = {"predicted": scores[:k].mean(), "oracle": best[:k].mean()}
            row = {name: value - scores.mean() for name, value in lifts.items()}
            rows.append({"k": k, "split": i, **row})
    return pd.DataFrame(rows)


def summarize_splits(values: np.ndarray, level: float = 0.95) -> stats.Interval:
    """Mean and central range of splits; they share features, so this is no standard error."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return stats.Interval(float(np.mean(values)), float(low), float(high), len(values))


def compare_groups(labels: pd.DataFrame, split: Split, seed: int, draws: int) -> pd.DataFrame:
    """Mean difference of labels between groups, with bootstrap interval and Mann-Whitney's p."""
    rng = np.random.default_rng(seed)
    rows = []
    for metric in METRICS:
        y = labels[metric].to_numpy(float)
        for a, b in (("clean", "messy"), ("clean", "random"), ("messy", "random")):
            first = y[getattr(split, a)]
            second = y[getattr(split, b)]
            drawn = first[rng.integers(0, len(first), (draws, len(first)))].mean(1)
            drawn = drawn - second[rng.integers(0, len(second), (draws, len(second)))].mean(1)
            low, high = np.quantile(drawn, [0.025, 0.975])
            difference = float(first.mean() - second.mean())
            row = {"metric": metric, "groups": f"{a} - {b}", "difference": difference}
            p = float(mannwhitneyu(first, second, alternative="two-sided").pvalue)
            rows.append(row | {"low": low, "high": high, "p": p, "n": len(first)})
    return pd.DataFrame(rows)


def grade_payoff(comparison: pd.DataFrame) -> str:
    """Strong if clean beats messy on both axes (|S| up, C/E down), partial on one, else weak."""
    rows = comparison[comparison.groups == "clean - messy"].set_index("metric")
    better = [rows.difference["S_abs"] > 0, rows.difference["C_per_E"] < 0]
    return ("weak", "partial", "strong")[sum(better)]
