"""What a poll teaches: groups' answers as targets, and their divergence from a model's answers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from sae_research.surveys.survey import Survey


@dataclass(frozen=True)
class Targets:
    """Whose answers to learn, and on which questions."""

    groups: tuple[str, ...]
    attributes: tuple[str, ...]
    """The attribute of each group: scores have mean zero within each."""
    weights: np.ndarray
    """Share of each group; within an attribute they give the mean."""
    answers: np.ndarray
    """pi~, [groups, questions, options]."""
    overall: np.ndarray
    """The population's answers, [questions, options]."""
    train: np.ndarray
    validation: np.ndarray
    """Validation questions, which alone choose."""

    def centring(self) -> torch.Tensor:
        """The matrix that takes the weighted mean of each attribute out of the groups' scores."""
        attributes = np.array(self.attributes)
        same = (attributes[:, None] == attributes) * self.weights
        centring = np.eye(len(attributes)) - same / same.sum(1, keepdims=True)
        return torch.tensor(centring, dtype=torch.float32)


def make_targets(poll: Survey, shrinkage: float) -> Targets:
    """What a poll teaches: its groups' answers, shrunk towards their mean."""
    pooled = np.tensordot(poll.weights, poll.distributions, 1)
    counts = torch.tensor(poll.counts, dtype=torch.float64)
    return Targets(
        groups=tuple(g.name for g in poll.groups),
        attributes=tuple(g.attribute for g in poll.groups),
        weights=poll.weights,
        answers=shrink_targets(counts, torch.tensor(pooled), shrinkage).numpy(),
        overall=pooled,
        train=poll.rows("train"),
        validation=poll.rows("validation"),
    )


def shrink_targets(counts: torch.Tensor, overall: torch.Tensor, weight: float) -> torch.Tensor:
    """pi~ = (counts + a overall) / (n + a): small groups lean on the population, not on noise."""
    return (counts + weight * overall) / (counts.sum(-1, keepdim=True) + weight)


def drop_groups(targets: Targets, left_out: Sequence[int]) -> Targets:
    """The targets without some groups."""
    keep = np.delete(np.arange(len(targets.groups)), left_out)
    return replace(
        targets,
        groups=tuple(targets.groups[g] for g in keep),
        attributes=tuple(targets.attributes[g] for g in keep),
        weights=targets.weights[keep],
        answers=targets.answers[keep],
    )


def forward_kl(target: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    """KL(pi || P_theta) in nats; one number a row."""
    gaps = target.clamp(min=1e-30).log() - log_probs.masked_fill(target == 0, 0.0)
    return (target * torch.where(target > 0, gaps, 0.0)).sum(-1)


def mean_kl(truth: np.ndarray, answers: np.ndarray) -> float:
    """Mean KL(pi || P) of answers, by which every grid search on validation questions chooses."""
    logs = torch.tensor(np.log(np.maximum(answers, 1e-12)))
    return forward_kl(torch.tensor(truth), logs).mean().item()
