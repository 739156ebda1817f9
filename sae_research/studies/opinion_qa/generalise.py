"""Groups that the shift was not trained on: intersections, few answers, none at all (sections 3.6 and 3.7)."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from sae_research.studies.opinion_qa import objective
from sae_research.studies.opinion_qa.bench import Bench
from sae_research.studies.opinion_qa.fit import Targets
from sae_research.studies.opinion_qa.shift import Basis, Shift
from sae_research.survey import Group


def composed(shift: Shift, groups: Sequence[Group], kappa: float = 1.0) -> torch.Tensor:
    """Delta = Delta_0 + kappa U (c_g1 + c_g2 + ...) of every intersection g1|g2|..., [intersections, M]."""
    parts = [sum(shift.scores[shift.groups.index(name)] for name in group.name.split("|")) for group in groups]
    return shift.shared + kappa * torch.stack(parts) @ shift.axes.T


def margin(shift: Shift, groups: Sequence[Group], place: int) -> torch.Tensor:
    """The shift of one margin of every intersection: the `place`-th part of its name, [intersections, M]."""
    return torch.stack([shift.delta(group.name.split("|")[place]) for group in groups])


def best_kappa(
    bench: Bench,
    basis: Basis,
    shift: Shift,
    groups: Sequence[Group],
    answers: np.ndarray,
    questions: np.ndarray,
    kappas: Sequence[float] = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
) -> float:
    """The shrinkage of composition that fits the intersections best on (validation) questions."""
    truth = torch.tensor(answers[:, questions])

    def loss(kappa: float) -> float:
        delta = composed(shift, groups, kappa)
        found = bench.answers(basis, shift.kind, delta, questions, shift.positions).probabilities
        return objective.forward_divergence(truth, torch.tensor(np.log(np.maximum(found, 1e-12)))).mean().item()

    return min(kappas, key=loss)


def without(targets: Targets, left_out: Sequence[int]) -> Targets:
    """The targets without some groups."""
    keep = [g for g in range(len(targets.groups)) if g not in set(left_out)]
    return replace(
        targets,
        groups=tuple(targets.groups[g] for g in keep),
        attributes=tuple(targets.attributes[g] for g in keep),
        weights=targets.weights[keep],
        answers=targets.answers[keep],
    )


def few_shot(
    bench: Bench,
    basis: Basis,
    shift: Shift,
    answers: np.ndarray,
    questions: np.ndarray,
    *,
    ridge: float = 0.01,
    free: bool = False,
    steps: int = 40,
    rate: float = 0.1,
    batch: int = 24,
    seed: int = 0,
) -> torch.Tensor:
    """Shifts [groups, M] of new groups from their `answers` [groups, questions, options] to a few questions.

    U stays frozen and only the r numbers c_new are fitted, with a ridge towards the population in units of the known
    groups' scores; `free` fits a whole vector instead.
    """
    rows = bench.prompts.rows(questions)
    truth = torch.tensor(answers, dtype=torch.float32)
    axes = torch.eye(basis.size) * shift.axes.abs().max() if free else shift.axes * shift.scores.std(0)
    scores = torch.zeros(len(answers), axes.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([scores], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    random = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        part = rows[torch.randperm(len(rows), generator=random)[:batch]]
        x, _ = bench.steered(basis, shift.kind, shift.shared + scores @ axes.T, part, shift.positions)
        logs = bench.log_probs(x.flatten(0, 1), part.repeat_interleave(len(answers)))
        target = truth[:, bench.prompts.question[part]].transpose(0, 1).flatten(0, 1)
        prior = ridge * scores.square().sum() / len(questions) / len(answers)
        loss = objective.forward_divergence(target, logs).mean() + prior
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return (shift.shared + scores @ axes.T).detach()


def held_out(targets: Targets) -> list[int]:
    """Groups to keep for later: the last one of every attribute that has more than two."""
    names = np.array(targets.attributes)
    places = [np.flatnonzero(names == attribute) for attribute in dict.fromkeys(targets.attributes)]
    return [int(place[-1]) for place in places if len(place) > 2]


def from_states(shift: Shift, known: torch.Tensor, new: torch.Tensor, ridge: float = 0.1) -> torch.Tensor:
    """Shifts [new groups, M] without any answers: c_g regressed on the model's own state for the group.

    States are the mean residuals over each group's prompts; `known`, [groups, d], are those of the shift's groups.
    """
    centre, c = known.mean(0), shift.scores - shift.scores.mean(0)
    scale = (known - centre).norm(dim=1).mean()
    x, own = (known - centre) / scale, (new - centre) / scale
    fitted = own @ x.T @ torch.linalg.solve(x @ x.T + ridge * torch.eye(len(x)), c)
    return shift.shared + (shift.scores.mean(0) + fitted) @ shift.axes.T


def from_prompts(shift: Shift, states: torch.Tensor, ridge: float = 0.1) -> torch.Tensor:
    """`from_states` for every group of the shift itself, left out in its turn, [groups, M]."""
    found = []
    for g in range(len(states)):
        rest = [h for h in range(len(states)) if h != g]
        others = replace(shift, groups=tuple(shift.groups[h] for h in rest), scores=shift.scores[rest])
        found.append(from_states(others, states[rest], states[[g]], ridge))
    return torch.cat(found)
