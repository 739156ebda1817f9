"""Study 1, the scores: analytic truths on the planted survey."""

import numpy as np
import pytest

from sae_research.errors import ResearchError
from sae_research.surveys import intervals
from sae_research.surveys import scores as evaluate
from sae_research.surveys.scores import EvalSet
from sae_research.surveys.survey import logit, reliability
from sae_research.world.survey.population import Population, PopulationSettings


@pytest.fixture(scope="module")
def population():
    return Population(PopulationSettings())


@pytest.fixture(scope="module")
def eval_set(population):
    survey = population.survey()
    return EvalSet(
        survey, survey.rows("test"), families=tuple(f"{q.topic} {q.verb}" for q in survey.questions)
    )


@pytest.fixture(scope="module")
def web(eval_set):
    return np.repeat(eval_set.survey.web[eval_set.questions][None], len(eval_set.survey.groups), 0)


def test_the_truth_gets_every_full_mark(eval_set, web):
    found = evaluate.compute_scores(eval_set, eval_set.truth, web)
    assert (found.wd, found.worst, found.population) == (0, 0, 0)
    assert found.kl == pytest.approx(0, abs=1e-12)
    for name in (
        "rho_dev",
        "slope",
        "identification",
        "swapped_groups",
        "variance_ratio",
        "entropy_ratio",
        "skill",
    ):
        assert getattr(found, name) == pytest.approx(1), name
    assert found.swap > 0.02
    assert found.improved == 1
    assert found.chance == pytest.approx(1 / 3, abs=0.01)


def test_one_answer_for_all_has_no_group_part_whatever_its_distance(eval_set, web):
    population = np.repeat(eval_set.survey.overall[eval_set.questions][None], len(web), 0)
    found = evaluate.compute_scores(eval_set, population, web)
    assert found.rho_dev == 0
    assert found.swap == pytest.approx(0, abs=1e-12)
    assert found.variance_ratio == pytest.approx(0, abs=1e-12)
    assert found.identification == pytest.approx(1 / 3, abs=0.1)
    assert found.wd < evaluate.compute_scores(eval_set, web, web).wd


def test_halved_differences_keep_the_correlation_and_halve_the_slope(eval_set, web):
    mean = np.tensordot(eval_set.survey.weights, eval_set.truth, 1)
    half = mean + 0.5 * (eval_set.truth - mean)
    found = evaluate.compute_scores(eval_set, half, web)
    assert found.rho_dev > 0.98
    assert found.slope == pytest.approx(0.5, abs=0.06)
    assert found.variance_ratio == pytest.approx(0.25, abs=1e-6)


def test_groups_swapped_at_random_have_a_group_part_of_nought(eval_set, web):
    draws, found = np.random.default_rng(0), []
    for _ in range(30):
        wrong = eval_set.truth.copy()
        for cluster in range(eval_set.clusters.max() + 1):
            rows = eval_set.clusters == cluster
            wrong[:, rows] = eval_set.truth[draws.permutation(len(wrong))][:, rows]
        found.append(evaluate.compute_scores(eval_set, wrong, web).rho_dev)
    # a permutation has no expected agreement beyond the 1/(groups - 1) that centring costs
    assert abs(np.mean(found)) < 0.1


def test_the_split_half_debiasing_finds_the_noise_free_correlation(population, eval_set, web):
    survey = population.survey()
    mean = np.tensordot(eval_set.survey.weights, eval_set.truth, 1)
    draws = np.random.default_rng(1)
    predicted = np.clip(
        mean + 0.6 * (eval_set.truth - mean) + 0.02 * draws.normal(size=eval_set.truth.shape),
        1e-4,
        None,
    )
    predicted = predicted * eval_set.mask / (predicted * eval_set.mask).sum(-1, keepdims=True)
    exact = evaluate.compute_scores(eval_set, predicted, web).rho_dev
    poll = survey.sampled(400, 0)
    plain = evaluate.compute_scores(EvalSet(poll, eval_set.questions), predicted, web).rho_dev
    debiased = evaluate.compute_scores(
        EvalSet(poll, eval_set.questions, reliability(poll, 0)), predicted, web
    ).rho_dev
    assert plain < exact - 0.03
    assert debiased == pytest.approx(exact, abs=0.04)


