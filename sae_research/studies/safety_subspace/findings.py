"""What the claims of this study measure, and its answer in a few sentences."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from sae_research import stats
from sae_research.claims import Measurement
from sae_research.studies.safety_subspace.settings import (
    FROZEN,
    FULL,
    LORA,
    NULL,
    RANDOM,
    RANDOM_FROZEN,
    REQUESTS_FROZEN,
    SAILS,
    SHUFFLED,
    USEFUL,
)
from sae_research.world.planted import Planted

RATES = {  # column of the summary: number and set of requests
    "harm score": ("score", "harmful"),
    "high risk": ("fulfilled", "harmful"),
    "new topics": ("safe", "new topics"),
    "over-refusal": ("safe", "look-alikes"),
    "answers": ("fulfilled", "plain"),
}
Tables = Mapping[str, pd.DataFrame]
SHAPES = {  # d, blocks, width of q, width of k and v, all parameters
    "gemma-2-2b": (2304, 26, 2048, 1024, 2_614_341_888),
    "gemma-2-9b": (3584, 42, 4096, 2048, 9_241_705_984),
    "llama-3.1-8b": (4096, 32, 4096, 1024, 8_030_261_248),
}
OWN = {"align.frozen": FROZEN, "align.requests": REQUESTS_FROZEN}
"""What a claim is about, where that is not SAILS."""
AGAINST = {  # claim: table, set of requests, number, control
    "align.full": ("outcomes", "harmful", "safe", FULL),
    "align.lora": ("outcomes", "harmful", "safe", LORA),
    "align.score": ("outcomes", "harmful", "score", LORA),
    "align.new_topics": ("outcomes", "new topics", "safe", LORA),
    "align.features": ("outcomes", "harmful", "safe", RANDOM),
    "align.labels": ("outcomes", "harmful", "safe", SHUFFLED),
    "align.useful": ("outcomes", "harmful", "safe", USEFUL),
    "align.null": ("outcomes", "harmful", "safe", NULL),
    "align.frozen": ("outcomes", "harmful", "safe", RANDOM_FROZEN),
    "align.requests": ("outcomes", "harmful", "safe", RANDOM_FROZEN),
    "align.over_refusal": ("outcomes", "look-alikes", "safe", LORA),
    "align.capability": ("outcomes", "plain", "fulfilled", LORA),
    "align.attack": ("attacks", "under attack", "complied", LORA),
    "align.benign": ("benign", "harmful", "safe", LORA),
}


def paper_reported() -> pd.DataFrame:
    """The paper's numbers as far as any source has them, with evidence."""
    return pd.read_csv(Path(__file__).with_name("paper_reported.csv"))


def share_of_parameters(rank: int = 16) -> pd.Series:
    """Share of the papers' models that LoRA on attention trains, in percent, by model."""
    shares = {
        model: 100 * blocks * rank * (2 * (d + q) + 2 * (d + kv)) / total
        for model, (d, blocks, q, kv, total) in SHAPES.items()
    }
    return pd.Series(shares)


def select(table: pd.DataFrame, **keys: object) -> pd.DataFrame:
    """The rows whose columns have these values."""
    for name, value in keys.items():
        table = table[table[name] == value]
    return table


def by_seed(table: pd.DataFrame, column: str, **keys: object) -> pd.Series:
    """Mean of a column by seed, over the rows that match."""
    table = select(table, **keys)
    return table.groupby(["model", "seed"] if "model" in table else "seed")[column].mean()


def compare(own: pd.Series, control: pd.Series | float) -> Measurement:
    """Mean paired difference with its interval over seeds."""
    return Measurement.of(stats.mean_interval((own - control).dropna().to_numpy()))


def with_control(own: pd.Series, control: pd.Series) -> Measurement:
    """The mean, that of the control, and their paired difference, with intervals over seeds."""
    found = (stats.mean_interval(x.to_numpy()) for x in (own, control, own - control))
    return Measurement.of(*found)


