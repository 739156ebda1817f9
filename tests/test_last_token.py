"""The last-token engine against a full forward under a hook, on every architecture that the study
uses.
"""

import pytest
import torch

from sae_research.errors import ResearchError
from sae_research.last_token import LastToken, _chunks, discrepancy, run_naive
from sae_research.model_tail import ModelTail
from sae_research.models import LanguageModel, load_model
from sae_research.paths import ROOT

ARCHITECTURES = ("gpt2", "neox", "gemma2", "gemma3", "llama")
NAMES = {
    "gpt2": "gpt2",
    "neox": "EleutherAI/pythia-70m",
    "gemma2": "google/gemma-2-2b",
    "gemma3": "google/gemma-3-270m",
    "llama": "meta-llama/Llama-3.1-8B",
    "gpt-neo": "EleutherAI/gpt-neo-125M",
}
STORIES = ROOT.parent / "shared/real/models/stories260K"
HOOK, READS = "blocks.1.hook_out", ("blocks.2.hook_out", "blocks.3.hook_out")


def words(n: int):
    """A tokenizer of `n` words; the bridge insists on one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(n)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w2", pad_token="w2")


def tiny(architecture: str, dtype: torch.dtype = torch.float32, window: int = 32):
    """A four-block model with random weights, scaled up so that attention is not uniform."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import (
        AutoModelForCausalLM,
        Gemma2Config,
        Gemma3TextConfig,
        GPT2Config,
        GPTNeoConfig,
        GPTNeoXConfig,
        LlamaConfig,
    )

    wide = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    grouped = wide | {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    config = {
        "gpt2": lambda: GPT2Config(vocab_size=101, n_positions=64, n_embd=32, n_layer=4, n_head=4),
        "neox": lambda: GPTNeoXConfig(
            vocab_size=101, max_position_embeddings=64, rotary_pct=0.5, **wide
        ),
        "gemma2": lambda: Gemma2Config(
            vocab_size=101, sliding_window=window, query_pre_attn_scalar=8, **grouped
        ),
        "gemma3": lambda: Gemma3TextConfig(
            vocab_size=101,
            architectures=["Gemma3ForCausalLM"],
            sliding_window=window,
            query_pre_attn_scalar=8,
            layer_types=["sliding_attention", "full_attention"] * 2,
            **grouped,
        ),
        "llama": lambda: LlamaConfig(vocab_size=101, **grouped),
        "gpt-neo": lambda: GPTNeoConfig(
            vocab_size=101,
            max_position_embeddings=64,
            hidden_size=32,
            num_layers=4,
            num_heads=4,
            attention_types=[[["global", "local"], 2]],
            window_size=window,
        ),
    }[architecture]()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2:
                p.mul_(4 if "embed" not in name and "wte" not in name else 2)
    bridge = TransformerBridge.boot_transformers(
        NAMES[architecture],
        hf_model=model.to(dtype),
        tokenizer=words(101),
        device="cpu",
        dtype=dtype,
    )
    return LanguageModel(bridge, architecture)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request):
    return tiny(request.param)


def compare(model, hook, reads, tokens, directions, **settings):
    """Largest error of the engine's logits and reads over all pairs, and the largest effect."""
    found = discrepancy(model, hook, reads, tokens, directions, **settings)
    assert found["rows"] == len(tokens) * len(directions)
    return found["error"], found["effect"]


def test_each_row_comes_exactly_once(model):
    torch.manual_seed(0)
    tokens = torch.randint(3, 101, (9, 6))
    contexts = torch.randint(0, 9, (4, 17))
    found = LastToken(model, HOOK).sweep(tokens, contexts, torch.randn(4, 32), batch=4)
    seen = [rows for rows, _, _ in found]
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(68))


@pytest.mark.parametrize("pack", [1, 3, 8])
def test_equals_full_forward(model, pack):
    torch.manual_seed(1)
    tokens, directions = torch.randint(3, 101, (10, 12)), torch.randn(5, 32)
    error, effect = compare(model, HOOK, READS, tokens, directions, batch=4, pack=pack, rows=9)
    assert error < 1e-5
    assert effect > 0.1


