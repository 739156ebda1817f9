"""Scores of section 5 with intervals that resample clusters of questions and training seeds.

Predictions are [seeds, groups, questions, options].
"""

from collections.abc import Callable

import numpy as np

from sae_research.errors import ResearchError
from sae_research.stats import Interval
from sae_research.studies.opinion_qa.evaluate import Exam, identified
from sae_research.surveys.survey import deviations, divergence

_DRAWS = 2000


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


def wd(exam: Exam, predicted: np.ndarray, seed: int, less: np.ndarray | None = None) -> Interval:
    """Mean WD of [seeds, groups, questions, options]; with `less`, the paired difference to another method's."""
    gap = exam.distance(predicted, exam.truth).mean(1)
    if less is not None:
        gap = gap - exam.distance(less, exam.truth).mean(1)
    return resampled(
        lambda s: s[..., 0] / s[..., 1], np.stack([gap, np.ones_like(gap)], -1), exam.clusters, seed
    )


def wd_ratio(exam: Exam, predicted: np.ndarray, other: np.ndarray, seed: int) -> Interval:
    """Mean WD of one method over that of another, both [seeds, groups, questions, options], on the same questions."""
    table = np.stack([exam.distance(p, exam.truth).mean(1) for p in (predicted, other)], -1)
    return resampled(lambda s: s[..., 0] / np.maximum(s[..., 1], 1e-12), table, exam.clusters, seed)


def kl(exam: Exam, predicted: np.ndarray, seed: int, less: np.ndarray | None = None) -> Interval:
    """Mean KL(pi || P) of [seeds, groups, questions, options]; with `less`, the paired difference to another one's."""
    gap = divergence(exam.truth, predicted).mean(1)
    if less is not None:
        gap = gap - divergence(exam.truth, less).mean(1)
    return resampled(
        lambda s: s[..., 0] / s[..., 1], np.stack([gap, np.ones_like(gap)], -1), exam.clusters, seed
    )


def slope(exam: Exam, predicted: np.ndarray, seed: int) -> Interval:
    """beta_dev: slope of predicted on true deviations."""

    def regressed(s: np.ndarray) -> np.ndarray:
        n, a, b, _, bb, ab = np.moveaxis(s, -1, 0)
        return (ab - a * b / n) / np.maximum(bb - b * b / n, 1e-12)

    return resampled(regressed, _products(exam, predicted), exam.clusters, seed)


def identification(exam: Exam, predicted: np.ndarray, seed: int) -> Interval:
    """Share of cells in which the nearest sibling is the group itself."""
    table = np.stack([identified(exam, p) for p in predicted])
    return resampled(lambda s: s[..., 0] / np.maximum(s[..., 1], 1e-12), table, exam.clusters, seed)


def worst_change(exam: Exam, predicted: np.ndarray, before: np.ndarray, seed: int) -> Interval:
    """The largest change of any group's mean WD, so that below 0 every group has gained."""
    change = exam.distance(predicted, exam.truth) - exam.distance(before, exam.truth)
    table = np.concatenate([change.transpose(0, 2, 1), np.ones((*change.shape[::2], 1))], -1)
    return resampled(lambda s: (s[..., :-1] / s[..., -1:]).max(-1), table, exam.clusters, seed)


def quietest_share(exam: Exam, predicted: np.ndarray, seed: int) -> Interval:
    """Root mean square deviation predicted for the attribute that truly deviates least, over that of the others."""
    weights, names = exam.survey.weights, np.array([g.attribute for g in exam.survey.groups])
    true = deviations(exam.truth, weights) ** 2 * exam.mask
    quiet = min(dict.fromkeys(names), key=lambda a: true[names == a].mean())
    own = names == quiet
    table = []
    for one in predicted:
        ours = deviations(one, weights) ** 2 * exam.mask
        table.append(np.stack([ours[own].mean(0).sum(-1), ours[~own].mean(0).sum(-1)], -1))
    return resampled(
        lambda s: np.sqrt(s[..., 0] / np.maximum(s[..., 1], 1e-12)),
        np.stack(table),
        exam.clusters,
        seed,
    )


def over_groups_and_clusters(gaps: np.ndarray, seed: int) -> Interval:
    """Mean of [seeds, groups, clusters] with a percentile interval that resamples all three."""
    draws, weights = np.random.default_rng(seed), []
    for n in gaps.shape:
        weights.append(draws.multinomial(n, np.full(n, 1 / n), _DRAWS) / n)
    drawn = np.einsum("ds,dg,dc,sgc->d", *weights, gaps, optimize=True)
    low, high = np.quantile(drawn, [0.025, 0.975])
    value = float(gaps.mean())
    return Interval(value, min(value, float(low)), max(value, float(high)), gaps.shape[1])


def rho_dev(
    exam: Exam, predicted: np.ndarray, seed: int, less: np.ndarray | None = None
) -> Interval:
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
