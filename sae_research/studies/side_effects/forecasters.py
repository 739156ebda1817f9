"""Forecasts of the labels that steer no feature: they go beyond the paper's predictors (which only correlate).

All propagate c d_f through something cheap and read the downstream panel there: the identity path (the residual stream
as if no block lay between), Jacobians of the upper blocks on a few clean contexts, or a linear map fitted on random
directions. The Arad output score, which does steer (one prompt a feature), stands beside them for comparison.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from sae_research.last_token import LastToken
from sae_research.studies.side_effects.labels import EPS, stability

Codes = Callable[[torch.Tensor], torch.Tensor]


def count_moved(
    codes: Codes, below: torch.Tensor, propagated: torch.Tensor, tau: float, cells: int = 50_000_000
) -> np.ndarray:
    """C^: mean over clean downstream residuals of the panel latents that `propagated` would move by more than tau.

    `propagated` is [features, d], or [contexts, features, d] if each context has its own.
    """
    u0 = codes(below)
    K = propagated.shape[-2]
    moved = torch.zeros(K, device=below.device)
    for part in torch.arange(K, device=below.device).split(max(1, cells // u0.numel())):
        steps = (
            propagated[..., part, :]
            if propagated.ndim == 3
            else propagated[part].expand(len(below), -1, -1)
        )
        change = codes(below[:, None] + steps) - u0[:, None]
        moved[part] = (change.abs() > tau).sum(-1).float().mean(0)
    return moved.double().cpu().numpy()


def identity_count(
    codes: Codes, below: torch.Tensor, directions: torch.Tensor, tau: float
) -> np.ndarray:
    """The count if the blocks between the two hooks did nothing: exact when they do nothing."""
    return count_moved(codes, below, directions, tau)


@dataclass
class Jacobians:
    """d(state)/d(edit) of the final token in a few contexts, [contexts, d, d], rows the direction of the edit."""

    read: torch.Tensor
    """Of the downstream residual."""
    final: torch.Tensor
    """Of the state after the final norm."""
    below: torch.Tensor
    """[contexts, d]: the clean downstream residual there."""


@torch.no_grad()
def jacobians(engine: LastToken, tokens: torch.Tensor, step: float = 1e-2) -> Jacobians:
    """Central differences along every axis, with steps of a share of the residual's root mean square."""
    record = engine.record(tokens)
    contexts, d = record.last.shape
    eps = step * float(record.last.square().mean().sqrt())
    axes = eps * torch.eye(d, device=record.last.device, dtype=record.last.dtype)
    rows = torch.arange(contexts * 2 * d, device=record.last.device)
    read, final = (torch.zeros(len(rows), d, device=rows.device) for _ in range(2))
    moves = torch.cat([axes, -axes])
    for r, state in engine.steer(record, rows // (2 * d), rows % (2 * d), moves, pack=32):
        read[r], final[r] = state.reads[0], state.final
    plus_minus = (x.view(contexts, 2, d, d) for x in (read, final))
    slopes = [(x[:, 0] - x[:, 1]) / (2 * eps) for x in plus_minus]
    return Jacobians(*slopes, below=record.clean.reads[0])


def linear_labels(
    J: Jacobians, engine: LastToken, codes: Codes, directions: torch.Tensor, tau: float
) -> dict[str, np.ndarray]:
    """C^, E^ and |S|^ of every direction, were the upper blocks linear around each context: d_f J_x is one product."""
    found = {"C^jacobian": count_moved(codes, J.below, directions @ J.read, tau)}
    G = engine.gram()
    if (
        G is None
    ):  # with a softcap the head is not linear either; its slope at the clean state is left out
        G = engine.W_U @ engine.W_U.T
    dz = directions @ J.final
    parts = [stability(dz[:, f] @ G @ dz[:, f].T) for f in range(len(directions))]
    return found | {
        "E^jacobian": np.array([p["E"] for p in parts]),
        "S_abs^jacobian": np.array([p["S_abs"] for p in parts]),
    }


def mean_jacobian_count(
    J: Jacobians, codes: Codes, directions: torch.Tensor, tau: float
) -> np.ndarray:
    """C^ with one Jacobian for all contexts, their mean."""
    return count_moved(codes, J.below, directions @ J.read.mean(0), tau)


@torch.no_grad()
def random_map(
    engine: LastToken,
    tokens: torch.Tensor,
    length: float,
    directions: int,
    seed: int,
    ridge: float = 1e-2,
) -> torch.Tensor:
    """W [d, d]: ridge regression of the downstream change on the edit, over random directions of one length."""
    record = engine.record(tokens)
    d = record.last.shape[1]
    noise = torch.from_numpy(np.random.default_rng(seed).standard_normal((directions, d))).to(
        record.last
    )
    moves = noise / noise.norm(dim=1, keepdim=True) * length
    which = torch.arange(directions, device=moves.device)
    context = which % len(tokens)
    X, Y = moves.double(), torch.zeros(directions, d, dtype=torch.float64, device=moves.device)
    for r, state in engine.steer(record, context, which, moves):
        Y[r] = (state.reads[0] - record.clean.reads[0][context[r]]).double()
    gram = X.T @ X
    return torch.linalg.solve(
        gram + ridge * gram.diagonal().mean() * torch.eye(d).to(gram), X.T @ Y
    ).to(record.last)


@torch.no_grad()
def output_score(
    engine: LastToken,
    prompt: torch.Tensor,
    directions: torch.Tensor,
    strength: torch.Tensor,
    W: torch.Tensor,
) -> np.ndarray:
    """Arad et al. 2025: how far steering lifts the 20 tokens that the direct logits favour, on one prompt [1, T].

    S_out = (1 - best rank / V) x largest probability among the 20, after adding `strength` x d_f at the last token.
    """
    record = engine.record(prompt)
    rows = torch.arange(len(directions), device=directions.device)
    scores = torch.zeros(len(directions))
    for r, state in engine.steer(
        record, torch.zeros_like(rows), rows, directions * strength[:, None], pack=32
    ):
        logits = engine.logits(state.final)
        favoured = (directions[r] @ W).topk(min(20, W.shape[1]), dim=1).indices
        own = logits.gather(1, favoured)
        rank = (logits[:, None] > own[..., None]).sum(-1).min(1).values
        largest = logits.softmax(-1).gather(1, favoured).max(1).values
        scores[r.cpu()] = ((1 - rank / W.shape[1]) * largest).cpu()
    return scores.double().numpy()


def relative_to_effect(count: np.ndarray, effect: np.ndarray) -> np.ndarray:
    """C^ / (E^ + eps): the forecast of the count per effect."""
    return count / (effect + EPS)
