"""Study 2 against analytic truths: identity upper layers, orthonormal dictionaries, planted mechanisms, pure noise."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from test_last_token import tiny

from sae_research import claims, config, saes
from sae_research.errors import ResearchError
from sae_research.last_token import LastToken
from sae_research.models import LanguageModel
from sae_research.studies.side_effects import (
    analysis,
    batch,
    card,
    corpus,
    findings,
    forecasters,
    labels,
    models,
    pool,
    predictors,
    screening,
    study,
)
from sae_research.studies.side_effects.settings import Settings

D, HOOK, READ = 32, "blocks.1.hook_resid_post", "blocks.3.hook_resid_post"
SETTINGS = replace(
    Settings(),
    protocol="replication",
    contexts=256,
    length=8,
    features=60,
    band=(0.01, 0.9),
    each=4,
    panel=96,
    residual_share=0.2,
    panel_share=0.02,
    draws=200,
    linear_contexts=4,
)


def sae_of(
    lens: LanguageModel, hook: str, decoder: torch.Tensor, bias: float = 0.0, kind: str = "relu"
):
    """A tied dictionary with these decoder rows."""
    from sae_lens import (
        JumpReLUSAE,
        JumpReLUSAEConfig,
        StandardSAE,
        StandardSAEConfig,
        TopKSAE,
        TopKSAEConfig,
    )

    given = {"d_in": decoder.shape[1], "d_sae": len(decoder), "metadata": saes.metadata(lens, hook)}
    if kind == "relu":
        sae = StandardSAE(StandardSAEConfig(**given))
    elif kind == "topk":
        sae = TopKSAE(TopKSAEConfig(k=6, **given))
    else:
        sae = JumpReLUSAE(JumpReLUSAEConfig(**given))
        sae.threshold.data = torch.full((len(decoder),), 0.3)
    sae.W_dec.data, sae.W_enc.data = decoder.clone(), decoder.T.clone()
    sae.b_enc.data = torch.full((len(decoder),), bias)
    return sae.eval().requires_grad_(False)


def silence_upper_blocks(lens: LanguageModel, start: int) -> LanguageModel:
    """Make the blocks from `start` on add nothing to the residual."""
    with torch.no_grad():
        for layer in lens.bridge.original_model.model.layers[start:]:
            for name, weight in layer.named_parameters():
                if "o_proj" in name or "down_proj" in name:
                    weight.zero_()
    return lens


@pytest.fixture(scope="module")
def lens():
    return tiny("llama")


@pytest.fixture(scope="module")
def identity():
    return silence_upper_blocks(tiny("llama"), 2)


@pytest.fixture(scope="module")
def tokens():
    torch.manual_seed(7)
    return torch.randint(3, 101, (256, 8))


def unit(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


@pytest.fixture(scope="module")
def screened(lens, tokens):
    torch.manual_seed(8)
    primary = sae_of(lens, HOOK, unit(torch.randn(96, D)), bias=-0.1)
    downstream = sae_of(lens, READ, unit(torch.randn(96, D)), bias=-0.1, kind="jumprelu")
    return study.screen_dictionary(lens, primary, downstream, tokens, SETTINGS), primary, downstream


# engine and labels


def test_identity_upper_layers_give_the_closed_form_count(identity, tokens):
    torch.manual_seed(9)
    decoder = unit(torch.randn(64, D))
    downstream = sae_of(identity, READ, decoder, bias=-0.05)
    engine = LastToken(identity, HOOK, (READ,))
    codes = pool.reader(downstream, torch.arange(64))
    directions, contexts = 0.5 * unit(torch.randn(5, D)), torch.arange(40).expand(5, -1)
    found = labels.measure(engine, codes, tokens, directions, contexts, (0.1,))
    x = identity.residual(tokens[:40], HOOK)[:, -1]
    for f in range(5):
        before, after = (
            torch.relu((h - downstream.b_dec) @ decoder.T - 0.05) for h in (x, x + directions[f])
        )
        assert torch.equal(found.counts[f, :, 0], ((after - before).abs() > 0.1).sum(1).float())
    forecast = forecasters.identity_count(codes, x, directions, 0.1)
    assert forecast == pytest.approx(found.counts[:, :, 0].mean(1).numpy())


def test_orthonormal_dictionary_has_no_crowding_and_moves_one_latent(identity, tokens):
    torch.manual_seed(10)
    decoder = torch.linalg.qr(torch.randn(D, D))[0]
    assert float(predictors.crowding(decoder, torch.arange(D)).max()) < 1e-6
    downstream = sae_of(identity, READ, decoder, bias=100.0)  # never silent
    found = labels.measure(
        LastToken(identity, HOOK, (READ,)),
        pool.reader(downstream, torch.arange(D)),
        tokens,
        0.5 * decoder,
        torch.arange(20).expand(D, -1),
        (0.05,),
    )
    assert (found.counts == 1).all()


def test_planted_clusters_spread_and_random_directions_do_not(identity, tokens):
    """With identity layers a crowded direction moves its neighbours too: the paper's mechanism, planted."""
    torch.manual_seed(11)
    centres = unit(torch.randn(10, D))
    share = torch.linspace(0, 2.0, 120)[:, None]
    decoder = unit(torch.randn(120, D) / D**0.5 + share * centres[torch.arange(120) % 10])
    downstream = sae_of(identity, READ, decoder, bias=100.0)
    engine, codes = LastToken(identity, HOOK, (READ,)), pool.reader(downstream, torch.arange(120))
    contexts = torch.arange(4).expand(120, -1)
    crowding = predictors.crowding(decoder, torch.arange(120)).mean(1).numpy()
    count = (
        labels.measure(engine, codes, tokens, 0.5 * decoder, contexts, (0.25,))
        .counts.mean((1, 2))
        .numpy()
    )
    random = labels.matched_random(0.5 * decoder, seed=0)
    control = (
        labels.measure(engine, codes, tokens, random, contexts, (0.25,)).counts.mean((1, 2)).numpy()
    )
    assert models.interval_of(crowding, count, 0, 500).low > 0.5
    assert not models.interval_of(crowding, control, 0, 500).excludes(0)


