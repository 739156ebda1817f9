"""What the claims measure, the answer in words, and what the figures show."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from sae_research import stats
from sae_research.claims import Measurement
from sae_research.stats import Interval
from sae_research.studies.opinion_qa.methods import ERROR_KEEPING
from sae_research.studies.opinion_qa.settings import (
    DENSE,
    FREE,
    HUMAN_OVERALL,
    LORA_PER_GROUP,
    MEANS,
    NO_KL,
    PER_TOKEN,
    RAW,
    SHUFFLED,
    SPARSEST,
    UNSTEERED,
)
from sae_research.studies.opinion_qa.tables import Tables

CALIBRATION = "calibration only"
"""The population's shift alone, as `baselines.evaluate_calibration` names it."""

# what the claims measure


def read_interval(rows: pd.DataFrame) -> Interval:
    """The only row as an interval."""
    (row,) = rows.to_dict("records")
    return Interval(row["value"], row["low"], row["high"], int(row["n"]))


def measure(t: Tables, method: str, metric: str) -> Interval:
    """A score of a method, interval over clusters of questions and seeds."""
    return read_interval(t["intervals"].query("method == @method and metric == @metric"))


def compare(t: Tables, first: str, second: str, metric: str = "wd") -> Interval:
    """First minus second method, or their ratio, on the same questions."""
    rows = t["paired"].query("first == @first and second == @second and metric == @metric")
    return read_interval(rows)


def over_seeds(values: pd.Series) -> Interval:
    """Mean with Student's interval over seeds."""
    return stats.mean_interval(values.to_numpy())


def column(t: Tables, method: str, name: str) -> pd.Series:
    """One score of a method by seed."""
    return t["scores"].query("method == @method").set_index("seed")[name]


def compare_composition(t: Tables) -> Interval:
    """WD of the composed shift minus that of the margin that is better on average."""
    rows = t["composition"]
    means = rows.groupby(["pair", "seed"])[["margin 1", "margin 2"]].transform("mean")
    best = np.where(means["margin 1"] <= means["margin 2"], rows["margin 1"], rows["margin 2"])
    gap = (rows["composed"] - best).groupby(rows["cluster"]).mean()
    return stats.cluster_bootstrap(gap, seed=0, draws=2000)


def compare_new_groups(
    t: Tables, first: tuple[str, int], second: tuple[str, int]
) -> Interval | None:
    """WD to groups left out of training, first minus second way with so many questions."""
    table = t["new_groups"]
    keys = ["seed", "group", "cluster"]
    ways = [
        table.query("way == @way and n_questions == @n").set_index(keys)["wd"]
        for way, n in (first, second)
    ]
    if any(way.empty for way in ways):
        return None
    gaps = (ways[0] - ways[1]).dropna().groupby(level="group").mean()
    if len(gaps) < 2:  # one group shows no spread: no p-value takes it for proof
        return Interval(gaps.iloc[0], gaps.iloc[0], gaps.iloc[0], 1)
    return stats.mean_interval(gaps.to_numpy())


def measure_axis(t: Tables, number: int, which: str = "correlation") -> Interval:
    """Canonical correlation of the groups' scores with planted traits, or what chance gives."""
    return over_seeds(t["axes"].query("axis == @number").set_index("seed")[which])


def deepest_layer(t: Tables) -> pd.Series:
    """The deepest layer of the sweep, with the names of its methods."""
    return t["layers"].sort_values("blocks").iloc[-1]


_Found = dict[str, Interval | float | tuple[Interval, Interval, Interval] | None]
"""What was measured for a claim, or with its control and the difference; None where the run lacks
it.
"""


def measure_claims(t: Tables, facts: dict) -> dict[str, Measurement | None]:
    """A measurement for every claim of the study; None where the run lacks what it needs."""
    found = _measure_shift(t, facts) | _measure_baselines(t, facts) | _measure_hypotheses(t, facts)
    return {f"opinion_qa.{name}": _as_measurement(m) for name, m in found.items()}


def _as_measurement(found: Interval | float | tuple | None) -> Measurement | None:
    if found is None or isinstance(found, float):
        return None if found is None else Measurement(found)
    return Measurement.of(*(found if isinstance(found, tuple) else (found,)))


