"""Choosing features by prediction, on features whose labels the predictor never saw (published code, phase 4)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sae_research import stats
from sae_research.errors import ResearchError
from sae_research.studies.side_effects.models import Ridge, columns_of

if TYPE_CHECKING:
    import pandas as pd

METRICS = ("S_abs", "S", "C_per_E", "C", "E", "KL_per_E")
"""What the groups are compared on; the paper's payoff is on S_abs and C_per_E."""


def _z(x: np.ndarray, rows: np.ndarray | slice) -> np.ndarray:
    return (x - x[rows].mean()) / (x[rows].std() + 1e-12)


def clean_score(
    S_abs: np.ndarray,
    C: np.ndarray,
    E: np.ndarray,
    formula: str = "log_over_effect",
    rows: np.ndarray | slice = slice(None),
) -> np.ndarray:
    """z(|S|) - z(ln(1+C)/E) (GPT-2, Pythia, Gemma) or z(|S|) - z(ln(1+C/E)) (`log_of_ratio`, Llama).

    Both are standardised by the mean and spread of `rows`.
    """
    formulas = {
        "log_over_effect": np.log1p(C) / (E + 1e-8),
        "log_of_ratio": np.log1p(C / (E + 1e-8)),
    }
    if formula not in formulas:
        raise ResearchError(f"unknown clean score '{formula}'; valid: {', '.join(formulas)}.")
    return _z(S_abs, rows) - _z(formulas[formula], rows)


@dataclass(frozen=True)
class Rule:
    """How features are split, matched and grouped."""

    pool: float = 0.4
    """Share of the features held out of training (Llama: .3)."""
    matched: tuple[float, float] = (0.1, 0.9)
    """Quantiles of the predicted effect between which pool features are kept (Pythia, Gemma: .05 and .95)."""
    group: int = 50
    """Features a group asked for; at most a third of the matched pool."""
    formula: str = "log_over_effect"
    """Which clean score, see `clean_score`."""
    selector: str = "full_no_magnitude"
    """Predictor set of the selector (published: geometry_only for GPT-2)."""
    frozen: bool = False
    """Whether the score is standardised on training features alone; as published, held-out labels enter too."""


@dataclass
class Split:
    """One split of the features, and whom the predictor chose; arrays hold row numbers of the table."""

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


