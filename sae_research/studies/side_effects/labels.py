"""What steering a feature does at the final token: spread, effect size, stability, divergence (sections 3.3, 3.4).

Symbols: D_x = l1 - l0 is the change of the logits in context x, u the codes of the downstream panel P.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from tqdm.auto import tqdm

from sae_research.last_token import LastToken

EPS = 1e-8


@dataclass
class Measured:
    """One number for every direction and context, [directions, contexts], and what is needed for the rest."""

    contexts: torch.Tensor
    """Which context each column of each row was."""
    counts: torch.Tensor
    """[directions, contexts, thresholds]: downstream panel latents that moved by more than each tau."""
    panels: torch.Tensor
    """[directions, contexts, sizes]: the same at the first threshold, for the most frequent latents only."""
    l1: torch.Tensor
    """Sum of |u1 - u0| over the panel."""
    l2: torch.Tensor
    """Euclidean length of u1 - u0."""
    moved: torch.Tensor
    """Effective number of moved latents, exp of the entropy of |u1 - u0| / sum."""
    clean: torch.Tensor
    """[contexts of the pool that were used, d]: final states before steering, with `row_of` below."""
    row_of: torch.Tensor
    """Row of `clean` for each context of the pool."""
    steered: torch.Tensor
    """[directions, contexts, d]: final states after steering."""
    shift: torch.Tensor
    """[directions, panel]: mean of u1 - u0."""
    effects: dict[str, np.ndarray] = field(default_factory=dict)
    """Labels that come from the logits, per direction: see `logit_labels`."""


@torch.no_grad()
def measure(
    engine: LastToken,
    codes: Callable[[torch.Tensor], torch.Tensor],
    tokens: torch.Tensor,
    directions: torch.Tensor,
    contexts: torch.Tensor,
    taus: tuple[float, ...],
    sizes: tuple[int, ...] = (),
    batch: int = 64,
) -> Measured:
    """Add each of `directions` [K, d] to the last token of its `contexts` [K, n]; `codes` reads the panel."""
    K, n = contexts.shape
    device, d = directions.device, directions.shape[1]
    flat = contexts.flatten().to(device)
    which = torch.arange(K, device=device).repeat_interleave(n)
    used, row_of = torch.unique(flat), torch.zeros(len(tokens), dtype=torch.long, device=device)
    row_of[used] = torch.arange(len(used), device=device)
    counts, panels = (
        torch.zeros(K * n, len(taus), device=device),
        torch.zeros(K * n, len(sizes), device=device),
    )
    l1, l2, moved = (torch.zeros(K * n, device=device) for _ in range(3))
    clean, steered = torch.zeros(len(used), d, device=device), torch.zeros(K * n, d, device=device)
    shift: torch.Tensor | None = None
    progress = tqdm(total=K * n, desc="steering", leave=False)
    for rows, before, after in engine.sweep(tokens, flat, which, directions, batch=batch):
        change = codes(after.reads[0]) - codes(before.reads[0])
        size = change.abs()
        for i, tau in enumerate(taus):
            counts[rows, i] = (size > tau).sum(1).float()
        for i, p in enumerate(sizes):
            panels[rows, i] = (size[:, :p] > taus[0]).sum(1).float()
        l1[rows], l2[rows] = size.sum(1), size.norm(dim=1)
        share = size / (l1[rows, None] + EPS)
        moved[rows] = torch.exp(-torch.special.xlogy(share, share).sum(1)) * (l1[rows] > EPS)
        clean[row_of[flat[rows]]], steered[rows] = before.final, after.final
        shift = torch.zeros(K, change.shape[1], device=device) if shift is None else shift
        shift.index_add_(0, which[rows], change / n)
        progress.update(len(rows))
    progress.close()
    shaped = [x.view(K, n, *x.shape[1:]) for x in (counts, panels, l1, l2, moved)]
    return Measured(flat.view(K, n), *shaped, clean, row_of, steered.view(K, n, d), shift)


def stability(gram: torch.Tensor) -> dict[str, float]:
    """Effect size, its variation, and cosines (to the mean, pairwise, leave-one-out) from K_xy = <D_x, D_y>."""
    gram = gram.double()
    size = gram.diagonal().clamp(min=0).sqrt()
    found = {"E": float(size.mean()), "E_cv": float(size.std(correction=0) / (size.mean() + EPS))}
    kept = size > EPS
    gram, size = gram[kept][:, kept], size[kept]
    n = len(size)
    names = ("S", "S_abs", "pair", "pair_abs", "S_loo")
    if n < 2:
        return found | dict.fromkeys(names, 0.0)
    rows, total = gram.sum(1), gram.sum()
    to_mean = rows / (
        size * total.clamp(min=EPS**2).sqrt()
    )  # <D_x, m> / |D_x||m| with m = sum_y D_y / n
    cosine = gram / (size[:, None] * size)
    off = ~torch.eye(n, dtype=torch.bool, device=gram.device)
    others = (total - 2 * rows + gram.diagonal()).clamp(min=EPS**2).sqrt()  # |sum of the others|
    alone = (rows - gram.diagonal()) / (size * others)
    values = (
        to_mean.mean(),
        to_mean.abs().mean(),
        cosine[off].mean(),
        cosine[off].abs().mean(),
        alone.mean(),
    )
    return found | {name: float(value) for name, value in zip(names, values, strict=True)}


@torch.no_grad()
def logit_labels(
    engine: LastToken, measured: Measured, columns: slice = slice(None), divergence: bool = True
) -> dict[str, np.ndarray]:
    """E, stability and KL of every direction, over some of its contexts.

    Without a softcap D = dz W_U, so <D_x, D_y> = dz_x G dz_y and no tensor has the size of the vocabulary.
    """
    G = engine.gram()
    found: dict[str, list[float]] = {}
    for after, contexts in zip(
        measured.steered[:, columns], measured.contexts[:, columns], strict=True
    ):
        before = measured.clean[measured.row_of[contexts]]
        if G is not None:
            dz = after - before
            labels = stability(dz @ G @ dz.T)
        if G is None or divergence:
            l0, l1 = engine.logits(before), engine.logits(after)
        if G is None:
            labels = stability((l1 - l0) @ (l1 - l0).T)
        if divergence:
            p0, p1 = l0.log_softmax(-1), l1.log_softmax(-1)
            labels["KL"] = float((p0.exp() * (p0 - p1)).sum(-1).mean())
            labels["KL_reverse"] = float((p1.exp() * (p1 - p0)).sum(-1).mean())
            labels["KL_per_E"] = labels["KL"] / (labels["E"] + EPS)
        for name, value in labels.items():
            found.setdefault(name, []).append(value)
    return {name: np.array(values) for name, values in found.items()}


def panel_labels(measured: Measured, columns: slice = slice(None)) -> dict[str, np.ndarray]:
    """C at the first threshold and what else the downstream panel tells, over some of the contexts."""
    means = {
        "C": measured.counts[:, columns, 0],
        "L2": measured.l2[:, columns],
        "moved": measured.moved[:, columns],
    }
    return {name: value.mean(1).double().cpu().numpy() for name, value in means.items()}


def labels(
    engine: LastToken, measured: Measured, columns: slice = slice(None), divergence: bool = True
) -> dict[str, np.ndarray]:
    """All labels of every direction; C_per_E is the count per effect, C / (E + eps)."""
    found = panel_labels(measured, columns) | logit_labels(engine, measured, columns, divergence)
    return found | {"C_per_E": found["C"] / (found["E"] + EPS)}


def matched_random(directions: torch.Tensor, seed: int) -> torch.Tensor:
    """One random direction for each given one, of the same length: the control of every claim about SAE directions."""
    noise = torch.from_numpy(np.random.default_rng(seed).standard_normal(tuple(directions.shape)))
    noise = noise.to(directions)
    return noise / noise.norm(dim=1, keepdim=True) * directions.norm(dim=1, keepdim=True)


@torch.no_grad()
def quantile_tau(
    engine: LastToken,
    codes: Callable[[torch.Tensor], torch.Tensor],
    tokens: torch.Tensor,
    directions: torch.Tensor,
    contexts: torch.Tensor,
    share: float,
) -> float:
    """The change that a share of the panel exceeds, over a few directions: for codes of another scale."""
    K, n = contexts.shape
    which = torch.arange(K, device=directions.device).repeat_interleave(n)
    sizes = [
        (codes(after.reads[0]) - codes(before.reads[0])).abs().flatten()
        for _, before, after in engine.sweep(
            tokens, contexts.flatten().to(directions.device), which, directions
        )
    ]
    sizes = torch.cat(sizes)
    return float(sizes.kthvalue(max(1, round((1 - share) * len(sizes)))).values)
