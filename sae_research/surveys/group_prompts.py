"""The survey as put to a member of each group, with what the model makes of it, cached."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sae_research.bases import Basis
from sae_research.surveys.cached import CachedPrompts, Prompts, Writer, make_prompts
from sae_research.surveys.prompts import (
    AnswerDistribution,
    OptionLetters,
    PromptTemplate,
    average_orders,
)
from sae_research.surveys.survey import Group
from sae_research.surveys.targets import Targets


@dataclass(frozen=True)
class GroupPrompts:
    """The survey put to a member of every group in one form of words."""

    prompts: list[Prompts]
    """Prompts of each group."""
    scores: torch.Tensor
    """Letter scores, [groups, prompts, letters]."""
    hidden: torch.Tensor
    """Residual at the hook of the last prompt token, [groups, prompts, d]."""
    final: torch.Tensor
    """Final normed state there, [groups, prompts, d]."""
    block: torch.Tensor
    """Mean residual over the survey block of each group's prompts, [groups, d]."""
    acts: torch.Tensor
    """Mean activation over the block, [groups, M]."""
    fires: torch.Tensor
    """Share of the block's tokens on which each coordinate is active, [groups, M]."""
    spread: torch.Tensor
    """Variance over prompts of a prompt's mean activation over its block, mean over groups, [M]."""
    count: int
    """Prompts of each group that block means are over."""


def run_group_prompts(
    cache: CachedPrompts,
    basis: Basis,
    template: PromptTemplate,
    groups: Sequence[Group],
    questions: Sequence[int],
    form: str = "BIO",
) -> GroupPrompts:
    """Ask every group the survey in one form; block means are over the prompts of `questions`.

    The block of a prompt is what it ends with as the prompt without a group does. A group is in
    all its tokens, while the last one need not have heard of it yet at an early layer.
    """
    found = []
    for group in groups:
        siblings = [g for g in groups if g.attribute == group.attribute]
        write = template.group_prompt(form, group, siblings)
        found.append(_run_group(cache, basis, write, questions))
    prompts = [one.pop("prompts") for one in found]
    stacked = {name: torch.stack([one[name] for one in found]) for name in found[0]}
    stacked["spread"] = stacked["spread"].mean(0)
    return GroupPrompts(prompts, **stacked, count=len(cache.prompts.prompt_ids(questions)))


@torch.no_grad()
def _run_group(cache: CachedPrompts, basis: Basis, write: Writer, questions: Sequence[int]) -> dict:
    """The fields of `GroupPrompts` for one group."""
    own = make_prompts(cache.model, cache.questions, write)
    residual = cache.compute_residuals(own.tokens)
    place = torch.arange(residual.shape[1], device=residual.device)
    state = compute_states(cache, residual, own.last)
    start = own.last - shared_ending(own, cache.prompts)
    inside = (place <= own.last[:, None]) & (place > start[:, None])
    train = own.prompt_ids(questions)
    parts = [_over_block(basis, residual[p], inside[p]) for p in cache.microbatches(train, 1)]
    acts, active = (torch.cat(part) for part in zip(*parts, strict=True))
    return {
        "prompts": own,
        "scores": cache.letters.score_states(cache.tail, state),
        "hidden": residual[torch.arange(len(residual)), own.last],
        "final": state.float(),
        "block": residual[train][inside[train]].mean(0),
        "acts": acts.mean(0),
        "fires": active.mean(0),
        "spread": acts.var(0),
    }


def _over_block(
    basis: Basis, residual: torch.Tensor, inside: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean activation over tokens `inside`, and the share of them that is active, [prompts, M]."""
    acts = basis.encode(residual) * inside[..., None]
    count = inside.sum(1, keepdim=True)
    return acts.sum(1) / count, (acts != 0).sum(1) / count


def shared_ending(first: Prompts, second: Prompts) -> torch.Tensor:
    """How many tokens two ways of asking end alike, start tokens left out, [prompts]."""
    width = min(first.tokens.shape[1], second.tokens.shape[1])
    back = torch.arange(width, device=first.tokens.device)
    places = [one.last[:, None] - back for one in (first, second)]
    ends = [
        one.tokens.gather(1, place.clamp(min=0))
        for one, place in zip((first, second), places, strict=True)
    ]
    alike = (ends[0] == ends[1]) & (places[0] > 0) & (places[1] > 0)
    return alike.long().cumprod(1).sum(1)


# what tells groups apart


def difference_of_means(prompted: GroupPrompts, targets: Targets) -> torch.Tensor:
    """v_g = mean x(prompt of g) - mean x(prompts of its siblings), [groups, d] (CAA)."""
    attributes = np.array(targets.attributes)
    found = []
    for g, attribute in enumerate(attributes):
        others = [h for h in range(len(attributes)) if attributes[h] == attribute and h != g]
        found.append(prompted.block[g] - prompted.block[others].mean(0))
    return torch.stack(found)


def latent_contrasts(prompted: GroupPrompts, targets: Targets) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each latent: mean activation of g minus that of its siblings, F statistic between groups.

    They are [groups, M] and [M].
    """
    mean, within = prompted.acts, prompted.spread
    attributes = np.array(targets.attributes)
    contrast, between = torch.zeros_like(mean), torch.zeros_like(within)
    for attribute in dict.fromkeys(attributes):
        group = np.flatnonzero(attributes == attribute)
        total = mean[group].sum(0)
        contrast[group] = mean[group] - (total - mean[group]) / (len(group) - 1)
        between += prompted.count * mean[group].var(0)
    statistic = torch.where(within > 1e-10, between / within.clamp(min=1e-10), 0.0)
    return contrast, statistic


# what was cached, read as answers


@torch.no_grad()
def compute_states(
    cache: CachedPrompts, residual: torch.Tensor, last: torch.Tensor
) -> torch.Tensor:
    """Final normed states at the last prompt token, [prompts, d]."""
    parts = zip(residual.split(cache.batch), last.split(cache.batch), strict=True)
    return torch.cat([cache.tail.states(x, at) for x, at in parts])


def read_letter_scores(
    cache: CachedPrompts, scores: torch.Tensor, rows: torch.Tensor
) -> AnswerDistribution:
    """Answers [groups, questions, options] from letter scores [groups, prompts, letters]."""
    return average_orders(cache.prompts.sort_scores(scores, rows).softmax(-1))


@torch.no_grad()
def measure_refusals(cache: CachedPrompts, write: Writer) -> np.ndarray:
    """Mass of a refusal on every question when `write` offers one too, both orders averaged.

    It is reported apart and never a part of the answer distribution.
    """
    letters = OptionLetters(cache.model.tokenizer, len(cache.letters.tokens) + 1)
    offered = make_prompts(cache.model, cache.questions, write)
    parts = zip(offered.tokens.split(cache.batch), offered.last.split(cache.batch), strict=True)
    states = [cache.tail.states(cache.compute_residuals(tokens), at) for tokens, at in parts]
    logits = torch.cat([cache.tail.logits(part) for part in states])
    mass = letters.score_logits(logits).softmax(-1)
    # the last letter that is offered is the refusal's
    n_options = offered.n_options[:, None]
    beyond = torch.arange(mass.shape[1], device=mass.device) >= n_options
    answered = mass.masked_fill(beyond, 0.0).sum(1).double().cpu().numpy()
    refused = mass.gather(1, n_options)[:, 0].double().cpu().numpy()
    return (refused / (answered + refused)).reshape(2, -1).mean(0)
