"""The tables of a model, from the results of its seeds: scores, intervals, paired differences."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial

import numpy as np
import pandas as pd

from sae_research.studies.opinion_qa.methods import ERROR_KEEPING, MethodResult, Plan
from sae_research.studies.opinion_qa.settings import DENSE, PER_TOKEN, RAW, SHUFFLED, UNSTEERED
from sae_research.studies.runner import Result
from sae_research.surveys import intervals, scores
from sae_research.surveys.scores import EvalSet
from sae_research.surveys.survey import deviations

Tables = dict[str, pd.DataFrame]
BySeed = Mapping[int, Sequence[MethodResult]]
"""Results of every method by seed."""


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
            rows.append(about | asdict(scores.compute_scores(eval_set, r.answers, unsteered)))
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
    "wd": intervals.distance_interval,
    "kl": partial(intervals.distance_interval, metric="kl"),
    "rho_dev": intervals.rho_dev_interval,
    "slope": intervals.slope_interval,
    "identification": intervals.identification_interval,
    "quietest": intervals.quietest_share_interval,
}
_PAIRED = {
    **{metric: _METRICS[metric] for metric in ("wd", "kl", "rho_dev")},
    "wd_ratio": intervals.wd_ratio_interval,
    "worst_group": intervals.worst_change_interval,
}
"""`wd_ratio` is the ratio of distances, `worst_group` the largest change of any group."""


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
    """First minus second method on the same questions, for every pair and metric."""
    rows = []
    for first, second in list_pairs(headline, list(answers)):
        seeds = max(len(answers[first]), len(answers[second]))
        # a method that no seed changes has one row: it is set against every seed of the other
        a, b = (
            x if len(x) == seeds else np.repeat(x[:1], seeds, 0)
            for x in (answers[first], answers[second])
        )
        rows += [
            {"first": first, "second": second, "metric": metric}
            | asdict(interval(eval_set, a, seed, b))
            for metric, interval in _PAIRED.items()
        ]
    return pd.DataFrame(rows)


def tabulate_groups(eval_set: EvalSet, answers: dict[str, np.ndarray]) -> pd.DataFrame:
    """WD of every method and group, mean over seeds."""
    return pd.DataFrame(
        {"method": name, "group": g.name, "attribute": g.attribute, "wd": wd}
        for name, found in answers.items()
        for g, wd in zip(
            eval_set.survey.groups,
            eval_set.distance(found, eval_set.truth).mean((0, 2)),
            strict=True,
        )
    )


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
    return pd.DataFrame(
        {"method": method, "seed": seed, "attribute": attribute}
        | {
            name: float(np.sqrt((x[names == attribute] ** 2).mean()))
            for name, x in (("predicted", predicted), ("true", true))
        }
        for method in methods
        for seed, predicted in enumerate(map(deviate, answers[method]))
        for attribute in dict.fromkeys(names.tolist())
    )
