"""Trained shifts: their spaces, settings chosen by validation, judgement on test questions."""

from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import numpy as np
import torch

from sae_research.bases import Basis
from sae_research.shifts import Shift
from sae_research.stats import cluster_means
from sae_research.studies.opinion_qa.experiment import Experiment
from sae_research.studies.opinion_qa.fit import train_shift
from sae_research.studies.opinion_qa.settings import (
    DENSE,
    EDIT_KINDS,
    FREE,
    MOVEMENT,
    NO_KL,
    PER_GROUP,
    PER_TOKEN,
    RAW,
    SPACES,
    TWO_STAGES,
    ShiftTraining,
)
from sae_research.surveys.cached import OffTaskCost
from sae_research.surveys.survey import divergence
from sae_research.surveys.targets import Targets

ERROR_KEEPING = ("gated", "multiplicative", "additive")
"""Edits that leave what the SAE does not explain as it is."""

METHODS: dict[str, tuple[str, dict]] = {
    **{f"{space} {kind}": (space, {"kind": kind}) for space in SPACES for kind in EDIT_KINDS},
    RAW: ("dense", {"kind": "multiplicative"}),
    DENSE: ("dense", {"kind": "additive"}),
    FREE: ("dense", {"kind": "additive", "rank": None}),
    PER_TOKEN: ("tokens", {"kind": "gated"}),
    "SAE literal": ("SAE", {"kind": "literal"}),
}
"""The space in which each method acts and how it departs from the settings.

All choose KL and sparsity weights alike.
"""

VARIANTS: dict[str, dict] = {
    NO_KL: {"kl_weight": 0.0},
    MOVEMENT: {"kl_weight": 0.0, "movement_weight": 1.0},
    TWO_STAGES: {"calibration": "first"},
    PER_GROUP: {"rank": None},
}
"""How variants of the headline shift depart from it."""

_LARGEST = 16_384
"""Coordinates above which no per-token vector is trained."""

NOT_MEASURED = float("nan")


@dataclass(frozen=True)
class MethodResult:
    """What one method achieves."""

    name: str
    answers: np.ndarray
    """Answers of every group to the test questions, [groups, questions, options]."""
    cost: OffTaskCost
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
    """Those that never fire on the survey: moving one adds one vector to all text (section 10)."""
    size: float = NOT_MEASURED
    """Mean length of what the shift adds, as a share of the residual's, on tokens of the survey."""
    coefficient: float = NOT_MEASURED
    """The multiple of an untrained direction that validation chose."""
    shift: Shift | None = None
    """The trained shift."""


UNKNOWN_COST = OffTaskCost(NOT_MEASURED, NOT_MEASURED)


# judging a shift


def evaluate_shift(exp: Experiment, name: str, basis: Basis, shift: Shift) -> MethodResult:
    """Judge a shift on the test questions and test documents."""
    found = exp.cache.measure_answers(
        basis, shift.kind, shift.deltas, exp.eval_set.questions, shift.positions
    )
    cost = exp.cache.measure_cost(basis, shift.kind, shift.deltas, "test", shift.positions)
    with torch.no_grad():
        fires = (basis.encode(exp.cache.survey_residuals) != 0).any(0).cpu()
    return MethodResult(
        name,
        found.probabilities,
        cost,
        shift.parameters,
        moved=float(shift.active.float().mean()),
        **found.means(),
        coordinates=int(shift.active.sum()),
        silent=int((shift.active & ~fires).sum()),
        size=measure_size(exp, basis, shift),
        shift=shift,
    )


@torch.no_grad()
def measure_size(exp: Experiment, basis: Basis, shift: Shift, n_prompts: int = 32) -> float:
    """Mean ||x' - x|| / ||x|| over groups and survey tokens of some test prompts."""
    cache = exp.cache
    rows = cache.prompts.prompt_ids(exp.eval_set.questions)[:n_prompts]
    found = []
    for part in cache.microbatches(rows, len(shift.groups)):
        _, moved = cache.apply_shift(basis, shift.kind, shift.deltas, part, shift.positions)
        share = moved.norm(dim=-1) / cache.residual[part].norm(dim=-1)[:, None]
        inside = cache.prompts.editable(shift.positions)[part][:, None].expand_as(share)
        found.append(share[inside])
    return float(torch.cat(found).mean())


