"""The tables that the figures and claims rest on, from the feature tables of one or more dictionaries."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sae_research import stats
from sae_research.studies.side_effects import models, predictors, screening, study

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from sae_lens import SAE

    from sae_research.studies.side_effects.settings import Settings

HEADLINES = ("C", "C_per_E", "S_abs", "S_loo", "S")
"""The labels of the two axes: spread and stability."""
FORECASTERS = {
    "C": ("C^identity", "C^mean_jacobian", "C^random_map", "C^jacobian", "output_score"),
    "C_per_E": ("C_per_E^jacobian", "output_score"),
    "S_abs": ("S_abs^jacobian", "output_score"),
    "E": ("E^jacobian", "output_score"),
}
"""What forecasts each label; the output score steers one prompt a feature, the others none."""


def rule(settings: "Settings") -> screening.Rule:
    """The screening rule of the settings."""
    return screening.Rule(
        pool=settings.held_out,
        matched=settings.matched,
        group=settings.group,
        formula=settings.clean_score,
        selector=settings.selector,
        frozen=settings.protocol == "replication",
    )


def univariate(frame: "pd.DataFrame", settings: "Settings", seed: int) -> "pd.DataFrame":
    """Every predictor against both axes, and against the count given effect, natural activation and frequency."""
    import pandas as pd

    raw = models.univariate(frame, HEADLINES, seed=seed, draws=settings.draws).assign(
        control="none"
    )
    controls = models.NUISANCES
    partial = models.univariate(frame, ("C",), controls=controls, seed=seed, draws=settings.draws)
    return pd.concat(
        [raw, partial.assign(control="effect, activation, frequency")], ignore_index=True
    )


def prediction(frame: "pd.DataFrame", settings: "Settings", seed: int) -> dict[str, "pd.DataFrame"]:
    """Scores of the ten sets, raw and residualised, gains over both baselines, boosted trees, controls and nulls.

    `as_published` removes nuisances from stability with a fit that sees held-out labels.
    """
    import pandas as pd

    raw = models.score_table(frame, HEADLINES, seed=seed, draws=settings.draws).assign(
        residualised=False
    )
    left = models.score_table(
        frame, HEADLINES, seed=seed, draws=settings.draws, nuisances=models.NUISANCES
    ).assign(residualised=True)
    targets = tuple(dict.fromkeys((*HEADLINES, *models.TARGETS)))
    gains = models.gains(frame, targets, seed=seed, draws=settings.draws)
    random = models.gains(frame, ("C@random", "S_abs@random"), seed=seed, draws=settings.draws)
    null = {
        t: models.permuted(frame, t, seed=seed, draws=settings.permutations) for t in ("C", "S_abs")
    }
    return {
        "sets": pd.concat([raw, left], ignore_index=True),
        "gains": gains,
        "gains_random": random,
        "leaders": models.leaders(frame, "C", seed=seed),
        "as_published": models.score_table(
            frame,
            ("S_abs", "S"),
            seed=seed,
            draws=settings.draws,
            nuisances=models.AUTHOR_NUISANCES,
            everywhere=True,
        ),
        "boosted": models.boosted(frame, ("C", "S_abs"), seed=seed, draws=settings.draws),
        "null": pd.DataFrame(null),
    }


def held_out_screening(
    frame: "pd.DataFrame", settings: "Settings", seed: int
) -> dict[str, "pd.DataFrame"]:
    """Payoff over many splits, the same with permuted training labels, and the top-k curve."""
    import pandas as pd

    how, first = rule(settings), 1000 * seed
    real = screening.repeated(frame, how, settings.splits, first).assign(labels="real")
    shuffled = screening.repeated(frame, how, settings.splits, first, permute=True).assign(
        labels="permuted"
    )
    ks = (5, 10, 15, 20, 30, 40, 50)
    return {
        "splits": pd.concat([real, shuffled], ignore_index=True),
        "top_k": screening.top_k(frame, how, ks, min(settings.splits, 100), first),
    }


def confirmation(
    found: study.Screened, downstream: "SAE", fresh: "torch.Tensor", settings: "Settings", seed: int
) -> dict[str, "pd.DataFrame"]:
    """One frozen split: train on the measured labels, choose, steer the held-out on fresh contexts, compare the groups.

    The null chooses with permuted training labels, many times, from the same held-out features and fresh labels.
    """
    import pandas as pd

    how, first = rule(settings), 1000 * seed
    groups = screening.split(found.frame, how, first)
    measured = study.fresh_labels(found, downstream, fresh, groups.held_out)
    place = {row: i for i, row in enumerate(groups.held_out)}
    spread = measured.std(ddof=0) + 1e-12

    def members(chosen: screening.Split) -> dict[str, np.ndarray]:
        named = {"clean": chosen.clean, "messy": chosen.messy, "random": chosen.random}
        return {name: np.array([place[row] for row in rows]) for name, rows in named.items()}

    table = screening.compare_groups(measured, members(groups), seed=seed, draws=settings.draws)
    standardised = table["difference"] / spread[table["metric"]].to_numpy()
    null = []
    for i in range(settings.permutations):
        chosen = members(screening.split(found.frame, how, first, permuted=i))
        gap = (
            measured.iloc[chosen["clean"]].mean() - measured.iloc[chosen["messy"]].mean()
        ) / spread
        null.append({"permutation": i, **gap[list(screening.METRICS)]})
    return {
        "confirmation": table.assign(standardised=standardised, verdict=screening.verdict(table)),
        "confirmation_null": pd.DataFrame(null),
    }


def forecasts(frame: "pd.DataFrame", settings: "Settings", seed: int) -> "pd.DataFrame":
    """Each forecaster against its label, beside the paper's full set and both together; gains are over the full set."""
    import pandas as pd

    rows = []
    for target, names in FORECASTERS.items():
        free = tuple(name for name in names if name != "output_score")
        sets = {"full_no_magnitude": predictors.SETS["full_no_magnitude"]}
        sets["full_no_magnitude + forecasts"] = (*sets["full_no_magnitude"], *free)
        splits, y = models.folds(len(frame), seed), frame[target].to_numpy(float)
        by_ridge = {
            name: models.cross_predict(frame[list(columns)].to_numpy(float), y[:, None], splits)[1][
                :, 0
            ]
            for name, columns in sets.items()
        }
        own = {name: frame[name].to_numpy(float) for name in names}
        for name, x in (by_ridge | own).items():
            rho = models.interval_of(x, y, seed, settings.draws)
            row = {
                "target": target,
                "forecaster": name,
                "rho": rho.value,
                "low": rho.low,
                "high": rho.high,
                "n": rho.n,
            }
            if name != "full_no_magnitude" and np.ptp(x) > 0:
                full = by_ridge["full_no_magnitude"]
                gain = stats.spearman_difference(x, full, y, seed=seed, draws=settings.draws)
                row |= {"gain": gain.value, "gain_low": gain.low, "gain_high": gain.high}
            rows.append(row)
    return pd.DataFrame(rows)


