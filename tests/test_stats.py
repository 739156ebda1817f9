"""Intervals and tests against closed forms, worked examples and simulations whose truth is
known.
"""

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from sae_research import stats
from sae_research.errors import ResearchError


def covers(interval, number):
    return interval.low <= number <= interval.high


def test_mean_interval_is_students_t_by_hand():
    interval = stats.mean_interval([1.0, 2.0, 3.0])
    margin = 4.302652729911275 / math.sqrt(
        3
    )  # t at .975 with 2 degrees of freedom, standard deviation 1
    assert interval.n == 3
    assert (interval.value, interval.low, interval.high) == pytest.approx(
        (2.0, 2.0 - margin, 2.0 + margin)
    )
    assert stats.mean_interval([5.0, 5.0, 5.0]) == stats.Interval(5.0, 5.0, 5.0, 3)


def test_mean_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = sum(covers(stats.mean_interval(rng.normal(3, 2, 5)), 3) for _ in range(2000))
    assert abs(hits / 2000 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 2000)


def clustered(rng, clusters=40, size=10, between=1.0):
    """Values around 0 whose clusters share a common part."""
    names = np.repeat(np.arange(clusters), size)
    return rng.normal(0, between, clusters)[names] + rng.normal(0, 1, clusters * size), names


def test_cluster_bootstrap_covers_and_the_naive_one_does_not():
    rng = np.random.default_rng(1)
    runs, hits, naive = 400, 0, 0
    for seed in range(runs):
        values, names = clustered(rng)
        hits += covers(stats.cluster_bootstrap(values, names, seed=seed, draws=1000), 0)
        naive += covers(stats.cluster_bootstrap(values, seed=seed, draws=1000), 0)
    # 40 clusters: the percentile interval is short by about (1 - 1/40)^.5, so .94 is its true level
    assert abs(hits / runs - 0.94) < 4 * math.sqrt(0.94 * 0.06 / runs)
    assert naive / runs < 0.7


def test_cluster_bootstrap_of_the_mean_agrees_with_theory():
    values, names = clustered(np.random.default_rng(2), clusters=200)
    interval = stats.cluster_bootstrap(values, names, seed=0, draws=20_000)
    means = values.reshape(200, 10).mean(1)
    error = means.std() / math.sqrt(200)
    assert interval.n == 200
    assert interval.value == pytest.approx(means.mean())
    assert (interval.high - interval.low) / 2 == pytest.approx(1.96 * error, rel=0.03)


def test_any_statistic_of_cluster_means():
    values, names = [1.0, 3.0, 10.0, 10.0, 5.0], ["a", "a", "b", "b", "c"]
    worst = stats.cluster_bootstrap(values, names, np.max, seed=0)
    assert (worst.value, worst.n) == (10.0, 3)
    assert worst.low in (2.0, 5.0)
    assert stats.cluster_bootstrap(values, names, np.median, seed=0).value == 5.0
    assert stats.cluster_means(values, names).tolist() == [2.0, 10.0, 5.0]


def test_the_general_bootstrap_agrees_with_the_fast_one():
    values, names = clustered(np.random.default_rng(3), clusters=60)
    fast = stats.cluster_bootstrap(values, names, seed=0)
    general = stats.bootstrap(np.mean, values, clusters=names, seed=0, draws=4000)
    assert general.n == 60
    assert general.value == pytest.approx(fast.value)
    assert general.low == pytest.approx(fast.low, abs=0.03)
    assert general.high == pytest.approx(fast.high, abs=0.03)


def test_the_general_bootstrap_keeps_rows_and_clusters_together():
    x = np.arange(12.0)
    seen = []
    stats.bootstrap(
        lambda a, b: seen.append((a, b)) or 0.0, x, 2 * x, clusters=[0, 0, 1] * 4, seed=0, draws=50
    )
    for a, b in seen:
        assert np.array_equal(b, 2 * a)
        assert sum(a == 0) == sum(a == 1) == sum(a == 9)  # rows of cluster 0
        assert sum(a == 2) == sum(a == 11)


def test_pairing_removes_the_shared_part():
    rng = np.random.default_rng(4)
    shared = rng.normal(0, 10, 100)
    first, second = shared + rng.normal(1, 0.5, 100), shared + rng.normal(0, 0.5, 100)
    difference = stats.paired_bootstrap(first, second, seed=0)
    assert difference.value == pytest.approx((first - second).mean())
    assert not covers(difference, 0)
    assert difference.high - difference.low < 0.4
    assert (
        stats.cluster_bootstrap(first, seed=0).high - stats.cluster_bootstrap(first, seed=0).low > 3
    )
    same = stats.paired_bootstrap(first, first, seed=0)
    assert (same.low, same.high) == (0.0, 0.0)


def test_spearman_matches_scipy_and_its_interval_covers():
    rng = np.random.default_rng(5)
    x = rng.normal(size=80)
    y = x + rng.normal(size=80)
    y[:10] = y[0]  # ties
    assert stats.spearman(x, y, seed=0, draws=100).value == pytest.approx(
        scipy_stats.spearmanr(x, y).statistic
    )
    truth = 6 / math.pi * math.asin(0.5 / 2)  # Spearman's of a normal pair with correlation .5
    runs, hits = 300, 0
    for seed in range(runs):
        a, b = rng.multivariate_normal([0, 0], [[1, 0.5], [0.5, 1]], 100).T
        hits += covers(stats.spearman(a, b, seed=seed, draws=500), truth)
    assert abs(hits / runs - 0.94) < 4 * math.sqrt(0.94 * 0.06 / runs)