def test_pure_noise_is_unstable_only_if_a_context_is_left_out_of_its_mean():
    torch.manual_seed(12)
    n = 48
    found = [labels.stability(D @ D.T) for D in torch.randn(200, n, 2000)]
    mean = {name: np.mean([f[name] for f in found]) for name in found[0]}
    assert mean["S_loo"] == pytest.approx(0, abs=0.01)
    assert mean["pair"] == pytest.approx(0, abs=0.01)
    assert mean["S"] == pytest.approx(1 / n**0.5, abs=0.01)
    assert mean["S_abs"] == pytest.approx(mean["S"], abs=0.01)


def test_stability_is_the_definition():
    torch.manual_seed(13)
    D = torch.randn(7, 30, dtype=torch.float64) + 0.4
    found = labels.stability(D @ D.T)
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
    from sae_research.last_token import naive

    model = tiny(architecture)
    torch.manual_seed(14)
    downstream = sae_of(model, READ, unit(torch.randn(40, D)))
    engine, codes = LastToken(model, HOOK, (READ,)), pool.reader(downstream, torch.arange(40))
    directions, contexts = (
        0.5 * torch.randn(3, D),
        torch.stack([torch.randperm(30)[:9] for _ in range(3)]),
    )
    found = labels.labels(
        engine, labels.measure(engine, codes, tokens, directions, contexts, (0.05,))
    )
    for f in range(3):
        rows = tokens[contexts[f]]
        (l0, (h0,)), (l1, (h1,)) = (
            naive(model, HOOK, (READ,), rows, d) for d in (0 * directions[f], directions[f])
        )
        truth = labels.stability((l1 - l0).double() @ (l1 - l0).double().T)
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
def test_reader_equals_the_dictionary_itself(lens, kind):
    torch.manual_seed(15)
    sae, x, columns = (
        sae_of(lens, HOOK, unit(torch.randn(50, D)), kind=kind),
        torch.randn(6, 3, D),
        torch.tensor([4, 9, 31]),
    )
    assert torch.allclose(pool.reader(sae, columns)(x), sae.encode(x)[..., columns], atol=1e-6)


