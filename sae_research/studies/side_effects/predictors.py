"""Known before steering: geometry, activations, co-activation and direct logits of a feature."""

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from sae_research import steering
from sae_research.models import LanguageModel
from sae_research.studies.side_effects.pool import FIRES, Pool
from sae_research.studies.side_effects.settings import Settings

if TYPE_CHECKING:
    from sae_lens import SAE

GEOMETRY = ("decoder_norm", "encoder_norm", "encoder_decoder_cos", "crowding_max", "crowding")
FREQUENCY = ("final_frequency", "token_frequency")
MAGNITUDE = ("final_mean", "final_std", "final_max", "final_q95")
MAGNITUDE += ("token_mean", "token_std", "token_max")
SHAPE = ("binary_entropy", "activation_entropy", "kurtosis")
COACTIVATION = ("coactivation_entropy", "coactivation_count", "coactivation_top20")
TOP_LOGITS = (10, 50, 100, 500)
DIRECT_LOGIT = ("logit_l2", "logit_linf", "logit_entropy", "logit_exp_entropy")
DIRECT_LOGIT += tuple(f"logit_top{k}" for k in TOP_LOGITS)
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


def measure_crowding(
    decoder: torch.Tensor, features: torch.Tensor, nearest: int = 20, chunk: int = 4096
) -> torch.Tensor:
    """[features, nearest]: the largest |cos| of each decoder row with any other, descending."""
    unit = decoder / decoder.norm(dim=1, keepdim=True).clamp(min=1e-8)
    best = torch.empty(len(features), 0, device=decoder.device)
    for start in range(0, len(unit), chunk):
        cosine = (unit[features] @ unit[start : start + chunk].T).abs()
        inside = (features >= start) & (features < start + chunk)
        cosine[inside.nonzero()[:, 0], features[inside] - start] = 0.0
        best = torch.cat([best, cosine], dim=1).sort(dim=1, descending=True).values[:, :nearest]
    return best


def find_neighbours(
    decoder: torch.Tensor, feature: int, nearest: int = 10
) -> list[tuple[int, float]]:
    """The decoder rows most aligned with one feature's, with their signed cosines."""
    unit = decoder / decoder.norm(dim=1, keepdim=True).clamp(min=1e-8)
    cosine = unit @ unit[feature]
    cosine[feature] = 0.0
    found = cosine.abs().topk(min(nearest, len(cosine) - 1)).indices
    return [(int(i), float(cosine[i])) for i in found]


@torch.no_grad()
def fold_unembedding(model: LanguageModel, folded: bool = True) -> torch.Tensor:
    """W_U in float32; `folded` takes in the final norm's gain (and centring) and centres over the
    vocabulary.

    The gain is read off the norm's response to one vector, however a model stores it.
    """
    W = model.bridge.W_U.detach().float()
    if not folded:
        return W
    norm = model.bridge.ln_final
    dtype = next(norm.parameters()).dtype
    sign = torch.ones(model.d_model, device=W.device, dtype=dtype)
    sign[1::2] = -1  # mean 0 and root mean square 1, so neither kind of norm changes its scale
    W = ((norm(sign) - norm(-sign)).float() / 2 * sign.float())[:, None] * W
    centres = torch.allclose(norm(sign + 1), norm(sign), atol=1e-2)
    W = W - W.mean(0, keepdim=True) if centres else W
    return W - W.mean(1, keepdim=True)


def measure_direct_logits(directions: torch.Tensor, W: torch.Tensor) -> dict[str, np.ndarray]:
    """Statistics of r_f = d_f W_U and of its mass m = |r| / sum |r|."""
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in DIRECT_LOGIT}
    for part in directions.split(64):
        size = (part @ W).abs()
        mass = size / size.sum(1, keepdim=True).clamp(min=1e-12)
        entropy = -torch.special.xlogy(mass, mass).sum(1)
        top = mass.sort(dim=1, descending=True).values.cumsum(1)
        rows["logit_l2"].append(size.norm(dim=1))
        rows["logit_linf"].append(size.max(1).values)
        rows["logit_entropy"].append(entropy)
        rows["logit_exp_entropy"].append(entropy.exp())
        for k in TOP_LOGITS:
            # all of a small vocabulary is 1 exactly, without the noise of a sum
            whole = k >= top.shape[1]
            rows[f"logit_top{k}"].append(torch.ones_like(top[:, 0]) if whole else top[:, k - 1])
    return {name: torch.cat(parts).cpu().numpy() for name, parts in rows.items()}


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
    settings: Settings,
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
