"""What the paper reads off the tail of an SAE (Figs 2 to 7, 14, 17, 18 and 20), from one call.

Definitions of "a token type has a feature" (the paper's own is unknown):
D1, some live latent is most active on it; D2, some latent has at least half of its activation on
it; D3, some latent fires on it at all.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import LongTensor, Tensor

from sae_research import explain
from sae_research.world.text.detectors import SparseActivations

if TYPE_CHECKING:
    from sae_lens import SAE

DEFINITIONS = ("D1", "D2", "D3")
QUANTILES = np.linspace(0, 1, 41)
RANKS = 40
BINS = 8


@dataclass
class TailReport:
    """Everything that is read off one SAE on one text."""

    summary: dict[str, float]
    """One number for each reading."""
    bins: pd.DataFrame
    """Token types by frequency: share with a feature, error, strongest activation (Figs 2, 3)."""
    coverage: pd.DataFrame
    """Cumulative share of the types with a feature, most frequent types first (Figs 6, 14)."""
    densities: pd.DataFrame
    """Quantiles of what the paper shows as densities (Figs 4, 5, 8, 20)."""
    ranks: pd.DataFrame
    """Activation counts of latents by rank (Fig. 7)."""
    counts: LongTensor
    """How often each latent fires."""
    acts: SparseActivations
    """What the latents do on the text."""


@dataclass
class TestText:
    """The text on which tails are read, by token."""

    x: Tensor
    """Residuals [tokens, d]."""
    tokens: LongTensor
    """Token types."""
    previous: LongTensor
    """Token types before them."""
    train: Tensor
    """Mask of the half of the documents on which explanations are chosen."""


def tail_report(sae: "SAE", text: TestText) -> TailReport:
    """Read the tail of an SAE on a text: every figure of the paper on rare tokens."""
    x, tokens = text.x, text.tokens
    acts, error = read_latents(sae, x)
    n_types = int(tokens.max()) + 1
    frequency = torch.bincount(tokens, minlength=n_types)
    mass = Mass.of(acts, tokens, n_types)
    has = find_types_with_feature(acts, tokens, mass)
    per_token = _measure_tokens(acts, error)
    cosines = decoder_cosines(sae.W_dec.detach())
    f1 = explain.score_token_rules(acts, tokens, text.previous, text.train)
    spread = {
        "entropy of a token's activations": per_token["entropy"],
        "strongest activation": per_token["strongest"],
        "entropy of a latent's types": mass.entropy()[mass.total > 0],
        "types of a latent": mass.entropy()[mass.total > 0].exp(),
        "diversity of contexts": explain.context_diversity(acts, x),
        "F1 of token rules": f1,
        "cosine of decoder rows": cosines,
    }
    bins = _bin_types(frequency, has, tokens, per_token)
    counts = torch.bincount(acts.latent, minlength=acts.n_latents)
    return TailReport(
        _summarize(frequency, has, tokens, per_token, spread, counts),
        bins,
        _accumulate(frequency, has),
        quantiles(spread),
        _rank(counts),
        counts,
        acts,
    )


@dataclass
class Mass:
    """Activation mass by latent and token type, without the pairs that have none."""

    latent: LongTensor
    type: LongTensor
    value: Tensor
    total: Tensor
    """Mass of each latent."""

    @classmethod
    def of(cls, acts: SparseActivations, tokens: LongTensor, n_types: int) -> "Mass":
        pair, index = (acts.latent * n_types + tokens[acts.token]).unique(return_inverse=True)
        value = torch.bincount(index, weights=acts.value.double(), minlength=len(pair))
        latent = pair // n_types
        total = torch.bincount(latent, weights=value, minlength=acts.n_latents)
        return cls(latent, pair % n_types, value, total)

    def entropy(self) -> Tensor:
        """-sum_v p(v) log p(v) of each latent, in nats; 0 for dead ones."""
        p = self.value / self.total[self.latent]
        return torch.bincount(self.latent, weights=-p * p.log(), minlength=len(self.total))


def find_types_with_feature(
    acts: SparseActivations, tokens: LongTensor, mass: Mass
) -> dict[str, Tensor]:
    """Whether each token type has a feature, by each definition."""
    n_types = int(tokens.max()) + 1
    order, place = explain.order_by_strength(acts.latent, acts.value)
    has = {name: torch.zeros(n_types, dtype=torch.bool) for name in DEFINITIONS}
    has["D1"][tokens[acts.token[order[place == 0]]]] = True
    has["D2"][mass.type[mass.value >= 0.5 * mass.total[mass.latent]]] = True
    has["D3"][mass.type] = True
    return has


@torch.no_grad()
def read_latents(sae: "SAE", x: Tensor, batch: int = 4096) -> tuple[SparseActivations, Tensor]:
    """Sparse activations on residuals x [tokens, d], and each token's squared error."""
    parts, errors = [], []
    for start in range(0, len(x), batch):
        rows = x[start : start + batch]
        acts = sae.encode(rows)
        token, latent = acts.nonzero(as_tuple=True)
        parts.append((token + start, latent, acts[token, latent]))
        errors.append((sae.decode(acts) - rows).square().sum(-1))
    entries = [torch.cat(part) for part in zip(*parts, strict=True)]
    return SparseActivations(*entries, len(x), sae.cfg.d_sae), torch.cat(errors)


