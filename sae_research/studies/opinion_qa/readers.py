"""Baselines that read or change the model: linear probes, letter unembeddings, LoRA (section 4).

LoRA is the strongest published baseline (SubPOP): the same loss and data, but weights change.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from sae_research.errors import ResearchError
from sae_research.studies.opinion_qa import baselines
from sae_research.studies.opinion_qa.cache import CachedPrompts, OffTaskCost, Prompts
from sae_research.studies.opinion_qa.experiment import Experiment
from sae_research.studies.opinion_qa.fit import Targets, forward_kl
from sae_research.studies.opinion_qa.methods import UNKNOWN_COST, MethodResult
from sae_research.studies.opinion_qa.prompts import (
    AnswerDistribution,
    average_orders,
    option_log_probs,
    sort_by_ordinal,
)
from sae_research.studies.opinion_qa.settings import LORA_PER_GROUP, LoRATraining

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
    center = start
    if center is None:
        center = torch.zeros(len(cache.letters.tokens), states.shape[-1], device=states.device)
    train = cache.prompts.prompt_ids(targets.train)
    validation = cache.prompts.prompt_ids(targets.validation)
    tried = []
    for ridge in ridges:
        probe = _fit_with_ridge(cache, states, targets, center, by_group, ridge, train)
        with torch.no_grad():
            tried.append((_probe_loss(cache, probe, states, targets, validation).item(), probe))
    finite = [found for found in tried if np.isfinite(found[0])]
    if not finite:
        raise ResearchError(
            "the linear probe did not converge at any ridge; check the cached states."
        )
    loss, best = min(finite, key=lambda found: found[0])
    return best, loss


def _probe_loss(
    cache: CachedPrompts,
    probe: LinearProbe,
    states: torch.Tensor,
    targets: Targets,
    rows: torch.Tensor,
) -> torch.Tensor:
    """Mean forward KL of the probe's answers to the groups' on the prompts `rows`."""
    answers = torch.tensor(targets.answers, dtype=torch.float32, device=states.device)
    n_options = cache.prompts.n_options[rows].repeat(len(states))
    reverse = cache.prompts.reverse[rows].repeat(len(states))
    logs = option_log_probs(probe(states[:, rows]).flatten(0, 1), n_options, reverse)
    return forward_kl(answers[:, cache.prompts.question[rows]].flatten(0, 1), logs).mean()


def _fit_with_ridge(
    cache: CachedPrompts,
    states: torch.Tensor,
    targets: Targets,
    center: torch.Tensor,
    by_group: bool,
    ridge: float,
    rows: torch.Tensor,
) -> LinearProbe:
    letters = len(cache.letters.tokens)
    shape = (len(states),) if by_group else ()
    # standardized, so that one ridge means the same for every dimension
    scale = states.flatten(0, 1).std(0).clamp(min=1e-6)
    change = torch.zeros(
        *shape, letters, states.shape[-1], device=states.device, requires_grad=True
    )
    bias = torch.zeros(*shape, letters, device=states.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([change, bias], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        probe = LinearProbe(center + change / scale, bias)
        loss = _probe_loss(cache, probe, states, targets, rows)
        loss = loss + ridge * letters * change.square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return LinearProbe((center + change / scale).detach(), bias.detach())


def unembed_letters(cache: CachedPrompts) -> torch.Tensor:
    """The model's unembedding rows of the letters, [letters, d], averaged over token variants."""
    rows = cache.tail.W_U.T[cache.letters.tokens]
    real = cache.letters.real[..., None].to(rows)
    return (rows * real).sum(1) / real.sum(1)


def evaluate_unembeddings(exp: Experiment, prompted: baselines.GroupPrompts) -> list[MethodResult]:
    """New unembedding rows of the letters, with and without group prompts.

    What they cost other text is not measured.
    """
    cache = exp.cache
    test = cache.prompts.prompt_ids(exp.eval_set.questions)
    start = unembed_letters(cache)
    with torch.no_grad():
        parts = zip(
            cache.residual.split(cache.batch), cache.prompts.last.split(cache.batch), strict=True
        )
        plain = torch.cat([cache.tail.states(x, last).float() for x, last in parts])
    cases = {
        "letter unembedding, per group": (plain.expand(len(exp.targets.groups), -1, -1), True),
        "letter unembedding, group prompt": (prompted.final, False),
    }
    results = []
    for name, (states, by_group) in cases.items():
        probe, _ = fit_probe(cache, states, exp.targets, start, by_group)
        read = baselines.read_letter_scores(cache, probe(states[:, test]), test)
        result = baselines.make_result(name, read, probe.parameters)
        results.append(replace(result, cost=UNKNOWN_COST))
    return results


