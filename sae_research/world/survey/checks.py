"""What the toy survey model must show before study 1 may stand on it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from sae_research import activations, models, saes, steering
from sae_research.models import Edit, LanguageModel
from sae_research.surveys.survey import (
    Question,
    divergence,
    score_groups,
    total_variation,
    wasserstein,
)
from sae_research.world.checks import Check
from sae_research.world.survey.model import NAME, SurveySettings
from sae_research.world.survey.population import ATTRIBUTES, TOPICS, VERBS, Population
from sae_research.world.survey.prompts import (
    CONTEXT,
    LETTERS,
    Batch,
    Writer,
    order_by_letter,
    prompt,
)
from sae_research.world.text import detectors
from sae_research.world.toy_saes import count_eligible, load_saes

if TYPE_CHECKING:
    from sae_lens import SAE


def measure_answers(
    model: LanguageModel,
    questions: Sequence[Question],
    personas: Sequence[Sequence[str]],
    reverse: bool,
    edits: dict[str, Edit] | None = None,
) -> np.ndarray:
    """Next-token probability of each option's letter, [personas, questions, 4]."""
    letters = model.tokenizer.convert_tokens_to_ids(list(LETTERS))
    n_options = np.tile([q.n_options for q in questions], len(personas))
    tokens = model.tokens([prompt(q, stated, reverse) for stated in personas for q in questions])
    at = model.content(tokens).sum(-1)
    found = order_by_letter(_next_words(model, tokens, at, edits)[:, letters], n_options, reverse)
    return found.reshape(len(personas), len(questions), len(LETTERS))


def measure(
    model_folder: Path, saes_folder: Path, settings: SurveySettings, seed: int
) -> list[Check]:
    """Every check of the toy survey model and its SAEs; `seed` draws the documents."""
    model = models.load_model(model_folder, name=NAME)
    population = Population(settings.population)
    early = saes.load_sae(Path(saes_folder) / settings.saes.first[settings.saes.hooks[0]])
    return [
        *check_planted_effects(population),
        *check_model(model, population, settings, seed),
        check_steering(model, population, settings.saes.hooks[0]),
        *check_latents(model, early, population, settings, seed),
    ]


def measure_saes(
    model_folder: Path, saes_folder: Path, settings: SurveySettings, seed: int
) -> list[dict]:
    """Each SAE on held-out documents: quality, and which truths it has latents for."""
    model = models.load_model(model_folder, name=NAME)
    writer = Writer(Population(settings.population), model.tokenizer.get_vocab())
    held = torch.from_numpy(_write(writer, settings, seed, 6, 600).tokens)
    contexts = make_contexts(writer, settings, seed)
    rows = []
    for name, sae in load_saes(saes_folder).items():
        known = measure_known_words(model, sae, writer, settings, seed)
        rows.append(
            {"sae": name, "hook": saes.hook_of(sae), "kind": sae.cfg.architecture()}
            | {"width": sae.cfg.d_sae}
            | saes.quality(model, sae, held, batch=200)
            | {"eligible": count_eligible(model, sae, contexts)}
            | {words: share for words, (share, _) in known.items()}
        )
    return rows


def _write(writer: Writer, settings: SurveySettings, seed: int, stream: int, n: int) -> Batch:
    """`n` documents as the model was trained on, from a stream of draws of their own."""
    draws = np.random.default_rng([seed, stream])
    return writer.write_mixed(n, draws, settings.most_stated, settings.off_task)


def check_planted_effects(population: Population) -> list[Check]:
    """Whether the planted effects lie where real polls lie."""
    survey = population.survey()
    n = len(survey.questions)
    wd = wasserstein(survey.overall, survey.distributions, survey.gaps)
    by_attribute = {a: float(wd[survey.of(a)].mean()) for a in ATTRIBUTES}
    web = float(wasserstein(survey.web, survey.overall, survey.gaps).mean())
    least = {"party": 0.06, "age": 0.045, "education": 0.035, "region": 0.02}
    mean = float(wd.mean())
    upper = {"at_most": True, "n": n}
    name = "planted WD(overall, {})"
    return [
        Check("planted WD(overall, group), lower end of the real band", mean, 0.04, n=n),
        Check("planted WD(overall, group), upper end of the real band", mean, 0.08, **upper),
        *(Check(name.format(a), by_attribute[a], bar, n=n) for a, bar in least.items()),
        Check(f"{name.format('hand')}: the negative control", by_attribute["hand"], 1e-12, **upper),
        Check("planted WD(web, overall)", web, 0.08, n=n),
    ]


