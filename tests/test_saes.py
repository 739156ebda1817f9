"""Dictionaries load frozen, fit or are refused, and get the L0 they are asked for."""

import json

import miniatures
import pytest

from sae_research import conversion, hub, models, saes
from sae_research.errors import ResearchError

KINDS = (
    "relu",
    "jumprelu",
    "topk",
    "relu-training",
    "jumprelu-training",
    "topk-training",
    "batchtopk-training",
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return models.load_model(
        miniatures.save(tmp_path_factory.mktemp("models") / "tiny-llama", "llama")
    )


@pytest.fixture(scope="module")
def tokens():
    import torch

    rows = torch.randint(4, 64, (40, 16), generator=torch.Generator().manual_seed(1))
    rows[:, 0] = 1
    return rows


@pytest.fixture(scope="module")
def x():
    import torch

    return torch.randn(1000, 32, generator=torch.Generator().manual_seed(2))


def fitted(llama, kind="relu", hook="blocks.1.hook_resid_post", **settings):
    return miniatures.random_sae(
        kind, width=llama.d_model, metadata=saes.metadata(llama, hook), **settings
    )


def perfect(llama, hook="blocks.1.hook_resid_post"):
    """A ReLU SAE that reconstructs everything: each axis twice, once a sign."""
    import torch

    sae = fitted(llama, hook=hook, latents=2 * llama.d_model)
    axes = torch.cat([torch.eye(llama.d_model), -torch.eye(llama.d_model)])
    with torch.no_grad():
        for weight, value in (
            (sae.W_enc, axes.T),
            (sae.W_dec, axes),
            (sae.b_enc, 0),
            (sae.b_dec, 0),
        ):
            weight.copy_(torch.as_tensor(value))
    return sae


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 6.5, 20])
def test_exact_l0_is_exact_and_keeps_the_strongest(kind, k, x):
    """Mean L0 is k within one part in the token count, and the kept contributions are those with
    the largest margin.
    """
    sae = miniatures.random_sae(kind)
    export = conversion.exact_l0(sae, x, k, batch=300)
    codes = export.encode(x)
    assert abs((codes > 0).sum().item() / len(x) - k) <= 1 / len(x)
    assert export.cfg.metadata.calibrated_l0 == (codes > 0).sum().item() / len(x)
    assert export.W_dec.norm(dim=-1).allclose(export.W_dec.new_ones(128), atol=1e-6)
    if kind != "jumprelu" and kind != "jumprelu-training":
        assert export.threshold.unique().numel() == 1
        contribution = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc) * sae.W_dec.norm(dim=-1)
        expected = contribution * (
            contribution > contribution.flatten().topk(round(k * len(x))).values[-1] - 1e-6
        )
        assert codes.allclose(expected, atol=1e-5)


@pytest.mark.parametrize(
    "kind", ["relu", "jumprelu", "relu-training", "jumprelu-training", "topk", "topk-training"]
)
def test_folding_the_decoder_norm_keeps_every_reconstruction(kind, x):
    """At an SAE's own L0 the export reconstructs what the SAE did; TopK needs k of all latents for
    that.
    """
    import torch

    sae = miniatures.random_sae(kind, **({"k": 128} if "topk" in kind else {}))
    with torch.no_grad():
        codes = sae.encode(x)
        own = ((sae.decode(codes) - sae.b_dec).abs().sum(), (codes > 0).sum().item() / len(x))
        if "topk" in kind:
            codes = codes.clamp(min=0)
        export = conversion.exact_l0(sae, x, own[1])
        assert export.decode(export.encode(x)).allclose(sae.decode(codes), atol=1e-5)
        assert (export.encode(x) > 0).equal(codes > 0)


def test_jumprelu_thresholds_keep_their_differences(x):
    """Calibration shifts learned thresholds together (in units of contribution), so that their
    order survives.
    """
    sae = miniatures.random_sae("jumprelu")
    export = conversion.exact_l0(sae, x, 3)
    shift = export.threshold - sae.threshold * sae.W_dec.norm(dim=-1)
    assert shift.std() < 1e-6
    assert shift.mean() > 0


def test_impossible_l0_is_refused(x):
    with pytest.raises(ResearchError, match="no threshold gives 120 active latents"):
        conversion.exact_l0(miniatures.random_sae("relu"), x, 120)


def test_calibration_leaves_the_source_alone(x):
    sae = miniatures.random_sae("batchtopk-training")
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    conversion.exact_l0(sae, x, 5)
    assert all(value.equal(before[name]) for name, value in sae.state_dict().items())


