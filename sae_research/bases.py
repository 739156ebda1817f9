"""Bases of the residual stream in which a shift acts: an SAE's latents, and what replaces them.

x' = x + W_dec^T (f' - f) with f = enc(x): the part of x that the dictionary does not explain
stays, so a zero shift is exactly the frozen model. Only the `literal` edit drops it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sae_research.errors import unknown

if TYPE_CHECKING:
    from sae_lens import SAE

EDITS = ("additive", "multiplicative", "gated", "literal")


@dataclass(frozen=True)
class Basis:
    """Coordinates of the residual stream and the row of residual space that each of them writes."""

    encode: Callable[[torch.Tensor], torch.Tensor]
    """f = enc(x), [..., d] to [..., M]."""
    decoder: torch.Tensor
    """W_dec, [M, d]."""
    offset: torch.Tensor | None = None
    """b of x_hat = W_dec^T f + b; only the literal edit reads it."""
    signed: bool = False
    """Whether codes may be negative; where not, the additive edit keeps them at or above zero."""

    @property
    def size(self) -> int:
        """M, the number of coordinates."""
        return len(self.decoder)

    def reconstruct(self, acts: torch.Tensor) -> torch.Tensor:
        """x_hat = W_dec^T f + b."""
        found = acts @ self.decoder
        return found if self.offset is None else found + self.offset


def sae_basis(sae: "SAE") -> Basis:
    """The latents of an SAE, with rows as `decode` applies them to its codes."""
    from sae_research.steering import directions

    with torch.no_grad():
        rows = directions(sae).float()
        nothing = torch.zeros(1, len(rows), device=rows.device, dtype=sae.dtype)
        offset = sae.decode(nothing)[0].float()

    @torch.no_grad()
    def encode(x: torch.Tensor) -> torch.Tensor:
        return sae.encode(x.to(sae.dtype)).float()

    return Basis(encode, rows, offset)


def random_basis(residuals: torch.Tensor, size: int, l0: float, seed: int) -> Basis:
    """As many random unit rows as the SAE has latents; on every token as many active as its L0."""
    random = torch.Generator().manual_seed(seed)
    rows = torch.randn(size, residuals.shape[-1], generator=random).to(residuals)
    rows = rows / rows.norm(dim=-1, keepdim=True)
    mean = residuals.mean(0)
    k = max(1, round(l0))

    def encode(x: torch.Tensor) -> torch.Tensor:
        found = (x - mean) @ rows.T
        largest = found.topk(k, dim=-1)
        return torch.zeros_like(found).scatter(-1, largest.indices, largest.values.clamp(min=0))

    return Basis(encode, rows, mean)


def pca_basis(residuals: torch.Tensor) -> Basis:
    """Principal components, each split by sign into two non-negative codes: error-free."""
    mean = residuals.mean(0)
    components = torch.linalg.svd(residuals - mean, full_matrices=False).Vh
    rows = torch.cat([components, -components])
    return Basis(lambda x: torch.relu((x - mean) @ rows.T), rows, mean)


def token_basis(residuals: torch.Tensor, tokens: torch.Tensor) -> Basis:
    """A vector for every token of the survey: all that gating by token can do without an SAE.

    Which token a residual belongs to is read off it: the nearest of the tokens' means.
    """
    names, which = tokens.unique(return_inverse=True)
    width = residuals.shape[-1]
    sums = torch.zeros(len(names), width).to(residuals).index_add_(0, which, residuals)
    means = sums / which.bincount()[:, None]

    def encode(x: torch.Tensor) -> torch.Tensor:
        near = torch.cdist(x.flatten(0, -2), means).argmin(-1)
        hot = torch.nn.functional.one_hot(near, len(names)).to(x)
        return hot.repeat_interleave(width, -1).unflatten(0, x.shape[:-1])

    return Basis(encode, torch.eye(width).to(residuals).repeat(len(names), 1))


def residual_basis(width: int, device: str = "cpu") -> Basis:
    """The residual's own coordinates: an additive shift here is a dense steering vector."""
    return Basis(lambda x: x, torch.eye(width, device=device), signed=True)


def compute_displacement(
    basis: Basis, kind: str, x: torch.Tensor, acts: torch.Tensor, delta: torch.Tensor
) -> torch.Tensor:
    """x' - x, [rows, shifts, positions, d], of residuals [rows, positions, d] under shifts.

    additive f' = relu(f + Delta), multiplicative f' = f exp(Delta), gated f' = f + 1[f > 0]
    Delta, and literal x' = W_dec^T (f + Delta) + b. The second and third are linear in f, so
    each shift of [shifts, M] becomes one matrix [M, d].
    """
    delta = delta.to(basis.decoder.device)
    if kind == "multiplicative":
        return torch.einsum("btm,smd->bstd", acts, torch.expm1(delta)[..., None] * basis.decoder)
    if kind == "gated":
        return torch.einsum("btm,smd->bstd", (acts != 0).to(acts), delta[..., None] * basis.decoder)
    if kind == "literal":
        return (basis.reconstruct(acts) - x)[:, None] + (delta @ basis.decoder)[None, :, None]
    if kind != "additive":
        raise unknown("edit", kind, EDITS, "a shift")
    if basis.signed:
        return (delta @ basis.decoder)[None, :, None].expand(len(x), -1, x.shape[1], -1)
    moved = torch.relu(acts[:, None] + delta[None, :, None]) - acts[:, None]
    return moved @ basis.decoder
