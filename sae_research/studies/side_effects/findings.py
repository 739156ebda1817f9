"""What the claims of this study measure, from the tables of a run."""

from collections.abc import Callable
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from sae_research import stats
from sae_research.claims import Measurement

if TYPE_CHECKING:
    import pandas as pd

    Tables = dict[str, pd.DataFrame]

DICTIONARY = ["subject", "primary"]
LADDER = "width_"
"""How the roles of GPT-2's ladder of widths begin."""
PAIRS = {"llama-3.1-8b-32x/primary": "primary", f"{LADDER}98304": f"{LADDER}24576"}
"""Published dictionaries four times wider than another one of the same hook, which is their base."""


def over_dictionaries(rows: "pd.DataFrame", column: str) -> stats.Interval:
    """Mean over dictionaries (each first averaged over its seeds) with Student's interval over dictionaries.

    The ladder of widths is left out: eight dictionaries of one hook would outvote all other settings.
    """
    rows = rows[~rows["primary"].str.startswith(LADDER)]
    values = rows.groupby(DICTIONARY, sort=False)[column].mean().to_numpy()
    if len(values) < 2:
        return stats.Interval(float(values[0]), float("-inf"), float("inf"), 1)
    return stats.mean_interval(values)


def _measured(found: stats.Interval, control: Measurement | None = None) -> Measurement:
    """An interval without bounds is none."""
    if not np.isfinite(found.low):
        return Measurement(found.value, n=found.n, control=control)
    return Measurement(found.value, found.low, found.high, found.n, control)


def gain(t: "Tables", baseline: str, label: str) -> Measurement:
    """rho(full set without magnitude) - rho(baseline), out of fold; control: the same for random directions' labels."""
    rows, random = t["gains"], t["gains_random"]
    rows = rows[(rows.baseline == baseline) & (rows.target == label)]
    random = random[(random.baseline == baseline) & (random.target == f"{label}@random")]
    control = over_dictionaries(random, "gain")
    return _measured(over_dictionaries(rows, "gain"), Measurement(control.value, n=control.n))


def residualised(t: "Tables", label: str, control: str | None = None) -> Measurement:
    """Out-of-fold rank correlation of the full set with what the nuisances leave of the label, and of another one."""
    rows = t["sets"].query("residualised and set == 'full_no_magnitude'")
    found, other = (
        over_dictionaries(rows[rows.target == name], "pooled") for name in (label, control or label)
    )
    return _measured(found, Measurement(other.value, n=other.n) if control else None)


def payoff(t: "Tables", metric: str, subject: str | None = None) -> Measurement:
    """Clean less messy group on fresh contexts, in standard deviations of the steered features.

    Control: how far the payoff lies past all but 2.5 % of the same means with permuted training labels.
    """
    rows = t["confirmation"]
    rows = rows[(rows.metric == metric) & (rows.groups == "clean - messy")]
    if subject is not None:
        row = rows[(rows.subject == subject) & (rows.primary == "primary") & (rows.seed == 0)].iloc[
            0
        ]
        scale = row.standardised / row.difference if row.difference else 1.0
        ends = sorted((row.low * scale, row.high * scale))
        return Measurement(row.standardised, *ends, int(row.n))
    found, null = over_dictionaries(rows, "standardised"), t["confirmation_null"]
    null = (
        null[~null["primary"].str.startswith(LADDER)]
        .groupby([*DICTIONARY, "permutation"], sort=False)[metric]
        .mean()
    )
    sign = 1 if metric.startswith("S") else -1
    past = (sign * null).groupby(level="permutation").mean().quantile(0.975)
    return _measured(found, Measurement(float(sign * found.value - past), n=found.n))


def mainly_stability(t: "Tables", subject: str) -> Measurement:
    """Payoff on stability less that on the count per effect (fewer is better), in standard deviations."""
    S, C = payoff(t, "S_abs", subject), payoff(t, "C_per_E", subject)
    value, half = S.value + C.value, float(np.hypot(S.high - S.low, C.high - C.low)) / 2
    return Measurement(value, value - half, value + half, S.n)


def axes_improved(t: "Tables", subject: str) -> Measurement:
    """How many of the two axes the clean group improves on fresh contexts, its interval excluding no difference."""
    found = [payoff(t, "S_abs", subject), payoff(t, "C_per_E", subject)]
    return Measurement(float((found[0].low > 0) + (found[1].high < 0)), n=2)