def test_spearman_difference_is_paired():
    rng = np.random.default_rng(6)
    y = rng.normal(size=200)
    good, bad = y + rng.normal(0, 0.5, 200), y + rng.normal(0, 3, 200)
    interval = stats.spearman_difference(good, bad, y, seed=0, draws=2000)
    expected = scipy_stats.spearmanr(good, y).statistic - scipy_stats.spearmanr(bad, y).statistic
    assert interval.value == pytest.approx(expected)
    assert interval.low > 0
    twin = good + rng.normal(0, 0.05, 200)
    close = stats.spearman_difference(good, twin, y, seed=0, draws=2000)
    apart = stats.spearman_difference(good, y + rng.normal(0, 0.5, 200), y, seed=0, draws=2000)
    assert (
        close.high - close.low < (apart.high - apart.low) / 3
    )  # predictors that agree differ by little


def test_partial_spearman_against_least_squares_and_the_textbook_formula():
    rng = np.random.default_rng(7)
    z = rng.normal(size=(150, 2))
    x, y = z[:, 0] + rng.normal(size=150), z[:, 0] - z[:, 1] + rng.normal(size=150)
    rank = scipy_stats.rankdata
    design = np.column_stack([np.ones(150), rank(z[:, 0]), rank(z[:, 1])])
    left = [rank(v) - design @ np.linalg.lstsq(design, rank(v), rcond=None)[0] for v in (x, y)]
    interval = stats.partial_spearman(x, y, [z[:, 0], z[:, 1]], seed=0, draws=500)
    assert interval.value == pytest.approx(np.corrcoef(*left)[0, 1], abs=1e-10)
    one = stats.partial_spearman(x, y, [z[:, 0]], seed=0, draws=100).value
    r = scipy_stats.spearmanr(np.column_stack([x, y, z[:, 0]])).statistic
    by_hand = (r[0, 1] - r[0, 2] * r[1, 2]) / math.sqrt((1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2))
    assert one == pytest.approx(by_hand, abs=1e-10)


def test_partial_spearman_removes_a_common_cause_and_survives_a_repeated_control():
    rng = np.random.default_rng(8)
    z = rng.normal(size=400)
    x, y = z + rng.normal(0, 0.3, 400), z + rng.normal(0, 0.3, 400)
    assert stats.spearman(x, y, seed=0, draws=200).value > 0.8
    once = stats.partial_spearman(x, y, [z], seed=0, draws=500)
    assert covers(once, 0)
    assert abs(once.value) < 0.15
    assert stats.partial_spearman(x, y, [z, 2 * z], seed=0, draws=500).value == pytest.approx(
        once.value, abs=1e-9
    )
    assert stats.partial_spearman(x, y, [x], seed=0, draws=100).value == 0.0  # nothing of x is left


def test_holm_on_a_worked_example():
    # sorted .005 .01 .03 .04 times 4 3 2 1 gives .02 .03 .06 .04, made monotone
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert stats.holm([0.2]) == pytest.approx([0.2])


def test_wilson_by_its_formula():
    z, k, n = 1.959963984540054, 7, 20
    p = k / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    interval = stats.wilson(7, 20)
    assert (interval.value, interval.low, interval.high) == pytest.approx(
        (p, centre - half, centre + half)
    )
    assert stats.wilson(0, 10).low == 0.0
    assert stats.wilson(0, 10).high == pytest.approx(z * z / (10 + z * z))


def test_a_seed_fixes_every_draw_and_another_changes_it():
    values, names = clustered(np.random.default_rng(11))
    first, again, other = (
        stats.cluster_bootstrap(values, names, seed=s, draws=500) for s in (0, 0, 1)
    )
    assert first == again != other
    assert first.value == other.value


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: stats.mean_interval([1.0]), "at least 2"),
        (lambda: stats.mean_interval([]), "empty"),
        (lambda: stats.mean_interval([1.0, float("nan")]), "NaN"),
        (lambda: stats.mean_interval([[1.0, 2.0]]), "one-dimensional"),
        (lambda: stats.mean_interval(["a", "b"]), "numbers"),
        (lambda: stats.cluster_bootstrap([1, 2, 3], ["a", "b"], seed=0), "lengths differ"),
        (lambda: stats.cluster_bootstrap([1, 2], ["a", float("nan")], seed=0), "cluster names"),
        (lambda: stats.cluster_bootstrap([1, 2, 3], ["a", "a", "a"], seed=0), "at least 2"),
        (
            lambda: stats.paired_bootstrap([1, 2, 3], [1, 2], seed=0),
            "lengths differ: first 3, second 2",
        ),
        (lambda: stats.spearman([1, 1, 1], [1, 2, 3], seed=0), "x is constant"),
        (lambda: stats.partial_spearman([1, 2, 3], [1, 3, 2], [[1, 2, 4]], seed=0), "at least 4"),
        (lambda: stats.holm([0.5, 1.5]), "between 0 and 1"),
        (lambda: stats.wilson(3, 2), "3 of 2"),
        (lambda: stats.wilson(0, 0), "0 of 0"),
        (
            lambda: stats.bootstrap(
                lambda x: x.sum() / 0 if x.sum() > 5 else 1.0, [1, 2, 3], seed=0
            ),
            "not finite",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_bad_input_is_one_clear_sentence(call, words):
    with pytest.raises(ResearchError, match=words):
        call()
