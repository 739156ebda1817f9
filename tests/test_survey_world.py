"""The survey schema and its statistics, the planted survey's exact truth, and the toy model that
learns it.
"""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sae_research import paths
from sae_research.errors import ResearchError
from sae_research.surveys.files import load_survey
from sae_research.surveys.survey import (
    divergence,
    logit,
    ordinal_gaps,
    reliability,
    sampling_noise,
    score_groups,
    total_variation,
    wasserstein,
)
from sae_research.world.survey.population import (
    ATTRIBUTES,
    SHARES,
    SPLITS,
    THRESHOLDS,
    TOPICS,
    VERBS,
    Population,
    PopulationSettings,
)
from sae_research.world.survey.prompts import (
    CONTEXT,
    LETTERS,
    WORDS,
    Writer,
    order_by_letter,
    prompt,
)
from sae_research.world.toy_model import make_word_tokenizer

OPINIONS = (
    Path(os.environ.get("SAE_RESEARCH_REAL", paths.ROOT.parent / "shared" / "real")) / "opinions"
)


@pytest.fixture(scope="module")
def population() -> Population:
    return Population(PopulationSettings())


@pytest.fixture(scope="module")
def survey(population):
    return population.survey()


@pytest.fixture(scope="module")
def polls():
    table = OPINIONS / "gss2018_spending_groups.csv"
    if not table.is_file():
        pytest.skip(f"{table} is missing")
    return load_survey(table)


# statistics


def test_wasserstein_of_cases_known_by_hand():
    even = ordinal_gaps((1, 2, 3))
    assert wasserstein(np.array([1, 0, 0]), np.array([0, 0, 1]), even) == 1
    assert wasserstein(np.array([1, 0, 0]), np.array([0, 1, 0]), even) == 0.5
    assert wasserstein(np.array([0.5, 0, 0.5]), np.array([0, 1, 0]), even) == 0.5
    uneven = ordinal_gaps((0, 1, 4))
    assert wasserstein(np.array([1, 0, 0]), np.array([0, 1, 0]), uneven) == 0.25
    assert wasserstein(
        np.array([0.2, 0.5, 0.3]), np.array([0.4, 0.1, 0.5]), uneven
    ) == pytest.approx(0.2 * 0.25 + 0.2 * 0.75)


def test_wasserstein_is_the_mean_difference_when_one_distribution_dominates(survey):
    """With P stochastically above Q, WD is the difference of mean ordinals over the range."""
    low, high = np.array([0.6, 0.3, 0.1, 0.0]), np.array([0.1, 0.2, 0.3, 0.4])
    ordinal = np.array([1.0, 2.0, 4.0, 7.0])
    assert wasserstein(low, high, ordinal_gaps(ordinal)) == pytest.approx(
        (high - low) @ ordinal / 6
    )


def test_total_variation_and_divergence_by_hand():
    p, q = np.array([0.5, 0.5, 0.0]), np.array([0.25, 0.25, 0.5])
    assert total_variation(p, q) == 0.5
    assert divergence(p, q) == pytest.approx(np.log(2))
    assert divergence(p, p) == 0


def test_padding_beyond_the_last_option_changes_nothing(survey):
    for q, question in enumerate(survey.questions):
        k = question.n_options
        a, b = survey.distributions[0, q, :k], survey.distributions[2, q, :k]
        alone = wasserstein(a, b, ordinal_gaps(question.ordinal))
        padded = wasserstein(survey.distributions[0], survey.distributions[2], survey.gaps)[q]
        assert padded == pytest.approx(alone, abs=1e-15)


def test_score_groups_is_perfect_for_the_truth_and_halves_its_slope_with_halved_deviations(survey):
    true, mask, weights = survey.distributions, survey.mask, survey.weights
    perfect = score_groups(true, true, weights, mask)
    assert perfect.rho == pytest.approx(1)
    assert perfect.slope == pytest.approx(1)
    flat = score_groups(np.broadcast_to(survey.overall, true.shape), true, weights, mask)
    assert np.isnan(flat.rho)
    mean = np.tensordot(weights, true, axes=1)
    squeezed = 1 / (1 + np.exp(-(logit(mean) + 0.5 * (logit(true) - logit(mean)))))
    assert score_groups(squeezed, true, weights, mask).slope == pytest.approx(0.5, abs=0.02)
    assert np.isnan(perfect.by_group[-2:]).all(), "handedness does not deviate"


