"""What the seeds add up to: tables with intervals, what the claims measure, the answer in words."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

import numpy as np
import pandas as pd

from sae_research import stats
from sae_research.claims import Measurement
from sae_research.stats import Interval
from sae_research.studies.opinion_qa import evaluate
from sae_research.studies.opinion_qa.evaluate import EvalSet
from sae_research.studies.opinion_qa.methods import ERROR_KEEPING, MethodResult, Plan
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
from sae_research.studies.runner import Result
from sae_research.surveys.survey import deviations

Tables = dict[str, pd.DataFrame]
BySeed = Mapping[int, Sequence[MethodResult]]
"""Results of every method by seed."""


# tables of a run


def make_tables(eval_set: EvalSet, by_seed: BySeed, plan: Plan) -> Tables:
    """Every table of a model."""
    answers = stack_answers(by_seed)
    return {
        "choices": tabulate_choices(plan),
        "scores": tabulate_scores(eval_set, by_seed, answers[UNSTEERED][0]),
        "intervals": tabulate_intervals(eval_set, answers),
        "paired": tabulate_pairs(eval_set, answers, plan.headline),
        "groups": tabulate_groups(eval_set, answers),
        "topics": tabulate_topics(eval_set, answers),
        "attributes": tabulate_attributes(eval_set, answers, [plan.headline, SHUFFLED]),
    }


def join_seeds(results: Sequence[Result]) -> Tables:
    """The tables that each seed made itself, joined."""
    names = dict.fromkeys(name for r in results for name in r.tables if name != "results")
    return {
        name: pd.concat(
            [r.tables[name].assign(seed=r.task["seed"]) for r in results if name in r.tables],
            ignore_index=True,
        )
        for name in names
    }


def stack_answers(by_seed: BySeed) -> dict[str, np.ndarray]:
    """Answers of every method, [seeds, groups, questions, options]."""
    names = dict.fromkeys(r.name for results in by_seed.values() for r in results)
    return {
        name: np.stack(
            [r.answers for results in by_seed.values() for r in results if r.name == name]
        )
        for name in names
    }


_COLUMNS = ("parameters", "coordinates", "moved", "silent", "size", "coefficient", "mass", "order")


def tabulate_scores(eval_set: EvalSet, by_seed: BySeed, unsteered: np.ndarray) -> pd.DataFrame:
    """One row per method and seed: every score, the cost on other text, numbers trained."""
    rows = []
    for seed, results in by_seed.items():
        for r in results:
            about = {"method": r.name, "seed": seed}
            about |= {"cost": r.cost.loss, "divergence": r.cost.divergence}
            about |= {name: getattr(r, name) for name in _COLUMNS}
            rows.append(about | asdict(evaluate.compute_scores(eval_set, r.answers, unsteered)))
    return pd.DataFrame(rows)


def tabulate_choices(plan: Plan) -> pd.DataFrame:
    """What validation chose for every method, and how close it came there."""
    return pd.DataFrame(
        {
            "method": name,
            "edit": choice.best.kind,
            "rank": choice.best.rank,
            "kl_weight": choice.best.kl_weight,
            "sparsity_weight": choice.best.sparsity_weight,
            "sparsest": choice.sparse.sparsity_weight,
            "validation_kl": choice.loss,
            "validation_cost": choice.harm,
        }
        for name, choice in plan.choices.items()
    )


_METRICS = {
    "wd": evaluate.wd_interval,
    "kl": evaluate.kl_interval,
    "rho_dev": evaluate.rho_dev_interval,
    "slope": evaluate.slope_interval,
    "identification": evaluate.identification_interval,
    "quietest": evaluate.quietest_share_interval,
}


def tabulate_intervals(
    eval_set: EvalSet, answers: dict[str, np.ndarray], seed: int = 0
) -> pd.DataFrame:
    """Scores of every method, intervals over clusters of questions and the seeds it ran with."""
    return pd.DataFrame(
        {"method": name, "metric": metric, "seeds": len(found)}
        | asdict(interval(eval_set, found, seed))
        for name, found in answers.items()
        for metric, interval in _METRICS.items()
    )


def list_pairs(headline: str, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The headline with all, all with no steering, each edit in SAE space with itself elsewhere."""
    yield from ((headline, name) for name in names if name != headline)
    yield from ((name, UNSTEERED) for name in names if name not in (headline, UNSTEERED))
    for kind in ERROR_KEEPING:
        own = f"SAE {kind}"
        others = [f"random {kind}", f"PCA {kind}", DENSE, PER_TOKEN, RAW]
        yield from ((own, other) for other in others if own != headline and other in names)


