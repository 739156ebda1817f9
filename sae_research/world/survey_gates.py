"""What the survey specimen must show before study 1 may stand on it, measured against the planted truth."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from sae_research import lens as lenses
from sae_research.lens import Lens
from sae_research.survey import Question, divergence, group_part, total_variation, wasserstein
from sae_research.world.gates import Gate
from sae_research.world.survey import NAME, SurveySettings
from sae_research.world.survey_population import ATTRIBUTES, Population
from sae_research.world.survey_text import LETTERS, Batch, Writer, by_letter, prompt


def answers(lens: Lens, questions: Sequence[Question], personas: Sequence[Sequence[str]], reverse: bool) -> np.ndarray:
    """Next-token probability of each option's letter, [personas, questions, 4]; what goes to other words is missing."""
    letters = lens.tokenizer.convert_tokens_to_ids(list(LETTERS))
    ladders = np.tile([q.ladder for q in questions], len(personas))
    tokens = lens.tokens([prompt(question, stated, reverse) for stated in personas for question in questions])
    at = lens.content(tokens).sum(-1)
    found = _next_words(lens, tokens, at)[:, letters]
    return by_letter(found, ladders, reverse).reshape(len(personas), len(questions), len(LETTERS))


def measure(model_folder: Path, saes_folder: Path, settings: SurveySettings, seed: int) -> list[Gate]:
    """Every gate of the survey specimen and its SAEs; `seed` draws the documents that they are measured on."""
    lens = lenses.load(model_folder, name=NAME)
    population = Population(settings.population)
    return [
        *planted_gates(population),
        *model_gates(lens, population, settings, seed),
    ]


def planted_gates(population: Population) -> list[Gate]:
    """Whether the planted effects lie where real polls lie."""
    survey = population.survey()
    n = len(survey.questions)
    wd = wasserstein(survey.overall, survey.distributions, survey.gaps)
    by_attribute = {a: float(wd[survey.of(a)].mean()) for a in ATTRIBUTES}
    web = float(wasserstein(survey.web, survey.overall, survey.gaps).mean())
    least = {"party": 0.06, "age": 0.045, "education": 0.035, "region": 0.02}
    return [
        Gate("planted WD(overall, group), lower end of the real band", float(wd.mean()), 0.04, n=n),
        Gate("planted WD(overall, group), upper end of the real band", float(wd.mean()), 0.08, at_most=True, n=n),
        *(Gate(f"planted WD(overall, {a})", by_attribute[a], bar, n=n) for a, bar in least.items()),
        Gate("planted WD(overall, hand): the negative control", by_attribute["hand"], 1e-12, at_most=True, n=n),
        Gate("planted WD(web, overall)", web, 0.08, n=n),
    ]


def model_gates(lens: Lens, population: Population, settings: SurveySettings, seed: int) -> list[Gate]:
    """Whether the model knows the survey, follows personas, and speaks off-task text at its entropy."""
    survey = population.survey()
    draws = np.random.default_rng([seed, 3])
    writer = Writer(population, lens.tokenizer.get_vocab())
    asked = writer.survey(4096, draws, settings.most_stated)
    aside = writer.off_task(512, draws)
    personas = [[], *([group.name] for group in survey.groups)]
    both = np.stack([answers(lens, survey.questions, personas, reverse) for reverse in (False, True)])
    unsteered, persona = both.mean(0)[0], both.mean(0)[1:]
    part = group_part(persona, survey.distributions, survey.weights, survey.mask)
    wd = wasserstein(persona, survey.distributions, survey.gaps)
    web = wasserstein(unsteered, survey.web, survey.gaps)
    order = total_variation(both[0], both[1])
    return [
        Gate("answer KL(exact || model), nats", answer_kl(lens, asked), 0.003, 0.0005, at_most=True, n=4096),
        Gate("persona prompt: rho_dev", part.rho, 0.9, 0.97, n=wd.size),
        Gate("persona prompt: WD(model, group)", float(wd.mean()), 0.02, 0.01, at_most=True, n=wd.size),
        Gate("unsteered model: WD(model, web authors)", float(web.mean()), 0.02, 0.01, at_most=True, n=web.size),
        Gate("option order: mean TV between both orders", float(order.mean()), 0.03, 0.01, at_most=True, n=order.size),
        Gate("off-task loss minus its entropy, nats", off_task_excess(lens, aside), 0.1, 0.03, at_most=True, n=512),
    ]


def answer_kl(lens: Lens, batch: Batch) -> float:
    """Mean KL of the model's letters (of the whole vocabulary) to the exact ones, over documents with a question."""
    letters = lens.tokenizer.convert_tokens_to_ids(list(LETTERS))
    predicted = _next_words(lens, torch.from_numpy(batch.tokens), torch.from_numpy(batch.answer))
    return float(divergence(batch.target, predicted[:, letters]).mean())


def off_task_excess(lens: Lens, batch: Batch) -> float:
    """Mean over tokens of the model's loss less the generator's surprisal, in nats."""
    tokens = torch.from_numpy(batch.tokens)
    with torch.no_grad():
        losses = torch.cat([lens.losses(rows) for rows in tokens.split(256)]).double().numpy()
    return float(np.nanmean(losses - batch.surprisal[:, 1:]))


def _next_words(lens: Lens, tokens: torch.Tensor, at: torch.Tensor) -> np.ndarray:
    """Probability of each word after position `at` of each row."""
    rows = zip(tokens.split(512), at.split(512), strict=True)
    with torch.no_grad():
        found = [lens.logits(t)[torch.arange(len(t)), a].softmax(-1) for t, a in rows]
    return torch.cat(found).double().cpu().numpy()
