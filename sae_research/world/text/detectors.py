"""The truth gate: which true concepts, senses and topics have a latent of their own.

For every label the latent and its threshold are chosen on one half of the text and scored on the other, so that a
dictionary cannot profit from having many latents to choose from.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from sae_lens import SAE
    from torch import Tensor


@dataclass
class Codes:
    """The active latents of a text: one entry for each token and latent that fires."""

    token: "Tensor"
    """Token of each entry."""
    latent: "Tensor"
    """Latent of each entry."""
    value: "Tensor"
    """Activation of each entry, above zero."""
    n_tokens: int
    """Number of tokens."""
    n_latents: int
    """Number of latents."""

    def of(self, tokens: "Tensor") -> "Codes":
        """The codes of some of the tokens (a mask)."""
        keep = tokens[self.token]
        renumbered = tokens.cumsum(0) - 1
        return Codes(
            renumbered[self.token[keep]],
            self.latent[keep],
            self.value[keep],
            int(tokens.sum()),
            self.n_latents,
        )


@torch.no_grad()
def encode(sae: "SAE", residuals: "Tensor", batch: int = 8192) -> Codes:
    """Codes of residuals [tokens, d]."""
    parts = []
    for start in range(0, len(residuals), batch):
        codes = sae.encode(residuals[start : start + batch])
        token, latent = codes.nonzero(as_tuple=True)
        parts.append((token + start, latent, codes[token, latent]))
    return Codes(
        *(torch.cat(part) for part in zip(*parts, strict=True)), len(residuals), sae.cfg.d_sae
    )


@dataclass
class Detectors:
    """For each label the latent and threshold that tell it best, and how well."""

    latent: "Tensor"
    """Latent of each label."""
    threshold: "Tensor"
    """Activation from which the latent says yes."""
    f1: "Tensor"
    """F1 on the text that neither was chosen on; NaN where that text or the other lacks the label."""
    positives: "Tensor"
    """Tokens with the label in the scored text."""


def _ranked(codes: Codes, levels: int) -> tuple["Tensor", "Tensor"]:
    """Quantile level (0 to levels - 1) of each entry within its latent, and the lowest value of each level."""
    order = torch.argsort(codes.value, stable=True)
    order = order[torch.argsort(codes.latent[order], stable=True)]
    counts = torch.bincount(codes.latent, minlength=codes.n_latents)
    first = counts.cumsum(0) - counts
    latent = codes.latent[order]
    level = torch.empty_like(codes.latent)
    level[order] = (
        (torch.arange(len(order)) - first[latent]) * levels // counts[latent].clamp(min=1)
    )
    floors = torch.full((codes.n_latents * levels,), torch.inf)
    floors.scatter_reduce_(0, codes.latent * levels + level, codes.value, "amin")
    return level, floors.view(codes.n_latents, levels)


def _at_least(index: "Tensor", shape: tuple[int, ...]) -> "Tensor":
    """Counts of entries at each level or a higher one (the level is the last axis of `shape`)."""
    counts = torch.bincount(index, minlength=torch.Size(shape).numel()).view(shape).to(torch.int32)
    return counts.flip(-1).cumsum(-1).flip(-1)


def choose(
    codes: Codes, labels: "Tensor", n_labels: int, levels: int = 32
) -> tuple["Tensor", "Tensor"]:
    """The latent and the threshold (one of its quantiles) of largest F1 for each label."""
    level, floors = _ranked(codes, levels)
    fires = _at_least(codes.latent * levels + level, (codes.n_latents, levels))
    label = labels[codes.token]
    on = label >= 0
    index = (label[on] * codes.n_latents + codes.latent[on]) * levels + level[on]
    hits = _at_least(index, (n_labels, codes.n_latents, levels))
    positives = torch.bincount(labels[labels >= 0], minlength=n_labels)
    f1 = 2 * hits / (fires[None] + positives[:, None, None]).clamp(min=1)
    best = f1.flatten(1).argmax(1)
    return best // levels, floors.flatten()[best]


def score(
    codes: Codes, labels: "Tensor", latent: "Tensor", threshold: "Tensor"
) -> tuple["Tensor", "Tensor"]:
    """F1 of each label's detector, and how many tokens have the label."""
    n_labels = len(latent)
    owners = torch.zeros(n_labels, dtype=torch.long)
    hits = torch.zeros(n_labels, dtype=torch.long)
    order = torch.argsort(codes.latent, stable=True)
    ends = torch.bincount(codes.latent, minlength=codes.n_latents).cumsum(0)
    for i in range(n_labels):
        j = int(latent[i])
        entries = order[(int(ends[j - 1]) if j else 0) : int(ends[j])]
        fired = codes.token[entries[codes.value[entries] >= threshold[i]]]
        owners[i], hits[i] = len(fired), (labels[fired] == i).sum()
    positives = torch.bincount(labels[labels >= 0], minlength=n_labels)
    return 2 * hits / (owners + positives).clamp(min=1), positives


def detectors(
    codes: Codes, labels: "Tensor", n_labels: int, half: "Tensor", levels: int = 32
) -> Detectors:
    """Choose on the tokens of `half` (a mask), score on the others."""
    latent, threshold = choose(codes.of(half), labels[half], n_labels, levels)
    f1, positives = score(codes.of(~half), labels[~half], latent, threshold)
    seen = torch.bincount(labels[half][labels[half] >= 0], minlength=n_labels)
    return Detectors(
        latent, threshold, torch.where((seen > 0) & (positives > 0), f1, torch.nan), positives
    )
