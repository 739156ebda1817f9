"""What the toy models share: a word-level tokenizer, a small Llama, a Hugging Face folder."""

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


def make_llama(
    vocabulary: int,
    *,
    width: int,
    blocks: int,
    heads: int,
    inner: int,
    context: int,
    seed: int,
    scale: float = 0.02,
) -> LlamaForCausalLM:
    """A Llama with tied embeddings and normal initial weights of size `scale`."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=inner,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        initializer_range=scale,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save model and tokenizer as a Hugging Face folder that any tool of this field opens."""
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