def test_moments_are_the_statistics_of_all_tokens(lens, tokens):
    torch.manual_seed(16)
    primary = sae_of(lens, HOOK, unit(torch.randn(48, D)))
    downstream = sae_of(lens, READ, unit(torch.randn(48, D)))
    found = pool.read(LastToken(lens, HOOK, (READ,)), primary, downstream, tokens, batch=100)
    codes = primary.encode(lens.residual(tokens, HOOK)).double()
    a = codes[:, 1:].flatten(0, 1).numpy()
    got = found.moments.statistics(torch.arange(48))
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
    assert torch.equal(found.fires, codes[:, -1] > 1e-6)
    assert found.l0[0] == pytest.approx(float((codes[:, -1] > 1e-6).sum(1).float().mean()))


def test_mixed_contexts_are_different_and_hold_the_most_active():
    torch.manual_seed(17)
    activations = torch.relu(torch.randn(100, 12) - 1.5)
    chosen = pool.mixed_contexts(activations, 8, seed=0)
    assert chosen.shape == (12, 24)
    for f in range(12):
        assert len(set(chosen[f].tolist())) == 24
        assert set(activations[:, f].topk(2).indices.tolist()) <= set(chosen[f, :8].tolist())
    assert torch.equal(chosen, pool.mixed_contexts(activations, 8, seed=0))


def test_coactivation_of_both_protocols():
    fires = torch.tensor([[1, 1, 0, 1], [1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 0, 0]], dtype=torch.bool)
    alone = predictors.coactivation(fires, torch.tensor([0]), 4, "replication")
    q = np.array([2, 1]) / 3  # with latent 0: latent 1 twice, latent 3 once
    assert alone["coactivation_entropy"][0] == pytest.approx(
        -(q * np.log(q)).sum() / np.log(4), rel=1e-5
    )
    assert alone["coactivation_count"][0] == pytest.approx(1.0)
    published = predictors.coactivation(fires, torch.tensor([0]), 4, "author")
    assert published["coactivation_count"][0] == pytest.approx(2.0), (
        "the feature itself counts there"
    )


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2"])
def test_folded_unembedding_gives_the_models_own_logits(architecture, tokens):
    model = tiny(architecture)
    with torch.no_grad():
        for p in model.bridge.ln_final.parameters():
            p.add_(0.1 * torch.randn_like(p))
    engine, W = LastToken(model, HOOK, (READ,)), predictors.unembedding(model)
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
    frame = screened[0].frame
    assert len(predictors.SETS) == 10
    assert set(predictors.BASELINES) <= set(predictors.SETS)
    columns = {c for names in predictors.SETS.values() for c in names}
    assert columns <= set(frame.columns)
    assert not columns & set(study.LABELS)
    assert not set(predictors.SETS["full_no_magnitude"]) & set(predictors.MAGNITUDE)
    assert len(predictors.SETS["compact_no_magnitude"]) == 16
    assert frame[list(columns)].notna().all().all()


# forecasters


def test_jacobians_of_identity_layers_are_the_identity(identity, tokens):
    engine = LastToken(identity, HOOK, (READ,))
    J = forecasters.jacobians(engine, tokens[:2])
    assert torch.allclose(J.read, torch.eye(D).expand(2, D, D), atol=1e-3)
    assert torch.allclose(
        forecasters.random_map(engine, tokens[:4], 0.5, 128, 0, ridge=1e-6), torch.eye(D), atol=1e-3
    )


def test_jacobians_are_the_slope_of_the_engine(lens, tokens):
    engine = LastToken(lens, HOOK, (READ,))
    J = forecasters.jacobians(engine, tokens[:3])
    record, direction = engine.record(tokens[:3]), 1e-2 * unit(torch.randn(1, D))
    zero = torch.zeros(3, dtype=torch.long)
    ((rows, state),) = engine.steer(record, torch.arange(3), zero, direction)
    predicted = direction @ J.read[rows]
    assert torch.allclose(
        state.reads[0] - record.clean.reads[0][rows], predicted[:, 0], rtol=0.1, atol=2e-3
    )


# predictive models


def table(n: int = 200, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        rng.standard_normal((n, len(predictors.ALL))), columns=list(predictors.ALL)
    )
    frame["E"] = rng.uniform(1, 2, n)
    frame["natural_mean"] = rng.standard_normal(n)
    return frame


def test_ridge_and_folds_equal_scikit_learn():
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import KFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    frame = table()
    X, y = models.columns_of(frame, "full_no_magnitude"), frame["crowding"] * 2 + frame["E"]
    reference = cross_val_predict(
        make_pipeline(StandardScaler(), Ridge(1.0)), X, y, cv=KFold(5, shuffle=True, random_state=0)
    )
    _, ours = models.cross_predict(X, y.to_numpy()[:, None], models.folds(200, 0))
    assert ours[:, 0] == pytest.approx(reference)


