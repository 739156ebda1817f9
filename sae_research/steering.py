"""Edits of the residual stream, in SAE space or along a direction, never at BOS.

Every edit is a function of the residual [batch, positions, d_model] for `LanguageModel.logits`,
`losses` or `generate`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae_research.errors import ResearchError
from sae_research.models import Edit

if TYPE_CHECKING:
    from sae_lens import SAE

Change = Callable[[Tensor], Tensor]
"""Takes feature activations [tokens, latents] and returns those to have instead."""


def edit(sae: "SAE", change: Change, positions: str | Tensor = "all") -> Edit:
    """x + dec(change(enc x)) - dec(enc x): the SAE's error stays, and what is not changed leaves
    x alone.

    `positions` is `all`, `last` or a boolean mask [batch, positions]; the first position, BOS,
    is never edited.
    """
    rows = directions(sae)

    def apply(residual: Tensor) -> Tensor:
        mask = _mask(residual, positions)
        acts = sae.encode(residual[mask].to(sae.device, sae.dtype))
        return _added(residual, mask, (change(acts) - acts) @ rows)

    return apply


def add_direction(
    direction: Tensor, coefficient: float = 1.0, positions: str | Tensor = "all"
) -> Edit:
    """x + coefficient * direction at `positions`; the direction keeps its length."""

    def apply(residual: Tensor) -> Tensor:
        return _added(residual, _mask(residual, positions), coefficient * direction)

    return apply


def clamp(latents: list[int], value: float) -> Change:
    """Give the latents one value whatever they were; 0 ablates them."""

    def change(acts: Tensor) -> Tensor:
        return acts.index_fill(-1, torch.as_tensor(latents, device=acts.device), value)

    return change


def directions(sae: "SAE") -> Tensor:
    """What one unit of each latent adds to the residual [latents, d_model]."""
    if sae.cfg.normalize_activations not in ("none", None):
        raise ResearchError(
            f"this SAE normalises each token ('{sae.cfg.normalize_activations}'), so a latent "
            "has no fixed direction; edit with an SAE that reads raw residuals."
        )
    rows = sae.W_dec.detach()
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        return rows / rows.norm(dim=-1, keepdim=True)
    return rows


def _mask(residual: Tensor, positions: str | Tensor) -> Tensor:
    """Where to edit, as a boolean mask [batch, positions] without the first position."""
    mask = torch.zeros(residual.shape[:2], dtype=torch.bool, device=residual.device)
    if not isinstance(positions, str):
        if positions.shape[-1] != mask.shape[-1]:
            raise ResearchError(
                f"the mask has {positions.shape[-1]} positions and the text {mask.shape[-1]}; "
                "give one a position."
            )
        mask |= positions.to(mask)
    elif positions == "all":
        mask[:] = True
    elif positions == "last":
        mask[:, -1] = True
    else:
        raise ResearchError(f"positions must be 'all', 'last' or a mask, not '{positions}'.")
    mask[:, 0] = False
    return mask


def _added(residual: Tensor, mask: Tensor, difference: Tensor) -> Tensor:
    """`residual` plus `difference` where `mask` is true, summed in the wider number format."""
    wide = torch.promote_types(residual.dtype, difference.dtype)
    edited = residual.clone()
    moved = residual[mask].to(wide) + difference.to(residual.device, wide)
    edited[mask] = moved.to(residual.dtype)
    return edited
