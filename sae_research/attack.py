"""Greedy coordinate gradient (Zou et al. 2023): a suffix that makes wanted replies likely."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import LongTensor, Tensor
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Attack:
    """One suffix for several requests, improved one token at a time."""

    length: int = 5
    """Tokens of the suffix."""
    steps: int = 50
    """Replacements of one token."""
    candidates: int = 64
    """Replacements that are tried at each step."""
    top_k: int = 32
    """Tokens at each place from which they are drawn, those of largest gradient."""
    requests: int = 8
    """Requests that the suffix is found on, drawn at random."""
    restarts: int = 1
    """Random suffixes that it starts from; the one that ends best counts."""
    first_token: int = 4
    """Lowest token that may stand in it: special tokens come before."""


def add_suffix(prompts: LongTensor, suffix: LongTensor) -> LongTensor:
    """Prompts with a suffix before their last token, which opens the reply."""
    return torch.cat([prompts[:, :-1], suffix.expand(len(prompts), -1), prompts[:, -1:]], 1)


def reply_losses(
    model: "PreTrainedModel", rows: LongTensor, reply: int, embeddings: Tensor | None = None
) -> Tensor:
    """Cross-entropy in nats per token of the last `reply` tokens of each row, [rows]."""
    given = {"input_ids": rows} if embeddings is None else {"inputs_embeds": embeddings}
    logits = model(**given, logits_to_keep=reply + 1, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.transpose(1, 2), rows[:, -reply:], reduction="none").mean(1)


def find_suffix(
    model: "PreTrainedModel", prompts: LongTensor, replies: LongTensor, attack: Attack, seed: int
) -> LongTensor:
    """The suffix [length] under which the replies [prompts, reply] become most likely."""
    g = torch.Generator().manual_seed(seed)
    table = model.get_input_embeddings().weight.detach()
    drawn = torch.randperm(len(prompts), generator=g)[: attack.requests]
    prompts, replies = prompts[drawn], replies[drawn]
    ends = [_improve(model, table, prompts, replies, attack, g) for _ in range(attack.restarts)]
    return min(ends, key=lambda end: end[0])[1]


def _improve(
    model: "PreTrainedModel",
    table: Tensor,
    prompts: LongTensor,
    replies: LongTensor,
    attack: Attack,
    g: torch.Generator,
) -> tuple[float, LongTensor]:
    """The best suffix on the way from a random one, and its loss."""
    first, reply = prompts.shape[1] - 1, replies.shape[1]
    suffix = torch.randint(attack.first_token, len(table), (attack.length,), generator=g)
    best = float("inf")
    for _ in range(attack.steps):
        rows = torch.cat([add_suffix(prompts, suffix), replies], 1)
        embeddings = table[rows].requires_grad_(True)
        loss = reply_losses(model, rows, reply, embeddings).mean()
        (slope,) = torch.autograd.grad(loss, embeddings)
        slope = slope[:, first : first + attack.length].sum(0) @ table.T
        slope[:, : attack.first_token] = float("inf")
        likely = (-slope).topk(attack.top_k).indices
        place = torch.randint(attack.length, (attack.candidates,), generator=g)
        drawn = torch.randint(attack.top_k, (attack.candidates,), generator=g)
        tried = suffix.repeat(attack.candidates, 1)
        tried[torch.arange(attack.candidates), place] = likely[place, drawn]
        rows = torch.cat([torch.cat([add_suffix(prompts, t), replies], 1) for t in tried])
        with torch.no_grad():
            found = torch.cat([reply_losses(model, part, reply) for part in rows.split(256)])
        found = found.view(attack.candidates, len(prompts)).mean(1)
        if float(found.min()) < best:
            best = float(found.min())
            suffix = tried[found.argmin()]
    return best, suffix
