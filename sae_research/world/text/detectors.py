"""Which true concepts, senses and topics have a latent of their own.

For every label the latent and its threshold are chosen on one half of the text and scored on
the other, so that an SAE cannot profit from having many latents to choose from.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from sae_lens import SAE
    from torch import Tensor


@dataclass
class SparseActivations:
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

    def of(self, tokens: "Tensor") -> "SparseActivations":
        """The activations of some of the tokens (a mask)."""
        inside = tokens[self.token]
        renumbered = tokens.cumsum(0) - 1
        token = renumbered[self.token[inside]]
        latent, value = self.latent[inside], self.value[inside]
        return SparseActivations(token, latent, value, int(tokens.sum()), self.n_latents)


@torch.no_grad()
def encode(sae: "SAE", residuals: "Tensor", batch: int = 8192) -> SparseActivations:
    """SparseActivations of residuals [tokens, d]."""
    parts = []
    for start in range(0, len(residuals), batch):
        acts = sae.encode(residuals[start : start + batch])
        token, latent = acts.nonzero(as_tuple=True)
        parts.append((token + start, latent, acts[token, latent]))
    entries = [torch.cat(part) for part in zip(*parts, strict=True)]
    return SparseActivations(*entries, len(residuals), sae.cfg.d_sae)


@dataclass
class Detectors:
    """For each label the latent that detects it best, from some threshold on, and how well."""

    latent: "Tensor"
    """Latent of each label."""
    f1: "Tensor"
    """F1 on the text that neither was chosen on; NaN where either text lacks the label."""


def _ranked(acts: SparseActivations, levels: int) -> tuple["Tensor", "Tensor"]:
    """Quantile level of each entry within its latent, and the lowest value of each level."""
    order = torch.argsort(acts.value, stable=True)
    order = order[torch.argsort(acts.latent[order], stable=True)]
    counts = torch.bincount(acts.latent, minlength=acts.n_latents)
    first = counts.cumsum(0) - counts
    latent = acts.latent[order]
    rank = torch.arange(len(order)) - first[latent]
    level = torch.empty_like(acts.latent)
    level[order] = rank * levels // counts[latent].clamp(min=1)
    floors = torch.full((acts.n_latents * levels,), torch.inf)
    floors.scatter_reduce_(0, acts.latent * levels + level, acts.value, "amin")
    return level, floors.view(acts.n_latents, levels)


def _at_least(index: "Tensor", shape: tuple[int, ...]) -> "Tensor":
    """Counts of entries at each level or a higher one (the level is the last axis of `shape`)."""
    counts = torch.bincount(index, minlength=torch.Size(shape).numel()).view(shape).to(torch.int32)
    return counts.flip(-1).cumsum(-1).flip(-1)


def choose_latents(
    acts: SparseActivations, labels: "Tensor", n_labels: int, levels: int = 32
) -> tuple["Tensor", "Tensor"]:
    """The latent and the threshold (one of its quantiles) of largest F1 for each label."""
    level, floors = _ranked(acts, levels)
    fires = _at_least(acts.latent * levels + level, (acts.n_latents, levels))
    label = labels[acts.token]
    on = label >= 0
    index = (label[on] * acts.n_latents + acts.latent[on]) * levels + level[on]
    hits = _at_least(index, (n_labels, acts.n_latents, levels))
    positives = torch.bincount(labels[labels >= 0], minlength=n_labels)
    f1 = 2 * hits / (fires[None] + positives[:, None, None]).clamp(min=1)
    best = f1.flatten(1).argmax(1)
    return best // levels, floors.flatten()[best]


def score_latents(
    acts: SparseActivations, labels: "Tensor", latent: "Tensor", threshold: "Tensor"
) -> tuple["Tensor", "Tensor"]:
    """F1 of each label's detector, and how many tokens have the label."""
    n_labels = len(latent)
    owners = torch.zeros(n_labels, dtype=torch.long)
    hits = torch.zeros(n_labels, dtype=torch.long)
    order = torch.argsort(acts.latent, stable=True)
    ends = torch.bincount(acts.latent, minlength=acts.n_latents).cumsum(0)
    for i in range(n_labels):
        j = int(latent[i])
        entries = order[(int(ends[j - 1]) if j else 0) : int(ends[j])]
        fired = acts.token[entries[acts.value[entries] >= threshold[i]]]
        owners[i] = len(fired)
        hits[i] = (labels[fired] == i).sum()
    positives = torch.bincount(labels[labels >= 0], minlength=n_labels)
    return 2 * hits / (owners + positives).clamp(min=1), positives


def find_detectors(
    acts: SparseActivations, labels: "Tensor", n_labels: int, half: "Tensor", levels: int = 32
) -> Detectors:
    """Choose on the tokens of `half` (a mask), score on the others."""
    latent, threshold = choose_latents(acts.of(half), labels[half], n_labels, levels)
    f1, positives = score_latents(acts.of(~half), labels[~half], latent, threshold)
    seen = torch.bincount(labels[half][labels[half] >= 0], minlength=n_labels)
    f1 = torch.where((seen > 0) & (positives > 0), f1, torch.nan)
    return Detectors(latent, f1)
