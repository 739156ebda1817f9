"""Where contexts come from, and which SAEs of a model take part (published code: data preparation).

Contexts are rows of tokens of one length without padding, BOS first; the last token is steered.
"""

import re
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch

from sae_research import catalogue, prose, real_saes
from sae_research.catalogue import ModelSpec
from sae_research.errors import ResearchError
from sae_research.models import LanguageModel
from sae_research.studies.side_effects.settings import Settings

WIKITEXT = ("Salesforce/wikitext", "wikitext-103-raw-v1")
MIN_CHARACTERS = {"author": 100, "replication": 200}
"""Texts shorter than this are dropped."""
MAX_TEXTS = 8000
FRESH_SEED = 123
_WIDE = {"effect_quantiles": (0.05, 0.95), "frequency_band": (0.001, 0.5)}
PUBLISHED_DEPARTURES = {
    "gpt2-small": {"selector": "geometry_only"},
    "pythia-70m": {**_WIDE, "group_size": 30},
    "gemma-2-2b": {**_WIDE, "group_size": 25, "n_fresh_contexts": 256},
    "llama-3.1-8b": {
        "holdout_fraction": 0.3,
        "group_size": 25,
        "frequency_band": (0.005, 0.5),
        "n_fresh_contexts": 256,
        "n_downstream_latents": 1024,
        "clean_score": "log_of_ratio",
    },
}
"""How a model's published script differs from that of GPT-2, under the author's protocol."""


def apply_departures(spec: ModelSpec, settings: Settings) -> Settings:
    """The settings with what this model's published script does differently."""
    own = PUBLISHED_DEPARTURES.get(spec.name, {})
    if settings.protocol != "author":  # the replication treats all models alike but for memory
        own = {name: value for name, value in own.items() if name == "n_downstream_latents"}
    return replace(settings, **own)


def choose_saes(
    spec: ModelSpec, settings: Settings
) -> tuple[dict[str, tuple[ModelSpec, str]], str]:
    """The primary SAEs and null dictionaries of a model by name, each as (owner, role), and the
    downstream SAE's role.

    A role `other/role` is an SAE that the catalogue lists under another name of the same model.
    """
    own = spec.roles()
    primary_saes = {}
    for name in (*settings.primary_saes, *settings.null_saes):
        owner_name, _, role = name.rpartition("/")
        owner = catalogue.get(owner_name) if owner_name else spec
        if owner.model == spec.model and role in owner.roles():
            primary_saes[name] = (owner, role)
    downstream = next((role for role in settings.downstream_saes if role in own), None)
    if not primary_saes or downstream is None:
        raise ResearchError(
            f"{spec.name} has the SAEs {', '.join(own)}, but none of the primary_saes "
            f"{', '.join(settings.primary_saes)} with one of the downstream_saes "
            f"{', '.join(settings.downstream_saes)}; correct both lists in params.yaml."
        )
    return primary_saes, downstream


def find_other_seeds(role: str, roles: Iterable[str]) -> list[str]:
    """The roles of the same SAE from other seeds: `x`, `x_1` and `x_2` are three seeds of one."""
    stem = re.sub(r"_\d+$", "", role)
    return [r for r in roles if r != role and re.fullmatch(rf"{stem}(_\d+)?", r)]


