"""The tables of a run: scores of every method and seed, intervals, paired differences, and what each group gets."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from sae_research.studies.opinion_qa import evaluate
from sae_research.studies.opinion_qa import intervals as intervals_of
from sae_research.studies.opinion_qa.evaluate import Exam
from sae_research.studies.opinion_qa.study import DENSE, ERROR_KEEPING, RAW, SHUFFLED, TOKENS, Plan
from sae_research.surveys.survey import deviations

if TYPE_CHECKING:
    from sae_research.studies.opinion_qa.batch import Part

UNSTEERED = "no steering"


def answers(parts: "Sequence[Part]") -> dict[str, np.ndarray]:
    """Answers of every method, [seeds, groups, questions, options]."""
    names = dict.fromkeys(o.name for part in parts for o in part.outcomes)
    return {
        name: np.stack([o.answers for part in parts for o in part.outcomes if o.name == name])
        for name in names
    }


def scores(exam: Exam, parts: "Sequence[Part]") -> pd.DataFrame:
    """One row a method and seed: every score, the cost on other text, numbers trained."""
    unsteered = answers(parts)[UNSTEERED][0]
    rows = []
    for part in parts:
        for o in part.outcomes:
            about = {
                "method": o.name,
                "seed": part.seed,
                "cost": o.cost.loss,
                "divergence": o.cost.divergence,
            }
            names = (
                "parameters",
                "coordinates",
                "moved",
                "silent",
                "size",
                "strength",
                "mass",
                "order",
            )
            about |= {name: getattr(o, name) for name in names}
            rows.append(about | asdict(evaluate.scores(exam, o.answers, unsteered)))
    return pd.DataFrame(rows)


def tables(exam: Exam, parts: "Sequence[Part]", plan: Plan) -> dict[str, pd.DataFrame]:
    """Every table of a subject."""
    found = {
        "choices": choices(plan),
        "scores": scores(exam, parts),
        "intervals": intervals(exam, parts),
        "paired": paired(exam, parts, plan.headline),
        "groups": groups(exam, parts),
        "topics": topics(exam, parts),
        "attributes": attributes(exam, parts, [plan.headline, SHUFFLED]),
    }
    return found | collected(parts)


def choices(plan: Plan) -> pd.DataFrame:
    """What validation chose for every arm, and how close it came there."""
    rows = []
    for name, choice in plan.choices.items():
        row = {"method": name, "edit": choice.best.kind, "rank": choice.best.rank}
        row |= {
            "keep": choice.best.keep,
            "sparsity": choice.best.sparsity,
            "sparsest": choice.sparse.sparsity,
        }
        rows.append(row | {"validation_kl": choice.loss, "validation_cost": choice.harm})
    return pd.DataFrame(rows)


def intervals(exam: Exam, parts: "Sequence[Part]", seed: int = 0) -> pd.DataFrame:
    """Scores of every method with intervals over clusters of questions and the seeds that it was run with."""
    metrics = {
        "wd": intervals_of.wd,
        "kl": intervals_of.kl,
        "rho_dev": intervals_of.rho_dev,
        "slope": intervals_of.slope,
        "identification": intervals_of.identification,
        "quietest": intervals_of.quietest_share,
    }
    return pd.DataFrame(
        {"method": name, "metric": metric, "seeds": len(found)}
        | asdict(interval(exam, found, seed))
        for name, found in answers(parts).items()
        for metric, interval in metrics.items()
    )


def pairs(headline: str, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What is compared: the headline with all, all with no steering, each edit in SAE space with itself elsewhere."""
    yield from ((headline, name) for name in names if name != headline)
    yield from ((name, UNSTEERED) for name in names if name not in (headline, UNSTEERED))
    for kind in ERROR_KEEPING:
        own = f"SAE {kind}"
        rivals = [f"random {kind}", f"PCA {kind}", DENSE, TOKENS, RAW]
        yield from ((own, other) for other in rivals if own != headline and other in names)


def paired(exam: Exam, parts: "Sequence[Part]", headline: str, seed: int = 0) -> pd.DataFrame:
    """First less second method on the same questions: WD, KL, rho_dev; the ratio of WDs; the largest group's change."""
    table, rows = answers(parts), []
    for first, second in pairs(headline, list(table)):
        a, b = _of_equal_seeds(table[first], table[second])
        found = {
            "wd": intervals_of.wd(exam, a, seed, b),
            "kl": intervals_of.kl(exam, a, seed, b),
            "rho_dev": intervals_of.rho_dev(exam, a, seed, b),
            "wd_ratio": intervals_of.wd_ratio(exam, a, b, seed),
            "worst_group": intervals_of.worst_change(exam, a, b, seed),
        }
        rows += [
            {"first": first, "second": second, "metric": m} | asdict(interval)
            for m, interval in found.items()
        ]
    return pd.DataFrame(rows)


def _of_equal_seeds(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A method that no seed changes has one row: it is set against every seed of the other."""
    seeds = max(len(a), len(b))
    return tuple(x if len(x) == seeds else np.repeat(x[:1], seeds, 0) for x in (a, b))


def groups(exam: Exam, parts: "Sequence[Part]") -> pd.DataFrame:
    """WD of every method and group, mean over seeds."""
    rows = []
    for name, found in answers(parts).items():
        wd = exam.distance(found, exam.truth).mean((0, 2))
        pairs_ = zip(exam.survey.groups, wd, strict=True)
        rows += [
            {"method": name, "group": g.name, "attribute": g.attribute, "wd": w} for g, w in pairs_
        ]
    return pd.DataFrame(rows)


def topics(exam: Exam, parts: "Sequence[Part]") -> pd.DataFrame:
    """WD of every method by topic (the wave, of a real survey), and whether any question of it was trained on."""
    rows, asked = [], exam.survey.questions
    topic = np.array([asked[i].topic for i in exam.questions])
    trained = {q.topic for q in asked if q.split == "train"}
    for name, found in answers(parts).items():
        wd = exam.distance(found, exam.truth).mean((0, 1))
        for t in dict.fromkeys(topic):
            own = {
                "method": name,
                "topic": t,
                "seen": t in trained,
                "questions": int((topic == t).sum()),
            }
            rows.append(own | {"wd": wd[topic == t].mean()})
    return pd.DataFrame(rows)


def attributes(exam: Exam, parts: "Sequence[Part]", methods: Sequence[str]) -> pd.DataFrame:
    """Root mean square deviation of each attribute's groups from the population, predicted and true, by seed."""
    rows, table = [], answers(parts)
    true = deviations(exam.truth, exam.survey.weights)[:, exam.mask]
    names = [g.attribute for g in exam.survey.groups]
    for method in methods:
        for seed, found in enumerate(table[method]):
            ours = deviations(found, exam.survey.weights)[:, exam.mask]
            for attribute in dict.fromkeys(names):
                own = np.array(names) == attribute
                sizes = {
                    key: float(np.sqrt((x[own] ** 2).mean()))
                    for key, x in (("predicted", ours), ("true", true))
                }
                rows.append({"method": method, "seed": seed, "attribute": attribute} | sizes)
    return pd.DataFrame(rows)


def collected(parts: "Sequence[Part]") -> dict[str, pd.DataFrame]:
    """The parts' own tables, joined over seeds."""
    names = dict.fromkeys(name for part in parts for name in part.tables)
    return {
        name: pd.concat(
            [part.tables[name].assign(seed=part.seed) for part in parts if name in part.tables],
            ignore_index=True,
        )
        for name in names
    }
