"""Baselines that read or change the model: linear probes, letter unembeddings, LoRA (section 4).

LoRA is the strongest published baseline (SubPOP): the same loss and data, but weights change.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from sae_research.errors import ResearchError
from sae_research.studies.opinion_qa import baselines
from sae_research.studies.opinion_qa.experiment import Experiment
from sae_research.studies.opinion_qa.fit import minimize
from sae_research.studies.opinion_qa.methods import UNKNOWN_COST, MethodResult
from sae_research.studies.opinion_qa.settings import LORA_PER_GROUP, LoRATraining
from sae_research.surveys.cached import CachedPrompts, OffTaskCost, Prompts
from sae_research.surveys.group_prompts import GroupPrompts, compute_states, read_letter_scores
from sae_research.surveys.prompts import AnswerDistribution, average_orders
from sae_research.surveys.targets import Targets, forward_kl

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# linear probes of cached states


@dataclass(frozen=True)
class LinearProbe:
    """Letter scores read linearly from a cached state: a probe, or new unembedding rows."""

    weights: torch.Tensor
    """[letters, d], or one such table per group."""
    bias: torch.Tensor
    """[letters], or one such row per group."""

    @property
    def parameters(self) -> int:
        """Numbers trained."""
        return self.weights.numel() + self.bias.numel()

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Scores [groups, prompts, letters] of states [groups, prompts, d]."""
        weights = self.weights.expand(len(states), *self.weights.shape[-2:])
        bias = self.bias.expand(len(states), self.bias.shape[-1])
        return torch.einsum("gnd,gkd->gnk", states, weights) + bias[:, None]


def fit_probe(
    cache: CachedPrompts,
    states: torch.Tensor,
    targets: Targets,
    start: torch.Tensor | None = None,
    by_group: bool = False,
    ridges: Sequence[float] = (1e-4, 1e-3, 1e-2, 1e-1),
) -> tuple[LinearProbe, float]:
    """Fit letter rows on states [groups, prompts, d] by forward KL, pulled towards `start`.

    The ridge is chosen on validation questions; the second value is the loss there.
    """
    n_letters = len(cache.letters.tokens)
    width = states.shape[-1]
    device = states.device
    center = torch.zeros(n_letters, width, device=device) if start is None else start
    answers = torch.tensor(targets.answers, dtype=torch.float32, device=device)
    # standardized, so that one ridge means the same for every dimension
    scale = states.flatten(0, 1).std(0).clamp(min=1e-6)

    def compute_loss(probe: LinearProbe, questions: np.ndarray) -> torch.Tensor:
        rows = cache.prompts.prompt_ids(questions)
        logs = cache.prompts.sort_scores(probe(states[:, rows]), rows).log_softmax(-1)
        target = answers[:, cache.prompts.question[rows]]
        return forward_kl(target.flatten(0, 1), logs.flatten(0, 1)).mean()

    def fit(ridge: float) -> LinearProbe:
        shape = (len(states),) if by_group else ()
        change = torch.zeros(*shape, n_letters, width, device=device, requires_grad=True)
        bias = torch.zeros(*shape, n_letters, device=device, requires_grad=True)

        def penalised() -> torch.Tensor:
            loss = compute_loss(LinearProbe(center + change / scale, bias), targets.train)
            return loss + ridge * n_letters * change.square().mean()

        minimize([change, bias], penalised, 60)
        return LinearProbe((center + change / scale).detach(), bias.detach())

    tried = [(compute_loss(probe, targets.validation).item(), probe) for probe in map(fit, ridges)]
    finite = [found for found in tried if np.isfinite(found[0])]
    if not finite:
        raise ResearchError(
            "the linear probe did not converge at any ridge; check the cached states."
        )
    loss, best = min(finite, key=lambda found: found[0])
    return best, loss


def unembed_letters(cache: CachedPrompts) -> torch.Tensor:
    """The model's unembedding rows of the letters, [letters, d], averaged over token variants."""
    rows = cache.tail.W_U.T[cache.letters.tokens]
    real = cache.letters.real[..., None].to(rows)
    return (rows * real).sum(1) / real.sum(1)


def evaluate_unembeddings(exp: Experiment, prompted: GroupPrompts) -> list[MethodResult]:
    """New unembedding rows of the letters, with and without group prompts.

    What they cost other text is not measured.
    """
    cache = exp.cache
    start = unembed_letters(cache)
    plain = compute_states(cache, cache.residual, cache.prompts.last).float()
    cases = {
        "letter unembedding, per group": (plain.expand(len(exp.targets.groups), -1, -1), True),
        "letter unembedding, group prompt": (prompted.final, False),
    }
    results = []
    for name, (states, by_group) in cases.items():
        probe, _ = fit_probe(cache, states, exp.targets, start, by_group)
        results.append(replace(_judge(exp, name, probe, states), cost=UNKNOWN_COST))
    return results


def _judge(exp: Experiment, name: str, probe: LinearProbe, states: torch.Tensor) -> MethodResult:
    test = exp.cache.prompts.prompt_ids(exp.eval_set.questions)
    read = read_letter_scores(exp.cache, probe(states[:, test]), test)
    return baselines.make_result(name, read, probe.parameters)


def evaluate_probe(exp: Experiment, prompted: GroupPrompts) -> tuple[float, MethodResult]:
    """The multinomial probe on this layer's prompted residual, with its validation loss."""
    cache = exp.cache
    probe, loss = fit_probe(cache, prompted.hidden, exp.targets)
    block = cache.model.depth(cache.hook) - 1
    name = f"multinomial probe, prompted (block {block})"
    return loss, _judge(exp, name, probe, prompted.hidden)