def test_nuisances_are_removed_inside_the_fold():
    frame = table(400)
    y = (5 * frame["E"] + 0.1 * np.random.default_rng(1).standard_normal(400)).to_numpy()[:, None]
    X = np.column_stack([frame["E"], frame["crowding"]])  # a predictor that knows the nuisance only
    splits = models.folds(400, 0)
    plain = models.scores(*(v[:, 0] for v in models.cross_predict(X, y, splits)), splits)["pooled"]
    target, predicted = models.cross_predict(X, y, splits, frame[["E"]].to_numpy())
    assert plain > 0.95
    assert abs(models.scores(target[:, 0], predicted[:, 0], splits)["pooled"]) < 0.15
    test = splits[0][1]
    changed = y.copy()
    changed[test] += 100
    again = models.cross_predict(X, changed, splits[:1], frame[["E"]].to_numpy())[1]
    assert again[test] == pytest.approx(
        models.cross_predict(X, y, splits[:1], frame[["E"]].to_numpy())[1][test]
    )
    leaked = models.cross_predict(X, changed, splits[:1], frame[["E"]].to_numpy(), everywhere=True)[
        1
    ]
    assert np.abs(leaked[test] - again[test]).max() > 1, (
        "the published variant does look at held-out labels"
    )


def test_frequency_only_mechanism_is_not_beaten_by_the_full_set():
    frame = table(300)
    frame["C"] = frame["token_frequency"] + 0.5 * np.random.default_rng(2).standard_normal(300)
    gain = models.gains(frame, ("C",), baselines=("freq_only",), draws=500).iloc[0]
    assert gain["low"] <= 0
    frame["C"] = frame["crowding"] + 0.5 * np.random.default_rng(2).standard_normal(300)
    gain = models.gains(frame, ("C",), baselines=("freq_only",), draws=500).iloc[0]
    assert gain["low"] > 0.3
    assert gain["holm"] < 0.01


def test_boosted_trees_see_a_bend_that_ridge_does_not_and_nothing_in_noise():
    frame, rng = table(300), np.random.default_rng(5)
    frame["C"] = frame["crowding"] ** 2 + 0.1 * rng.standard_normal(300)
    frame["S_abs"] = rng.standard_normal(300)
    found = models.boosted(frame, ("C", "S_abs"), draws=300).set_index("target")
    assert found.loc["C", "low"] > 0.1
    assert abs(found.loc["S_abs", "boosted"]) < 0.2


def test_permuted_labels_are_not_predicted():
    frame = table(300)
    frame["C"] = frame["crowding"]
    null = models.permuted(frame, "C", draws=200)
    assert abs(null.mean()) < 0.05
    low, high = np.quantile(null, [0.025, 0.975])
    assert low < 0 < high


def test_a_constant_score_is_undefined_not_zero():
    assert np.isnan(models.rank_correlation(np.ones(5), np.arange(5.0)))


def test_partial_correlation_sees_through_a_common_cause():
    rng = np.random.default_rng(3)
    frame = table(400)
    frame["crowding"] = frame["E"] + 0.3 * rng.standard_normal(400)
    frame["C"] = frame["E"] + 0.3 * rng.standard_normal(400)
    raw = models.univariate(frame, ("C",), ("crowding",), draws=300).iloc[0]
    partial = models.univariate(frame, ("C",), ("crowding",), controls=("E",), draws=300).iloc[0]
    assert raw["low"] > 0.2
    assert partial["low"] < 0 < partial["high"]


# screening


def labelled(n: int = 300, signal: float = 1.0) -> pd.DataFrame:
    frame, rng = table(n), np.random.default_rng(4)
    frame["S_abs"] = 0.5 + 0.1 * signal * frame["crowding"] + 0.02 * rng.standard_normal(n)
    frame["C"] = np.exp(1 - 0.5 * signal * frame["crowding"] + 0.05 * rng.standard_normal(n))
    return frame.assign(S=frame["S_abs"], C_per_E=frame["C"] / frame["E"], KL_per_E=rng.random(n))


