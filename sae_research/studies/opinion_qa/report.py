"""The tables of a run: scores of every method and seed, intervals, paired differences, and what each group gets."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from sae_research.studies.opinion_qa import evaluate
from sae_research.studies.opinion_qa.evaluate import Exam
from sae_research.studies.opinion_qa.study import DENSE, ERROR_KEEPING
from sae_research.survey import deviations

if TYPE_CHECKING:
    from sae_research.studies.opinion_qa.batch import Part

SHUFFLED = "shuffled groups"
POPULATION, UNSTEERED = "human overall marginal", "no steering"


def answers(parts: "Sequence[Part]") -> dict[str, np.ndarray]:
    """Answers of every method, [seeds, groups, questions, options]."""
    names = dict.fromkeys(o.name for part in parts for o in part.outcomes)
    return {name: np.stack([o.answers for part in parts for o in part.outcomes if o.name == name]) for name in names}


def scores(exam: Exam, parts: "Sequence[Part]") -> pd.DataFrame:
    """One row a method and seed: every score, the cost on other text, numbers trained."""
    unsteered = answers(parts)[UNSTEERED][0]
    rows = []
    for part in parts:
        for o in part.outcomes:
            about = {"method": o.name, "seed": part.seed, "cost": o.cost.loss, "divergence": o.cost.divergence}
            about |= {name: getattr(o, name) for name in ("parameters", "coordinates", "moved", "mass", "order")}
            rows.append(about | asdict(evaluate.scores(exam, o.answers, unsteered)))
    return pd.DataFrame(rows)


def intervals(exam: Exam, parts: "Sequence[Part]", seed: int = 0) -> pd.DataFrame:
    """WD and rho_dev of every method with intervals over clusters of questions and seeds."""
    rows = []
    for name, found in answers(parts).items():
        for metric, interval in (("wd", evaluate.wd_interval), ("rho_dev", evaluate.rho_interval)):
            rows.append({"method": name, "metric": metric} | asdict(interval(exam, found, seed)))
    return pd.DataFrame(rows)


def pairs(headline: str, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Which methods are compared: the headline with all, each edit in SAE space with itself elsewhere."""
    yield from ((headline, name) for name in names if name != headline)
    for kind in ERROR_KEEPING:
        own = f"SAE {kind}"
        yield from ((own, other) for other in (f"random {kind}", f"PCA {kind}", DENSE) if own != headline)


def paired(exam: Exam, parts: "Sequence[Part]", headline: str, seed: int = 0) -> pd.DataFrame:
    """First less second method on the same questions: WD, rho_dev, and the ratio of their WDs."""
    table, rows = answers(parts), []
    for first, second in pairs(headline, list(table)):
        a, b = _of_equal_seeds(table[first], table[second])
        found = {
            "wd": evaluate.wd_interval(exam, a, seed, b),
            "rho_dev": evaluate.rho_interval(exam, a, seed, b),
            "wd_ratio": evaluate.wd_ratio(exam, a, b, seed),
        }
        rows += [{"first": first, "second": second, "metric": m} | asdict(interval) for m, interval in found.items()]
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
        rows += [{"method": name, "group": g.name, "attribute": g.attribute, "wd": w} for g, w in pairs_]
    return pd.DataFrame(rows)


def topics(exam: Exam, parts: "Sequence[Part]") -> pd.DataFrame:
    """WD of every method by topic (the wave, of a real survey), and whether any question of it was trained on."""
    rows, asked = [], exam.survey.questions
    topic = np.array([asked[i].topic for i in exam.questions])
    trained = {q.topic for q in asked if q.split == "train"}
    for name, found in answers(parts).items():
        wd = exam.distance(found, exam.truth).mean((0, 1))
        for t in dict.fromkeys(topic):
            own = {"method": name, "topic": t, "seen": t in trained, "questions": int((topic == t).sum())}
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
                sizes = {key: float(np.sqrt((x[own] ** 2).mean())) for key, x in (("predicted", ours), ("true", true))}
                rows.append({"method": method, "seed": seed, "attribute": attribute} | sizes)
    return pd.DataFrame(rows)


def collected(parts: "Sequence[Part]") -> dict[str, pd.DataFrame]:
    """The parts' own tables, joined over seeds."""
    names = dict.fromkeys(name for part in parts for name in part.tables)
    return {
        name: pd.concat(
            [part.tables[name].assign(seed=part.seed) for part in parts if name in part.tables], ignore_index=True
        )
        for name in names
    }
