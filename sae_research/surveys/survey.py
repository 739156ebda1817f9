"""One schema for surveys, planted or real, and statistics that compare groups' answers.

Options are kept in ascending order of their ordinal value. Questions with fewer options than
the longest are padded with zero probability, so that every statistic is one array expression
over [..., questions, options].
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from sae_research.errors import ResearchError

OVERALL = "Overall"


@dataclass(frozen=True)
class Question:
    """One item of a survey."""

    key: str
    """Name that is unique in its survey."""
    text: str
    """The wording that respondents and models read."""
    options: tuple[str, ...]
    """Answer options in ascending order of their ordinal value, without refusal."""
    ordinal: tuple[float, ...]
    """Value of each option on the item's scale, ascending."""
    topic: str = ""
    """What the item is about; empty where the source does not say."""
    verb: str = ""
    """What the item proposes to do about its topic; planted surveys only."""
    split: str = ""
    """`train`, `validation` or `test`; empty where the study has still to choose."""
    ordered: bool = True
    """Whether the options form a scale; answers to nominal questions differ by total variation."""

    @property
    def n_options(self) -> int:
        """Number of options."""
        return len(self.options)


@dataclass(frozen=True)
class Group:
    """Respondents who share one value of an attribute, or of several for an intersection."""

    attribute: str
    """The attribute; several are joined by `|`."""
    name: str
    """The value; several are joined by `|`."""
    share: float
    """Share of the group among all respondents of its attribute."""


@dataclass(frozen=True)
class Survey:
    """How each group answers each question, with the planted truth where there is one."""

    questions: tuple[Question, ...]
    """The items, in the order of the arrays."""
    groups: tuple[Group, ...]
    """The groups, in the order of the arrays."""
    distributions: np.ndarray
    """Answers of each group, [groups, questions, options], zero beyond the last option."""
    overall: np.ndarray
    """Answer distribution of the whole population, [questions, options]."""
    counts: np.ndarray | None = None
    """Respondents per answer, like `distributions`; None where distributions are exact."""
    web: np.ndarray | None = None
    """Answers of the population that writes text, [questions, options]; planted surveys only."""
    traits: np.ndarray | None = None
    """Planted mean trait of each group, [groups, dimensions]; planted surveys only."""

    @cached_property
    def mask(self) -> np.ndarray:
        """Which options exist, [questions, options]."""
        n_options = np.array([q.n_options for q in self.questions])
        return np.arange(self.overall.shape[-1]) < n_options[:, None]

    @cached_property
    def gaps(self) -> np.ndarray:
        """Distance between neighbouring options, share of the range, [questions, options - 1]."""
        gaps = np.zeros((len(self.questions), self.overall.shape[-1] - 1))
        for row, question in zip(gaps, self.questions, strict=True):
            row[: question.n_options - 1] = ordinal_gaps(question.ordinal)
        return gaps

    @cached_property
    def weights(self) -> np.ndarray:
        """Weight of each group when every attribute counts the same; sums to one."""
        share = np.array([g.share for g in self.groups])
        return share / share.sum()

    @property
    def uniform(self) -> np.ndarray:
        """Every option of a question equally likely."""
        return self.mask / self.mask.sum(-1, keepdims=True)

    def of(self, attribute: str) -> np.ndarray:
        """Indices of the groups of `attribute`."""
        return np.array([i for i, g in enumerate(self.groups) if g.attribute == attribute])

    def rows(self, split: str) -> np.ndarray:
        """Indices of the questions of `split`."""
        return np.array([i for i, q in enumerate(self.questions) if q.split == split])

    def distance(
        self, p: np.ndarray, q: np.ndarray, questions: np.ndarray | slice = slice(None)
    ) -> np.ndarray:
        """WD of ordered questions, total variation of nominal ones; [..., questions, options]."""
        ordered = np.array([q.ordered for q in self.questions])[questions]
        return np.where(ordered, wasserstein(p, q, self.gaps[questions]), total_variation(p, q))

    def sampled(self, n: int | np.ndarray, seed: int) -> "Survey":
        """The same survey as a poll of `n` respondents per group (and question) would see it."""
        draws = np.random.default_rng(seed)
        sizes = np.broadcast_to(n, self.distributions.shape[:2])
        shares = self.distributions / self.distributions.sum(-1, keepdims=True)
        counts = draws.multinomial(sizes, shares)
        return replace(self, counts=counts, distributions=counts / counts.sum(-1, keepdims=True))

    def split(self, seed: int, similarity: float = 0.6) -> "Survey":
        """The same survey with its questions split into train, validation and test.

        Questions whose wordings are at least `similarity` alike (cosine of tf-idf) stay together.
        """
        from sae_research.surveys.splits import split_questions

        return split_questions(self, seed, similarity)


