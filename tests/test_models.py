"""The model adapter equals Hugging Face, names every hook once, and edits exactly where it says."""

import subprocess
import sys

import miniatures
import pytest

from sae_research import models, saes
from sae_research.errors import ResearchError


@pytest.fixture(scope="module", params=miniatures.ARCHITECTURES)
def pair(request, tmp_path_factory):
    """A miniature through the adapter, and the same model in plain Hugging Face."""
    from transformers import AutoModelForCausalLM

    folder = miniatures.save(tmp_path_factory.mktemp(request.param) / request.param, request.param)
    return models.load_model(folder), AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def tokens():
    import torch

    rows = torch.randint(4, 64, (3, 12), generator=torch.Generator().manual_seed(0))
    rows[:, 0] = 1
    return rows


def test_logits_and_residuals_equal_hugging_face(pair, tokens):
    import torch

    model, hf_model = pair
    with torch.no_grad():
        theirs = hf_model(tokens, output_hidden_states=True)
    assert (model.logits(tokens) - theirs.logits).abs().max() < 1e-5
    for block in range(model.n_layers):
        assert (
            model.residual(tokens, f"blocks.{block}.hook_resid_pre") - theirs.hidden_states[block]
        ).abs().max() < 1e-5
    last = f"blocks.{model.n_layers - 1}.hook_resid_post"
    base = hf_model.base_model
    norm = (
        base.ln_f
        if hasattr(base, "ln_f")
        else base.final_layer_norm
        if hasattr(base, "final_layer_norm")
        else base.norm
    )
    with torch.no_grad():
        assert (norm(model.residual(tokens, last)) - theirs.hidden_states[-1]).abs().max() < 1e-4


def test_every_alias_of_a_place_is_one_name(pair):
    model, _ = pair
    names = (
        "blocks.2.hook_resid_post",
        "blocks.2.hook_out",
        "blocks.3.hook_resid_pre",
        "blocks.3.hook_in",
    )
    assert {model.hook(name) for name in names} == {"blocks.2.hook_out"}
    assert model.hook("blocks.0.hook_resid_pre") == "blocks.0.hook_in"
    assert model.hook("blocks.3.hook_resid_post") == "blocks.3.hook_out"
    assert model.hook("hook_embed") == "embed.hook_out"
    assert all(model.hook(model.hook(name)) == model.hook(name) for name in model.hooks)
    assert [model.depth(name) for name in ("blocks.0.hook_resid_pre", names[0], names[2])] == [
        0,
        3,
        3,
    ]


def test_aliases_of_a_place_give_one_value_and_one_edit(pair, tokens):
    model, _ = pair
    shift = {"scale": lambda resid: resid * 1.5}["scale"]
    for one, other in (
        ("blocks.1.hook_resid_post", "blocks.2.hook_resid_pre"),
        ("blocks.0.hook_resid_post", "blocks.1.hook_in"),
    ):
        assert model.residual(tokens, one).equal(model.residual(tokens, other))
        assert model.logits(tokens, {one: shift}).equal(model.logits(tokens, {other: shift}))
    assert (
        model.logits(tokens, {"blocks.0.hook_resid_pre": shift}) - model.logits(tokens)
    ).abs().max() > 1e-3


def test_an_identity_edit_changes_nothing_and_a_swap_moves_everything(pair, tokens):
    """Putting text B's residual into text A's forward pass gives text B's logits."""
    model, _ = pair
    assert model.logits(tokens, {"blocks.1.hook_resid_post": lambda resid: resid}).equal(
        model.logits(tokens)
    )
    other = tokens.flip(0)
    theirs = model.residual(other, "blocks.1.hook_resid_post")
    assert (
        model.logits(tokens, {"blocks.1.hook_resid_post": lambda _: theirs}) - model.logits(other)
    ).abs().max() < 1e-5


