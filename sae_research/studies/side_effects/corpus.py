"""Where contexts come from, and which dictionaries of a subject take part (published code: data preparation)."""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from sae_research import catalogue
from sae_research.errors import ResearchError

if TYPE_CHECKING:
    from sae_lens import SAE

    from sae_research.catalogue import ModelSpec
    from sae_research.models import LanguageModel
    from sae_research.studies.side_effects.settings import Settings

WIKITEXT = ("Salesforce/wikitext", "wikitext-103-raw-v1")
SHORTEST = {"author": 100, "replication": 200}
"""Characters below which a text is dropped."""
TEXTS = 8000
FRESH_SEED = 123
PUBLISHED = {
    "gpt2-small": {"selector": "geometry_only"},
    "pythia-70m": {"matched": (0.05, 0.95), "group": 30, "band": (0.001, 0.5)},
    "gemma-2-2b": {"matched": (0.05, 0.95), "group": 25, "band": (0.001, 0.5), "fresh": 256},
    "llama-3.1-8b": {
        "held_out": 0.3,
        "group": 25,
        "band": (0.005, 0.5),
        "fresh": 256,
        "panel": 1024,
        "clean_score": "log_of_ratio",
    },
}
"""Where the published scripts of a model differ from those of GPT-2, under the author's protocol."""


def as_published(subject: "ModelSpec", settings: "Settings") -> "Settings":
    """The settings with what the published script of this model does differently; the replication treats all alike."""
    own = PUBLISHED.get(subject.name, {})
    if settings.protocol == "author":
        return replace(settings, **own)
    return replace(settings, **{name: value for name, value in own.items() if name == "panel"})


def dictionaries(
    subject: "ModelSpec", settings: "Settings"
) -> tuple[dict[str, tuple["ModelSpec", str]], str]:
    """The primaries of a subject by name, each with its owner and role there, and the role of the downstream one.

    A role `other/role` is a dictionary that the catalogue lists under another name of the same model.
    """
    own, primaries = subject.roles(), {}
    for name in settings.primaries:
        owner, _, role = name.rpartition("/")
        other = catalogue.get(owner) if owner else subject
        if other.model == subject.model and role in (other.roles() if owner else own):
            primaries[name] = (other, role)
    downstream = next((role for role in settings.downstream if role in own), None)
    if not primaries or downstream is None:
        raise ResearchError(
            f"{subject.name} has the SAEs {', '.join(own)}, but none of the primaries {', '.join(settings.primaries)} "
            f"with a downstream one of {', '.join(settings.downstream)}; correct both lists in params.yaml."
        )
    return primaries, downstream


def load(subject: "ModelSpec", role: str, lens: "LanguageModel") -> "SAE":
    """A dictionary in float32, whatever the model runs in: thresholds and bfloat16 rounding do not mix."""
    return subject.sae(role, device=lens.device, dtype="float32")


def contexts(
    subject: "ModelSpec",
    lens: "LanguageModel",
    settings: "Settings",
    *,
    fresh: bool = False,
    seed: int = 0,
) -> torch.Tensor:
    """[contexts, T] tokens without padding, BOS first; `fresh` ones come from other text, another `seed` draws anew."""
    n, seed = (settings.fresh, FRESH_SEED + seed) if fresh else (settings.contexts, seed)
    if subject.embedded:
        return _specimen(subject.model, lens, n, settings.length, seed)
    return of_texts(lens, _wikitext(fresh, settings.protocol), n, settings, seed)


def of_texts(
    lens: "LanguageModel", texts: list[str], n: int, settings: "Settings", seed: int
) -> torch.Tensor:
    """Contexts of given texts: cut from one shuffled stream (author), or the beginning of each text (replication)."""
    if settings.protocol == "author":
        order = np.random.default_rng(seed).permutation(len(texts))
        rows = lens.packed([texts[i] for i in order], settings.length)
    else:
        order = (
            np.random.default_rng(seed).permutation(len(texts))
            if seed not in (0, FRESH_SEED)
            else range(len(texts))
        )
        rows = lens.tokens([texts[i] for i in order], settings.length)
        rows = rows[rows[:, -1] != lens.pad]  # a shorter text would end in padding
    if len(rows) < n:
        raise ResearchError(
            f"the corpus gives {len(rows)} contexts of {settings.length} tokens, fewer than the {n} asked for; give "
            "more text or ask for fewer or shorter contexts."
        )
    return rows[:n]


def _wikitext(fresh: bool, protocol: str) -> list[str]:
    """Distinct long lines of WikiText-103: the first 2 % of the training text, or the validation text."""
    import datasets

    try:
        lines = datasets.load_dataset(*WIKITEXT, split="validation" if fresh else "train[:2%]")[
            "text"
        ]
    except (OSError, ConnectionError, ValueError) as error:
        raise ResearchError(
            f"{WIKITEXT[0]} is not on this machine and the hub cannot be reached; connect and run again, or use the "
            "cpu profile, which needs no network."
        ) from error
    texts = list(dict.fromkeys(" ".join(line.split()) for line in lines))
    kept = [text for text in texts if len(text) >= SHORTEST[protocol]][:TEXTS]
    if len(kept) < 1000 and not fresh:
        raise ResearchError(
            f"WikiText gives only {len(kept)} texts; its copy on this machine is incomplete."
        )
    return kept


def _specimen(name: str, lens: "LanguageModel", n: int, length: int, seed: int) -> torch.Tensor:
    """Fresh documents of the embedded world, cut anywhere."""
    if name == "text":
        from sae_research.world.text import documents

        rows = documents.rows(n, [seed, 2]).tokens[:, :length]
    else:
        from sae_research.world.survey import model as survey_model
        from sae_research.world.survey import prompts
        from sae_research.world.survey.population import Population

        recipe = survey_model.SurveySettings()
        writer = prompts.Writer(Population(recipe.population), lens.tokenizer.get_vocab())
        draws = np.random.default_rng([seed, 3])
        rows = writer.mixed(n, draws, recipe.most_stated, recipe.off_task).tokens[
            :, : min(length, prompts.CONTEXT)
        ]
    return torch.as_tensor(np.asarray(rows), dtype=torch.long, device=lens.device)
