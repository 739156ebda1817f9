"""Contexts read once: which latents fire at the final token, and which features and contexts to steer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm.auto import tqdm

from sae_research.errors import ResearchError
from sae_research.last_token import LastToken

if TYPE_CHECKING:
    from sae_lens import SAE

FIRES = 1e-6
"""A latent fires above this activation (published code)."""


def reader(sae: "SAE", columns: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from residuals to the float32 codes of some latents, computing no others where that is exact."""
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE
    from sae_lens.saes.standard_sae import StandardSAE

    columns = columns.to(sae.device)
    if not isinstance(sae, StandardSAE | JumpReLUSAE):  # TopK kinds let latents compete
        return lambda residual: encode(sae, residual)[..., columns]
    W, b = sae.W_enc[:, columns], sae.b_enc[columns]
    threshold = sae.threshold[columns] if isinstance(sae, JumpReLUSAE) else None

    def codes(residual: torch.Tensor) -> torch.Tensor:
        pre = sae.process_sae_in(residual.to(sae.device)) @ W + b
        post = sae.activation_fn(pre)
        return (post if threshold is None else post * (pre > threshold)).float()

    return codes


def encode(sae: "SAE", residual: torch.Tensor) -> torch.Tensor:
    """All codes as a dense float32 tensor."""
    codes = sae.encode(residual.to(sae.device))
    return (codes.to_dense() if codes.is_sparse else codes).float()


@dataclass
class Moments:
    """Sums over tokens of each latent's activation, from which its statistics follow."""

    tokens: int
    """Tokens seen."""
    sums: torch.Tensor
    """[4, latents]: sums of a, a^2, a^3 and a^4, in float64."""
    log_sum: torch.Tensor
    """Sum of a ln a."""
    firing: torch.Tensor
    """Tokens on which the latent fires."""
    largest: torch.Tensor
    """Largest activation."""

    @classmethod
    def none(cls, latents: int, device: torch.device) -> "Moments":
        """Before any token."""
        zero = torch.zeros(latents, dtype=torch.float64, device=device)
        return cls(0, zero.expand(4, -1).clone(), zero.clone(), zero.clone(), zero.clone())

    def add(self, codes: torch.Tensor) -> None:
        """Count in some tokens [tokens, latents]."""
        self.tokens += len(codes)
        power = codes
        for k in range(4):
            self.sums[k] += power.sum(0)
            power = power * codes
        self.log_sum += torch.special.xlogy(codes, codes).sum(0)
        self.firing += (codes > FIRES).sum(0)
        self.largest = torch.maximum(self.largest, codes.max(0).values.double())

    def statistics(self, latents: torch.Tensor) -> dict[str, np.ndarray]:
        """Mean, std, max, frequency, kurtosis m4/m2^2 and normalised entropy of some latents."""
        a1, a2, a3, a4 = self.sums[:, latents] / self.tokens
        variance = (a2 - a1**2).clamp(min=0)
        m4 = a4 - 4 * a1 * a3 + 6 * a1**2 * a2 - 3 * a1**4
        total = self.sums[0, latents].clamp(min=1e-12)
        entropy = (total.log() - self.log_sum[latents] / total) / np.log(self.tokens)
        found = {
            "mean": a1,
            "std": variance.sqrt(),
            "max": self.largest[latents],
            "frequency": self.firing[latents] / self.tokens,
            "kurtosis": m4 / variance.clamp(min=1e-12) ** 2,
            "entropy": entropy.clamp(0, 1),
        }
        return {name: value.cpu().numpy() for name, value in found.items()}


@dataclass
class Pool:
    """What one clean pass over the contexts tells about both dictionaries."""

    tokens: torch.Tensor
    """[contexts, T], no padding; the first is BOS, the last is the one that will be edited."""
    last: torch.Tensor
    """[contexts, d]: residual of the final token at the primary hook."""
    below: torch.Tensor
    """[contexts, d]: residual of the final token at the downstream hook, where effects are read."""
    fires: torch.Tensor
    """[contexts, latents] booleans of the primary dictionary at the final token."""
    moments: Moments
    """The primary dictionary's activations over all tokens."""
    downstream_frequency: torch.Tensor
    """Share of contexts in which each downstream latent fires at the final token."""
    l0: tuple[float, float]
    """Mean number of active latents at the final token, primary and downstream."""

    @property
    def frequency(self) -> torch.Tensor:
        """freq_f: share of contexts in which each primary latent fires at the final token."""
        return self.fires.float().mean(0)