def test_residual_below_an_edit_ignores_it_and_above_it_does_not(pair, tokens):
    model, _ = pair
    edits = {"blocks.1.hook_resid_post": lambda resid: resid + 1}
    below, at, above = (f"blocks.{block}.hook_resid_post" for block in (0, 1, 2))
    assert model.residual(tokens, below, edits).equal(model.residual(tokens, below))
    assert model.residual(tokens, at, edits).equal(model.residual(tokens, at) + 1)
    assert not model.residual(tokens, above, edits).allclose(
        model.residual(tokens, above), atol=1e-3
    )


def test_hooks_are_gone_after_an_error(pair, tokens):
    model, _ = pair
    clean = model.logits(tokens)

    def fails(resid):
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        model.logits(tokens, {"blocks.1.hook_resid_post": fails})
    assert model.logits(tokens).equal(clean)


def test_losses_are_the_negative_log_probabilities_of_the_next_tokens(pair, tokens):
    model, hf_model = pair
    expected = -model.logits(tokens).log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    assert model.losses(tokens).allclose(expected, atol=1e-5)
    assert model.losses(tokens).shape == (3, 11)
    assert abs(model.losses(tokens).mean() - hf_model(tokens, labels=tokens).loss) < 1e-4


def test_gradients_flow_through_an_edit_and_the_model_stays_frozen(pair, tokens):
    import torch

    model, _ = pair
    shift = torch.zeros(model.d_model, requires_grad=True)
    model.losses(
        tokens, {"blocks.1.hook_resid_post": lambda resid: resid + shift}
    ).mean().backward()
    assert shift.grad.abs().sum() > 0
    assert not any(weight.requires_grad for weight in model.bridge.parameters())


