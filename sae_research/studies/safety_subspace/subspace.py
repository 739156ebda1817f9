"""From SAE features to an orthonormal basis: selection by contrast, decoder rows, SVD, QR."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import LongTensor, Tensor

from sae_research import saes, steering
from sae_research.errors import ResearchError
from sae_research.models import LanguageModel

if TYPE_CHECKING:
    from sae_lens import SAE

Bases = Mapping[int, Tensor]
"""An orthonormal basis [d, rank] of the residual's subspace at each block."""


@dataclass(frozen=True)
class Contrast:
    """What each latent does on aligned and unaligned texts."""

    aligned: Tensor
    """Mean activation over the tokens that count, [texts, latents]."""
    unaligned: Tensor
    """The same of the unaligned texts."""
    density: Tensor
    """Share of those tokens on which a latent is active, [latents]."""
    at_start: Tensor
    """Whether a latent is active on the start token, [latents]."""

    def delta(self, rows: Tensor | None = None) -> Tensor:
        """Mean activation on aligned texts minus that on unaligned ones, [latents]."""
        rows = torch.arange(len(self.aligned)) if rows is None else rows
        return self.aligned[rows].mean(0) - self.unaligned[rows].mean(0)


@dataclass(frozen=True)
class Selection:
    """The features that span the subspace at one hook."""

    latents: LongTensor
    """Their indices, the largest contrast first."""
    delta: Tensor
    """Their contrasts."""
    stability: float
    """Jaccard overlap of the selections from two halves of the texts."""


def measure_contrast(
    model: LanguageModel, sae: "SAE", aligned: LongTensor, unaligned: LongTensor, counted: slice
) -> Contrast:
    """Activations of an SAE on rows of tokens, averaged over the positions `counted`."""
    hook = saes.check_fit(model, sae)
    means = []
    active = torch.zeros(sae.cfg.d_sae)
    at_start = torch.zeros(sae.cfg.d_sae, dtype=torch.bool)
    for tokens in (aligned, unaligned):
        found = []
        for rows in tokens.split(256):
            acts = sae.encode(model.residual(rows, hook)).float().cpu()
            at_start |= (acts[:, 0] > 0).any(0)
            acts = acts[:, counted]
            active += (acts > 0).float().mean(1).sum(0)
            found.append(acts.mean(1))
        means.append(torch.cat(found))
    return Contrast(*means, active / (len(aligned) + len(unaligned)), at_start)


def _top(contrast: Contrast, k: int, allowed: Tensor, rows: Tensor | None = None) -> LongTensor:
    score = contrast.delta(rows).abs().masked_fill(~allowed, -1.0)
    return score.topk(k).indices


def select_features(
    contrast: Contrast, k: int, *, max_density: float | None = None, seed: int = 0
) -> Selection:
    """The `k` latents of largest absolute contrast that neither fire too often nor at the start.

    The paper names no filter; both are ours.
    """
    allowed = ~contrast.at_start
    if max_density is not None:
        allowed &= contrast.density <= max_density
    if int(allowed.sum()) < k:
        raise ResearchError(
            f"{int(allowed.sum())} latents pass the density and start-token filters, fewer than "
            f"the {k} asked for; raise `max_density` or ask for fewer."
        )
    latents = _top(contrast, k, allowed)
    texts = len(contrast.aligned)
    order = torch.randperm(texts, generator=torch.Generator().manual_seed(seed))
    halves = [
        set(_top(contrast, k, allowed, rows).tolist())
        for rows in (order[: texts // 2], order[texts // 2 :])
        if len(rows)
    ]
    stability = len(set.intersection(*halves)) / len(set.union(*halves))
    return Selection(latents, contrast.delta()[latents], stability)


def decoder_rows(sae: "SAE", latents: Sequence[int] | LongTensor) -> Tensor:
    """The unit decoder directions of some latents, [latents, d]."""
    rows = steering.directions(sae)[torch.as_tensor(latents)]
    return torch.nn.functional.normalize(rows.float(), dim=-1)


def build_basis(rows: Tensor, *, tau: float = 1.0, rank: int | None = None) -> Tensor:
    """Orthonormal basis [d, q] of the leading components of `rows` [k, d], not centred.

    q is the least number that holds a share `tau` of the squared singular values, or `rank`.
    """
    _, s, right = torch.linalg.svd(rows, full_matrices=False)
    independent = int((s > 1e-6 * s.max()).sum())
    if rank is None:
        held = s.square().cumsum(0) / s.square().sum()
        rank = min(int((held < tau - 1e-6).sum()) + 1, independent)
    if not 0 < rank <= independent:
        raise ResearchError(
            f"a rank of {rank} does not fit a subspace of dimension {independent}; select more "
            "features or lower the adapter's rank."
        )
    return torch.linalg.qr(right[:rank].T).Q


def assign_bases(
    found: Bases, n_layers: int, how: Literal["nearest", "pooled", "sae_layers_only"] = "nearest"
) -> dict[int, Tensor]:
    """A basis for each block, from those of the blocks that have an SAE.

    The paper does not say what the other blocks get: the basis of the nearest block, the leading
    components of all bases together, or no adapter.
    """
    wrong = [layer for layer in found if not 0 <= layer < n_layers]
    if wrong or not found:
        raise ResearchError(
            f"there is no SAE at block {wrong[0] if wrong else 0} of a model of {n_layers} blocks; "
            "give a basis for a block that has one."
        )
    if how == "sae_layers_only":
        return dict(found)
    if how == "pooled":
        rank = min(basis.shape[1] for basis in found.values())
        both = build_basis(torch.cat([b.T for b in found.values()]), rank=rank)
        return dict.fromkeys(range(n_layers), both)
    return {n: found[owner] for n, owner in nearest(found, n_layers).items()}


def nearest(blocks: Iterable[int], n_layers: int) -> dict[int, int]:
    """For each block of a model the nearest of some blocks, the earlier one of two as near."""
    return {n: min(sorted(blocks), key=lambda block: abs(block - n)) for n in range(n_layers)}


def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """Angles in radians between two subspaces, given by orthonormal bases [d, r]."""
    cosines = torch.linalg.svdvals(first.T @ second).clamp(max=1.0)
    return torch.arccos(cosines)


def recovery_error(truth: Tensor, estimate: Tensor) -> float:
    """The part of the true subspace that is missed: sqrt(r - |U*^T U|_F^2), the sin-theta norm."""
    missed = truth.shape[1] - (truth.T @ estimate).square().sum()
    return float(missed.clamp(min=0).sqrt())


def excess(truth: Tensor, estimate: Tensor) -> float:
    """The part of the estimate that lies outside the true subspace, |(I - U* U*^T) U|_F."""
    return float((estimate - truth @ (truth.T @ estimate)).norm())