def leading(univariate: "pd.DataFrame", label: str) -> "pd.DataFrame":
    """The row of the strongest single predictor of a label, one a dictionary."""
    rows = univariate[(univariate.control == "none") & (univariate.target == label)]
    strength = rows["rho"].abs().groupby([rows[name] for name in DICTIONARY], sort=False)
    return rows.loc[strength.idxmax()]


def signature(t: "Tables") -> Measurement:
    """How much more often the strongest single predictor differs between dictionaries than between resamples of one."""
    rows = t["leaders"].query("seed == 0")
    rows = rows[~rows["primary"].str.startswith(LADDER)]
    lead = rows.pivot_table(
        index="draw", columns=DICTIONARY, values="predictor", aggfunc="first"
    ).to_numpy()
    pairs = list(combinations(range(lead.shape[1]), 2))
    if not pairs:
        return Measurement(0.0, n=lead.shape[1])
    across = np.mean([lead[:, i] != lead[:, j] for i, j in pairs], axis=0)
    within = np.mean(lead != np.roll(lead, 1, axis=0), axis=1)
    low, high = np.quantile(across - within, [0.025, 0.975])
    return Measurement(float(np.mean(across - within)), float(low), float(high), lead.shape[1])


def one_rho(
    t: "Tables", subject: str, predictor: str, label: str, primary: str = "primary"
) -> Measurement:
    """A single rank correlation of Table 2, with its interval over features."""
    rows = t["univariate"].query(
        "control == 'none' and target == @label and predictor == @predictor and seed == 0"
    )
    row = rows[(rows.subject == subject) & (rows.primary == primary)].iloc[0]
    return Measurement(row.rho, row.low, row.high, int(row.n))


def widths(t: "Tables") -> "pd.DataFrame":
    """Base and wide dictionary of each pair: rank correlation of the full set, payoff and its spread over splits."""
    import pandas as pd

    rows, real = [], t["splits"].query("labels == 'real' and seed == 0")
    for subject, here in real.groupby("subject", sort=False):
        names = here["primary"].unique()
        for wide, base in ((w, b) for w in names for b in names if is_wide(w, b)):
            rows += [
                _width(t, here, subject, name, f"{subject} {wide}", name == wide, i)
                for name in (base, wide)
                for i in (0, 1)
            ]
    return pd.DataFrame(rows)


def _width(
    t: "Tables",
    splits: "pd.DataFrame",
    subject: str,
    primary: str,
    pair: str,
    wide: bool,
    axis: int,
) -> dict:
    label, sign = (("S_abs", 1), ("C_per_E", -1))[axis]
    chosen = (t["sets"].subject == subject) & (t["sets"].primary == primary) & (t["sets"].seed == 0)
    scores = (
        t["sets"][chosen]
        .query("not residualised and set == 'full_no_magnitude'")
        .set_index("target")
    )
    pay = sign * splits[splits["primary"] == primary][f"{label}: clean - messy"]
    return {
        "pair": pair,
        "subject": subject,
        "primary": primary,
        "wide": wide,
        "label": label,
        "rho": scores.pooled[label],
        "low": scores.low[label],
        "high": scores.high[label],
        "rho_C": scores.pooled["C"],
        "payoff": pay.mean(),
        "instability": pay.std() / abs(pay.mean()),
        "wrong": float((pay < 0).mean()),
    }


def is_wide(primary: str, base: str | None = None) -> bool:
    """Whether a dictionary is the wider of a pair (and `base` the other): `x_wide` and `x`, or one of PAIRS."""
    other = PAIRS.get(primary, primary.removesuffix("_wide") if primary.endswith("_wide") else None)
    return other is not None and base in (None, other)


def width_signal(t: "Tables") -> Measurement:
    """Out-of-fold rank correlation of the full set with the count in wide dictionaries, mean and interval of the mean.

    Control: what it loses against the base dictionary.
    """
    rows = t["sets"].query(
        "not residualised and set == 'full_no_magnitude' and target == 'C' and seed == 0"
    )
    rows = rows[[is_wide(p) for p in rows["primary"]]]
    half = float(np.sqrt((((rows.high - rows.low) / 2) ** 2).sum())) / len(rows)
    value, table = (
        float(rows.pooled.mean()),
        widths(t).drop_duplicates(["pair", "wide"]).set_index("pair"),
    )
    lost = (table[~table.wide].rho_C - table[table.wide].rho_C).mean()
    return Measurement(
        value, value - half, value + half, len(rows), Measurement(float(lost), n=len(rows))
    )


