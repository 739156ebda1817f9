"""What a method achieves (section 5): fit, the group part apart from the population part, sparsity.

Distributions are arrays [groups, questions, options]; several seeds add a leading axis.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sae_research.errors import ResearchError
from sae_research.surveys.selection import select_questions
from sae_research.surveys.survey import (
    Survey,
    divergence,
    reliability,
    sampling_noise,
    score_groups,
)


@dataclass(frozen=True)
class EvalSet:
    """The questions that methods are judged on, with the answers of the groups."""

    survey: Survey
    """The truth: exact distributions, or the counts of a poll."""
    questions: np.ndarray
    """Indices of the questions."""
    reliability: float = 1.0
    """Split-half reliability of the groups' deviations; 1 for exact distributions."""
    noise: float = 0.0
    """WD that sampling alone leaves between a group's poll and a second one; 0 if exact."""
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


def make_eval_set(truth: Survey, clusters: Sequence[str]) -> EvalSet:
    """The test questions; of a poll, with what its sampling noise does to scores."""
    rows = truth.rows("test")
    if truth.counts is None:
        return EvalSet(truth, rows, families=tuple(clusters))
    test = select_questions(truth, rows)
    known = reliability(test, 0)
    if not known > 0:
        raise ResearchError(
            "the groups of this survey differ no more than two halves of one group do (split-half "
            f"reliability {known:.2f}): nothing could be said of following groups; use more "
            "respondents or other groups."
        )
    return EvalSet(truth, rows, known, sampling_noise(test, 0), tuple(clusters))


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
    """Correlation of predicted with true deviations, free of noise; 0 if none is predicted."""
    slope: float
    """Slope of predicted on true deviations: 1 is calibrated, above caricature, below flat."""
    swap: float
    """Mean WD(P_sibling, pi_g) - WD(P_g, pi_g): positive where shifts are specific to groups."""
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


def compute_scores(eval_set: EvalSet, predicted: np.ndarray, unsteered: np.ndarray) -> Scores:
    """Judge predicted distributions."""
    truth, weights = eval_set.truth, eval_set.survey.weights
    wd, before = eval_set.distance(predicted, truth), eval_set.distance(unsteered, truth)
    part = score_groups(predicted, truth, weights, eval_set.mask)
    swap, differs = compute_swap_test(eval_set, predicted)
    hits, clear, chance = identify_groups(eval_set, predicted).sum(0)
    middle = (predicted + truth) / 2
    return Scores(
        wd=float(wd.mean()),
        kl=float(divergence(truth, predicted).mean()),
        js=float((divergence(truth, middle) + divergence(predicted, middle)).mean() / 2),
        worst=float(wd.mean(1).max()),
        spread=float(wd.mean(1).std()),
        improved=float((wd.mean(1) < before.mean(1)).mean()),
        population=float(
            eval_set.distance(*(np.tensordot(weights, p, 1) for p in (predicted, truth))).mean()
        ),
        rho_dev=float(np.nan_to_num(part.rho)) / eval_set.reliability**0.5,
        slope=part.slope,
        swap=float(swap.mean()),
        swapped_groups=float((swap[differs] > 1e-9).mean()) if differs.any() else float("nan"),
        identification=float(hits / clear) if clear else float("nan"),
        chance=float(chance / clear) if clear else float("nan"),
        variance_ratio=float(_between(predicted, weights) / _between(truth, weights)),
        entropy_ratio=float(_entropy(predicted).mean() / _entropy(truth).mean()),
        skill=float(1 - (wd.mean() - eval_set.noise) / (before.mean() - eval_set.noise)),
    )


