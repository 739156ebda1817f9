"""Study 1, the shift: identities that hold for any model and any SAE."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sae_research.bases import (
    compute_displacement,
    pca_basis,
    random_basis,
    residual_basis,
    token_basis,
)
from sae_research.errors import ResearchError
from sae_research.shifts import Shift, canonicalize
from sae_research.studies.opinion_qa import fit as objective
from sae_research.studies.opinion_qa.fit import train_calibration, train_shift
from sae_research.studies.opinion_qa.settings import ShiftTraining
from sae_research.surveys import targets as targets_of
from sae_research.surveys.prompts import OptionLetters, find_letter_tokens, sort_by_ordinal
from sae_research.surveys.survey import divergence

HOOK = "blocks.0.hook_resid_post"
GROUPS = ("red", "blue", "old", "young", "grey")


def shift_of(basis, kind="multiplicative", scale=0.5, positions="all", rank=3, seed=0):
    random = torch.Generator().manual_seed(seed)
    return Shift(
        kind,
        HOOK,
        positions,
        GROUPS,
        scale * torch.randn(basis.size, generator=random),
        scale * torch.randn(basis.size, rank, generator=random),
        scale * torch.randn(len(GROUPS), rank, generator=random),
    )


@pytest.mark.parametrize("architecture", ["gpt2", "neox", "gemma2", "llama"])
def test_the_tail_gives_the_model_s_own_logits_on_padded_rows(architecture, tmp_path):
    from miniatures import save

    from sae_research import models
    from sae_research.model_tail import ModelTail

    model = models.load_model(save(tmp_path / "m", architecture), name="m")
    tokens = torch.randint(4, 60, (3, 9))
    tokens[1, 6:] = tokens[2, 4:] = 0
    last = torch.tensor([8, 5, 3])
    for hook in ("blocks.0.hook_resid_post", "blocks.3.hook_resid_post"):
        tail = ModelTail(model, hook)
        found = tail.logits(tail.states(model.residual(tokens, hook), last))
        assert torch.allclose(found, model.logits(tokens)[torch.arange(3), last], atol=2e-5)


@pytest.mark.parametrize("kind", ["additive", "multiplicative", "gated"])
def test_a_zero_shift_is_exactly_the_frozen_model(kind, model, cache, basis):
    zero = shift_of(basis, kind, scale=0.0)
    tokens = cache.prompts.tokens[:6]
    assert torch.equal(model.logits(tokens, {HOOK: zero.edit(basis, "old")}), model.logits(tokens))
    read = cache.measure_answers(basis, kind, zero.deltas, range(18), "all")
    assert (
        np.abs(read.probabilities - cache.measure_unsteered(range(18)).probabilities).max() < 1e-6
    )
    cost = cache.measure_cost(basis, kind, zero.deltas, "test")
    assert (cost.loss, cost.divergence) == (0.0, 0.0)


def test_the_literal_edit_of_zero_is_not_the_frozen_model(cache, basis):
    zero = torch.zeros(1, basis.size)
    x = cache.residual[:4]
    moved = compute_displacement(basis, "literal", x, basis.encode(x), zero)[:, 0]
    assert torch.allclose(x + moved, basis.reconstruct(basis.encode(x)), atol=1e-4)
    assert cache.measure_cost(basis, "literal", zero, "test").divergence > 1e-4


@pytest.mark.parametrize("kind", ["additive", "multiplicative", "gated"])
def test_what_the_sae_leaves_unexplained_stays(kind, cache, basis, sae):
    x = cache.residual[:4, 1:10]
    acts = basis.encode(x)
    delta = 0.3 * torch.randn(2, basis.size, generator=torch.Generator().manual_seed(5))
    new = {
        "additive": torch.relu(acts[:, None] + delta[None, :, None]),
        "multiplicative": acts[:, None] * delta.exp()[None, :, None],
        "gated": acts[:, None] + (acts > 0)[:, None] * delta[None, :, None],
    }[kind]
    steered = x[:, None] + compute_displacement(basis, kind, x, acts, delta)
    error = x - sae.decode(acts)
    assert torch.allclose(steered, sae.decode(new) + error[:, None], atol=2e-4)


@pytest.mark.parametrize("kind", ["multiplicative", "gated"])
def test_latents_that_do_not_fire_stay_silent_and_text_without_any_is_untouched(kind, cache, basis):
    x = cache.residual[:4]
    silent = (basis.encode(x) == 0).all(0).all(0)
    assert silent.any()
    delta = torch.where(silent, 3.0, 0.0)[None]
    assert not compute_displacement(basis, kind, x, basis.encode(x), delta).any()
    assert compute_displacement(basis, "additive", x, basis.encode(x), delta).abs().max() > 0.1


@pytest.mark.parametrize("positions", ["answer", "question", "all"])
def test_a_shift_acts_where_it_should_and_never_on_the_start_token(positions, model, cache, basis):
    delta = shift_of(basis).deltas
    rows = torch.arange(6)
    _, moved = cache.apply_shift(basis, "multiplicative", delta, rows, positions)
    touched = moved.abs().sum((1, 3)) > 0
    assert torch.equal(touched, cache.prompts.editable(positions)[rows])
    assert not touched[:, 0].any()
    if positions == "answer":
        assert (touched.sum(1) == 1).all()
    tokens = cache.prompts.tokens[:1, : int(cache.prompts.last[0]) + 1]
    before = model.residual(tokens, HOOK)
    after = shift_of(basis, positions=positions).edit(basis, 0)(before)
    assert torch.equal(after[:, 0], before[:, 0])


def test_the_cache_and_the_edit_for_a_model_agree(model, cache, basis):
    shift = shift_of(basis, scale=0.3)
    read = cache.measure_answers(basis, shift.kind, shift.deltas, range(18), "all")
    letters = OptionLetters(model.tokenizer, 4)
    found = []
    for half in (slice(0, 18), slice(18, 36)):
        tokens, last = cache.prompts.tokens[half], cache.prompts.last[half]
        logits = model.logits(tokens, {HOOK: shift.edit(basis, "old")})[torch.arange(18), last]
        scores = sort_by_ordinal(
            letters.score_logits(logits), cache.prompts.n_options[half], cache.prompts.reverse[half]
        )
        found.append(scores.softmax(-1))
    assert np.abs(read.probabilities[2] - torch.stack(found).mean(0).numpy()).max() < 1e-5
    assert ((read.mass > 0) & (read.mass < 1)).all()


@pytest.mark.parametrize("kind", ["additive", "multiplicative", "gated", "literal"])
def test_gradients_of_the_loss_equal_finite_differences(kind, cache, basis, targets):
    double = replace(
        basis, encode=lambda x: basis.encode(x.float()).double(), decoder=basis.decoder.double()
    )
    if basis.offset is not None:
        double = replace(double, offset=basis.offset.double())
    rows = torch.arange(3)
    x = cache.residual[rows].double()
    weights = torch.randn(
        3, 2, *x.shape[1:], dtype=torch.double, generator=torch.Generator().manual_seed(2)
    )

    def value(delta):
        return (compute_displacement(double, kind, x, double.encode(x), delta) * weights).sum()

    delta = 0.2 * torch.randn(
        2, basis.size, dtype=torch.double, generator=torch.Generator().manual_seed(1)
    )
    assert torch.autograd.gradcheck(
        value, delta.requires_grad_(), eps=1e-6, atol=1e-4, fast_mode=True
    )


def test_the_kl_gradient_points_down_hill(cache, basis, targets):
    answers = torch.tensor(targets.answers, dtype=torch.float32)
    rows = cache.prompts.prompt_ids(range(6))

    def loss(delta):
        x, _ = cache.apply_shift(basis, "multiplicative", delta, rows, "all")
        logs = cache.log_probs(x.flatten(0, 1), rows.repeat_interleave(5))
        target = answers[:, cache.prompts.question[rows]].transpose(0, 1).flatten(0, 1)
        return targets_of.forward_kl(target, logs).mean()

    delta = torch.zeros(5, basis.size, requires_grad=True)
    loss(delta).backward()
    step = delta.grad / delta.grad.norm()
    with torch.no_grad():
        slope = (loss(0.02 * step) - loss(-0.02 * step)) / 0.04
    assert slope.item() == pytest.approx(delta.grad.norm().item(), rel=0.03)


def test_the_divergence_is_the_survey_s_and_ignores_missing_options(targets):
    predicted = np.where(targets.answers > 0, 1.0, 0.0) + 0.1
    predicted = np.where(targets.answers > 0, predicted, 0)
    predicted /= predicted.sum(-1, keepdims=True)
    logs = torch.tensor(predicted).log()
    found = targets_of.forward_kl(torch.tensor(targets.answers), logs)
    assert np.allclose(found.numpy(), divergence(targets.answers, predicted))


def test_shrinking_rows_is_the_proximal_step_and_gives_exact_zeros():
    table = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    found = objective.shrink_decoder_rows(table, torch.tensor([1.0, 0.5, 1.0]))
    assert torch.allclose(found[0], table[0] * 0.8)
    assert torch.equal(found[1:], torch.zeros(2, 2))


def test_shrunk_targets_lean_on_the_population_when_groups_are_small():
    overall = torch.tensor([0.5, 0.5])
    found = targets_of.shrink_targets(torch.tensor([[2.0, 0.0], [2000.0, 0.0]]), overall, 20.0)
    assert torch.allclose(found, torch.tensor([[12 / 22, 10 / 22], [2010 / 2020, 10 / 2020]]))


QUICK = ShiftTraining(
    lr=0.03,
    steps=12,
    calibration_steps=8,
    batch_size=6,
    n_documents=2,
    n_kl_groups=2,
    eval_every=4,
    rank=2,
)


def test_a_strong_lasso_leaves_no_group_part_and_a_weak_one_is_exactly_sparse(
    cache, basis, targets
):
    strong = train_shift(cache, basis, replace(QUICK, sparsity_weight=1e3), targets, 0)
    assert not strong.active.any()
    weak = train_shift(cache, basis, replace(QUICK, sparsity_weight=2.0, kl_weight=0.0), targets, 0)
    assert 0 < int(weak.active.sum()) < basis.size


def test_training_lowers_the_loss_and_scores_are_centred_within_attributes(cache, basis, targets):
    shared = train_calibration(cache, basis, replace(QUICK, kl_weight=0.0), targets, 0)
    found = train_shift(cache, basis, replace(QUICK, kl_weight=0.0, steps=40), targets, 0)
    train = targets.train
    after = cache.measure_answers(basis, "multiplicative", found.deltas, train, "all").probabilities
    before = cache.measure_unsteered(train).probabilities
    assert (
        divergence(targets.answers[:, train], after).mean()
        < divergence(targets.answers[:, train], before).mean()
    )
    assert torch.equal(found.shared, shared)
    for groups in (slice(0, 2), slice(2, 5)):
        weights = torch.tensor(targets.weights[groups], dtype=torch.float32)
        assert (weights @ found.scores[groups]).abs().max() < 1e-4
    again = train_shift(cache, basis, replace(QUICK, kl_weight=0.0, steps=40), targets, 0)
    assert torch.equal(found.axes, again.axes)


def test_a_canonical_shift_moves_the_same_with_unit_ordered_axes(basis):
    shift = shift_of(basis)
    shift.axes[:40] = 0
    weights = torch.rand(5)
    found = canonicalize(shift, weights)
    assert torch.allclose(found.deltas, shift.deltas, atol=1e-5)
    assert torch.allclose(found.axes.norm(dim=0), torch.ones(3), atol=1e-5)
    assert not found.axes[:40].any()
    variance = (weights[:, None] * found.scores**2).sum(0)
    assert (variance.diff() <= 1e-6).all()


def test_only_the_largest_coordinates_are_kept(basis):
    shift = shift_of(basis)
    few = shift.only(5)
    assert int((few.axes != 0).any(1).sum()) == 5
    assert torch.equal(few.shared, shift.shared)
    assert torch.equal(shift.only(basis.size).axes, shift.axes)


def test_controls_take_the_sae_s_place_with_its_size_and_sparsity(cache):
    block = cache.survey_residuals
    random = random_basis(block, 96, 8.0, seed=0)
    assert ((random.encode(block) > 0).sum(1) == 8).all()  # on every token, as a TopK SAE has
    assert torch.allclose(random.decoder.norm(dim=1), torch.ones(96), atol=1e-5)
    pca = pca_basis(block)
    assert torch.allclose(pca.reconstruct(pca.encode(block)), block, atol=1e-3)
    assert (pca.encode(block) >= 0).all()
    dense = residual_basis(32)
    assert torch.equal(dense.encode(block), block)


def test_a_per_token_vector_adds_what_it_holds_for_the_token_that_is_there(cache):
    tokens = token_basis(cache.survey_residuals, cache.survey_tokens)
    names = cache.survey_tokens.unique()
    assert tokens.size == 32 * len(names)
    acts = tokens.encode(cache.survey_residuals)
    assert (acts.sum(-1) == 32).all()
    read = names[acts[:, ::32].argmax(-1)]
    assert (read == cache.survey_tokens).double().mean() > 0.6  # chance is one in dozens
    delta = torch.randn(1, tokens.size, generator=torch.Generator().manual_seed(0))
    moved = compute_displacement(
        tokens,
        "gated",
        cache.survey_residuals[:, None],
        tokens.encode(cache.survey_residuals[:, None]),
        delta,
    )[:, 0, 0]
    held = delta.reshape(len(names), 32)
    assert torch.allclose(moved, held[acts[:, ::32].argmax(-1)], atol=1e-5)


def test_letters_read_every_single_token_variant_and_both_orders():
    class Words:
        unk_token_id = 0

        def __call__(self, text, add_special_tokens):
            ids = {"A": [5], " A": [6], "B": [7], " B": [8, 9], "C": [0], " C": [0]}
            return {"input_ids": ids.get(text, [3, 4])}

        def get_vocab(self):
            return {"D": 9, "▁D": 2}

    assert find_letter_tokens(Words(), "A") == [5, 6]
    assert find_letter_tokens(Words(), "B") == [7]
    assert find_letter_tokens(Words(), "D") == [
        9,
        2,
    ]  # every text gets a space: the vocabulary tells
    with pytest.raises(ResearchError, match="no single token for the option letter 'C'"):
        find_letter_tokens(Words(), "C")
    logits = torch.zeros(1, 10)
    logits[0, 6] = 3.0
    found = OptionLetters(Words(), 2).score_logits(logits)[0]
    assert found[0].item() == pytest.approx(np.log(1 + np.exp(3)), rel=1e-5)
    assert found[1].item() == 0.0
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]])
    found = sort_by_ordinal(scores, torch.tensor([3, 3]), torch.tensor([False, True]))
    assert found.tolist() == [[1, 2, 3, -np.inf], [3, 2, 1, -np.inf]]