def make_contexts(
    spec: ModelSpec,
    model: LanguageModel,
    settings: Settings,
    *,
    apart_from: torch.Tensor | None = None,
    seed: int = 0,
) -> torch.Tensor:
    """Contexts [n, T], or fresh ones: of other text, none of them in `apart_from`.

    Another `seed` draws anew.
    """
    fresh = apart_from is not None
    if settings.context_length > model.n_ctx:  # generated documents would be cut in silence
        raise ResearchError(
            f"`context_length` {settings.context_length} is longer than {model.name} can read "
            f"({model.n_ctx} tokens); lower it in params.yaml."
        )
    n = settings.n_fresh_contexts if fresh else settings.n_contexts
    seed = FRESH_SEED + seed if fresh else seed
    if spec.embedded:
        drawn = 2 * n if fresh else n  # short documents repeat
        contexts = _make_toy_contexts(spec.model, model, drawn, settings.context_length, seed)
    else:
        recipe = real_saes.RECIPES.get(spec.trained_on or spec.name)
        source = recipe and recipe.text
        texts = _load_prose(source, fresh) if source else _load_wikitext(fresh, settings.protocol)
        contexts = cut_texts(model, texts, settings, seed)
    if fresh:
        seen = set(map(tuple, apart_from.tolist()))
        contexts = contexts[[tuple(row) not in seen for row in contexts.tolist()]]
    if len(contexts) < n:
        raise ResearchError(
            f"the corpus gives {len(contexts)} contexts of {settings.context_length} tokens, fewer "
            f"than the {n} asked for; ask for fewer or shorter contexts."
        )
    return contexts[:n]


def cut_texts(
    model: LanguageModel, texts: list[str], settings: Settings, seed: int
) -> torch.Tensor:
    """All contexts of some texts: cut from one stream (author), or each text's beginning."""
    # the replication shuffles texts only where a seed of its own was asked for
    shuffled = settings.protocol == "author" or seed not in (0, FRESH_SEED)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(texts)) if shuffled else range(len(texts))
    ordered = [texts[i] for i in order]
    if settings.protocol == "author":
        return model.packed(ordered, settings.context_length)
    contexts = model.tokens(ordered, settings.context_length)
    return contexts[contexts[:, -1] != model.pad]  # a shorter text would end in padding


def _load_wikitext(fresh: bool, protocol: str) -> list[str]:
    """Distinct long lines of WikiText-103: the first 2 % of training, or the validation text."""
    import datasets

    split = "validation" if fresh else "train[:2%]"
    try:
        lines = datasets.load_dataset(*WIKITEXT, split=split)["text"]
    except (OSError, ConnectionError, ValueError) as error:
        raise ResearchError(
            f"{WIKITEXT[0]} is not on this machine and the hub cannot be reached; connect and run "
            "again, or use the cpu profile, which needs no network."
        ) from error
    texts = list(dict.fromkeys(" ".join(line.split()) for line in lines))
    long_texts = [text for text in texts if len(text) >= MIN_CHARACTERS[protocol]][:MAX_TEXTS]
    if len(long_texts) < 1000 and not fresh:
        raise ResearchError(
            f"WikiText gives only {len(long_texts)} texts; its copy on this machine is incomplete."
        )
    return long_texts


def _load_prose(source: str, fresh: bool) -> list[str]:
    """Paragraphs that the SAEs of a real model were not trained on, all libraries mixed."""
    texts = prose.load(source).texts("fresh" if fresh else "test")
    return [texts[i] for i in np.random.default_rng(FRESH_SEED).permutation(len(texts))]


def _make_toy_contexts(
    name: str, model: LanguageModel, n: int, length: int, seed: int
) -> torch.Tensor:
    """Fresh documents of a toy model's world, cut anywhere."""
    if name == "text":
        from sae_research.world.text import documents

        tokens = documents.make_rows(n, [seed, 2]).tokens[:, :length]
    else:
        from sae_research.world.survey import model as survey_model
        from sae_research.world.survey import prompts
        from sae_research.world.survey.population import Population

        recipe = survey_model.SurveySettings()
        writer = prompts.Writer(Population(recipe.population), model.tokenizer.get_vocab())
        rng = np.random.default_rng([seed, 3])
        drawn = writer.write_mixed(n, rng, recipe.most_stated, recipe.off_task)
        tokens = drawn.tokens[:, : min(length, prompts.CONTEXT)]
    return torch.as_tensor(np.asarray(tokens), dtype=torch.long, device=model.device)
