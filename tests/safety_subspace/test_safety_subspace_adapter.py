"""Adapters that start in a subspace: what stock peft must be able to do with them."""

import pytest
import torch
from peft import PeftModel

from sae_research.errors import ResearchError
from sae_research.studies.safety_subspace import adapter
from sae_research.world import toy_model

D, BLOCKS = 32, 3
TOKENS = torch.arange(1, 25).view(2, 12)
WORDS = [f"w{i}" for i in range(60)]


def make_base(kind="llama", norm=0.3):
    from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

    shape = {
        "hidden_size": D,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "vocab_size": 64,
        "initializer_range": 0.2,
        "attn_implementation": "eager",
    }
    gemma = {"head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 64}
    config = LlamaConfig(**shape) if kind == "llama" else Gemma2Config(**shape, **gemma)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(norm * torch.randn_like(weight))
    return model.requires_grad_(False)


def make_bases(ranks=(4, 3, 5)):
    torch.manual_seed(1)
    return {n: torch.linalg.qr(torch.randn(D, rank)).Q for n, rank in enumerate(ranks)}


def train(model, steps=20, lr=0.02):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    for _ in range(steps):
        model(TOKENS, labels=TOKENS.roll(1, 1)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.fixture(scope="module", params=["llama", "gemma"])
def trained(request):
    return request.param, train(adapter.make_adapter(make_base(request.param), make_bases()))


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_starts_as_the_base_model_and_learns_in_both_factors(kind):
    model = adapter.make_adapter(make_base(kind), make_bases())
    assert torch.allclose(logits(model), logits(make_base(kind)), atol=1e-6)
    before = [p.clone() for p in model.parameters() if p.requires_grad]
    train(model, 2)
    after = [p for p in model.parameters() if p.requires_grad]
    assert all((a != b).any() for a, b in zip(before, after, strict=True))


def test_save_load_and_merge_with_stock_peft(trained, tmp_path):
    kind, model = trained
    assert not torch.allclose(logits(model), logits(make_base(kind)), atol=0.1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base(kind), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert torch.allclose(logits(adapter.merge(model)), logits(model), atol=1e-5)
    ranks = {n: layer.r["default"] for n, _, layer in adapter.lora_layers(loaded)}
    assert ranks == {0: 4, 1: 3, 2: 5}


def test_bridge_has_the_same_logits_and_refuses_what_is_half_merged(trained):
    _, model = trained
    tokenizer = toy_model.make_word_tokenizer(WORDS)
    bridged = adapter.bridge(model, tokenizer, "adapted")
    assert torch.allclose(bridged.logits(TOKENS), logits(model), atol=1e-5)
    model.merge_adapter()
    try:
        with pytest.raises(ResearchError, match="merged but still attached"):
            adapter.bridge(model, tokenizer, "adapted")
    finally:
        model.unmerge_adapter()


def test_frozen_factors_keep_the_update_in_the_span():
    bases = make_bases()
    model = train(adapter.make_adapter(make_base(), bases, frozen=True))
    for n, name, layer in adapter.lora_layers(model):
        if name == "o_proj":
            update = layer.get_delta_weight("default").T
            assert update.norm() > 0.01
            assert adapter.out_of_span(bases[n], update) < 1e-5
    assert max(adapter.measure_out_of_span(model, TOKENS, bases).values()) < 1e-5


def test_reading_matrices_see_the_residual_in_the_subspace_only():
    bases = make_bases()
    model = train(adapter.make_adapter(make_base(), bases, frozen=True))
    blocks = model.base_model.model.model.layers
    for n, name, layer in adapter.lora_layers(model):
        if name == "q_proj":
            seen = layer.get_delta_weight("default") * blocks[n].input_layernorm.weight
            assert adapter.out_of_span(bases[n], seen) < 1e-5


def test_folding_gemmas_second_norm_brings_small_updates_back_into_the_span():
    def leaves(fold, size=1e-3):
        model = adapter.make_adapter(make_base("gemma", 0.2), make_bases(), fold_norms=fold)
        torch.manual_seed(3)
        with torch.no_grad():
            for _, name, layer in adapter.lora_layers(model):
                if name == "o_proj":
                    layer.lora_A["default"].weight.normal_(std=size)
        found = adapter.measure_out_of_span(model, TOKENS, make_bases())
        return sum(found.values()) / len(found)

    plain, folded, large = leaves(False), leaves(True), leaves(True, size=2.0)
    assert plain > 0.15
    assert folded < 0.7 * plain
    assert large > 3 * folded


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_penalty_is_zero_in_the_subspace_and_grows_outside(kind):
    bases = make_bases()
    model = adapter.make_adapter(make_base(kind), bases)
    assert float(adapter.penalty(model, bases).detach()) < 1e-8
    assert float(adapter.penalty(train(model), bases).detach()) > 1e-3


def test_parameters_of_the_papers_models_from_their_configurations():
    from transformers import Gemma2Config, LlamaConfig

    shapes = {  # d, blocks, heads, key-value heads, head size, inner: reported share of parameters
        "gemma-2-2b": ((2304, 26, 8, 4, 256, 9216), 6_389_760),
        "gemma-2-9b": ((3584, 42, 16, 8, 256, 14336), 17_891_328),
        "llama-3.1-8b": ((4096, 32, 32, 8, 128, 14336), 13_631_488),
    }
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    for model, (sizes, expected) in shapes.items():
        kind = Gemma2Config if model.startswith("gemma") else LlamaConfig
        given = zip((*names, "head_dim", "intermediate_size"), sizes, strict=True)
        assert adapter.count_parameters(kind(**dict(given)), 16) == expected


def test_counted_parameters_are_those_that_train():
    base = make_base("gemma")
    model = adapter.make_adapter(base, make_bases((4, 4, 4)))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert adapter.count_parameters(base.config, 4) == trainable


def test_bad_bases_are_named():
    model = adapter.make_adapter(make_base(), make_bases())
    _, _, layer = next(adapter.lora_layers(model))
    with pytest.raises(ResearchError, match="rank 4 does not fit a subspace of dimension 2"):
        adapter.write_basis(layer, torch.eye(D)[:, :2], True, 1.0)
    with pytest.raises(ResearchError, match="both factors of the adapter would be zero"):
        adapter.write_basis(layer, torch.zeros(D, 4), True, 1.0)
    with pytest.raises(ResearchError, match="no side is known for the matrix 'c_attn'"):
        adapter.make_adapter(make_base(), make_bases(), targets=("c_attn",))
