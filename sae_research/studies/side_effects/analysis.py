"""The tables that figures and claims rest on, from the feature table of one SAE."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from sae_research import saes, stats
from sae_research.screening import predictors, ridge
from sae_research.screening.screen import (
    DOSED_LABELS,
    OWN,
    OWN_RANDOM,
    RANDOM,
    Screen,
)
from sae_research.studies.side_effects import prediction, selection
from sae_research.studies.side_effects.settings import Settings

if TYPE_CHECKING:
    from sae_lens import SAE

Tables = dict[str, pd.DataFrame]

HEADLINES = ("C", "C_per_E", "S_abs", "S_loo", "S")
"""The labels of the two axes: spread and stability."""
FORECASTERS = {
    "C": ("C^identity", "C^mean_jacobian", "C^random_map", "C^jacobian", "output_score"),
    "C_per_E": ("C_per_E^jacobian", "output_score"),
    "S_abs": ("S_abs^jacobian", "output_score"),
    "E": ("E^jacobian", "output_score"),
}
"""What forecasts each label; the output score steers one prompt per feature, the others none."""
TOP_KS = (5, 10, 15, 20, 30, 40, 50)


def make_tables(frame: pd.DataFrame, settings: Settings, seed: int) -> Tables:
    """Everything that follows from one feature table."""
    draws = settings.n_bootstrap
    return {
        "univariate": _correlate_predictors(frame, draws, seed),
        **_predict(frame, settings, seed),
        **_screen_held_out(frame, settings, seed),
        "forecasts": score_forecasts(frame, draws, seed),
        "sensitivity": _vary_measurement(frame, settings, seed),
        "dose_change": pd.DataFrame([_compare_doses(frame, settings, seed)]),
        "reliability": prediction.measure_reliability(
            frame,
            ("C/4", "C/2", "C", "C_per_E", "E", "S_abs", "S", "S_loo", "KL"),
            seed=seed,
            draws=draws,
        ),
    }


def _correlate_predictors(frame: pd.DataFrame, draws: int, seed: int) -> pd.DataFrame:
    """Every predictor against both axes, and against the count given the nuisances."""
    given = {"seed": seed, "draws": draws}
    own, own_signed = "C" + OWN, "S" + OWN
    raw = prediction.correlate_predictors(frame, (*HEADLINES, own, own_signed), **given)
    given["controls"] = prediction.NUISANCES
    partial = prediction.correlate_predictors(frame, ("C", own), **given)
    words = "effect, activation, frequency"
    return pd.concat([raw.assign(control="none"), partial.assign(control=words)], ignore_index=True)


def _predict(frame: pd.DataFrame, settings: Settings, seed: int) -> Tables:
    """Scores of the ten sets, raw and residualised, gains over baselines, controls and nulls.

    `as_published` removes nuisances from stability with a fit that sees held-out labels.
    """
    given = {"seed": seed, "draws": settings.n_bootstrap}
    raw = prediction.score_sets(frame, HEADLINES, **given)
    left = prediction.score_sets(frame, HEADLINES, nuisances=prediction.NUISANCES, **given)
    sets = [raw.assign(residualised=False), left.assign(residualised=True)]
    over_frequency = [
        prediction.compare_sets(frame, ("C", "S_abs"), name, ("freq_only",), **given).assign(
            set=name
        )
        for name in predictors.SETS
        if name != "freq_only"
    ]
    targets = tuple(dict.fromkeys((*HEADLINES, *prediction.TARGETS)))
    null = {
        target: prediction.score_permuted(frame, target, seed=seed, draws=settings.n_permutations)
        for target in ("C", "S_abs")
    }
    return {
        "sets": pd.concat(sets, ignore_index=True),
        "set_gains": pd.concat(over_frequency, ignore_index=True),
        "gains": prediction.compare_sets(frame, targets, **given),
        "gains_random": prediction.compare_sets(frame, ("C@random", "S_abs@random"), **given),
        "random": prediction.compare_with_random(
            frame, ("C", "C_per_E", "S_abs", "S_loo"), **given
        ),
        "own_contexts": prediction.compare_with_random(
            frame, ("C", "C_per_E", "S_abs"), suffixes=(OWN, OWN_RANDOM), **given
        ),
        "leaders": prediction.find_leaders(frame, "C", seed=seed),
        "as_published": prediction.score_sets(
            frame, ("S_abs", "S"), nuisances=prediction.AUTHOR_NUISANCES, everywhere=True, **given
        ),
        "boosted": prediction.compare_boosted_trees(frame, ("C", "S_abs"), **given),
        "null": pd.DataFrame(null),
    }


def _screen_held_out(frame: pd.DataFrame, settings: Settings, seed: int) -> Tables:
    """Payoff over many splits, the same with permuted training labels, and the top-k curve."""
    n = settings.n_splits
    first = 1000 * seed
    real = selection.repeat_splits(frame, settings, n, first)
    permuted = selection.repeat_splits(frame, settings, n, first, permute=True)
    both = [real.assign(labels="real"), permuted.assign(labels="permuted")]
    return {
        "splits": pd.concat(both, ignore_index=True),
        "top_k": selection.measure_top_k(frame, settings, TOP_KS, min(n, 100), first),
    }


def confirm_on_fresh(screen: Screen, fresh: torch.Tensor, settings: Settings, seed: int) -> Tables:
    """One frozen split: train on the measured labels, choose, steer the held-out features on fresh
    contexts, compare the groups; the same from beginning to end with the random directions.
    """
    first = 1000 * seed
    tables = []
    for direction, suffix in (("random", RANDOM), ("SAE", "")):
        frame = screen.frame.assign(**{n: screen.frame[n + suffix] for n in DOSED_LABELS})
        split = selection.split_features(frame, settings, first)
        measured = screen.label_on(fresh, split.held_out, random=bool(suffix))
        spread = measured.std(ddof=0) + 1e-12
        # rows by their number in the feature table, as in the groups
        measured = measured.set_axis(split.held_out).reindex(range(len(frame)))
        table = selection.compare_groups(measured, split, seed, settings.n_bootstrap)
        standardised = table["difference"] / spread[table["metric"]].to_numpy()
        grade = selection.grade_payoff(table)
        tables.append(table.assign(direction=direction, standardised=standardised, grade=grade))
    return {"confirmation": pd.concat(tables, ignore_index=True)}


def correlate_seed_cosine(
    frame: pd.DataFrame, sae: "SAE", others: "Sequence[SAE]", draws: int, seed: int
) -> pd.DataFrame:
    """Spearman of a label with how well other seeds of the SAE find the feature: the mean cosine of
    its decoder row with the row that it is paired with in each.
    """
    matched = np.mean([saes.match_decoders(sae, other) for other in others], axis=0)
    rows = []
    for label in ("C", "C_per_E", "S_abs"):
        for direction, suffix in (("SAE", ""), ("random", RANDOM)):
            y = frame[label + suffix].to_numpy(float)
            rho = prediction.spearman(matched[frame.index], y, seed, draws)
            rows.append({"label": label, "direction": direction, **prediction.as_row(rho)})
    return pd.DataFrame(rows)


def score_forecasts(frame: pd.DataFrame, draws: int, seed: int) -> pd.DataFrame:
    """Each forecaster against its label, beside the paper's full set and both together.

    Gains are over the full set.
    """
    splits = ridge.make_folds(len(frame), seed)
    full = predictors.SETS[prediction.FULL_SET]
    rows = []
    for target, names in FORECASTERS.items():
        y = frame[target].to_numpy(float)
        free = tuple(name for name in names if name != "output_score")
        scores = {}
        for name, columns in ((prediction.FULL_SET, full), ("both", (*full, *free))):
            X = frame[list(columns)].to_numpy(float)
            scores[name] = ridge.cross_predict(X, y[:, None], splits)[1][:, 0]
        baseline = scores[prediction.FULL_SET]
        scores |= {name: frame[name].to_numpy(float) for name in names}
        for name, x in scores.items():
            rho = prediction.spearman(x, y, seed, draws)
            row = {"target": target, "forecaster": name, **prediction.as_row(rho)}
            if name != prediction.FULL_SET and np.ptp(x) > 0:
                gain = stats.spearman_difference(x, baseline, y, seed=seed, draws=draws)
                row |= {"gain": gain.value, "gain_low": gain.low, "gain_high": gain.high}
            rows.append(row)
    return pd.DataFrame(rows)


def _vary_measurement(frame: pd.DataFrame, settings: Settings, seed: int) -> pd.DataFrame:
    """Crowding against C and C/E: every dose, threshold and panel size, and random directions."""
    doses = sorted({1.0, *settings.dose_multiples})
    cases = [("dose", f"{m:g}", "" if m == 1 else f"@{m:g}") for m in doses]
    cases += [("threshold", "1", "")]
    cases += [("threshold", f"{t:g}", f"@tau{t:g}") for t in sorted(settings.tau_multiples)]
    panels = [name for name in frame.columns if name.startswith("C@panel")]
    cases += [("panel", name.removeprefix("C@panel"), name[1:]) for name in panels]
    cases += [("direction", "SAE", ""), ("direction", "random", RANDOM)]
    cases += [("activation", "own mean", "@activation")]
    cases += [("own contexts", "SAE", OWN), ("own contexts", "random", OWN_RANDOM)]
    x = frame["crowding"].to_numpy(float)
    rows = []
    for kind, value, suffix in cases:
        for label in ("C", "C_per_E"):
            if label + suffix not in frame:
                continue
            y = frame[label + suffix].to_numpy(float)
            rho = prediction.spearman(x, y, seed, settings.n_bootstrap)
            row = {"kind": kind, "value": value, "label": label, **prediction.as_row(rho)}
            rows.append(row | {"median": float(np.median(y))})
    return pd.DataFrame(rows)


def _compare_doses(frame: pd.DataFrame, settings: Settings, seed: int) -> dict[str, float]:
    """rho(crowding, C/E) at the highest dose minus that at the lowest, on the same resamples."""
    doses = sorted({1.0, *settings.dose_multiples})
    names = ["C_per_E" if m == 1 else f"C_per_E@{m:g}" for m in (doses[0], doses[-1])]
    low, high = (frame[name].to_numpy(float) for name in names)
    x = frame["crowding"].to_numpy(float)
    change = stats.spearman_difference(high, low, x, seed=seed, draws=settings.n_bootstrap)
    return prediction.as_row(change)