def test_greedy_text_equals_hugging_face_and_samples_follow_the_seed(pair, tokens):
    model, hf_model = pair
    prompt = tokens[:, :4]
    theirs = hf_model.generate(
        prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert model.generate(prompt, 6).equal(theirs)
    draws = [model.generate(prompt, 6, greedy=False, seed=seed) for seed in (1, 1, 2)]
    assert draws[0].equal(draws[1])
    assert not draws[0].equal(draws[2])


def test_tokens_begin_with_bos_and_pad_on_the_right(pair):
    model, _ = pair
    rows = model.tokens(["w0 w1", "w2 w3 w4 w5"])
    assert rows.tolist() == [[1, 4, 5, 0, 0], [1, 6, 7, 8, 9]]
    assert model.content(rows).int().tolist() == [[0, 1, 1, 0, 0], [0, 1, 1, 1, 1]]
    assert model.tokens(["w0 w1 w2"], length=3).tolist() == [[1, 4, 5]]
    assert model.tokens(["w0"], length=4, prepend_bos=False).tolist() == [[4, 0, 0, 0]]


def test_packed_rows_hold_the_stream_in_order(pair):
    model, _ = pair
    rows = model.packed(["w0 w1 w2", "w3", "w4 w5"], length=4)
    assert rows.tolist() == [[1, 4, 5, 6], [1, 2, 7, 2], [1, 8, 9, 2]]


def test_a_text_longer_than_the_context_is_refused(pair):
    model, _ = pair
    for too_long in (
        lambda: model.tokens(["w0 " * 40]),
        lambda: model.generate(model.tokens(["w0 w1"]), 40),
    ):
        with pytest.raises(ResearchError, match=r"longer than the context of .* \(32\)"):
            too_long()


def test_a_hook_that_the_model_lacks_names_the_nearest(pair):
    model, _ = pair
    with pytest.raises(
        ResearchError,
        match=r"no hook 'blocks.9.hook_resid_post'; the nearest valid name is 'blocks",
    ):
        model.hook("blocks.9.hook_resid_post")
    with pytest.raises(ResearchError, match=r"output of that block is 'blocks.2.hook_resid_post'"):
        model.hook("transformer.h.2")
    with pytest.raises(ResearchError, match=r"'blocks\.1\.hook_mlp_out'"):
        model.hook("blocks.1.hook_mlp_outt")


def test_missing_models_are_named(tmp_path):
    with pytest.raises(ResearchError, match=r"model folder .*nowhere is missing"):
        models.load_model(tmp_path / "nowhere")
    with pytest.raises(ResearchError, match=r"holds no config.json"):
        models.load_model(tmp_path)
    with pytest.raises(ResearchError, match="device 'cuda"):
        models.load_model("gpt2", device="cuda:99")


def test_loading_is_silent(tmp_path):
    folder = miniatures.save(tmp_path / "llama", "llama")
    code = f"from sae_research import models; one = models.load_model({str(folder)!r}); "
    code += "one.logits(one.tokens(['w0 w1']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_importing_the_adapter_is_cheap():
    code = "import sys\nfrom sae_research import activations, models, saes, steering\n"
    code += "heavy = ('transformers', 'transformer_lens', 'sae_lens')\n"
    code += "print([m for m in heavy if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_bridge_that_is_silently_wrong_is_refused(tmp_path, monkeypatch):
    folder = miniatures.save(tmp_path / "llama", "llama")
    whole = models.LanguageModel.residual

    def wrong(self, tokens, hook, edits=None):
        return whole(self, tokens, hook, edits) * 1.01

    monkeypatch.setattr(models.LanguageModel, "residual", wrong)
    with pytest.raises(ResearchError, match=r"'llama' wrongly: at blocks\.0\.hook"):
        models.load_model(folder)


def test_the_fingerprint_is_of_the_weights_and_not_of_the_folder(tmp_path):
    one, same, other = (
        models.load_model(miniatures.save(tmp_path / name, "gpt2", seed=seed), dtype=dtype)
        for name, seed, dtype in (("a", 0, "float32"), ("b", 0, "bfloat16"), ("c", 1, "float32"))
    )
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_steering_holds_inside_the_block_only(pair, tokens):
    import torch

    model, _ = pair
    sae = miniatures.random_sae("relu", metadata=saes.metadata(model, "blocks.1.hook_resid_post"))
    plain = model.logits(tokens)
    with model.steer(sae, latent=5, coefficient=4.0):
        steered = model.logits(tokens)
        with model.unedited():
            assert model.logits(tokens).equal(plain)
        moved = model.residual(tokens, "blocks.1.hook_resid_post")
    assert model.logits(tokens).equal(plain)
    assert not torch.allclose(steered, plain, atol=1e-2)
    change = (moved - model.residual(tokens, "blocks.1.hook_resid_post"))[:, 1:]
    assert torch.allclose(change, (4 * sae.W_dec[5]).expand_as(change), atol=1e-4)
    with pytest.raises(ResearchError, match="latent 128 is out of range"), model.steer(sae, 128, 1):
        pass


def test_clamping_gives_latents_one_value_inside_the_block(pair, tokens):
    import torch

    model, _ = pair
    hook = "blocks.1.hook_resid_post"
    sae = miniatures.random_sae("relu", metadata=saes.metadata(model, hook))
    before = model.residual(tokens, hook)
    with model.clamp(sae, [5, 7]):
        after = model.residual(tokens, hook)
    lost = sae.encode(before)[..., [5, 7]] @ sae.W_dec[[5, 7]]
    assert torch.allclose((before - after)[:, 1:], lost[:, 1:], atol=1e-4)
    assert lost[:, 1:].abs().max() > 1e-2
    assert model.residual(tokens, hook).equal(before)


def test_text_goes_in_and_text_comes_out(pair):
    model, _ = pair
    text = model.generate("w0 w1", 3)
    rows = model.generate(model.tokens(["w0 w1"]), 3)
    assert text == model.tokenizer.decode(rows[0], skip_special_tokens=True)
    assert text.startswith("w0 w1")
