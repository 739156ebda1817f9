"""What a shift has to beat on the same data and splits (4): prompts, untrained directions."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from sae_research.bases import Basis
from sae_research.shifts import Shift
from sae_research.studies.opinion_qa.experiment import Experiment
from sae_research.studies.opinion_qa.fit import Targets, forward_kl, mean_kl, train_calibration
from sae_research.studies.opinion_qa.methods import MethodResult, evaluate_shift, train_method
from sae_research.studies.opinion_qa.settings import HUMAN_OVERALL, MEANS, UNSTEERED, ShiftTraining
from sae_research.surveys.cached import NO_COST, CachedPrompts, Prompts, Writer, make_prompts
from sae_research.surveys.prompts import AnswerDistribution, OptionLetters, average_orders

# fixed answers and letter calibration


def evaluate_fixed(exp: Experiment) -> list[MethodResult]:
    """Uniform, no steering, and the human overall marginal (an oracle row, not a competitor)."""
    questions = exp.eval_set.questions
    found = exp.cache.measure_unsteered(questions)
    cases = {
        "uniform": (exp.truth.uniform[questions], {}),
        UNSTEERED: (found.probabilities[0], found.means()),
        HUMAN_OVERALL: (exp.truth.overall[questions], {}),
    }
    return [
        MethodResult(name, _for_every_group(exp, answers[None]), NO_COST, 0, **read)
        for name, (answers, read) in cases.items()
    ]


def _for_every_group(exp: Experiment, answers: np.ndarray) -> np.ndarray:
    """The same answers [1, questions, options] for each group."""
    return np.repeat(answers, len(exp.targets.groups), 0)


def fit_letter_calibration(
    cache: CachedPrompts, scores: torch.Tensor, rows: torch.Tensor, target: torch.Tensor
) -> tuple[float, torch.Tensor]:
    """1 / T and b of s'_k = s_k / T + b_k, the same for every question and group.

    Fitted to `target` on letter scores [groups, rows, letters] of the prompts `rows`.
    """
    scale = torch.ones(1, device=scores.device, requires_grad=True)
    bias = torch.zeros(scores.shape[-1], device=scores.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([scale, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        logs = cache.prompts.sort_scores(scores * scale + bias, rows).log_softmax(-1)
        loss = forward_kl(target, logs).mean() + 1e-6 * bias.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(scale.detach()), bias.detach()


def evaluate_calibrated_letters(
    exp: Experiment, name: str, scores: torch.Tensor, answers: np.ndarray
) -> MethodResult:
    """Letter scores [groups, prompts, letters] calibrated on the training questions' `answers`."""
    prompts = exp.cache.prompts
    train = prompts.prompt_ids(exp.targets.train)
    test = prompts.prompt_ids(exp.eval_set.questions)
    truth = torch.tensor(answers, dtype=torch.float32, device=scores.device)
    target = truth[:, prompts.question[train]]
    scale, bias = fit_letter_calibration(exp.cache, scores[:, train], train, target)
    read = read_letter_scores(exp.cache, scores[:, test] * scale + bias, test)
    return make_result(name, read, len(bias) + 1)


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


def evaluate_calibration(exp: Experiment, training: ShiftTraining, seed: int) -> list[MethodResult]:
    """What the population's answers alone give: Delta_0 without a group part, and letter bias."""
    cache = exp.cache
    questions = exp.eval_set.questions
    shared = train_calibration(cache, exp.sae, training, exp.targets, seed)
    found = cache.measure_answers(
        exp.sae, training.kind, shared[None], questions, training.positions
    )
    cost = cache.measure_cost(exp.sae, training.kind, shared[None], "test", training.positions)
    alone = MethodResult(
        "calibration only",
        _for_every_group(exp, found.probabilities),
        cost,
        int((shared != 0).sum()),
        moved=(shared != 0).float().mean().item(),
        **found.means(),
    )
    with torch.no_grad():
        states = compute_states(cache, cache.residual, cache.prompts.last)
        scores = cache.letters.score_states(cache.tail, states)[None]
    overall = exp.targets.overall[None]
    bias = evaluate_calibrated_letters(exp, "temperature and letter bias", scores, overall)
    return [alone, replace(bias, answers=_for_every_group(exp, bias.answers))]


def make_result(name: str, read: AnswerDistribution, parameters: int) -> MethodResult:
    """A method that leaves the model as it is and reads letters otherwise, or asks otherwise."""
    return MethodResult(name, read.probabilities, NO_COST, parameters, **read.means())


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


# group prompts


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


def run_group_prompts(exp: Experiment, form: str = "BIO") -> GroupPrompts:
    """Ask every group the survey in one form; block means are over the training questions.

    The block of a prompt is what it ends with as the prompt without a group does. A group is in
    all its tokens, while the last one need not have heard of it yet at an early layer.
    """
    groups = exp.survey.groups
    found = []
    for group in groups:
        siblings = [g for g in groups if g.attribute == group.attribute]
        found.append(_run_group(exp, exp.template.group_prompt(form, group, siblings)))
    prompts = [one.pop("prompts") for one in found]
    stacked = {name: torch.stack([one[name] for one in found]) for name in found[0]}
    stacked["spread"] = stacked["spread"].mean(0)
    count = len(exp.cache.prompts.prompt_ids(exp.targets.train))
    return GroupPrompts(prompts, **stacked, count=count)


