"""Training a shift: Delta_0 on the population's answers, then U and c on the groups', or all at once (section 3.4)."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from sae_research.errors import ResearchError
from sae_research.studies.opinion_qa import objective
from sae_research.studies.opinion_qa.bench import Bench
from sae_research.studies.opinion_qa.settings import ShiftTraining
from sae_research.studies.opinion_qa.shift import Basis, Shift, canonical, displacement


@dataclass(frozen=True)
class Fit:
    """A trained shift and how the training went."""

    shift: Shift
    """The shift at its best look."""
    validation: float
    """Objective on validation questions and documents at that look: KL + lam_keep KL of other text."""
    looks: tuple[float, ...]
    """The objective at each look of the second stage."""


@dataclass(frozen=True)
class Targets:
    """Whose answers to learn, and on which questions."""

    groups: tuple[str, ...]
    """Names of the groups."""
    attributes: tuple[str, ...]
    """The attribute of each group: scores have mean zero within each."""
    weights: np.ndarray
    """Share of each group; within an attribute they give the mean."""
    answers: np.ndarray
    """pi~, [groups, questions, options]."""
    overall: np.ndarray
    """The population's answers, [questions, options]."""
    train: np.ndarray
    """Training questions."""
    validation: np.ndarray
    """Validation questions, which alone choose."""

    def centring(self) -> torch.Tensor:
        """The matrix that takes the weighted mean of each attribute out of the groups' scores."""
        attributes = np.array(self.attributes)
        same = (attributes[:, None] == attributes) * self.weights
        return torch.tensor(
            np.eye(len(attributes)) - same / same.sum(1, keepdims=True), dtype=torch.float32
        )


