"""Miniature copies of the hub repositories that the real profiles name: true file formats, tiny
random weights.

A hub cache holds, for each repository, `refs/main` (a commit), `blobs` and `snapshots/<commit>`
with links to blobs.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from sae_research.catalogue import MODEL_SPECS

REAL = Path(__file__).resolve().parents[2] / "shared" / "real"
WIDTH = 16
LATENTS = 48
BLOCKS = {
    "gpt2": 12,
    "gpt2-large": 36,
    "pythia-70m-deduped": 6,
    "gemma-2-2b": 26,
    "gemma-2-2b-it": 26,
    "gemma-2-9b": 42,
    "gemma-3-270m": 18,
    "gemma-3-270m-it": 18,
    "Llama-3.1-8B": 32,
    "SmolLM2-135M-Instruct": 30,
}
PROMPTS = (
    "First comes a short note on the person who answers, then a question.\nNote: sex: Male; age: ",
    "Answer as a person would whose sex is: Female and age is: ",
    "Which of these describes you (age)?\n\nKeep that answer in mind for the next question.",
    "Question: \nA. No\nB. Perhaps\nC. Yes\nAnswer with A, B or C.\n\nAnswer: A or D, E, F",
)
"""What a replica's tokenizer knows as words."""


def write_cache(cache: Path) -> None:
    """Fill `cache` with a replica of every model and SAE of the catalogue."""
    models = {spec.model: spec.revision for spec in MODEL_SPECS.values() if spec.from_hub}
    for repository, revision in sorted(models.items()):
        _publish(cache, repository, _model_files(repository), revision)
    for repository, files in _sae_files():
        _publish(cache, repository, files)


def gemma_overrides() -> dict[str, dict]:
    """What SAELens' Gemma Scope loader must be told, because it hard-codes the widths of the real
    models.
    """
    sizes = {"d_in": WIDTH, "d_sae": LATENTS}
    return {f"gemma-scope-{size}-pt-res-canonical": sizes for size in ("2b", "9b")}


def shapes(repository: str, file: str) -> dict[str, list[int]]:
    """Shapes in a safetensors file of the cache, where SAELens' Gemma Scope 2 loader asks the hub
    for the file's header.
    """
    from huggingface_hub import hf_hub_download
    from safetensors import safe_open

    with safe_open(hf_hub_download(repository, file), "np") as tensors:
        return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118


def _publish(
    cache: Path, repository: str, fill: Callable[[Path], None], revision: str | None = None
) -> None:
    """Put the files that `fill` writes into the cache, as the hub client would after a download."""
    root = cache / f"models--{repository.replace('/', '--')}"
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder))
        contents = {
            p.relative_to(folder): p.read_bytes()
            for p in sorted(Path(folder).rglob("*"))
            if p.is_file()
        }
    commit = revision or hashlib.sha1(repository.encode()).hexdigest()
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    (root / "blobs").mkdir()
    for name, content in contents.items():
        blob = root / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        link = root / "snapshots" / commit / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(*[".."] * (len(name.parts) + 1), "blobs", blob.name))


# models


def _model_files(repository: str) -> Callable[[Path], None]:
    """How to write a model's repository: configuration, weights in the shards and names of the
    real one, tokenizer.
    """
    name = repository.split("/")[-1]

    def fill(folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        tokenizer = _tokenizer(name)
        torch.manual_seed(len(name))
        model = AutoModelForCausalLM.from_config(_config(name, len(tokenizer)))
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.2 * torch.randn_like(weight))
        config = {
            **model.config.to_dict(),
            "architectures": [type(model).__name__],
            "dtype": _dtype(name),
        }
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "generation_config.json").write_text(json.dumps({"_from_model_config": True}))
        _write_weights(folder, name, model)
        tokenizer.save_pretrained(folder)

    return fill


def _dtype(name: str) -> str:
    if name == "pythia-70m-deduped":
        return "float16"
    in_bfloat16 = ("gemma-3-270m", "gemma-3-270m-it", "Llama-3.1-8B", "SmolLM2-135M-Instruct")
    return "bfloat16" if name in in_bfloat16 else "float32"


