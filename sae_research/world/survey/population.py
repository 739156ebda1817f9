"""The planted survey: persons answer by a graded-response model, so distributions are exact.

theta = sum_a E[a, value] + z with z ~ N(0, sigma^2), and P(y >= k | theta)
= sigmoid(p_v lambda_t . theta + b - tau_k) for a question on topic t with verb v. The answer
depends on theta through one projection only, so the integral over z is a Gauss-Hermite sum in
one dimension.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sae_research.surveys.survey import Group, Question, Survey

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "party": ("blue", "purple", "red"),
    "age": ("young", "middle", "old"),
    "education": ("school", "college", "graduate"),
    "region": ("north", "center", "south"),
    "hand": ("lefthanded", "righthanded"),
}
"""Attributes and their values; `hand` moves nothing and is the negative control."""

SHARES = {
    "party": (0.36, 0.32, 0.32),
    "age": (0.28, 0.36, 0.36),
    "education": (0.38, 0.36, 0.26),
    "region": (0.30, 0.38, 0.32),
    "hand": (0.12, 0.88),
}
"""Population share of each value; attributes are independent."""

WEB_SHARES = {
    "party": (0.62, 0.24, 0.14),
    "age": (0.52, 0.31, 0.17),
    "education": (0.22, 0.36, 0.42),
    "region": (0.40, 0.35, 0.25),
    "hand": (0.12, 0.88),
}
"""The same shares among the authors of text that states no attribute: a narrow and known view."""

TOPICS: dict[str, tuple[float, float, float]] = {
    "guns": (1.0, 0.0, 0.4),
    "police": (0.9, 0.5, 0.0),
    "borders": (1.1, -0.4, 0.0),
    "welfare": (-1.0, 0.0, 0.5),
    "climate": (-1.1, 0.5, 0.0),
    "unions": (-0.9, 0.0, -0.6),
    "schools": (0.4, 1.0, 0.0),
    "science": (-0.5, 1.1, 0.0),
    "games": (0.0, -1.1, 0.4),
    "farms": (0.5, 0.0, 1.1),
    "rivers": (0.0, 0.5, -1.0),
    "trains": (-0.5, 0.6, -0.9),
}
"""Loading of each topic on ideology, age and education, and region."""

VERBS = {"fund": 1.0, "praise": 0.8, "allow": 0.6, "limit": -0.6, "tax": -0.8, "ban": -1.0}
"""Polarity of each verb."""

OPTION_SETS = (
    ("no", "yes"),
    ("against", "unsure", "favor"),
    ("never", "rarely", "often", "always"),
)
"""Answer options, from least to most support."""

THRESHOLDS = ((0.0,), (-0.6, 0.6), (-1.2, 0.0, 1.2))
"""Thresholds tau of each set of options."""

SPLITS = (("train", 42), ("validation", 12), ("test", 18))
"""(topic, verb) pairs in each split: test questions combine known topics and verbs anew."""


@dataclass(frozen=True)
class PopulationSettings:
    """Sizes of the planted effects; the defaults lie in the band of real polls."""

    party: float = 1.18
    """Size of party on ideology."""
    age: float = 1.10
    """Size of age, mostly on the second trait."""
    education: float = 0.80
    """Size of education, mostly on the second trait."""
    region: float = 0.75
    """Size of region on the third trait."""
    spread: float = 0.8
    """Standard deviation sigma of persons around their group, on every trait."""
    offsets: float = 1.2
    """Standard deviation of the questions' offsets b: how far people are from evenly split."""
    seed: int = 2024
    """Seed of offsets and splits; the survey is one fixed truth, whatever the seed of training."""


