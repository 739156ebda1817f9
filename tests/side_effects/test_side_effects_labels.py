"""Labels, predictors and forecasts of study 2 against closed forms and full forward passes."""

import numpy as np
import pytest
import torch
from side_effects_toys import HOOK, READ, D, make_sae, unit
from test_last_token import tiny

from sae_research import jacobians, latents
from sae_research.last_token import LastToken
from sae_research.screening import forecasters, labels, pool, predictors
from sae_research.screening.screen import LABELS
from sae_research.studies.side_effects import prediction

# engine and labels


def test_identity_upper_layers_give_the_closed_form_count(identity, tokens):
    torch.manual_seed(9)
    decoder = unit(torch.randn(64, D))
    downstream = make_sae(identity, READ, decoder, bias=-0.05)
    engine = LastToken(identity, HOOK, (READ,))
    encode_panel = latents.make_latent_encoder(downstream, torch.arange(64))
    directions, contexts = 0.5 * unit(torch.randn(5, D)), torch.arange(40).expand(5, -1)
    found = labels.measure_effects(engine, encode_panel, tokens, directions, contexts, (0.1,))
    x = identity.residual(tokens[:40], HOOK)[:, -1]
    for f in range(5):
        before, after = (
            torch.relu((h - downstream.b_dec) @ decoder.T - 0.05) for h in (x, x + directions[f])
        )
        assert torch.equal(found.counts[f, :, 0], ((after - before).abs() > 0.1).sum(1).float())
    forecast = forecasters.count_moved(encode_panel, x, directions, 0.1)
    assert forecast == pytest.approx(found.counts[:, :, 0].mean(1).numpy())


def test_orthonormal_decoder_has_no_crowding_and_moves_one_latent(identity, tokens):
    torch.manual_seed(10)
    decoder = torch.linalg.qr(torch.randn(D, D))[0]
    assert float(latents.measure_crowding(decoder, torch.arange(D)).max()) < 1e-6
    downstream = make_sae(identity, READ, decoder, bias=100.0)  # never silent
    found = labels.measure_effects(
        LastToken(identity, HOOK, (READ,)),
        latents.make_latent_encoder(downstream, torch.arange(D)),
        tokens,
        0.5 * decoder,
        torch.arange(20).expand(D, -1),
        (0.05,),
    )
    assert (found.counts == 1).all()


def test_planted_clusters_spread_and_random_directions_do_not(identity, tokens):
    """With identity layers a crowded direction moves its neighbours too: the paper's mechanism."""
    torch.manual_seed(11)
    centres = unit(torch.randn(10, D))
    share = torch.linspace(0, 2.0, 120)[:, None]
    decoder = unit(torch.randn(120, D) / D**0.5 + share * centres[torch.arange(120) % 10])
    downstream = make_sae(identity, READ, decoder, bias=100.0)
    engine = LastToken(identity, HOOK, (READ,))
    encode_panel = latents.make_latent_encoder(downstream, torch.arange(120))
    contexts = torch.arange(4).expand(120, -1)
    crowding = latents.measure_crowding(decoder, torch.arange(120)).mean(1).numpy()
    count = (
        labels.measure_effects(engine, encode_panel, tokens, 0.5 * decoder, contexts, (0.25,))
        .counts.mean((1, 2))
        .numpy()
    )
    random = labels.draw_random_directions(0.5 * decoder, seed=0)
    control = (
        labels.measure_effects(engine, encode_panel, tokens, random, contexts, (0.25,))
        .counts.mean((1, 2))
        .numpy()
    )
    assert prediction.spearman(crowding, count, 0, 500).low > 0.5
    rho = prediction.spearman(crowding, control, 0, 500)
    assert rho.low <= 0 <= rho.high


def test_pure_noise_is_unstable_only_if_a_context_is_left_out_of_its_mean():
    torch.manual_seed(12)
    n = 48
    found = [labels.compute_stability(D @ D.T) for D in torch.randn(200, n, 2000)]
    mean = {name: np.mean([f[name] for f in found]) for name in found[0]}
    assert mean["S_loo"] == pytest.approx(0, abs=0.01)
    assert mean["pair"] == pytest.approx(0, abs=0.01)
    assert mean["S"] == pytest.approx(1 / n**0.5, abs=0.01)
    assert mean["S_abs"] == pytest.approx(mean["S"], abs=0.01)