def test_shuffled_groups_have_no_score_groups(survey):
    rotated = survey.distributions[[1, 2, 0, *range(3, 14)]]
    swapped = score_groups(
        rotated[:3], survey.distributions[:3], np.array(SHARES["party"]), survey.mask
    )
    assert swapped.rho < 0.1


def test_reliability_grows_with_respondents_and_noise_shrinks(survey):
    small, large = survey.sampled(100, seed=0), survey.sampled(2000, seed=0)
    assert 0 < reliability(small, 0) < reliability(large, 0) < 1
    assert sampling_noise(large, 0) < 0.5 * sampling_noise(small, 0)
    with pytest.raises(ResearchError, match="exact distributions without counts"):
        sampling_noise(survey, 0)


# real polls


def test_real_polls_give_their_reference_numbers(polls):
    assert len(polls.questions) == 18
    assert len(polls.groups) == 20
    assert wasserstein(polls.uniform, polls.distributions, polls.gaps).mean() == pytest.approx(
        0.214, abs=0.001
    )
    assert wasserstein(polls.overall, polls.distributions, polls.gaps).mean() == pytest.approx(
        0.041, abs=0.001
    )
    assert np.mean([sampling_noise(polls, seed) for seed in range(5)]) == pytest.approx(
        0.014, abs=0.001
    )
    assert sum(polls.weights) == pytest.approx(1)


def test_real_intersections_load_without_an_overall_row(polls):
    cells = load_survey(OPINIONS / "gss2018_spending_intersections.csv")
    assert [q.key for q in cells.questions] == [q.key for q in polls.questions]
    assert len(cells.groups) == 40
    assert wasserstein(cells.overall, polls.overall, polls.gaps).max() < 0.02


# the planted survey


def test_planted_effects_lie_in_the_band_of_real_polls(population, survey):
    wd = wasserstein(survey.overall, survey.distributions, survey.gaps)
    assert 0.04 < wd.mean() < 0.08
    by_attribute = {a: wd[survey.of(a)].mean() for a in ATTRIBUTES}
    planned = {"party": 0.08, "age": 0.06, "education": 0.05, "region": 0.03}
    for attribute, size in planned.items():
        assert by_attribute[attribute] == pytest.approx(size, rel=0.2)
    assert 0.01 < divergence(survey.distributions, survey.overall).mean() < 0.02
    assert wasserstein(survey.web, survey.overall, survey.gaps).mean() == pytest.approx(
        0.098, abs=0.01
    )
    assert 0.1 < wasserstein(survey.uniform, survey.overall, survey.gaps).mean() < 0.2


def test_handedness_moves_nothing(population):
    for stated in ({}, {"party": "red"}, {"party": "blue", "age": "old", "region": "south"}):
        for hand in ATTRIBUTES["hand"]:
            assert (
                np.abs(
                    population.answers_given({**stated, "hand": hand})
                    - population.answers_given(stated)
                ).max()
                < 1e-14
            )
    assert not population.effects["hand"].any()


def test_distributions_are_distributions(population, survey):
    assert population.table.shape == (4, 4, 4, 4, 3, 216, 4)
    assert population.table.sum(-1) == pytest.approx(1, abs=1e-12)
    assert (population.table[..., survey.mask] > 0).all()
    assert not population.table[..., ~survey.mask].any()


def test_exact_answers_agree_with_persons_drawn_one_by_one(population):
    """Monte Carlo over persons with party and age stated; every cell within 5 standard errors."""
    n = 20_000
    draws = np.random.default_rng(0)
    stated = {"party": "red", "age": "young"}
    value = {
        a: np.full(n, v.index(stated[a]))
        if a in stated
        else draws.choice(len(v), size=n, p=SHARES[a])
        for a, v in ATTRIBUTES.items()
    }
    theta = sum(population.effects[a][value[a]] for a in ATTRIBUTES)
    theta = theta + draws.normal(0, population.settings.spread, theta.shape)
    exact = population.answers_given(stated)
    for q in range(0, 216, 7):
        question = population.questions[q]
        taus = np.array(THRESHOLDS[question.n_options - 2])
        loading = VERBS[question.verb] * np.array(TOPICS[question.topic])
        at_least = 1 / (1 + np.exp(-(theta @ loading + population.offset[q])[:, None] + taus))
        answer = (draws.random((n, 1)) < at_least).sum(1)
        seen = np.bincount(answer, minlength=4) / n
        assert (
            np.abs(seen - exact[q]) < 5 * np.sqrt(exact[q] * (1 - exact[q]) / n) + 1e-9
        ).all(), question.key


