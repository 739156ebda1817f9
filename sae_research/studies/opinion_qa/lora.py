"""LoRA, the strongest published rival (SubPOP): the same loss and data, but weights change (section 4, B10)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from sae_research.studies.opinion_qa import objective
from sae_research.studies.opinion_qa.bench import Bench, Cost, Prompts
from sae_research.studies.opinion_qa.fit import Targets
from sae_research.studies.opinion_qa.letters import Reading, averaged, by_ordinal, option_log_probs
from sae_research.studies.opinion_qa.settings import LoRATraining

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROJECTIONS = (("q_proj", "v_proj"), ("c_attn",), ("query_key_value",))


@dataclass(frozen=True)
class Adapted:
    """What an adapted model answers and what it costs."""

    answers: np.ndarray
    """[groups, questions, options] on the questions asked."""
    cost: Cost
    """Cost on other text."""
    parameters: int
    """Numbers trained."""
    order: float
    """Mean total variation between the two option orders."""


def adapter(model: "PreTrainedModel", training: LoRATraining, seed: int):
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


def train(
    load: Callable[[], "PreTrainedModel"],
    bench: Bench,
    asked: list[Prompts],
    answers: np.ndarray,
    targets: Targets,
    training: LoRATraining,
    seed: int,
    exam: np.ndarray,
) -> Adapted:
    """Train one adapter on the prompts `asked` of every group and read its answers to the questions `exam`."""
    model = adapter(load(), training, seed)
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=training.rate
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.steps)
    rows = bench.prompts.rows(targets.train)
    truth = torch.tensor(answers, dtype=torch.float32, device=bench.residual.device)
    model.train()
    for _ in range(training.steps):
        drawn = torch.randint(len(asked), (training.batch,), generator=random)
        prompted = rows[torch.randint(len(rows), (training.batch,), generator=random)]
        optimizer.zero_grad()
        for part in bench.parts(torch.arange(training.batch), 1):
            who, which = drawn[part].to(rows.device), prompted[part]
            scores = _scores(model, bench, *_gather(asked, who, which))
            logs = option_log_probs(
                scores, bench.prompts.ladder[which], bench.prompts.reverse[which]
            )
            loss = objective.forward_divergence(truth[who, bench.prompts.question[which]], logs)
            (loss.sum() / training.batch).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    read = [answers_of(model, bench, one, exam) for one in asked]
    answers, order = (
        np.stack([r.probabilities for r in read]),
        np.mean([r.order_sensitivity.mean() for r in read]),
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Adapted(answers, cost(model, bench), trained, float(order))


def _gather(
    asked: list[Prompts], who: torch.Tensor, which: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and last positions of prompt `which` of group `who`, padded on the right."""
    rows = [
        (asked[g].tokens[r], int(asked[g].last[r]))
        for g, r in zip(who.tolist(), which.tolist(), strict=True)
    ]
    width = max(last for _, last in rows) + 1
    tokens = torch.stack(
        [torch.nn.functional.pad(t, (0, max(0, width - len(t))))[:width] for t, _ in rows]
    )
    return tokens, torch.tensor([last for _, last in rows], device=tokens.device)


def _scores(model, bench: Bench, tokens: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Letter scores at the last prompt token; padding on the right is behind it."""
    places, which = last.unique(return_inverse=True)
    logits = model(input_ids=tokens, use_cache=False, logits_to_keep=places).logits
    return bench.letters.scores(logits[torch.arange(len(last), device=last.device), which].float())


@torch.no_grad()
def answers_of(model, bench: Bench, asked: Prompts, exam: np.ndarray) -> Reading:
    """Answers [questions, options], both orders averaged."""
    rows = asked.rows(exam)
    found = [
        by_ordinal(
            _scores(model, bench, asked.tokens[part], asked.last[part]),
            asked.ladder[part],
            asked.reverse[part],
        )
        for part in rows.split(bench.batch)
    ]
    halves = [half.softmax(-1).double().cpu().numpy() for half in torch.cat(found).chunk(2)]
    return averaged(halves, [np.full(len(half), np.nan) for half in halves])


@torch.no_grad()
def cost(model, bench: Bench, split: str = "test") -> Cost:
    """What the adapter does to other text, next to the frozen model."""
    tokens, content = bench.texts[split], bench.text_content[split]
    lost = away = 0.0
    for docs in bench.parts(torch.arange(len(tokens)), 4):
        new = model(input_ids=tokens[docs], use_cache=False).logits.float().log_softmax(-1)
        base = bench.text_logits(split, docs).log_softmax(-1)
        real = content[docs]
        change = (base - new)[:, :-1].gather(-1, tokens[docs, 1:, None])[..., 0]
        lost += change[real[:, 1:]].double().sum().item()
        away += (base.exp() * (base - new)).sum(-1)[real].double().sum().item()
    return Cost(lost / content[:, 1:].sum().item(), away / content.sum().item())