def width_instability(t: "Tables") -> Measurement:
    """Spread of the payoff over splits relative to its mean: wide over base, geometric mean over pairs and axes.

    Control: how much more often the payoff has the wrong sign in the wide dictionary, which no small mean inflates.
    """
    table = widths(t)
    wide, base = (table[table.wide == w].set_index(["pair", "label"]) for w in (True, False))
    more = float((wide.wrong - base.wrong).mean())
    ratio = float(np.exp(np.log(wide.instability / base.instability).mean()))
    return Measurement(ratio, n=table["pair"].nunique(), control=Measurement(more, n=len(wide)))


def random_directions(t: "Tables") -> Measurement:
    """Crowding of the feature against the count of its norm-matched random direction.

    Control: the rank correlation with the count of the SAE's own direction, in size, less that.
    """
    rows = t["sensitivity"].query("kind == 'direction' and label == 'C'")
    own, random = (
        over_dictionaries(rows[rows.value == v].assign(size=rows.rho.abs()), "size")
        for v in ("SAE", "random")
    )
    return _measured(
        over_dictionaries(rows[rows.value == "random"], "rho"),
        Measurement(own.value - random.value, n=own.n),
    )


def dose_sign(t: "Tables") -> Measurement:
    """rho(crowding, count per effect) at the highest dose less that at the lowest."""
    return _measured(over_dictionaries(t["dose_change"], "rho"))


def reliability(t: "Tables", label: str) -> Measurement:
    """Rank correlation of a label between two disjoint pools of contexts."""
    return _measured(over_dictionaries(t["reliability"].query("label == @label"), "rho"))


def forecast_gain(t: "Tables", forecaster: str, label: str) -> Measurement:
    """rho(forecast) - rho(the paper's full set, out of fold)."""
    rows = t["forecasts"].query("target == @label and forecaster == @forecaster")
    return _measured(over_dictionaries(rows, "gain"))


_ALWAYS: dict[str, Callable[["Tables"], Measurement]] = {
    "predict.spread_over_frequency": lambda t: gain(t, "freq_only", "C"),
    "predict.stability_over_frequency": lambda t: gain(t, "freq_only", "S_abs"),
    "predict.spread_over_magnitude": lambda t: gain(t, "activation_magnitude_only", "C"),
    "predict.stability_over_magnitude": lambda t: gain(t, "activation_magnitude_only", "S_abs"),
    "predict.stability_residualised": lambda t: residualised(t, "S_abs", "S_loo"),
    "predict.spread_residualised": lambda t: residualised(t, "C"),
    "predict.signature": signature,
    "screening.stability": lambda t: payoff(t, "S_abs"),
    "screening.spread": lambda t: payoff(t, "C_per_E"),
    "width.signal": width_signal,
    "width.payoff": width_instability,
    "labels.spread_reliability": lambda t: reliability(t, "C"),
    "labels.stability_reliability": lambda t: reliability(t, "S_abs"),
    "controls.random_directions": random_directions,
    "controls.dose": dose_sign,
    "forecast.spread": lambda t: forecast_gain(t, "C^jacobian", "C"),
    "forecast.stability": lambda t: forecast_gain(t, "S_abs^jacobian", "S_abs"),
}
_REAL: dict[str, tuple[str, Callable[["Tables"], Measurement]]] = {
    "table2.gpt2_crowding": ("gpt2-small", lambda t: one_rho(t, "gpt2-small", "crowding", "C")),
    "table2.pythia_logit": ("pythia-70m", lambda t: one_rho(t, "pythia-70m", "logit_l2", "C")),
    "table2.pythia_stability": ("pythia-70m", lambda t: one_rho(t, "pythia-70m", "crowding", "S")),
    "table2.gemma_encoder": ("gemma-2-2b", lambda t: one_rho(t, "gemma-2-2b", "encoder_norm", "S")),
    "table2.llama_logit": ("llama-3.1-8b", lambda t: one_rho(t, "llama-3.1-8b", "logit_l2", "C")),
    "screening.gpt2": ("gpt2-small", lambda t: axes_improved(t, "gpt2-small")),
    "screening.pythia": ("pythia-70m", lambda t: mainly_stability(t, "pythia-70m")),
    "screening.llama": ("llama-3.1-8b", lambda t: mainly_stability(t, "llama-3.1-8b")),
    "screening.gemma": ("gemma-2-2b", lambda t: axes_improved(t, "gemma-2-2b")),
}


