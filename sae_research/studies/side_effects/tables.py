"""The tables that figures and claims read, with readable names of models and SAEs."""

import numpy as np
import pandas as pd

from sae_research import catalogue, stats, training
from sae_research.screening.screen import RANDOM
from sae_research.studies.runner import Result
from sae_research.studies.side_effects import selection
from sae_research.studies.side_effects.prediction import FULL_SET, as_row

Tables = dict[str, pd.DataFrame]

SAE = ["model", "sae"]
LADDER = "width_"
"""How the roles of GPT-2's ladder of widths begin."""
WIDER = {"llama-3.1-8b-32x/primary": "primary", f"{LADDER}98304": f"{LADDER}24576"}
"""Published SAEs four times wider than another one of the same hook, which is their base."""
KINDS = {"topk": "TopK", "jumprelu": "JumpReLU", "relu": "ReLU"}
NULLS = {null: null.replace("_", " ") for null in training.NULLS}
NULLS["soft_frozen_decoder"] = "soft-frozen"
"""Null dictionaries as figures name them; the role of each ends in its key."""
MODEL_NAMES = {
    "world-text": "text model",
    "world-survey": "survey model",
    "gpt2-small": "GPT-2 small",
    "pythia-70m": "Pythia 70M",
    "gemma-2-2b": "Gemma 2 2B",
    "gemma-3-270m": "Gemma 3 270M",
    "gemma-3-270m-it": "Gemma 3 270M, instruction-tuned",
    "llama-3.1-8b": "Llama 3.1 8B",
    "smollm2-135m-instruct": "SmolLM2 135M",
}
SET_NAMES = {
    "activation_magnitude_only": "magnitude",
    "activation_shape_only": "shape",
    "crowding_only": "crowding",
    "geometry_only": "geometry",
    "direct_logit_only": "direct logits",
    "coactivation_only": "co-activation",
    "compact_no_magnitude": "compact",
    "full_no_magnitude": "full set",
    "full_all": "full set and magnitude",
}
FORECASTER_NAMES = {
    "full_no_magnitude": "full set",
    "both": "full set and forecasts",
    "C^identity": "identity path",
    "C^mean_jacobian": "mean Jacobian",
    "C^random_map": "map of random directions",
    "C^jacobian": "Jacobians",
    "S_abs^jacobian": "Jacobians",
    "output_score": "output score",
}


def name_model(model: str) -> str:
    """A model as a reader calls it."""
    return MODEL_NAMES.get(model, model)


def name_sae(model: str, sae: str) -> str:
    """An SAE as a reader calls it, such as "text model, TopK, 4x wide"."""
    words = [name_model(model)]
    words += [KINDS[part] for part in sae.split("_") if part in KINDS]
    null = find_null(sae)
    trained = sae.removesuffix(f"_{null}")
    if trained[-2:-1] == "_" and trained[-1].isdigit():  # block10_topk_1
        words.append(f"seed {trained[-1]}")
    if null:
        words.append(NULLS[null])
    if sae.startswith(LADDER):
        words.append(f"{int(sae.removeprefix(LADDER)):,} latents")
    elif is_wide(sae):
        words.append("4x wide")
    return ", ".join(words)


def is_wide(sae: str, base: str | None = None) -> bool:
    """Whether an SAE is the wider of a pair, and `base` the other: `x_wide` of `x`, or in WIDER."""
    other = WIDER.get(sae, sae.removesuffix("_wide") if sae.endswith("_wide") else None)
    return other is not None and base in (None, other)


def find_null(sae: str) -> str | None:
    """Which null dictionary an SAE is; None for a trained one."""
    longest_first = sorted(NULLS, key=len, reverse=True)  # one name ends in another
    return next((null for null in longest_first if sae.endswith(f"_{null}")), None)


def has_vote(saes: pd.Series) -> pd.Series:
    """Which SAEs count in means over SAEs: no null dictionary, and none of the ladder of widths,
    whose eight SAEs of one hook would outvote all other settings.
    """
    return ~saes.str.startswith(LADDER) & saes.map(find_null).isna()