def _compare_siblings(
    eval_set: EvalSet, predicted: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of each attribute: its groups, WD(P_g, pi_h) and WD(pi_g, pi_h), both [g, h, questions].

    The latter is infinite from a group to itself.
    """
    for group in eval_set.siblings():
        truth = eval_set.truth[group]
        cross = eval_set.distance(predicted[group][:, None], truth[None])
        apart = eval_set.distance(truth[:, None], truth[None])
        apart[np.arange(len(group)), np.arange(len(group))] = np.inf
        yield group, cross, apart


def compute_swap_test(
    eval_set: EvalSet, predicted: np.ndarray, least: float = 0.005
) -> tuple[np.ndarray, np.ndarray]:
    """S_g = mean over questions and siblings h of WD(P_h, pi_g) - WD(P_g, pi_g), one a group.

    And which groups lie at least `least` from their nearest sibling: a negative control has nothing
    to swap.
    """
    swap = np.zeros(len(predicted))
    differs = np.zeros(len(predicted), dtype=bool)
    for group, cross, apart in _compare_siblings(eval_set, predicted):
        mean = cross.mean(-1)
        own = np.diag(mean)
        swap[group] = (mean.sum(0) - own) / (len(group) - 1) - own
        differs[group] = apart.mean(-1).min(1) >= least
    return swap, differs


def identify_groups(eval_set: EvalSet, predicted: np.ndarray, least: float = 0.02) -> np.ndarray:
    """Groups that are their own nearest sibling, at least `least` apart, and found by chance.

    They are counted by question, [questions, 3].
    """
    found = np.zeros((predicted.shape[1], 3))
    for group, cross, apart in _compare_siblings(eval_set, predicted):
        clear = apart.min(1) >= least
        own = cross.argmin(1) == np.arange(len(group))[:, None]
        found += np.stack([(own & clear).sum(0), clear.sum(0), clear.sum(0) / len(group)], -1)
    return found


def _between(p: np.ndarray, weights: np.ndarray) -> float:
    return float((weights[:, None, None] * (p - np.tensordot(weights, p, 1)) ** 2).sum())


def _entropy(p: np.ndarray) -> np.ndarray:
    return -(p * np.log(np.maximum(p, 1e-12))).sum(-1)


def off_target(
    eval_set: EvalSet, predicted: np.ndarray, calibrated: np.ndarray, share: float = 1 / 3
) -> np.ndarray:
    """O[g, h]: change in WD to h when g's shift replaces calibration, where g least differs."""
    truth = eval_set.truth
    found = np.zeros((len(predicted), len(predicted)))
    mean = np.tensordot(eval_set.survey.weights, truth, 1)
    before = eval_set.distance(calibrated[None], truth)
    for g, steered in enumerate(predicted):
        away = eval_set.distance(truth[g], mean)
        calm = np.argsort(away)[: max(1, round(share * len(away)))]
        change = eval_set.distance(steered[None], truth) - before
        found[g] = change[:, calm].mean(1)
    return found


def on_target(eval_set: EvalSet, predicted: np.ndarray, calibrated: np.ndarray) -> np.ndarray:
    """Change in WD to its own group when each shift replaces calibration, [groups, questions]."""
    before = eval_set.distance(calibrated[None], eval_set.truth)
    return eval_set.distance(predicted, eval_set.truth) - before


def canonical_correlations(
    scores: np.ndarray, traits: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Canonical correlations of the scores c_g with planted mean traits, largest first."""
    root = np.sqrt(weights / weights.sum())[:, None]
    bases = []
    for table in (scores, traits):
        centred = root * (table - np.average(table, axis=0, weights=weights))
        left, values, _ = np.linalg.svd(centred, full_matrices=False)
        bases.append(left[:, values > 1e-8 * max(values[0], 1e-12)])
    return np.linalg.svd(bases[0].T @ bases[1], compute_uv=False).clip(0, 1)


def chance_correlations(
    scores: np.ndarray, traits: np.ndarray, weights: np.ndarray, seed: int, draws: int = 500
) -> np.ndarray:
    """Their mean when traits go to random groups: few groups make even chance look large."""
    order = np.random.default_rng(seed)
    found = [
        canonical_correlations(scores, traits[order.permutation(len(traits))], weights)
        for _ in range(draws)
    ]
    return np.mean(found, axis=0)


def consistency(eval_set: EvalSet, answers: np.ndarray, topics: Sequence[str]) -> float:
    """C_m of OpinionQA for `answers` [questions, options]: mean over attributes of the share of
    topics whose best-aligned group is the overall best-aligned one.
    """
    wd = eval_set.distance(answers[None], eval_set.truth)
    topics = np.asarray(topics)
    found = []
    for group in eval_set.siblings():
        best = wd[group].mean(1).argmin()
        found.append(
            np.mean([wd[group][:, topics == t].mean(1).argmin() == best for t in np.unique(topics)])
        )
    return float(np.mean(found))