def _measure_theory(t: Tables) -> dict[str, Measurement]:
    r = t["recovery"].query("axis == 'r'")
    gap = r.assign(gap=r["error"] - np.sqrt(r["value"] - 1))
    trained = t["trained_sae"].query("world == 'plain'")

    def sae(tau: float) -> pd.Series:
        return by_seed(trained, "error", estimator="trained SAE", tau=tau)

    best = by_seed(trained, "error", estimator="covariance difference")
    floor = math.sqrt(Planted.r - 1)
    direct = by_seed(gap, "gap", value=float(Planted.r), estimator="covariance difference")
    indirect = by_seed(gap, "gap", estimator="mean difference")
    oracle = select(t["recovery"], axis="mixing", estimator="SAE oracle")
    mixing = (by_seed(oracle, "error", value=value) for value in (0.3, 0.0))
    return {
        "theory.floor": compare(indirect, 0),
        "theory.direct": compare(direct, 0),
        "theory.recovery": with_control(sae(1.0) - floor, best - floor),
        "theory.truncation": compare(sae(0.8), sae(1.0)),
        "theory.monosemantic": compare(*mixing),
    }


def best_null(t: Tables) -> str:
    """The null dictionary with the highest safety rate: the hardest to beat."""
    rates = select(t["outcomes"], set="harmful").groupby("method")["safe"].mean()
    rates = rates[rates.index.str.startswith(NULL)]
    return rates.idxmax() if len(rates) else NULL


def _measure_alignment(t: Tables) -> dict[str, Measurement | None]:
    found: dict[str, Measurement | None] = {}
    for claim, (table, group, column, control) in AGAINST.items():
        name = best_null(t) if control == NULL else control
        pair = OWN.get(claim, SAILS), name
        known = column in t.get(table, ())
        sides = [by_seed(t[table], column, method=m, set=group) for m in pair if known]
        found[claim] = compare(*sides) if sides and all(map(len, sides)) else None
    if "budgets" in t:
        few = select(t["budgets"], set="harmful", n_pairs=t["budgets"]["n_pairs"].min())
        found["align.few_pairs"] = compare(*(by_seed(few, "safe", method=m) for m in (SAILS, LORA)))
    rates = [by_seed(t["outcomes"], "safe", method=m, set="harmful") for m in (SAILS, RANDOM)]
    found["align.rate"] = with_control(*rates)
    if "projections" in t:
        parts = select(t["projections"], set="harmful", part="parallel")
        sides = [by_seed(parts, "safe", subspace=name) for name in (SAILS, RANDOM)]
        found["project.parallel"] = compare(*sides)
    for name, table, column in (
        ("interpret.removal", "removal", "drop"),
        ("interpret.retraining", "retraining", "refused"),
    ):
        if table in t:
            sides = [by_seed(t[table], column, kind=kind) for kind in ("top", "random")]
            found[name] = compare(*sides)
    overlaps = t["subspaces"]
    seeds = overlaps[overlaps["other"].str.startswith("seed")]
    random = by_seed(overlaps, "overlap", other=RANDOM)
    found["interpret.seeds"] = compare(by_seed(seeds, "overlap"), random) if len(seeds) else None
    return found


def measure_claims(t: Tables) -> dict[str, Measurement | None]:
    """A measurement for every claim; None where a profile does not measure it."""
    names = [*AGAINST, "align.few_pairs", "align.rate", "project.parallel", "judge.agreement"]
    names += [f"theory.{x}" for x in ("floor", "direct", "recovery", "truncation", "monosemantic")]
    names += [f"interpret.{x}" for x in ("removal", "retraining", "seeds")]
    names += [f"real.{x}" for x in ("rate", "gain", "score", "attack")]
    found: dict[str, Measurement | None] = dict.fromkeys(names)
    found |= _measure_theory(t) if "recovery" in t else {}
    found |= _measure_alignment(t) if "outcomes" in t else {}
    found["parameters.share"] = Measurement(share_of_parameters()["gemma-2-9b"])
    if "agreement" in t:
        a = t["agreement"].query("unseen == 'model'")
        a = a.pivot(index="model", columns="judge", values="agreement")
        found["judge.agreement"] = with_control(a[a.mean().idxmax()], a["opening rule"])
    return {f"safety_subspace.{name}": measurement for name, measurement in found.items()}


