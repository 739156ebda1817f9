"""Training a shift (3.4, 3.5): Delta_0 on the population's answers, then U and c on the groups'.

The loss has three terms: divergence from the group, movement of the residual, sparsity.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from sae_research.bases import Basis, compute_displacement
from sae_research.errors import ResearchError
from sae_research.shifts import Shift, canonicalize
from sae_research.studies.opinion_qa.settings import ShiftTraining
from sae_research.surveys.cached import CachedPrompts
from sae_research.surveys.targets import Targets, forward_kl

# terms of the loss


def minimize(
    parameters: Sequence[torch.Tensor], compute_loss: Callable[[], torch.Tensor], max_iter: int
) -> None:
    """Fit a few numbers to a smooth loss, by L-BFGS."""
    optimizer = torch.optim.LBFGS(parameters, max_iter=max_iter, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = compute_loss()
        loss.backward()
        return loss

    optimizer.step(closure)


def lasso_weights(basis: Basis, kind: str, block: torch.Tensor, cap: float = 10.0) -> torch.Tensor:
    """omega_j = ||W_dec,j|| / sd(f_j), capped at `cap` times its median and scaled to mean 1.

    It is dear to move a latent far outside its natural range. A multiplicative shift is already
    in units of the latent's own activation, so there every latent weighs the same; one that
    never fires on the survey weighs `cap`.
    """
    with torch.no_grad():
        acts = basis.encode(block)
    spread = acts.std(0)
    silent = spread < 1e-8
    if kind == "multiplicative":
        weights = torch.ones_like(spread)
    else:
        weights = basis.decoder.norm(dim=-1) / spread.clamp(min=1e-8)
        middle = weights[~silent].median()
        weights = (weights / middle).clamp(max=cap)
        weights = weights / weights[~silent].mean()
    return weights.masked_fill(silent, cap)


def shrink_decoder_rows(table: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    """Proximal step of sum_j amount_j ||row_j||: a row loses `amount`, down to exactly zero."""
    size = table.norm(dim=-1, keepdim=True)
    return table * (1 - amount[:, None] / size.clamp(min=1e-12)).clamp(min=0)


# training


class _Training:
    """One run of proximal Adam on the tables that make up the shifts of some targets."""

    def __init__(
        self,
        cache: CachedPrompts,
        basis: Basis,
        training: ShiftTraining,
        targets: Targets,
        answers: np.ndarray,
        seed: int,
    ):
        self.cache = cache
        self.basis = basis
        self.training = training
        self.device = cache.residual.device
        self.answers = torch.tensor(answers, dtype=torch.float32, device=self.device)
        self.train_ids = cache.prompts.prompt_ids(targets.train)
        self.validation_ids = cache.prompts.prompt_ids(targets.validation)
        self.random = torch.Generator().manual_seed(seed)
        x = cache.survey_residuals
        self.variance = (x - x.mean(0)).square().sum(-1).mean()

    # terms

    def loss(
        self, deltas: torch.Tensor, rows: torch.Tensor, who: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean forward KL over prompts and groups, and the relative movement of the residual.

        `deltas` are the shifts of all groups, or of the groups `who`. The movement is
        E ||x' - x||^2 / E ||x - mean x||^2 over edited tokens.
        """
        t = self.training
        x, moved = self.cache.apply_shift(self.basis, t.kind, deltas, rows, t.positions)
        logs = self.cache.log_probs(x.flatten(0, 1), rows.repeat_interleave(len(deltas)))
        answers = self.answers if who is None else self.answers[who]
        target = answers[:, self.cache.prompts.question[rows]].transpose(0, 1).flatten(0, 1)
        count = int(self.cache.prompts.editable(t.positions)[rows].sum()) * len(deltas)
        return forward_kl(target, logs).mean(), moved.square().sum() / count / self.variance

    def text_kl(self, deltas: torch.Tensor, split: str, docs: torch.Tensor) -> torch.Tensor:
        """KL(base || steered) per token of documents under each shift."""
        x = self.cache.text_residual[split][docs]
        content = self.cache.text_content[split][docs]
        acts = self.basis.encode(x)
        moved = compute_displacement(self.basis, self.training.kind, x, acts, deltas)
        moved = moved * content[:, None, :, None]
        n = len(deltas)
        with torch.no_grad():
            base = self.cache.text_logits(split, docs).repeat_interleave(n, 0).log_softmax(-1)
        tail = self.cache.tail
        steered = tail.logits(tail.states((x[:, None] + moved).flatten(0, 1))).log_softmax(-1)
        return (base.exp() * (base - steered)).sum(-1)[content.repeat_interleave(n, 0)].mean()

    def survey_terms(
        self, deltas: torch.Tensor, rows: torch.Tensor, who: torch.Tensor
    ) -> Iterator[torch.Tensor]:
        """KL and movement of the groups `who` in microbatches of `rows`, which add up."""
        tokens = self.cache.prompts.editable(self.training.positions).sum(1)
        for part in self.cache.microbatches(rows, len(who)):
            loss, movement = self.loss(deltas[who], part, who)
            share = tokens[part].sum() / tokens[rows].sum()
            yield loss * len(part) / len(rows) + self.training.movement_weight * movement * share

    def text_terms(
        self, deltas: torch.Tensor, who: torch.Tensor, split: str, docs: torch.Tensor
    ) -> Iterator[torch.Tensor]:
        """Weighted KL of other text under the shifts `who`, likewise in microbatches of `docs`."""
        content = self.cache.text_content[split]
        for part in self.cache.microbatches(docs, len(who)):
            share = content[part].sum() / content[docs].sum()
            yield self.training.kl_weight * self.text_kl(deltas[who], split, part) * share

    @property
    def has_text_term(self) -> bool:
        """Whether other text is ever touched: a shift of the survey block leaves it as it is."""
        return self.training.kl_weight > 0 and self.training.positions == "all"

    @torch.no_grad()
    def evaluate(self, deltas: torch.Tensor) -> float:
        """The objective on validation questions and documents."""
        found = sum(
            self.loss(deltas, rows)[0].item() * len(rows)
            for rows in self.cache.microbatches(self.validation_ids, len(deltas))
        ) / len(self.validation_ids)
        if self.has_text_term:
            docs = torch.arange(min(16, len(self.cache.texts["validation"])))
            some = torch.arange(0, len(deltas), max(1, len(deltas) // 4))
            terms = self.text_terms(deltas, some, "validation", docs)
            found += sum(term.item() for term in terms)
        return found

    # steps

    def backward(self, deltas: torch.Tensor, rows: torch.Tensor, step: int) -> None:
        """Gradients of one step, microbatch by microbatch; they meet in a leaf of all deltas."""
        t = self.training
        leaf = deltas.detach().requires_grad_()
        who = torch.arange(len(deltas))
        if t.n_groups < len(deltas):
            who = torch.randperm(len(deltas), generator=self.random)[: t.n_groups]
        total = 0.0
        for term in self.survey_terms(leaf, rows, who):
            term.backward()
            total += term.item()
        if self.has_text_term:
            n_texts = len(self.cache.texts["train"])
            docs = torch.randint(n_texts, (t.n_documents,), generator=self.random)
            some = torch.randperm(len(deltas), generator=self.random)[: t.n_kl_groups]
            for term in self.text_terms(leaf, some, "train", docs):
                term.backward()
                total += term.item()
        if not np.isfinite(total):
            raise ResearchError(
                f"the loss of the {t.kind} shift is not finite at step {step}; lower `lr`."
            )
        deltas.backward(leaf.grad)

    def batches(self, steps: int) -> Iterator[torch.Tensor]:
        """Prompts of each step: a new seeded shuffle whenever too few are left."""
        order = torch.empty(0, dtype=torch.long)
        for _ in range(steps):
            if len(order) < self.training.batch_size:
                shuffled = torch.randperm(len(self.train_ids), generator=self.random)
                order = self.train_ids[shuffled]
            yield order[: self.training.batch_size]
            order = order[self.training.batch_size :]

    def run(
        self,
        tables: list[dict],
        make_deltas: Callable[[], torch.Tensor],
        steps: int,
        sparse: torch.Tensor,
    ) -> None:
        """Proximal Adam with a cosine to zero; keeps the tables of the best evaluation.

        `sparse` is the table whose rows the group lasso shrinks.
        """
        t = self.training
        optimizer = torch.optim.Adam(tables)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda s: 0.5 * (1 + np.cos(np.pi * s / steps))
        )
        parameters = [p for table in tables for p in table["params"]]
        lasso = lasso_weights(self.basis, t.kind, self.cache.survey_residuals)
        lowest = np.inf
        best = None
        for step, rows in enumerate(self.batches(steps)):
            optimizer.zero_grad()
            self.backward(make_deltas(), rows, step)
            optimizer.step()
            if t.sparsity_weight:
                amount = schedule.get_last_lr()[0] * t.sparsity_weight * lasso
                with torch.no_grad():
                    sparse.copy_(shrink_decoder_rows(sparse, amount))
            schedule.step()
            if (step + 1) % t.eval_every == 0 or step + 1 == steps:
                found = self.evaluate(make_deltas().detach())
                if found <= lowest:
                    lowest = found
                    best = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for parameter, value in zip(parameters, best, strict=True):
                parameter.copy_(value)

    def find_start(
        self, shared: torch.Tensor, centring: torch.Tensor, rank: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """U and c at the leading directions of the groups' first gradient.

        There the loss falls fastest from Delta_0.
        """
        n_groups = len(centring)
        batch_size = self.training.batch_size
        free = torch.zeros(n_groups, len(shared), device=self.device, requires_grad=True)
        order = torch.randperm(len(self.train_ids), generator=self.random)
        for rows in self.train_ids[order[: 4 * batch_size]].split(batch_size):
            for part in self.cache.microbatches(rows, n_groups):
                (self.loss(shared + centring @ free, part)[0] * len(part)).backward()
        left, values, right = torch.linalg.svd(-centring @ free.grad, full_matrices=False)
        if rank > len(values):
            raise ResearchError(
                f"rank {rank} exceeds what {n_groups} groups and {len(shared)} coordinates allow; "
                "lower it."
            )
        size = values[:rank] / values[0].clamp(min=1e-12)
        scores = left[:, :rank] * n_groups**0.5 * size
        return (right[:rank].T * 0.3).requires_grad_(), scores.requires_grad_()


class _Tables:
    """The tables that training moves, and the shifts Delta_0 + U (c_0 + c_g) that they make up.

    Without a rank every group has a column of U for itself, and c stays fixed. With joint
    calibration Delta_0 is U c_0 (or a free column of its own, the first one) and trained with U.
    """

    def __init__(self, run: _Training, shared: torch.Tensor, targets: Targets):
        device = run.device
        n = len(targets.groups)
        rank = run.training.rank
        self.free = rank is None
        self.joint = run.training.calibration == "axes"
        self.shared = shared.to(device)  # Delta_0 where it was trained before, else zero, [M]
        self.centring = targets.centring().to(device)
        self.scores = torch.eye(n, device=device)  # c before centring, [groups, r]
        self.middle = torch.zeros(1, rank or n, device=device)  # c_0
        if self.free:
            self.axes = torch.zeros(len(shared), n + self.joint, device=device, requires_grad=True)
            return
        centring = self.scores if self.joint else self.centring
        self.axes, self.scores = run.find_start(self.shared, centring, rank)
        if self.joint:
            weights = torch.tensor(targets.weights, dtype=torch.float32, device=device)
            middle = weights @ self.scores.detach() / weights.sum()
            self.middle = middle[None].requires_grad_()

    def mixture(self) -> torch.Tensor:
        """What each group takes of each column of U: c_0 + c_g."""
        if self.free and self.joint:
            return torch.cat([torch.ones_like(self.centring[:, :1]), self.centring], 1)
        return self.middle + self.centring @ self.scores

    def deltas(self) -> torch.Tensor:
        """Delta_g of every group."""
        return self.shared + self.mixture() @ self.axes.T

    def parameters(self, training: ShiftTraining) -> list[dict]:
        """Parameter groups of the optimizer."""
        found = [{"params": [self.axes], "lr": training.lr}]
        if not self.free:
            lr = training.lr * training.score_lr_mult
            found.append({"params": [self.scores], "lr": lr})
            if self.joint:
                found.append({"params": [self.middle], "lr": lr})
        return found

    def finish(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Delta_0, U and c."""
        axes = self.axes.detach()
        shared = self.shared
        if self.joint and self.free:
            shared = axes[:, 0]
            axes = axes[:, 1:]
        elif self.joint:
            shared = (self.middle.detach() @ axes.T)[0]
        return shared.cpu(), axes.cpu(), (self.centring @ self.scores).detach().cpu()


def train_shift(
    cache: CachedPrompts, basis: Basis, training: ShiftTraining, targets: Targets, seed: int
) -> Shift:
    """Train a shift for every group of `targets`."""
    shared = torch.zeros(basis.size)
    if training.calibration == "first":
        shared = train_calibration(cache, basis, training, targets, seed)
    run = _Training(cache, basis, training, targets, targets.answers, seed)
    tables = _Tables(run, shared, targets)
    run.run(tables.parameters(training), tables.deltas, training.steps, tables.axes)
    found = Shift(training.kind, cache.hook, training.positions, targets.groups, *tables.finish())
    return canonicalize(found, torch.tensor(targets.weights))


def train_calibration(
    cache: CachedPrompts, basis: Basis, training: ShiftTraining, targets: Targets, seed: int
) -> torch.Tensor:
    """Delta_0, [M]: one shift for everybody, trained on the population's answers."""
    larger = replace(training, batch_size=4 * training.batch_size)
    run = _Training(cache, basis, larger, targets, targets.overall[None], seed)
    shared = torch.zeros(basis.size, 1, device=run.device, requires_grad=True)
    tables = [{"params": [shared], "lr": training.lr}]
    run.run(tables, lambda: shared.T, training.calibration_steps, shared)
    return shared.detach()[:, 0].cpu()
