"""A small survey world for the tests of study 1: a toy model that was never trained, so nothing
holds by luck.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from miniatures import random_sae

from sae_research.bases import sae_basis
from sae_research.studies.opinion_qa.experiment import Experiment
from sae_research.studies.opinion_qa.settings import Settings
from sae_research.surveys.cached import CachedPrompts
from sae_research.surveys.prompts import TOY_TEMPLATE
from sae_research.surveys.scores import EvalSet
from sae_research.surveys.targets import Targets

HOOK = "blocks.0.hook_resid_post"
GROUPS = ("red", "blue", "old", "young", "grey")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A survey toy model that was never trained, its weights scaled up so that everything
    matters.
    """
    from sae_research import models
    from sae_research.world import toy_model
    from sae_research.world.survey.prompts import WORDS

    tokenizer = toy_model.make_word_tokenizer(WORDS)
    recipe = toy_model.ToyLlama(width=32, blocks=3, inner=48, scale=0.02)
    model = toy_model.make_llama(len(tokenizer), recipe, seed=1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4 if weight.ndim > 1 else 1)
    folder = tmp_path_factory.mktemp("survey") / "model"
    toy_model.save_model(model.eval(), tokenizer, folder)
    return models.load_model(folder, name="world-survey")


@pytest.fixture(scope="module")
def population():
    from sae_research.world.survey.population import Population, PopulationSettings

    return Population(PopulationSettings())


@pytest.fixture(scope="module")
def cache(model, population):
    from sae_research.world.survey.prompts import Writer, prompt

    writer, draws = Writer(population, model.tokenizer.get_vocab()), np.random.default_rng(0)
    texts = {
        s: torch.from_numpy(writer.write_off_task(8, draws).tokens)
        for s in ("train", "validation", "test")
    }
    return CachedPrompts(
        model, HOOK, population.questions[:18], lambda q, reverse: prompt(q, reverse=reverse), texts
    )


@pytest.fixture(scope="module")
def sae():
    return random_sae("topk", width=32, latents=96, k=12)


@pytest.fixture(scope="module")
def basis(sae):
    return sae_basis(sae)


@pytest.fixture(scope="module")
def targets():
    draws = np.random.default_rng(3)
    answers = np.zeros((5, 18, 4))
    for q in range(18):
        answers[:, q, : 2 + q % 3] = draws.dirichlet(np.ones(2 + q % 3), 5)
    return Targets(
        GROUPS,
        ("a", "a", "b", "b", "b"),
        np.array([0.5, 0.5, 0.2, 0.3, 0.5]),
        answers,
        answers.mean(0),
        np.arange(12),
        np.arange(12, 18),
    )


@pytest.fixture(scope="module")
def small(population):
    """The planted survey of 18 questions, as the bench asks them."""
    survey = population.survey()
    cut = slice(0, 18)
    return replace(
        survey,
        questions=survey.questions[cut],
        distributions=survey.distributions[:, cut],
        overall=survey.overall[cut],
        web=survey.web[cut],
    )


@pytest.fixture(scope="module")
def everyone(small):
    """The planted answers of all groups, as a shift would learn them."""
    return Targets(
        tuple(g.name for g in small.groups),
        tuple(g.attribute for g in small.groups),
        small.weights,
        small.distributions,
        small.overall,
        np.arange(12),
        np.arange(12, 18),
    )


@pytest.fixture(scope="module")
def exp(cache, basis, small, everyone, fresh):
    """An experiment on the planted survey of 18 questions."""
    return Experiment(
        Settings(),
        cache,
        basis,
        TOY_TEMPLATE,
        small,
        small,
        everyone,
        EvalSet(small, np.arange(12, 18)),
        tuple(f"{q.topic} {q.verb}" for q in small.questions),
        fresh,
    )


@pytest.fixture(scope="module")
def fresh(model):
    """Loads the toy model's weights anew."""
    from transformers import LlamaForCausalLM

    original = model.bridge.original_model
    state = {}
    for name, value in original.state_dict().items():
        state[name.replace("_original_component.", "").replace("original_component.", "")] = value

    def load():
        model = LlamaForCausalLM(original.config)
        model.load_state_dict(state, strict=False)
        return model.eval()

    return load