def test_groups_are_held_out_disjoint_and_matched():
    frame, rule = labelled(), screening.Rule()
    groups = screening.split(frame, rule, seed=0)
    assert len(groups.train) == 180
    assert len(groups.clean) == len(groups.messy) == len(groups.random) == 32, (
        "floor(96 / 3), as published for GPT-2"
    )
    together = np.concatenate([groups.train, groups.clean, groups.messy, groups.random])
    assert len(set(together)) == len(together)
    assert set(groups.clean) | set(groups.messy) | set(groups.random) <= set(groups.candidates)


def test_a_true_signal_pays_and_permuted_labels_do_not():
    paid = screening.repeated(labelled(), screening.Rule(), 20, 0)
    assert screening.over_splits(paid["S_abs: clean - messy"]).low > 0.1
    assert paid["share_of_oracle"].mean() > 0.9
    null = screening.repeated(labelled(), screening.Rule(), 40, 0, permute=True)
    assert abs(null["share_of_oracle"].mean()) < 0.15
    curve = screening.top_k(labelled(), screening.Rule(), (5, 20, 40), 10, 0)
    assert (curve["predicted"] <= curve["oracle"] + 1e-12).all()


def test_clean_score_formulas():
    S, C, E = np.array([0.1, 0.5, 0.9]), np.array([5.0, 1.0, 3.0]), np.array([1.0, 2.0, 4.0])

    def z(x):
        return (x - x.mean()) / x.std()

    assert screening.clean_score(S, C, E) == pytest.approx(z(S) - z(np.log1p(C) / E))
    assert screening.clean_score(S, C, E, "log_of_ratio") == pytest.approx(
        z(S) - z(np.log1p(C / E))
    )
    with pytest.raises(ResearchError, match="unknown clean score"):
        screening.clean_score(S, C, E, "other")


def test_verdicts_need_the_axes():
    def comparison(stable, spread):
        rows = [("S_abs", stable, 0.2), ("C_per_E", spread, 0.2)]
        return pd.DataFrame(
            [{"metric": m, "groups": "clean - messy", "difference": d, "p": p} for m, d, p in rows]
        )

    assert screening.verdict(comparison(0.1, -1)) == "strong"
    assert screening.verdict(comparison(0.1, 1)) == "partial"
    assert screening.verdict(comparison(-0.1, 1)) == "weak"
    assert screening.verdict(comparison(0.1, -1), significant=True) == "weak"


# the whole


def test_a_dictionary_goes_through_the_whole_study(screened, tokens):
    found, _, downstream = screened
    frame = found.frame
    assert len(frame) == 60
    for name in (
        *study.LABELS,
        *study.FORECASTS,
        "C@2",
        "E@random",
        "S@a",
        "C@b",
        "C@tau2",
        "output_score",
    ):
        assert np.isfinite(frame[name]).all(), name
    assert (frame["C@4"] >= frame["C@0.5"]).mean() > 0.9
    assert (frame["C@tau0.2"] >= frame["C"]).all()
    assert (frame["C"] >= frame["C@tau4"]).all()
    assert (frame["C@panel24"] <= frame["C@panel48"]).all()
    assert frame["C"].mean() == pytest.approx(0.02 * 96, rel=0.5)
    assert found.facts["step_norm"] == pytest.approx(0.2 * found.facts["residual_norm"], rel=0.05)
    fresh = study.fresh_labels(found, downstream, tokens[:20], np.array([0, 5]))
    assert list(fresh.index) == list(frame.index[[0, 5]])


def test_the_same_seed_gives_the_same_table(lens, tokens, screened):
    found, primary, downstream = screened
    again = study.screen_dictionary(lens, primary, downstream, tokens, SETTINGS)
    pd.testing.assert_frame_equal(found.frame, again.frame)


def test_a_bfloat16_model_is_labelled_in_float32(tokens):
    """Against a float32 twin of the model: rounding below the hook chooses a few other contexts, no more."""
    frames = []
    for twin in (False, True):
        model = tiny("llama", torch.bfloat16)
        if twin:
            model.bridge.to(torch.float32, print_details=False)
        torch.manual_seed(18)
        primary, downstream = (
            sae_of(model, hook, unit(torch.randn(96, D)), bias=-0.1) for hook in (HOOK, READ)
        )
        settings = replace(SETTINGS, features=20)
        frames.append(
            study.screen_dictionary(
                model, primary, downstream, tokens, settings, features=range(20)
            ).frame
        )
    low, high = frames
    assert low["E"].mean() == pytest.approx(high["E"].mean(), rel=0.05)
    assert models.rank_correlation(low["E"].to_numpy(), high["E"].to_numpy()) > 0.8