def test_stability_is_the_definition():
    torch.manual_seed(13)
    D = torch.randn(7, 30, dtype=torch.float64) + 0.4
    found = labels.compute_stability(D @ D.T)
    cos, norm = torch.nn.functional.cosine_similarity, D.norm(dim=1)
    assert found["E"] == pytest.approx(float(norm.mean()))
    assert found["E_cv"] == pytest.approx(float(norm.std(correction=0) / norm.mean()))
    assert found["S"] == pytest.approx(float(cos(D, D.mean(0)[None]).mean()))
    assert found["S_abs"] == pytest.approx(float(cos(D, D.mean(0)[None]).abs().mean()))
    alone = torch.stack([cos(D[i], (D.sum(0) - D[i]) / 6, dim=0) for i in range(7)])
    assert found["S_loo"] == pytest.approx(float(alone.mean()))
    pairs = torch.stack([cos(D[i], D[j], dim=0) for i in range(7) for j in range(7) if i != j])
    assert found["pair"] == pytest.approx(float(pairs.mean()))
    assert found["pair_abs"] == pytest.approx(float(pairs.abs().mean()))


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2"])
def test_labels_equal_those_from_full_logits(architecture, tokens):
    from sae_research.last_token import run_naive

    model = tiny(architecture)
    torch.manual_seed(14)
    downstream = make_sae(model, READ, unit(torch.randn(40, D)))
    engine = LastToken(model, HOOK, (READ,))
    encode_panel = latents.make_latent_encoder(downstream, torch.arange(40))
    directions, contexts = (
        0.5 * torch.randn(3, D),
        torch.stack([torch.randperm(30)[:9] for _ in range(3)]),
    )
    found = labels.compute_labels(
        engine, labels.measure_effects(engine, encode_panel, tokens, directions, contexts, (0.05,))
    )
    for f in range(3):
        rows = tokens[contexts[f]]
        (l0, (h0,)), (l1, (h1,)) = (
            run_naive(model, HOOK, (READ,), rows, d) for d in (0 * directions[f], directions[f])
        )
        truth = labels.compute_stability((l1 - l0).double() @ (l1 - l0).double().T)
        for name, value in truth.items():
            assert found[name][f] == pytest.approx(value, rel=1e-4, abs=1e-5), name
        p0, p1 = l0.log_softmax(-1), l1.log_softmax(-1)
        assert found["KL"][f] == pytest.approx(
            float((p0.exp() * (p0 - p1)).sum(-1).mean()), rel=1e-3, abs=1e-6
        )
        assert found["KL_reverse"][f] == pytest.approx(
            float((p1.exp() * (p1 - p0)).sum(-1).mean()), rel=1e-3, abs=1e-6
        )
        count = ((downstream.encode(h1) - downstream.encode(h0)).abs() > 0.05).sum(1).float().mean()
        assert found["C"][f] == pytest.approx(float(count), abs=1e-6)
        assert found["C_per_E"][f] == pytest.approx(float(count) / truth["E"], rel=1e-4)


# contexts and predictors


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk"])
def test_latent_encoder_equals_the_sae_itself(model, kind):
    torch.manual_seed(15)
    sae, x, columns = (
        make_sae(model, HOOK, unit(torch.randn(50, D)), kind=kind),
        torch.randn(6, 3, D),
        torch.tensor([4, 9, 31]),
    )
    assert torch.allclose(
        latents.make_latent_encoder(sae, columns)(x), sae.encode(x)[..., columns], atol=1e-6
    )


def test_moments_are_the_statistics_of_all_tokens(model, tokens):
    torch.manual_seed(16)
    primary = make_sae(model, HOOK, unit(torch.randn(48, D)))
    downstream = make_sae(model, READ, unit(torch.randn(48, D)))
    found = pool.run_clean_pass(
        LastToken(model, HOOK, (READ,)), primary, downstream, tokens, batch_size=100
    )
    acts = primary.encode(model.residual(tokens, HOOK)).double()
    a = acts[:, 1:].flatten(0, 1).numpy()
    got = found.sums.compute_statistics(torch.arange(48))
    assert got["mean"] == pytest.approx(a.mean(0), rel=1e-5)
    assert got["std"] == pytest.approx(a.std(0), rel=1e-4)
    assert got["max"] == pytest.approx(a.max(0), rel=1e-5)
    assert got["frequency"] == pytest.approx((a > 1e-6).mean(0))
    active = a.std(0) > 0
    kurtosis = ((a - a.mean(0)) ** 4).mean(0) / a.var(0) ** 2
    assert got["kurtosis"][active] == pytest.approx(kurtosis[active], rel=1e-3)
    share = a / np.maximum(a.sum(0), 1e-12)
    entropy = -np.where(share > 0, share * np.log(np.where(share > 0, share, 1)), 0).sum(
        0
    ) / np.log(len(a))
    assert got["entropy"][active] == pytest.approx(entropy[active], rel=1e-3, abs=1e-6)
    assert torch.equal(found.fires, acts[:, -1] > 1e-6)
    assert found.l0[0] == pytest.approx(float((acts[:, -1] > 1e-6).sum(1).float().mean()))