def tabulate_pairs(
    eval_set: EvalSet, answers: dict[str, np.ndarray], headline: str, seed: int = 0
) -> pd.DataFrame:
    """First minus second method on the same questions, for every pair and metric.

    `wd_ratio` is the ratio of distances, `worst_group` the largest change of any group.
    """
    rows = []
    for first, second in list_pairs(headline, list(answers)):
        a, b = _of_equal_seeds(answers[first], answers[second])
        found = {
            "wd": evaluate.wd_interval(eval_set, a, seed, b),
            "kl": evaluate.kl_interval(eval_set, a, seed, b),
            "rho_dev": evaluate.rho_dev_interval(eval_set, a, seed, b),
            "wd_ratio": evaluate.wd_ratio_interval(eval_set, a, b, seed),
            "worst_group": evaluate.worst_change_interval(eval_set, a, b, seed),
        }
        rows += [
            {"first": first, "second": second, "metric": metric} | asdict(interval)
            for metric, interval in found.items()
        ]
    return pd.DataFrame(rows)


def _of_equal_seeds(a: np.ndarray, b: np.ndarray) -> list[np.ndarray]:
    """A method that no seed changes has one row: it is set against every seed of the other."""
    seeds = max(len(a), len(b))
    return [x if len(x) == seeds else np.repeat(x[:1], seeds, 0) for x in (a, b)]


def tabulate_groups(eval_set: EvalSet, answers: dict[str, np.ndarray]) -> pd.DataFrame:
    """WD of every method and group, mean over seeds."""
    rows = []
    for name, found in answers.items():
        wd = eval_set.distance(found, eval_set.truth).mean((0, 2))
        rows += [
            {"method": name, "group": g.name, "attribute": g.attribute, "wd": w}
            for g, w in zip(eval_set.survey.groups, wd, strict=True)
        ]
    return pd.DataFrame(rows)


def tabulate_topics(eval_set: EvalSet, answers: dict[str, np.ndarray]) -> pd.DataFrame:
    """WD of every method by topic (the wave, of a real survey), and whether training saw it."""
    questions = eval_set.survey.questions
    topic = np.array([questions[i].topic for i in eval_set.questions])
    seen = {q.topic for q in questions if q.split == "train"}
    rows = []
    for name, found in answers.items():
        wd = eval_set.distance(found, eval_set.truth).mean((0, 1))
        for t in dict.fromkeys(topic):
            own = topic == t
            about = {"method": name, "topic": t, "seen": t in seen, "questions": int(own.sum())}
            rows.append(about | {"wd": wd[own].mean()})
    return pd.DataFrame(rows)


def tabulate_attributes(
    eval_set: EvalSet, answers: dict[str, np.ndarray], methods: Sequence[str]
) -> pd.DataFrame:
    """Root mean square deviation of each attribute's groups, predicted and true, by seed."""
    names = np.array([g.attribute for g in eval_set.survey.groups])

    def deviate(p: np.ndarray) -> np.ndarray:
        return deviations(p, eval_set.survey.weights)[:, eval_set.mask]

    true = deviate(eval_set.truth)
    rows = []
    for method in methods:
        for seed, found in enumerate(answers[method]):
            predicted = deviate(found)
            for attribute in dict.fromkeys(names.tolist()):
                own = names == attribute
                about = {"method": method, "seed": seed, "attribute": attribute}
                sizes = {
                    name: float(np.sqrt((x[own] ** 2).mean()))
                    for name, x in (("predicted", predicted), ("true", true))
                }
                rows.append(about | sizes)
    return pd.DataFrame(rows)


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
    return read_interval(
        t["paired"].query("first == @first and second == @second and metric == @metric")
    )


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
    gap = (ways[0] - ways[1]).dropna().unstack("cluster").sort_index()
    shape = [gap.index.get_level_values(i).nunique() for i in (0, 1)]
    return evaluate.resample_groups_and_clusters(gap.to_numpy().reshape(*shape, -1), seed=0)


