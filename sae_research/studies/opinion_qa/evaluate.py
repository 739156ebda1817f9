"""What a method achieves (section 5): fit, the group part apart from the population part, sparsity and meaning.

Distributions are arrays of [groups, questions, options]; several seeds add a leading axis.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sae_research.surveys.survey import Survey, divergence, group_part


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
        population=float(
            exam.distance(*(np.tensordot(weights, p, 1) for p in (predicted, truth))).mean()
        ),
        rho_dev=float(np.nan_to_num(part.rho)) / exam.reliability**0.5,
        slope=part.slope,
        swap=float(swap.mean()),
        swapped_groups=float((swap[differs] > 1e-9).mean()) if differs.any() else float("nan"),
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


def identification(exam: Exam, predicted: np.ndarray) -> tuple[float, float]:
    """Share of cells in which the nearest sibling is the group itself, and chance; only cells that are well apart."""
    hits, clear, chance = identified(exam, predicted).sum(0)
    return (float(hits / clear), float(chance / clear)) if clear else (float("nan"), float("nan"))


def identified(exam: Exam, predicted: np.ndarray, least: float = 0.02) -> np.ndarray:
    """By question: groups that are their own nearest sibling, groups at least `least` apart from theirs, and chance."""
    found = np.zeros((predicted.shape[1], 3))
    for group in exam.siblings():
        apart = exam.distance(exam.truth[group][:, None], exam.truth[group][None])
        apart[np.arange(len(group)), np.arange(len(group))] = np.inf
        clear = apart.min(1) >= least
        nearest = exam.distance(predicted[group][:, None], exam.truth[group][None]).argmin(1)
        own = nearest == np.arange(len(group))[:, None]
        found += np.stack([(own & clear).sum(0), clear.sum(0), clear.sum(0) / len(group)], -1)
    return found


def _between(p: np.ndarray, weights: np.ndarray) -> float:
    return float((weights[:, None, None] * (p - np.tensordot(weights, p, 1)) ** 2).sum())


def _entropy(p: np.ndarray) -> np.ndarray:
    return -(p * np.log(np.maximum(p, 1e-12))).sum(-1)


def off_target(
    exam: Exam, predicted: np.ndarray, calibrated: np.ndarray, share: float = 1 / 3
) -> np.ndarray:
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
    return (
        exam.distance(predicted, exam.truth) - exam.distance(calibrated[None], exam.truth)
    ).mean(1)


def canonical_correlations(
    scores_: np.ndarray, traits: np.ndarray, weights: np.ndarray
) -> np.ndarray:
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
    found = [
        canonical_correlations(scores_, traits[order.permutation(len(traits))], weights)
        for _ in range(draws)
    ]
    return np.mean(found, axis=0)


def consistency(exam: Exam, answers: np.ndarray, topics: Sequence[str]) -> float:
    """C_m of OpinionQA: share of topics whose best-aligned group is the overall best-aligned one, mean over attributes.

    `answers` is one distribution a question, [questions, options].
    """
    wd, topics = exam.distance(answers[None], exam.truth), np.asarray(topics)
    found = []
    for group in exam.siblings():
        best = wd[group].mean(1).argmin()
        found.append(
            np.mean([wd[group][:, topics == t].mean(1).argmin() == best for t in np.unique(topics)])
        )
    return float(np.mean(found))


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """Shared over united members of two sets given as masks."""
    union = (first | second).sum()
    return float((first & second).sum() / union) if union else 1.0