def check_model(
    model: LanguageModel, population: Population, settings: SurveySettings, seed: int
) -> list[Check]:
    """Whether the model knows the survey, follows personas, and speaks off-task text."""
    survey = population.survey()
    draws = np.random.default_rng([seed, 3])
    writer = Writer(population, model.tokenizer.get_vocab())
    asked = writer.write_survey(4096, draws, settings.most_stated)
    aside = writer.write_off_task(512, draws)
    personas = [[], *([group.name] for group in survey.groups)]
    both = [measure_answers(model, survey.questions, personas, r) for r in (False, True)]
    mean = np.mean(both, axis=0)
    unsteered = mean[0]
    persona = mean[1:]
    scores = score_groups(persona, survey.distributions, survey.weights, survey.mask)
    wd = wasserstein(persona, survey.distributions, survey.gaps)
    web = wasserstein(unsteered, survey.web, survey.gaps)
    order = total_variation(both[0], both[1])
    upper = {"at_most": True}
    kl = measure_answer_kl(model, asked)
    excess = measure_off_task_excess(model, aside)
    near = "unsteered model: WD(model, web authors)"
    swap = "option order: mean TV between both orders"
    return [
        Check("answer KL(exact || model), nats", kl, 0.003, 0.0005, n=4096, **upper),
        Check("persona prompt: rho_dev", scores.rho, 0.9, 0.97, n=wd.size),
        Check("persona prompt: WD(model, group)", wd.mean(), 0.02, 0.01, n=wd.size, **upper),
        Check(near, web.mean(), 0.02, 0.01, n=web.size, **upper),
        Check(swap, order.mean(), 0.03, 0.01, n=order.size, **upper),
        Check("off-task loss minus its entropy, nats", excess, 0.1, 0.03, n=512, **upper),
    ]


def check_steering(model: LanguageModel, population: Population, hook: str) -> Check:
    """Whether a stated value is one direction, from training to validation questions.

    The mean difference between residuals with and without the value is added to every token of
    a question that states nothing. Test questions are left to study 1.
    """
    survey = population.survey()
    learnt, judged = (
        [survey.questions[i] for i in survey.rows(split)] for split in ("train", "validation")
    )
    plain = compute_mean_residual(model, hook, learnt, ())
    steered = []
    for group in survey.groups:
        stated = compute_mean_residual(model, hook, learnt, (group.name,))
        edit = {hook: steering.add_direction(stated - plain)}
        found = [measure_answers(model, judged, [()], r, edit)[0] for r in (False, True)]
        steered.append(np.mean(found, axis=0))
    rows = survey.rows("validation")
    scores = score_groups(
        np.stack(steered), survey.distributions[:, rows], survey.weights, survey.mask[rows]
    )
    name = "persona as one direction, added after the first block: rho_dev"
    return Check(name, scores.rho, 0.5, 0.7, n=len(survey.groups) * len(rows))


def compute_mean_residual(
    model: LanguageModel, hook: str, questions: Sequence[Question], stated: Sequence[str]
) -> torch.Tensor:
    """Mean residual over the tokens of questions in both orders, without what is stated."""
    tokens = model.tokens(
        [prompt(q, stated, reverse) for q in questions for reverse in (False, True)]
    )
    asked = model.content(tokens)
    said, silent = (len(prompt(questions[0], s).split()) for s in (stated, ()))
    asked[:, : 1 + said - silent] = False
    return model.residual(tokens, hook)[asked].mean(0)


