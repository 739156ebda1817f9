"""Surveys of fewer questions or groups."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from sae_research.errors import ResearchError
from sae_research.surveys.survey import Question, Survey


def thin_questions(
    questions: Sequence[Question], clusters: Sequence[str], every: int
) -> np.ndarray:
    """Rows of every n-th cluster of each split."""
    chosen: set[str] = set()
    for split in dict.fromkeys(q.split for q in questions):
        own = [c for c, q in zip(clusters, questions, strict=True) if q.split == split]
        chosen |= set(list(dict.fromkeys(own))[::every])
    return np.array([i for i, cluster in enumerate(clusters) if cluster in chosen])


def select_questions(survey: Survey, rows: np.ndarray) -> Survey:
    """The survey of some of its questions."""
    return replace(
        survey,
        questions=tuple(survey.questions[i] for i in rows),
        distributions=survey.distributions[:, rows],
        overall=survey.overall[rows],
        counts=None if survey.counts is None else survey.counts[:, rows],
        web=None if survey.web is None else survey.web[rows],
    )


def drop_small_groups(survey: Survey, min_responses: int) -> Survey:
    """The survey without groups with too few answers to some question, or that then stand alone."""
    enough = survey.counts.sum(-1).min(1) >= min_responses
    attributes = [g.attribute for g in survey.groups]
    left = Counter(a for a, ok in zip(attributes, enough, strict=True) if ok)
    rows = [i for i, ok in enumerate(enough) if ok and left[attributes[i]] > 1]
    if not rows:
        raise ResearchError(
            f"no attribute has two groups with {min_responses} answers to every question; "
            "lower `min_responses`."
        )
    return replace(
        survey,
        groups=tuple(survey.groups[i] for i in rows),
        distributions=survey.distributions[rows],
        counts=survey.counts[rows],
    )
