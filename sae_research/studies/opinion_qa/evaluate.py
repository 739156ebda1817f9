"""What a method achieves (section 5): fit, the group part apart from the population part, sparsity and meaning.

Distributions are arrays of [groups, questions, options]; several seeds add a leading axis.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sae_research.errors import ResearchError
from sae_research.stats import Interval
from sae_research.survey import Survey, deviations, divergence, group_part

_DRAWS = 2000


@dataclass(frozen=True)
class Exam:
    """The questions that methods are judged on, with the answers of the groups."""

    survey: Survey
    """The truth: exact distributions, or the counts of a poll."""
    questions: np.ndarray
    """Indices of the questions."""
    reliability: float = 1.0
    """Split-half reliability of the groups' deviations; 1 for exact distributions."""
    noise: float = 0.0
    """WD that sampling alone leaves between a group's poll and a second one; 0 for exact distributions."""
    families: tuple[str, ...] = ()
    """Family of near-duplicates of every question of the survey; empty where each stands alone."""

    @property
    def truth(self) -> np.ndarray:
        """pi, [groups, questions, options]."""
        return self.survey.distributions[:, self.questions]

    @property
    def mask(self) -> np.ndarray:
        """Which options exist."""
        return self.survey.mask[self.questions]

    @property
    def clusters(self) -> np.ndarray:
        """Number of the cluster of each question: near-duplicates are resampled together."""
        keys = [self.families[i] if self.families else i for i in self.questions]
        order = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        return np.array([order[key] for key in keys])

    def distance(self, p: np.ndarray, q: np.ndarray) -> np.ndarray:
        """WD of ordinal questions, total variation of nominal ones, [..., questions]."""
        return self.survey.distance(p, q, self.questions)

    def siblings(self) -> list[np.ndarray]:
        """Groups of each attribute."""
        return [self.survey.of(a) for a in dict.fromkeys(g.attribute for g in self.survey.groups)]


@dataclass(frozen=True)
class Scores:
    """Every number of sections 5.1 and 5.2 for one method."""

    wd: float
    """Mean distance to the groups' answers; 1 - WD is the representativeness of OpinionQA."""
    kl: float
    """Mean KL(pi || P)."""
    js: float
    """Mean Jensen-Shannon divergence."""
    worst: float
    """WD of the worst group."""
    spread: float
    """Standard deviation of WD over groups."""
    improved: float
    """Share of groups closer than without steering."""
    population: float
    """WD(Pbar, pibar): the population part of the error."""
    rho_dev: float
    """Correlation of predicted with true deviations from the population, free of noise; 0 if none is predicted."""
    slope: float
    """Slope of predicted on true deviations: 1 is calibrated, above caricature, below flattening."""
    swap: float
    """Mean WD(P_sibling, pi_g) - WD(P_g, pi_g): positive where shifts are specific to their group."""
    swapped_groups: float
    """Share of groups with a positive swap test, among those that differ from their siblings."""
    identification: float
    """Share of cells whose nearest sibling's answers are the group's own, where siblings differ."""
    chance: float
    """What identification would be by chance."""
    variance_ratio: float
    """Variance between groups, predicted over true."""
    entropy_ratio: float
    """Mean entropy, predicted over true: below 1 the model collapses to modes."""
    skill: float
    """1 - (WD - noise) / (WD_unsteered - noise)."""


def scores(exam: Exam, predicted: np.ndarray, unsteered: np.ndarray) -> Scores:
    """Judge predicted distributions."""
    truth, weights = exam.truth, exam.survey.weights
    wd, before = exam.distance(predicted, truth), exam.distance(unsteered, truth)
    part = group_part(predicted, truth, weights, exam.mask)
    swap = swap_test(exam, predicted)
    differs = groups_that_differ(exam)
    accuracy, chance = identification(exam, predicted)
    middle = (predicted + truth) / 2
    return Scores(
        wd=float(wd.mean()),
        kl=float(divergence(truth, predicted).mean()),
        js=float((divergence(truth, middle) + divergence(predicted, middle)).mean() / 2),
        worst=float(wd.mean(1).max()),
        spread=float(wd.mean(1).std()),
        improved=float((wd.mean(1) < before.mean(1)).mean()),
        population=float(exam.distance(*(np.tensordot(weights, p, 1) for p in (predicted, truth))).mean()),
        rho_dev=float(np.nan_to_num(part.rho)) / exam.reliability**0.5,
        slope=part.slope,
        swap=float(swap.mean()),
        swapped_groups=float((swap[differs] > 0).mean()) if differs.any() else float("nan"),
        identification=accuracy,
        chance=chance,
        variance_ratio=float(_between(predicted, weights) / _between(truth, weights)),
        entropy_ratio=float(_entropy(predicted).mean() / _entropy(truth).mean()),
        skill=float(1 - (wd.mean() - exam.noise) / (before.mean() - exam.noise)),
    )


