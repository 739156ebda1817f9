"""What the shift is judged against: fixed tables, calibration, prompts, readers, untrained directions, LoRA."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from sae_research.errors import ResearchError
from sae_research.studies.opinion_qa import baselines, lora
from sae_research.studies.opinion_qa.bench import Bench, Cost, prompts
from sae_research.studies.opinion_qa.fit import Fit, calibrate, fit
from sae_research.studies.opinion_qa.laboratory import Laboratory
from sae_research.studies.opinion_qa.letters import Letters, Reading, most_options, refusal_share
from sae_research.studies.opinion_qa.settings import ShiftTraining
from sae_research.studies.opinion_qa.shift import Basis
from sae_research.studies.opinion_qa.study import NO_COST, UNKNOWN_COST, Outcome, shifted


def lora_rows(lab: Laboratory, asked: baselines.Prompted, seed: int) -> list[Outcome]:
    """SubPOP's adapters: one for all groups, who are told apart by their prompts, and one a group without any."""
    if lab.fresh is None:
        raise ResearchError(
            "LoRA changes weights: give the laboratory `fresh`, which loads the model anew."
        )
    bench, targets, training, exam = lab.bench, lab.targets, lab.settings.lora, lab.exam.questions
    told = lora.train(
        lab.fresh, bench, asked.prompts, targets.answers, targets, training, seed, exam
    )
    found = [
        Outcome("LoRA, group prompt", told.answers, told.cost, told.parameters, order=told.order)
    ]
    if lab.settings.adapters:
        own = [
            lora.train(
                lab.fresh,
                bench,
                [bench.prompts],
                targets.answers[[g]],
                targets,
                training,
                seed,
                exam,
            )
            for g in range(len(targets.groups))
        ]
        cost = Cost(
            *(float(np.mean([getattr(o.cost, f) for o in own])) for f in ("loss", "divergence"))
        )
        answers = np.concatenate([o.answers for o in own])
        order = float(np.mean([o.order for o in own]))
        found.append(
            Outcome("LoRA, one a group", answers, cost, sum(o.parameters for o in own), order=order)
        )
    return found


def refusals(bench: Bench, refusing: Callable) -> np.ndarray:
    """R_M of every question when refusing is offered too, both orders averaged: reported apart, never a part of D."""
    letters = Letters(bench.lens.tokenizer, most_options(bench.questions) + 1)
    asked = prompts(bench.lens, bench.questions, refusing)
    with torch.no_grad():
        logits = torch.cat(
            [
                bench.upper.logits(
                    bench.upper.states(bench.residuals(asked.tokens[part]), asked.last[part])
                )
                for part in torch.arange(len(asked.tokens)).split(bench.batch)
            ]
        )
    mass = letters.scores(logits).softmax(-1)  # the last letter that is offered is the refusal's
    ladder = asked.ladder[:, None]
    answered = mass.masked_fill(torch.arange(mass.shape[1], device=mass.device) >= ladder, 0.0).sum(
        1
    )
    share = refusal_share(
        *(m.double().cpu().numpy() for m in (answered, mass.gather(1, ladder)[:, 0]))
    )
    return share.reshape(2, -1).mean(0)


def fixed_rows(lab: Laboratory) -> list[Outcome]:
    """Uniform, no steering, and the human overall marginal (an oracle row, not a competitor)."""
    questions, groups = lab.exam.questions, len(lab.targets.groups)
    unsteered = lab.bench.unsteered(questions)
    tables = {
        "uniform": lab.truth.uniform[questions],
        "no steering": unsteered.probabilities[0],
        "human overall marginal": lab.truth.overall[questions],
    }
    found = [
        Outcome(name, np.repeat(table[None], groups, 0), NO_COST, 0)
        for name, table in tables.items()
    ]
    mass, order = float(unsteered.mass.mean()), float(unsteered.order_sensitivity.mean())
    return [found[0], replace(found[1], mass=mass, order=order), found[2]]


def calibration_rows(lab: Laboratory, training: ShiftTraining, seed: int) -> list[Outcome]:
    """What the population's answers alone give: Delta_0 without a group part, and temperature with letter bias."""
    bench, targets, questions = lab.bench, lab.targets, lab.exam.questions
    shared = calibrate(bench, lab.sae, training, targets, seed)
    groups = len(targets.groups)
    reading = bench.answers(lab.sae, training.kind, shared[None], questions, training.positions)
    cost = (
        bench.cost(lab.sae, training.kind, shared[None], "test")
        if training.positions == "all"
        else NO_COST
    )
    moved = (shared != 0).float().mean().item()
    alone = Outcome(
        "calibration only",
        np.repeat(reading.probabilities, groups, 0),
        cost,
        int((shared != 0).sum()),
        moved,
        float(reading.mass.mean()),
        float(reading.order_sensitivity.mean()),
    )
    scores = baselines.letter_scores(bench, bench.residual, bench.prompts.last)
    rows, test = bench.prompts.rows(targets.train), bench.prompts.rows(questions)
    overall = torch.tensor(targets.overall, dtype=torch.float32, device=scores.device)
    target = overall[bench.prompts.question[rows]]
    letters = baselines.calibrate_letters(bench, scores[rows], rows, target)
    read = baselines.read_scores(bench, letters(scores[test])[None], test)
    bias = _read("temperature and letter bias", read, letters.parameters)
    return [alone, replace(bias, answers=np.repeat(bias.answers, groups, 0))]


