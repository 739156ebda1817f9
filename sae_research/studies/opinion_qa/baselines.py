"""What the shift has to beat, on the same data and splits (section 4)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from sae_research.errors import ResearchError
from sae_research.studies.opinion_qa import objective
from sae_research.studies.opinion_qa.bench import Bench, Prompts, prompts
from sae_research.studies.opinion_qa.fit import Targets
from sae_research.studies.opinion_qa.letters import Reading, averaged, by_ordinal, option_log_probs
from sae_research.studies.opinion_qa.prompts import Dialect
from sae_research.studies.opinion_qa.shift import Basis, Shift
from sae_research.surveys.survey import Survey


def groups_shuffled(targets: Targets, clusters: Sequence[str], seed: int) -> Targets:
    """Group labels permuted within each cluster of questions: what is learnt about a group can no longer carry over."""
    draws = np.random.default_rng(seed)
    answers = targets.answers.copy()
    clusters = np.asarray(clusters)
    for name in dict.fromkeys(clusters):
        rows = np.flatnonzero(clusters == name)
        answers[:, rows] = targets.answers[draws.permutation(len(answers))][:, rows]
    return replace(targets, answers=answers)


# temperature and letter bias


@dataclass(frozen=True)
class LetterCalibration:
    """s'_k = s_k / T + b_k: one temperature and one bias a letter, the same for every question and group."""

    scale: float
    """1 / T."""
    bias: torch.Tensor
    """b, [letters]."""

    @property
    def parameters(self) -> int:
        """K + 1."""
        return len(self.bias) + 1

    def __call__(self, scores: torch.Tensor) -> torch.Tensor:
        return scores * self.scale + self.bias