def swap_test(exam: Exam, predicted: np.ndarray) -> np.ndarray:
    """S_g = mean over questions and siblings g' of WD(P_g', pi_g) - WD(P_g, pi_g), one number a group."""
    found = np.zeros(len(predicted))
    for group in exam.siblings():
        cross = exam.distance(predicted[group][:, None], exam.truth[group][None]).mean(-1)
        own = np.diag(cross)
        found[group] = (cross.sum(0) - own) / (len(group) - 1) - own
    return found


def groups_that_differ(exam: Exam, least: float = 0.005) -> np.ndarray:
    """Which groups lie at least `least` from their nearest sibling; a negative control has nothing to swap."""
    found = np.zeros(len(exam.survey.groups), dtype=bool)
    for group in exam.siblings():
        apart = exam.distance(exam.truth[group][:, None], exam.truth[group][None]).mean(-1)
        np.fill_diagonal(apart, np.inf)
        found[group] = apart.min(1) >= least
    return found


def identification(exam: Exam, predicted: np.ndarray, least: float = 0.02) -> tuple[float, float]:
    """Share of cells in which the nearest sibling is the group itself, and chance; only cells apart by `least`."""
    hits, chances = [], []
    for group in exam.siblings():
        apart = exam.distance(exam.truth[group][:, None], exam.truth[group][None])
        apart[np.arange(len(group)), np.arange(len(group))] = np.inf
        clear = apart.min(1) >= least
        nearest = exam.distance(predicted[group][:, None], exam.truth[group][None]).argmin(1)
        hits += (nearest == np.arange(len(group))[:, None])[clear].tolist()
        chances += [1 / len(group)] * int(clear.sum())
    return (float(np.mean(hits)), float(np.mean(chances))) if hits else (float("nan"), float("nan"))


def _between(p: np.ndarray, weights: np.ndarray) -> float:
    return float((weights[:, None, None] * (p - np.tensordot(weights, p, 1)) ** 2).sum())


def _entropy(p: np.ndarray) -> np.ndarray:
    return -(p * np.log(np.maximum(p, 1e-12))).sum(-1)


def resampled(
    statistic: Callable[[np.ndarray], np.ndarray], sums: np.ndarray, clusters: np.ndarray, seed: int
) -> Interval:
    """Percentile interval of `statistic` of sums over questions, resampling question clusters and training seeds.

    `sums` is [seeds, questions, columns]; `statistic` takes [..., columns] of totals.
    """
    names = np.unique(clusters)
    if len(names) < 2:
        raise ResearchError("an interval over questions needs at least two clusters of questions.")
    table = np.stack([sums[:, clusters == name].sum(1) for name in names], 1)
    draws = np.random.default_rng(seed)
    runs = draws.multinomial(len(table), np.full(len(table), 1 / len(table)), _DRAWS)
    picks = draws.multinomial(len(names), np.full(len(names), 1 / len(names)), _DRAWS)
    drawn = statistic(np.einsum("ds,dc,sck->dk", runs, picks, table, optimize=True))
    low, high = np.quantile(drawn[np.isfinite(drawn)], [0.025, 0.975])
    value = float(statistic(table.sum((0, 1))))
    return Interval(value, min(value, float(low)), max(value, float(high)), len(names))


def wd_interval(exam: Exam, predicted: np.ndarray, seed: int, less: np.ndarray | None = None) -> Interval:
    """Mean WD of [seeds, groups, questions, options]; with `less`, the paired difference to another method's."""
    wd = exam.distance(predicted, exam.truth).mean(1)
    if less is not None:
        wd = wd - exam.distance(less, exam.truth).mean(1)
    return resampled(lambda s: s[..., 0] / s[..., 1], np.stack([wd, np.ones_like(wd)], -1), exam.clusters, seed)


def wd_ratio(exam: Exam, predicted: np.ndarray, other: np.ndarray, seed: int) -> Interval:
    """Mean WD of one method over that of another, both [seeds, groups, questions, options], on the same questions."""
    table = np.stack([exam.distance(p, exam.truth).mean(1) for p in (predicted, other)], -1)
    return resampled(lambda s: s[..., 0] / np.maximum(s[..., 1], 1e-12), table, exam.clusters, seed)


