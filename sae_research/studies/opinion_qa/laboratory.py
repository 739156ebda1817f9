"""The laboratory of study 1: a model at one SAE, a survey and its splits, ready for any method."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from sae_research import catalogue, paths
from sae_research.config import Profile
from sae_research.errors import ResearchError
from sae_research.models import download
from sae_research.studies.opinion_qa import objective
from sae_research.studies.opinion_qa.bench import Bench
from sae_research.studies.opinion_qa.evaluate import Exam
from sae_research.studies.opinion_qa.fit import Targets
from sae_research.studies.opinion_qa.prompts import ENGLISH, SPECIMEN, Dialect, in_chat
from sae_research.studies.opinion_qa.settings import Settings
from sae_research.studies.opinion_qa.shift import (
    Basis,
    pca_basis,
    random_basis,
    residual_basis,
    sae_basis,
    token_basis,
)
from sae_research.surveys.survey import Question, Survey, reliability, sampling_noise

if TYPE_CHECKING:
    from sae_lens import SAE
    from transformers import PreTrainedModel

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Laboratory:
    """One model at one hook with a survey, ready for any method."""

    settings: Settings
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
    families: tuple[str, ...]
    """The family of near-duplicates of every question: a planted question's topic and verb."""
    fresh: Callable[[], "PreTrainedModel"] | None = None
    """Loads the model anew, for rivals that change its weights."""
    crossed: tuple[Survey, ...] = ()
    """Intersections of two attributes, never trained on, where the truth is planted."""

    @property
    def explained(self) -> float:
        """Share of the variance of the survey's residuals that the SAE explains."""
        x = self.bench.block
        with torch.no_grad():
            left = x - self.sae.reconstruct(self.sae.encode(x))
        return float(1 - left.square().sum() / (x - x.mean(0)).square().sum())

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
            case "tokens":
                return token_basis(self.bench.block, self.bench.block_tokens)
        return residual_basis(self.bench.lens.d_model, self.bench.lens.device)


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
            f"{name} is asked Settings, which may not be redistributed: put your own copy (human_resp/ as on CodaLab) "
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
    from sae_research.world.survey.model import SurveySettings
    from sae_research.world.survey.population import Population
    from sae_research.world.survey.prompts import Writer

    settings, subject = profile.opinion_qa, catalogue.get(name)
    lens, truth = subject.load(), Population(SurveySettings().population)
    writer, draws = Writer(truth, lens.tokenizer.get_vocab()), np.random.default_rng([seed, 11])
    texts = {
        split: torch.from_numpy(writer.off_task(settings.documents, draws).tokens)
        for split in SPLITS
    }
    asked = truth.survey()
    names = tuple(f"{q.topic} {q.verb}" for q in asked.questions)
    rows = thinned(asked.questions, names, settings.thinning)
    sae = dictionary(profile, name, role)
    lab = laboratory(
        settings, lens, sae, SPECIMEN, among(asked, rows), [names[i] for i in rows], texts, seed
    )
    pairs = (("party", "age"), ("party", "education"), ("age", "region"), ("education", "region"))
    return replace(
        lab,
        fresh=lambda: AutoModelForCausalLM.from_pretrained(
            build.model_folder(subject.model)
        ).eval(),
        crossed=tuple(among(truth.survey(*pair), rows) for pair in pairs),
    )


def published(
    profile: Profile, name: str, role: str, folder: Path, passages: list[str], seed: int
) -> Laboratory:
    """A real model on the reader's own copy of OpinionQA below `folder`; `passages` are other text, a third a split.

    `seed` draws what is learned from; the split into questions is the same for every seed, so that they share an exam.
    """
    from transformers import AutoModelForCausalLM

    from sae_research.surveys.files import families, load_opinion_qa, split_by_wave

    settings, runtime, subject = profile.opinion_qa, profile.runtime, catalogue.get(name)
    survey = well_polled(load_opinion_qa(folder, settings.waves), settings.fewest)
    names = families(survey.questions, settings.similarity)
    survey = split_by_wave(survey, settings.unseen_waves, names, 0)
    rows = thinned(survey.questions, names, settings.thinning)
    lens = subject.load(device=runtime.device, dtype=runtime.dtype)
    length = min(64, lens.n_ctx)
    tokens = lens.packed(passages, length)
    if len(tokens) < 3:
        raise ResearchError(
            f"passages.txt gives {len(tokens)} rows of {length} tokens and each split needs at least one; add text."
        )
    share = min(settings.documents, len(tokens) // 3)
    texts = dict(zip(SPLITS, tokens[: 3 * share].split(share), strict=True))
    sae, dialect = dictionary(profile, name, role), ENGLISH
    if subject.chat:
        dialect = in_chat(ENGLISH, lens.tokenizer)
    lab = laboratory(
        settings, lens, sae, dialect, among(survey, rows), [names[i] for i in rows], texts, seed
    )

    def fresh() -> "PreTrainedModel":
        folder = download(subject.model)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, runtime.dtype))
        return model.to(runtime.device).eval()

    return replace(lab, fresh=fresh)