def test_saved_sae_opens_in_saelens_and_here(tmp_path, llama, x):
    from sae_lens import SAE

    export = conversion.exact_l0(fitted(llama, "batchtopk-training"), x, 5)
    saes.save(export, tmp_path / "sae")
    theirs, ours = SAE.load_from_disk(tmp_path / "sae"), saes.load_sae(tmp_path / "sae")
    for sae in (theirs, ours):
        assert sae.encode(x).equal(export.encode(x))
        assert sae.decode(sae.encode(x)).equal(export.decode(export.encode(x)))
        assert sae.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
        assert sae.cfg.metadata.prepend_bos is True
    assert not any(weight.requires_grad for weight in ours.parameters())
    assert not ours.training


def test_training_sae_saves_as_its_inference_kind_except_batch_topk(tmp_path, x):
    sae = miniatures.random_sae("topk-training", k=7)
    saes.save(sae, tmp_path / "topk")
    loaded = saes.load_sae(tmp_path / "topk")
    assert loaded.decode(loaded.encode(x)).allclose(sae.decode(sae.encode(x)), atol=1e-5)
    with pytest.raises(ResearchError, match="exact_l0"):
        saes.save(miniatures.random_sae("batchtopk-training"), tmp_path / "batchtopk")
    assert not (tmp_path / "batchtopk").exists()


def test_altered_weights_are_named(tmp_path):
    saes.save(miniatures.random_sae("relu"), tmp_path / "sae")
    weights = tmp_path / "sae" / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\1\2\3")
    with pytest.raises(ResearchError, match=r"sae_weights.safetensors does not match its checksum"):
        saes.load_sae(tmp_path / "sae")


def test_sae_must_fit_model_hook_and_width(llama):
    assert saes.check_fit(llama, fitted(llama)) == "blocks.1.hook_out"
    assert (
        saes.check_fit(llama, fitted(llama, hook="blocks.2.hook_resid_pre")) == "blocks.1.hook_out"
    )
    wrong_model = fitted(llama)
    wrong_model.cfg.metadata.model_name = "gpt2-small"
    wrong_width = miniatures.random_sae(
        "relu", width=48, metadata=saes.metadata(llama, "blocks.1.hook_out")
    )
    for sae, message in (
        (wrong_model, "trained on the model 'gpt2-small', not on 'tiny-llama'"),
        (wrong_width, "reads 48 dimensions but the residual of 'tiny-llama' has 32"),
        (fitted(llama, hook="blocks.7.hook_resid_post"), "has no hook 'blocks.7.hook_resid_post'"),
        (miniatures.random_sae("relu"), "names no hook"),
    ):
        with pytest.raises(ResearchError, match=message):
            saes.check_fit(llama, sae)


def test_perfect_sae_recovers_everything_and_an_empty_one_nothing(llama, tokens):
    import torch

    sae = perfect(llama)
    result = saes.quality(llama, sae, tokens)
    assert result["explained_variance"] == pytest.approx(1, abs=1e-6)
    assert result["ce_recovered"] == pytest.approx(1, abs=1e-4)
    assert result["l0"] == pytest.approx(llama.d_model, abs=0.01)
    assert result["dead_share"] == 0
    assert result["tokens"] == 40 * 15
    assert result["ce_clean"] == pytest.approx(llama.losses(tokens).mean().item(), abs=1e-5)
    with torch.no_grad():
        sae.W_dec.zero_()
        sae.W_enc.zero_()
    result = saes.quality(llama, sae, tokens)
    assert result["ce_recovered"] == pytest.approx(0, abs=1e-6)
    assert result["explained_variance"] <= 0
    assert result["dead_share"] == 1


def test_sae_that_says_only_the_mean_explains_no_variance(llama, tokens):
    import torch

    from sae_research import activations

    sae = perfect(llama)
    mean = activations.collect(llama, tokens, "blocks.1.hook_resid_post").mean(0)
    with torch.no_grad():
        sae.W_dec.zero_()
        sae.b_dec.copy_(mean)
    assert saes.quality(llama, sae, tokens)["explained_variance"] == pytest.approx(0, abs=1e-5)


def test_padding_and_bos_do_not_count(llama, tokens):
    """Rows of unequal length, padded, give what their real tokens give alone."""
    import torch

    short = tokens.clone()
    short[:, 10:] = 0
    whole, padded = (saes.quality(llama, perfect(llama), rows) for rows in (short[:, :10], short))
    assert padded["tokens"] == whole["tokens"] == 40 * 9
    for name in ("explained_variance", "l0", "ce_clean", "ce_zero"):
        assert padded[name] == pytest.approx(whole[name], rel=1e-4)
    assert torch.isfinite(torch.tensor(list(padded.values()))).all()


