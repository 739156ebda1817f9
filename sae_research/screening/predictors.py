"""Known before steering: geometry, activations, co-activation and direct logits of a feature."""

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from sae_research import steering
from sae_research.latents import DIRECT_LOGIT, FIRES, measure_crowding, measure_direct_logits
from sae_research.screening.pool import Pool
from sae_research.screening.settings import ScreenSettings

if TYPE_CHECKING:
    from sae_lens import SAE

GEOMETRY = ("decoder_norm", "encoder_norm", "encoder_decoder_cos", "crowding_max", "crowding")
FREQUENCY = ("final_frequency", "token_frequency")
MAGNITUDE = ("final_mean", "final_std", "final_max", "final_q95")
MAGNITUDE += ("token_mean", "token_std", "token_max")
SHAPE = ("binary_entropy", "activation_entropy", "kurtosis")
COACTIVATION = ("coactivation_entropy", "coactivation_count", "coactivation_top20")
FAMILIES = (GEOMETRY, FREQUENCY, MAGNITUDE, SHAPE, COACTIVATION, DIRECT_LOGIT)
ALL = tuple(name for family in FAMILIES for name in family)
BASELINES = ("freq_only", "activation_magnitude_only")
SETS = {
    "freq_only": FREQUENCY,
    "activation_magnitude_only": MAGNITUDE,
    "activation_shape_only": SHAPE,
    "crowding_only": ("crowding",),
    "geometry_only": GEOMETRY,
    "direct_logit_only": DIRECT_LOGIT,
    "coactivation_only": COACTIVATION,
    "compact_no_magnitude": (
        *GEOMETRY,
        *FREQUENCY,
        *SHAPE,
        *COACTIVATION[:2],
        *DIRECT_LOGIT[:3],
        "logit_top10",
    ),
    "full_no_magnitude": tuple(name for name in ALL if name not in MAGNITUDE),
    "full_all": ALL,
}
"""The ten predictor sets; the 16 columns of `compact_no_magnitude` are not published, ours are not
collinear."""


def measure_coactivation(
    fires: torch.Tensor, features: torch.Tensor, n_partners: int, protocol: str
) -> dict[str, np.ndarray]:
    """Entropy, mean count and top-20 mass of the latents that fire with each feature.

    At the final token; q_j is the share of partner j among all joint firings. Author: partners are
    the most frequent latents, the feature itself included if it is one; replication: all latents
    but itself.
    """
    n = fires.shape[1]
    chosen = torch.arange(n, device=fires.device)
    if protocol == "author":
        chosen = torch.argsort(fires.float().mean(0), descending=True, stable=True)[:n_partners]
    joint = fires[:, features].float().T @ fires[:, chosen].float()
    if protocol != "author":
        joint[torch.arange(len(features), device=fires.device), features.to(fires.device)] = 0.0
    times = fires[:, features].sum(0).clamp(min=1).float()
    q = joint / joint.sum(1, keepdim=True).clamp(min=1e-12)
    found = {
        "coactivation_entropy": -torch.special.xlogy(q, q).sum(1) / np.log(len(chosen)),
        "coactivation_count": joint.sum(1) / times,
        "coactivation_top20": q.topk(min(20, q.shape[1]), dim=1).values.sum(1),
    }
    return {name: value.cpu().numpy() for name, value in found.items()}


@torch.no_grad()
def make_predictor_table(
    sae: "SAE",
    pool: Pool,
    features: torch.Tensor,
    acts: torch.Tensor,
    W: torch.Tensor,
    settings: ScreenSettings,
) -> pd.DataFrame:
    """Every predictor; `acts` [contexts, features] at the final token, W by `fold_unembedding`."""
    features = features.to(sae.device)
    directions = steering.directions(sae)[features].float()
    encoder = sae.W_enc.T[features].float()
    near = measure_crowding(sae.W_dec.detach().float(), features)
    a = acts.double().cpu().numpy()
    tokens = pool.sums.compute_statistics(features)
    p = (a > FIRES).mean(0)
    safe = np.clip(p, 1e-12, 1 - 1e-12)
    columns = {
        "decoder_norm": directions.norm(dim=1).cpu().numpy(),
        "encoder_norm": encoder.norm(dim=1).cpu().numpy(),
        "encoder_decoder_cos": torch.cosine_similarity(encoder, directions).cpu().numpy(),
        "crowding_max": near[:, 0].cpu().numpy(),
        "crowding": near.mean(1).cpu().numpy(),
        "final_frequency": p,
        "token_frequency": tokens["frequency"],
        "final_mean": a.mean(0),
        "final_std": a.std(0),
        "final_max": a.max(0),
        "final_q95": np.quantile(a, 0.95, axis=0),
        "token_mean": tokens["mean"],
        "token_std": tokens["std"],
        "token_max": tokens["max"],
        "binary_entropy": -safe * np.log(safe) - (1 - safe) * np.log(1 - safe),
        "activation_entropy": tokens["entropy"],
        "kurtosis": tokens["kurtosis"],
        **measure_coactivation(
            pool.fires, features, settings.n_downstream_latents, settings.protocol
        ),
        **measure_direct_logits(directions, W),
    }
    return pd.DataFrame(
        {name: columns[name] for name in ALL},
        index=pd.Index(features.cpu().numpy(), name="feature"),
    )