def thinned(questions: Sequence[Question], families: Sequence[str], every: int) -> np.ndarray:
    """Rows of every n-th family of each split."""
    kept = set()
    for split in dict.fromkeys(q.split for q in questions):
        kept |= set(
            list(
                dict.fromkeys(
                    f for f, q in zip(families, questions, strict=True) if q.split == split
                )
            )[::every]
        )
    return np.array([i for i, family in enumerate(families) if family in kept])


def among(survey: Survey, rows: np.ndarray) -> Survey:
    """The survey of some of its questions."""
    cut = {
        name: getattr(survey, name)[rows]
        for name in ("overall", "web")
        if getattr(survey, name) is not None
    }
    cut |= {
        n: getattr(survey, n)[:, rows]
        for n in ("distributions", "counts")
        if getattr(survey, n) is not None
    }
    return replace(survey, questions=tuple(survey.questions[i] for i in rows), **cut)


def learned_from(poll: Survey, shrinkage: float) -> Targets:
    """What a poll teaches: its groups' answers, shrunk towards their mean."""
    pooled = np.tensordot(poll.weights, poll.distributions, 1)
    return Targets(
        tuple(g.name for g in poll.groups),
        tuple(g.attribute for g in poll.groups),
        poll.weights,
        objective.shrunk(
            torch.tensor(poll.counts, dtype=torch.float64), torch.tensor(pooled), shrinkage
        ).numpy(),
        pooled,
        poll.rows("train"),
        poll.rows("validation"),
    )


def well_polled(survey: Survey, fewest: int) -> Survey:
    """The survey without groups that gave fewer than `fewest` answers to some question, or that then stand alone."""
    enough = survey.counts.sum(-1).min(1) >= fewest
    attributes = [g.attribute for g in survey.groups]
    left = Counter(a for a, kept in zip(attributes, enough, strict=True) if kept)
    rows = [i for i, kept in enumerate(enough) if kept and left[attributes[i]] > 1]
    if not rows:
        raise ResearchError(
            f"no attribute has two groups with {fewest} answers to every question; lower `fewest`."
        )
    groups = tuple(survey.groups[i] for i in rows)
    return replace(
        survey, groups=groups, distributions=survey.distributions[rows], counts=survey.counts[rows]
    )


def examined(truth: Survey, families: Sequence[str]) -> Exam:
    """The test questions; where the truth is a poll itself, what its sampling noise does to scores is measured."""
    rows = truth.rows("test")
    if truth.counts is None:
        return Exam(truth, rows, families=tuple(families))
    test = among(truth, rows)
    known = reliability(test, 0)
    if not known > 0:
        raise ResearchError(
            f"the groups of this survey differ no more than two halves of one group do (split-half reliability "
            f"{known:.2f}): nothing could be told of following groups; use more respondents or other groups."
        )
    return Exam(truth, rows, known, sampling_noise(test, 0), tuple(families))


def laboratory(
    settings: Settings,
    lens,
    sae,
    dialect: Dialect,
    truth: Survey,
    families: Sequence[str],
    texts: dict[str, torch.Tensor],
    seed: int,
) -> Laboratory:
    """Put model, SAE and survey together; exact distributions are polled first, as groups are never known exactly."""
    from sae_research.saes import check_fit

    poll = truth if truth.counts is not None else truth.sampled(settings.respondents, seed)
    targets = learned_from(poll, settings.shrinkage)
    bench = Bench(lens, check_fit(lens, sae), truth.questions, dialect.plain, texts, settings.rows)
    exam = examined(truth, families)
    return Laboratory(
        settings, bench, sae_basis(sae), dialect, poll, truth, targets, exam, tuple(families)
    )