def test_chosen_contexts_are_different_and_hold_the_most_active():
    torch.manual_seed(17)
    activations = torch.relu(torch.randn(100, 12) - 1.5)
    chosen = pool.choose_contexts(activations, 8, seed=0)
    assert chosen.shape == (12, 24)
    for f in range(12):
        assert len(set(chosen[f].tolist())) == 24
        assert set(activations[:, f].topk(2).indices.tolist()) <= set(chosen[f, :8].tolist())
    assert torch.equal(chosen, pool.choose_contexts(activations, 8, seed=0))


def test_coactivation_of_both_protocols():
    fires = torch.tensor([[1, 1, 0, 1], [1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 0, 0]], dtype=torch.bool)
    alone = predictors.measure_coactivation(fires, torch.tensor([0]), 4, "replication")
    q = np.array([2, 1]) / 3  # with latent 0: latent 1 twice, latent 3 once
    assert alone["coactivation_entropy"][0] == pytest.approx(
        -(q * np.log(q)).sum() / np.log(4), rel=1e-5
    )
    assert alone["coactivation_count"][0] == pytest.approx(1.0)
    published = predictors.measure_coactivation(fires, torch.tensor([0]), 4, "author")
    assert published["coactivation_count"][0] == pytest.approx(2.0), (
        "the feature itself counts there"
    )


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2"])
def test_folded_unembedding_gives_the_models_own_logits(architecture, tokens):
    model = tiny(architecture)
    with torch.no_grad():
        for p in model.bridge.ln_final.parameters():
            p.add_(0.1 * torch.randn_like(p))
    engine, W = LastToken(model, HOOK, (READ,)), latents.fold_unembedding(model)
    x = torch.randn(5, D)
    logits = (
        engine.logits(model.bridge.ln_final(x))
        if engine.softcap is None
        else model.bridge.ln_final(x) @ engine.W_U
    )
    bias = engine.logits(model.bridge.ln_final(torch.zeros(1, D)))
    centred = x - x.mean(1, keepdim=True) if architecture == "gpt2" else x
    scale = (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    truth = logits - bias if architecture == "gpt2" else logits
    assert torch.allclose(x / scale @ W, truth - truth.mean(1, keepdim=True), atol=1e-3)


def test_no_predictor_sees_a_label(screened):
    frame = screened.frame
    assert len(predictors.SETS) == 10
    assert set(predictors.BASELINES) <= set(predictors.SETS)
    columns = {c for names in predictors.SETS.values() for c in names}
    assert columns <= set(frame.columns)
    assert not columns & set(LABELS)
    assert not set(predictors.SETS["full_no_magnitude"]) & set(predictors.MAGNITUDE)
    assert len(predictors.SETS["compact_no_magnitude"]) == 16
    assert frame[list(columns)].notna().all().all()


# forecasters


def test_jacobians_of_identity_layers_are_the_identity(identity, tokens):
    engine = LastToken(identity, HOOK, (READ,))
    J = jacobians.measure_jacobians(engine, tokens[:2])
    assert torch.allclose(J.read, torch.eye(D).expand(2, D, D), atol=1e-3)
    assert torch.allclose(
        jacobians.fit_random_map(engine, tokens[:4], 0.5, 128, 0, ridge=1e-6),
        torch.eye(D),
        atol=1e-3,
    )


def test_jacobians_are_the_slope_of_the_engine(model, tokens):
    engine = LastToken(model, HOOK, (READ,))
    J = jacobians.measure_jacobians(engine, tokens[:3])
    record, direction = engine.record(tokens[:3]), 1e-2 * unit(torch.randn(1, D))
    zero = torch.zeros(3, dtype=torch.long)
    ((rows, state),) = engine.steer(record, torch.arange(3), zero, direction)
    predicted = direction @ J.read[rows]
    assert torch.allclose(
        state.reads[0] - record.clean.reads[0][rows], predicted[:, 0], rtol=0.1, atol=2e-3
    )