def _config(name: str, vocabulary: int):
    from transformers import (
        Gemma2Config,
        Gemma3TextConfig,
        GPT2Config,
        GPTNeoXConfig,
        LlamaConfig,
    )

    shape = {
        "hidden_size": WIDTH,
        "num_hidden_layers": BLOCKS[name],
        "num_attention_heads": 4,
        "intermediate_size": 2 * WIDTH,
        "vocab_size": vocabulary,
    }
    if name.startswith("gpt2"):
        return GPT2Config(
            n_embd=WIDTH, n_layer=BLOCKS[name], n_head=4, vocab_size=vocabulary, n_positions=1024
        )
    if name.startswith("pythia"):
        return GPTNeoXConfig(
            **{**shape, "vocab_size": vocabulary + 27},
            rotary_pct=0.25,
            max_position_embeddings=2048,
            bos_token_id=0,
            eos_token_id=0,
        )
    if name.startswith("gemma-3"):
        return Gemma3TextConfig(
            **shape,
            num_key_value_heads=1,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=512,
            max_position_embeddings=32768,
        )
    if name.startswith("gemma"):
        return Gemma2Config(
            **shape,
            num_key_value_heads=2,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=4096,
            max_position_embeddings=8192,
        )
    if name.startswith("Smol"):
        return LlamaConfig(
            **shape,
            num_key_value_heads=2,
            max_position_embeddings=8192,
            rope_theta=100000.0,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
            tie_word_embeddings=True,
        )
    return LlamaConfig(
        **shape,
        num_key_value_heads=2,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        rope_scaling={
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )


def _write_weights(folder: Path, name: str, model) -> None:
    """Weights under the names, in the number format and in the number of shards of the real
    repository.
    """
    import torch
    from safetensors.torch import save_file

    shards = {"gemma-2-2b": 3, "gemma-2-2b-it": 2, "gemma-2-9b": 8, "Llama-3.1-8B": 4}.get(name, 1)
    dtype = getattr(torch, _dtype(name))
    weights = {key: value.to(dtype).contiguous() for key, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    if name == "gpt2":
        weights = {key.removeprefix("transformer."): value for key, value in weights.items()}
        mask = torch.tril(torch.ones(1, 1, 8, 8))
        weights |= {f"h.{n}.attn.bias": mask.clone() for n in range(BLOCKS[name])}
    if name.startswith("pythia"):
        weights["embed_out.weight"] = weights.pop("lm_head.weight")
        for n in range(BLOCKS[name]):
            attention = f"gpt_neox.layers.{n}.attention"
            weights[f"{attention}.bias"] = torch.tril(torch.ones(1, 1, 8, 8, dtype=torch.bool))
            weights[f"{attention}.masked_bias"] = torch.tensor(-1e9)
            weights[f"{attention}.rotary_emb.inv_freq"] = torch.ones(1)
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    index = {}
    for part in range(shards):
        keys = sorted(weights)[part::shards]
        file = f"model-{part + 1:05d}-of-{shards:05d}.safetensors"
        save_file({key: weights[key] for key in keys}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(keys, file)
    total = sum(value.nbytes for value in weights.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )


def _tokenizer(name: str):
    """GPT-2's own tokenizer where it lies next to the repository, else the model's special tokens,
    bytes and the words that prompts are made of: in bytes alone a prompt is four times as long.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if name.startswith("gpt2") and (REAL / "tokenizers" / "gpt2").is_dir():
        return AutoTokenizer.from_pretrained(REAL / "tokenizers" / "gpt2")
    special = {
        "gemma": {
            "pad_token": "<pad>",
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "unk_token": "<unk>",
        },
        "SmolL": {
            "unk_token": "<|endoftext|>",
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|im_end|>",
        },
        "Llama": {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
        "pythi": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
        "gpt2": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    }[name[:5].split("-")[0]]
    turns = ["<start_of_turn>", "<end_of_turn>"] if name.startswith("gemma") else []
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=[*dict.fromkeys(special.values()), *turns],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(PROMPTS, trainer)
    found = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=turns, **special
    )
    if name.endswith("-it"):
        found.chat_template = (
            "{{ bos_token }}{% for turn in messages %}<start_of_turn>{{ turn.role }}\n{{ "
            "turn.content }}<end_of_turn>\n"
            "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
        )
    return found


# SAEs


def _sae_files() -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Every SAE repository of the catalogue with how to write it."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    known = get_pretrained_saes_directory()
    wanted: dict[str, set[str]] = {}
    for spec in MODEL_SPECS.values():
        for release, sae_id in spec.saes.values():
            wanted.setdefault(release, set()).add(sae_id)
    for release, ids in sorted(wanted.items()):
        write = next(
            function
            for prefix, function in (
                ("gpt2-small-res-jb", _write_gpt2),
                ("pythia", _write_pythia),
                ("gemma-scope-2-", _write_gemma_scope_2),
                ("gemma-scope", _write_gemma_scope),
                ("llama_scope", _write_llama_scope),
            )
            if release.startswith(prefix)
        )

        def fill(folder: Path, lookup=known[release], ids=ids, write=write) -> None:
            for sae_id in sorted(ids):
                place = folder / lookup.saes_map[sae_id]
                place.mkdir(parents=True)
                write(place, sae_id, lookup)

        yield known[release].repo_id, fill


def _weights(seed: str, latents: int = LATENTS) -> dict:
    """Random weights of one SAE, the same for the same name."""
    import torch

    random = torch.Generator().manual_seed(int(hashlib.sha256(seed.encode()).hexdigest()[:8], 16))
    decoder = torch.nn.functional.normalize(torch.randn(latents, WIDTH, generator=random), dim=-1)
    return {
        "W_enc": decoder.T.contiguous() + 0.05 * torch.randn(WIDTH, latents, generator=random),
        "W_dec": decoder,
        "b_enc": 0.1 * torch.randn(latents, generator=random),
        "b_dec": 0.1 * torch.randn(WIDTH, generator=random),
    }


def _latents(sae_id: str) -> int:
    """Scaled-down widths: the feature-splitting ladder keeps its doublings."""
    width = sae_id.rsplit("_", 1)[-1]
    return int(width) // 96 if width.isdigit() else LATENTS


def _write_gpt2(folder: Path, sae_id: str, lookup) -> None:
    """SAELens' first format: flat configuration with `hook_point`, weights, log sparsities."""
    import torch
    from safetensors.torch import save_file

    latents = _latents(sae_id)
    hook = sae_id.removesuffix(f"_{latents * 96}")
    config = {
        "model_name": "gpt2-small",
        "hook_point": hook,
        "hook_point_layer": int(hook.split(".")[1]),
        "hook_point_head_index": None,
        "dataset_path": "Skylion007/openwebtext",
        "context_size": 128,
        "d_in": WIDTH,
        "d_sae": latents,
        "dtype": "torch.float32",
        "device": "mps",
    }
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file(_weights(sae_id, latents), folder / "sae_weights.safetensors")
    save_file({"sparsity": torch.full((latents,), -3.0)}, folder / "sparsity.safetensors")


def _write_pythia(folder: Path, sae_id: str, lookup) -> None:
    """SAELens' format of mid 2024: `hook_name`, explicit activation function, no sparsities."""
    from safetensors.torch import save_file

    config = {
        "architecture": "standard",
        "model_name": "pythia-70m-deduped",
        "hook_name": sae_id,
        "hook_layer": int(sae_id.split(".")[1]),
        "hook_head_index": None,
        "activation_fn_str": "relu",
        "apply_b_dec_to_input": True,
        "finetuning_scaling_factor": False,
        "normalize_activations": "none",
        "prepend_bos": True,
        "context_size": 128,
        "dataset_path": "EleutherAI/the_pile_deduplicated",
        "d_in": WIDTH,
        "d_sae": LATENTS,
        "dtype": "torch.float32",
        "device": "cpu",
    }
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file(_weights(sae_id), folder / "sae_weights.safetensors")


def _write_gemma_scope(folder: Path, sae_id: str, lookup) -> None:
    """Gemma Scope: one `params.npz` with a threshold a latent, no configuration."""
    import numpy

    weights = {name: value.numpy() for name, value in _weights(lookup.release + sae_id).items()}
    numpy.savez(
        folder / "params.npz",
        **weights,
        threshold=numpy.linspace(0.01, 0.3, LATENTS, dtype="float32"),
    )


def _write_gemma_scope_2(folder: Path, sae_id: str, lookup) -> None:
    """Gemma Scope 2: a short `config.json`, weights under small letters, a threshold a latent."""
    import torch
    from safetensors.torch import save_file

    hook = f"model.layers.{sae_id.split('_')[1]}.output"
    config = {
        "hf_hook_point_in": hook,
        "hf_hook_point_out": hook,
        "width": LATENTS,
        "model_name": lookup.repo_id.removeprefix("google/").replace("scope-2", "v3"),
        "architecture": "jump_relu",
        "l0": 60,
        "affine_connection": False,
        "type": "sae",
    }
    (folder / "config.json").write_text(json.dumps(config))
    weights = {name.lower(): value for name, value in _weights(lookup.release + sae_id).items()}
    weights["threshold"] = torch.linspace(0.01, 0.3, LATENTS)
    save_file(weights, folder / "params.safetensors")


def _write_llama_scope(folder: Path, sae_id: str, lookup) -> None:
    """Llama Scope: `hyperparams.json`, transposed bfloat16 weights, one threshold, dataset-wise
    input norm.
    """
    import torch
    from safetensors.torch import save_file

    latents = LATENTS * (4 if sae_id.endswith("32x") else 1)
    layer = int(sae_id[1:].split("r_")[0])
    weights = {name: value.bfloat16() for name, value in _weights(sae_id, latents).items()}
    norm = WIDTH**0.5 / lookup.norm_scaling_factor[sae_id]
    hyperparameters = {
        "hook_point_in": f"blocks.{layer}.hook_resid_post",
        "hook_point_out": f"blocks.{layer}.hook_resid_post",
        "d_model": WIDTH,
        "d_sae": latents,
        "expansion_factor": latents // WIDTH,
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.1,
        "top_k": 50,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": norm, "out": norm},
        "sparsity_include_decoder_norm": True,
        "dtype": "torch.bfloat16",
    }
    (folder / "hyperparams.json").write_text(json.dumps(hyperparameters))
    (folder / "checkpoints").mkdir()
    save_file(
        {
            "encoder.weight": weights["W_enc"].T.contiguous(),
            "encoder.bias": weights["b_enc"],
            "decoder.weight": weights["W_dec"].T.contiguous(),
            "decoder.bias": weights["b_dec"].to(torch.bfloat16),
        },
        folder / "checkpoints" / "final.safetensors",
    )
