"""Forecasts of the labels that steer no feature; the paper's predictors only correlate.

All propagate a step along a decoder row through something cheap and read the downstream panel
there: the identity path (the residual stream as if no block lay between), Jacobians of the upper
blocks on a few clean contexts, or a linear map fitted on random directions. The output score of
Arad et al. 2025, which does steer (one prompt per feature), stands beside them for comparison.
"""

import numpy as np
import torch

from sae_research.jacobians import Jacobians
from sae_research.last_token import LastToken
from sae_research.latents import LatentEncoder
from sae_research.screening.labels import EPS, compute_stability

MAX_CELLS = 50_000_000
"""Activations held at once while counting."""


def count_moved(
    encode_panel: LatentEncoder, clean: torch.Tensor, propagated: torch.Tensor, tau: float
) -> np.ndarray:
    """Mean over clean downstream residuals of the panel latents that each of `propagated` would
    move by more than tau.

    `propagated` is [features, d], or [contexts, features, d] if each context has its own.
    """
    u0 = encode_panel(clean)
    n_features = propagated.shape[-2]
    moved = torch.zeros(n_features, device=clean.device)
    for some in torch.arange(n_features, device=clean.device).split(
        max(1, MAX_CELLS // u0.numel())
    ):
        steps = propagated[..., some, :].expand(len(clean), -1, -1)
        change = encode_panel(clean[:, None] + steps) - u0[:, None]
        moved[some] = (change.abs() > tau).sum(-1).float().mean(0)
    return moved.double().cpu().numpy()


def forecast_linear_labels(
    J: Jacobians,
    engine: LastToken,
    encode_panel: LatentEncoder,
    directions: torch.Tensor,
    tau: float,
) -> dict[str, np.ndarray]:
    """C, C per E, E and |S| of every direction, were the upper blocks linear around each context;
    `C^mean_jacobian` uses one Jacobian for all, their mean.
    """
    G = engine.W_U @ engine.W_U.T  # the slope of a softcap at the clean state is left out
    dz = directions @ J.final
    labels = [compute_stability(dz[:, f] @ G @ dz[:, f].T) for f in range(len(directions))]
    count = count_moved(encode_panel, J.clean, directions @ J.read, tau)
    effect = np.array([label["E"] for label in labels])
    return {
        "C^mean_jacobian": count_moved(encode_panel, J.clean, directions @ J.read.mean(0), tau),
        "C^jacobian": count,
        "C_per_E^jacobian": count / (effect + EPS),
        "E^jacobian": effect,
        "S_abs^jacobian": np.array([label["S_abs"] for label in labels]),
    }


@torch.no_grad()
def measure_output_score(
    engine: LastToken,
    prompt: torch.Tensor,
    directions: torch.Tensor,
    coefficients: torch.Tensor,
    W: torch.Tensor,
) -> np.ndarray:
    """Arad et al. 2025: how far steering lifts the 20 tokens that the direct logits favour.

    (1 - best rank / V) x largest probability among the 20, after adding `coefficients` x d_f at
    the last token of one prompt [1, T].
    """
    record = engine.record(prompt)
    rows = torch.arange(len(directions), device=directions.device)
    scores = torch.zeros(len(directions))
    moves = directions * coefficients[:, None]
    for r, state in engine.steer(record, torch.zeros_like(rows), rows, moves, pack=32):
        logits = engine.logits(state.final)
        favoured = (directions[r] @ W).topk(min(20, W.shape[1]), dim=1).indices
        own = logits.gather(1, favoured)
        rank = (logits[:, None] > own[..., None]).sum(-1).min(1).values
        largest = logits.softmax(-1).gather(1, favoured).max(1).values
        scores[r.cpu()] = ((1 - rank / W.shape[1]) * largest).cpu()
    return scores.double().numpy()
