"""Study 1 from end to end: a model, a survey, every method on the same splits, chosen on validation questions alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from sae_research.catalogue import SUBJECTS
from sae_research.config import OpinionQA, Profile, ShiftTraining
from sae_research.studies.opinion_qa import baselines, objective
from sae_research.studies.opinion_qa.bench import Bench, Cost
from sae_research.studies.opinion_qa.evaluate import Exam
from sae_research.studies.opinion_qa.fit import Fit, Targets, calibrate, fit
from sae_research.studies.opinion_qa.prompts import ENGLISH, SPECIMEN, Dialect
from sae_research.studies.opinion_qa.shift import (
    Basis,
    pca_basis,
    random_basis,
    residual_basis,
    sae_basis,
)
from sae_research.survey import Survey

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Laboratory:
    """One model at one hook with a survey, ready for any method."""

    settings: OpinionQA
    """The study's settings."""
    bench: Bench
    """Cached prompts and texts."""
    sae: Basis
    """The SAE's latents."""
    dialect: Dialect
    """How the survey is put to the model."""
    survey: Survey
    """What is known of the groups: a poll."""
    truth: Survey
    """What methods are judged on: exact answers where they are planted, else the poll."""
    targets: Targets
    """What a shift learns from the poll."""
    exam: Exam
    """The test questions."""

    @property
    def l0(self) -> float:
        """Mean number of the SAE's latents that are active on a token of the survey."""
        with torch.no_grad():
            return float((self.sae.encode(self.bench.block) != 0).float().sum(-1).mean())

    def basis(self, name: str, seed: int) -> Basis:
        """A space to shift in: the SAE, or what takes its place in a control."""
        match name:
            case "SAE":
                return self.sae
            case "random":
                return random_basis(self.bench.block, self.sae.size, self.l0, seed)
            case "PCA":
                return pca_basis(self.bench.block)
        return residual_basis(self.bench.lens.d_model)

    def clusters(self) -> list[str]:
        """The near-duplicate cluster of every question."""
        return [f"{q.topic} {q.verb}" if q.verb else q.key for q in self.survey.questions]


def planted(profile: Profile, role: str, seed: int) -> Laboratory:
    """The embedded specimen with its planted survey; `seed` draws the poll and the documents."""
    from sae_research.world.survey import SurveySettings
    from sae_research.world.survey_population import Population
    from sae_research.world.survey_text import Writer

    settings = profile.opinion_qa
    subject = SUBJECTS["world-survey"]
    lens = subject.load()
    truth = Population(SurveySettings().population)
    writer, draws = Writer(truth, lens.tokenizer.get_vocab()), np.random.default_rng([seed, 11])
    texts = {split: torch.from_numpy(writer.off_task(settings.documents, draws).tokens) for split in SPLITS}
    return laboratory(settings, lens, subject.sae(role), SPECIMEN, truth.survey(), texts, seed)


