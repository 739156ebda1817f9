"""Trained shifts: the space they act in, settings chosen on validation questions alone, judgement on test questions."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from sae_research.config import ShiftTraining
from sae_research.studies.opinion_qa import baselines
from sae_research.studies.opinion_qa.bench import Cost
from sae_research.studies.opinion_qa.fit import Fit, fit
from sae_research.studies.opinion_qa.laboratory import Laboratory
from sae_research.studies.opinion_qa.shift import Basis

ERROR_KEEPING = ("gated", "multiplicative", "additive")
"""Edits that leave what the SAE does not explain as it is."""


@torch.no_grad()
def noop(lab: Laboratory, prompts: int = 32) -> float:
    """Largest change of any logit under a shift of zero, over the edits that keep the error term."""
    bench, zero = lab.bench, torch.zeros(1, lab.sae.size)
    rows = bench.prompts.rows(lab.exam.questions)[:prompts]

    def logits(residual: torch.Tensor) -> torch.Tensor:
        return bench.upper.logits(bench.upper.states(residual, bench.prompts.last[rows]))

    plain = logits(bench.residual[rows])
    steered = [bench.steered(lab.sae, kind, zero, rows, "all")[0][:, 0] for kind in ERROR_KEEPING]
    return max(float((logits(x) - plain).abs().max()) for x in steered)


@dataclass(frozen=True)
class Outcome:
    """What one method achieves."""

    name: str
    """The method."""
    answers: np.ndarray
    """Answers of every group to the test questions, [groups, questions, options]."""
    cost: Cost
    """What it does to other text when it is always on."""
    parameters: int
    """Numbers trained, zeros not counted."""
    moved: float = 1.0
    """Share of coordinates that any group moves."""
    mass: float = 1.0
    """Mean probability of the letters among all tokens."""
    order: float = 0.0
    """Mean total variation between the two option orders."""
    coordinates: int = 0
    """Coordinates that any group moves."""
    fit: Fit | None = None
    """The trained shift."""


NO_COST = Cost(0.0, 0.0)


def shifted(lab: Laboratory, name: str, basis: Basis, found: Fit) -> Outcome:
    """Judge a trained shift on the test questions and test documents."""
    shift = found.shift
    reading = lab.bench.answers(basis, shift.kind, shift.deltas, lab.exam.questions, shift.positions)
    cost = NO_COST
    if shift.positions == "all":
        cost = lab.bench.cost(basis, shift.kind, shift.deltas, "test")
    return Outcome(
        name,
        reading.probabilities,
        cost,
        shift.parameters,
        float(shift.active.float().mean()),
        float(reading.mass.mean()),
        float(reading.order_sensitivity.mean()),
        int(shift.active.sum()),
        found,
    )


DENSE, FREE = "dense vector, low rank", "dense vector, free"
ARMS: dict[str, tuple[str, dict]] = {
    "SAE multiplicative": ("SAE", {"kind": "multiplicative"}),
    "SAE gated": ("SAE", {"kind": "gated"}),
    "SAE additive": ("SAE", {"kind": "additive"}),
    "random multiplicative": ("random", {"kind": "multiplicative"}),
    "random gated": ("random", {"kind": "gated"}),
    "random additive": ("random", {"kind": "additive"}),
    "PCA multiplicative": ("PCA", {"kind": "multiplicative"}),
    "PCA gated": ("PCA", {"kind": "gated"}),
    "PCA additive": ("PCA", {"kind": "additive"}),
    DENSE: ("dense", {"kind": "additive"}),
    FREE: ("dense", {"kind": "additive", "rank": None}),
    "SAE literal": ("SAE", {"kind": "literal"}),
    "SAE free": ("SAE", {"rank": None}),
}
"""Trained shifts: the space they act in and how they depart from the headline; all choose keep and sparsity alike."""


def arms(lab: Laboratory, seed: int) -> dict[str, ShiftTraining]:
    """The settings of every arm, keep and sparsity chosen on validation questions and documents."""
    s = lab.settings
    return {
        name: choose(lab, lab.basis(space, seed), replace(s.training, **changes), seed, s.keeps, s.sparsities)
        for name, (space, changes) in ARMS.items()
    }


def choose(
    lab: Laboratory,
    basis: Basis,
    training: ShiftTraining,
    seed: int,
    keeps: Sequence[float],
    sparsities: Sequence[float],
) -> ShiftTraining:
    """lam_keep and lam_sp by validation: harmless to other text, then the sparsest within one s.e. of the best KL."""
    if len(keeps) == len(sparsities) == 1:
        return replace(training, keep=keeps[0], sparsity=sparsities[0])
    tried = []
    for keep in keeps:
        base = replace(training, keep=keep)
        for sparsity in sparsities:
            candidate = replace(base, sparsity=sparsity)
            found = fit(lab.bench, basis, candidate, lab.targets, seed)
            harm = 0.0
            if training.positions == "all":
                harm = lab.bench.cost(basis, training.kind, found.shift.deltas, "validation").loss
            loss = validation_loss(lab, basis, found)
            tried.append(
                (candidate, harm, loss.mean(), loss.std(ddof=1) / len(loss) ** 0.5, found.shift.active.sum().item())
            )
    harmless = [t for t in tried if t[1] <= lab.settings.harm] or [min(tried, key=lambda t: t[1])]
    best = min(harmless, key=lambda t: t[2])
    close = [t for t in harmless if t[2] <= best[2] + best[3]]
    return min(close, key=lambda t: (t[4], t[2]))[0]


def validation_loss(lab: Laboratory, basis: Basis, found: Fit) -> np.ndarray:
    """Mean KL of each cluster of validation questions."""
    from sae_research.stats import cluster_means
    from sae_research.survey import divergence

    shift, rows = found.shift, lab.targets.validation
    answers = lab.bench.answers(basis, shift.kind, shift.deltas, rows, shift.positions).probabilities
    loss = divergence(lab.targets.answers[:, rows], answers).mean(0)
    return cluster_means(loss, [lab.families[i] for i in rows])


def trained(lab: Laboratory, name: str, training: ShiftTraining, seed: int) -> Outcome:
    """Train and judge one of `ARMS` with settings that were chosen before."""
    basis = lab.basis(ARMS[name][0], seed)
    return shifted(lab, name, basis, fit(lab.bench, basis, training, lab.targets, seed))


def shuffled(lab: Laboratory, training: ShiftTraining, seed: int) -> Outcome:
    """The headline shift trained on groups that were permuted within each cluster of questions."""
    targets = baselines.groups_shuffled(lab.targets, lab.families, seed)
    return shifted(lab, "shuffled groups", lab.sae, fit(lab.bench, lab.sae, training, targets, seed))