def test_margins_are_mixtures_of_their_intersections(population, survey):
    cells = population.survey("party", "region")
    assert sum(g.share for g in cells.groups) == pytest.approx(1)
    for i, group in enumerate(survey.groups[:3]):
        inside = [j for j, g in enumerate(cells.groups) if g.name.startswith(group.name)]
        share = np.array([cells.groups[j].share for j in inside]) / group.share
        assert np.tensordot(share, cells.distributions[inside], axes=1) == pytest.approx(
            survey.distributions[i]
        )
    share = np.array([g.share for g in cells.groups])
    assert np.tensordot(share, cells.distributions, axes=1) == pytest.approx(survey.overall)
    assert np.tensordot(share, cells.traits, axes=1) == pytest.approx(np.zeros(3), abs=1e-12)


def test_splits_hold_whole_pairs_of_topic_and_verb(survey):
    split = {}
    for question in survey.questions:
        assert split.setdefault((question.topic, question.verb), question.split) == question.split
    assert {name: list(split.values()).count(name) for name, _ in SPLITS} == dict(SPLITS)
    train = [survey.questions[i] for i in survey.rows("train")]
    assert {q.topic for q in train} == set(TOPICS)
    assert {q.verb for q in train} == set(VERBS)


# text


@pytest.fixture(scope="module")
def writer(population) -> Writer:
    return Writer(population, make_word_tokenizer(WORDS).get_vocab())


def test_prompt_in_both_orders(survey):
    question = next(q for q in survey.questions if q.key == "ban guns 3")
    assert prompt(question, ["blue", "old"]) == (
        "i am blue . i am old . question : should we ban guns ? A against B unsure C favor answer :"
    )
    assert prompt(question, reverse=True).endswith("A favor B unsure C against answer :")


def test_reversing_the_options_permutes_the_distribution():
    p = np.array([0.1, 0.2, 0.7, 0.0])
    assert order_by_letter(p, 3, True) == pytest.approx([0.7, 0.2, 0.1, 0.0])
    assert order_by_letter(p, 3, False) == pytest.approx(p)
    both = np.stack([p, p])
    n_options, reverse = np.array([3, 3]), np.array([True, False])
    assert order_by_letter(
        order_by_letter(both, n_options, reverse), n_options, reverse
    ) == pytest.approx(both)


def test_documents_carry_the_exact_answers_of_their_persons(population, writer):
    tokenizer = make_word_tokenizer(WORDS)
    batch = writer.write_survey(300, np.random.default_rng(0), most_stated=4)
    by_text = {q.text: q for q in population.questions}
    seen = set()
    for row, at, target in zip(batch.tokens, batch.answer, batch.target, strict=True):
        text = tokenizer.decode(row[: at + 1]).removeprefix("<s>").strip()
        persona, asked = text.split("question : ")
        words = persona.split()
        stated = {a: w for a, values in ATTRIBUTES.items() for w in words if w in values}
        wording, listed = (
            asked.split(" ? ")[0] + " ?",
            asked.split(" ? ")[1].removesuffix(" answer :").split(),
        )
        options = listed[1::2]
        assert listed[::2] == list(LETTERS[: len(options)])
        index = next(
            i
            for i, q in enumerate(population.questions)
            if q.text == wording and sorted(q.options) == sorted(options)
        )
        exact = (population.answers_given(stated) if stated else population.web)[index]
        expected = [exact[population.questions[index].options.index(o)] for o in options]
        assert target[: len(options)] == pytest.approx(expected)
        assert tokenizer.decode(row[at + 1]) in LETTERS[: len(options)]
        seen.add(len(stated))
        assert wording in by_text
    assert seen == {0, 1, 2, 3, 4}


