"""Where the coordinates of a basis fire on a survey, in numbers and in words."""

import torch

from sae_research.bases import Basis
from sae_research.surveys.cached import CachedPrompts


class LatentActivity:
    """Where the coordinates of a basis fire on the survey."""

    @torch.no_grad()
    def __init__(self, cache: CachedPrompts, basis: Basis):
        self.cache = cache
        self.basis = basis
        self.place = cache.prompts.editable("question")
        self.parts = cache.microbatches(torch.arange(len(cache.residual)), 1)
        total = active = 0.0
        for rows in self.parts:
            acts = basis.encode(cache.residual[rows])[self.place[rows]]
            total = total + acts.sum(0)
            active = active + (acts > 0).float().sum(0)
        self.mean = (total / active.clamp(min=1)).cpu()
        self.share = (active / self.place.sum()).cpu()

    def effect(self, weights: torch.Tensor) -> torch.Tensor:
        """How strongly weights on latents [..., M] act on the survey."""
        return weights.abs() * self.mean * self.share.sqrt() * self.basis.decoder.norm(dim=-1).cpu()

    @torch.no_grad()
    def contexts(self, latents: torch.Tensor) -> list[tuple[str, ...]]:
        """The text on which each of some latents fires most."""
        acts = torch.cat(
            [
                self.basis.encode(self.cache.residual[r])[..., latents] * self.place[r][..., None]
                for r in self.parts
            ]
        ).cpu()
        return [_contexts(self.cache, acts[..., i]) for i in range(len(latents))]


def _contexts(
    cache: CachedPrompts, acts: torch.Tensor, n: int = 3, before: int = 4
) -> tuple[str, ...]:
    """The text up to the tokens on which a latent fires most, each text once."""
    found: dict[str, None] = {}
    length = acts.shape[1]
    for flat in acts.flatten().argsort(descending=True, stable=True)[: 20 * n].tolist():
        row, at = divmod(flat, length)
        words = [
            cache.model.tokenizer.decode([t]).strip()
            for t in cache.prompts.tokens[row, max(1, at - before) : at + 1].tolist()
        ]
        if acts[row, at] > 0:
            found[" ".join([*words[:-1], f"[{words[-1]}]"])] = None
        if len(found) == n:
            break
    return tuple(found)
