"""Residuals of a model at one hook: collected once, then streamed in one order to all."""

from collections.abc import Iterator

import torch
from torch import LongTensor, Tensor
from tqdm.auto import tqdm

from sae_research.errors import ResearchError
from sae_research.models import LanguageModel


def collect(
    model: LanguageModel, tokens: LongTensor, hook: str, *, batch: int = 64, skip_bos: bool = True
) -> Tensor:
    """Activations [n_tokens, d] of the text positions, on the CPU in float32, in reading order.

    Padding never counts; BOS, whose residual is far larger than any other, only without `skip_bos`.
    """
    found = []
    for rows in tqdm(tokens.split(batch), desc=f"residuals of {model.name}", leave=False):
        start = rows == model.bos
        content = model.content(rows)
        keep = content & ~start if skip_bos else content | start
        found.append(model.residual(rows, hook)[keep.to(model.device)].float().cpu())
    return torch.cat(found)


def batches(acts: Tensor, batch_size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """`steps` batches [batch_size, d]: each pass in a new seeded order, every row once a pass."""
    if not 0 < batch_size <= len(acts):
        raise ResearchError(
            f"batches of {batch_size} do not fit: there are {len(acts)} activations; collect more."
        )
    random = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(acts), generator=random)])
        yield acts[order[:batch_size]]
        order = order[batch_size:]