class Population:
    """Exact answers of every group, intersection and author population of the planted survey."""

    def __init__(self, settings: PopulationSettings):
        self.settings = settings
        draws = np.random.default_rng(settings.seed)
        pairs = [(t, v) for t in TOPICS for v in VERBS]
        labels = [name for name, count in SPLITS for _ in range(count)]
        split = dict(zip(pairs, draws.permutation(labels), strict=True))
        of_pair = dict(zip(pairs, draws.normal(0, settings.offsets, len(pairs)), strict=True))
        self.questions = tuple(
            Question(
                key=f"{verb} {topic} {len(options)}",
                text=f"should we {verb} {topic} ?",
                options=options,
                ordinal=tuple(float(k + 1) for k in range(len(options))),
                topic=topic,
                verb=verb,
                split=str(split[topic, verb]),
            )
            for topic, verb in pairs
            for options in OPTION_SETS
        )
        self.offset = np.array([of_pair[q.topic, q.verb] for q in self.questions])
        loadings = [np.multiply(VERBS[q.verb], TOPICS[q.topic]) for q in self.questions]
        self.loading = np.array(loadings)

    @cached_property
    def effects(self) -> dict[str, np.ndarray]:
        """E: mean trait of each value of each attribute, [values, 3]; its mean is zero."""
        s = self.settings
        step = np.array([-1.0, 0.0, 1.0])
        planted = {
            "party": np.outer(step, [s.party, 0, 0]),
            "age": np.outer(step, [0.35 * s.age, -0.8 * s.age, 0]),
            "education": np.outer(step, [-0.3 * s.education, s.education, 0]),
            "region": np.outer(step, [0, 0, s.region]),
            "hand": np.zeros((2, 3)),
        }
        return {a: e - np.array(SHARES[a]) @ e for a, e in planted.items()}

    @cached_property
    def cells(self) -> np.ndarray:
        """Mean trait of every combination of values, [3, 3, 3, 3, 2, 3]; traits are last."""
        theta = np.zeros((*map(len, ATTRIBUTES.values()), 3))
        for axis, effect in enumerate(self.effects.values()):
            shape = [1] * len(ATTRIBUTES)
            shape[axis] = len(effect)
            theta = theta + effect.reshape(*shape, 3)
        return theta

    @cached_property
    def cell_answers(self) -> np.ndarray:
        """Answers of every combination of values, [3, 3, 3, 3, 2, questions, options]."""
        answers = self.integrate(self.cells.reshape(-1, 3))
        return answers.reshape(*self.cells.shape[:-1], *answers.shape[1:])

    def integrate(self, theta: np.ndarray) -> np.ndarray:
        """E_z P(y = k | theta + z) for mean traits [n, 3], as [n, questions, options]."""
        nodes, weights = np.polynomial.hermite_e.hermegauss(31)
        scale = self.settings.spread * np.linalg.norm(self.loading, axis=1)
        support = (theta @ self.loading.T + self.offset)[..., None] + scale[:, None] * nodes
        return self.grade(support) @ (weights / weights.sum())

    def grade(self, support: np.ndarray) -> np.ndarray:
        """P(y = k) at a support of [..., questions, nodes], as [..., questions, options, nodes]."""
        width = max(map(len, OPTION_SETS))
        at_least = np.zeros((*support.shape[:-1], width + 1, support.shape[-1]))
        at_least[..., 0, :] = 1.0
        for q, question in enumerate(self.questions):
            taus = np.array(THRESHOLDS[question.n_options - 2])
            at_least[..., q, 1 : question.n_options, :] = 1 / (
                1 + np.exp(taus[:, None] - support[..., q, None, :])
            )
        return at_least[..., :-1, :] - at_least[..., 1:, :]

    @cached_property
    def table(self) -> np.ndarray:
        """Answers given any subset of attributes, [4, 4, 4, 4, 3, questions, options].

        An axis' last index is unstated: weighted by the population's shares.
        """
        answers = self.cell_answers
        for axis, share in enumerate(SHARES.values()):
            mixed = np.tensordot(share, answers, axes=(0, axis))
            answers = np.concatenate([answers, np.expand_dims(mixed, axis)], axis)
        return answers

    @cached_property
    def web(self) -> np.ndarray:
        """Answers of the authors of text that states no attribute, [questions, options]."""
        answers = self.cell_answers
        for share in WEB_SHARES.values():
            answers = np.tensordot(share, answers, axes=(0, 0))
        return answers

    def answers_given(self, stated: dict[str, str]) -> np.ndarray:
        """Answers of people with the values {attribute: value}, [questions, options]."""
        return self.table[self.index(stated)]

    @staticmethod
    def index(stated: dict[str, str]) -> tuple[int, ...]:
        """Index into `table` of a set of stated values."""
        return tuple(v.index(stated[a]) if a in stated else len(v) for a, v in ATTRIBUTES.items())

    def trait(self, stated: dict[str, str]) -> np.ndarray:
        """Mean planted trait of people with the stated values."""
        theta = self.cells
        for attribute, values in ATTRIBUTES.items():
            share = np.array(SHARES[attribute])
            if attribute in stated:
                share = np.array([float(v == stated[attribute]) for v in values])
            theta = np.tensordot(share, theta, axes=(0, 0))
        return theta

    def survey(self, *attributes: str) -> Survey:
        """The survey by group; of every attribute, or of intersections of the given ones."""
        if attributes:
            stated = [{}]
            for a in attributes:
                stated = [{**s, a: value} for s in stated for value in ATTRIBUTES[a]]
        else:
            stated = [{a: value} for a, values in ATTRIBUTES.items() for value in values]
        return Survey(
            questions=self.questions,
            groups=tuple(Group("|".join(s), "|".join(s.values()), self.share(s)) for s in stated),
            distributions=np.stack([self.answers_given(s) for s in stated]),
            overall=self.answers_given({}),
            web=self.web,
            traits=np.stack([self.trait(s) for s in stated]),
        )

    @staticmethod
    def share(stated: dict[str, str]) -> float:
        """Population share of the persons with the stated values."""
        return float(np.prod([SHARES[a][ATTRIBUTES[a].index(v)] for a, v in stated.items()]))