def test_author_protocol_samples_frequencies_evenly(screened):
    found = screened[0].pool
    chosen = pool.sample(found, (0.01, 0.9), 20, "author", 0)
    assert len(set(chosen.tolist())) == 20
    frequency = found.frequency[pool.eligible(found, (0.01, 0.9))]
    assert float(found.frequency[chosen].max()) == float(frequency.max())
    assert float(found.frequency[chosen].min()) == float(frequency.min())


def test_bad_input_is_one_sentence(lens, tokens, screened):
    _, primary, downstream = screened
    with pytest.raises(
        ResearchError, match="feature 96 is out of range; this SAE has features 0 to 95"
    ):
        study.screen_dictionary(lens, primary, downstream, tokens, SETTINGS, features=[3, 96])
    with pytest.raises(ResearchError, match="fewer than the 500 features"):
        study.screen_dictionary(lens, primary, downstream, tokens, replace(SETTINGS, features=500))
    with pytest.raises(ResearchError, match="below the edit"):
        study.screen_dictionary(lens, downstream, primary, tokens, SETTINGS)
    wide = sae_of(lens, HOOK, torch.randn(10, D + 1))
    with pytest.raises(ResearchError, match="reads 33 dimensions"):
        study.screen_dictionary(lens, wide, downstream, tokens, SETTINGS)
    elsewhere = sae_of(lens, "blocks.9.hook_resid_post", torch.randn(10, D))
    with pytest.raises(ResearchError, match=r"no hook 'blocks\.9\.hook_resid_post'"):
        study.screen_dictionary(lens, elsewhere, downstream, tokens, SETTINGS)
    with pytest.raises(ResearchError, match="at least two tokens"):
        study.screen_dictionary(lens, primary, downstream, tokens[:, :1], SETTINGS)
    with pytest.raises(ResearchError, match="too few for 12"):
        study.screen_dictionary(
            lens, primary, downstream, tokens[:10], replace(SETTINGS, features=3)
        )


def test_a_wrong_dictionary_is_stopped_at_the_gate():
    from sae_research.catalogue import get

    facts = {"l0_primary": 71.0, "l0_downstream": 60.5, "eligible": 7400, "contexts": 2048}
    assert len(study.gate(get("gpt2-small"), facts)) == 3
    with pytest.raises(ResearchError, match=r"l0_primary 20.0 where 71.8 is expected"):
        study.gate(get("gpt2-small"), facts | {"l0_primary": 20.0})


# screening any model, and the feature card


@pytest.fixture(scope="module")
def screening_of_all(lens, tokens, screened):
    _, primary, downstream = screened
    return card.screen(lens, primary, tokens, downstream, replace(SETTINGS, features=40))


def test_the_ranked_table_forecasts_every_eligible_feature(screening_of_all):
    found = screening_of_all
    assert len(found.table) == found.screened.facts["eligible"]
    assert len(found.table) > 40
    assert found.table["rank"].tolist() == sorted(found.table["rank"])
    assert (found.table["C low"] <= found.table["C"]).all()
    assert found.table["C measured"].notna().sum() == 40
    inside = found.table.dropna()
    assert (
        (inside["C measured"] >= inside["C low"]) & (inside["C measured"] <= inside["C high"])
    ).mean() > 0.8
    assert set(found.quality) == set(card.FORECAST)


def test_the_card_is_complete_json_and_one_page(screening_of_all, tmp_path):
    found = screening_of_all
    steered = int(found.screened.frame.index[0])
    other = int(found.table.index.difference(found.screened.frame.index)[0])
    for feature in (steered, other):
        content = card.card(found, feature, SETTINGS)
        assert [point["dose"] for point in content["dose_curve"]] == [0.5, 1, 2, 4]
        assert set(content["measured"]) == set(study.LABELS)
        assert set(content["predictors"]) == set(predictors.ALL)
        assert content["verdict"].split(":")[0] in ("clean", "messy", "undecided")
        json_file, page = card.save(content, tmp_path)
        assert json.loads(json_file.read_text()) == json.loads(json.dumps(content))
        text = page.read_text()
        assert text.startswith("<!doctype html>")
        assert "http" not in text
        assert "src=" not in text
    measured = found.screened.frame.loc[steered, "C"]
    assert card.card(found, steered, SETTINGS)["measured"]["C"] == pytest.approx(measured)
    with pytest.raises(ResearchError, match="feature 4000 is out of range"):
        card.card(found, 4000, SETTINGS)


