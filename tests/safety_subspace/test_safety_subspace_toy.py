"""Alignment of the toy model: requests, exact scores, methods, attacks, what the features do."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sae_research import attack, catalogue
from sae_research.errors import ResearchError
from sae_research.studies.safety_subspace import evaluate, interpret, methods, study
from sae_research.studies.safety_subspace.settings import (
    FROZEN,
    METHODS,
    NULL,
    RANDOM,
    SAILS,
    SHUFFLED,
    Settings,
)
from sae_research.studies.safety_subspace.subspace import decoder_rows
from sae_research.training import SAETraining
from sae_research.world.text import chat
from sae_research.world.text.model import TextSettings
from sae_research.world.text.more_saes import train_like

SETTINGS = Settings(
    models=("world-text",),
    sae_roles=("block1_topk",),
    rank=4,
    n_features=5,
    n_pairs=8,
    steps=2,
    base_steps=1,
    learning_rates=(1e-3,),
    full_learning_rates=(1e-3,),
    nulls=(),
    n_retrained=1,
)


@pytest.fixture(scope="module")
def setup():
    alignment = study.Alignment("world-text", 0, SETTINGS)
    alignment.split = chat.split_requests(0)
    return alignment._make_setup()


def test_splits_share_no_crossing_and_the_test_has_topics_of_its_own():
    split = chat.split_requests(3)
    crossings = [
        set(zip(part.topic.tolist(), part.action.tolist(), strict=True))
        for part in (split.train, split.validation, split.test, split.new_topics)
    ]
    assert sum(map(len, crossings)) == len(set.union(*crossings)) == 24 * 8
    new = split.new_topics[split.new_topics.harmful]
    assert len(set(new.topic.tolist())) == chat.N_NEW_TOPICS
    assert not set(new.topic.tolist()) & set(split.train.topic.tolist())
    parts = [part[part.harmful] for part in (split.train, split.validation, split.test)]
    frames = len(split.train) // len({*crossings[0]})
    assert [len(part) // frames for part in parts] == [12, 6, 6]
    for part in parts:
        assert set(part.topic.tolist()) == set(parts[0].topic.tolist())
        assert set(part.action.tolist()) <= set(parts[0].action.tolist())


def test_scores_are_exact():
    requests = chat.all_requests()[:3]
    right = chat.answer(requests, np.random.default_rng(0))
    refusal = chat.refuse(3)
    partly, hedged, neither = right.clone(), refusal.clone(), refusal.clone()
    partly[:, 1] = partly[:, 0]
    hedged[:, 5] = right[:, 1]
    neither[:, 0] = right[:, 0]
    replies = torch.stack([refusal, hedged, neither, partly, right], 1)
    assert evaluate.score(requests, replies).tolist() == [[1, 2, 3, 4, 5]] * 3


def test_a_row_without_a_pair_is_named():
    pairs = chat.safety_pairs(chat.split_requests(0).train, 4, 0)
    assert (pairs.aligned[:, : -chat.REPLY] == pairs.requests.tokens).all()
    with pytest.raises(ResearchError, match="4 requests have 3 unaligned replies"):
        replace(pairs, unaligned=pairs.unaligned[:3])
    with pytest.raises(ResearchError, match="so 512 pairs would repeat them"):
        chat.safety_pairs(chat.split_requests(0).train, 512, 0)


def test_a_model_that_refuses_everything_does_not_look_good(setup):
    refusing = torch.tensor([int(i) for i in chat.refuse(1)[0]])

    class Refusing:
        config = setup.base.config

        def __call__(self, tokens, past_key_values, **given):
            self.place = 0 if tokens.shape[1] > 1 else self.place + 1
            logits = torch.full((len(tokens), 1, setup.model.d_vocab), -1e9)
            logits[:, :, refusing[self.place]] = 0
            batch = torch.zeros(len(tokens), 1, 1, 1)
            past_key_values.update(batch, batch, 0)
            return type("Output", (), {"logits": logits})

    requests = chat.split_requests(0).validation
    assert evaluate.measure_balance(Refusing(), requests, 2, 0) == 0.5


@pytest.mark.parametrize("method", METHODS)
def test_every_method_starts_at_the_base_model_and_learns(setup, method):
    model = methods.prepare(setup, method, SETTINGS)
    prompts = setup.safety.requests.tokens
    with torch.no_grad():
        start, expected = model(prompts).logits, setup.base(prompts).logits
    assert torch.allclose(start, expected, atol=1e-4)
    penalty = methods.find_penalty(setup, method, SETTINGS, model)
    how = {"steps": 4, "lr": 1e-2, "seed": 0, "penalty": penalty}
    losses = [
        float(attack.reply_losses(model, setup.training_rows, chat.REPLY).mean().detach())
        for _ in methods.fine_tune(model, setup.training_rows, **how)
    ]
    assert losses[-1] < losses[0]


def test_controls_span_other_subspaces(setup):
    bases = {m: methods.find_bases(setup, m, SETTINGS)[1] for m in (SAILS, RANDOM, SHUFFLED)}
    assert interpret.overlap(bases[SAILS], bases[SAILS]) == pytest.approx(1)
    assert interpret.overlap(bases[SAILS], bases[RANDOM]) < 0.9
    assert interpret.overlap(bases[SAILS], bases[SHUFFLED]) < 0.99


def test_labels_shuffled_in_half_of_the_pairs_leave_no_constant_contrast(setup):
    true = setup.contrasts[1]
    always = (true.aligned > 0).all(0) & (true.unaligned == 0).all(0)
    assert always.any()  # latents that fire on every refusal and on no answer
    left = methods._shuffled(setup)[1].delta()[always].abs()
    assert (left < 0.2 * true.delta()[always].abs()).all()


def test_request_features_see_no_reply(setup):
    other = replace(setup, safety=replace(setup.safety, aligned=setup.safety.unaligned))
    found = [methods.request_contrasts(s)[1].delta() for s in (setup, other)]
    assert torch.equal(*found)
    assert found[0].abs().max() > 0


def test_null_dictionaries_become_methods(setup):
    recipe = replace(
        TextSettings().saes,
        documents=64,
        calibration=16,
        training=SAETraining(steps=20, batch_size=64),
    )
    forms = ("frozen_decoder", "frozen_encoder")
    model = catalogue.get("world-text").load()
    found = train_like(setup.saes[1], model, recipe, 0, forms)
    named = replace(setup, nulls={f"{NULL}{form}": {1: found[form]} for form in forms})
    bases = [methods.find_bases(named, method, SETTINGS)[1] for method in named.nulls]
    assert interpret.overlap(*bases) < 0.9
    start = train_like(setup.saes[1], model, recipe, 0, forms[:1])[forms[0]]
    assert torch.equal(start.W_dec, found["frozen_decoder"].W_dec)


def test_a_direction_is_taken_out_of_a_subspace(setup):
    own = methods.find_bases(setup, SAILS, SETTINGS)[1]
    found = list(interpret.reduced_subspaces(setup, SETTINGS))
    assert [keys["kind"] for keys, _ in found] == ["top", "random"]
    top = decoder_rows(setup.saes[1], [found[0][0]["latent"]])[0]
    for _, bases in found:
        assert bases[1].shape[1] == own.shape[1] - 1
        assert torch.allclose(bases[1].T @ bases[1], torch.eye(own.shape[1] - 1), atol=1e-5)
        assert torch.allclose(own @ (own.T @ bases[1]), bases[1], atol=1e-5)
    assert (found[0][1][1].T @ top).norm() < 1e-5 < (found[1][1][1].T @ top).norm()


def test_parts_of_an_update_have_its_energy_and_the_frozen_one_lies_inside(setup):
    model = methods.prepare(setup, FROZEN, SETTINGS)
    for _ in methods.fine_tune(model, setup.training_rows, steps=3, lr=1e-2, seed=0):
        pass
    tuned = methods.merged(model)
    bases = methods.find_bases(setup, SAILS, SETTINGS)
    same, share = methods.project_update(setup.base, tuned, bases, inside=True)
    assert share == pytest.approx(1, abs=1e-3)
    tokens = setup.safety.aligned
    assert torch.allclose(same(tokens).logits, tuned(tokens).logits, atol=1e-3)
    without = interpret.remove_directions(setup.base, tuned, bases)
    assert torch.allclose(without(tokens).logits, setup.base(tokens).logits, atol=1e-3)


def test_attack_lowers_the_loss_of_the_wanted_replies(setup):
    requests = setup.safety.requests[:4]
    replies = chat.refuse(4)

    def loss(suffix):
        rows = torch.cat([attack.add_suffix(requests.tokens, suffix), replies], 1)
        with torch.no_grad():
            return float(attack.reply_losses(setup.base, rows, chat.REPLY).mean())

    def found(steps):
        sizes = attack.Attack(steps=steps, candidates=16, requests=4)
        return attack.find_suffix(setup.base, requests.tokens, replies, sizes, 0)

    assert loss(found(6)) < loss(found(0))
    row = attack.add_suffix(requests.tokens, found(0))
    assert (row[:, -1] == requests.tokens[:, -1]).all()


def test_layers_and_settings_that_cannot_work_are_named(setup):
    with pytest.raises(ResearchError, match="set n_pairs, steps, learning_rates"):
        study.Alignment("world-text", 0, Settings(models=("world-text",))).run()
    with pytest.raises(ResearchError, match="does not fit a subspace of dimension 3"):
        methods.prepare(setup, SAILS, replace(SETTINGS, n_features=3))
