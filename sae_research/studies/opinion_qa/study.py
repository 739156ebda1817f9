"""Study 1 from end to end: a model, a survey, every method on the same splits, chosen on validation questions alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from sae_research import catalogue, paths
from sae_research.config import OpinionQA, Profile, ShiftTraining
from sae_research.errors import ResearchError
from sae_research.studies.opinion_qa import baselines, objective
from sae_research.studies.opinion_qa.bench import Bench, Cost
from sae_research.studies.opinion_qa.evaluate import Exam
from sae_research.studies.opinion_qa.fit import Fit, Targets, fit
from sae_research.studies.opinion_qa.prompts import ENGLISH, SPECIMEN, Dialect
from sae_research.studies.opinion_qa.shift import (
    Basis,
    pca_basis,
    random_basis,
    residual_basis,
    sae_basis,
)
from sae_research.survey import Question, Survey

if TYPE_CHECKING:
    from sae_lens import SAE
    from transformers import PreTrainedModel

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
    fresh: Callable[[], "PreTrainedModel"] | None = None
    """Loads the model anew, for rivals that change its weights."""
    crossed: tuple[Survey, ...] = ()
    """Intersections of two attributes, never trained on, where the truth is planted."""

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
        return [cluster(q) for q in self.survey.questions]


def opened(profile: Profile, name: str, seed: int, role: str | None = None) -> Laboratory:
    """The laboratory of a subject at one SAE: a specimen's planted survey, else the reader's own OpinionQA."""
    role = role or profile.opinion_qa.sae
    if catalogue.get(name).embedded:
        return planted(profile, name, role, seed)
    folder = paths.DATA / "private" / "opinion_qa"
    try:
        passages = (folder / "passages.txt").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ResearchError(
            f"{name} is asked OpinionQA, which may not be redistributed: put your own copy (human_resp/ as on CodaLab) "
            f"into {paths.relative(folder)} with passages.txt beside it, other text with one passage a line."
        ) from error
    return published(profile, name, role, folder, passages, seed)


def dictionary(profile: Profile, name: str, role: str | None = None) -> "SAE":
    """The SAE of a subject whose latents are shifted."""
    return catalogue.get(name).sae(role or profile.opinion_qa.sae, device=profile.runtime.device)


def planted(profile: Profile, name: str, role: str, seed: int) -> Laboratory:
    """An embedded specimen with its planted survey; `seed` draws the poll and the documents."""
    from transformers import AutoModelForCausalLM

    from sae_research.world import build
    from sae_research.world.survey import SurveySettings
    from sae_research.world.survey_population import Population
    from sae_research.world.survey_text import Writer

    settings, subject = profile.opinion_qa, catalogue.get(name)
    lens, truth = subject.load(), Population(SurveySettings().population)
    writer, draws = Writer(truth, lens.tokenizer.get_vocab()), np.random.default_rng([seed, 11])
    texts = {split: torch.from_numpy(writer.off_task(settings.documents, draws).tokens) for split in SPLITS}
    asked = thinned(truth.survey(), settings.thinning)
    lab = laboratory(settings, lens, dictionary(profile, name, role), SPECIMEN, asked, texts, seed)
    pairs = (("party", "age"), ("party", "education"), ("age", "region"), ("education", "region"))
    return replace(
        lab,
        fresh=lambda: AutoModelForCausalLM.from_pretrained(build.model_folder(subject.model)).eval(),
        crossed=tuple(thinned(truth.survey(*pair), settings.thinning) for pair in pairs),
    )


def published(profile: Profile, name: str, role: str, folder: Path, passages: list[str], seed: int) -> Laboratory:
    """A real model on the reader's own copy of OpinionQA below `folder`; `passages` are other text, a third a split.

    `seed` draws what is learned from; the split into questions is the same for every seed, so that they share an exam.
    """
    from transformers import AutoModelForCausalLM

    from sae_research.survey_files import load_opinion_qa, split_by_wave

    settings, runtime, subject = profile.opinion_qa, profile.runtime, catalogue.get(name)
    lens = subject.load(device=runtime.device, dtype=runtime.dtype)
    survey = split_by_wave(load_opinion_qa(folder, settings.waves), settings.unseen_waves, 0)
    survey = thinned(survey, settings.thinning)
    tokens = lens.packed(passages, min(64, lens.n_ctx))[: 3 * settings.documents]
    texts = dict(zip(SPLITS, tokens.split(len(tokens) // 3), strict=False))
    lab = laboratory(settings, lens, dictionary(profile, name, role), ENGLISH, survey, texts, seed)
    return replace(lab, fresh=lambda: AutoModelForCausalLM.from_pretrained(subject.model).to(runtime.device).eval())


def cluster(question: Question) -> str:
    """What near-duplicate questions share: a planted question's topic and verb, else the question itself."""
    return f"{question.topic} {question.verb}" if question.verb else question.key


def thinned(survey: Survey, every: int) -> Survey:
    """The survey with every n-th cluster of each split alone."""
    kept = set()
    for split in dict.fromkeys(q.split for q in survey.questions):
        kept |= set(list(dict.fromkeys(cluster(q) for q in survey.questions if q.split == split))[::every])
    rows = np.array([cluster(q) in kept for q in survey.questions])
    cut = {name: getattr(survey, name)[rows] for name in ("overall", "web") if getattr(survey, name) is not None}
    cut |= {n: getattr(survey, n)[:, rows] for n in ("distributions", "counts") if getattr(survey, n) is not None}
    return replace(survey, questions=tuple(q for q, kept in zip(survey.questions, rows, strict=True) if kept), **cut)


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
    coordinates: int = 0
    """Coordinates that any group moves."""
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
        int(shift.active.sum()),
        found,
    )


ARMS: dict[str, tuple[str, dict]] = {
    "SAE multiplicative": ("SAE", {"kind": "multiplicative"}),
    "SAE gated": ("SAE", {"kind": "gated"}),
    "SAE additive": ("SAE", {"kind": "additive"}),
    "random multiplicative": ("random", {"kind": "multiplicative"}),
    "random gated": ("random", {"kind": "gated"}),
    "random additive": ("random", {"kind": "additive"}),
    "PCA multiplicative": ("PCA", {"kind": "multiplicative"}),
    "PCA gated": ("PCA", {"kind": "gated"}),
    "PCA additive": ("PCA", {"kind": "additive"}),
    "dense vector, low rank": ("dense", {"kind": "additive"}),
    "dense vector, free": ("dense", {"kind": "additive", "rank": None}),
    "SAE literal": ("SAE", {"kind": "literal"}),
    "SAE free": ("SAE", {"rank": None}),
}
"""Trained shifts: the space they act in and how they depart from the headline; all choose keep and sparsity alike."""


def arms(lab: Laboratory, seed: int) -> dict[str, ShiftTraining]:
    """The settings of every arm, keep and sparsity chosen on validation questions and documents."""
    s = lab.settings
    return {
        name: choose(lab, lab.basis(space, seed), replace(s.training, **changes), seed, s.keeps, s.sparsities)
        for name, (space, changes) in ARMS.items()
    }


def choose(
    lab: Laboratory,
    basis: Basis,
    training: ShiftTraining,
    seed: int,
    keeps: Sequence[float],
    sparsities: Sequence[float],
) -> ShiftTraining:
    """lam_keep and lam_sp by validation: harmless to other text, then the sparsest within one s.e. of the best KL."""
    if len(keeps) == len(sparsities) == 1:
        return replace(training, keep=keeps[0], sparsity=sparsities[0])
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
