"""Surveys of real respondents, as committed in data/surveys/real (data/surveys/README.md)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sae_research import store
from sae_research.errors import unknown
from sae_research.paths import ROOT
from sae_research.surveys.files import load_survey
from sae_research.surveys.splits import split_by_topic
from sae_research.surveys.survey import OVERALL, Survey, halve_respondents
from sae_research.surveys.tables import read_rows

if TYPE_CHECKING:
    from pandas import DataFrame

FOLDER = ROOT / "data" / "surveys" / "real"


@dataclass(frozen=True)
class Pool:
    """Sources whose questions are asked together, of the groups that all of them know."""

    sources: tuple[str, ...]
    """Values of the column `source`."""
    attributes: tuple[str, ...]
    """Attributes that every source knows."""
    unseen: tuple[str, ...]
    """Topics that only test questions come from."""


_UNSEEN = ("race", "health", "defense and foreign aid")
SURVEYS = {
    "politics": Pool(
        ("gss2018", "cces2016", "anes2012"), ("party", "age", "education", "race"), _UNSEEN
    ),
    "ideology": Pool(
        ("gss2018", "cces2016"),
        ("party", "ideology", "sex", "age", "education", "race"),
        _UNSEEN,
    ),
    "region": Pool(
        ("cces2016", "anes2012"), ("party", "age", "education", "race", "region"), _UNSEEN
    ),
    "personality": Pool(("ipip2010",), ("sex", "age", "education"), ("openness",)),
}
"""What can be loaded, by name."""

OPINION_QA = {
    "ideology": 0.073,
    "race": 0.055,
    "party": 0.050,
    "education": 0.039,
    "age": 0.038,
    "sex": 0.026,
    "region": 0.018,
    "all groups": 0.043,
    "uniform answers": 0.183,
    "Democrat to Republican": 0.143,
}
"""Mean WD in 684 questions of OpinionQA and 35 groups, from unweighted counts."""
OPINION_QA_NOISE = 0.013
"""The sampling noise there, at a mean of 1,181 respondents."""


def load_real(name: str = "politics", seed: int = 0) -> Survey:
    """A survey of real respondents, split with whole clusters and with topics only for the test."""
    pool = _find_pool(name)
    survey = _load("groups.csv", pool, pool.attributes)
    return split_by_topic(survey, pool.unseen, find_clusters(survey), seed)


def find_clusters(survey: Survey) -> tuple[str, ...]:
    """The cluster of near-duplicates of every question; wordings alone do not tell them here."""
    cluster = {row["qkey"]: row["cluster"] for _, row in read_rows(_find_folder() / "groups.csv")}
    return tuple(cluster[q.key] for q in survey.questions)


def load_intersections(name: str = "politics") -> tuple[Survey, ...]:
    """The same questions for each pair of attributes, without splits."""
    pool = _find_pool(name)
    pairs = [f"{first}|{second}" for first, second in combinations(pool.attributes, 2)]
    survey = _load("intersections.csv", pool, pairs)
    return tuple(_select_groups(survey, survey.of(pair)) for pair in pairs)


def _select_groups(survey: Survey, rows: np.ndarray) -> Survey:
    return replace(
        survey,
        groups=tuple(survey.groups[i] for i in rows),
        distributions=survey.distributions[rows],
        counts=survey.counts[rows],
    )


def _find_pool(name: str) -> Pool:
    if name not in SURVEYS:
        raise unknown("survey", name, SURVEYS, "load_real")
    return SURVEYS[name]


def _load(file: str, pool: Pool, attributes: Sequence[str]) -> Survey:
    path = _find_folder() / file
    keys = {row["qkey"] for _, row in read_rows(path) if row["source"] in pool.sources}
    return load_survey(path, attributes=attributes, questions=sorted(keys))


def _find_folder() -> Path:
    return store.verified(FOLDER, "it comes with the repository; restore it from there.")


# what the respondents show


def tabulate_groups(survey: Survey, seed: int = 0) -> "DataFrame":
    """How far groups are from the population, beside sampling noise and the figures of OpinionQA.

    `halves` is the distance between two random halves of a group's respondents, whose half is what
    a distribution owes to the draw of its respondents (its error is half theirs).
    """
    import pandas as pd

    away = survey.distance(survey.distributions, survey.overall).mean(-1)
    halves = survey.distance(*halve_respondents(survey, seed)).mean(-1)
    size = survey.counts.sum(-1).mean(-1)
    members = {a: survey.of(a) for a in dict.fromkeys(g.attribute for g in survey.groups)}
    rows = []
    for name, inside in {**members, "all groups": np.arange(len(survey.groups))}.items():
        shown = {"distance": away, "halves": halves, "noise": halves / 2, "respondents": size}
        means = {column: float(values[inside].mean()) for column, values in shown.items()}
        rows.append({"attribute": name, "groups": len(inside), **means})
    uniform = float(survey.distance(survey.distributions, survey.uniform).mean())
    rows.append({"attribute": "uniform answers", "distance": uniform})
    at = {group.name: i for i, group in enumerate(survey.groups)}
    if {"Democrat", "Republican"} <= set(at):
        first, second = (survey.distributions[at[n]] for n in ("Democrat", "Republican"))
        between = float(survey.distance(first, second).mean())
        rows.append({"attribute": "Democrat to Republican", "distance": between})
    table = pd.DataFrame(rows)
    return table.assign(opinion_qa=table["attribute"].map(OPINION_QA))


def correlate_items(source: str, attribute: str) -> "dict[str, DataFrame]":
    """Correlations between a source's items within each group, by group; Overall is everybody.

    Answers count by their place among the options; each pair of items is taken over the people who
    answered both.
    """
    import pandas as pd

    path = _find_folder() / f"{source}.csv"
    if not path.is_file():
        known = [f.stem for f in FOLDER.glob("*20*.csv")]
        raise unknown("source with respondents", source, known, "correlate_items")
    people = pd.read_csv(path)
    items = [column for column in people if "_" in column]
    if attribute not in set(people) - set(items):
        raise unknown("attribute", attribute, set(people) - set(items), source)
    groups = {OVERALL: people, **dict(iter(people.groupby(attribute)))}
    return {name: group[items].corr() for name, group in groups.items()}