def _measure_shift(t: Tables, facts: dict) -> _Found:
    best = facts["headline"]
    worst, unsteered, calibrated = (
        column(t, method, "worst") for method in (best, UNSTEERED, CALIBRATION)
    )
    planted = not t["axes"].empty
    is_gemma = facts["model"] == "gemma-2-2b"
    return {
        "shift.fit": (
            compare(t, best, UNSTEERED, "wd_ratio"),
            compare(t, CALIBRATION, UNSTEERED, "wd_ratio"),
            compare(t, best, CALIBRATION),
        ),
        # the toy survey's other text shares no word with it: nothing could harm it
        "shift.harm": None if planted else over_seeds(column(t, best, "cost")),
        "shift.term": over_seeds(column(t, NO_KL, "cost") - column(t, best, "cost")),
        "shift.below_population": compare(t, best, HUMAN_OVERALL),
        "shift.worst_group": (
            over_seeds(worst - unsteered.iloc[0]),
            over_seeds(0 * worst + calibrated.iloc[0] - unsteered.iloc[0]),
            over_seeds(worst - calibrated.iloc[0]),
        ),
        "shift.every_group": compare(t, best, CALIBRATION, "worst_group"),
        "shift.sparse": float(column(t, SPARSEST, "moved").mean()),
        "shift.sensitivity": measure(t, best, "rho_dev"),
        "shift.sensitivity_stretch": measure(t, best, "rho_dev"),
        "shift.slope": measure(t, best, "slope"),
        "shift.identification": measure(t, best, "identification"),
        "shift.negative_control": measure(t, best, "quietest") if planted else None,
        "real.gemma": compare(t, best, UNSTEERED, "wd_ratio") if is_gemma else None,
    }


def _measure_baselines(t: Tables, facts: dict) -> _Found:
    best = facts["headline"]
    found: _Found = {
        "rivals.prompt": compare(t, best, facts["prompt"]),
        "rivals.means": compare(t, best, MEANS),
        "rivals.lora": compare(t, best, LORA_PER_GROUP) if _has(t, LORA_PER_GROUP) else None,
        "space.tokens": compare(t, best, PER_TOKEN) if _has(t, PER_TOKEN) else None,
        "space.raw": compare(t, "SAE multiplicative", RAW),
    }
    for kind in ERROR_KEEPING:
        others = {"random": f"random {kind}", "pca": f"PCA {kind}", "dense": DENSE}
        for short, other in others.items():
            found[f"space.{kind}_{short}"] = compare(t, f"SAE {kind}", other)
    return found


def _measure_hypotheses(t: Tables, facts: dict) -> _Found:
    best = facts["headline"]
    late = deepest_layer(t)
    few = ("scores, U frozen", 10)
    coordinates = [float(column(t, name, "coordinates").mean()) for name in (best, FREE)]
    cost = column(t, "SAE multiplicative", "cost") - column(t, "SAE additive", "cost")
    return {
        "h1.depth": compare(t, best, late["all"], "rho_dev"),
        "h1.letters": measure(t, late["all"], "rho_dev"),
        "h1.divergence": compare(t, late["all"], UNSTEERED, "kl"),
        "h2.last_token": measure(t, late["answer"], "rho_dev"),
        "h3.dense": compare(t, best, FREE, "wd_ratio"),
        "h3.coordinates": coordinates[0] - coordinates[1],
        "h3.cost": over_seeds(cost) if t["axes"].empty else None,
        "h4.composition": None if t["composition"].empty else compare_composition(t),
        "h4.correlated": None,
        "new_groups.few": compare_new_groups(t, few, ("population", 0)),
        "new_groups.vector": compare_new_groups(t, few, ("whole vector", 10)),
    }


def _has(t: Tables, method: str) -> bool:
    return bool((t["scores"]["method"] == method).any())


# the answer in words


