"""A model at one SAE, a survey and its splits, ready for any method."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from sae_research import bases, catalogue, paths, store
from sae_research.bases import Basis
from sae_research.config import Profile
from sae_research.errors import ResearchError
from sae_research.hub import download
from sae_research.models import LanguageModel
from sae_research.saes import check_fit, warn_if_wrong
from sae_research.shifts import FittedShift, Shift
from sae_research.studies.opinion_qa.fit import train_shift
from sae_research.studies.opinion_qa.settings import Settings, ShiftTraining
from sae_research.surveys.cached import SPLITS, CachedPrompts, split_passages
from sae_research.surveys.group_prompts import GroupPrompts, run_group_prompts
from sae_research.surveys.prompts import (
    ENGLISH_TEMPLATE,
    TOY_TEMPLATE,
    PromptTemplate,
    find_template,
    use_chat_template,
)
from sae_research.surveys.scores import EvalSet, make_eval_set
from sae_research.surveys.selection import drop_small_groups, select_questions, thin_questions
from sae_research.surveys.survey import Survey
from sae_research.surveys.targets import Targets, make_targets

if TYPE_CHECKING:
    from sae_lens import SAE
    from transformers import PreTrainedModel


def opinion_qa_folder() -> Path:
    """Where a reader puts OpinionQA, which may not be redistributed; git ignores it."""
    return paths.ROOT / Settings.READERS_DATA


@dataclass(frozen=True)
class Experiment:
    """One model at one hook with a survey, ready for any method."""

    settings: Settings
    cache: CachedPrompts
    sae: Basis
    """The SAE's latents."""
    template: PromptTemplate
    """How the survey is put to the model."""
    survey: Survey
    """What is known of the groups: a poll."""
    truth: Survey
    """What methods are judged on: exact answers where they are planted, else the poll."""
    targets: Targets
    """What a shift learns from the poll."""
    eval_set: EvalSet
    """The test questions."""
    clusters: tuple[str, ...]
    """The cluster of near-duplicates of every question: a planted question's topic and verb."""
    load_fresh: "Callable[[], PreTrainedModel] | None" = None
    """Loads the model anew, for baselines that change its weights."""
    intersections: tuple[Survey, ...] = ()
    """Intersections of two attributes, never trained on, where the truth is planted."""

    @property
    def explained(self) -> float:
        """Share of the variance of the survey's residuals that the SAE explains."""
        x = self.cache.survey_residuals
        with torch.no_grad():
            left = x - self.sae.reconstruct(self.sae.encode(x))
        return float(1 - left.square().sum() / (x - x.mean(0)).square().sum())

    @property
    def l0(self) -> float:
        """Mean number of the SAE's latents that are active on a token of the survey."""
        with torch.no_grad():
            acts = self.sae.encode(self.cache.survey_residuals)
        return float((acts != 0).float().sum(-1).mean())

    def answer(
        self, shift: Shift, deltas: torch.Tensor, questions: np.ndarray | None = None
    ) -> np.ndarray:
        """Answers to the test, or other, questions under `deltas` of latents, applied as `shift`.

        They are [deltas, questions, options].
        """
        asked = self.eval_set.questions if questions is None else questions
        return self.cache.measure_answers(
            self.sae, shift.kind, deltas, asked, shift.positions
        ).probabilities

    def group_prompts(self, form: str = "BIO") -> GroupPrompts:
        """The survey put to every group in one form, with block means over training questions."""
        train = self.targets.train
        return run_group_prompts(
            self.cache, self.sae, self.template, self.survey.groups, train, form
        )

    def basis(self, space: str, seed: int) -> Basis:
        """A space to shift in: the SAE, or what takes its place in a control."""
        residuals = self.cache.survey_residuals
        match space:
            case "SAE":
                return self.sae
            case "random":
                return bases.random_basis(residuals, self.sae.size, self.l0, seed)
            case "PCA":
                return bases.pca_basis(residuals)
            case "tokens":
                return bases.token_basis(residuals, self.cache.survey_tokens)
        return bases.residual_basis(self.cache.model.d_model, self.cache.model.device)


_last: dict[str, Experiment] = {}


def load_experiment(profile: Profile, name: str, seed: int, role: str | None = None) -> Experiment:
    """The experiment of a model at one SAE: a toy model's survey, else the reader's OpinionQA.

    The last one stays loaded, since the tasks of a process often share it.
    """
    role = role or profile.opinion_qa.sae
    runtime = profile.runtime
    about = [asdict(profile.opinion_qa), runtime.device, runtime.dtype, name, seed, role]
    key = store.fingerprint([*about, opinion_qa_folder()])
    if key not in _last:
        embedded = catalogue.get(name).embedded
        load = load_toy_experiment if embedded else load_opinion_qa_experiment
        loaded = load(profile, name, role, seed)
        _last.clear()
        _last[key] = loaded
    return _last[key]