def make_tables(results: dict[str, Result]) -> Tables:
    """Every table of the run with readable names of its SAEs, and those that figures add."""
    tables = {name: t.copy() for name, t in results[""].tables.items()}
    for table in tables.values():
        if "sae" in table:
            keys = zip(table["model"], table["sae"], strict=True)
            table["name"] = [name_sae(model, sae) for model, sae in keys]
    tables["ranked"] = results["ranking"].tables["ranked"]
    stabilities = ["S", "S_abs", "S_loo"]
    steered = select(tables["features"], seed=0)
    steered = steered[has_vote(steered["sae"])]
    random = steered[[f"{name}{RANDOM}" for name in stabilities]].set_axis(stabilities, axis=1)
    floor = {
        "pure noise (mean)": tables["noise"][stabilities].mean(),
        "random directions (median)": random.median(),
        "features (median)": steered[stabilities].median(),
    }
    tables["floor"] = pd.DataFrame(floor) + 0.0  # no negative zero
    tables["null_range"] = tables["null"][["C", "S_abs"]].quantile([0.025, 0.5, 0.975])
    tables["leads"] = _find_leads(tables["univariate"])
    tables["means"] = _average_random(tables["random"])
    tables["widths"] = _compare_widths(tables)
    tables["width_effects"] = _measure_width_effects(tables)
    payoffs = ("S_abs: clean - messy", "C_per_E: clean - messy", "share_of_oracle")
    tables["payoffs"] = _summarize_splits(tables["splits"], "labels", payoffs, "payoff")
    choices = ("predicted", "oracle")
    tables["top_k_ranges"] = _summarize_splits(tables["top_k"], "k", choices, "choice")
    return tables


def select(table: pd.DataFrame, **where: object) -> pd.DataFrame:
    """The rows in which each column named in `where` has that value."""
    for column, value in where.items():
        table = table[table[column] == value]
    return table


def make_intervals(rows: pd.DataFrame, value: str = "rho", prefix: str = "") -> list:
    """The rows of a table as intervals, to draw them."""
    n = rows["n"] if "n" in rows else [1] * len(rows)
    columns = (rows[value], rows[f"{prefix}low"], rows[f"{prefix}high"], n)
    return [
        stats.Interval(float(v), float(low), float(high), int(k))
        for v, low, high, k in zip(*columns, strict=True)
    ]


def summarize_saes(rows: pd.DataFrame, column: str) -> stats.Interval:
    """Mean over the SAEs that have a vote, each first averaged over its seeds, with Student's
    interval over SAEs.
    """
    rows = rows[has_vote(rows["sae"])]
    values = rows.groupby(SAE, sort=False)[column].mean().to_numpy()
    if len(values) < 2:
        return stats.Interval(float(values[0]), float("-inf"), float("inf"), 1)
    return stats.mean_interval(values)


def find_main_saes(tables: Tables) -> list[tuple[str, str]]:
    """The main SAE of each model, which every seed screens: (model, name of the SAE)."""
    first = tables["facts"].drop_duplicates("model")
    return list(zip(first["model"], first["name"], strict=True))


def _find_leads(univariate: pd.DataFrame) -> pd.DataFrame:
    """The row of the strongest single predictor of the count, one per SAE."""
    rows = select(univariate, control="none", target="C", seed=0)
    return rows.loc[rows["rho"].abs().groupby([rows[name] for name in SAE], sort=False).idxmax()]


def _average_random(random: pd.DataFrame) -> pd.DataFrame:
    """Means over SAEs of the full set's scores for SAE and random directions and the difference."""
    groups = random.groupby(["target", "residualised", "direction"], sort=False)[[*SAE, "rho"]]
    return groups.apply(lambda rows: pd.Series(as_row(summarize_saes(rows, "rho")))).reset_index()


def _summarize_splits(
    splits: pd.DataFrame, key: str, columns: tuple[str, ...], words: str
) -> pd.DataFrame:
    """Mean and central 95 % over random splits of some columns, per SAE and `key`."""
    rows = []
    for (name, value), here in select(splits, seed=0).groupby(["name", key], sort=False):
        for column in columns:
            found = as_row(selection.summarize_splits(here[column].to_numpy()), "value")
            rows.append({"name": name, key: value, words: column, **found})
    return pd.DataFrame(rows)


def find_pairs(tables: Tables) -> list[tuple[str, str, str]]:
    """(model, base, wide) of SAEs that differ in width only."""
    first = select(tables["facts"], seed=0)
    return [
        (model, base, wide)
        for model, here in first.groupby("model", sort=False)
        for wide in here["sae"]
        for base in here["sae"]
        if is_wide(wide, base)
    ]