# LoRA

_PROJECTIONS = (("q_proj", "v_proj"), ("c_attn",), ("query_key_value",))


def add_adapter(model: "PreTrainedModel", training: LoRATraining, seed: int):
    """The model with fresh adapters on its query and value projections."""
    from peft import LoraConfig, get_peft_model

    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    targets = next(projections for projections in _PROJECTIONS if names.issuperset(projections))
    torch.manual_seed(seed)
    config = LoraConfig(
        r=training.rank,
        lora_alpha=training.alpha,
        lora_dropout=training.dropout,
        target_modules=list(targets),
    )
    return get_peft_model(model, config)


def train_lora(
    exp: Experiment, name: str, prompts: list[Prompts], answers: np.ndarray, seed: int
) -> MethodResult:
    """Train one adapter on the prompts of every group, and judge it on the test questions.

    `answers` are those of the groups that `prompts` ask, [groups, questions, options].
    """
    if exp.load_fresh is None:
        raise ResearchError(
            "LoRA changes weights: give the experiment `load_fresh`, which loads the model anew."
        )
    cache = exp.cache
    training = exp.settings.lora
    model = add_adapter(exp.load_fresh(), training, seed)
    random = torch.Generator().manual_seed(seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=training.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.steps)
    rows = cache.prompts.prompt_ids(exp.targets.train)
    truth = torch.tensor(answers, dtype=torch.float32, device=cache.residual.device)
    model.train()
    for _ in range(training.steps):
        groups = torch.randint(len(prompts), (training.batch_size,), generator=random)
        drawn = rows[torch.randint(len(rows), (training.batch_size,), generator=random)]
        optimizer.zero_grad()
        for part in cache.microbatches(torch.arange(training.batch_size), 1):
            group = groups[part].to(rows.device)
            which = drawn[part]
            scores = _scores(model, cache, *_gather(prompts, group, which))
            logs = cache.prompts.sort_scores(scores, which).log_softmax(-1)
            loss = forward_kl(truth[group, cache.prompts.question[which]], logs)
            (loss.sum() / training.batch_size).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    read = [read_adapted_answers(model, cache, one, exp.eval_set.questions) for one in prompts]
    return MethodResult(
        name,
        np.stack([r.probabilities for r in read]),
        measure_adapted_cost(model, cache),
        sum(p.numel() for p in trained),
        order=float(np.mean([r.order_sensitivity.mean() for r in read])),
    )


def _gather(
    prompts: list[Prompts], groups: torch.Tensor, which: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and last positions of prompt `which` of each group, padded on the right."""
    rows = [
        (prompts[g].tokens[r], int(prompts[g].last[r]))
        for g, r in zip(groups.tolist(), which.tolist(), strict=True)
    ]
    width = max(last for _, last in rows) + 1
    tokens = [torch.nn.functional.pad(t, (0, max(0, width - len(t))))[:width] for t, _ in rows]
    last = torch.tensor([last for _, last in rows], device=tokens[0].device)
    return torch.stack(tokens), last


def _scores(model, cache: CachedPrompts, tokens: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Letter scores at the last prompt token; padding on the right is behind it."""
    places, which = last.unique(return_inverse=True)
    logits = model(input_ids=tokens, use_cache=False, logits_to_keep=places).logits
    own = logits[torch.arange(len(last), device=last.device), which]
    return cache.letters.score_logits(own.float())


@torch.no_grad()
def read_adapted_answers(
    model, cache: CachedPrompts, prompts: Prompts, questions: np.ndarray
) -> AnswerDistribution:
    """Answers [questions, options], both orders averaged."""
    rows = prompts.prompt_ids(questions)
    found = [
        prompts.sort_scores(_scores(model, cache, prompts.tokens[part], prompts.last[part]), part)
        for part in rows.split(cache.batch)
    ]
    return average_orders(torch.cat(found).softmax(-1))


@torch.no_grad()
def measure_adapted_cost(model, cache: CachedPrompts, split: str = "test") -> OffTaskCost:
    """What the adapter does to other text, next to the frozen model."""
    tokens = cache.texts[split]
    totals = np.zeros(2)
    for docs in cache.microbatches(torch.arange(len(tokens)), 4):
        new = model(input_ids=tokens[docs], use_cache=False).logits.float().log_softmax(-1)
        base = cache.text_logits(split, docs).log_softmax(-1)
        totals += cache.sum_costs(split, docs, base, new)
    return OffTaskCost(*(totals / cache.count_text(split)).tolist())


def evaluate_lora(exp: Experiment, prompted: GroupPrompts, seed: int) -> list[MethodResult]:
    """SubPOP's adapters: one for all groups, told apart by prompts, and one per group without."""
    answers = exp.targets.answers
    results = [train_lora(exp, "LoRA, group prompt", prompted.prompts, answers, seed)]
    if exp.settings.lora_per_group:
        own = [
            train_lora(exp, LORA_PER_GROUP, [exp.cache.prompts], answers[[g]], seed)
            for g in range(len(answers))
        ]
        costs = [(o.cost.loss, o.cost.divergence, o.order) for o in own]
        loss, divergence, order = (float(np.mean(column)) for column in zip(*costs, strict=True))
        answers = np.concatenate([o.answers for o in own])
        trained = sum(o.parameters for o in own)
        cost = OffTaskCost(loss, divergence)
        results.append(MethodResult(LORA_PER_GROUP, answers, cost, trained, order=order))
    return results