def calibrate_letters(
    bench: Bench, scores: torch.Tensor, rows: torch.Tensor, target: torch.Tensor
) -> LetterCalibration:
    """Fit temperature and letter bias to `target` [prompts, options] on letter scores of the prompts `rows`."""
    scale = torch.ones(1, device=scores.device, requires_grad=True)
    bias = torch.zeros(scores.shape[-1], device=scores.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([scale, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        logs = option_log_probs(
            scores * scale + bias, bench.prompts.ladder[rows], bench.prompts.reverse[rows]
        )
        loss = objective.forward_divergence(target, logs).mean() + 1e-6 * bias.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return LetterCalibration(float(scale.detach()), bias.detach())


def letter_scores(bench: Bench, residual: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """s_k at the last prompt token, [prompts, letters]."""
    with torch.no_grad():
        parts = zip(residual.split(bench.batch), last.split(bench.batch), strict=True)
        return torch.cat(
            [bench.letters.unembedded(bench.upper, bench.upper.states(x, at)) for x, at in parts]
        )


def read_scores(bench: Bench, scores: torch.Tensor, rows: torch.Tensor) -> Reading:
    """Answers [groups, questions, options] from letter scores [groups, prompts, letters], both orders averaged.

    Scores of letters say nothing of the mass of other tokens.
    """
    ladder, reverse = bench.prompts.ladder[rows], bench.prompts.reverse[rows]
    found = torch.stack([by_ordinal(s, ladder, reverse).softmax(-1) for s in scores])
    halves = [half.double().cpu().numpy() for half in found.chunk(2, dim=1)]
    return averaged(halves, [np.full(half.shape[:2], np.nan) for half in halves])


# prompting


@dataclass(frozen=True)
class Prompted:
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
    codes: torch.Tensor
    """Mean code over the block, [groups, M]."""
    fires: torch.Tensor
    """Share of the block's tokens on which each coordinate is active, [groups, M]."""
    spread: torch.Tensor
    """Variance over prompts of a prompt's mean code over its block, mean over groups, [M]."""
    count: int
    """Prompts of each group that block means are over."""


def prompted(
    bench: Bench, basis: Basis, dialect: Dialect, form: str, survey: Survey, rows: Sequence[int]
) -> Prompted:
    """Ask every group the questions of the bench in one form; block means are over the questions `rows`.

    The block of a prompt is what it ends with as the prompt without a group does. A group is in all its tokens, while
    the last one need not have heard of it yet at an early layer.
    """
    asked, scores, hidden, final, block, codes, fires, spread = [], [], [], [], [], [], [], []
    for group in survey.groups:
        siblings = [g for g in survey.groups if g.attribute == group.attribute]
        own = prompts(bench.lens, bench.questions, dialect.prompted(form, group, siblings))
        residual = bench.residuals(own.tokens)
        place = torch.arange(residual.shape[1], device=residual.device)
        with torch.no_grad():
            parts = zip(residual.split(bench.batch), own.last.split(bench.batch), strict=True)
            state = torch.cat([bench.upper.states(x, at) for x, at in parts])
            scores.append(bench.letters.unembedded(bench.upper, state))
        asked.append(own)
        final.append(state.float())
        hidden.append(residual[torch.arange(len(residual)), own.last])
        inside = (place <= own.last[:, None]) & (
            place > (own.last - shared_ending(own, bench.prompts))[:, None]
        )
        train = own.rows(rows)
        block.append(residual[train][inside[train]].mean(0))
        parts = [_over_block(basis, residual[p], inside[p]) for p in bench.parts(train, 1)]
        by_prompt, active = (torch.cat(part) for part in zip(*parts, strict=True))
        codes.append(by_prompt.mean(0))
        fires.append(active.mean(0))
        spread.append(by_prompt.var(0))
    tables = (torch.stack(table) for table in (scores, hidden, final, block, codes, fires))
    return Prompted(asked, *tables, torch.stack(spread).mean(0), len(train))


@torch.no_grad()
def _over_block(
    basis: Basis, residual: torch.Tensor, inside: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean code over the tokens `inside` of each prompt and the share of them on which it is active, [prompts, M]."""
    codes, count = basis.encode(residual) * inside[..., None], inside.sum(1, keepdim=True)
    return codes.sum(1) / count, (codes != 0).sum(1) / count


def shared_ending(first: Prompts, second: Prompts) -> torch.Tensor:
    """How many tokens two ways of asking a question end alike, their start tokens left out, [prompts]."""
    back = torch.arange(
        min(first.tokens.shape[1], second.tokens.shape[1]), device=first.tokens.device
    )
    ends = []
    for one in (first, second):
        place = one.last[:, None] - back
        ends.append((one.tokens.gather(1, place.clamp(min=0)), place > 0))
    alike = (ends[0][0] == ends[1][0]) & ends[0][1] & ends[1][1]
    return alike.long().cumprod(1).sum(1)


def best_form(bench: Bench, forms: dict[str, Prompted], targets: Targets) -> str:
    """The form whose answers are closest to the groups' on the validation questions."""
    rows = bench.prompts.rows(targets.validation)

    def loss(asked: Prompted) -> float:
        found = read_scores(bench, asked.scores[:, rows], rows).probabilities
        logs = torch.tensor(np.log(np.maximum(found, 1e-12)))
        truth = torch.tensor(targets.answers[:, targets.validation])
        return objective.forward_divergence(truth, logs).mean().item()

    return min(forms, key=lambda form: loss(forms[form]))


# untrained directions

STRENGTHS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
"""Multiples of an untrained direction that validation chooses from; its own length says little."""


def difference_of_means(asked: Prompted, targets: Targets) -> torch.Tensor:
    """v_g = mean x(prompt of g) - mean x(prompts of its siblings), [groups, d] (CAA)."""
    attributes = np.array(targets.attributes)
    found = []
    for g, attribute in enumerate(attributes):
        others = [h for h in range(len(attributes)) if attributes[h] == attribute and h != g]
        found.append(asked.block[g] - asked.block[others].mean(0))
    return torch.stack(found)


def latent_contrasts(asked: Prompted, targets: Targets) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each latent: mean code of g less that of its siblings [groups, M], and the F statistic between groups [M]."""
    mean, within = asked.codes, asked.spread
    attributes = np.array(targets.attributes)
    contrast, between = torch.zeros_like(mean), torch.zeros_like(within)
    for attribute in dict.fromkeys(attributes):
        group = np.flatnonzero(attributes == attribute)
        total = mean[group].sum(0)
        contrast[group] = mean[group] - (total - mean[group]) / (len(group) - 1)
        between += asked.count * mean[group].var(0)
    statistic = torch.where(within > 1e-10, between / within.clamp(min=1e-10), 0.0)
    return contrast, statistic


def top_features(contrast: torch.Tensor, statistic: torch.Tensor, k: int) -> torch.Tensor:
    """Untrained shift: the contrast of the `k` latents with the largest F statistic, nothing elsewhere."""
    chosen = torch.zeros_like(statistic)
    chosen[statistic.topk(min(k, len(statistic))).indices] = 1
    return contrast * chosen


def restricted(basis: Basis, keep: torch.Tensor, name: str) -> Basis:
    """The latents `keep` alone, as SAE-SSV steers within a screened subspace; the rest counts as unexplained."""
    return Basis(
        name, lambda x: basis.encode(x)[..., keep], basis.rows[keep], basis.offset, basis.signed
    )


def untrained(
    kind: str,
    bench: Bench,
    positions: str,
    targets: Targets,
    shared: torch.Tensor,
    part: torch.Tensor,
) -> Shift:
    """A shift made of given group vectors, [groups, M]."""
    tables = shared.cpu(), part.T.contiguous().cpu(), torch.eye(len(part))
    return Shift(kind, bench.hook, positions, targets.groups, *tables)


def best_strength(
    bench: Bench,
    basis: Basis,
    shift: Shift,
    targets: Targets,
    strengths: Sequence[float] = STRENGTHS,
) -> tuple[float, Shift]:
    """The strength of the group part that lies closest to the groups on validation questions."""
    truth = torch.tensor(targets.answers[:, targets.validation])

    def loss(strength: float) -> float:
        delta = shift.shared + strength * shift.scores @ shift.axes.T
        found = bench.answers(
            basis, shift.kind, delta, targets.validation, shift.positions
        ).probabilities
        return (
            objective.forward_divergence(truth, torch.tensor(np.log(np.maximum(found, 1e-12))))
            .mean()
            .item()
        )

    best = min(strengths, key=loss)
    return best, replace(shift, scores=best * shift.scores)


# linear readers of cached states


@dataclass(frozen=True)
class Reader:
    """Letter scores read linearly from a cached state: a multinomial probe, or new unembedding rows of the letters."""

    weights: torch.Tensor
    """[letters, d], or one such table a group."""
    bias: torch.Tensor
    """[letters], or one such row a group."""

    @property
    def parameters(self) -> int:
        """Numbers trained."""
        return self.weights.numel() + self.bias.numel()

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Scores [groups, prompts, letters] of states [groups, prompts, d]."""
        return (
            torch.einsum(
                "gnd,gkd->gnk", states, self.weights.expand(len(states), *self.weights.shape[-2:])
            )
            + (self.bias.expand(len(states), self.bias.shape[-1])[:, None])
        )


def linear_reader(
    bench: Bench,
    states: torch.Tensor,
    targets: Targets,
    start: torch.Tensor | None = None,
    by_group: bool = False,
    ridges: Sequence[float] = (1e-4, 1e-3, 1e-2, 1e-1),
) -> tuple[Reader, float]:
    """Fit letter rows on states [groups, prompts, d] by forward KL, pulled towards `start`; ridge by validation.

    The second value is the loss on validation questions.
    """
    groups, letters = len(states), bench.letters.tokens.shape[0]
    here = states.device
    center = torch.zeros(letters, states.shape[-1], device=here) if start is None else start
    scale = states.flatten(0, 1).std(0).clamp(min=1e-6)
    answers = torch.tensor(targets.answers, dtype=torch.float32, device=here)
    split = {name: bench.prompts.rows(getattr(targets, name)) for name in ("train", "validation")}

    def loss(reader: Reader, rows: torch.Tensor) -> torch.Tensor:
        scores = reader(states[:, rows])
        ladder, reverse = (
            bench.prompts.ladder[rows].repeat(groups),
            bench.prompts.reverse[rows].repeat(groups),
        )
        logs = option_log_probs(scores.flatten(0, 1), ladder, reverse)
        return objective.forward_divergence(
            answers[:, bench.prompts.question[rows]].flatten(0, 1), logs
        ).mean()

    best, lowest = None, np.inf
    shape = (groups,) if by_group else ()
    for ridge in ridges:
        change = torch.zeros(*shape, letters, states.shape[-1], device=here, requires_grad=True)
        bias = torch.zeros(*shape, letters, device=here, requires_grad=True)
        optimizer = torch.optim.LBFGS([change, bias], max_iter=60, line_search_fn="strong_wolfe")

        def closure(change=change, bias=bias, optimizer=optimizer, ridge=ridge) -> torch.Tensor:
            optimizer.zero_grad()
            found = loss(Reader(center + change / scale, bias), split["train"])
            found = found + ridge * letters * change.square().mean()
            found.backward()
            return found

        optimizer.step(closure)
        reader = Reader((center + change / scale).detach(), bias.detach())
        with torch.no_grad():
            found = loss(reader, split["validation"]).item()
        if found < lowest:
            best, lowest = reader, found
    if best is None:
        raise ResearchError(
            "the linear reader did not converge at any ridge; check the cached states."
        )
    return best, lowest


def unembedding_of_letters(bench: Bench) -> torch.Tensor:
    """The model's own unembedding rows of the letters, [letters, d], averaged over token variants."""
    rows = bench.upper.unembedding.T[bench.letters.tokens]
    real = bench.letters.real[..., None].to(rows)
    return (rows * real).sum(1) / real.sum(1)
