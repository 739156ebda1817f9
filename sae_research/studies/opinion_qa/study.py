"""Trained shifts: the space they act in, settings chosen on validation questions alone, judgement on test questions."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from sae_research.studies.opinion_qa import baselines
from sae_research.studies.opinion_qa.bench import Cost
from sae_research.studies.opinion_qa.fit import Fit, fit
from sae_research.studies.opinion_qa.laboratory import Laboratory
from sae_research.studies.opinion_qa.settings import ShiftTraining
from sae_research.studies.opinion_qa.shift import Basis, Shift

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


NOT_MEASURED = float("nan")


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
    moved: float = NOT_MEASURED
    """Share of coordinates that any group moves."""
    mass: float = NOT_MEASURED
    """Mean probability of the letters among all tokens."""
    order: float = NOT_MEASURED
    """Mean total variation between the two option orders."""
    coordinates: float = NOT_MEASURED
    """Coordinates that any group moves."""
    silent: float = NOT_MEASURED
    """Those of them that never fire on the survey: moving one adds the same vector to every text (section 10)."""
    size: float = NOT_MEASURED
    """Mean length of what the shift adds, as a share of the residual's, on tokens of the survey."""
    strength: float = NOT_MEASURED
    """The multiple of an untrained direction that validation chose."""
    fit: Fit | None = None
    """The trained shift."""


NO_COST, UNKNOWN_COST = Cost(0.0, 0.0), Cost(NOT_MEASURED, NOT_MEASURED)


def shifted(lab: Laboratory, name: str, basis: Basis, found: Fit) -> Outcome:
    """Judge a trained shift on the test questions and test documents."""
    shift = found.shift
    reading = lab.bench.answers(
        basis, shift.kind, shift.deltas, lab.exam.questions, shift.positions
    )
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
        int((shift.active & ~fires(lab, basis)).sum()),
        size(lab, basis, found.shift),
        fit=found,
    )


@torch.no_grad()
def fires(lab: Laboratory, basis: Basis) -> torch.Tensor:
    """Which coordinates are ever active on the survey, [M]."""
    return (basis.encode(lab.bench.block) != 0).any(0).cpu()


@torch.no_grad()
def size(lab: Laboratory, basis: Basis, shift: Shift, prompts: int = 32) -> float:
    """Mean ||x' - x|| / ||x|| over groups and survey tokens of some test prompts."""
    rows = lab.bench.prompts.rows(lab.exam.questions)[:prompts]
    found = []
    for part in lab.bench.parts(rows, len(shift.groups)):
        _, moved = lab.bench.steered(basis, shift.kind, shift.deltas, part, shift.positions)
        share = moved.norm(dim=-1) / lab.bench.residual[part].norm(dim=-1)[:, None]
        inside = lab.bench.prompts.editable(shift.positions)[part][:, None].expand_as(share)
        found.append(share[inside])
    return float(torch.cat(found).mean())


DENSE, FREE = "dense vector, low rank", "dense vector, free"
TOKENS, RAW = "a vector a token", "raw coordinates multiplicative"
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
    RAW: ("dense", {"kind": "multiplicative"}),
    DENSE: ("dense", {"kind": "additive"}),
    FREE: ("dense", {"kind": "additive", "rank": None}),
    TOKENS: ("tokens", {"kind": "gated"}),
    "SAE literal": ("SAE", {"kind": "literal"}),
}
"""Trained shifts: the space they act in and how they depart from the settings; all choose keep and sparsity alike."""

SPARSE, UNKEPT, SHUFFLED = "sparsest within one s.e.", "nothing kept", "shuffled groups"
VARIANTS: dict[str, dict] = {
    UNKEPT: {"keep": 0.0},
    "movement kept small": {"keep": 0.0, "movement": 1.0},
    "two stages": {"calibration": "first"},
    "a vector a group": {"rank": None},
}
"""How further arms depart from the headline."""

_LARGEST = 16_384
"""Coordinates above which no vector a token is trained."""


