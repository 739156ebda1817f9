"""Linear maps from an edit of the final token to what lies above it: Jacobians, and a ridge."""

from dataclasses import dataclass

import numpy as np
import torch

from sae_research.last_token import LastToken


@dataclass
class Jacobians:
    """d(state)/d(edit) of the final token, [contexts, d, d], a row per axis of the edit."""

    read: torch.Tensor
    """Of the downstream residual."""
    final: torch.Tensor
    """Of the state after the final norm."""
    clean: torch.Tensor
    """[contexts, d]: the clean downstream residual there."""


@torch.no_grad()
def measure_jacobians(engine: LastToken, tokens: torch.Tensor, step: float = 1e-2) -> Jacobians:
    """Central differences along every axis, in steps of a fraction of the residual's RMS."""
    record = engine.record(tokens)
    n_contexts, d = record.last.shape
    device = record.last.device
    eps = step * float(record.last.square().mean().sqrt())
    axes = eps * torch.eye(d, device=device, dtype=record.last.dtype)
    edits = torch.arange(n_contexts * 2 * d, device=device)
    read, final = (torch.zeros(len(edits), d, device=device) for _ in range(2))
    moves = torch.cat([axes, -axes])
    for rows, state in engine.steer(record, edits // (2 * d), edits % (2 * d), moves, pack=32):
        read[rows] = state.reads[0]
        final[rows] = state.final
    plus_minus = (x.view(n_contexts, 2, d, d) for x in (read, final))
    slopes = [(x[:, 0] - x[:, 1]) / (2 * eps) for x in plus_minus]
    return Jacobians(*slopes, clean=record.clean.reads[0])


@torch.no_grad()
def fit_random_map(
    engine: LastToken,
    tokens: torch.Tensor,
    norm: float,
    n_directions: int,
    seed: int,
    ridge: float = 1e-2,
) -> torch.Tensor:
    """W [d, d]: ridge of the downstream change on the edit, over random directions of one norm."""
    record = engine.record(tokens)
    d = record.last.shape[1]
    noise = np.random.default_rng(seed).standard_normal((n_directions, d))
    noise = torch.from_numpy(noise).to(record.last)
    moves = noise / noise.norm(dim=1, keepdim=True) * norm
    which = torch.arange(n_directions, device=moves.device)
    context = which % len(tokens)
    X = moves.double()
    Y = torch.zeros_like(X)
    for rows, state in engine.steer(record, context, which, moves):
        Y[rows] = (state.reads[0] - record.clean.reads[0][context[rows]]).double()
    gram = X.T @ X
    penalty = ridge * gram.diagonal().mean() * torch.eye(d).to(gram)
    return torch.linalg.solve(gram + penalty, X.T @ Y).to(record.last)