class _Stage:
    """One run of proximal Adam on the tables that make up the shifts of some targets."""

    def __init__(
        self,
        bench: Bench,
        basis: Basis,
        training: ShiftTraining,
        targets: Targets,
        answers: np.ndarray,
        seed: int,
    ):
        self.bench, self.basis, self.training = bench, basis, training
        self.device = bench.residual.device
        self.answers = torch.tensor(answers, dtype=torch.float32, device=self.device)
        self.rows = bench.prompts.rows(targets.train)
        self.validation = bench.prompts.rows(targets.validation)
        self.random = torch.Generator().manual_seed(seed)
        block = bench.block
        self.variance = (block - block.mean(0)).square().sum(-1).mean()

    def loss(
        self, deltas: torch.Tensor, rows: torch.Tensor, who: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean forward KL over prompts and groups (all, or those whose shifts these are), and the relative movement."""
        x, moved = self.bench.steered(
            self.basis, self.training.kind, deltas, rows, self.training.positions
        )
        logs = self.bench.log_probs(x.flatten(0, 1), rows.repeat_interleave(len(deltas)))
        answers = self.answers if who is None else self.answers[who]
        target = answers[:, self.bench.prompts.question[rows]].transpose(0, 1).flatten(0, 1)
        count = int(self.bench.prompts.editable(self.training.positions)[rows].sum()) * len(deltas)
        return (
            objective.forward_divergence(target, logs).mean(),
            objective.relative_movement(moved, self.variance, count),
        )

    def keep(self, deltas: torch.Tensor, split: str, docs: torch.Tensor) -> torch.Tensor:
        """KL(base || steered) on documents under each shift."""
        x, content = self.bench.text_residual[split][docs], self.bench.text_content[split][docs]
        moved = (
            displacement(self.basis, self.training.kind, x, self.basis.encode(x), deltas)
            * content[:, None, :, None]
        )
        with torch.no_grad():
            base = self.bench.text_logits(split, docs)
        steered = self.bench.upper.logits(
            self.bench.upper.states((x[:, None] + moved).flatten(0, 1))
        )
        groups = len(deltas)
        return objective.kept(
            base.repeat_interleave(groups, 0), steered, content.repeat_interleave(groups, 0)
        )

    def terms(
        self, deltas: torch.Tensor, rows: torch.Tensor, who: torch.Tensor | None = None
    ) -> Iterator[torch.Tensor]:
        """KL and movement in parts of `rows` that fit into memory; their sum is the loss of all."""
        tokens = self.bench.prompts.editable(self.training.positions).sum(1)
        for part in self.bench.parts(rows, len(deltas) if who is None else len(who)):
            loss, movement = self.loss(deltas if who is None else deltas[who], part, who)
            share = tokens[part].sum() / tokens[rows].sum()
            yield loss * len(part) / len(rows) + self.training.movement * movement * share

    def kept(
        self, deltas: torch.Tensor, some: torch.Tensor, split: str, docs: torch.Tensor
    ) -> Iterator[torch.Tensor]:
        """lam_keep KL of other text under the shifts `some`, likewise in parts of `docs`."""
        content = self.bench.text_content[split]
        for part in self.bench.parts(docs, len(some)):
            share = content[part].sum() / content[docs].sum()
            yield self.training.keep * self.keep(deltas[some], split, part) * share

    @torch.no_grad()
    def look(self, deltas: torch.Tensor) -> float:
        """The objective on validation questions and documents."""
        found = sum(
            self.loss(deltas, rows)[0].item() * len(rows)
            for rows in self.bench.parts(self.validation, len(deltas))
        ) / len(self.validation)
        if self.keeps:
            docs = torch.arange(min(16, len(self.bench.texts["validation"])))
            some = torch.arange(0, len(deltas), max(1, len(deltas) // 4))
            found += sum(term.item() for term in self.kept(deltas, some, "validation", docs))
        return found

    @property
    def keeps(self) -> bool:
        """Whether other text is ever touched: a shift of the survey block alone leaves it as it is."""
        return self.training.keep > 0 and self.training.positions == "all"

    def run(
        self, tables: list[dict], deltas, steps: int, sparse: torch.Tensor, amount: torch.Tensor
    ) -> list[float]:
        """Proximal Adam with a cosine to zero; leaves the tables at their best look and returns all looks."""
        t = self.training
        optimizer = torch.optim.Adam(tables)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda s: 0.5 * (1 + np.cos(np.pi * s / steps))
        )
        parameters = [p for table in tables for p in table["params"]]
        looks, best, order = [], None, torch.empty(0, dtype=torch.long)
        for step in range(steps):
            if len(order) < t.batch:
                order = self.rows[torch.randperm(len(self.rows), generator=self.random)]
            rows, order = order[: t.batch], order[t.batch :]
            now = deltas()
            leaf, loss, who = (
                now.detach().requires_grad_(),
                0.0,
                None,
            )  # gradients of all parts meet in the leaf
            if t.groups < len(now):
                who = torch.randperm(len(now), generator=self.random)[: t.groups]
            for term in self.terms(leaf, rows, who):
                term.backward()
                loss += term.item()
            if self.keeps:
                docs = torch.randint(
                    len(self.bench.texts["train"]), (t.documents,), generator=self.random
                )
                some = torch.randperm(len(now), generator=self.random)[: t.kept_groups]
                for term in self.kept(leaf, some, "train", docs):
                    term.backward()
                    loss += term.item()
            if not np.isfinite(loss):
                raise ResearchError(
                    f"the loss of the {t.kind} shift is not finite at step {step}; lower `rate`."
                )
            optimizer.zero_grad()
            now.backward(leaf.grad)
            optimizer.step()
            if t.sparsity:
                with torch.no_grad():
                    sparse.copy_(
                        objective.shrink_rows(
                            sparse, schedule.get_last_lr()[0] * t.sparsity * amount
                        )
                    )
            schedule.step()
            if (step + 1) % t.look == 0 or step + 1 == steps:
                looks.append(self.look(deltas().detach()))
                if looks[-1] <= min(looks):
                    best = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for parameter, value in zip(parameters, best, strict=True):
                parameter.copy_(value)
        return looks


def fit(
    bench: Bench,
    basis: Basis,
    training: ShiftTraining,
    targets: Targets,
    seed: int,
    shared: torch.Tensor | None = None,
) -> Fit:
    """Train a shift; `shared` is a Delta_0 that was trained before (it depends on no group)."""
    if shared is None:
        free = training.calibration == "first"
        shared = (
            calibrate(bench, basis, training, targets, seed) if free else torch.zeros(basis.size)
        )
    stage = _Stage(bench, basis, training, targets, targets.answers, seed)
    here, groups = stage.device, len(targets.groups)
    shared, centring, everyone = (
        shared.to(here),
        targets.centring().to(here),
        torch.eye(groups, device=here),
    )
    weights = torch.tensor(targets.weights, dtype=torch.float32, device=here)
    amount, joint = (
        objective.lasso_weights(basis, training.kind, bench.block),
        training.calibration == "axes",
    )
    middle = torch.zeros(1, training.rank or groups, device=here)
    if training.rank is None:
        axes = torch.zeros(basis.size, groups + joint, device=here, requires_grad=True)
        scores = everyone
        tables = [{"params": [axes], "lr": training.rate}]
    else:
        axes, scores = _start(stage, shared, everyone if joint else centring, training.rank, groups)
        rate = training.rate * training.score_rate
        tables = [{"params": [axes], "lr": training.rate}, {"params": [scores], "lr": rate}]
        if joint:
            middle = (weights @ scores.detach() / weights.sum())[None].requires_grad_()
            tables.append({"params": [middle], "lr": rate})

    def mixture() -> torch.Tensor:
        """What each group takes of each column of U: c_0 + c_g; of free vectors, the shared one and its own."""
        if training.rank is None and joint:
            return torch.cat([torch.ones_like(centring[:, :1]), centring], 1)
        return middle + centring @ scores

    looks = stage.run(tables, lambda: shared + mixture() @ axes.T, training.steps, axes, amount)
    axes = axes.detach()
    if joint:
        own = axes[:, 1:] if training.rank is None else axes
        shared = axes[:, 0] if training.rank is None else (middle.detach() @ axes.T)[0]
        axes = own
    tables = (table.cpu() for table in (shared, axes, (centring @ scores).detach()))
    found = Shift(training.kind, bench.hook, training.positions, targets.groups, *tables)
    return Fit(canonical(found, torch.tensor(targets.weights)), min(looks), tuple(looks))


def _start(
    stage: _Stage, shared: torch.Tensor, centring: torch.Tensor, rank: int, groups: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """U and c at the leading directions of the groups' first gradient: where the loss falls fastest from Delta_0."""
    free = torch.zeros(groups, len(shared), device=stage.device, requires_grad=True)
    some = stage.rows[
        torch.randperm(len(stage.rows), generator=stage.random)[: 4 * stage.training.batch]
    ]
    for rows in some.split(stage.training.batch):
        for part in stage.bench.parts(rows, groups):
            (stage.loss(shared + centring @ free, part)[0] * len(part)).backward()
    left, values, right = torch.linalg.svd(-centring @ free.grad, full_matrices=False)
    if rank > len(values):
        raise ResearchError(
            f"rank {rank} exceeds what {groups} groups and {len(shared)} coordinates allow; lower it."
        )
    size = values[:rank] / values[0].clamp(min=1e-12)
    scores = left[:, :rank] * groups**0.5 * size
    return (right[:rank].T * 0.3).requires_grad_(), scores.requires_grad_()


def calibrate(
    bench: Bench, basis: Basis, training: ShiftTraining, targets: Targets, seed: int
) -> torch.Tensor:
    """Delta_0, [M]: one shift for everybody, trained on the population's answers."""
    larger = replace(training, batch=4 * training.batch)
    stage = _Stage(bench, basis, larger, targets, targets.overall[None], seed)
    shared = torch.zeros(basis.size, 1, device=stage.device, requires_grad=True)
    amount = objective.lasso_weights(basis, training.kind, bench.block)
    stage.run(
        [{"params": [shared], "lr": training.rate}],
        lambda: shared.T,
        training.calibration_steps,
        shared,
        amount,
    )
    return shared.detach()[:, 0].cpu()