def measurements(t: "Tables") -> dict[str, Measurement | None]:
    """A measurement for every claim of the study; None where its model is not part of the run."""
    subjects, primaries = set(t["sets"]["subject"]), set(t["sets"]["primary"])
    wide = any(is_wide(p) for p in primaries)
    found = {
        name: None if name.startswith("width.") and not wide else measure(t)
        for name, measure in _ALWAYS.items()
    }
    found |= {
        name: measure(t) if subject in subjects else None
        for name, (subject, measure) in _REAL.items()
    }
    return {f"side_effects.{name}": m for name, m in found.items()}


def intervals(
    rows: "pd.DataFrame", value: str = "rho", low: str = "low", high: str = "high"
) -> list[stats.Interval]:
    """The rows of a table as intervals, to draw them."""
    n = rows["n"] if "n" in rows else [len(rows)] * len(rows)
    columns = (rows[value], rows[low], rows[high], n)
    return [
        stats.Interval(float(v), float(a), float(b), int(k))
        for v, a, b, k in zip(*columns, strict=True)
    ]


PUBLISHED = (
    ("gpt2-small", "crowding", "none", ".45 to .50 (replication .482, .450, .458; paper .466)"),
    ("gpt2-small", "crowding", "controlled", ".40 to .52 (replication)"),
    ("pythia-70m", "logit_l2", "none", ".391 (paper)"),
    ("pythia-70m", "logit_l2", "controlled", ".343 [.23, .45] (replication)"),
    ("gemma-2-2b", "encoder_decoder_cos", "controlled", "-.454 [-.55, -.34] (replication)"),
    ("llama-3.1-8b", "logit_l2", "none", ".464 (paper)"),
    ("llama-3.1-8b", "logit_top10", "controlled", "-.293 (replication)"),
)
"""Rank correlations with the raw count on the real models: subject, predictor, control, value."""
RESIDUALISED = {
    "gpt2-small": 0.512,
    "pythia-70m": 0.521,
    "gemma-2-2b": 0.594,
    "llama-3.1-8b": 0.289,
}


def published(t: "Tables", facts: "pd.DataFrame") -> "pd.DataFrame":
    """What others measured on the real models, beside the values of this run; empty on the embedded world.

    `facts` has one row a dictionary and seed: what was loaded and chosen.
    """
    import pandas as pd

    from sae_research import catalogue

    rows: list[dict] = []

    def add(subject: str, quantity: str, target: str, here: float) -> None:
        rows.append({"subject": subject, "quantity": quantity, "target": target, "here": here})

    def main(table: "pd.DataFrame") -> "pd.DataFrame":
        return table[
            (table.seed == 0) & (table.primary == "primary") & table.subject.isin(RESIDUALISED)
        ]

    for row in main(facts).itertuples():
        entry = catalogue.get(row.subject)
        for role, value in (("primary", row.l0_primary), ("downstream", row.l0_downstream)):
            if role in entry.mean_l0:
                add(
                    row.subject,
                    f"L0, {role}",
                    f"{entry.mean_l0[role]:g} (replication, within 1)",
                    value,
                )
        if entry.eligible is not None:
            add(
                row.subject,
                "eligible features",
                f"{entry.eligible} (replication's band and contexts)",
                row.eligible,
            )
    first = main(t["univariate"])
    for subject, name, control, target in PUBLISHED:
        found = first[
            (first.subject == subject) & (first.predictor == name) & (first.target == "C")
        ]
        for rho in found[(found.control == "none") == (control == "none")].rho:
            add(subject, f"{name} and C, control {control}", target, rho)
    for row in (
        main(t["sets"])
        .query("residualised and set == 'full_no_magnitude' and target == 'C'")
        .itertuples()
    ):
        target = f"{RESIDUALISED[row.subject]} within .10 (replication, mean over folds)"
        add(row.subject, "residualised C, full set", target, row.per_fold)
    for row in (
        main(t["sensitivity"])
        .query("kind == 'direction' and value == 'random' and label == 'C'")
        .itertuples()
    ):
        add(row.subject, "crowding and C of random directions", "at most .1 in size", row.rho)
    for row in main(t["reliability"]).query("label == 'C'").itertuples():
        add(row.subject, "reliability of C", "at least .90", row.rho)
    return pd.DataFrame(rows, columns=["subject", "quantity", "target", "here"])