def evaluate_probe(exp: Experiment, prompted: baselines.GroupPrompts) -> tuple[float, MethodResult]:
    """The multinomial probe on this layer's prompted residual, with its validation loss."""
    cache = exp.cache
    test = cache.prompts.prompt_ids(exp.eval_set.questions)
    probe, loss = fit_probe(cache, prompted.hidden, exp.targets)
    read = baselines.read_letter_scores(cache, probe(prompted.hidden[:, test]), test)
    block = cache.model.depth(cache.hook) - 1
    name = f"multinomial probe, prompted (block {block})"
    return loss, baselines.make_result(name, read, probe.parameters)


# LoRA

_PROJECTIONS = (("q_proj", "v_proj"), ("c_attn",), ("query_key_value",))


@dataclass(frozen=True)
class AdaptedModel:
    """What an adapted model answers and what it costs."""

    answers: np.ndarray
    """[groups, questions, options] on the questions prompts."""
    cost: OffTaskCost
    """Cost on other text."""
    parameters: int
    """Numbers trained."""
    order: float
    """Mean total variation between the two option orders."""


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
    load: "Callable[[], PreTrainedModel]",
    cache: CachedPrompts,
    prompts: list[Prompts],
    answers: np.ndarray,
    targets: Targets,
    training: LoRATraining,
    seed: int,
    questions: np.ndarray,
) -> AdaptedModel:
    """Train one adapter on the prompts of every group and read its answers to `questions`."""
    model = add_adapter(load(), training, seed)
    random = torch.Generator().manual_seed(seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=training.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.steps)
    rows = cache.prompts.prompt_ids(targets.train)
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
            logs = option_log_probs(
                scores, cache.prompts.n_options[which], cache.prompts.reverse[which]
            )
            loss = forward_kl(truth[group, cache.prompts.question[which]], logs)
            (loss.sum() / training.batch_size).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    read = [read_adapted_answers(model, cache, one, questions) for one in prompts]
    return AdaptedModel(
        answers=np.stack([r.probabilities for r in read]),
        cost=measure_adapted_cost(model, cache),
        parameters=sum(p.numel() for p in trained),
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
        sort_by_ordinal(
            _scores(model, cache, prompts.tokens[part], prompts.last[part]),
            prompts.n_options[part],
            prompts.reverse[part],
        )
        for part in rows.split(cache.batch)
    ]
    halves = [half.softmax(-1).double().cpu().numpy() for half in torch.cat(found).chunk(2)]
    return average_orders(halves, [np.full(len(half), np.nan) for half in halves])


@torch.no_grad()
def measure_adapted_cost(model, cache: CachedPrompts, split: str = "test") -> OffTaskCost:
    """What the adapter does to other text, next to the frozen model."""
    tokens = cache.texts[split]
    content = cache.text_content[split]
    lost = away = 0.0
    for docs in cache.microbatches(torch.arange(len(tokens)), 4):
        new = model(input_ids=tokens[docs], use_cache=False).logits.float().log_softmax(-1)
        base = cache.text_logits(split, docs).log_softmax(-1)
        real = content[docs]
        change = (base - new)[:, :-1].gather(-1, tokens[docs, 1:, None])[..., 0]
        lost += change[real[:, 1:]].double().sum().item()
        away += (base.exp() * (base - new)).sum(-1)[real].double().sum().item()
    return OffTaskCost(lost / content[:, 1:].sum().item(), away / content.sum().item())


def evaluate_lora(
    exp: Experiment, prompted: baselines.GroupPrompts, seed: int
) -> list[MethodResult]:
    """SubPOP's adapters: one for all groups, told apart by prompts, and one per group
    without any.
    """
    if exp.load_fresh is None:
        raise ResearchError(
            "LoRA changes weights: give the experiment `load_fresh`, which loads the model anew."
        )

    def train(prompts: list[Prompts], answers: np.ndarray) -> AdaptedModel:
        return train_lora(
            exp.load_fresh,
            exp.cache,
            prompts,
            answers,
            exp.targets,
            exp.settings.lora,
            seed,
            exp.eval_set.questions,
        )

    one = train(prompted.prompts, exp.targets.answers)
    results = [
        MethodResult("LoRA, group prompt", one.answers, one.cost, one.parameters, order=one.order)
    ]
    if exp.settings.lora_per_group:
        own = [
            train([exp.cache.prompts], exp.targets.answers[[g]])
            for g in range(len(exp.targets.groups))
        ]
        results.append(
            MethodResult(
                LORA_PER_GROUP,
                np.concatenate([o.answers for o in own]),
                OffTaskCost(
                    float(np.mean([o.cost.loss for o in own])),
                    float(np.mean([o.cost.divergence for o in own])),
                ),
                sum(o.parameters for o in own),
                order=float(np.mean([o.order for o in own])),
            )
        )
    return results