def summarize(t: Tables, facts: dict, verdicts: Mapping[str, str]) -> str:
    """What was found, in a few sentences with the numbers; `verdicts` are the ledger's, by id."""
    best = facts["headline"]
    fit = compare(t, best, UNSTEERED, "wd_ratio")
    rho = measure(t, best, "rho_dev")
    shuffled = measure(t, SHUFFLED, "rho_dev")
    kind = best.removeprefix("SAE ")
    article = "An" if kind[0] in "aeiou" else "A"
    space = compare(t, best, f"random {kind}")
    prompt = compare(t, best, facts["prompt"])
    cost = over_seeds(column(t, best, "cost"))

    def said(claim: str) -> str:
        return f"*{verdicts[f'opinion_qa.{claim}']}*"

    sentences = [
        f"{article} {kind} shift in SAE space leaves {_show(fit)} of the distance between the "
        f"frozen model's answers and each group's ({said('shift.fit')}); on other text it costs "
        f"{_show(cost)} nats per token ({said('shift.harm')}).",
        f"It follows how groups differ, with a correlation of {_show(rho)} on unseen questions, "
        f"where the same training on shuffled groups has {_show(shuffled)} "
        f"({said('shift.sensitivity')}).",
        f"Against a random dictionary of the same size and L0, the SAE changes the distance by "
        f"{_show(space)} ({said(f'space.{kind}_random')}).",
        f"Prompts that name the group come closer: against the best form the shift changes the "
        f"distance by {_show(prompt)} ({said('rivals.prompt')}); the claim against LoRA is "
        f"{said('rivals.lora')}.",
        f"The shift is not sparse ({said('shift.sparse')}).",
    ]
    if verdicts["opinion_qa.shift.sparse"] == "reproduced":
        sentences[-1] = "The shift is sparse."
    return " ".join(sentences)


def _show(found: Interval) -> str:
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


# what figures show


def make_titles(t: Tables, facts: dict) -> dict[str, str]:
    """The finding of each figure in one sentence."""
    best = facts["headline"]
    fit = compare(t, best, UNSTEERED, "wd_ratio").value
    rho = measure(t, best, "rho_dev").value
    cost = column(t, best, "cost").mean()
    spaces = compare_spaces(t)
    won = sum(interval.high < 0 for interval in spaces["interval"])
    groups = t["groups"].pivot_table(index="group", columns="method", values="wd")
    gained = int((groups[best] < groups[UNSTEERED]).sum())
    late = deepest_layer(t)
    off = t["off_target"].set_index("shift")
    size = off[list(off.index)].abs().to_numpy() > off["on_target"].abs().to_numpy()[:, None] / 4
    titles = {
        "methods": f"The shift leaves {fit:.0%} of the distance and follows groups (rho {rho:.2f})",
        "cost": f"The headline costs other text {cost:.4f} nats per token",
        "dose": "Distance, group sensitivity and cost as the shift is scaled",
        "space": f"SAE space is better in {won} of {len(spaces)} comparisons",
        "groups": f"{gained} of {len(groups)} groups come closer to their own answers",
        "off_target": f"{size.mean():.0%} of changes exceed a quarter of the shift's own",
        "layers": "At the deepest layer rho is "
        f"{measure(t, late['all'], 'rho_dev').value:.2f} on all tokens, "
        f"{measure(t, late['answer'], 'rho_dev').value:.2f} on the last alone",
    }
    topics = t["off_topic"].set_index("topic").drop(columns=["seed"], errors="ignore")
    titles["topics"] = f"{(topics < 0).to_numpy().mean():.0%} of groups and topics come closer"
    few = compare_new_groups(t, ("scores, U frozen", 10), ("population", 0))
    if few is not None:
        titles["few_shot"] = f"Ten answers change a new group's distance by {few.value:+.3f}"
    if not t["composition"].empty:
        gap = compare_composition(t)
        titles["composition"] = f"Added shifts minus the better margin: {gap.value:+.4f}"
    if not t["axes"].empty:
        pair = [measure_axis(t, 2, which).value for which in ("correlation", "chance")]
        titles["axes"] = f"The second axis has correlation {pair[0]:.2f}, chance {pair[1]:.2f}"
    return titles


def list_methods(t: Tables, facts: dict) -> dict[str, str]:
    """Methods of the main figure with their labels, from those that know nothing to prompts."""
    names = list(dict.fromkeys(t["scores"]["method"]))
    best = facts["headline"]
    spaces = ("random ", "PCA ", RAW, "dense vector", PER_TOKEN)
    order = [
        "uniform",
        UNSTEERED,
        HUMAN_OVERALL,
        CALIBRATION,
        "temperature and letter bias",
        SHUFFLED,
        best,
        *(m for m in names if m.startswith("SAE ") and NO_KL not in m and m != best),
        *(m for m in names if m.startswith(spaces)),
        "screened SAE latents (SAE-SSV)",
        "top 20 SAE latents, calibrated",
        MEANS,
        "letter unembedding, per group",
        *(m for m in names if m.startswith(("LoRA", "multinomial probe"))),
        facts["prompt"],
    ]
    no_competitors = {"uniform", UNSTEERED, HUMAN_OVERALL}
    labels = {m: m.replace(" (best on validation)", ", best form") for m in order if m in names}
    labels |= {m: f"{m}*" for m in no_competitors if m in names}
    return labels | {best: f"{best} (headline)"}