def test_intervals_hold_the_value_and_paired_ones_are_tighter(eval_set, web):
    mean = np.tensordot(eval_set.survey.weights, eval_set.truth, 1)
    seeds = np.stack([mean + s * (eval_set.truth - mean) for s in (0.5, 0.6, 0.7)])
    better = np.stack([mean + (s + 0.1) * (eval_set.truth - mean) for s in (0.5, 0.6, 0.7)])
    rho = intervals.rho_dev_interval(eval_set, seeds, 0)
    assert rho.value == pytest.approx(
        np.mean([evaluate.compute_scores(eval_set, p, web).rho_dev for p in seeds]), abs=0.01
    )
    assert rho.low <= rho.value <= rho.high
    assert rho.n == 18
    wd = intervals.distance_interval(eval_set, seeds, 0)
    assert wd.value == pytest.approx(eval_set.distance(seeds, eval_set.truth).mean())
    paired = intervals.distance_interval(eval_set, better, 0, minus=seeds)
    assert paired.high < 0
    assert paired.high - paired.low < wd.high - wd.low
    assert intervals.rho_dev_interval(eval_set, seeds, 0, minus=seeds).value == 0
    nothing = np.repeat(web[None], 2, 0)
    assert intervals.rho_dev_interval(eval_set, nothing, 0).value == 0


def test_a_single_cluster_has_no_interval(eval_set):
    with pytest.raises(ResearchError, match="two clusters"):
        intervals.resample_clusters(lambda s: s[..., 0], np.ones((2, 5, 1)), np.zeros(5), 0)


def test_off_target_is_nought_for_calibration_and_sees_what_spills(eval_set, population):
    mean = np.tensordot(eval_set.survey.weights, eval_set.truth, 1)
    calibrated = np.repeat(mean[None], len(eval_set.truth), 0)
    assert not evaluate.off_target(eval_set, calibrated, mean).any()
    good = evaluate.off_target(eval_set, eval_set.truth, mean)
    own = evaluate.on_target(eval_set, eval_set.truth, mean)
    own = own.mean(1)
    assert (own <= 0).all()
    assert own[[0, 2]].max() < -0.1  # blue and red
    spilled = eval_set.truth.copy()
    spilled[0] = eval_set.truth[2]  # steering towards blue gives red
    assert evaluate.on_target(eval_set, spilled, mean)[0].mean() > 0.05
    assert np.abs(good[12:]).max() < 1e-9  # the negative control moves nobody


def test_canonical_correlations_see_a_linear_map_and_know_their_chance(eval_set):
    survey, draws = eval_set.survey, np.random.default_rng(0)
    turned = survey.traits @ draws.normal(size=(3, 3))
    found = evaluate.canonical_correlations(turned, survey.traits, survey.weights)
    assert np.allclose(found, 1)
    noise = draws.normal(size=(14, 3))
    chance = evaluate.chance_correlations(noise, survey.traits, survey.weights, 0)
    assert 0.4 < chance[0] < 0.95
    assert (np.diff(chance) <= 0).all()


def test_consistency_is_one_for_a_group_and_less_for_a_mixture(eval_set):
    topics = [eval_set.survey.questions[i].topic for i in eval_set.questions]
    alone = EvalSet(eval_set.survey, eval_set.questions)
    blue = evaluate.consistency(alone, eval_set.truth[0], topics)
    odd = np.where((np.arange(len(topics)) % 2 == 0)[:, None], eval_set.truth[0], eval_set.truth[2])
    assert 0 <= evaluate.consistency(alone, odd, topics) <= blue <= 1


def test_logit_keeps_extremes_finite():
    assert np.isfinite(logit(np.array([0.0, 1.0]))).all()
