"""Prompts of a chat model as rows of one length, replies of a fixed length, and their decoding.

Rows that are equally long need neither padding nor masks, in training, generation and at hooks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import LongTensor, Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def most_likely(logits: Tensor) -> LongTensor:
    """The most likely next token of each row."""
    return logits.argmax(-1, keepdim=True)


@torch.no_grad()
def continue_prompts(
    model: "PreTrainedModel",
    prompts: LongTensor,
    n: int,
    choose: Callable[[Tensor], LongTensor] = most_likely,
    draws: int = 1,
) -> LongTensor:
    """`n` tokens after each of `draws` copies of each prompt, [prompts * draws, n]."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    logits = model(prompts, past_key_values=cache, logits_to_keep=1).logits[:, -1]
    cache.batch_repeat_interleave(draws)
    logits = logits.repeat_interleave(draws, 0)
    reply = []
    for step in range(n):
        reply.append(choose(logits))
        if step + 1 < n:
            logits = model(reply[-1], past_key_values=cache).logits[:, -1]
    return torch.cat(reply, 1)


@dataclass
class ChatRows:
    """How texts become rows of tokens."""

    tokenizer: "PreTrainedTokenizerBase"
    """Has a chat template."""
    prompts: Sequence[str]
    """All that will be asked: the longest sets the length of the rows."""
    reply: int
    """Tokens of every reply."""
    system: str = "Be brief."
    """The system message: short, so that few tokens are read."""

    def __post_init__(self) -> None:
        self.length = max(len(self._ask(prompt)) for prompt in self.prompts)
        self.end = self.tokenizer.eos_token_id

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _ask(self, prompt: str) -> list[int]:
        talk = [{"role": "system", "content": self.system}, {"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        return self._ids(str(text))

    def ask(self, prompts: Sequence[str]) -> LongTensor:
        """Prompts up to where the reply begins; line breaks close the system message of the shorter
        ones.
        """
        (line_break,) = self._ids("\n")
        rows = []
        for ids in map(self._ask, prompts):
            at = ids.index(self.end)
            rows.append(ids[:at] + [line_break] * (self.length - len(ids)) + ids[at:])
        return torch.tensor(rows)

    def write(self, replies: Sequence[str]) -> LongTensor:
        """Replies, cut or filled up with the end of the turn."""
        return torch.tensor(
            [(self._ids(text) + [self.end] * self.reply)[: self.reply] for text in replies]
        )

    def read(self, replies: LongTensor) -> list[str]:
        """The texts of replies, up to the end of the turn."""
        stop = [(row == self.end).nonzero()[:1].flatten().tolist() for row in replies]
        return [
            self.tokenizer.decode(row[: at[0] if at else self.reply]).strip()
            for row, at in zip(replies, stop, strict=True)
        ]

    def answer(self, model: "PreTrainedModel", prompts: Sequence[str]) -> LongTensor:
        """The model's greedy replies."""
        return continue_prompts(model, self.ask(prompts), self.reply)
