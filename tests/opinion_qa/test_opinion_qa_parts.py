"""Study 1 in parts that fit into memory: the same results, whatever the size of the parts."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from sae_research.studies.opinion_qa import fit, generalise, readers
from sae_research.studies.opinion_qa.settings import LoRATraining, ShiftTraining
from sae_research.surveys import cached as caches
from sae_research.surveys import group_prompts
from sae_research.surveys.prompts import TOY_TEMPLATE

QUICK = ShiftTraining(
    kind="multiplicative",
    lr=0.03,
    steps=4,
    calibration_steps=4,
    batch_size=6,
    n_documents=3,
    n_kl_groups=2,
    eval_every=2,
    rank=2,
    movement_weight=0.1,
    sparsity_weight=0.01,
)


@pytest.fixture(scope="module")
def little(cache):
    """The same bench, a few rows at a time."""
    found = copy.copy(cache)
    found.batch = 7
    return found


@pytest.mark.parametrize("kind", ["additive", "multiplicative", "gated"])
def test_a_fit_is_the_same(kind, cache, little, basis, targets):
    one, other = (
        fit.train_shift(b, basis, replace(QUICK, kind=kind), targets, 0) for b in (cache, little)
    )
    assert torch.allclose(one.deltas, other.deltas, atol=2e-3)
    assert one.deltas.abs().max() > 0.01


def test_answers_and_costs_are_the_same(cache, little, basis, targets):
    delta = 0.3 * torch.randn(5, basis.size, generator=torch.Generator().manual_seed(0))
    one, other = (
        b.measure_answers(basis, "gated", delta, range(18), "all").probabilities
        for b in (cache, little)
    )
    assert np.allclose(one, other, atol=1e-6)
    one, other = (b.measure_cost(basis, "gated", delta, "test") for b in (cache, little))
    assert one.loss == pytest.approx(other.loss, abs=1e-5)
    assert one.divergence == pytest.approx(other.divergence, abs=1e-5)


def test_few_shot_scores_are_the_same(exp, cache, little, basis, targets):
    shift = fit.train_shift(cache, basis, QUICK, targets, 0)
    settings = replace(exp.settings, few_shot_steps=5)
    case = (shift, targets.answers[:3], np.arange(8), 0.01)
    one, other = (
        generalise.fit_few_shot(replace(exp, cache=b, settings=settings), *case, free=False, seed=0)
        for b in (cache, little)
    )
    assert torch.allclose(one, other, atol=1e-4)


def test_an_adapter_is_the_same(exp, cache, little, targets):
    training = LoRATraining(steps=2, batch_size=20, dropout=0.0, lr=3e-3)
    settings = replace(exp.settings, lora=training)
    one, other = (
        readers.train_lora(
            replace(exp, cache=b, settings=settings), "LoRA", [b.prompts], targets.answers[[0]], 0
        )
        for b in (cache, little)
    )
    assert np.allclose(one.answers, other.answers, atol=1e-4)
    assert one.cost.loss == pytest.approx(other.cost.loss, abs=1e-4)


def test_a_step_may_ask_some_groups_only_and_still_learns_all(cache, basis, targets):
    training = replace(
        QUICK,
        steps=60,
        n_groups=2,
        kl_weight=0.0,
        movement_weight=0.0,
        sparsity_weight=0.0,
        eval_every=10,
        calibration="none",
    )
    known = replace(targets, validation=targets.train)
    found = fit.train_shift(cache, basis, training, known, 0)
    nothing = fit.train_shift(cache, basis, replace(training, steps=1, lr=1e-9), known, 0)
    everyone = fit.train_shift(cache, basis, replace(training, n_groups=16), known, 0)
    judge = fit._Training(cache, basis, training, known, known.answers, 0)
    assert judge.evaluate(found.deltas) < 0.9 * judge.evaluate(nothing.deltas)
    assert not torch.allclose(found.deltas, everyone.deltas)
    assert (found.scores.abs().sum(1) > 0).all()


def test_a_block_of_many_tokens_is_sampled_evenly(cache, monkeypatch):
    whole = cache.residual[cache.prompts.editable("question")]
    assert torch.equal(copy.copy(cache).survey_residuals, whole)
    monkeypatch.setattr(caches, "_SAMPLE", 50)
    few = copy.copy(cache)
    del few.__dict__["survey_residuals"]
    step = -(-len(whole) // 50)
    assert torch.equal(few.survey_residuals, whole[::step])


def test_the_block_of_a_prompt_is_what_it_ends_with(cache, small):
    group = small.groups[0]
    siblings = [g for g in small.groups if g.attribute == group.attribute]
    own = caches.make_prompts(
        cache.model, cache.questions, TOY_TEMPLATE.group_prompt("BIO", group, siblings)
    )
    assert torch.equal(group_prompts.shared_ending(own, cache.prompts), cache.prompts.last)
    assert torch.equal(group_prompts.shared_ending(own, own), own.last)
    around = replace(TOY_TEMPLATE, frame=lambda text: f"a {text} b")
    framed = caches.make_prompts(
        cache.model, cache.questions, around.group_prompt("BIO", group, siblings)
    )
    plain = caches.make_prompts(cache.model, cache.questions, around.plain)
    assert torch.equal(
        group_prompts.shared_ending(framed, plain), plain.last - 1
    )  # what comes before the context is not