def rho_interval(exam: Exam, predicted: np.ndarray, seed: int, less: np.ndarray | None = None) -> Interval:
    """rho_dev of [seeds, groups, questions, options]; with `less`, the paired difference to another method's."""
    first = _products(exam, predicted)
    if less is None:
        return resampled(lambda s: _rho(s) / exam.reliability**0.5, first, exam.clusters, seed)
    second = _products(exam, less)
    width = first.shape[-1]
    return resampled(
        lambda s: (_rho(s[..., :width]) - _rho(s[..., width:])) / exam.reliability**0.5,
        np.concatenate([first, second], -1),
        exam.clusters,
        seed,
    )


def _products(exam: Exam, predicted: np.ndarray) -> np.ndarray:
    """What a correlation of deviations needs, summed over groups and options, [seeds, questions, 6]."""
    weights, mask = exam.survey.weights, exam.mask
    b = deviations(exam.truth, weights) * mask
    found = []
    for one in predicted:
        a = deviations(one, weights) * mask
        found.append(np.stack([(x * mask).sum((0, 2)) for x in (np.ones_like(a), a, b, a * a, b * b, a * b)], -1))
    return np.stack(found)


def _rho(s: np.ndarray) -> np.ndarray:
    n, a, b, aa, bb, ab = np.moveaxis(s, -1, 0)
    scale = np.maximum(aa - a * a / n, 0) * np.maximum(bb - b * b / n, 0)
    return np.where(scale > 1e-12, (ab - a * b / n) / np.sqrt(np.maximum(scale, 1e-12)), 0.0)


def off_target(exam: Exam, predicted: np.ndarray, calibrated: np.ndarray, share: float = 1 / 3) -> np.ndarray:
    """O[g, h]: change in WD to group h when g's shift replaces calibration, on the questions where g least differs."""
    truth, found = exam.truth, np.zeros((len(predicted), len(predicted)))
    mean = np.tensordot(exam.survey.weights, truth, 1)
    for g, steered in enumerate(predicted):
        away = exam.distance(truth[g], mean)
        calm = np.argsort(away)[: max(1, round(share * len(away)))]
        change = exam.distance(steered[None], truth) - exam.distance(calibrated[None], truth)
        found[g] = change[:, calm].mean(1)
    return found


def on_target(exam: Exam, predicted: np.ndarray, calibrated: np.ndarray) -> np.ndarray:
    """Change in WD to its own group when each shift replaces calibration, on all questions."""
    return (exam.distance(predicted, exam.truth) - exam.distance(calibrated[None], exam.truth)).mean(1)


def canonical_correlations(scores_: np.ndarray, traits: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Canonical correlations of the groups' scores c_g with their planted mean traits, largest first."""
    root = np.sqrt(weights / weights.sum())[:, None]
    bases = []
    for table in (scores_, traits):
        centred = root * (table - np.average(table, axis=0, weights=weights))
        left, values, _ = np.linalg.svd(centred, full_matrices=False)
        bases.append(left[:, values > 1e-8 * max(values[0], 1e-12)])
    return np.linalg.svd(bases[0].T @ bases[1], compute_uv=False).clip(0, 1)


def chance_correlations(
    scores_: np.ndarray, traits: np.ndarray, weights: np.ndarray, seed: int, draws: int = 500
) -> np.ndarray:
    """Mean canonical correlations when traits go to random groups: few groups make even chance look large."""
    order = np.random.default_rng(seed)
    found = [canonical_correlations(scores_, traits[order.permutation(len(traits))], weights) for _ in range(draws)]
    return np.mean(found, axis=0)


def consistency(exam: Exam, answers: np.ndarray, topics: Sequence[str]) -> float:
    """C_m of OpinionQA: share of topics whose best-aligned group is the overall best-aligned one, mean over attributes.

    `answers` is one distribution a question, [questions, options].
    """
    wd, topics = exam.distance(answers[None], exam.truth), np.asarray(topics)
    found = []
    for group in exam.siblings():
        best = wd[group].mean(1).argmin()
        found.append(np.mean([wd[group][:, topics == t].mean(1).argmin() == best for t in np.unique(topics)]))
    return float(np.mean(found))


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """Shared over united members of two sets given as masks."""
    union = (first | second).sum()
    return float((first & second).sum() / union) if union else 1.0
