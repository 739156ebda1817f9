"""A model at one SAE, a survey and its splits, ready for any method."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from sae_research import catalogue, paths, store
from sae_research.config import Profile
from sae_research.errors import ResearchError
from sae_research.hub import download
from sae_research.models import LanguageModel
from sae_research.studies.opinion_qa.cache import CachedPrompts
from sae_research.studies.opinion_qa.evaluate import EvalSet
from sae_research.studies.opinion_qa.fit import Targets, shrink_targets
from sae_research.studies.opinion_qa.prompts import (
    ENGLISH_TEMPLATE,
    TOY_TEMPLATE,
    PromptTemplate,
    use_chat_template,
)
from sae_research.studies.opinion_qa.settings import Settings
from sae_research.studies.opinion_qa.shift import (
    Basis,
    Shift,
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

    def basis(self, space: str, seed: int) -> Basis:
        """A space to shift in: the SAE, or what takes its place in a control."""
        residuals = self.cache.survey_residuals
        match space:
            case "SAE":
                return self.sae
            case "random":
                return random_basis(residuals, self.sae.size, self.l0, seed)
            case "PCA":
                return pca_basis(residuals)
            case "tokens":
                return token_basis(residuals, self.cache.survey_tokens)
        return residual_basis(self.cache.model.d_model, self.cache.model.device)


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


def split_passages(
    model: LanguageModel, passages: Sequence[str], n_documents: int
) -> dict[str, torch.Tensor]:
    """Other text in rows of at most 64 tokens, `n_documents` of them for each split."""
    length = min(64, model.n_ctx)
    tokens = model.packed(list(passages), length)
    if len(tokens) < len(SPLITS):
        raise ResearchError(
            f"the other text (passages.txt) gives {len(tokens)} rows of {length} tokens and each "
            "split needs at least one; add text."
        )
    share = min(n_documents, len(tokens) // len(SPLITS))
    return dict(zip(SPLITS, tokens[: len(SPLITS) * share].split(share), strict=True))


def thin_questions(
    questions: Sequence[Question], clusters: Sequence[str], every: int
) -> np.ndarray:
    """Rows of every n-th cluster of each split."""
    chosen: set[str] = set()
    for split in dict.fromkeys(q.split for q in questions):
        own = [c for c, q in zip(clusters, questions, strict=True) if q.split == split]
        chosen |= set(list(dict.fromkeys(own))[::every])
    return np.array([i for i, cluster in enumerate(clusters) if cluster in chosen])


def select_questions(survey: Survey, rows: np.ndarray) -> Survey:
    """The survey of some of its questions."""
    return replace(
        survey,
        questions=tuple(survey.questions[i] for i in rows),
        distributions=survey.distributions[:, rows],
        overall=survey.overall[rows],
        counts=None if survey.counts is None else survey.counts[:, rows],
        web=None if survey.web is None else survey.web[rows],
    )


def make_targets(poll: Survey, shrinkage: float) -> Targets:
    """What a poll teaches: its groups' answers, shrunk towards their mean."""
    pooled = np.tensordot(poll.weights, poll.distributions, 1)
    counts = torch.tensor(poll.counts, dtype=torch.float64)
    return Targets(
        groups=tuple(g.name for g in poll.groups),
        attributes=tuple(g.attribute for g in poll.groups),
        weights=poll.weights,
        answers=shrink_targets(counts, torch.tensor(pooled), shrinkage).numpy(),
        overall=pooled,
        train=poll.rows("train"),
        validation=poll.rows("validation"),
    )


def drop_small_groups(survey: Survey, min_responses: int) -> Survey:
    """The survey without groups with too few answers to some question, or that then stand alone."""
    enough = survey.counts.sum(-1).min(1) >= min_responses
    attributes = [g.attribute for g in survey.groups]
    left = Counter(a for a, ok in zip(attributes, enough, strict=True) if ok)
    rows = [i for i, ok in enumerate(enough) if ok and left[attributes[i]] > 1]
    if not rows:
        raise ResearchError(
            f"no attribute has two groups with {min_responses} answers to every question; "
            "lower `min_responses`."
        )
    return replace(
        survey,
        groups=tuple(survey.groups[i] for i in rows),
        distributions=survey.distributions[rows],
        counts=survey.counts[rows],
    )


def make_eval_set(truth: Survey, clusters: Sequence[str]) -> EvalSet:
    """The test questions; of a poll, with what its sampling noise does to scores."""
    rows = truth.rows("test")
    if truth.counts is None:
        return EvalSet(truth, rows, families=tuple(clusters))
    test = select_questions(truth, rows)
    known = reliability(test, 0)
    if not known > 0:
        raise ResearchError(
            "the groups of this survey differ no more than two halves of one group do (split-half "
            f"reliability {known:.2f}): nothing could be said of following groups; use more "
            "respondents or other groups."
        )
    return EvalSet(truth, rows, known, sampling_noise(test, 0), tuple(clusters))


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
    from sae_research.saes import check_fit

    rows = thin_questions(truth.questions, clusters, settings.every_nth_cluster)
    truth = select_questions(truth, rows)
    clusters = tuple(clusters[i] for i in rows)
    poll = truth if truth.counts is not None else truth.sampled(settings.respondents, seed)
    batch = settings.max_rows_per_forward
    hook = check_fit(model, sae)
    return Experiment(
        settings,
        CachedPrompts(model, hook, truth.questions, template.plain, texts, batch),
        sae_basis(sae),
        template,
        poll,
        truth,
        make_targets(poll, settings.shrinkage),
        make_eval_set(truth, clusters),
        clusters,
        load_fresh,
        tuple(select_questions(survey, rows) for survey in intersections),
    )
