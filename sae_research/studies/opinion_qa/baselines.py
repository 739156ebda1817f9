"""What a shift has to beat on the same data and splits (4): prompts, untrained directions."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from sae_research.bases import Basis
from sae_research.shifts import Shift
from sae_research.studies.opinion_qa.experiment import Experiment
from sae_research.studies.opinion_qa.fit import minimize, train_calibration
from sae_research.studies.opinion_qa.methods import MethodResult, evaluate_shift, train_method
from sae_research.studies.opinion_qa.settings import HUMAN_OVERALL, MEANS, UNSTEERED, ShiftTraining
from sae_research.surveys.cached import NO_COST, CachedPrompts
from sae_research.surveys.group_prompts import (
    GroupPrompts,
    compute_states,
    difference_of_means,
    latent_contrasts,
    read_letter_scores,
)
from sae_research.surveys.prompts import AnswerDistribution
from sae_research.surveys.targets import forward_kl, mean_kl

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

    def compute_loss() -> torch.Tensor:
        logs = cache.prompts.sort_scores(scores * scale + bias, rows).log_softmax(-1)
        return forward_kl(target, logs).mean() + 1e-6 * bias.square().sum()

    minimize([scale, bias], compute_loss, 100)
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