@torch.no_grad()
def measure_noop(exp: Experiment, n_prompts: int = 32) -> float:
    """Largest change of any logit under a shift of zero, over the edits that keep the error."""
    cache = exp.cache
    zero = torch.zeros(1, exp.sae.size)
    rows = cache.prompts.prompt_ids(exp.eval_set.questions)[:n_prompts]

    def logits(residual: torch.Tensor) -> torch.Tensor:
        return cache.tail.logits(cache.tail.states(residual, cache.prompts.last[rows]))

    plain = logits(cache.residual[rows])
    steered = [
        logits(cache.apply_shift(exp.sae, kind, zero, rows, "all")[0][:, 0])
        for kind in ERROR_KEEPING
    ]
    return max(float((changed - plain).abs().max()) for changed in steered)


def train_method(
    exp: Experiment,
    name: str,
    training: ShiftTraining,
    seed: int,
    basis: Basis | None = None,
    targets: Targets | None = None,
) -> MethodResult:
    """Train a shift, by default of the SAE's latents and on the poll's answers, and judge it."""
    basis = basis or exp.sae
    shift = train_shift(exp.cache, basis, training, targets or exp.targets, seed)
    return evaluate_shift(exp, name, basis, shift)


def shuffle_groups(targets: Targets, clusters: tuple[str, ...], seed: int) -> Targets:
    """Group labels permuted within each cluster: what is learnt of a group cannot carry over."""
    draws = np.random.default_rng(seed)
    answers = targets.answers.copy()
    for name in dict.fromkeys(clusters):
        rows = np.flatnonzero(np.asarray(clusters) == name)
        answers[:, rows] = targets.answers[draws.permutation(len(answers))][:, rows]
    return replace(targets, answers=answers)


# choosing settings on validation questions


def method_names(exp: Experiment) -> list[str]:
    """The methods that this model can have: a per-token vector needs a small vocabulary."""
    tokens = len(exp.cache.survey_tokens.unique()) * exp.cache.model.d_model
    return [name for name in METHODS if name != PER_TOKEN or tokens <= _LARGEST]


@dataclass(frozen=True)
class Choice:
    """What validation says of one method."""

    best: ShiftTraining
    """The harmless setting with the lowest KL."""
    sparse: ShiftTraining
    """The sparsest one whose KL is within one paired standard error of that (section 3.5)."""
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
    """Every method's settings."""

    @property
    def best(self) -> ShiftTraining:
        """The headline's settings."""
        return self.choices[self.headline].best


def make_plan(choices: dict[str, Choice]) -> Plan:
    """Harmless edits in SAE space that keep the error term compete for the headline."""
    edits = [f"SAE {kind}" for kind in ERROR_KEEPING]
    return Plan(min(edits, key=lambda name: choices[name].loss), choices)


def choose_settings(exp: Experiment, name: str, seed: int) -> Choice:
    """KL and sparsity weight of a method from validation questions and documents alone."""
    space, changes = METHODS[name]
    basis = exp.basis(space, seed)
    tried = []
    for kl, sparsity in product(exp.settings.kl_weights, exp.settings.sparsity_weights):
        weights = {"kl_weight": kl, "sparsity_weight": sparsity}
        training = replace(exp.settings.training, **weights, **changes)
        shift = train_shift(exp.cache, basis, training, exp.targets, seed)
        cost = exp.cache.measure_cost(
            basis, shift.kind, shift.deltas, "validation", shift.positions
        )
        loss = measure_validation_loss(exp, basis, shift)
        tried.append(_Tried(training, cost.loss, loss, int(shift.active.sum())))
    harmless = [t for t in tried if t.harm <= exp.settings.max_off_task_loss]
    harmless = harmless or [min(tried, key=lambda t: t.harm)]
    best = min(harmless, key=lambda t: t.loss.mean())
    close = [t for t in harmless if t is best or within_one_error(t.loss - best.loss)]
    sparse = min(close, key=lambda t: (t.moved, t.loss.mean()))
    return Choice(best.training, sparse.training, float(best.loss.mean()), float(best.harm))


class _Tried(NamedTuple):
    training: ShiftTraining
    harm: float
    loss: np.ndarray
    moved: int


def within_one_error(gaps: np.ndarray) -> bool:
    """Whether the mean of gaps, paired by cluster, is at most its standard error."""
    return bool(gaps.mean() <= gaps.std(ddof=1) / len(gaps) ** 0.5)


def measure_validation_loss(exp: Experiment, basis: Basis, shift: Shift) -> np.ndarray:
    """Mean KL of each cluster of validation questions."""
    rows = exp.targets.validation
    found = exp.cache.measure_answers(basis, shift.kind, shift.deltas, rows, shift.positions)
    loss = divergence(exp.targets.answers[:, rows], found.probabilities).mean(0)
    return cluster_means(loss, [exp.clusters[i] for i in rows])