def measure_answer_kl(model: LanguageModel, batch: Batch) -> float:
    """Mean KL of the model's letters to the exact ones, over documents with a question."""
    letters = model.tokenizer.convert_tokens_to_ids(list(LETTERS))
    predicted = _next_words(model, torch.from_numpy(batch.tokens), torch.from_numpy(batch.answer))
    return float(divergence(batch.target, predicted[:, letters]).mean())


def measure_off_task_excess(model: LanguageModel, batch: Batch) -> float:
    """Mean over tokens of the model's loss minus the generator's surprisal, in nats."""
    tokens = torch.from_numpy(batch.tokens)
    with torch.no_grad():
        losses = torch.cat([model.losses(rows) for rows in tokens.split(256)]).double().numpy()
    return float(np.nanmean(losses - batch.surprisal[:, 1:]))


def _next_words(
    model: LanguageModel,
    tokens: torch.Tensor,
    at: torch.Tensor,
    edits: dict[str, Edit] | None = None,
) -> np.ndarray:
    """Probability of each word after position `at` of each row."""
    rows = zip(tokens.split(512), at.split(512), strict=True)
    with torch.no_grad():
        found = [model.logits(t, edits)[torch.arange(len(t)), a].softmax(-1) for t, a in rows]
    return torch.cat(found).double().cpu().numpy()


def check_latents(
    model: LanguageModel, sae: "SAE", population: Population, settings: SurveySettings, seed: int
) -> list[Check]:
    """Whether the early SAE has latents for what documents say, and enough to screen."""
    writer = Writer(population, model.tokenizer.get_vocab())
    found = measure_known_words(model, sae, writer, settings, seed)
    bars = {"values at the word": (0.3, 0.8), "verbs at the word": (0.5, 1.0)}
    eligible = count_eligible(model, sae, make_contexts(writer, settings, seed))
    return [
        *(
            Check(f"{name} with a latent, F1 .7", found[name][0], *bar, n=found[name][1])
            for name, bar in bars.items()
        ),
        Check("latents eligible for screening", eligible, 200, 400, n=1024),
    ]


def measure_known_words(
    model: LanguageModel, sae: "SAE", writer: Writer, settings: SurveySettings, seed: int
) -> dict[str, tuple[float, int]]:
    """Share of values, topics and verbs with a latent of F1 at least .7, and their number.

    Sought at the word itself and at the answer's position; latent and threshold are chosen on
    one half of the documents and scored on the other.
    """
    batch = _write(writer, settings, seed, 4, 1500)
    tokens = torch.from_numpy(batch.tokens)
    content = model.content(tokens)
    codes = detectors.encode(sae, activations.collect(model, tokens, saes.hook_of(sae), batch=256))
    half = (torch.arange(len(tokens)) % 2 == 0)[:, None].expand_as(content)[content]
    at_answer = torch.arange(tokens.shape[1]) == torch.from_numpy(batch.answer)[:, None]
    scores: dict[str, list[torch.Tensor]] = {}
    families = [*(("values", v) for v in ATTRIBUTES.values()), ("topics", TOPICS), ("verbs", VERBS)]
    for family, words in families:
        here = torch.full_like(tokens, -1)
        for i, word in enumerate(words):
            here[tokens == writer.ids[word]] = i
        answer = torch.where(at_answer, here.amax(1, keepdim=True), -1)
        for place, label in (("word", here), ("answer", answer)):
            found = detectors.find_detectors(codes, label[content], len(words), half)
            scores.setdefault(f"{family} at the {place}", []).append(found.f1)
    joined = {name: torch.cat(f1) for name, f1 in scores.items()}
    return {name: ((f1 >= 0.7).double().mean().item(), len(f1)) for name, f1 in joined.items()}


def make_contexts(writer: Writer, settings: SurveySettings, seed: int) -> torch.Tensor:
    """Documents cut to one length, so that they end anywhere."""
    return torch.from_numpy(_write(writer, settings, seed, 5, 1024).tokens[:, :CONTEXT])