def split(frame: "pd.DataFrame", rule: Rule, seed: int, permuted: int | None = None) -> Split:
    """Train clean score and effect on some features, predict the others, match on effect, form three groups.

    `permuted` is the seed of a shuffle of the training labels: the control of what the protocol itself produces.
    """
    n = len(frame)
    rng = np.random.default_rng(seed)
    order = rng.permutation(n)
    held = round(rule.pool * n)
    held_out, train = order[:held], order[held:]
    S, C, E = (frame[name].to_numpy(float) for name in ("S_abs", "C", "E"))
    seen = train if rule.frozen else slice(None)
    Y = np.stack([clean_score(S, C, E, rule.formula, seen), E], axis=1)[train]
    X = columns_of(frame, rule.selector)
    if permuted is not None:
        Y = np.random.default_rng([seed, permuted]).permutation(Y)
    score, effect = Ridge(X[train], Y)(X[held_out]).T
    low, high = np.quantile(effect, rule.matched)
    kept = (effect >= low) & (effect <= high)
    ranked = held_out[kept][np.argsort(-score[kept], kind="stable")]
    k = min(rule.group, len(ranked) // 3)
    if k < 2:
        raise ResearchError(
            f"{n} features leave groups of {k} for screening; label more features or widen the matching."
        )
    middle = ranked[k : len(ranked) - k]
    return Split(
        train, held_out, ranked, ranked[:k], ranked[-k:], rng.choice(middle, k, replace=False)
    )


def payoff(
    frame: "pd.DataFrame", groups: Split, metrics: tuple[str, ...] = METRICS
) -> dict[str, float]:
    """Differences of group means, clean - messy and clean - random, per metric."""
    found = {}
    for metric in metrics:
        y = frame[metric].to_numpy(float)
        clean = y[groups.clean].mean()
        found[f"{metric}: clean - messy"] = clean - y[groups.messy].mean()
        found[f"{metric}: clean - random"] = clean - y[groups.random].mean()
    return found


def against_oracle(frame: "pd.DataFrame", groups: Split, rule: Rule) -> dict[str, float]:
    """Clean score of the chosen: lift over the candidates' mean, regret to the best choice, and their ratio."""
    S, C, E = (frame[name].to_numpy(float) for name in ("S_abs", "C", "E"))
    truth = clean_score(S, C, E, rule.formula)
    k, mean = len(groups.clean), truth[groups.candidates].mean()
    chosen, best = truth[groups.clean].mean(), np.sort(truth[groups.candidates])[-k:].mean()
    return {
        "lift": chosen - mean,
        "regret": best - chosen,
        "share_of_oracle": (chosen - mean) / (best - mean + 1e-12),
    }


def repeated(
    frame: "pd.DataFrame", rule: Rule, splits: int, seed: int, permute: bool = False
) -> "pd.DataFrame":
    """One row a random split: payoff, lift and regret. The labels exist already, so a split costs nothing."""
    import pandas as pd

    rows = []
    for i in range(splits):
        groups = split(frame, rule, seed + i, 0 if permute else None)
        rows.append({"split": i, **payoff(frame, groups), **against_oracle(frame, groups, rule)})
    return pd.DataFrame(rows)


def top_k(
    frame: "pd.DataFrame", rule: Rule, ks: tuple[int, ...], splits: int, seed: int
) -> "pd.DataFrame":
    """Lift of the clean score over the candidates' mean when k are chosen: predicted, oracle, over random splits."""
    import pandas as pd

    S, C, E = (frame[name].to_numpy(float) for name in ("S_abs", "C", "E"))
    truth, rows = clean_score(S, C, E, rule.formula), []
    for i in range(splits):
        ranked = split(frame, rule, seed + i).candidates
        scores, best = truth[ranked], np.sort(truth[ranked])[::-1]
        for k in ks:
            if k <= len(ranked):
                lift = scores[:k].mean() - scores.mean()
                rows.append(
                    {
                        "k": k,
                        "split": i,
                        "predicted": lift,
                        "oracle": best[:k].mean() - scores.mean(),
                    }
                )
    return pd.DataFrame(rows)


def over_splits(values: np.ndarray, level: float = 0.95) -> stats.Interval:
    """Mean over splits with the central range of the splits themselves (they share features: no standard error)."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return stats.Interval(float(np.mean(values)), float(low), float(high), len(values))


def compare_groups(
    labels: "pd.DataFrame", groups: dict[str, np.ndarray], *, seed: int, draws: int = 2000
) -> "pd.DataFrame":
    """Fresh labels of three groups of rows: mean difference with a bootstrap interval, and Mann-Whitney's U."""
    import pandas as pd
    from scipy.stats import mannwhitneyu

    rows, rng = [], np.random.default_rng(seed)
    for metric in METRICS:
        y = labels[metric].to_numpy(float)
        for a, b in (("clean", "messy"), ("clean", "random"), ("messy", "random")):
            first, second = y[groups[a]], y[groups[b]]
            drawn = first[rng.integers(0, len(first), (draws, len(first)))].mean(1)
            drawn = drawn - second[rng.integers(0, len(second), (draws, len(second)))].mean(1)
            low, high = np.quantile(drawn, [0.025, 0.975])
            p = float(mannwhitneyu(first, second, alternative="two-sided").pvalue)
            difference = float(first.mean() - second.mean())
            row = {
                "metric": metric,
                "groups": f"{a} - {b}",
                "difference": difference,
                "low": low,
                "high": high,
                "p": p,
            }
            rows.append(row | {"n": len(first)})
    return pd.DataFrame(rows)


def verdict(comparison: "pd.DataFrame", significant: bool = False) -> str:
    """Strong if the clean group beats the messy one on both axes (|S| up, C/E down), partial on one, else weak.

    `significant` asks p < .05 as well, as the published Llama script does.
    """
    rows = comparison[comparison.groups == "clean - messy"].set_index("metric")
    better = [rows.difference["S_abs"] > 0, rows.difference["C_per_E"] < 0]
    if significant:
        better = [b and rows.p[m] < 0.05 for b, m in zip(better, ("S_abs", "C_per_E"), strict=True)]
    return ("weak", "partial", "strong")[sum(better)]
