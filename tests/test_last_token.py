"""The last-token engine against a full forward under a hook, on every architecture that the study uses."""

import pytest
import torch

from sae_research.errors import ResearchError
from sae_research.last_token import LastToken, _chunks, discrepancy
from sae_research.models import LanguageModel, load_model
from sae_research.paths import ROOT

ARCHITECTURES = ("gpt2", "neox", "gemma2", "llama")
NAMES = {
    "gpt2": "gpt2",
    "neox": "EleutherAI/pythia-70m",
    "gemma2": "google/gemma-2-2b",
    "llama": "meta-llama/Llama-3.1-8B",
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
        GPT2Config,
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
        "llama": lambda: LlamaConfig(vocab_size=101, **grouped),
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
def lens(request):
    return tiny(request.param)


def compare(lens, hook, reads, tokens, directions, **settings):
    """Largest error of the engine's logits and reads over all pairs, and the largest effect."""
    found = discrepancy(lens, hook, reads, tokens, directions, **settings)
    assert found["rows"] == len(tokens) * len(directions)
    return found["error"], found["effect"]


def test_each_row_comes_exactly_once(lens):
    torch.manual_seed(0)
    tokens, contexts, which = (
        torch.randint(3, 101, (9, 6)),
        torch.randint(0, 9, (70,)),
        torch.randint(0, 4, (70,)),
    )
    seen = [
        rows
        for rows, _, _ in LastToken(lens, HOOK).sweep(
            tokens, contexts, which, torch.randn(4, 32), batch=4
        )
    ]
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(70))


@pytest.mark.parametrize("pack", [1, 3, 8])
def test_equals_full_forward(lens, pack):
    torch.manual_seed(1)
    tokens, directions = torch.randint(3, 101, (10, 12)), torch.randn(5, 32)
    error, effect = compare(lens, HOOK, READS, tokens, directions, batch=4, pack=pack, rows=9)
    assert error < 1e-5
    assert effect > 0.1


@pytest.mark.parametrize(
    "hook", ["blocks.0.hook_resid_pre", "blocks.0.hook_out", "blocks.3.hook_resid_post"]
)
def test_every_depth(lens, hook):
    torch.manual_seed(2)
    tokens, directions = torch.randint(3, 101, (5, 7)), torch.randn(3, 32)
    error, _ = compare(lens, hook, ("blocks.3.hook_out",), tokens, directions)
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
    contexts, which = torch.arange(6).repeat(3), torch.arange(3).repeat_interleave(6)
    error = 0.0
    for rows, _, edited in engine.sweep(tokens, contexts, which, directions):
        for r, logits in zip(rows, engine.logits(edited.final), strict=True):
            put = residual[contexts[r]][None].clone()
            put[:, -1] += directions[which[r]]
            truth = twin.logits(tokens[contexts[r]][None], {HOOK: lambda h, put=put: put})
            error = max(error, float((truth[0, -1] - logits).abs().max()))
    assert error < 1e-4


def test_real_model_with_grouped_queries():
    if not STORIES.exists():
        pytest.skip(f"needs {STORIES}, which is not here")
    lens = load_model(STORIES)
    torch.manual_seed(4)
    tokens, directions = torch.randint(3, 512, (6, 32)), torch.randn(4, 64)
    error, effect = compare(
        lens, "blocks.1.hook_resid_post", ("blocks.3.hook_out",), tokens, directions
    )
    assert error < 1e-4
    assert effect > 0.1


def test_gram_is_the_unembedding_squared(lens):
    engine = LastToken(lens, HOOK)
    torch.manual_seed(5)
    record = engine.record(torch.randint(3, 101, (6, 8)))
    dz = torch.randn(6, 32)
    change = engine.logits(record.clean.final + dz) - engine.logits(record.clean.final)
    if engine.gram() is None:
        assert engine.softcap is not None
        return
    truth = change.double() @ change.double().T
    assert torch.allclose(
        (dz @ engine.gram() @ dz.T).double(), truth, rtol=1e-5, atol=1e-5 * float(truth.abs().max())
    )


def test_chunks_hold_each_row_once_with_its_own_context():
    torch.manual_seed(6)
    contexts = torch.randint(0, 7, (50,))
    owner, slots = _chunks(contexts, 4)
    rows = slots[slots >= 0]
    assert torch.equal(rows.sort().values, torch.arange(50))
    assert torch.equal(contexts[rows], owner[:, None].expand_as(slots)[slots >= 0])


def test_bad_input_is_one_sentence():
    lens = tiny("llama")
    tokens, zero, directions = (
        torch.zeros(2, 6, dtype=torch.long),
        torch.zeros(1, dtype=torch.long),
        torch.zeros(1, 32),
    )
    engine = LastToken(lens, HOOK)
    with pytest.raises(ResearchError, match="has no hook"):
        LastToken(lens, "blocks.9.hook_resid_post")
    with pytest.raises(ResearchError, match="place of the residual stream"):
        LastToken(lens, "blocks.1.attn.hook_z")
    with pytest.raises(ResearchError, match="below the edit"):
        LastToken(lens, HOOK, ("blocks.0.hook_out",))
    with pytest.raises(ResearchError, match="at least two tokens"):
        engine.record(tokens[:, :1])
    with pytest.raises(ResearchError, match="direction index 3 is out of range; there are 1"):
        list(engine.sweep(tokens, zero, zero + 3, directions))
    with pytest.raises(ResearchError, match="sliding window of 4"):
        LastToken(tiny("gemma2", window=4), HOOK).record(tokens)