def test_screening_takes_texts_and_no_downstream_dictionary(lens, screened):
    texts = [" ".join(f"w{(i * j) % 90 + 3}" for j in range(1, 12)) for i in range(1, 300)]
    found = card.screen(lens, screened[1], texts, settings=replace(SETTINGS, features=20))
    assert found.table["C"].notna().all()
    with pytest.raises(ResearchError, match="fewer than the 9999 asked for"):
        card.screen(lens, screened[1], texts, settings=replace(SETTINGS, contexts=9999))


# where contexts and dictionaries come from


def test_dictionaries_of_the_published_settings():
    from sae_research.catalogue import get

    primaries, downstream = corpus.dictionaries(get("llama-3.1-8b"), Settings())
    assert list(primaries) == ["primary", "llama-3.1-8b-32x/primary"]
    assert primaries["llama-3.1-8b-32x/primary"][0].name == "llama-3.1-8b-32x"
    assert downstream == "downstream"
    gpt2 = list(corpus.dictionaries(get("gpt2-small"), Settings())[0])
    assert gpt2 == [
        "primary",
        *(f"width_{n}" for n in (768, 1536, 3072, 6144, 12288, 24576, 49152, 98304)),
    ]
    with pytest.raises(ResearchError, match="but none of the primaries"):
        corpus.dictionaries(get("gpt2-small"), replace(Settings(), downstream=("block3_topk",)))


def test_the_authors_protocol_follows_each_script():
    from sae_research.catalogue import get

    paper = Settings()
    assert corpus.as_published(get("gpt2-small"), paper).selector == "geometry_only"
    llama = corpus.as_published(get("llama-3.1-8b"), paper)
    assert (llama.panel, llama.clean_score, llama.held_out) == (1024, "log_of_ratio", 0.3)
    alike = replace(paper, protocol="replication")
    assert corpus.as_published(get("gpt2-small"), alike) == alike
    assert corpus.as_published(get("llama-3.1-8b"), alike) == replace(alike, panel=1024)
    assert corpus.as_published(get("world-text"), paper) == paper


def test_contexts_of_both_protocols(lens):
    texts = [f"w{i} " + "w5 " * (i % 14) for i in range(10, 60)]
    stream = corpus.of_texts(lens, texts, 10, replace(SETTINGS, protocol="author"), seed=0)
    begin = corpus.of_texts(lens, texts, 10, SETTINGS, seed=0)
    assert stream.shape == begin.shape == (10, 8)
    assert (stream[:, 0] == lens.bos).all()
    assert (begin[:, 0] == lens.bos).all()
    assert (begin[:, -1] != lens.pad).all()


# the tables of a run, and the claims


@pytest.fixture(scope="module")
def parts(lens, tokens, screened):
    """Two dictionaries of one subject, the second one wider, as a shard would give them."""
    found, _, downstream = screened
    torch.manual_seed(19)
    settings = replace(SETTINGS, splits=6, permutations=6, group=6)
    wide = sae_of(lens, HOOK, unit(torch.randn(160, D)), bias=-0.1)
    fixed = {"panel": found.panel, "tau": found.facts["tau"]}
    other = study.screen_dictionary(lens, wide, downstream, tokens, settings, **fixed)
    assert torch.equal(other.panel, found.panel)
    made = []
    for order, (name, one) in enumerate((("a_topk", found), ("a_topk_wide", other))):
        tables = analysis.tables(one.frame, settings, 0)
        tables |= analysis.confirmation(one, downstream, tokens[:40], settings, 0)
        key = {"subject": "world-text", "primary": name, "seed": 0}
        made.append(batch.Part(key, one.frame, one.facts | {"order": order}, tables))
    return made