def test_off_task_surprisal_is_the_entropy_of_what_is_written(writer):
    """Mean surprisal against the closed-form entropy; the first word of a document is not
    scored.
    """
    batch = writer.write_off_task(4000, np.random.default_rng(0))
    sums, stories = (
        np.nansum(batch.surprisal[::2], axis=1),
        np.nansum(batch.surprisal[1::2], axis=1),
    )
    second = np.mean([(np.log(10 - a) + np.log(a + 1)) / 2 for a in range(10)])
    assert sums.mean() == pytest.approx(
        3 * np.log(10) + 4 * (np.log(2) + second), abs=5 * sums.std() / 2000**0.5
    )
    assert stories == pytest.approx(np.log(4) + 8 * np.log(3))


def test_every_document_reaches_the_screening_length(writer):
    batch = writer.write_mixed(500, np.random.default_rng(0), 4, 0.12)
    lengths = (batch.tokens != 0).sum(1)
    assert lengths.min() >= CONTEXT
    assert lengths.max() <= 48
    assert ((batch.answer < 0).sum()) == 60


# the toy model


def tiny_settings():
    from sae_research.training import SAETraining
    from sae_research.world.survey.model import SurveySettings
    from sae_research.world.toy_saes import ToySAEs

    saes = ToySAEs(
        hooks=("blocks.0.hook_resid_post",),
        latents=64,
        l0=6,
        relu_l0=6,
        documents=200,
        calibration=100,
        training=SAETraining(steps=60, batch_size=256, warmup_steps=5),
    )
    return SurveySettings(width=32, blocks=2, heads=2, inner=64, batch_size=64, steps=80, saes=saes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """That model after its 80 steps."""
    from sae_research.world.survey.model import train_model

    folder = tmp_path_factory.mktemp("tiny") / "model"
    train_model(tiny_settings(), 0, folder)
    return folder


@pytest.mark.slow
def test_tiny_training_lowers_the_answer_kl_and_repeats_itself(tmp_path, population, trained):
    import torch

    from sae_research import models
    from sae_research.world.survey.checks import measure_answer_kl
    from sae_research.world.survey.model import train_model

    tiny = tiny_settings()
    train_model(replace(tiny, steps=2), 0, tmp_path / "none")
    train_model(tiny, 0, tmp_path / "again")
    folders = {"none": tmp_path / "none", "some": trained, "again": tmp_path / "again"}
    kl = {}
    for name, folder in folders.items():
        model = models.load_model(folder)
        writer = Writer(population, model.tokenizer.get_vocab())
        kl[name] = measure_answer_kl(model, writer.write_survey(256, np.random.default_rng(1), 4))
    assert kl["some"] < 0.6 * kl["none"]
    assert kl["some"] == kl["again"]
    with pytest.raises(ResearchError, match="not finite"):
        train_model(replace(tiny, lr=float("inf")), 0, tmp_path / "nan")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


@pytest.mark.slow
def test_tiny_model_has_saes_that_open_and_checks_that_fail(tmp_path, trained):
    from sae_research import models, saes
    from sae_research.world.survey.checks import measure, measure_saes
    from sae_research.world.survey.model import NAME, train_saes

    tiny = tiny_settings()
    train_saes(tiny, trained, 0, tmp_path / "saes", hook_index=0)
    model = models.load_model(trained, name=NAME)
    names = {"block0_topk", "block0_jumprelu", "block0_relu", "block0_topk_wide"}
    assert {p.name for p in (tmp_path / "saes").iterdir()} == names
    for name in names:
        sae = saes.load_sae(tmp_path / "saes" / name)
        assert saes.check_fit(model, sae) == "blocks.0.hook_out"
        assert sae.cfg.d_sae == (256 if name.endswith("wide") else 64)
    table = {row["sae"]: row for row in measure_saes(trained, tmp_path / "saes", tiny, 0)}
    assert table["block0_topk"]["l0"] <= 6
    assert table["block0_jumprelu"]["l0"] == pytest.approx(6, rel=0.1)
    assert table["block0_topk"]["explained_variance"] > 0.3
    checks = {check.name: check for check in measure(trained, tmp_path / "saes", tiny, 0)}
    assert all(check.passed for name, check in checks.items() if name.startswith("planted"))
    assert not checks["persona prompt: rho_dev"].passed
