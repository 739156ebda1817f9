"""Build the toy models and their SAEs: each piece resumable, all put in place at the end.

The models of three seeds are committed, and the SAEs of the first; the SAEs of the others are
trained where they are first asked for.
"""

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

from sae_research import dependencies, parallel, store
from sae_research.paths import DATA, EMBEDDED

TOY_MODELS = ("text", "survey")
SEEDS = (0, 1, 2)
"""Seeds of the committed models; each seed also draws the text and starts the SAEs."""
SCRATCH = DATA / "scratch" / "world"


def folder_name(name: str, seed: int) -> str:
    """What a toy model of a seed is called: `text`, `text-1`, `text-2`."""
    return f"{name}-{seed}" if seed else name


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


def _build_model(scratch: Path, piece: tuple[str, int]) -> Path:
    name, seed = piece
    module, settings, key = _load_recipe(name, seed)
    train = partial(module.train_model, settings, seed)
    return store.resumed(scratch / folder_name(name, seed) / "model", key, train)


def train_saes(model: Path, scratch: Path, name: str, seed: int, n_jobs: int = 1) -> list[Path]:
    """The folders with the SAEs of a toy model, one for each hook."""
    one = partial(_train_hook, model, scratch, name, seed)
    return parallel.shards(one, (0, 1), n_jobs, desc="SAEs")


def _train_hook(model: Path, scratch: Path, name: str, seed: int, hook_index: int) -> Path:
    module, settings, key = _load_recipe(name, seed)
    key["model"] = (model / store.CHECKSUMS).read_text()
    train = partial(module.train_saes, settings, model, seed, hook_index=hook_index)
    return store.resumed(scratch / folder_name(name, seed) / f"saes-{hook_index}", key, train)


def _copy(pieces: Sequence[Path], target: Path) -> None:
    with store.writing(target) as part:
        for piece in pieces:
            ignore = shutil.ignore_patterns("key")
            shutil.copytree(store.verified(piece), part, dirs_exist_ok=True, ignore=ignore)


def build(
    names: Sequence[str] = TOY_MODELS,
    seeds: Sequence[int] = SEEDS,
    n_jobs: int = 2,
    root: Path = EMBEDDED,
    scratch: Path = SCRATCH,
) -> Path:
    """Make `data/embedded` anew; a build that was killed goes on where it stopped.

    Each piece has one thread whatever `n_jobs`, so that its bytes depend on the seed alone.
    """
    pieces = [(name, seed) for seed in seeds for name in names]
    models = parallel.shards(partial(_build_model, scratch), pieces, n_jobs, desc="models")
    for (name, seed), model in zip(pieces, models, strict=True):
        _copy([model], root / folder_name(name, seed) / "model")
    if 0 in seeds:
        for name in names:
            found = train_saes(root / name / "model", scratch, name, 0, n_jobs)
            _copy(found, root / name / "saes")
    shutil.rmtree(scratch)
    return root


def model_folder(name: str, root: Path = EMBEDDED) -> Path:
    """The Hugging Face folder of a toy model, after its checksums were compared."""
    return store.verified(root / name / "model")


def saes_folder(name: str, root: Path = EMBEDDED) -> Path:
    """The folder with the SAEs of a toy model, after its checksums were compared.

    Those of a further seed are trained first, unless that has been done.
    """
    kind, _, seed = name.partition("-")
    if not seed:
        return store.verified(root / name / "saes")
    folder = SCRATCH.with_name("toy_saes") / name
    model = model_folder(name, root)
    _, _, key = _load_recipe(kind, int(seed))

    def train(part: Path) -> None:
        for piece in train_saes(model, SCRATCH, kind, int(seed)):
            shutil.copytree(piece, part, dirs_exist_ok=True)

    return store.resumed(folder, key | {"model": (model / store.CHECKSUMS).read_text()}, train)


def sae_folders(name: str, root: Path = EMBEDDED) -> dict[str, Path]:
    """The SAELens folders of a toy model by name."""
    return {p.parent.name: p.parent for p in sorted(saes_folder(name, root).glob("*/cfg.json"))}