@torch.no_grad()
def read(
    engine: LastToken, primary: "SAE", downstream: "SAE", tokens: torch.Tensor, batch: int = 64
) -> Pool:
    """One clean pass over `tokens`, through the engine so that everything above the edit is in float32."""
    moments = Moments.none(primary.cfg.d_sae, primary.device)
    last, below, fires, counts, active = [], [], [], 0.0, 0.0
    for rows in tqdm(tokens.split(batch), desc="clean pass", leave=False):
        residual = engine.residual(rows)
        read_out = engine.record(rows, residual).clean.reads[0]
        codes = encode(primary, residual)
        moments.add(codes[:, 1:].flatten(0, 1))  # BOS has a residual like no other
        final = codes[:, -1] > FIRES
        down = encode(downstream, read_out) > FIRES
        last.append(residual[:, -1])
        below.append(read_out)
        fires.append(final)
        counts = counts + down.float().sum(0)
        active += final.sum().item()
    n = len(tokens)
    frequency = counts / n
    return Pool(
        tokens,
        torch.cat(last),
        torch.cat(below),
        torch.cat(fires),
        moments,
        frequency,
        (active / n, float(frequency.sum())),
    )


def eligible(pool: Pool, band: tuple[float, float]) -> torch.Tensor:
    """Latents whose final-token frequency lies in the band, ascending."""
    frequency = pool.frequency
    return ((frequency >= band[0]) & (frequency <= band[1])).nonzero()[:, 0]


def sample(
    pool: Pool,
    band: tuple[float, float],
    n: int,
    protocol: str,
    seed: int,
    fewest: int | None = None,
) -> torch.Tensor:
    """`n` features: evenly spaced ranks of the descending frequency (author) or uniformly random (replication)."""
    found = eligible(pool, band).cpu()
    if fewest is not None and fewest <= len(found) < n:
        return found
    if len(found) < n:
        raise ResearchError(
            f"only {len(found)} latents fire in {band[0]:g} to {band[1]:g} of the contexts, fewer than the {n} "
            "features asked for; ask for fewer features or give more contexts."
        )
    if protocol == "author":
        order = torch.argsort(pool.frequency.cpu()[found], descending=True, stable=True)
        return (
            found[order[torch.from_numpy(np.linspace(0, len(found) - 1, n).round().astype(int))]]
            .sort()
            .values
        )
    chosen = np.random.default_rng(seed).choice(len(found), n, replace=False)
    return found[torch.from_numpy(np.sort(chosen))]


def mixed_contexts(activations: torch.Tensor, each: int, seed: int) -> torch.Tensor:
    """The `each` most active contexts of a feature (column), the least active and random others, [features, 3 each].

    Most latents are silent nearly everywhere, so ties are broken at random but the same in every run.
    """
    n, features = activations.shape
    if n < 3 * each:
        raise ResearchError(
            f"{n} contexts are too few for {3 * each} different ones a feature; give more contexts."
        )
    rng = np.random.default_rng(seed)
    order = np.lexsort((rng.random((features, n)), activations.T.cpu().numpy()), axis=-1)
    middle = order[:, each : n - each]
    others = np.take_along_axis(middle, rng.random(middle.shape).argsort(axis=1)[:, :each], axis=1)
    return torch.from_numpy(np.concatenate([order[:, n - each :], order[:, :each], others], axis=1))


def panel(pool: Pool, size: int) -> torch.Tensor:
    """P: the downstream latents that fire most often at the final token, most frequent first."""
    return torch.argsort(pool.downstream_frequency, descending=True, stable=True)[:size]
