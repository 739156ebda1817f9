"""Residuals of a model at one hook: collected once, then streamed to every consumer in the same
order.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from sae_research.errors import ResearchError
from sae_research.models import LanguageModel

if TYPE_CHECKING:
    from torch import LongTensor, Tensor


def collect(
    model: LanguageModel, tokens: "LongTensor", hook: str, *, batch: int = 64, skip_bos: bool = True
) -> "Tensor":
    """Activations [n_tokens, d] of the text positions of `tokens`, on the CPU in float32, rows in
    reading order.

    Padding never counts; BOS, whose residual is far larger than any other, only without
    `skip_bos`.
    """
    import torch

    found = []
    chunks = tokens.split(batch)
    for rows in tqdm(chunks, total=len(chunks), desc=f"residuals of {model.name}", leave=False):
        start = rows == model.bos
        keep = model.content(rows) & ~start if skip_bos else model.content(rows) | start
        found.append(model.residual(rows, hook)[keep.to(model.device)].float().cpu())
    return torch.cat(found)


def batches(acts: "Tensor", batch_size: int, steps: int, seed: int) -> Iterator["Tensor"]:
    """`steps` batches [batch_size, d]: a new seeded shuffle each pass, every row once a pass, no
    short batch.
    """
    import torch

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