def summarize_methods(t: Tables) -> pd.DataFrame:
    """Every method's rates, means over seeds, as far as the ground measures them; Wilson's interval
    is that of the pooled safety rate and takes all replies as independent.
    """
    keys = ["method", "set", "seed"]
    columns = [name for name in ("safe", "score", "fulfilled") if name in t["outcomes"]]
    means = t["outcomes"].groupby(keys, sort=False)[columns].mean()
    means = means.groupby(keys[:2], sort=False).mean().unstack("set")
    harmful = select(t["outcomes"], set="harmful")
    rows = {}
    for method, own in harmful.groupby("method", sort=False):
        safe = round((own["safe"] * own["replies"]).sum())
        rate = stats.wilson(safe, int(own["replies"].sum()))
        rows[method] = {
            "safety rate": means["safe", "harmful"][method],
            "Wilson low": rate.low,
            "Wilson high": rate.high,
            **{name: means[pair][method] for name, pair in RATES.items() if pair in means.columns},
        }
        if "benign" in t:
            later = by_seed(t["benign"], "safe", method=method, set="harmful")
            rows[method]["after benign tuning"] = later.mean()
    table = pd.DataFrame(rows).T
    costs = ["parameters", "lr", "added_loss", "added_chat_loss"]
    costs = [name for name in costs if name in t["methods"]]
    return table.join(t["methods"].groupby("method")[costs].mean())


def summarize(t: Tables, verdicts: Mapping[str, str]) -> str:
    """What was found, in a few sentences with the numbers; `verdicts` are the ledger's, by id."""
    m = measure_claims(t)

    def say(name: str) -> str:
        x = m[f"safety_subspace.{name}"]
        if x is None:
            return "(not measured)"
        ends = "" if x.low is None else f" [{x.low:.2f}, {x.high:.2f}]"
        return f"{x.value:.2f}{ends} (**{verdicts[f'safety_subspace.{name}']}**)".replace(
            "-0.00", "0.00"
        )

    def each(column: str) -> str:
        found = summarize_methods(t)[column]
        return ", ".join(f"{found[m]:.2f} ({m})" for m in (SAILS, LORA, FULL) if m in found)

    real = "the real model, taught a harmless stand-in for safety (or the reader's own pairs),"
    ground = "the toy model" if "recovery" in t else real
    sentences = []
    if "outcomes" in t:
        sentences += [
            f"Starting in the SAE's safety subspace, {ground} reaches a safety rate of "
            f"{say('align.rate')}. The difference is {say('align.lora')} from LoRA, "
            f"{say('align.full')} from full fine-tuning, {say('align.features')} from random "
            f"features of the same SAE and {say('align.labels')} from shuffled labels.",
            f"The price: of harmless look-alikes {each('over-refusal')} are refused, and the loss "
            f"on other text grows by {each('added_loss')} nats a token.",
        ]
    if "attacks" in t:
        sentences.append(
            f"Against the subspace of useful behaviour it is {say('align.useful')}; under attack "
            f"the share that complies changes by {say('align.attack')} against LoRA."
        )
    if "recovery" in t:
        sentences.append(
            "In theory the floor of sqrt(r - 1) belongs to the difference of the class means, "
            "which is one direction; the difference of covariances lies "
            f"{say('theory.direct')} from it. Keeping 80 % of the variance, as the paper does, "
            f"adds {say('theory.truncation')} to the error of a trained SAE's subspace."
        )
    return "\n".join(f"- {sentence}" for sentence in sentences)