def load_toy_experiment(profile: Profile, name: str, role: str, seed: int) -> Experiment:
    """A toy model with its planted survey; `seed` draws the poll and the documents."""
    from transformers import AutoModelForCausalLM

    from sae_research.world import build
    from sae_research.world.survey.model import SurveySettings
    from sae_research.world.survey.population import Population
    from sae_research.world.survey.prompts import Writer

    settings = profile.opinion_qa
    spec = catalogue.get(name)
    model = spec.load()
    population = Population(SurveySettings().population)
    writer = Writer(population, model.tokenizer.get_vocab())
    draws = np.random.default_rng([seed, 11])
    texts = {
        split: torch.from_numpy(writer.write_off_task(settings.n_documents, draws).tokens)
        for split in SPLITS
    }
    survey = population.survey()
    clusters = tuple(f"{q.topic} {q.verb}" for q in survey.questions)
    pairs = (("party", "age"), ("party", "education"), ("age", "region"), ("education", "region"))
    folder = build.model_folder(spec.model)
    return make_experiment(
        settings,
        model,
        spec.sae(role, device=profile.runtime.device),
        TOY_TEMPLATE,
        survey,
        clusters,
        texts,
        seed,
        load_fresh=lambda: AutoModelForCausalLM.from_pretrained(folder).eval(),
        intersections=[population.survey(*pair) for pair in pairs],
    )


def load_opinion_qa_experiment(profile: Profile, name: str, role: str, seed: int) -> Experiment:
    """A real model on the reader's own copy of OpinionQA, with other text beside it.

    `seed` draws what is learned from. The split of the questions is the same for every seed, so
    that they share their test questions.
    """
    from transformers import AutoModelForCausalLM

    from sae_research.surveys.published import load_opinion_qa
    from sae_research.surveys.splits import find_families, split_by_topic

    folder = opinion_qa_folder()
    try:
        passages = (folder / "passages.txt").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ResearchError(
            f"{name} is asked OpinionQA, which may not be redistributed: put your own copy "
            f"(human_resp/ as on CodaLab) into {paths.relative(folder)} with passages.txt "
            "beside it, other text with one passage per line."
        ) from error
    settings = profile.opinion_qa
    runtime = profile.runtime
    spec = catalogue.get(name)
    survey = drop_small_groups(load_opinion_qa(folder, settings.waves), settings.min_responses)
    clusters = find_families(survey.questions, settings.similarity)
    unseen = [f"wave {wave}" for wave in settings.unseen_waves]
    survey = split_by_topic(survey, unseen, clusters, 0)
    model = spec.load(device=runtime.device, dtype=runtime.dtype)

    def load_fresh() -> "PreTrainedModel":
        dtype = getattr(torch, runtime.dtype)
        fresh = AutoModelForCausalLM.from_pretrained(download(spec.model), dtype=dtype)
        return fresh.to(runtime.device).eval()

    return make_experiment(
        settings,
        model,
        spec.sae(role, device=runtime.device),
        use_chat_template(ENGLISH_TEMPLATE, model.tokenizer) if spec.chat else ENGLISH_TEMPLATE,
        survey,
        clusters,
        split_passages(model, passages, settings.n_documents),
        seed,
        load_fresh,
    )


def make_experiment(
    settings: Settings,
    model: LanguageModel,
    sae: "SAE",
    template: PromptTemplate,
    truth: Survey,
    clusters: Sequence[str],
    texts: dict[str, torch.Tensor],
    seed: int,
    load_fresh: "Callable[[], PreTrainedModel] | None" = None,
    intersections: Sequence[Survey] = (),
) -> Experiment:
    """Put model, SAE and survey together; exact answers are polled first: none are ever known."""
    rows = thin_questions(truth.questions, clusters, settings.every_nth_cluster)
    truth = select_questions(truth, rows)
    clusters = tuple(clusters[i] for i in rows)
    poll = truth if truth.counts is not None else truth.sampled(settings.respondents, seed)
    batch = settings.max_rows_per_forward
    hook = check_fit(model, sae)
    return Experiment(
        settings,
        CachedPrompts(model, hook, truth.questions, template.plain, texts, batch),
        bases.sae_basis(sae),
        template,
        poll,
        truth,
        make_targets(poll, settings.shrinkage),
        make_eval_set(truth, clusters),
        clusters,
        load_fresh,
        tuple(select_questions(survey, rows) for survey in intersections),
    )


def fit_shift(
    model: LanguageModel,
    sae: "SAE",
    survey: Survey,
    texts: Sequence[str] | None = None,
    *,
    training: ShiftTraining | None = None,
    template: str = "english",
    shrinkage: float = 20.0,
    max_rows_per_forward: int = 48,
    seed: int = 0,
) -> FittedShift:
    """Train a shift for every group of a survey of your own, with your own model and SAE.

    The survey needs a train and a validation split (`survey.split(seed)` makes them). On `texts`,
    by default text that the model writes itself, the shift is kept from changing other behaviour.
    """
    for split in ("train", "validation"):
        if not len(survey.rows(split)):
            raise ResearchError(
                f"no question of the survey is in the {split} split; "
                "make splits with `survey.split(seed)`."
            )
    warn_if_wrong(model, sae)
    if survey.counts is None:
        survey = survey.sampled(1000, seed)
    if texts is None:
        third = len(model.sample) // 3
        parts = dict(zip(SPLITS, model.sample.split(third), strict=False))
    else:
        parts = split_passages(model, texts, 64)
    write = find_template(template, model.tokenizer).plain
    hook = check_fit(model, sae)
    cache = CachedPrompts(model, hook, survey.questions, write, parts, max_rows_per_forward)
    targets = make_targets(survey, shrinkage)
    shift = train_shift(cache, bases.sae_basis(sae), training or ShiftTraining(), targets, seed)
    return FittedShift(shift, model, sae, template)
