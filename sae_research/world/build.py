"""Build the toy models and their SAEs: each piece resumable, all put in place at the end."""

import shutil
from functools import partial
from pathlib import Path
from types import ModuleType

from sae_research import dependencies, parallel, store
from sae_research.paths import DATA, EMBEDDED

TOY_MODELS = ("text", "survey")


def _load_recipe(name: str, seed: int) -> tuple[ModuleType, object, dict]:
    """The module and settings of a toy model, and the key under which pieces are taken up again.

    The key holds the settings, the seed and all code that the module rests on.
    """
    from sae_research.world.survey import model as survey_model
    from sae_research.world.text import model as text_model

    module, settings = {
        "text": (text_model, text_model.TextSettings()),
        "survey": (survey_model, survey_model.SurveySettings()),
    }[name]
    code = dependencies.code_fingerprint(module.__name__)
    return module, settings, {"settings": store.fingerprint(settings), "code": code, "seed": seed}


def _build_model(seed: int, folder: Path, name: str) -> Path:
    module, settings, key = _load_recipe(name, seed)
    return store.resumed(folder / name / "model", key, partial(module.train_model, settings, seed))


def _build_saes(seed: int, folder: Path, piece: tuple[str, int]) -> Path:
    name, hook_index = piece
    module, settings, key = _load_recipe(name, seed)
    model = store.verified(folder / name / "model")
    train = partial(module.train_saes, settings, model, seed, hook_index=hook_index)
    return store.resumed(folder / name / f"saes-{hook_index}", key, train)


def build_into(folder: Path, seed: int, n_jobs: int = 2) -> Path:
    """Both toy models below `folder`: models first, then the SAEs of each hook.

    Each piece has one thread whatever `n_jobs`, so that its bytes depend on the seed alone.
    """
    parallel.shards(partial(_build_model, seed, folder), TOY_MODELS, n_jobs, desc="models")
    pieces = [(name, hook_index) for name in TOY_MODELS for hook_index in (0, 1)]
    parallel.shards(partial(_build_saes, seed, folder), pieces, n_jobs, desc="SAEs")
    for name in TOY_MODELS:
        _copy([folder / name / f"saes-{i}" for i in (0, 1)], folder / name / "saes")
    return folder


def _copy(pieces: list[Path], target: Path) -> None:
    with store.writing(target) as part:
        for piece in pieces:
            ignore = shutil.ignore_patterns("key")
            shutil.copytree(store.verified(piece), part, dirs_exist_ok=True, ignore=ignore)


def build(seed: int = 0) -> Path:
    """Make `data/embedded` anew from `seed`; a build that was killed goes on where it stopped."""
    part = build_into(DATA / "scratch" / f"world-{seed}", seed)
    for name in TOY_MODELS:
        for piece in ("model", "saes"):
            _copy([part / name / piece], EMBEDDED / name / piece)
    shutil.rmtree(part)
    return EMBEDDED


def model_folder(name: str, root: Path = EMBEDDED) -> Path:
    """The Hugging Face folder of a toy model, after its checksums were compared."""
    return store.verified(root / name / "model")


def saes_folder(name: str, root: Path = EMBEDDED) -> Path:
    """The folder with the SAEs of a toy model, after its checksums were compared."""
    return store.verified(root / name / "saes")


def sae_folders(name: str, root: Path = EMBEDDED) -> dict[str, Path]:
    """The SAELens folders of a toy model by name."""
    return {p.parent.name: p.parent for p in sorted(saes_folder(name, root).glob("*/cfg.json"))}