@torch.no_grad()
def _run_group(exp: Experiment, write: Writer) -> dict:
    """The fields of `GroupPrompts` for one group."""
    cache = exp.cache
    own = make_prompts(cache.model, cache.questions, write)
    residual = cache.compute_residuals(own.tokens)
    place = torch.arange(residual.shape[1], device=residual.device)
    state = compute_states(cache, residual, own.last)
    start = own.last - shared_ending(own, cache.prompts)
    inside = (place <= own.last[:, None]) & (place > start[:, None])
    train = own.prompt_ids(exp.targets.train)
    parts = [_over_block(exp.sae, residual[p], inside[p]) for p in cache.microbatches(train, 1)]
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


def evaluate_prompting(exp: Experiment, forms: dict[str, GroupPrompts]) -> list[MethodResult]:
    """Each form of group prompt, alone and with letter bias fitted on the training questions."""
    cache = exp.cache
    test = cache.prompts.prompt_ids(exp.eval_set.questions)
    validation = exp.targets.validation
    rows = cache.prompts.prompt_ids(validation)

    def loss(form: str) -> float:
        found = read_letter_scores(cache, forms[form].scores[:, rows], rows).probabilities
        return mean_kl(exp.targets.answers[:, validation], found)

    best = min(forms, key=loss)
    results = []
    for form, prompted in forms.items():
        name = f"prompt {form}" + (" (best on validation)" if form == best else "")
        read = read_letter_scores(cache, prompted.scores[:, test], test)
        results.append(make_result(name, read, 0))
        calibrated = f"prompt {form}, calibrated letters"
        results.append(
            evaluate_calibrated_letters(exp, calibrated, prompted.scores, exp.targets.answers)
        )
    return results


# untrained directions

COEFFICIENTS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
"""Multiples of an untrained direction that validation chooses from; its own length says little."""


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


def select_top_latents(contrast: torch.Tensor, statistic: torch.Tensor, k: int) -> torch.Tensor:
    """Untrained shift: the contrast of the `k` latents with the largest F statistic alone."""
    chosen = torch.zeros_like(statistic)
    chosen[statistic.topk(min(k, len(statistic))).indices] = 1
    return contrast * chosen


def restrict_basis(basis: Basis, keep: torch.Tensor) -> Basis:
    """The latents `keep` alone, as SAE-SSV steers within them; the rest counts as unexplained."""
    return replace(basis, encode=lambda x: basis.encode(x)[..., keep], decoder=basis.decoder[keep])


def make_untrained_shift(exp: Experiment, shared: torch.Tensor, part: torch.Tensor) -> Shift:
    """An additive shift made of given group vectors, [groups, M]."""
    return Shift(
        "additive",
        exp.cache.hook,
        exp.settings.training.positions,
        exp.targets.groups,
        shared.cpu(),
        part.T.contiguous().cpu(),
        torch.eye(len(part)),
    )


def choose_coefficient(
    exp: Experiment, basis: Basis, shift: Shift, coefficients: Sequence[float] = COEFFICIENTS
) -> tuple[float, Shift]:
    """The coefficient of the group part that is closest to the groups on validation questions."""
    rows = exp.targets.validation

    def loss(coefficient: float) -> float:
        delta = shift.shared + coefficient * shift.scores @ shift.axes.T
        found = exp.cache.measure_answers(basis, shift.kind, delta, rows, shift.positions)
        return mean_kl(exp.targets.answers[:, rows], found.probabilities)

    best = min(coefficients, key=loss)
    return best, replace(shift, scores=best * shift.scores)


def evaluate_untrained(
    exp: Experiment, prompted: GroupPrompts, calibration: ShiftTraining, seed: int
) -> list[MethodResult]:
    """Difference of means and the SAE's most selective latents, at coefficients from validation.

    Both start from a Delta_0 that was trained on the population's answers, so that only the group
    part is untrained.
    """
    additive = replace(calibration, kind="additive")
    contrast, statistic = latent_contrasts(prompted, exp.targets)
    parts = {
        MEANS: (exp.basis("dense", 0), difference_of_means(prompted, exp.targets)),
        "top 20 SAE latents, calibrated": (exp.sae, select_top_latents(contrast, statistic, 20)),
    }
    results = []
    for name, (basis, part) in parts.items():
        shared = train_calibration(exp.cache, basis, additive, exp.targets, seed)
        shift = make_untrained_shift(exp, shared, part)
        coefficient, best = choose_coefficient(exp, basis, shift)
        judged = evaluate_shift(exp, name, basis, best)
        results.append(replace(judged, coefficient=coefficient))
    return results


def evaluate_screened_latents(
    exp: Experiment, prompted: GroupPrompts, training: ShiftTraining, seed: int, k: int = 128
) -> MethodResult:
    """SAE-SSV: a trained additive shift of the `k` latents that best tell prompted groups apart."""
    _, statistic = latent_contrasts(prompted, exp.targets)
    keep = statistic.topk(min(k, exp.sae.size)).indices
    own = replace(training, kind="additive", rank=None)
    basis = restrict_basis(exp.sae, keep)
    result = train_method(exp, "screened SAE latents (SAE-SSV)", own, seed, basis)
    return replace(result, moved=result.moved * len(keep) / exp.sae.size)