def sensitivity(frame: "pd.DataFrame", settings: "Settings", seed: int) -> "pd.DataFrame":
    """Crowding against count and count per effect: at every dose, threshold, panel size, and for random directions."""
    import pandas as pd

    cases = [
        ("dose", f"{m:g}", "" if m == 1 else f"@{m:g}") for m in sorted({1.0, *settings.doses})
    ]
    cases += [("threshold", "1", "")] + [
        ("threshold", f"{t:g}", f"@tau{t:g}") for t in sorted(settings.taus)
    ]
    cases += [
        ("panel", c.removeprefix("C@panel"), c[1:])
        for c in frame.columns
        if c.startswith("C@panel")
    ]
    cases += [("direction", "SAE", ""), ("direction", "random", "@random")]
    x, rows = frame["crowding"].to_numpy(float), []
    for kind, value, suffix in cases:
        for label in ("C", "C_per_E"):
            name = label + suffix
            if name not in frame:
                continue
            y = frame[name].to_numpy(float)
            rho = models.interval_of(x, y, seed, settings.draws)
            row = {
                "kind": kind,
                "value": value,
                "label": label,
                "rho": rho.value,
                "low": rho.low,
                "high": rho.high,
            }
            rows.append(row | {"n": rho.n, "median": float(np.median(y))})
    return pd.DataFrame(rows)


def dose_change(frame: "pd.DataFrame", settings: "Settings", seed: int) -> stats.Interval:
    """rho(crowding, C/E) at the highest dose less that at the lowest, on the same resampled features."""
    x = frame["crowding"].to_numpy(float)
    doses = sorted({1.0, *settings.doses})
    low, high = (
        frame["C_per_E" if m == 1 else f"C_per_E@{m:g}"].to_numpy(float)
        for m in (doses[0], doses[-1])
    )
    return stats.spearman_difference(high, low, x, seed=seed, draws=settings.draws)


def tables(frame: "pd.DataFrame", settings: "Settings", seed: int) -> dict[str, "pd.DataFrame"]:
    """Everything that follows from one feature table."""
    import pandas as pd

    change = dose_change(frame, settings, seed)
    return {
        "univariate": univariate(frame, settings, seed),
        **prediction(frame, settings, seed),
        **held_out_screening(frame, settings, seed),
        "forecasts": forecasts(frame, settings, seed),
        "sensitivity": sensitivity(frame, settings, seed),
        "dose_change": pd.DataFrame(
            [{"rho": change.value, "low": change.low, "high": change.high, "n": change.n}]
        ),
        "reliability": models.reliability(
            frame,
            ("C/4", "C/2", "C", "C_per_E", "E", "S_abs", "S", "S_loo", "KL"),
            seed=seed,
            draws=settings.draws,
        ),
    }


def gathered(parts: Sequence[tuple[dict, dict[str, "pd.DataFrame"]]]) -> dict[str, "pd.DataFrame"]:
    """The tables of many dictionaries under one another, each row with the keys of its dictionary."""
    import pandas as pd

    names = dict.fromkeys(name for _, part in parts for name in part)
    return {
        name: pd.concat(
            [part[name].assign(**key) for key, part in parts if name in part], ignore_index=True
        )
        for name in names
    }
