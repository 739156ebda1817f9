"""What the claims of this study measure, and its answer in a few sentences."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd
from scipy.stats import t as student

from sae_research import stats
from sae_research.claims import Measurement
from sae_research.screening.screen import OWN
from sae_research.studies.side_effects.tables import (
    SAE,
    Tables,
    find_main_saes,
    find_null,
    has_vote,
    is_wide,
    make_tables,
    name_model,
    select,
    summarize_saes,
)

__all__ = ["make_tables", "make_titles", "measure_claims", "summarize"]

FEW_SAES = 6
"""Below so many, the answer says how large a mean over SAEs has to be."""


def _measure(found: stats.Interval, control: Measurement | None = None) -> Measurement:
    """One SAE shows no spread: an interval without width has a p-value of 1, so proves nothing."""
    ends = (found.low, found.high) if np.isfinite(found.low) else (found.value, found.value)
    return Measurement(found.value, *ends, found.n, control)


def _pair(own: pd.DataFrame, control: pd.DataFrame, column: str) -> Measurement:
    """Mean over SAEs, the same of the control, and their difference SAE by SAE."""
    rows = own.merge(control, on=[*SAE, "seed"], suffixes=("", "_control"), validate="1:1")
    rows["gap"] = rows[column] - rows[f"{column}_control"]
    found, other, gap = (summarize_saes(rows, c) for c in (column, f"{column}_control", "gap"))
    return replace(_measure(found), control=_measure(other), difference=_measure(gap))


def measure_gain(t: Tables, baseline: str, label: str) -> Measurement:
    """rho(full set without magnitude) - rho(baseline), out of fold.

    Control: the same for the labels of random directions.
    """
    rows = select(t["gains"], baseline=baseline, target=label)
    random = select(t["gains_random"], baseline=baseline, target=f"{label}@random")
    return _pair(rows, random, "gain")


def measure_residualised(t: Tables, label: str) -> Measurement:
    """Rank correlation of the full set with what nuisances leave of a label.

    Control: the same for the label of random directions.
    """
    rows = select(t["random"], target=label, residualised=True)
    return _pair(select(rows, direction="SAE"), select(rows, direction="random"), "rho")


def measure_payoff(t: Tables, metric: str) -> Measurement:
    """Clean minus messy group on fresh contexts, in standard deviations of the steered features.

    Control: the same from beginning to end with random directions.
    """
    rows = select(t["confirmation"], metric=metric, groups="clean - messy")
    own, random = (select(rows, direction=direction) for direction in ("SAE", "random"))
    return _pair(own, random, "standardised")


def measure_payoff_of(t: Tables, metric: str, model: str) -> Measurement:
    """The same for the main SAE of one real model, with its interval over features."""
    rows = select(t["confirmation"], metric=metric, groups="clean - messy", direction="SAE")
    row = select(rows, model=model, sae="primary", seed=0).iloc[0]
    scale = row.standardised / row.difference if row.difference else 1.0
    ends = sorted((row.low * scale, row.high * scale))
    return Measurement(row.standardised, *ends, int(row.n))


def compare_axes(t: Tables, model: str) -> Measurement:
    """Payoff on stability minus that on C/E (fewer is better), in standard deviations."""
    S = measure_payoff_of(t, "S_abs", model)
    C = measure_payoff_of(t, "C_per_E", model)
    value = S.value + C.value
    half = float(np.hypot(S.high - S.low, C.high - C.low)) / 2
    return Measurement(value, value - half, value + half, S.n)


def count_improved_axes(t: Tables, model: str) -> Measurement:
    """How many axes the clean group improves on fresh contexts, its interval excluding zero."""
    S = measure_payoff_of(t, "S_abs", model)
    C = measure_payoff_of(t, "C_per_E", model)
    return Measurement(float((S.low > 0) + (C.high < 0)), n=2)


def measure_signature(t: Tables) -> Measurement:
    """How much oftener the best single predictor differs between SAEs than between resamples."""
    rows = select(t["leaders"], seed=0)
    rows = rows[has_vote(rows["sae"])]
    table = rows.pivot_table(index="draw", columns=SAE, values="predictor", aggfunc="first")
    lead = table.to_numpy()
    pairs = list(combinations(range(lead.shape[1]), 2))
    if not pairs:
        return Measurement(0.0, n=lead.shape[1])
    across = np.mean([lead[:, i] != lead[:, j] for i, j in pairs], axis=0)
    within = np.mean(lead != np.roll(lead, 1, axis=0), axis=1)
    low, high = np.quantile(across - within, [0.025, 0.975])
    return Measurement(float(np.mean(across - within)), float(low), float(high), lead.shape[1])


def get_correlation(t: Tables, model: str, predictor: str, label: str) -> Measurement:
    """A single rank correlation of Table 2, in contexts of the feature's own as published, with its
    interval over features.
    """
    label += OWN
    rows = select(t["univariate"], control="none", target=label, predictor=predictor, seed=0)
    row = select(rows, model=model, sae="primary").iloc[0]
    return Measurement(row.rho, row.low, row.high, int(row.n))


def measure_width_signal(t: Tables) -> Measurement:
    """Out-of-fold rank correlation of the full set with the count in wide SAEs, mean and interval
    of the mean.

    Control: the same for the count of random directions.
    """
    rows = select(t["random"], residualised=False, target="C", seed=0)
    rows = rows[[is_wide(sae) for sae in rows["sae"]]]

    found, control, gap = (
        _average(select(rows, direction=direction)) for direction in ("SAE", "random", "difference")
    )
    return replace(found, control=control, difference=gap)


def _average(rows: pd.DataFrame, sign: int = 1) -> Measurement:
    """Mean of independent correlations with the interval of the mean."""
    half = float(np.sqrt((((rows.high - rows.low) / 2) ** 2).sum())) / len(rows)
    value = sign * float(rows.rho.mean())
    return Measurement(value, value - half, value + half, int(rows.n.min()))


def measure_width_loss(t: Tables) -> Measurement:
    """What the full set's correlation with the count loses from base to wide SAE, mean over pairs.

    The two widths' features are independent samples.
    """
    rows = select(t["width_effects"], direction="SAE", which="4x wide minus base")
    return _average(rows, sign=-1)


def measure_width_instability(t: Tables) -> Measurement:
    """Spread of the payoff over splits relative to its mean: wide over base, geometric mean over
    pairs and axes.

    Control: how much more often the payoff has the wrong sign in the wide SAE, which no small mean
    inflates.
    """
    table = t["widths"].set_index(["pair", "label"])
    wide = table[table.wide]
    base = table[~table.wide]
    more = Measurement(float((wide.wrong - base.wrong).mean()), n=len(wide))
    ratio = float(np.exp(np.log(wide.instability / base.instability).mean()))
    return Measurement(ratio, n=t["widths"]["pair"].nunique(), control=more)


def measure_random_directions(t: Tables) -> Measurement:
    """Size of the rank correlation of crowding and count, minus that of random directions."""
    rows = select(t["sensitivity"], kind="direction", label="C")
    rows = rows.assign(size=rows.rho.abs())
    found = _pair(select(rows, value="SAE"), select(rows, value="random"), "size")
    return found.difference


def measure_own_contexts(t: Tables) -> Measurement:
    """Out-of-fold rank correlation of the full set with the count of random directions: in contexts
    that the feature's activity chose, minus in the same contexts for all.
    """
    own, shared = (
        select(t[name], target="C", residualised=False, direction="random")
        for name in ("own_contexts", "random")
    )
    return _pair(own, shared, "rho").difference


def measure_nulls(t: Tables, label: str) -> Measurement | None:
    """Out-of-fold rank correlation of the full set with a label, SAE direction minus random one:
    trained SAEs minus their null dictionaries, of which each is averaged over.
    """
    rows = select(t["random"], target=label, residualised=False, direction="difference", seed=0)
    is_null = rows["sae"].map(find_null).notna()
    if not is_null.any():
        return None
    nulls = rows[is_null]
    nulls = nulls.assign(sae=[sae.removesuffix(f"_{find_null(sae)}") for sae in nulls["sae"]])
    nulls = nulls.groupby([*SAE, "seed"], as_index=False)["rho"].mean()
    trained = rows[~is_null].merge(nulls[SAE], on=SAE)
    return _pair(trained, nulls, "rho").difference


def measure_seed_stability(t: Tables, label: str) -> Measurement | None:
    """Spearman of a label with how well other seeds find the feature.

    Control: the same for the label of random directions.
    """
    if "seed_stability" not in t:
        return None
    rows = select(t["seed_stability"], label=label)
    own, random = (select(rows, direction=direction) for direction in ("SAE", "random"))
    return _pair(own, random, "rho")


def measure_reliability(t: Tables, label: str) -> Measurement:
    """Rank correlation of a label between two disjoint pools of contexts."""
    return _measure(summarize_saes(select(t["reliability"], label=label), "rho"))


def measure_forecast_gain(t: Tables, label: str) -> Measurement:
    """rho(Jacobian forecast) - rho(the paper's full set, out of fold)."""
    rows = select(t["forecasts"], target=label, forecaster=f"{label}^jacobian")
    return _measure(summarize_saes(rows, "gain"))


MEASURES: dict[str, Callable[[Tables], Measurement]] = {
    "predict.spread_over_frequency": lambda t: measure_gain(t, "freq_only", "C"),
    "predict.stability_over_frequency": lambda t: measure_gain(t, "freq_only", "S_abs"),
    "predict.spread_over_magnitude": lambda t: measure_gain(t, "activation_magnitude_only", "C"),
    "predict.stability_over_magnitude": lambda t: measure_gain(
        t, "activation_magnitude_only", "S_abs"
    ),
    "predict.stability_residualised": lambda t: measure_residualised(t, "S_abs"),
    "predict.spread_residualised": lambda t: measure_residualised(t, "C"),
    "predict.signature": measure_signature,
    "screening.stability": lambda t: measure_payoff(t, "S_abs"),
    "screening.spread": lambda t: measure_payoff(t, "C_per_E"),
    "width.signal": measure_width_signal,
    "width.loss": measure_width_loss,
    "width.payoff": measure_width_instability,
    "labels.spread_reliability": lambda t: measure_reliability(t, "C"),
    "labels.stability_reliability": lambda t: measure_reliability(t, "S_abs"),
    "controls.random_directions": measure_random_directions,
    "controls.own_contexts": measure_own_contexts,
    "nulls.spread": lambda t: measure_nulls(t, "C"),
    "nulls.stability": lambda t: measure_nulls(t, "S_abs"),
    "seeds.spread": lambda t: measure_seed_stability(t, "C_per_E"),
    "seeds.stability": lambda t: measure_seed_stability(t, "S_abs"),
    "controls.dose": lambda t: _measure(summarize_saes(t["dose_change"], "rho")),
    "forecast.spread": lambda t: measure_forecast_gain(t, "C"),
    "forecast.stability": lambda t: measure_forecast_gain(t, "S_abs"),
}
MEASURES_OF_MODELS: dict[str, tuple[str, Callable[[Tables, str], Measurement]]] = {
    "table2.gpt2_crowding": ("gpt2-small", lambda t, m: get_correlation(t, m, "crowding", "C")),
    "table2.pythia_logit": ("pythia-70m", lambda t, m: get_correlation(t, m, "logit_l2", "C")),
    "table2.pythia_stability": ("pythia-70m", lambda t, m: get_correlation(t, m, "crowding", "S")),
    "table2.gemma_encoder": ("gemma-2-2b", lambda t, m: get_correlation(t, m, "encoder_norm", "S")),
    "table2.llama_logit": ("llama-3.1-8b", lambda t, m: get_correlation(t, m, "logit_l2", "C")),
    "screening.gpt2": ("gpt2-small", count_improved_axes),
    "screening.pythia": ("pythia-70m", compare_axes),
    "screening.llama": ("llama-3.1-8b", compare_axes),
    "screening.gemma": ("gemma-2-2b", count_improved_axes),
}


def measure_claims(t: Tables) -> dict[str, Measurement | None]:
    """A measurement for every claim; None where its model is not part of the run."""
    models = set(t["facts"]["model"])
    widths = len(t["widths"]) > 0
    found = {
        name: measure(t) if widths or not name.startswith("width.") else None
        for name, measure in MEASURES.items()
    }
    found |= {
        name: measure(t, model) if model in models else None
        for name, (model, measure) in MEASURES_OF_MODELS.items()
    }
    return {f"side_effects.{name}": measurement for name, measurement in found.items()}


def make_titles(t: Tables) -> dict[str, str]:
    """What each figure shows, with the numbers of this run."""
    m = {name.removeprefix("side_effects."): x for name, x in measure_claims(t).items() if x}

    def say(name: str, control: bool = False) -> str:
        return f"{(m[name].control if control else m[name]).value:.2f}"

    crowding = select(t["sensitivity"], kind="direction", label="C")
    own, random = (
        summarize_saes(select(crowding, value=which), "rho") for which in ("SAE", "random")
    )
    nothing = [
        summarize_saes(select(rows, target="C", residualised=False, direction="random"), "rho")
        for rows in (t["own_contexts"], t["random"])
    ]
    splits = select(t["splits"], labels="real", seed=0)
    oracle = splits[has_vote(splits["sae"])]["share_of_oracle"].mean()
    titles = {
        "reliability": "On other contexts, spread agrees with itself at "
        f"{say('labels.spread_reliability')}, stability at {say('labels.stability_reliability')}",
        "crowding": f"Crowding and the count correlate at {own.value:.2f} on average, for random "
        f"directions at {random.value:.2f}",
        "predictor_sets": "Rank correlation of each predictor set minus that of frequency alone: "
        f"full set {say('predict.spread_over_frequency')} for spread, "
        f"{say('predict.stability_over_frequency')} for stability",
        "gains": "The gain over frequency in predicting spread is "
        f"{say('predict.spread_over_frequency')}, and "
        f"{say('predict.spread_over_frequency', control=True)} for random directions",
        "residualised": "Without effect size, activation and frequency, spread is predicted at "
        f"{say('predict.spread_residualised')}, stability at "
        f"{say('predict.stability_residualised')}",
        "own_contexts": f"The count of random directions is predicted at {nothing[0].value:.2f} in "
        f"contexts that a feature chose, at {nothing[1].value:.2f} in the same contexts for all",
        "screening_payoff": f"Features chosen as clean reach {100 * oracle:.0f} % of the best "
        "choice's lift, on average over SAEs",
        "top_k": "How much cleaner the k chosen features are than the average candidate",
        "forecasts": "Rank correlation of Jacobians alone minus that of the full set: "
        f"{say('forecast.spread')} for spread, {say('forecast.stability')} for stability",
        "dose": "From the lowest to the highest dose, crowding's correlation with the count per "
        f"effect changes by {m['controls.dose'].value:+.2f}",
    }
    if "width.signal" in m:
        titles["width"] = (
            f"The full set predicts the count at {say('width.signal')} in wide SAEs, "
            f"that of random directions at {say('width.signal', control=True)}"
        )
    return titles


def summarize(t: Tables, verdicts: Mapping[str, str]) -> str:
    """What was found, in a few sentences with the numbers; `verdicts` are the ledger's, by id."""
    measured = measure_claims(t)

    def say(name: str, control: str = "") -> str:
        m = measured[f"side_effects.{name}"]
        verdict = verdicts[f"side_effects.{name}"]
        ends = "" if m.low is None else f" [{m.low:.2f}, {m.high:.2f}]"
        beside = f"; {control} {m.control.value:.2f}" if control and m.control else ""
        text = f"{m.value:.2f}{ends} (**{verdict}**{beside})"
        return text.replace("-0.00", "0.00")

    models = [name_model(model) for model, _ in find_main_saes(t)]
    first = select(t["facts"], seed=0)
    nulls = first["sae"].map(find_null).notna()
    saes = f"{(~nulls).sum()} SAEs ({', '.join(models)})"
    random = "random directions"
    sentences = [
        f"In {saes}, the rank correlation between what is known "
        "before steering and what steering does, minus that of firing frequency alone, is "
        f"{say('predict.spread_over_frequency', random)} for spread and "
        f"{say('predict.stability_over_frequency', random)} for stability.",
        "Minus that of activation magnitude alone it is "
        f"{say('predict.spread_over_magnitude', random)} and "
        f"{say('predict.stability_over_magnitude', random)}; what is left once effect size, "
        f"activation and frequency are removed is {say('predict.spread_residualised')} and "
        f"{say('predict.stability_residualised')}.",
        "On fresh contexts, unseen features that were chosen as clean differ from those chosen as "
        f"messy by {say('screening.stability', random)} standard deviations in stability and by "
        f"{say('screening.spread', random)} in moved latents per effect.",
        "All features are steered in the same contexts: in contexts that each chose itself, as "
        "published, the spread of random directions is predicted better by "
        f"{say('controls.own_contexts')}.",
        "The labels bound every prediction: on other contexts they agree with themselves at "
        f"{say('labels.spread_reliability')} for spread and "
        f"{say('labels.stability_reliability')} for stability; the rank correlation of a forecast "
        "by Jacobians, which steers no feature, minus that of the full set is "
        f"{say('forecast.spread')} for spread and {say('forecast.stability')} for stability.",
    ]
    judged = sum(m is not None and m.low is not None for m in measured.values())
    n = (~nulls).sum()
    if n < FEW_SAES:
        least = student.ppf(1 - 0.025 / judged, n - 1) / n**0.5
        sentences.append(
            f"{n} SAEs can show little: after correction over {judged} claims, a mean over them is "
            f"clear of zero only beyond {least:.1f} of their standard deviations."
        )
    if nulls.any():
        sentences.append(
            "Net of random directions, the rank correlation minus that in null dictionaries is "
            f"{say('nulls.spread')} for spread and {say('nulls.stability')} for stability."
        )
    if measured["side_effects.seeds.spread"] is not None:
        sentences.append(
            "How well SAEs of other seeds find a feature correlates at "
            f"{say('seeds.spread', random)} with its moved latents per effect and at "
            f"{say('seeds.stability', random)} with its stability."
        )
    return "\n".join(f"- {sentence}" for sentence in sentences)
