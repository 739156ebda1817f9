"""Study 1, the baselines and new groups: what must hold whatever the model has learnt."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from sae_research.bases import residual_basis
from sae_research.shifts import Shift, canonicalize
from sae_research.studies.opinion_qa import (
    baselines,
    experiment,
    generalise,
    meaning,
    methods,
    readers,
)
from sae_research.studies.opinion_qa.fit import train_shift
from sae_research.studies.opinion_qa.settings import LoRATraining, ShiftTraining
from sae_research.surveys import group_prompts, targets
from sae_research.surveys.prompts import ENGLISH_TEMPLATE, TOY_TEMPLATE, english_block
from sae_research.surveys.survey import Group, Question, divergence

HOOK = "blocks.0.hook_resid_post"
ITEM = Question("Q", "Is it so?", ("No", "Perhaps", "Yes"), (1.0, 2.0, 3.0))


@pytest.fixture(scope="module")
def prompted(exp):
    return exp.group_prompts()


def test_english_prompts_list_lettered_options_and_never_name_a_group_in_the_block():
    block = english_block(ITEM, False)
    assert block.splitlines() == [
        "Question: Is it so?",
        "A. No",
        "B. Perhaps",
        "C. Yes",
        "Answer with A, B or C.",
        "",
        "Answer:",
    ]
    assert english_block(ITEM, True).splitlines()[1] == "A. Yes"
    offered = english_block(ITEM, True, refusal=True)
    assert "D. Prefer not to say" in offered
    assert "A, B, C or D" in offered
    group, other = Group("SEX", "Male", 0.5), Group("SEX", "Female", 0.5)
    for form in ("QA", "BIO", "PORTRAY"):
        text = ENGLISH_TEMPLATE.group_prompt(form, group, (other, group))(ITEM, False)
        assert text.endswith(block)
        assert "Male" in text
    assert "Answer: B. Male" in ENGLISH_TEMPLATE.contexts["QA"](group, (other, group))


def test_every_form_of_the_toy_model_uses_words_that_it_knows(model, small):
    for form in TOY_TEMPLATE.contexts:
        text = TOY_TEMPLATE.group_prompt(form, small.groups[2], small.groups[:3])(
            small.questions[0], False
        )
        assert model.tokenizer.unk_token_id not in model.tokenizer(text)["input_ids"]
        assert "red" in text


def test_an_empty_context_gives_the_unsteered_answers(exp, cache, basis):
    silent = replace(TOY_TEMPLATE, contexts={"none": lambda group, siblings: ""}, separator="")
    found = replace(exp, template=silent).group_prompts("none")
    rows = cache.prompts.prompt_ids(range(18))
    answers = group_prompts.read_letter_scores(cache, found.scores[:, rows], rows).probabilities
    assert np.abs(answers - cache.measure_unsteered(range(18)).probabilities).max() < 1e-6
    assert torch.allclose(
        found.block[0],
        cache.residual[cache.prompts.prompt_ids(range(12))][
            cache.prompts.editable("question")[cache.prompts.prompt_ids(range(12))]
        ].mean(0),
        atol=1e-5,
    )
    assert torch.allclose(found.block[0], found.block[1])
    fires = (basis.encode(cache.residual) != 0).float() * cache.prompts.editable("question")[
        ..., None
    ]
    train = cache.prompts.prompt_ids(range(12))
    share = (fires.sum(1) / cache.prompts.last[:, None])[train].mean(0)
    assert torch.allclose(found.fires[0], share, atol=1e-5)
    assert found.count == 24


def test_temperature_and_letter_bias_undo_what_they_model(cache):
    rows = cache.prompts.prompt_ids(range(18))
    states = group_prompts.compute_states(cache, cache.residual, cache.prompts.last)
    scores = cache.letters.score_states(cache.tail, states)
    scores = scores - scores.mean(-1, keepdim=True)
    scores = 2 * scores / scores.std()
    bent = 0.5 * scores + torch.tensor([1.0, 0.0, -1.0, 0.5])
    truth = cache.prompts.sort_scores(scores, rows).softmax(-1)
    scale, bias = baselines.fit_letter_calibration(cache, bent[rows][None], rows, truth[rows][None])
    again = cache.prompts.sort_scores(bent * scale + bias, rows).softmax(-1)
    assert scale == pytest.approx(2, rel=0.05)
    assert (again - truth).abs().max() < 0.03


def test_differences_of_means_cancel_between_two_siblings(prompted, everyone):
    found = group_prompts.difference_of_means(prompted, everyone)
    left, right = found[-2:]  # handedness has two values
    assert torch.allclose(left, -right, atol=1e-5)
    assert left.norm() > 0


def test_the_most_selective_latents_are_found_and_alone_moved(cache, basis, prompted, everyone):
    contrast, statistic = group_prompts.latent_contrasts(prompted, everyone)
    top = baselines.select_top_latents(contrast, statistic, 7)
    assert int((top != 0).any(0).sum()) == 7
    kept = (top != 0).any(0)
    assert statistic[kept].min() >= statistic[~kept].max()


def test_coefficient_zero_is_chosen_when_a_direction_only_harms(exp, cache, everyone):
    dense = residual_basis(32)
    unsteered = cache.measure_unsteered(range(18)).probabilities
    own = replace(everyone, answers=np.repeat(unsteered, 14, 0))
    part = torch.randn(14, 32, generator=torch.Generator().manual_seed(0)) * 3
    shift = baselines.make_untrained_shift(exp, torch.zeros(32), part)
    known = replace(exp, targets=own)
    coefficient, best = baselines.choose_coefficient(known, dense, shift, (0.0, 1.0, 2.0))
    assert coefficient == 0.0
    assert not best.scores.any()


def test_a_screened_space_moves_only_its_latents(cache, basis):
    keep = torch.tensor([3, 5, 60])
    few = baselines.restrict_basis(basis, keep)
    x = cache.residual[:2]
    from sae_research.bases import compute_displacement

    small_delta, whole = torch.tensor([[0.4, -0.2, 0.3]]), torch.zeros(1, basis.size)
    whole[0, keep] = small_delta[0]
    for kind in ("additive", "multiplicative", "gated"):
        a = compute_displacement(few, kind, x, few.encode(x), small_delta)
        b = compute_displacement(basis, kind, x, basis.encode(x), whole)
        assert torch.allclose(a, b, atol=1e-5)


def test_probes_start_at_the_model_and_learn(cache, prompted, everyone):
    rows = readers.unembed_letters(cache)
    same = readers.LinearProbe(rows, torch.zeros(4))
    assert torch.allclose(same(prompted.final), prompted.scores, atol=1e-4)
    found, loss = readers.fit_probe(cache, prompted.hidden, everyone, ridges=(1e-2,))
    before = group_prompts.read_letter_scores(
        cache, prompted.scores, cache.prompts.prompt_ids(range(18))
    ).probabilities
    after = group_prompts.read_letter_scores(
        cache, found(prompted.hidden), cache.prompts.prompt_ids(range(18))
    ).probabilities
    assert np.isfinite(loss)
    truth = everyone.answers[:, :12]
    assert divergence(truth, after[:, :12]).mean() < divergence(truth, before[:, :12]).mean()
    assert found.parameters == 4 * 32 + 4
    own, _ = readers.fit_probe(cache, prompted.hidden, everyone, by_group=True, ridges=(1e-2,))
    assert own.parameters == 14 * (4 * 32 + 4)


def test_shuffling_keeps_every_answer_and_breaks_groups_apart(everyone):
    clusters = [q // 3 for q in range(18)]
    found = methods.shuffle_groups(everyone, clusters, 0)
    assert np.allclose(np.sort(found.answers, 0), np.sort(everyone.answers, 0))
    same = (found.answers == everyone.answers).all((0, 2))
    assert not same.all()
    for cluster in range(6):  # one permutation a cluster
        rows = slice(3 * cluster, 3 * cluster + 3)
        who = [
            int(np.abs(found.answers[0, rows] - everyone.answers[g, rows]).sum() < 1e-12)
            for g in range(14)
        ]
        assert sum(who) >= 1


def test_lora_without_training_is_the_frozen_model_and_training_moves_it(
    exp, cache, fresh, everyone
):
    questions = exp.eval_set.questions
    own = [cache.prompts] * 14
    model = readers.add_adapter(fresh(), LoRATraining(), 0).eval()
    read = readers.read_adapted_answers(model, cache, cache.prompts, questions)
    found = read.probabilities
    assert np.allclose(
        read.order_sensitivity, cache.measure_unsteered(questions).order_sensitivity[0], atol=1e-4
    )
    assert np.abs(found - cache.measure_unsteered(questions).probabilities[0]).max() < 1e-4
    assert readers.measure_adapted_cost(model, cache).divergence == pytest.approx(0, abs=1e-5)
    quick = LoRATraining(steps=3, batch_size=8, lr=0.05)
    trained = replace(exp, settings=replace(exp.settings, lora=quick))
    result = readers.train_lora(trained, "LoRA", own, everyone.answers, 0)
    assert result.answers.shape == (14, 6, 4)
    assert result.parameters == 3 * 2 * 8 * 64
    assert np.abs(result.answers[0] - found).max() > 1e-3
    assert result.cost.divergence > 0


# new groups


def shift_for(targets, basis, rank=2, scale=0.3):
    random = torch.Generator().manual_seed(4)
    raw = Shift(
        "multiplicative",
        HOOK,
        "all",
        targets.groups,
        0.1 * torch.randn(basis.size, generator=random),
        scale * torch.randn(basis.size, rank, generator=random),
        torch.randn(len(targets.groups), rank, generator=random),
    )
    return canonicalize(raw, torch.tensor(targets.weights))


def test_composition_adds_scores_and_a_margin_is_one_of_them(basis, everyone):
    shift = shift_for(everyone, basis)
    cells = [Group("party|age", "red|old", 0.1), Group("party|age", "blue|young", 0.1)]
    both = generalise.compose_shifts(shift, cells)
    parts = (
        generalise.margin_deltas(shift, cells, 0)
        + generalise.margin_deltas(shift, cells, 1)
        - shift.shared
    )
    assert torch.allclose(both, parts, atol=1e-5)
    assert torch.allclose(generalise.compose_shifts(shift, cells, 0.0), shift.shared.expand(2, -1))


def test_the_right_shrinkage_is_found_from_margins_alone(exp, basis, everyone):
    shift = shift_for(everyone, basis)
    shares = {"red": 0.3, "blue": 0.7}, {"old": 0.2, "young": 0.8}
    cells = [
        Group("party|age", f"{a}|{b}", share * other)
        for a, share in shares[0].items()
        for b, other in shares[1].items()
    ]
    validation = everyone.validation
    answers = exp.answer(shift, generalise.compose_shifts(shift, cells, 0.7), validation)
    margins = np.full((14, 18, 4), np.nan)  # whoever is no part of a cell is never prompted
    for name, own in {"red": (0, 1), "blue": (2, 3), "old": (0, 2), "young": (1, 3)}.items():
        weights = np.array([cells[i].share for i in own])
        margins[everyone.groups.index(name), validation] = np.tensordot(
            weights / weights.sum(), answers[list(own)], 1
        )
    known = replace(exp, targets=replace(everyone, answers=margins))
    assert generalise.choose_kappa(known, shift, cells) == 0.7


def test_each_way_to_place_a_group_gets_the_ridge_that_serves_known_groups_best(
    exp, basis, everyone, monkeypatch
):
    shift, tried = shift_for(everyone, basis), []
    whole = generalise.fit_few_shot

    def spy(exp, shift, answers, questions, ridge, *, free, seed):
        tried.append((ridge, free))
        return whole(exp, shift, answers, questions, ridge, free=free, seed=seed)

    monkeypatch.setattr(generalise, "fit_few_shot", spy)
    quick = replace(exp, settings=replace(exp.settings, few_shot_steps=10))
    case = (quick, shift, everyone.answers[:4], np.arange(6))
    found = generalise.choose_ridge(*case, free=True, seed=0)
    assert tried == [(ridge, True) for ridge in generalise.RIDGES]
    assert found in generalise.RIDGES


def test_a_few_answers_bring_a_new_group_closer_and_a_stiff_ridge_keeps_the_population(
    exp, basis, everyone
):
    shift = shift_for(everyone, basis)
    answers = everyone.answers[:3]
    long = replace(exp, settings=replace(exp.settings, few_shot_steps=60))

    def loss(delta):
        return divergence(answers[:, :12], exp.answer(shift, delta, np.arange(12))).mean()

    def fit(ridge, free=False):
        return generalise.fit_few_shot(
            long, shift, answers, np.arange(12), ridge, free=free, seed=0
        )

    found = fit(1e-4)
    assert found.shape == (3, basis.size)
    assert loss(found) < loss(shift.shared.expand(3, -1))
    inside = torch.linalg.lstsq(shift.axes, (found - shift.shared).T).residuals
    assert inside.numel() == 0 or inside.abs().max() < 1e-4  # U stays frozen
    assert loss(fit(1e-4, free=True)) < loss(found)
    assert (fit(1e6) - shift.shared).abs().max() < 0.05


def test_groups_can_be_left_out(everyone):
    found = targets.drop_groups(everyone, [0, 13])
    assert found.groups == everyone.groups[1:13]
    assert found.answers.shape[0] == 12


# what a shift is made of


def test_latents_are_shown_where_they_fire_whatever_the_parts(exp, basis, prompted, everyone):
    shift = shift_for(everyone, basis)
    table = meaning.describe_latents(exp, shift, prompted, top=4)
    found = list(table.itertuples(index=False))
    assert [latent.axis for latent in found] == [0] * 4 + [1] * 4
    few = copy.copy(exp.cache)
    few.batch = 7
    again = meaning.describe_latents(replace(exp, cache=few), shift, prompted, top=4)
    same = ["index", "contexts", "group"]
    assert again[same].equals(table[same])
    known = meaning.measure_selectivity(
        basis, prompted, everyone.attributes, torch.arange(basis.size)
    )
    for latent in found:
        assert latent.weight == pytest.approx(float(shift.axes[latent.index, latent.axis]))
        assert latent.selectivity == pytest.approx(
            known[everyone.groups.index(latent.group), latent.index]
        )
        assert abs(latent.selectivity - 0.5) == pytest.approx(
            abs(known[:, latent.index] - 0.5).max()
        )
        assert latent.contexts
        assert all(c.count("[") == 1 for c in latent.contexts.split(" / "))
        assert 0 < latent.frequency <= 1


def test_all_latents_keep_the_whole_gain(exp, basis, everyone):
    shift = shift_for(everyone, basis)
    answers = exp.answer(shift, shift.deltas)
    calibrated = exp.answer(shift, shift.shared[None])[0]
    some = replace(exp, settings=replace(exp.settings, top_latents=(0, basis.size)))
    found = meaning.measure_causal_share(some, shift, answers, calibrated)
    assert found[basis.size] == pytest.approx(1)
    assert found[0] == pytest.approx(0, abs=1e-6)


def test_selectivity_is_a_half_for_a_latent_that_knows_nothing_and_one_for_one_that_knows_all(
    basis, everyone
):
    from types import SimpleNamespace

    hidden = torch.zeros(14, 10, 2)
    hidden[0, :, 0] = 1.0  # fires for the first group alone
    fake = replace(residual_basis(2), encode=lambda x: x)
    found = meaning.measure_selectivity(
        fake, SimpleNamespace(hidden=hidden), everyone.attributes, torch.arange(2)
    )
    assert found[0].tolist() == [1.0, 0.5]
    assert found[1, 0] == pytest.approx(0.25)  # its sibling fires always, the other never


def test_equal_shifts_are_perfectly_stable(basis, everyone):
    shift = shift_for(everyone, basis)
    part = shift.scores @ shift.axes.T
    assert meaning.measure_stability([part, part, part], top=10) == (1.0, pytest.approx(1.0))


def test_a_group_without_answers_is_placed_by_its_state(basis, everyone):
    shift = shift_for(everyone, basis)
    states = shift.scores @ torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    known = list(range(13))
    others = replace(shift, groups=shift.groups[:13], scores=shift.scores[:13])
    found = generalise.predict_from_states(others, states[known], states[[13]], ridge=1e-4)
    assert torch.allclose(found, shift.deltas[[13]], atol=0.05 * shift.deltas.abs().max().item())


def test_one_group_of_every_larger_attribute_is_held_out(everyone):
    out = generalise.held_out_groups(everyone)
    assert [everyone.groups[g] for g in out] == ["red", "old", "graduate", "south"]
    turns = [generalise.held_out_groups(everyone, turn) for turn in range(4)]
    assert sorted(g for turn in turns for g in turn) == list(
        range(12)
    )  # each once; the pair of hands never
    assert turns[3] == []


def test_a_shared_part_along_the_axes_is_learnt_with_the_groups(cache, basis, everyone):
    training = ShiftTraining(
        kind="gated",
        calibration="axes",
        lr=0.03,
        steps=20,
        batch_size=6,
        eval_every=5,
        rank=2,
        kl_weight=0.0,
        sparsity_weight=0.5,
    )
    found = train_shift(cache, basis, training, everyone, 0)
    along = found.axes @ torch.linalg.lstsq(found.axes, found.shared[:, None]).solution
    assert found.shared.abs().max() > 0
    assert torch.allclose(along[:, 0], found.shared, atol=1e-4 * float(found.shared.abs().max()))
    assert found.parameters == 2 + 2 * int(found.active.sum()) + 2 * 14
    free = train_shift(cache, basis, replace(training, rank=None), everyone, 0)
    assert free.axes.shape[1] == 14
    assert free.shared.abs().max() > 0
    for one in (found, free):
        weights = torch.tensor(everyone.weights[:3], dtype=torch.float32)
        assert (weights @ (one.deltas - one.shared)[:3]).abs().max() < 1e-4


def test_refusals_are_read_from_the_last_letter_offered(cache):
    short = [q for q in cache.questions if q.n_options < 4]
    few = type(cache)(cache.model, HOOK, short, cache.write, cache.texts)
    found = group_prompts.measure_refusals(
        few, lambda question, reverse: english_block(question, reverse, refusal=True)
    )
    assert found.shape == (len(short),)
    assert ((found > 0) & (found < 1)).all()


def test_thinning_keeps_whole_families_of_every_split(population):
    survey = population.survey()
    names = [f"{q.topic} {q.verb}" for q in survey.questions]
    assert experiment.thin_questions(survey.questions, names, 1).tolist() == list(range(len(names)))
    rows = experiment.thin_questions(survey.questions, names, 6)
    few = experiment.select_questions(survey, rows)
    sizes = {
        s: len({(q.topic, q.verb) for q in few.questions if q.split == s})
        for s in experiment.SPLITS
    }
    assert sizes == {"train": 7, "validation": 2, "test": 3}
    assert len(few.questions) == 36  # three ladders each
    place = survey.questions.index(few.questions[-1])
    assert np.array_equal(few.distributions[:, -1], survey.distributions[:, place])
    assert np.array_equal(few.overall[-1], survey.overall[place])