def _measure_tokens(acts: SparseActivations, error: Tensor) -> dict[str, Tensor]:
    """Squared error, strongest activation and entropy over latents of each token."""
    n, value = acts.n_tokens, acts.value.double()
    total = torch.bincount(acts.token, weights=value, minlength=n)
    p = value / total[acts.token]
    entropy = torch.bincount(acts.token, weights=-p * p.log(), minlength=n)
    strongest = torch.zeros(n, dtype=value.dtype).scatter_reduce(0, acts.token, value, "amax")
    return {"error": error.double(), "strongest": strongest, "entropy": entropy}


def decoder_cosines(rows: Tensor, most: int = 2048) -> Tensor:
    """Absolute cosines of all pairs of decoder rows (Fig. 20), of evenly spaced rows if many."""
    unit = torch.nn.functional.normalize(rows[:: -(-len(rows) // most)], dim=1)
    found = (unit @ unit.T).abs()
    return found[torch.ones_like(found, dtype=torch.bool).triu(1)]


def _bin_types(frequency: Tensor, has: dict, tokens: LongTensor, per_token: dict) -> pd.DataFrame:
    """Token types in bins of equal numbers of types, the rarest first."""
    seen = frequency.nonzero()[:, 0]
    order = seen[frequency[seen].argsort(stable=True)]
    rows = []
    for types in order.tensor_split(min(BINS, len(order))):
        inside = torch.zeros_like(frequency, dtype=torch.bool)
        inside[types] = True
        at = inside[tokens]
        error = per_token["error"][at]
        rows.append(
            {
                "frequency": (frequency[types].double() / len(tokens)).log().mean().exp().item(),
                **{name: has[name][types].double().mean().item() for name in DEFINITIONS},
                "error": error.mean().item(),
                "error_sd": error.std().item(),
                "error_p99": error.quantile(0.99).item(),
                "error_max": error.max().item(),
                "strongest": per_token["strongest"][at].mean().item(),
            }
        )
    return pd.DataFrame(rows)


def _accumulate(frequency: Tensor, has: dict[str, Tensor], points: int = 21) -> pd.DataFrame:
    order = frequency.argsort(descending=True, stable=True)
    order = order[frequency[order] > 0]
    at = np.linspace(0, len(order), points).round().astype(int)
    table = {"share_of_types": at / len(order)}
    for name in DEFINITIONS:
        sums = np.concatenate([[0], has[name][order].cumsum(0).numpy()])
        table[name] = sums[at] / max(1, sums[-1])
    return pd.DataFrame(table)


def quantiles(spread: dict[str, Tensor]) -> pd.DataFrame:
    """Quantiles of each reading, which stand for its density."""
    tables = []
    for name, values in spread.items():
        found = np.quantile(values.double().numpy(), QUANTILES)
        tables.append(pd.DataFrame({"reading": name, "quantile": QUANTILES, "value": found}))
    return pd.concat(tables, ignore_index=True)


def _rank(counts: LongTensor) -> pd.DataFrame:
    ordered = counts.sort(descending=True).values
    ranks = np.unique(np.geomspace(1, len(ordered), RANKS).round().astype(int))
    return pd.DataFrame({"rank": ranks, "count": ordered[ranks - 1].numpy()})


def _summarize(
    frequency: Tensor,
    has: dict[str, Tensor],
    tokens: LongTensor,
    per_token: dict,
    spread: dict[str, Tensor],
    counts: LongTensor,
) -> dict[str, float]:
    """One number for each reading; the tail is the rarer half of the token types."""
    seen = frequency > 0
    rare = seen & (frequency <= frequency[seen].double().median())
    error = per_token["error"][rare[tokens]]
    found = {f"tail {name}": has[name][rare].double().mean().item() for name in DEFINITIONS}
    for name in DEFINITIONS:
        covered = has[name][seen].sum().clamp(min=1)
        found[f"share of coverage {name}"] = (has[name][rare].sum() / covered).item()
    found |= {
        "tail error": error.mean().item(),
        "tail error sd": error.std().item(),
        "tail error p99": error.quantile(0.99).item(),
        "tail error maximum": error.max().item(),
        "live latents": (counts > 0).double().mean().item(),
        "slope of counts": _slope(counts),
    }
    return found | {name: values.double().mean().item() for name, values in spread.items()}


def _slope(counts: LongTensor) -> float:
    """Slope of log count on log rank over live latents (Fig. 7)."""
    ordered = counts[counts > 0].sort(descending=True).values.double().log().numpy()
    ranks = np.log(np.arange(1, len(ordered) + 1))
    return float(np.polyfit(ranks, ordered, 1)[0]) if len(ordered) > 1 else float("nan")


def compare_counts(counts: LongTensor, baseline: LongTensor) -> Tensor:
    """log[(c + 1)/sum] - log[(c0 + 1)/sum0] of latents with the same index (Figs 17 and 18)."""
    own, other = (
        c.double().add(1).log() - c.double().add(1).sum().log() for c in (counts, baseline)
    )
    return own - other


def spread_of(rows: Tensor, points: int = 400) -> pd.DataFrame:
    """The two principal axes of unit decoder rows (Fig. 19 with PCA in the place of UMAP)."""
    unit = torch.nn.functional.normalize(rows, dim=1)[:: -(-len(rows) // points)]
    centred = unit - unit.mean(0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    return pd.DataFrame((centred @ axes[:2].T).numpy(), columns=["first", "second"])
