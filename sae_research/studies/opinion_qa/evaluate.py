"""What a method achieves (section 5): fit, the group part apart from the population part, sparsity.

Distributions are arrays [groups, questions, options]; several seeds add a leading axis. Intervals
resample clusters of questions and training seeds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sae_research.errors import ResearchError
from sae_research.stats import Interval
from sae_research.surveys.survey import Survey, deviations, divergence, score_groups


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
    """WD that sampling alone leaves between a group's poll and a second one; 0 for exact
    distributions.
    """
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
    """Correlation of predicted with true deviations from the population, free of noise; 0 if none
    is predicted.
    """
    slope: float
    """Slope of predicted on true deviations: 1 is calibrated, above caricature, below
    flattening.
    """
    swap: float
    """Mean WD(P_sibling, pi_g) - WD(P_g, pi_g): positive where shifts are specific to their
    group.
    """
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
    swap = compute_swap_test(eval_set, predicted)
    differs = find_distinct_groups(eval_set)
    accuracy, chance = identification(eval_set, predicted)
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
        identification=accuracy,
        chance=chance,
        variance_ratio=float(_between(predicted, weights) / _between(truth, weights)),
        entropy_ratio=float(_entropy(predicted).mean() / _entropy(truth).mean()),
        skill=float(1 - (wd.mean() - eval_set.noise) / (before.mean() - eval_set.noise)),
    )


def compute_swap_test(eval_set: EvalSet, predicted: np.ndarray) -> np.ndarray:
    """S_g = mean over questions and siblings g' of WD(P_g', pi_g) - WD(P_g, pi_g), one number a
    group.
    """
    found = np.zeros(len(predicted))
    for group in eval_set.siblings():
        cross = eval_set.distance(predicted[group][:, None], eval_set.truth[group][None]).mean(-1)
        own = np.diag(cross)
        found[group] = (cross.sum(0) - own) / (len(group) - 1) - own
    return found


def find_distinct_groups(eval_set: EvalSet, least: float = 0.005) -> np.ndarray:
    """Which groups lie at least `least` from their nearest sibling; a negative control has nothing
    to swap.
    """
    found = np.zeros(len(eval_set.survey.groups), dtype=bool)
    for group in eval_set.siblings():
        apart = eval_set.distance(eval_set.truth[group][:, None], eval_set.truth[group][None]).mean(
            -1
        )
        np.fill_diagonal(apart, np.inf)
        found[group] = apart.min(1) >= least
    return found


def identification(eval_set: EvalSet, predicted: np.ndarray) -> tuple[float, float]:
    """Share of cells in which the nearest sibling is the group itself, and chance; only cells that
    are well apart.
    """
    hits, clear, chance = identified(eval_set, predicted).sum(0)
    return (float(hits / clear), float(chance / clear)) if clear else (float("nan"), float("nan"))


def identified(eval_set: EvalSet, predicted: np.ndarray, least: float = 0.02) -> np.ndarray:
    """By question: groups that are their own nearest sibling, groups at least `least` apart from
    theirs, and chance.
    """
    found = np.zeros((predicted.shape[1], 3))
    for group in eval_set.siblings():
        apart = eval_set.distance(eval_set.truth[group][:, None], eval_set.truth[group][None])
        apart[np.arange(len(group)), np.arange(len(group))] = np.inf
        clear = apart.min(1) >= least
        nearest = eval_set.distance(predicted[group][:, None], eval_set.truth[group][None]).argmin(
            1
        )
        own = nearest == np.arange(len(group))[:, None]
        found += np.stack([(own & clear).sum(0), clear.sum(0), clear.sum(0) / len(group)], -1)
    return found


def _between(p: np.ndarray, weights: np.ndarray) -> float:
    return float((weights[:, None, None] * (p - np.tensordot(weights, p, 1)) ** 2).sum())


def _entropy(p: np.ndarray) -> np.ndarray:
    return -(p * np.log(np.maximum(p, 1e-12))).sum(-1)


def off_target(
    eval_set: EvalSet, predicted: np.ndarray, calibrated: np.ndarray, share: float = 1 / 3
) -> np.ndarray:
    """O[g, h]: change in WD to group h when g's shift replaces calibration, on the questions where
    g least differs.
    """
    truth, found = eval_set.truth, np.zeros((len(predicted), len(predicted)))
    mean = np.tensordot(eval_set.survey.weights, truth, 1)
    for g, steered in enumerate(predicted):
        away = eval_set.distance(truth[g], mean)
        calm = np.argsort(away)[: max(1, round(share * len(away)))]
        change = eval_set.distance(steered[None], truth) - eval_set.distance(
            calibrated[None], truth
        )
        found[g] = change[:, calm].mean(1)
    return found


def on_target(eval_set: EvalSet, predicted: np.ndarray, calibrated: np.ndarray) -> np.ndarray:
    """Change in WD to its own group when each shift replaces calibration, on all questions."""
    return (
        eval_set.distance(predicted, eval_set.truth)
        - eval_set.distance(calibrated[None], eval_set.truth)
    ).mean(1)


def canonical_correlations(
    scores_: np.ndarray, traits: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Canonical correlations of the groups' scores c_g with their planted mean traits, largest
    first.
    """
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
    """Mean canonical correlations when traits go to random groups: few groups make even chance
    look large.
    """
    order = np.random.default_rng(seed)
    found = [
        canonical_correlations(scores_, traits[order.permutation(len(traits))], weights)
        for _ in range(draws)
    ]
    return np.mean(found, axis=0)


