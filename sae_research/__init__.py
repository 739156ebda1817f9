"""Steer, screen, train and fine-tune language models through sparse autoencoders.

>>> import sae_research as sr
>>> model = sr.load_model("gpt2")
>>> sae = sr.load_sae("gpt2-small-res-jb", "blocks.8.hook_resid_pre", model=model)
>>> with model.steer(sae, latent=1234, coefficient=4.0):
...     print(model.generate("I think", 40))

Everything is loaded when it is first used: importing this package costs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sae_research.catalogue import load_model, load_sae
    from sae_research.errors import ResearchError
    from sae_research.feature_card import FeatureCard
    from sae_research.models import LanguageModel
    from sae_research.saes import save as save_sae
    from sae_research.screening.ranking import Ranking, screen_features
    from sae_research.shifts import FittedShift, load_shift, save_shift
    from sae_research.studies.opinion_qa.experiment import fit_shift
    from sae_research.surveys.files import load_survey
    from sae_research.training import SAETraining, train_sae

_HOMES = {
    "load_model": "catalogue",
    "load_sae": "catalogue",
    "LanguageModel": "models",
    "ResearchError": "errors",
    "train_sae": "training",
    "SAETraining": "training",
    "screen_features": "screening.ranking",
    "Ranking": "screening.ranking",
    "FeatureCard": "feature_card",
    "load_survey": "surveys.files",
    "fit_shift": "studies.opinion_qa.experiment",
    "load_shift": "shifts",
    "save_shift": "shifts",
    "FittedShift": "shifts",
    # `specialize` (study 3) and `safety_adapter` (study 5) join here.
}
_RENAMED = {"save_sae": ("saes", "save")}
__all__ = [
    "FeatureCard",
    "FittedShift",
    "LanguageModel",
    "Ranking",
    "ResearchError",
    "SAETraining",
    "fit_shift",
    "load_model",
    "load_sae",
    "load_shift",
    "load_survey",
    "save_sae",
    "save_shift",
    "screen_features",
    "train_sae",
]


def __getattr__(name: str) -> object:
    module, attribute = _RENAMED.get(name, (_HOMES.get(name), name))
    if module is None:
        raise AttributeError(f"module 'sae_research' has no attribute '{name}'")
    return getattr(import_module(f"sae_research.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