def published(profile: Profile, name: str, folder: Path, passages: list[str], seed: int) -> Laboratory:
    """A real model on the reader's own copy of OpinionQA below `folder`; `passages` are other text, a third a split."""
    from sae_research.survey_files import load_opinion_qa, split_by_wave

    settings, runtime, subject = profile.opinion_qa, profile.runtime, SUBJECTS[name]
    lens = subject.load(device=runtime.device, dtype=runtime.dtype)
    survey = split_by_wave(load_opinion_qa(folder, settings.waves), settings.unseen_waves, seed)
    tokens = lens.packed(passages, min(64, lens.n_ctx))[: 3 * settings.documents]
    texts = dict(zip(SPLITS, tokens.split(len(tokens) // 3), strict=False))
    sae = subject.sae(settings.sae, device=runtime.device)
    return laboratory(settings, lens, sae, ENGLISH, survey, texts, seed)


def laboratory(
    settings: OpinionQA, lens, sae, dialect: Dialect, truth: Survey, texts: dict[str, torch.Tensor], seed: int
) -> Laboratory:
    """Put model, SAE and survey together; exact distributions are polled first, as groups are never known exactly."""
    from sae_research.dictionaries import check_fit

    poll = truth if truth.counts is not None else truth.sampled(settings.respondents, seed)
    counts = torch.tensor(poll.counts, dtype=torch.float64)
    pooled = np.tensordot(truth.weights, poll.distributions, 1)
    targets = Targets(
        tuple(g.name for g in truth.groups),
        tuple(g.attribute for g in truth.groups),
        truth.weights,
        objective.shrunk(counts, torch.tensor(pooled), settings.shrinkage).numpy(),
        pooled,
        truth.rows("train"),
        truth.rows("validation"),
    )
    bench = Bench(lens, check_fit(lens, sae), truth.questions, dialect.block, texts)
    return Laboratory(settings, bench, sae_basis(sae), dialect, poll, truth, targets, Exam(truth, truth.rows("test")))


@dataclass(frozen=True)
class Outcome:
    """What one method achieves."""

    name: str
    """The method."""
    answers: np.ndarray
    """Answers of every group to the test questions, [groups, questions, options]."""
    cost: Cost
    """What it does to other text when it is always on."""
    parameters: int
    """Numbers trained, zeros not counted."""
    moved: float = 1.0
    """Share of coordinates that any group moves."""
    mass: float = 1.0
    """Mean probability of the letters among all tokens."""
    order: float = 0.0
    """Mean total variation between the two option orders."""
    fit: Fit | None = None
    """The trained shift."""


NO_COST = Cost(0.0, 0.0)


def shifted(lab: Laboratory, name: str, basis: Basis, found: Fit) -> Outcome:
    """Judge a trained shift on the test questions and test documents."""
    shift = found.shift
    reading = lab.bench.answers(basis, shift.kind, shift.deltas, lab.exam.questions, shift.positions)
    cost = NO_COST
    if shift.positions == "all":
        cost = lab.bench.cost(basis, shift.kind, shift.deltas, "test")
    return Outcome(
        name,
        reading.probabilities,
        cost,
        shift.parameters,
        float(shift.active.float().mean()),
        float(reading.mass.mean()),
        float(reading.order_sensitivity.mean()),
        found,
    )


ARMS: dict[str, tuple[str, dict]] = {
    "SAE multiplicative": ("SAE", {}),
    "SAE additive": ("SAE", {"kind": "additive"}),
    "SAE gated": ("SAE", {"kind": "gated"}),
    "SAE literal": ("SAE", {"kind": "literal"}),
    "SAE multiplicative, free": ("SAE", {"rank": None}),
    "random dictionary multiplicative": ("random", {}),
    "PCA multiplicative": ("PCA", {}),
    "dense vector, low rank": ("dense", {"kind": "additive"}),
    "dense vector, free": ("dense", {"kind": "additive", "rank": None}),
}
"""Trained shifts: the space they act in and how they depart from the headline; all choose keep and sparsity alike."""


def choose(
    lab: Laboratory,
    basis: Basis,
    training: ShiftTraining,
    seed: int,
    keeps: Sequence[float],
    sparsities: Sequence[float],
) -> ShiftTraining:
    """lam_keep and lam_sp by validation: harmless to other text, then the sparsest within one s.e. of the best KL."""
    tried = []
    for keep in keeps:
        base = replace(training, keep=keep)
        for sparsity in sparsities:
            candidate = replace(base, sparsity=sparsity)
            found = fit(lab.bench, basis, candidate, lab.targets, seed)
            harm = 0.0
            if training.positions == "all":
                harm = lab.bench.cost(basis, training.kind, found.shift.deltas, "validation").loss
            loss = validation_loss(lab, basis, found)
            tried.append(
                (candidate, harm, loss.mean(), loss.std(ddof=1) / len(loss) ** 0.5, found.shift.active.sum().item())
            )
    harmless = [t for t in tried if t[1] <= lab.settings.harm] or [min(tried, key=lambda t: t[1])]
    best = min(harmless, key=lambda t: t[2])
    close = [t for t in harmless if t[2] <= best[2] + best[3]]
    return min(close, key=lambda t: (t[4], t[2]))[0]


def validation_loss(lab: Laboratory, basis: Basis, found: Fit) -> np.ndarray:
    """Mean KL of each cluster of validation questions."""
    from sae_research.stats import cluster_means
    from sae_research.survey import divergence

    shift, rows = found.shift, lab.targets.validation
    answers = lab.bench.answers(basis, shift.kind, shift.deltas, rows, shift.positions).probabilities
    loss = divergence(lab.targets.answers[:, rows], answers).mean(0)
    clusters = lab.clusters()
    return cluster_means(loss, [clusters[i] for i in rows])


def trained(lab: Laboratory, name: str, training: ShiftTraining, seed: int) -> Outcome:
    """Train and judge one of `ARMS` with settings that were chosen before."""
    basis = lab.basis(ARMS[name][0], seed)
    return shifted(lab, name, basis, fit(lab.bench, basis, training, lab.targets, seed))


def shuffled(lab: Laboratory, training: ShiftTraining, seed: int) -> Outcome:
    """The headline shift trained on groups that were permuted within each cluster of questions."""
    targets = baselines.groups_shuffled(lab.targets, lab.clusters(), seed)
    return shifted(lab, "shuffled groups", lab.sae, fit(lab.bench, lab.sae, training, targets, seed))


def fixed_rows(lab: Laboratory) -> list[Outcome]:
    """Uniform, no steering, and the human overall marginal (an oracle row, not a competitor)."""
    questions, groups = lab.exam.questions, len(lab.targets.groups)
    unsteered = lab.bench.unsteered(questions)
    tables = {
        "uniform": lab.truth.uniform[questions],
        "no steering": unsteered.probabilities[0],
        "human overall marginal": lab.truth.overall[questions],
    }
    found = [Outcome(name, np.repeat(table[None], groups, 0), NO_COST, 0, 0.0) for name, table in tables.items()]
    mass, order = float(unsteered.mass.mean()), float(unsteered.order_sensitivity.mean())
    return [found[0], replace(found[1], mass=mass, order=order), found[2]]


def calibration_rows(lab: Laboratory, training: ShiftTraining, seed: int) -> list[Outcome]:
    """What the population's answers alone give: Delta_0 without a group part, and temperature with letter bias."""
    bench, targets, questions = lab.bench, lab.targets, lab.exam.questions
    shared = calibrate(bench, lab.sae, training, targets, seed)
    groups = len(targets.groups)
    reading = bench.answers(lab.sae, training.kind, shared[None], questions, training.positions)
    cost = bench.cost(lab.sae, training.kind, shared[None], "test") if training.positions == "all" else NO_COST
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
    target = torch.tensor(targets.overall, dtype=torch.float32)[bench.prompts.question[rows]]
    letters = baselines.calibrate_letters(bench, scores[rows], rows, target)
    answers = baselines.read_scores(bench, letters(scores[test])[None], test)
    bias = Outcome("temperature and letter bias", np.repeat(answers, groups, 0), NO_COST, letters.parameters)
    return [alone, bias]


def prompting_rows(lab: Laboratory, forms: dict[str, baselines.Prompted]) -> list[Outcome]:
    """Each form of group prompt, alone and with temperature and letter bias fitted on the training questions."""
    bench, targets, test = lab.bench, lab.targets, lab.bench.prompts.rows(lab.exam.questions)
    train = bench.prompts.rows(targets.train)
    best = baselines.best_form(bench, forms, targets)
    found = []
    for form, asked in forms.items():
        chosen = f"prompt {form}" + (" (best on validation)" if form == best else "")
        found.append(Outcome(chosen, baselines.read_scores(bench, asked.scores[:, test], test), NO_COST, 0, 0.0))
        rows, scores = train.repeat(len(asked.scores)), asked.scores[:, train].flatten(0, 1)
        answers = torch.tensor(targets.answers, dtype=torch.float32)
        target = answers[:, bench.prompts.question[train]].flatten(0, 1)
        letters = baselines.calibrate_letters(bench, scores, rows, target)
        read = baselines.read_scores(bench, letters(asked.scores[:, test]), test)
        found.append(Outcome(f"prompt {form}, calibrated letters", read, NO_COST, letters.parameters))
    return found


def reader_rows(lab: Laboratory, asked: baselines.Prompted) -> list[Outcome]:
    """Letters-only unembedding, with and without group prompts, and the multinomial probe on the prompted residual."""
    bench, targets = lab.bench, lab.targets
    test, groups = bench.prompts.rows(lab.exam.questions), len(targets.groups)
    rows = baselines.unembedding_of_letters(bench)
    with torch.no_grad():
        parts = zip(bench.residual.split(bench.batch), bench.prompts.last.split(bench.batch), strict=True)
        plain = torch.cat([bench.upper.states(x, last) for x, last in parts])
    unprompted = plain.expand(groups, *plain.shape)
    readers = {
        "letters' unembedding, one a group": (unprompted, rows, True),
        "letters' unembedding, prompted": (asked.final, rows, False),
        "multinomial probe, prompted": (asked.hidden, None, False),
    }
    found = []
    for name, (states, start, by_group) in readers.items():
        reader = baselines.linear_reader(bench, states, targets, start, by_group)
        read = baselines.read_scores(bench, reader(states[:, test]), test)
        found.append(Outcome(name, read, NO_COST, reader.parameters))
    return found


def untrained_rows(
    lab: Laboratory, asked: baselines.Prompted, shared: Callable[[Basis], torch.Tensor]
) -> list[Outcome]:
    """Difference of means and the SAE's most selective latents, untrained, at the strength that validation prefers."""
    bench, targets, positions = lab.bench, lab.targets, lab.settings.training.positions
    dense = residual_basis(bench.lens.d_model)
    contrast, statistic = baselines.latent_contrasts(bench, lab.sae, asked, targets)
    parts = {
        "difference of means": (dense, baselines.difference_of_means(asked, targets)),
        "top 20 SAE latents, untrained": (lab.sae, baselines.top_features(contrast, statistic, 20)),
    }
    found = []
    for name, (basis, part) in parts.items():
        shift = baselines.untrained("additive", bench, positions, targets, shared(basis), part)
        _, best = baselines.best_strength(bench, basis, shift, targets, lab.settings.strengths)
        found.append(shifted(lab, name, basis, Fit(best, float("nan"), ())))
    return found


def screened(lab: Laboratory, asked: baselines.Prompted, training: ShiftTraining, seed: int, k: int = 128) -> Outcome:
    """SAE-SSV: a trained additive shift within the `k` latents that tell prompted groups apart best."""
    _, statistic = baselines.latent_contrasts(lab.bench, lab.sae, asked, lab.targets)
    keep = statistic.topk(min(k, lab.sae.size)).indices
    basis = baselines.restricted(lab.sae, keep, "screened latents")
    found = fit(lab.bench, basis, replace(training, kind="additive", rank=None), lab.targets, seed)
    outcome = shifted(lab, "screened SAE latents (SAE-SSV)", basis, found)
    return replace(outcome, moved=outcome.moved * len(keep) / lab.sae.size)