def test_every_claim_is_measured_or_needs_real_weights(parts):
    stated = claims.stated("side_effects")
    found = findings.measurements(analysis.gathered([(p.key, p.tables) for p in parts]))
    assert set(found) == set(stated)
    for name, claim in stated.items():
        assert (found[name] is None) == claim.needs.startswith("real weights"), name
        assert claims.judge(claim, found[name]) in claims.VERDICTS


def test_parts_come_back_from_disk_as_they_were(parts, tmp_path):
    batch.save(parts, tmp_path)
    for one, again in zip(parts, batch.load(tmp_path), strict=True):
        assert one.key == again.key
        assert one.facts == again.facts
        pd.testing.assert_frame_equal(one.frame, again.frame, check_names=False)
        assert set(one.tables) == set(again.tables)
        pd.testing.assert_frame_equal(one.tables["sets"], again.tables["sets"])


def test_a_signature_is_more_than_the_luck_of_the_features():
    def led_by(planted):
        rows = []
        for i, name in enumerate(planted):
            frame, rng = table(200), np.random.default_rng(20 + i)
            frame["C"] = rng.standard_normal(200) + (
                3 * frame[name] / frame[name].std() if name else 0
            )
            rows.append(
                models.leaders(frame, "C", seed=i).assign(subject="m", primary=f"d{i}", seed=0)
            )
        return findings.signature({"leaders": pd.concat(rows)})

    noise = led_by([None] * 4)
    assert noise.value < 0.35, (
        "pure noise names another leader in every dictionary, but in every resample as well"
    )
    planted = led_by(["crowding", "encoder_norm", "crowding", "encoder_norm"])
    assert planted.value == pytest.approx(4 / 6, abs=0.05)
    assert planted.low > 0
    assert led_by(["crowding"] * 4).value == pytest.approx(0, abs=0.02)


def test_clean_scores_of_the_replication_know_nothing_of_held_out_labels():
    frame = labelled()
    rule = screening.Rule(frozen=True)
    groups = screening.split(frame, rule, seed=0)
    changed = frame.copy()
    changed.loc[changed.index[groups.held_out], ["S_abs", "C", "E"]] *= 7
    again = screening.split(changed, rule, seed=0)
    assert np.array_equal(groups.clean, again.clean)
    assert np.array_equal(groups.candidates, again.candidates)


def test_published_targets_stand_beside_a_run_on_real_weights_and_only_there(parts):
    tables = analysis.gathered([(p.key, p.tables) for p in parts])
    facts = pd.DataFrame([p.key | p.facts for p in parts])
    assert findings.published(tables, facts).empty
    real = [{**p.key, "subject": "gpt2-small", "primary": "primary"} for p in parts[:1]]
    tables = analysis.gathered(list(zip(real, [parts[0].tables], strict=True)))
    found = findings.published(tables, pd.DataFrame([real[0] | parts[0].facts])).set_index(
        "quantity"
    )
    assert found.loc["L0, primary", "target"] == "71.8 (replication, within 1)"
    assert found.loc["L0, primary", "here"] == parts[0].facts["l0_primary"]
    assert found.loc["eligible features", "target"].startswith("7532")
    for quantity in (
        "crowding and C, control none",
        "residualised C, full set",
        "reliability of C",
    ):
        assert np.isfinite(found.loc[quantity, "here"])


def test_the_ladder_of_widths_has_no_vote_outside_the_comparison_of_widths():
    rows = pd.DataFrame(
        {
            "subject": "gpt2-small",
            "primary": ["primary", "width_768", "wide"],
            "rho": [0.2, 9.0, 0.4],
        }
    )
    assert findings.over_dictionaries(rows, "rho").value == pytest.approx(0.3)
    assert findings.is_wide("width_98304", "width_24576")
    assert not findings.is_wide("width_24576")


def test_width_tables_compare_the_pair(parts):
    table = findings.widths(analysis.gathered([(p.key, p.tables) for p in parts]))
    assert table["wide"].tolist() == [False, False, True, True]
    assert findings.is_wide("llama-3.1-8b-32x/primary", "primary")
    assert not findings.is_wide("primary")


def test_contexts_of_the_real_profile_keep_their_settings():
    for profile in ("laptop", "gpu"):
        settings = config.load(profile).side_effects
        assert settings.tau == 0.05
        assert settings.dose == 1.0
        assert settings.residual_share is None
        assert (settings.features, settings.contexts, settings.panel) == (300, 2048, 2048)
