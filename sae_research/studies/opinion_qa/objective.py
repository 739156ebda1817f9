"""The abstract's three terms made precise (section 3.5): divergence from the group, movement, sparsity."""

import torch

from sae_research.studies.opinion_qa.shift import Basis


def shrunk(counts: torch.Tensor, overall: torch.Tensor, weight: float) -> torch.Tensor:
    """pi~ = (counts + a overall) / (n + a): small groups lean on the population, so that noise is not learnt."""
    return (counts + weight * overall) / (counts.sum(-1, keepdim=True) + weight)


def forward_divergence(target: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    """KL(pi || P_theta) in nats; one number a row."""
    logs = torch.where(
        target > 0, target.clamp(min=1e-30).log() - log_probs.masked_fill(target == 0, 0.0), 0.0
    )
    return (target * logs).sum(-1)


def relative_movement(moved: torch.Tensor, variance: torch.Tensor, count: int) -> torch.Tensor:
    """L_rec = E ||x' - x||^2 / E ||x - mean x||^2 over `count` edited tokens: `reconstruction` if errors stay."""
    return moved.square().sum() / count / variance


def kept(base: torch.Tensor, new: torch.Tensor, content: torch.Tensor) -> torch.Tensor:
    """L_keep = KL(P_base || P_steered) per token of other text, from logits."""
    base, new = base.log_softmax(-1), new.log_softmax(-1)
    return (base.exp() * (base - new)).sum(-1)[content].mean()


def lasso_weights(basis: Basis, kind: str, block: torch.Tensor, cap: float = 10.0) -> torch.Tensor:
    """omega_j = ||W_dec,j|| / sd(f_j), capped at `cap` times its median and scaled to mean 1.

    It is dear to move a latent far outside its natural range. A multiplicative shift is already in units of the
    latent's own activation, so there every latent weighs the same; one that never fires on the survey weighs `cap`.
    """
    with torch.no_grad():
        codes = basis.encode(block)
    spread = codes.std(0)
    silent = spread < 1e-8
    if kind == "multiplicative":
        weights = torch.ones_like(spread)
    else:
        weights = basis.rows.norm(dim=-1) / spread.clamp(min=1e-8)
        middle = weights[~silent].median()
        weights = (weights / middle).clamp(max=cap)
        weights = weights / weights[~silent].mean()
    return weights.masked_fill(silent, cap)


def shrink_rows(table: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    """Proximal step of sum_j amount_j ||row_j||: a row loses `amount` of its length, down to exactly zero."""
    size = table.norm(dim=-1, keepdim=True)
    return table * (1 - amount[:, None] / size.clamp(min=1e-12)).clamp(min=0)