def consistency(eval_set: EvalSet, answers: np.ndarray, topics: Sequence[str]) -> float:
    """C_m of OpinionQA: share of topics whose best-aligned group is the overall best-aligned one,
    mean over attributes.

    `answers` is one distribution a question, [questions, options].
    """
    wd, topics = eval_set.distance(answers[None], eval_set.truth), np.asarray(topics)
    found = []
    for group in eval_set.siblings():
        best = wd[group].mean(1).argmin()
        found.append(
            np.mean([wd[group][:, topics == t].mean(1).argmin() == best for t in np.unique(topics)])
        )
    return float(np.mean(found))


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """Shared over united members of two sets given as masks."""
    union = (first | second).sum()
    return float((first & second).sum() / union) if union else 1.0


# intervals

_DRAWS = 2000


def resample_clusters(
    statistic: Callable[[np.ndarray], np.ndarray], sums: np.ndarray, clusters: np.ndarray, seed: int
) -> Interval:
    """Percentile interval of `statistic` of sums over questions, resampling question clusters and
    training seeds.

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


def wd_interval(
    eval_set: EvalSet, predicted: np.ndarray, seed: int, minus: np.ndarray | None = None
) -> Interval:
    """Mean WD of [seeds, groups, questions, options]; with `minus`, the paired difference to
    another method's.
    """
    gap = eval_set.distance(predicted, eval_set.truth).mean(1)
    if minus is not None:
        gap = gap - eval_set.distance(minus, eval_set.truth).mean(1)
    return resample_clusters(
        lambda s: s[..., 0] / s[..., 1],
        np.stack([gap, np.ones_like(gap)], -1),
        eval_set.clusters,
        seed,
    )


def wd_ratio_interval(
    eval_set: EvalSet, predicted: np.ndarray, other: np.ndarray, seed: int
) -> Interval:
    """Mean WD of one method over that of another, both [seeds, groups, questions, options], on the
    same questions.
    """
    table = np.stack([eval_set.distance(p, eval_set.truth).mean(1) for p in (predicted, other)], -1)
    return resample_clusters(
        lambda s: s[..., 0] / np.maximum(s[..., 1], 1e-12), table, eval_set.clusters, seed
    )


def kl_interval(
    eval_set: EvalSet, predicted: np.ndarray, seed: int, minus: np.ndarray | None = None
) -> Interval:
    """Mean KL(pi || P) of [seeds, groups, questions, options]; with `minus`, the paired difference
    to another one's.
    """
    gap = divergence(eval_set.truth, predicted).mean(1)
    if minus is not None:
        gap = gap - divergence(eval_set.truth, minus).mean(1)
    return resample_clusters(
        lambda s: s[..., 0] / s[..., 1],
        np.stack([gap, np.ones_like(gap)], -1),
        eval_set.clusters,
        seed,
    )


def slope_interval(eval_set: EvalSet, predicted: np.ndarray, seed: int) -> Interval:
    """beta_dev: slope of predicted on true deviations."""

    def regressed(s: np.ndarray) -> np.ndarray:
        n, a, b, _, bb, ab = np.moveaxis(s, -1, 0)
        return (ab - a * b / n) / np.maximum(bb - b * b / n, 1e-12)

    return resample_clusters(regressed, _products(eval_set, predicted), eval_set.clusters, seed)


def identification_interval(eval_set: EvalSet, predicted: np.ndarray, seed: int) -> Interval:
    """Share of cells in which the nearest sibling is the group itself."""
    table = np.stack([identified(eval_set, p) for p in predicted])
    return resample_clusters(
        lambda s: s[..., 0] / np.maximum(s[..., 1], 1e-12), table, eval_set.clusters, seed
    )


def worst_change_interval(
    eval_set: EvalSet, predicted: np.ndarray, before: np.ndarray, seed: int
) -> Interval:
    """The largest change of any group's mean WD, so that below 0 every group has gained."""
    change = eval_set.distance(predicted, eval_set.truth) - eval_set.distance(
        before, eval_set.truth
    )
    table = np.concatenate([change.transpose(0, 2, 1), np.ones((*change.shape[::2], 1))], -1)
    return resample_clusters(
        lambda s: (s[..., :-1] / s[..., -1:]).max(-1), table, eval_set.clusters, seed
    )