def tabulate_costs(t: Tables, facts: dict) -> pd.DataFrame:
    """WD and cost on other text of every trained method, by family of spaces."""
    means = t["scores"].groupby("method", sort=False)[["wd", "cost"]].mean()
    families = {
        "SAE": [f"SAE {kind}" for kind in (*ERROR_KEEPING, "literal")],
        "random dictionary": [f"random {kind}" for kind in ERROR_KEEPING],
        "principal components": [f"PCA {kind}" for kind in ERROR_KEEPING],
        "residual itself": [DENSE, FREE, RAW],
        PER_TOKEN: [PER_TOKEN],
        "untrained": [MEANS, "top 20 SAE latents, calibrated"],
        LORA_PER_GROUP: [LORA_PER_GROUP],
    }
    return pd.DataFrame(
        {"family": family, "method": method, **means.loc[method]}
        for family, methods in families.items()
        for method in methods
        if method in means.index
    )


def compare_spaces(t: Tables) -> pd.DataFrame:
    """WD of each edit in SAE space minus the same elsewhere, paired."""
    rows = []
    for kind in ERROR_KEEPING:
        others = {"random dictionary": f"random {kind}", "PCA": f"PCA {kind}", "dense": DENSE}
        if kind == "multiplicative":
            others["residual coordinates"] = RAW
        if _has(t, PER_TOKEN):
            others["per-token vector"] = PER_TOKEN
        for short, other in others.items():
            interval = compare(t, f"SAE {kind}", other)
            rows.append({"comparison": f"{kind}: SAE minus {short}", "interval": interval})
    return pd.DataFrame(rows)


def tabulate_group_distances(t: Tables, facts: dict) -> pd.DataFrame:
    """WD of every group under the methods that say most."""
    chosen = [UNSTEERED, HUMAN_OVERALL, CALIBRATION, SHUFFLED, facts["headline"], DENSE]
    chosen += [m for m in dict.fromkeys(t["groups"]["method"]) if m.startswith("LoRA")]
    chosen.append(facts["prompt"])
    order = list(dict.fromkeys(t["groups"]["group"]))
    table = t["groups"].pivot_table(index="group", columns="method", values="wd", sort=False)
    table = table.loc[order, [m for m in chosen if m in table]]
    return table.rename(columns=lambda m: m.replace(" (best on validation)", ", best form"))


def compare_ways_to_intersections(t: Tables) -> tuple[list[str], dict[str, list[Interval]]] | None:
    """WD to each pair of attributes' intersections by way, ordered by what the ways know."""
    table = t["composition"]
    if table.empty:
        return None
    ways = {
        "margin 1": "first margin alone",
        "margin 2": "second margin alone",
        "composed": "composed",
        "people's margins, added": "people's margins, added",
    }
    means = table.groupby(["pair", "cluster"], sort=False)[list(ways)].mean()
    pairs = list(dict.fromkeys(table["pair"]))
    found = {
        label: [
            stats.cluster_bootstrap(means.loc[pair, way].to_numpy(), seed=0, draws=2000)
            for pair in pairs
        ]
        for way, label in ways.items()
    }
    return [pair.replace("|", " and ") for pair in pairs], found


def compare_few_shot(t: Tables) -> tuple[list[int], dict[str, list[Interval]], Interval]:
    """WD of new groups minus the population's shift, by way and number of questions."""
    table = t["new_groups"]
    sizes = sorted(table.query("n_questions > 0")["n_questions"].unique().tolist())
    found = {}
    for way in table.query("n_questions > 0")["way"].unique():
        suffix = ", attribute unseen" if way.endswith(", attribute unseen") else ""
        if way.startswith("whole vector") and suffix:
            continue
        base = (f"population{suffix}", 0)
        found[way] = [compare_new_groups(t, (way, n), base) for n in sizes]
    return sizes, found, compare_new_groups(t, ("from the prompt", 0), ("population", 0))