def arms(lab: Laboratory) -> list[str]:
    """The arms that this subject can have: a vector a token needs a small vocabulary."""
    tokens = len(lab.bench.block_tokens.unique()) * lab.bench.lens.d_model
    return [name for name in ARMS if name != TOKENS or tokens <= _LARGEST]


@dataclass(frozen=True)
class Choice:
    """What validation says of one arm."""

    best: ShiftTraining
    """The harmless setting with the lowest KL."""
    sparse: ShiftTraining
    """The sparsest one whose KL is within one standard error of that, clusters of questions paired (section 3.5)."""
    loss: float
    """That lowest KL."""
    harm: float
    """What the best setting costs other validation text, in nats."""


@dataclass(frozen=True)
class Plan:
    """What validation has decided before any test question is read."""

    headline: str
    """The edit in SAE space with the lowest validation KL."""
    choices: dict[str, Choice]
    """Every arm's settings."""

    @property
    def best(self) -> ShiftTraining:
        """The headline's settings."""
        return self.choices[self.headline].best


def planned(choices: dict[str, Choice]) -> Plan:
    """The plan that follows from the choices: harmless edits that keep the error term compete for the headline."""
    edits = [f"SAE {kind}" for kind in ERROR_KEEPING]
    return Plan(min(edits, key=lambda name: choices[name].loss), choices)


def choose(lab: Laboratory, name: str, seed: int) -> Choice:
    """lam_keep and lam_sp of an arm from validation questions and documents alone."""
    s, (space, changes) = lab.settings, ARMS[name]
    basis, tried = lab.basis(space, seed), []
    for keep in s.keeps:
        for sparsity in s.sparsities:
            training = replace(s.training, keep=keep, sparsity=sparsity, **changes)
            found = fit(lab.bench, basis, training, lab.targets, seed)
            harm = 0.0
            if training.positions == "all":
                harm = lab.bench.cost(basis, training.kind, found.shift.deltas, "validation").loss
            moved = int(found.shift.active.sum())
            tried.append(_Tried(training, harm, validation_loss(lab, basis, found), moved))
    harmless = [t for t in tried if t.harm <= s.harm] or [min(tried, key=lambda t: t.harm)]
    best = min(harmless, key=lambda t: t.loss.mean())
    close = [t for t in harmless if t is best or within_one_error(t.loss - best.loss)]
    sparse = min(close, key=lambda t: (t.moved, t.loss.mean()))
    return Choice(best.training, sparse.training, float(best.loss.mean()), float(best.harm))


@dataclass(frozen=True)
class _Tried:
    """One setting that was tried."""

    training: ShiftTraining
    harm: float
    loss: np.ndarray
    moved: int


def within_one_error(gaps: np.ndarray) -> bool:
    """Whether the mean of gaps, paired by cluster of questions, is at most its standard error."""
    return bool(gaps.mean() <= gaps.std(ddof=1) / len(gaps) ** 0.5)


def validation_loss(lab: Laboratory, basis: Basis, found: Fit) -> np.ndarray:
    """Mean KL of each cluster of validation questions."""
    from sae_research.stats import cluster_means
    from sae_research.surveys.survey import divergence

    shift, rows = found.shift, lab.targets.validation
    answers = lab.bench.answers(
        basis, shift.kind, shift.deltas, rows, shift.positions
    ).probabilities
    loss = divergence(lab.targets.answers[:, rows], answers).mean(0)
    return cluster_means(loss, [lab.families[i] for i in rows])


def trained(
    lab: Laboratory, name: str, training: ShiftTraining, seed: int, space: str = "SAE"
) -> Outcome:
    """Train a shift with settings that were chosen before, and judge it."""
    basis = lab.basis(space, seed)
    return shifted(lab, name, basis, fit(lab.bench, basis, training, lab.targets, seed))


def shuffled(lab: Laboratory, training: ShiftTraining, seed: int) -> Outcome:
    """The headline shift trained on groups that were permuted within each cluster of questions."""
    targets = baselines.groups_shuffled(lab.targets, lab.families, seed)
    return shifted(lab, SHUFFLED, lab.sae, fit(lab.bench, lab.sae, training, targets, seed))