def ordinal_gaps(ordinal: tuple[float, ...]) -> np.ndarray:
    """(o[i+1] - o[i]) / (o_max - o_min) of ascending ordinal values."""
    values = np.asarray(ordinal, dtype=float)
    return np.diff(values) / (values[-1] - values[0])


def wasserstein(p: np.ndarray, q: np.ndarray, gaps: np.ndarray) -> np.ndarray:
    """WD = sum_i |F_p(i) - F_q(i)| (o[i+1] - o[i]) / (o_max - o_min), one per question."""
    return (np.abs(np.cumsum(p - q, axis=-1)[..., :-1]) * gaps).sum(-1)


def total_variation(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Half the summed absolute difference, for options without order; one per question."""
    return np.abs(p - q).sum(-1) / 2


def divergence(p: np.ndarray, q: np.ndarray, floor: float = 1e-12) -> np.ndarray:
    """KL(p || q) in nats; one number per question."""
    logs = np.log(np.maximum(p, floor)) - np.log(np.maximum(q, floor))
    return np.where(p > 0, p * logs, 0.0).sum(-1)


def logit(p: np.ndarray, floor: float = 1e-3) -> np.ndarray:
    """log p / (1 - p), with p kept `floor` away from 0 and 1."""
    p = np.clip(p, floor, 1 - floor)
    return np.log(p) - np.log1p(-p)


def deviations(distributions: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """logit P_gq - logit Pbar_q with Pbar_q = sum_g w_g P_gq, the population's view."""
    mean = np.tensordot(weights, distributions, axes=1)
    return logit(distributions) - logit(mean)


@dataclass(frozen=True)
class GroupScores:
    """How well predicted distributions follow the differences between groups."""

    rho: float
    """rho_dev: correlation of predicted with true deviations over groups, questions and options."""
    slope: float
    """beta_dev: slope of predicted on true deviations; 1 is calibrated, above is caricature."""
    by_group: np.ndarray
    """rho_dev within each group; nan where a group does not deviate."""


def score_groups(
    predicted: np.ndarray, true: np.ndarray, weights: np.ndarray, mask: np.ndarray
) -> GroupScores:
    """rho_dev and beta_dev of predicted distributions, [groups, questions, options]."""
    ours, truth = deviations(predicted, weights)[:, mask], deviations(true, weights)[:, mask]
    centred = truth - truth.mean()
    return GroupScores(
        rho=_correlation(ours.ravel(), truth.ravel()),
        slope=float((centred * ours).sum() / (centred**2).sum()),
        by_group=np.array([_correlation(a, b) for a, b in zip(ours, truth, strict=True)]),
    )


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a**2).sum() * (b**2).sum())
    return float((a * b).sum() / scale) if scale > 1e-9 else float("nan")


def halve_respondents(survey: Survey, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Distributions of two random halves of each group's respondents."""
    counts = _require_counts(survey)
    half = np.random.default_rng(seed).multivariate_hypergeometric
    first = np.array([[half(cell, cell.sum() // 2) for cell in group] for group in counts])
    first, second = (c / c.sum(-1, keepdims=True) for c in (first, counts - first))
    return first, second


def reliability(survey: Survey, seed: int) -> float:
    """Split-half reliability of the deviations: rho_dev / sqrt of it is free of noise."""
    halves = halve_respondents(survey, seed)
    a, b = (deviations(h, survey.weights)[:, survey.mask].ravel() for h in halves)
    r = _correlation(a, b)
    return 2 * r / (1 + r)


def sampling_noise(survey: Survey, seed: int) -> float:
    """Mean WD between each distribution and one redraw at its own number of respondents."""
    again = survey.sampled(_require_counts(survey).sum(-1), seed)
    return float(wasserstein(survey.distributions, again.distributions, survey.gaps).mean())


def _require_counts(survey: Survey) -> np.ndarray:
    if survey.counts is None:
        raise ResearchError(
            "this survey holds exact distributions without counts; "
            "draw a poll with `sampled` first."
        )
    return survey.counts
