"""Intersections of two attributes: the law that log-probabilities add."""

import numpy as np

from sae_research.surveys.crossings import FLOOR, add_log_probabilities

N_OPTIONS = (3, 2, 4)
MASK = np.arange(max(N_OPTIONS)) < np.array(N_OPTIONS)[:, None]


def shares(counts):
    return counts / counts.sum(-1, keepdims=True)


def random_answers(draws, *shape):
    """Random distributions well above the floor, zero beyond each question's last option."""
    return shares(np.where(MASK, draws.uniform(0.5, 1.5, (*shape, *MASK.shape)), 0.0))


def test_intersections_come_back_exactly_where_attributes_are_independent_given_the_answer():
    draws = np.random.default_rng(0)
    answer = random_answers(draws)
    first, second = (shares(draws.uniform(0.5, 1.5, (*MASK.shape, k))) for k in (3, 5))
    joint = np.einsum(
        "qk,qka,qkb->abqk", answer, first, second
    )  # true shares of people, so margins are mixtures
    ours = add_log_probabilities(
        shares(joint.sum(1))[:, None], shares(joint.sum(0)), shares(joint.sum((0, 1))), MASK
    )
    assert np.allclose(ours, shares(joint), rtol=0, atol=1e-9)


def test_intersections_come_back_exactly_where_log_probabilities_add():
    draws = np.random.default_rng(1)
    base, first, second = (
        draws.normal(size=MASK.shape),
        draws.normal(size=MASK.shape),
        draws.normal(size=MASK.shape),
    )
    p, p1, p2, both = (
        shares(np.where(MASK, np.exp(x), 0))
        for x in (base, base + first, base + second, base + first + second)
    )
    assert min(x[MASK].min() for x in (p, p1, p2)) > FLOOR
    assert np.allclose(add_log_probabilities(p1, p2, p, MASK), both, rtol=0, atol=1e-9)


def test_a_margin_like_everybody_adds_nothing_and_margins_can_be_swapped():
    draws = np.random.default_rng(2)
    first, second, overall = (
        random_answers(draws, 7),
        random_answers(draws, 7),
        random_answers(draws),
    )
    assert np.allclose(
        add_log_probabilities(first, overall, overall, MASK), first, rtol=0, atol=1e-12
    )
    assert np.allclose(
        add_log_probabilities(overall, second, overall, MASK), second, rtol=0, atol=1e-12
    )
    assert np.array_equal(
        add_log_probabilities(first, second, overall, MASK),
        add_log_probabilities(second, first, overall, MASK),
    )


def test_padding_stays_zero_and_options_that_nobody_chose_are_kept_at_the_floor():
    draws = np.random.default_rng(3)
    first, second, overall = (random_answers(draws) for _ in range(3))
    first[0] = [0.6, 0.4, 0.0, 0.0]
    overall[2] = [0.0, 0.2, 0.3, 0.5]
    ours = add_log_probabilities(first, second, overall, MASK)
    assert (ours[~MASK] == 0).all()
    assert (ours[MASK] > 0).all()
    assert np.allclose(ours.sum(-1), 1)
    raw = np.array([0.6, 0.4, FLOOR]) * second[0, :3] / overall[0, :3]
    assert np.allclose(ours[0, :3], raw / raw.sum())