def test_sae_of_centred_weights_reads_raw_residuals(tmp_path, tokens):
    """Centring every weight that writes to the residual stream centres the residual, and changes
    no logit.
    """
    from transformer_lens.model_bridge import TransformerBridge

    folder = miniatures.save(tmp_path / "gpt2", "gpt2")
    raw = models.load_model(folder)
    with hub.quiet():
        bridge = TransformerBridge.boot_transformers(str(folder), device="cpu")
        bridge.enable_compatibility_mode(
            fold_ln=False,
            center_writing_weights=True,
            center_unembed=False,
            fold_value_biases=False,
        )
    hook = "blocks.2.hook_resid_pre"
    _, cache = bridge.run_with_cache(tokens)
    theirs, ours = cache[hook], raw.residual(tokens, hook)
    assert ours.mean(-1).abs().max() > 0.01
    assert (theirs - (ours - ours.mean(-1, keepdim=True))).abs().max() < 1e-4

    sae = miniatures.random_sae("relu", metadata=saes.metadata(raw, hook))
    sae.cfg.metadata.model_from_pretrained_kwargs = {"center_writing_weights": True}
    plain_codes = sae.encode(theirs)
    saes.save(sae, tmp_path / "sae")
    loaded = saes.load_sae(tmp_path / "sae")
    assert loaded.encode(ours).allclose(plain_codes, atol=1e-4)
    assert saes.target(loaded, ours).allclose(theirs, atol=1e-4)
    assert loaded.W_enc.equal(sae.W_enc)
    again = conversion.exact_l0(loaded, ours[:, 1:].reshape(-1, 32), 5)
    assert again.encode(ours).allclose(again.encode(theirs), atol=1e-4)


def test_a_centred_sae_that_rebuilds_its_input_recovers_all_loss(tmp_path, tokens):
    """The mean that a centred SAE leaves out is invisible to LayerNorm, so nothing is lost."""
    gpt2 = models.load_model(miniatures.save(tmp_path / "gpt2", "gpt2"))
    sae = perfect(gpt2)
    sae.cfg.metadata.model_from_pretrained_kwargs = {"center_writing_weights": True}
    saes.save(sae, tmp_path / "sae")
    result = saes.quality(gpt2, saes.load_sae(tmp_path / "sae"), tokens)
    assert result["explained_variance"] == pytest.approx(1, abs=1e-6)
    assert result["ce_recovered"] == pytest.approx(1, abs=1e-4)


def test_unknown_releases_and_folders_are_named(tmp_path):
    for arguments, message in (
        (("gpt2-small-res-jp", "blocks.8.hook_resid_pre"), "did you mean 'gpt2-small-res-jb'"),
        (
            ("gpt2-small-res-jb", "blocks.80.hook_resid_pre"),
            "unknown SAE id 'blocks.80.hook_resid_pre' in gpt2-small-res-jb; did you mean",
        ),
        ((tmp_path,), "holds no SAE"),
    ):
        with pytest.raises(ResearchError, match=message):
            saes.load_sae(*arguments)


def test_saved_configuration_is_plain_json(tmp_path, llama):
    saes.save(fitted(llama), tmp_path / "sae")
    settings = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    assert settings["metadata"]["model_name"] == "tiny-llama"
    assert settings["d_in"] == 32


@pytest.fixture
def folder(llama, tmp_path):
    """A saved SAE without checksums, as other tools write it."""
    saes.save(fitted(llama), tmp_path / "sae")
    (tmp_path / "sae" / "checksums.json").unlink()
    return tmp_path / "sae"


def change_config(folder, **changes):
    path = folder / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "sae_weights.safetensors").unlink(), "has no sae_weights.safetensors"),
        (
            lambda f: (f / "sae_weights.safetensors").write_bytes(
                (f / "sae_weights.safetensors").read_bytes()[:-100]
            ),
            "truncated or damaged",
        ),
        (lambda f: (f / "cfg.json").write_text("{"), "no JSON"),
        (lambda f: change_config(f, architecture="nonsense"), "does not understand its cfg.json"),
        (lambda f: change_config(f, d_sae=64), "weights and cfg.json do not fit"),
    ],
)
def test_a_damaged_sae_is_one_sentence(folder, damage, words):
    damage(folder)
    with pytest.raises(ResearchError, match=words) as error:
        saes.load_sae(folder)
    assert "\n" not in str(error.value)


def test_a_wrong_load_is_warned_of_and_a_right_one_is_not(llama, recwarn):
    right = perfect(llama)
    assert saes.warn_if_wrong(llama, right)["explained_variance"] > 0.999
    assert not recwarn
    with pytest.warns(UserWarning, match=r"may not belong to 'tiny-llama' .* it explains"):
        saes.warn_if_wrong(llama, fitted(llama))
    off = perfect(llama)
    off.cfg.metadata.calibrated_l0 = 2.0
    with pytest.warns(UserWarning, match=r"active on a token in place of 2.0"):
        saes.warn_if_wrong(llama, off)