def quietest_share_interval(eval_set: EvalSet, predicted: np.ndarray, seed: int) -> Interval:
    """Root mean square deviation predicted for the attribute that truly deviates least, over that
    of the others.
    """
    weights, names = (
        eval_set.survey.weights,
        np.array([g.attribute for g in eval_set.survey.groups]),
    )
    true = deviations(eval_set.truth, weights) ** 2 * eval_set.mask
    quiet = min(dict.fromkeys(names), key=lambda a: true[names == a].mean())
    own = names == quiet
    table = []
    for one in predicted:
        ours = deviations(one, weights) ** 2 * eval_set.mask
        table.append(np.stack([ours[own].mean(0).sum(-1), ours[~own].mean(0).sum(-1)], -1))
    return resample_clusters(
        lambda s: np.sqrt(s[..., 0] / np.maximum(s[..., 1], 1e-12)),
        np.stack(table),
        eval_set.clusters,
        seed,
    )


def resample_groups_and_clusters(gaps: np.ndarray, seed: int) -> Interval:
    """Mean of [seeds, groups, clusters] with a percentile interval that resamples all three."""
    draws, weights = np.random.default_rng(seed), []
    for n in gaps.shape:
        weights.append(draws.multinomial(n, np.full(n, 1 / n), _DRAWS) / n)
    drawn = np.einsum("ds,dg,dc,sgc->d", *weights, gaps, optimize=True)
    low, high = np.quantile(drawn, [0.025, 0.975])
    value = float(gaps.mean())
    return Interval(value, min(value, float(low)), max(value, float(high)), gaps.shape[1])


def rho_dev_interval(
    eval_set: EvalSet, predicted: np.ndarray, seed: int, minus: np.ndarray | None = None
) -> Interval:
    """rho_dev of [seeds, groups, questions, options]; with `minus`, the paired difference to
    another method's.
    """
    first = _products(eval_set, predicted)
    if minus is None:
        return resample_clusters(
            lambda s: _rho(s) / eval_set.reliability**0.5, first, eval_set.clusters, seed
        )
    second = _products(eval_set, minus)
    width = first.shape[-1]
    return resample_clusters(
        lambda s: (_rho(s[..., :width]) - _rho(s[..., width:])) / eval_set.reliability**0.5,
        np.concatenate([first, second], -1),
        eval_set.clusters,
        seed,
    )


def _products(eval_set: EvalSet, predicted: np.ndarray) -> np.ndarray:
    """What a correlation of deviations needs, summed over groups and options, [seeds, questions,
    6].
    """
    weights, mask = eval_set.survey.weights, eval_set.mask
    b = deviations(eval_set.truth, weights) * mask
    found = []
    for one in predicted:
        a = deviations(one, weights) * mask
        found.append(
            np.stack(
                [(x * mask).sum((0, 2)) for x in (np.ones_like(a), a, b, a * a, b * b, a * b)], -1
            )
        )
    return np.stack(found)


def _rho(s: np.ndarray) -> np.ndarray:
    n, a, b, aa, bb, ab = np.moveaxis(s, -1, 0)
    scale = np.maximum(aa - a * a / n, 0) * np.maximum(bb - b * b / n, 0)
    return np.where(scale > 1e-12, (ab - a * b / n) / np.sqrt(np.maximum(scale, 1e-12)), 0.0)
