"""Residuals of a model: collected once, in memory or on disk, then streamed in one order to all."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import LongTensor, Tensor
from tqdm.auto import tqdm

from sae_research import store
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
        keep = _positions(model, rows, skip_bos)
        found.append(model.residual(rows, hook)[keep].float().cpu())
    return torch.cat(found)


def _positions(model: LanguageModel, rows: LongTensor, skip_bos: bool = True) -> Tensor:
    start = rows == model.bos
    content = model.content(rows)
    return (content & ~start if skip_bos else content | start).to(model.device)


class StoredResiduals:
    """Residuals [n_tokens, d] in float16 files, read from disk as they are asked for.

    Indexed by a tensor of positions it gives float32, so it stands where a tensor of all would.
    """

    def __init__(self, files: Sequence[Path]):
        self._parts = [np.load(file, mmap_mode="r") for file in files]
        self._ends = np.cumsum([len(part) for part in self._parts])
        self.shape = (len(self), self._parts[0].shape[1])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, positions: LongTensor) -> Tensor:
        wanted = positions.numpy()
        found = np.empty((len(wanted), self._parts[0].shape[1]), dtype=np.float32)
        owner = np.searchsorted(self._ends, wanted, side="right")
        for i, part in enumerate(self._parts):
            here = np.flatnonzero(owner == i)
            here = here[wanted[here].argsort()]  # in the order of the file
            found[here] = part[wanted[here] - (self._ends[i] - len(part))]
        return torch.from_numpy(found)


def collect_on_disk(
    model: LanguageModel,
    tokens: LongTensor,
    hooks: Sequence[str],
    folder: Path,
    *,
    batch: int = 16,
    rows_per_part: int = 512,
) -> list[StoredResiduals]:
    """Residuals of the text positions at each hook, kept in `folder`, in reading order.

    One pass a batch serves all hooks. A killed run goes on at the part where it stopped.
    """
    key = {"model": model.fingerprint, "hooks": [model.hook(name) for name in hooks]}
    parts = []
    with tqdm(total=len(tokens), desc=f"residuals of {model.name}", leave=False) as bar:
        for i, rows in enumerate(tokens.split(rows_per_part)):
            part_key = {**key, "tokens": store.tensor_fingerprint({"rows": rows}), "batch": batch}
            build = partial(_write_part, model, rows, hooks, batch, bar)
            parts.append(store.resumed(Path(folder) / f"part-{i:04d}", part_key, build))
            bar.update(i * rows_per_part + len(rows) - bar.n)
    return [StoredResiduals([part / f"{i}.npy" for part in parts]) for i in range(len(hooks))]


def _write_part(
    model: LanguageModel,
    rows: LongTensor,
    hooks: Sequence[str],
    batch: int,
    bar: tqdm,
    folder: Path,
) -> None:
    found: list[list[Tensor]] = [[] for _ in hooks]
    for some in rows.split(batch):
        keep = _positions(model, some)
        for own, residual in zip(found, model.residuals(some, list(hooks)), strict=True):
            own.append(residual[keep].half().cpu())
        bar.update(len(some))
    for i, own in enumerate(found):
        values = torch.cat(own)
        if not values.isfinite().all():
            raise ResearchError(
                f"the residuals of {model.name} at {hooks[i]} do not fit into float16; keep them "
                "in memory with `collect`."
            )
        np.save(folder / f"{i}.npy", values.numpy())


def batches(
    acts: "Tensor | StoredResiduals", batch_size: int, steps: int, seed: int
) -> Iterator[Tensor]:
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
