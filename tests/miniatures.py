"""Miniature models with random weights, one of each architecture that the real profiles use."""

from pathlib import Path

WORDS = [f"w{i}" for i in range(60)]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
ARCHITECTURES = ("gpt2", "neox", "gemma2", "llama")


def word_tokenizer(vocabulary: int = 64):
    """One id per space-separated word `w0`, `w1`, ...; the four special tokens come first."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *(f"w{i}" for i in range(vocabulary - len(SPECIAL)))]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def config(
    architecture: str, *, width: int = 32, blocks: int = 4, vocabulary: int = 64, context: int = 32
):
    """The smallest configuration that keeps what is special about an architecture: groups, caps,
    parallel blocks.
    """
    from transformers import Gemma2Config, GPT2Config, GPTNeoXConfig, LlamaConfig

    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    shape = {
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "num_attention_heads": 4,
        "intermediate_size": 2 * width,
        "vocab_size": vocabulary,
        "max_position_embeddings": context,
    }
    match architecture:
        case "gpt2":
            return GPT2Config(
                n_embd=width,
                n_layer=blocks,
                n_head=4,
                vocab_size=vocabulary,
                n_positions=context,
                **ids,
            )
        case "neox":
            return GPTNeoXConfig(**shape, rotary_pct=0.25, use_parallel_residual=True, **ids)
        case "gemma2":
            return Gemma2Config(
                **shape, num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16, **ids
            )
        case "llama":
            return LlamaConfig(**shape, num_key_value_heads=2, **ids)


def build(architecture: str, seed: int = 0, **shape):
    """A model with random weights, scaled up so that attention and residuals are far from
    uniform.
    """
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(architecture, **shape)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.mul_(3)
            elif "norm" in name or "ln_" in name:
                weight.add_(0.3 * torch.randn_like(weight))
    return model


def save(folder: Path, architecture: str, seed: int = 0, **shape) -> Path:
    """A Hugging Face folder with a miniature model and its word tokenizer."""
    model = build(architecture, seed, **shape)
    model.save_pretrained(folder)
    word_tokenizer(model.config.vocab_size).save_pretrained(folder)
    return folder


def random_sae(kind: str, width: int = 32, latents: int = 128, seed: int = 0, **settings):
    """An untrained SAE of SAELens' kind `kind` with random weights and decoder rows of unequal
    norm.
    """
    import sae_lens
    import torch

    torch.manual_seed(seed)
    sae_class, config_class = {
        "relu": (sae_lens.StandardSAE, sae_lens.StandardSAEConfig),
        "jumprelu": (sae_lens.JumpReLUSAE, sae_lens.JumpReLUSAEConfig),
        "topk": (sae_lens.TopKSAE, sae_lens.TopKSAEConfig),
        "relu-training": (sae_lens.StandardTrainingSAE, sae_lens.StandardTrainingSAEConfig),
        "jumprelu-training": (sae_lens.JumpReLUTrainingSAE, sae_lens.JumpReLUTrainingSAEConfig),
        "topk-training": (sae_lens.TopKTrainingSAE, sae_lens.TopKTrainingSAEConfig),
        "batchtopk-training": (sae_lens.BatchTopKTrainingSAE, sae_lens.BatchTopKTrainingSAEConfig),
    }[kind]
    sae = sae_class(config_class(d_in=width, d_sae=latents, **settings))
    with torch.no_grad():
        sae.W_dec.copy_(torch.randn(latents, width) * torch.rand(latents, 1).add(0.5) / width**0.5)
        sae.W_enc.copy_(sae.W_dec.T + 0.1 * torch.randn(width, latents))
        sae.b_enc.copy_(0.1 * torch.randn(latents))
        sae.b_dec.copy_(0.1 * torch.randn(width))
        if "jumprelu" in kind:
            sae.threshold.copy_(torch.rand(latents) * 0.2)
    return sae