def _compare_widths(tables: Tables) -> pd.DataFrame:
    """Base and wide SAE of each pair: score of the full set, payoff and its spread over splits."""
    scores = select(tables["sets"], seed=0, residualised=False, set=FULL_SET)
    splits = select(tables["splits"], seed=0, labels="real")
    rows = []
    for model, base, wide in find_pairs(tables):
        for sae in (base, wide):
            here = select(scores, model=model, sae=sae).set_index("target")
            paid = select(splits, model=model, sae=sae)
            for label, sign in (("S_abs", 1), ("C_per_E", -1)):
                pay = sign * paid[f"{label}: clean - messy"]
                rows.append(
                    {
                        "pair": f"{model} {wide}",
                        "name": name_sae(model, sae),
                        "wide": sae == wide,
                        "label": label,
                        "rho": here.pooled[label],
                        "low": here.low[label],
                        "high": here.high[label],
                        "rho_C": here.pooled["C"],
                        "payoff": pay.mean(),
                        "instability": pay.std() / abs(pay.mean()),
                        "wrong": float((pay < 0).mean()),
                    }
                )
    return pd.DataFrame(rows)


def _measure_width_effects(tables: Tables) -> pd.DataFrame:
    """Score of the full set with the count in base and wide SAE, for SAE and random directions, and
    the difference of the two widths (their features are independent samples).
    """
    scores = select(tables["random"], seed=0, residualised=False, target="C")
    rows = []
    for model, base, wide in find_pairs(tables):
        for direction in ("SAE", "random"):
            pair = [
                make_intervals(select(scores, model=model, sae=sae, direction=direction))[0]
                for sae in (base, wide)
            ]
            half = float(np.hypot(*(i.high - i.low for i in pair))) / 2
            difference = pair[1].value - pair[0].value
            ends = (difference - half, difference + half)
            pair.append(stats.Interval(difference, *ends, pair[0].n))
            for which, i in zip(("base", "4x wide", "4x wide minus base"), pair, strict=True):
                row = {"model": name_model(model), "direction": direction, "which": which}
                rows.append(row | as_row(i))
    return pd.DataFrame(rows)


PUBLISHED = (
    ("gpt2-small", "crowding", "none", ".45 to .50 (replication .482, .450, .458; paper .466)"),
    ("gpt2-small", "crowding", "controlled", ".40 to .52 (replication)"),
    ("pythia-70m", "logit_l2", "none", ".391 (paper)"),
    ("pythia-70m", "logit_l2", "controlled", ".343 [.23, .45] (replication)"),
    ("gemma-2-2b", "encoder_decoder_cos", "controlled", "-.454 [-.55, -.34] (replication)"),
    ("llama-3.1-8b", "logit_l2", "none", ".464 (paper)"),
    ("llama-3.1-8b", "logit_top10", "controlled", "-.293 (replication)"),
)
"""Rank correlations with the raw count on the real models: model, predictor, control, value."""
RESIDUALISED = {
    "gpt2-small": 0.512,
    "pythia-70m": 0.521,
    "gemma-2-2b": 0.594,
    "llama-3.1-8b": 0.289,
}


def compare_published(t: Tables) -> pd.DataFrame:
    """What others measured on the real models beside the values of this run in contexts of each
    feature's own, as theirs are; empty without them.
    """
    rows = []
    for model in (m for m in t["facts"]["model"].unique() if m in RESIDUALISED):
        main = {"model": model, "sae": "primary", "seed": 0}
        spec = catalogue.get(model)
        facts = select(t["facts"], **main).iloc[0]
        found = [
            (f"L0, {role}", f"{value:g} (replication, within 1)", facts[f"l0_{role}"])
            for role, value in spec.mean_l0.items()
        ]
        target = f"{spec.eligible} (replication's band and contexts)"
        found.append(("eligible features", target, facts["eligible"]))
        for _, name, control, target in (p for p in PUBLISHED if p[0] == model):
            raw = select(t["univariate"], predictor=name, target="C@own", **main)
            raw = raw[(raw["control"] == "none") == (control == "none")]
            found += [(f"{name} and C, control {control}", target, rho) for rho in raw.rho]
        of = {"residualised": True, "direction": "SAE", "target": "C"}
        left = select(t["own_contexts"], **of, **main).iloc[0]
        target = f"{RESIDUALISED[model]} within .10 (replication, mean over folds; here pooled)"
        found.append(("residualised C, full set", target, left.rho))
        random = {"kind": "own contexts", "value": "random", "label": "C"}
        rho = select(t["sensitivity"], **random, **main).iloc[0].rho
        found.append(("crowding and C of random directions", "at most .1 in size", rho))
        rho = select(t["reliability"], label="C", **main).iloc[0].rho
        found.append(("reliability of C", "at least .90", rho))
        rows += [(model, *row) for row in found]
    return pd.DataFrame(rows, columns=["model", "quantity", "target", "here"])