def _read(name: str, read: Reading, parameters: int) -> Outcome:
    """A method that leaves the model as it is and reads letters otherwise, or asks otherwise."""
    return Outcome(
        name, read.probabilities, NO_COST, parameters, order=float(read.order_sensitivity.mean())
    )


def prompting_rows(lab: Laboratory, forms: dict[str, baselines.Prompted]) -> list[Outcome]:
    """Each form of group prompt, alone and with temperature and letter bias fitted on the training questions."""
    bench, targets, test = lab.bench, lab.targets, lab.bench.prompts.rows(lab.exam.questions)
    train = bench.prompts.rows(targets.train)
    best = baselines.best_form(bench, forms, targets)
    found = []
    for form, asked in forms.items():
        chosen = f"prompt {form}" + (" (best on validation)" if form == best else "")
        found.append(_read(chosen, baselines.read_scores(bench, asked.scores[:, test], test), 0))
        rows, scores = train.repeat(len(asked.scores)), asked.scores[:, train].flatten(0, 1)
        answers = torch.tensor(targets.answers, dtype=torch.float32, device=scores.device)
        target = answers[:, bench.prompts.question[train]].flatten(0, 1)
        letters = baselines.calibrate_letters(bench, scores, rows, target)
        read = baselines.read_scores(bench, letters(asked.scores[:, test]), test)
        found.append(_read(f"prompt {form}, calibrated letters", read, letters.parameters))
    return found


def reader_rows(lab: Laboratory, asked: baselines.Prompted) -> list[Outcome]:
    """Letters-only unembedding, with and without group prompts; what it costs other text is not measured."""
    bench, targets = lab.bench, lab.targets
    test, groups = bench.prompts.rows(lab.exam.questions), len(targets.groups)
    rows = baselines.unembedding_of_letters(bench)
    with torch.no_grad():
        parts = zip(
            bench.residual.split(bench.batch), bench.prompts.last.split(bench.batch), strict=True
        )
        plain = torch.cat([bench.upper.states(x, last).float() for x, last in parts])
    unprompted = plain.expand(groups, *plain.shape)
    readers = {
        "letters' unembedding, one a group": (unprompted, True),
        "letters' unembedding, prompted": (asked.final, False),
    }
    found = []
    for name, (states, by_group) in readers.items():
        reader, _ = baselines.linear_reader(bench, states, targets, rows, by_group)
        read = baselines.read_scores(bench, reader(states[:, test]), test)
        found.append(replace(_read(name, read, reader.parameters), cost=UNKNOWN_COST))
    return found


def probe(lab: Laboratory, asked: baselines.Prompted) -> tuple[float, Outcome]:
    """The multinomial probe on the prompted residual of this layer, with its loss on validation questions."""
    bench, test = lab.bench, lab.bench.prompts.rows(lab.exam.questions)
    reader, loss = baselines.linear_reader(bench, asked.hidden, lab.targets)
    read = baselines.read_scores(bench, reader(asked.hidden[:, test]), test)
    below = bench.lens.depth(bench.hook)
    return loss, _read(f"multinomial probe, prompted (block {below - 1})", read, reader.parameters)


def untrained_rows(
    lab: Laboratory, asked: baselines.Prompted, shared: Callable[[Basis], torch.Tensor]
) -> list[Outcome]:
    """Difference of means and the SAE's most selective latents, untrained, at the strength that validation prefers.

    Both start from a Delta_0 that was trained on the population's answers, so that only the group part is untrained.
    """
    bench, targets, positions = lab.bench, lab.targets, lab.settings.training.positions
    dense = lab.basis("dense", 0)
    contrast, statistic = baselines.latent_contrasts(asked, targets)
    parts = {
        "difference of means, calibrated": (dense, baselines.difference_of_means(asked, targets)),
        "top 20 SAE latents, calibrated": (
            lab.sae,
            baselines.top_features(contrast, statistic, 20),
        ),
    }
    found = []
    for name, (basis, part) in parts.items():
        shift = baselines.untrained("additive", bench, positions, targets, shared(basis), part)
        strength, best = baselines.best_strength(bench, basis, shift, targets)
        judged = shifted(lab, name, basis, Fit(best, float("nan"), ()))
        found.append(replace(judged, strength=strength))
    return found


def screened(
    lab: Laboratory, asked: baselines.Prompted, training: ShiftTraining, seed: int, k: int = 128
) -> Outcome:
    """SAE-SSV: a trained additive shift within the `k` latents that tell prompted groups apart best."""
    _, statistic = baselines.latent_contrasts(asked, lab.targets)
    keep = statistic.topk(min(k, lab.sae.size)).indices
    basis = baselines.restricted(lab.sae, keep, "screened latents")
    found = fit(lab.bench, basis, replace(training, kind="additive", rank=None), lab.targets, seed)
    outcome = shifted(lab, "screened SAE latents (SAE-SSV)", basis, found)
    return replace(outcome, moved=outcome.moved * len(keep) / lab.sae.size)
