"""Splits of a survey's questions into train, validation and test; near-duplicates stay together."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from sae_research.errors import ResearchError
from sae_research.surveys.survey import Question, Survey

SPLITS = ("train", "validation", "test")


def find_families(questions: Sequence[Question], similarity: float) -> tuple[str, ...]:
    """The family of near-duplicates of each question, by the key of its first member.

    Families hang together by wordings whose tf-idf vectors have a cosine of `similarity` or more.
    """
    from scipy.sparse.csgraph import connected_components
    from sklearn.feature_extraction.text import TfidfVectorizer

    words = TfidfVectorizer(token_pattern=r"\w+").fit_transform([q.text for q in questions])
    _, labels = connected_components((words @ words.T) >= similarity, directed=False)
    first: dict[int, str] = {}
    return tuple(
        first.setdefault(int(label), q.key) for label, q in zip(labels, questions, strict=True)
    )


def split_questions(survey: Survey, seed: int, similarity: float) -> Survey:
    """Train (60 % of the families), validation (15 %) and test questions, none of them empty."""
    names = find_families(survey.questions, similarity)
    families = list(dict.fromkeys(names))
    if len(families) < 3:
        raise ResearchError(
            f"the survey has {len(families)} families of different questions; "
            "train, validation and test need at least one each."
        )
    n_test = max(1, round(0.25 * len(families)))
    n_validation = max(1, round(0.15 * len(families)))
    order = np.random.default_rng(seed).permutation(len(families))
    split = {families[i]: "train" for i in order}
    split |= {families[i]: "test" for i in order[:n_test]}
    split |= {families[i]: "validation" for i in order[n_test : n_test + n_validation]}
    return _with_splits(survey, [split[name] for name in names])


def split_by_topic(
    survey: Survey, unseen: Sequence[str], names: Sequence[str], seed: int
) -> Survey:
    """Test all questions of the `unseen` topics, such as a wave, and a quarter of the others.

    Of those 75 %, 60 are for training. `names` are the questions' families: none is parted, and
    one that reaches into an unseen topic is for the test alone.
    """
    apart = {name for name, q in zip(names, survey.questions, strict=True) if q.topic in unseen}
    seen = [name for name in dict.fromkeys(names) if name not in apart]
    order = np.random.default_rng(seed).permutation(len(seen))
    bounds = (0.6 * len(seen), 0.75 * len(seen))
    split = {
        seen[i]: SPLITS[int(np.searchsorted(bounds, place, side="right"))]
        for place, i in enumerate(order)
    }
    return _with_splits(survey, [split.get(name, "test") for name in names])


def _with_splits(survey: Survey, splits: Sequence[str]) -> Survey:
    questions = zip(survey.questions, splits, strict=True)
    return replace(survey, questions=tuple(replace(q, split=split) for q, split in questions))
