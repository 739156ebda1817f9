"""One clean pass over the contexts: what fires, which features to steer and where."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm.auto import tqdm

from sae_research.errors import ResearchError
from sae_research.last_token import LastToken
from sae_research.latents import FIRES, ActivationSums, encode
from sae_research.screening.settings import ScreenSettings

if TYPE_CHECKING:
    from sae_lens import SAE


@dataclass
class Pool:
    """What one clean pass over the contexts tells about both SAEs."""

    tokens: torch.Tensor
    """[contexts, T], no padding; the first is BOS, the last is the one that will be steered."""
    last: torch.Tensor
    """[contexts, d]: residual of the final token at the primary hook."""
    downstream: torch.Tensor
    """[contexts, d]: residual of the final token at the downstream hook, where effects are read."""
    fires: torch.Tensor
    """[contexts, latents] booleans of the primary SAE at the final token."""
    sums: ActivationSums
    """The primary SAE's activations over all tokens."""
    downstream_frequency: torch.Tensor
    """Fraction of contexts in which each downstream latent fires at the final token."""
    l0: tuple[float, float]
    """Mean number of active latents at the final token, primary and downstream."""

    @property
    def frequency(self) -> torch.Tensor:
        """Fraction of contexts in which each primary latent fires at the final token."""
        return self.fires.float().mean(0)


@torch.no_grad()
def run_clean_pass(
    engine: LastToken, sae: "SAE", downstream: "SAE", tokens: torch.Tensor, batch_size: int = 64
) -> Pool:
    """One clean pass over contexts, by the engine so that all above the edit is in float32."""
    sums = ActivationSums(sae.cfg.d_sae, sae.device)
    last, below, fires = [], [], []
    counts = torch.zeros(())
    n_active = 0.0
    for rows in tqdm(tokens.split(batch_size), desc="clean pass", leave=False):
        residual = engine.residual(rows)
        read_out = engine.record(rows, residual).clean.reads[0]
        acts = encode(sae, residual)
        sums.add(acts[:, 1:].flatten(0, 1))  # BOS has a residual like no other token
        last.append(residual[:, -1])
        below.append(read_out)
        fires.append(acts[:, -1] > FIRES)
        counts = counts + (encode(downstream, read_out) > FIRES).float().sum(0).to(sae.device)
        n_active += fires[-1].sum().item()
    n = len(tokens)
    frequency = counts / n
    return Pool(
        tokens=tokens,
        last=torch.cat(last),
        downstream=torch.cat(below),
        fires=torch.cat(fires),
        sums=sums,
        downstream_frequency=frequency,
        l0=(n_active / n, float(frequency.sum())),
    )


def find_eligible(pool: Pool, band: tuple[float, float]) -> torch.Tensor:
    """Latents whose final-token frequency lies in the band, ascending."""
    frequency = pool.frequency
    return ((frequency >= band[0]) & (frequency <= band[1])).nonzero()[:, 0]


def sample_features(pool: Pool, settings: ScreenSettings, seed: int) -> torch.Tensor:
    """Eligible features: evenly spaced ranks of frequency (author) or random ones (replication)."""
    n = settings.n_features
    band = settings.frequency_band
    eligible = find_eligible(pool, band).cpu()
    least = settings.min_eligible_features
    if least is not None and least <= len(eligible) < n:
        return eligible
    if len(eligible) < n:
        raise ResearchError(
            f"only {len(eligible)} latents fire in {band[0]:g} to {band[1]:g} of the contexts, "
            f"fewer than the {n} features asked for; ask for fewer features or give more contexts."
        )
    if settings.protocol == "author":
        order = torch.argsort(pool.frequency.cpu()[eligible], descending=True, stable=True)
        ranks = np.linspace(0, len(eligible) - 1, n).round().astype(int)
        return eligible[order[torch.from_numpy(ranks)]].sort().values
    chosen = np.random.default_rng(seed).choice(len(eligible), n, replace=False)
    return eligible[torch.from_numpy(np.sort(chosen))]


def choose_contexts(acts: torch.Tensor, per_bucket: int, seed: int) -> torch.Tensor:
    """Most active, least active and random other contexts of each feature (a column of `acts`).

    Returns [features, 3 per_bucket]. Most latents are silent nearly everywhere, so ties are broken
    at random but the same in every run.
    """
    n, n_features = acts.shape
    if n < 3 * per_bucket:
        raise ResearchError(
            f"{n} contexts are too few for {3 * per_bucket} different ones per feature; give more "
            "contexts."
        )
    rng = np.random.default_rng(seed)
    order = np.lexsort((rng.random((n_features, n)), acts.T.cpu().numpy()), axis=-1)
    middle = order[:, per_bucket : n - per_bucket]
    drawn = rng.random(middle.shape).argsort(axis=1)[:, :per_bucket]
    others = np.take_along_axis(middle, drawn, axis=1)
    chosen = [order[:, n - per_bucket :], order[:, :per_bucket], others]
    return torch.from_numpy(np.concatenate(chosen, axis=1))


def share_contexts(n: int, size: int, n_features: int, seed: int) -> torch.Tensor:
    """The same random contexts for every feature, [features, size]."""
    if n < size:
        raise ResearchError(
            f"{n} contexts are too few for {size} different ones; give more contexts."
        )
    drawn = np.random.default_rng(seed).choice(n, size, replace=False)
    return torch.from_numpy(np.sort(drawn)).expand(n_features, -1)


def choose_panel(pool: Pool, size: int) -> torch.Tensor:
    """The panel: downstream latents that fire most often at the final token, in that order."""
    return torch.argsort(pool.downstream_frequency, descending=True, stable=True)[:size]