@pytest.mark.parametrize(
    "hook", ["blocks.0.hook_resid_pre", "blocks.0.hook_out", "blocks.3.hook_resid_post"]
)
def test_every_depth(model, hook):
    torch.manual_seed(2)
    tokens, directions = torch.randint(3, 101, (5, 7)), torch.randn(3, 32)
    error, _ = compare(model, hook, ("blocks.3.hook_out",), tokens, directions)
    assert error < 1e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_float32_above_a_bfloat16_lower_part(architecture):
    """Against a float32 twin of the model that is given the same residual at the hook."""
    torch.manual_seed(3)
    tokens, directions = torch.randint(3, 101, (6, 9)), 0.05 * torch.randn(3, 32)
    low, twin = tiny(architecture, torch.bfloat16), tiny(architecture, torch.bfloat16)
    twin.bridge.to(torch.float32, print_details=False)
    engine = LastToken(low, HOOK, READS)
    assert engine.record(tokens).last.dtype == torch.float32
    residual = low.residual(tokens, HOOK).float()
    error = 0.0
    for rows, _, edited in engine.sweep(tokens, torch.arange(6).expand(3, -1), directions):
        for r, logits in zip(rows, engine.logits(edited.final), strict=True):
            put = residual[r % 6][None].clone()
            put[:, -1] += directions[r // 6]
            truth = twin.logits(tokens[r % 6][None], {HOOK: lambda h, put=put: put})
            error = max(error, float((truth[0, -1] - logits).abs().max()))
    assert error < 1e-4


def test_real_model_with_grouped_queries():
    if not STORIES.exists():
        pytest.skip(f"needs {STORIES}, which is not here")
    model = load_model(STORIES)
    torch.manual_seed(4)
    tokens, directions = torch.randint(3, 512, (6, 32)), torch.randn(4, 64)
    error, effect = compare(
        model, "blocks.1.hook_resid_post", ("blocks.3.hook_out",), tokens, directions
    )
    assert error < 1e-4
    assert effect > 0.1


def test_chunks_hold_each_row_once_with_its_own_context():
    torch.manual_seed(6)
    contexts = torch.randint(0, 7, (50,))
    owner, slots = _chunks(contexts, 4)
    rows = slots[slots >= 0]
    assert torch.equal(rows.sort().values, torch.arange(50))
    assert torch.equal(contexts[rows], owner[:, None].expand_as(slots)[slots >= 0])


def test_bad_input_is_one_sentence():
    model = tiny("llama")
    tokens = torch.zeros(2, 6, dtype=torch.long)
    engine = LastToken(model, HOOK)
    with pytest.raises(ResearchError, match="has no hook"):
        LastToken(model, "blocks.9.hook_resid_post")
    with pytest.raises(ResearchError, match="place of the residual stream"):
        LastToken(model, "blocks.1.attn.hook_z")
    with pytest.raises(ResearchError, match="below the edit"):
        LastToken(model, HOOK, ("blocks.0.hook_out",))
    with pytest.raises(ResearchError, match="at least two tokens"):
        engine.record(tokens[:, :1])
    with pytest.raises(ResearchError, match="no context 2; there are 2"):
        list(engine.sweep(tokens, torch.tensor([[1, 2]]), torch.zeros(1, 32)))
    with pytest.raises(ResearchError, match="sliding window of 4"):
        LastToken(tiny("gemma2", window=4), HOOK).record(tokens)


def test_gpt_neo_is_exact_inside_its_window_and_refused_beyond():
    model = tiny("gpt-neo", window=8)
    torch.manual_seed(7)
    tokens, directions = torch.randint(3, 101, (4, 8)), torch.randn(3, 32)
    error, effect = compare(model, HOOK, READS, tokens, directions)
    assert error < 1e-5 < 0.1 < effect
    with pytest.raises(ResearchError, match="sliding window of 8"):
        LastToken(model, HOOK).record(torch.randint(3, 101, (4, 9)))


def test_a_read_at_the_edited_hook_sees_the_edit(model):
    torch.manual_seed(8)
    tokens, direction = torch.randint(3, 101, (3, 6)), torch.randn(32)
    _, (read,) = run_naive(model, HOOK, (HOOK,), tokens, direction)
    plain = model.residual(tokens, HOOK)[:, -1]
    assert torch.allclose(read - plain, direction.expand(3, -1), atol=1e-5)
    error, effect = compare(model, HOOK, (HOOK,), tokens, direction[None])
    assert error < 1e-5 < 0.1 < effect


def test_the_callers_model_keeps_its_number_format_and_its_logits():
    model = tiny("llama", torch.bfloat16)
    tokens = torch.randint(3, 101, (3, 6))
    before = model.logits(tokens)
    engine = LastToken(model, HOOK)
    assert {p.dtype for p in model.bridge.parameters()} == {torch.bfloat16}
    assert engine.record(tokens).clean.final.dtype == torch.float32
    assert torch.equal(model.logits(tokens), before)


def test_an_architecture_that_the_tail_does_not_know_is_refused(monkeypatch):
    """A norm that the bridge's blocks do not contain makes the tail differ from the full pass."""
    model = tiny("llama")
    whole = LanguageModel.logits
    monkeypatch.setattr(LanguageModel, "logits", lambda self, *given: whole(self, *given).flip(-1))
    with pytest.raises(ResearchError, match=r"cannot be run from 'blocks.1.hook_out' upwards"):
        ModelTail(model, HOOK)
