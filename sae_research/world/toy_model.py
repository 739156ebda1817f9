"""What the toy models share: a word-level tokenizer, a small Llama, a Hugging Face folder."""

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, BOS, EOS, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"


def make_word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one id per space-separated word; the special tokens come first."""
    vocabulary = {word: i for i, word in enumerate([PAD, BOS, EOS, UNKNOWN, *words])}
    if len(vocabulary) != len(words) + 4:
        raise ValueError("the vocabulary holds a word twice")
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNKNOWN
    )


@dataclass(frozen=True)
class ToyLlama:
    """The size of a toy model and the plainest terms of its training."""

    width: int = 128
    """Size of the residual stream."""
    blocks: int = 4
    """Transformer blocks."""
    heads: int = 4
    """Attention heads of a block."""
    inner: int = 352
    """Width of the feed-forward layers."""
    context: int = 48
    """Longest document in tokens."""
    scale: float = 0.06
    """Standard deviation of the initial weights."""
    steps: int = 2800
    """Training steps."""
    batch_size: int = 64
    """Documents of a step."""
    lr: float = 3e-3
    """Peak learning rate of AdamW."""
    clip: float = 1.0
    """Largest norm of the gradient."""


def make_llama(vocabulary: int, recipe: ToyLlama, seed: int) -> LlamaForCausalLM:
    """A Llama with tied embeddings and normal initial weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=recipe.width,
        num_hidden_layers=recipe.blocks,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        intermediate_size=recipe.inner,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        initializer_range=recipe.scale,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save model and tokenizer as a Hugging Face folder that any tool of this field opens.

    Weights are rounded to float16: half the size, and what is measured is what was saved.
    """
    model.half().save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