def measure_axis(t: Tables, number: int, which: str = "correlation") -> Interval:
    """Canonical correlation of the groups' scores with planted traits, or what chance gives."""
    return over_seeds(t["axes"].query("axis == @number").set_index("seed")[which])


def deepest_layer(t: Tables) -> pd.Series:
    """The deepest layer of the sweep, with the names of its methods."""
    return t["layers"].sort_values("blocks").iloc[-1]


def measure_claims(t: Tables, facts: dict) -> dict[str, Measurement | None]:
    """A measurement for every claim of the study; None where the run lacks what it needs."""
    best = facts["headline"]
    planted = not t["axes"].empty
    found = {
        **_measure_shift(t, facts),
        **_measure_baselines(t, facts),
        **_measure_hypotheses(t, facts),
    }
    judged = {name: _as_measurement(m) for name, m in found.items()}
    judged["shift.sensitivity"] = Measurement.of(
        measure(t, best, "rho_dev"), measure(t, SHUFFLED, "rho_dev")
    )
    judged["shift.second_axis"] = None
    if planted:
        judged["shift.second_axis"] = Measurement.of(
            measure_axis(t, 2), measure_axis(t, 2, "chance")
        )
    return {f"opinion_qa.{name}": m for name, m in judged.items()}


_Found = dict[str, Interval | float | None]


def _measure_shift(t: Tables, facts: dict) -> _Found:
    best = facts["headline"]
    worst = column(t, best, "worst") - column(t, UNSTEERED, "worst").iloc[0]
    planted = not t["axes"].empty
    is_gemma = facts["model"] == "gemma-2-2b"
    return {
        "shift.noop": facts["noop"],
        "shift.fit": compare(t, best, UNSTEERED, "wd_ratio"),
        "shift.harm": over_seeds(column(t, best, "cost")),
        "shift.term": over_seeds(column(t, NO_KL, "cost") - column(t, best, "cost")),
        "shift.below_population": compare(t, best, HUMAN_OVERALL),
        "shift.worst_group": over_seeds(worst),
        "shift.every_group": compare(t, best, UNSTEERED, "worst_group"),
        "shift.sparse": float(column(t, SPARSEST, "moved").mean()),
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
        "h3.cost": over_seeds(cost),
        "h4.composition": None if t["composition"].empty else compare_composition(t),
        "h4.correlated": None,
        "h5.shuffled": measure(t, SHUFFLED, "rho_dev"),
        "new_groups.few": compare_new_groups(t, few, ("population", 0)),
        "new_groups.vector": compare_new_groups(t, few, ("whole vector", 10)),
    }


def _has(t: Tables, method: str) -> bool:
    return bool((t["scores"]["method"] == method).any())


def _as_measurement(found: Interval | float | None) -> Measurement | None:
    if found is None or isinstance(found, Interval):
        return None if found is None else Measurement.of(found)
    return Measurement(found)


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
        f"{article} {kind} shift in SAE space leaves {_show(fit)} of the distance between the frozen "
        f"model's answers and each group's ({said('shift.fit')}); on other text it costs "
        f"{_show(cost)} nats per token ({said('shift.harm')}).",
        f"It follows how groups differ, with a correlation of {_show(rho)} on unseen questions, "
        f"where the same training on shuffled groups has {_show(shuffled)} "
        f"({said('shift.sensitivity')}).",
        f"Against a random dictionary of the same size and L0, the SAE changes the distance by "
        f"{_show(space)} ({said(f'space.{kind}_random')}).",
        f"The best group prompt is a different story: against it the shift changes the distance "
        f"by {_show(prompt)} ({said('rivals.prompt')}: no word on the group is in the shift's "
        f"prompt), and LoRA is {said('rivals.lora')}.",
        f"The shift is not sparse ({said('shift.sparse')}).",
    ]
    if verdicts["opinion_qa.shift.sparse"] == "reproduced":
        sentences[-1] = "The shift is sparse."
    return " ".join(sentences)


def _show(found: Interval) -> str:
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"
