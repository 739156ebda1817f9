"""Co-occurrence of latents: phi of their binary activations, counted in chunks (section 5.1).

Counts are whole numbers, so chunks and the order of batches leave no trace in phi.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from sae_research.errors import ResearchError

ROWS = 512
"""Latents of the first SAE that are treated at once."""


@dataclass
class Counts:
    """How often latents of two SAEs (or of one) are active, alone and together."""

    both: Tensor
    """Tokens on which both are active [n, m], int32."""
    first: Tensor
    """Tokens on which each latent of the first is active [n]."""
    second: Tensor
    """The same of the second [m]."""
    tokens: int
    """All tokens."""


def count(batches: Iterable[tuple[Tensor, Tensor]]) -> Counts:
    """Counts over batches of which latents are active, [tokens, n] and [tokens, m] booleans."""
    found: Counts | None = None
    for first, second in batches:
        if found is None:
            n, m = first.shape[1], second.shape[1]
            both = torch.zeros(n, m, dtype=torch.int32, device=first.device)
            found = Counts(both, both.new_zeros(n).long(), both.new_zeros(m).long(), 0)
        a, b = first.T.float(), second.float()
        for start in range(0, len(a), ROWS):
            found.both[start : start + ROWS] += (a[start : start + ROWS].to_sparse() @ b).int()
        found.first += first.sum(0)
        found.second += second.sum(0)
        found.tokens += len(first)
    if found is None:
        raise ResearchError("there are no activations to count; give more held-out text.")
    return found


def phi_rows(counts: Counts, start: int = 0, stop: int | None = None) -> Tensor:
    """phi of some latents of the first SAE with all of the second; NaN where one never varies."""
    rows = slice(start, stop)
    n = float(counts.tokens)
    a, b = counts.first[rows].double()[:, None], counts.second.double()
    spread = (a * (n - a)).sqrt() * (b * (n - b)).sqrt()
    return ((counts.both[rows] * n - a * b) / spread).where(spread > 0, torch.nan)


def summarize(counts: Counts, tail: Iterable[float] = ()) -> dict[str, float]:
    """Mean |phi| over unordered pairs of one SAE's latents, over live pairs and over all.

    A dead latent's phi is undefined: it is left out of `live`, and counts as 0 in `all` (as in the
    paper). `beyond_x` is the share of live pairs above x.
    """
    n = len(counts.first)
    bars = tuple(tail)
    size = signed = 0.0
    pairs = positive = 0
    above = dict.fromkeys(bars, 0)
    for start in range(0, n, ROWS):
        phi = phi_rows(counts, start, start + ROWS)
        own = torch.arange(start, start + len(phi), device=phi.device)
        later = torch.arange(n, device=phi.device) > own[:, None]
        values = phi[later & ~phi.isnan()]
        pairs += len(values)
        size += values.abs().sum().item()
        signed += values.sum().item()
        positive += int((values > 0).sum())
        for bar in bars:
            above[bar] += int((values > bar).sum())
    live = max(pairs, 1)
    return {
        "live": size / live,
        "all": size / max(n * (n - 1) / 2, 1),
        "signed": signed / live,
        "positive": positive / live,
        "floor": sampling_floor(counts.tokens),
        **{f"beyond_{bar:g}": above[bar] / live for bar in bars},
    }


def sampling_floor(tokens: int) -> float:
    """Mean |phi| of independent latents on so many tokens: sqrt(2 / (pi T))."""
    return math.sqrt(2 / (math.pi * tokens))


def shifted(active: Tensor, seed: int) -> Tensor:
    """The null: each latent's activity moved in a circle by an offset of its own.

    Firing rates and runs of activity stay as they are; what latents share is lost.
    """
    tokens, n = active.shape
    draw = torch.Generator().manual_seed(seed)
    offsets = torch.randint(tokens, (n,), generator=draw).to(active.device)
    token, latent = active.nonzero(as_tuple=True)
    moved = torch.zeros_like(active)
    moved[(token + offsets[latent]) % tokens, latent] = True
    return moved


def thinned(active: Tensor, share: float, seed: int, whole: bool = False) -> Tensor:
    """Each activation kept with probability `share`, whatever else is active; if `whole`, all of a
    token's or none.
    """
    draw = torch.Generator().manual_seed(seed)
    shape = (len(active), 1) if whole else active.shape
    return active & (torch.rand(shape, generator=draw) < share).to(active.device)


def second_largest(counts: Counts) -> tuple[Tensor, Tensor]:
    """For each latent of the first SAE, its two largest phi with the second, and whose they are."""
    parts = [
        phi_rows(counts, start, start + ROWS).nan_to_num(-1.0).topk(2)
        for start in range(0, len(counts.first), ROWS)
    ]
    return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])


def pair_phi(batches: Iterable[Tensor], pairs: Tensor) -> Tensor:
    """phi of given pairs of one SAE's latents [n, 2]."""
    both = alone = tokens = 0
    for active in batches:
        chosen = active[:, pairs]
        both = both + chosen.all(-1).sum(0)
        alone = alone + chosen.sum(0)
        tokens += len(active)
    alone = alone / tokens
    spread = (alone * (1 - alone)).prod(-1).sqrt()
    return (both / tokens - alone.prod(-1)) / spread


def transposed(counts: Counts) -> Counts:
    """The same counts, seen from the second SAE."""
    return Counts(counts.both.T, counts.second, counts.first, counts.tokens)
