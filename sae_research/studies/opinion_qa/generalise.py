"""Groups that the shift was not trained on: intersections, few answers, none at all (sections 3.6 and 3.7)."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from sae_research.studies.opinion_qa import objective
from sae_research.studies.opinion_qa.bench import Bench
from sae_research.studies.opinion_qa.fit import Targets
from sae_research.studies.opinion_qa.shift import Basis, Shift
from sae_research.surveys.survey import Group


def composed(shift: Shift, groups: Sequence[Group], kappa: float = 1.0) -> torch.Tensor:
    """Delta = Delta_0 + kappa U (c_g1 + c_g2 + ...) of every intersection g1|g2|..., [intersections, M]."""
    parts = [
        sum(shift.scores[shift.groups.index(name)] for name in group.name.split("|"))
        for group in groups
    ]
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
    kappas: Sequence[float] = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2),
) -> float:
    """The shrinkage with which compositions, mixed by their shares, give the answers of their margins back.

    `answers` are those of the shift's own groups to `questions`: nothing is known of an intersection but its share.
    """
    mixture, truth = _margins(shift, groups), torch.tensor(answers)
    kept = mixture.sum(1) > 0

    def loss(kappa: float) -> float:
        delta = composed(shift, groups, kappa)
        found = bench.answers(basis, shift.kind, delta, questions, shift.positions).probabilities
        mixed = torch.tensor(np.einsum("gi,iqk->gqk", mixture[kept], found))
        return objective.forward_divergence(truth[kept], mixed.clamp(min=1e-12).log()).mean().item()

    return min(kappas, key=loss)


def _margins(shift: Shift, groups: Sequence[Group]) -> np.ndarray:
    """Share of each intersection within each of the shift's groups, [groups, intersections]; zero where it is none."""
    found = np.array(
        [[g.share if name in g.name.split("|") else 0.0 for g in groups] for name in shift.groups]
    )
    return found / np.maximum(found.sum(1, keepdims=True), 1e-12)


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
    steps: int,
    rate: float = 0.1,
    batch: int = 24,
    seed: int = 0,
) -> torch.Tensor:
    """Shifts [groups, M] of new groups from their `answers` [groups, questions, options] to a few questions.

    U stays frozen and only the r numbers c_new are fitted, with a ridge towards the population in units of the known
    groups' scores; `free` fits a whole vector instead.
    """
    rows = bench.prompts.rows(questions)
    here = bench.residual.device
    truth = torch.tensor(answers, dtype=torch.float32, device=here)
    axes = (
        torch.eye(basis.size) * shift.axes.abs().max() if free else shift.axes * shift.scores.std(0)
    )
    axes, shared = axes.to(here), shift.shared.to(here)
    scores = torch.zeros(len(answers), axes.shape[1], device=here, requires_grad=True)
    optimizer = torch.optim.Adam([scores], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    random = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        drawn = rows[torch.randperm(len(rows), generator=random)[:batch]]
        optimizer.zero_grad()
        (ridge * scores.square().sum() / len(questions) / len(answers)).backward()
        for part in bench.parts(drawn, len(answers)):
            x, _ = bench.steered(basis, shift.kind, shared + scores @ axes.T, part, shift.positions)
            logs = bench.log_probs(x.flatten(0, 1), part.repeat_interleave(len(answers)))
            target = truth[:, bench.prompts.question[part]].transpose(0, 1).flatten(0, 1)
            (objective.forward_divergence(target, logs).mean() * len(part) / len(drawn)).backward()
        optimizer.step()
        schedule.step()
    return (shared + scores @ axes.T).detach().cpu()


RIDGES = (0.0, 1e-3, 1e-2, 1e-1)


def best_ridge(
    bench: Bench,
    basis: Basis,
    shift: Shift,
    answers: np.ndarray,
    questions: np.ndarray,
    validation: np.ndarray,
    *,
    free: bool,
    steps: int,
    seed: int,
) -> float:
    """The ridge with which groups that the shift knows, placed anew from `questions`, answer `validation` ones best.

    So a way is tuned without another answer of the new group, and each way gets a ridge of its own.
    """
    truth = torch.tensor(answers[:, validation])

    def loss(ridge: float) -> float:
        delta = few_shot(
            bench, basis, shift, answers, questions, ridge=ridge, free=free, steps=steps, seed=seed
        )
        found = bench.answers(basis, shift.kind, delta, validation, shift.positions).probabilities
        return (
            objective.forward_divergence(truth, torch.tensor(np.log(np.maximum(found, 1e-12))))
            .mean()
            .item()
        )

    return min(RIDGES, key=loss)


def held_out(targets: Targets, turn: int = 0) -> list[int]:
    """Groups to keep for later: the last one of every attribute that has more than two, or the one `turn` before it."""
    names = np.array(targets.attributes)
    places = [np.flatnonzero(names == attribute) for attribute in dict.fromkeys(targets.attributes)]
    return [int(place[-1 - turn]) for place in places if len(place) > max(2, turn)]


def from_states(
    shift: Shift, known: torch.Tensor, new: torch.Tensor, ridge: float = 0.1
) -> torch.Tensor:
    """Shifts [new groups, M] without any answers: c_g regressed on the model's own state for the group.

    States are the mean residuals over each group's prompts; `known`, [groups, d], are those of the shift's groups.
    """
    known, new = known.cpu(), new.cpu()
    centre, c = known.mean(0), shift.scores - shift.scores.mean(0)
    scale = (known - centre).norm(dim=1).mean()
    x, own = (known - centre) / scale, (new - centre) / scale
    fitted = own @ x.T @ torch.linalg.solve(x @ x.T + ridge * torch.eye(len(x)), c)
    return shift.shared + (shift.scores.mean(0) + fitted) @ shift.axes.T
