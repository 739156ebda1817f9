"""Build the embedded world: every piece resumable in a scratch folder, all of it put in place at the end."""

import shutil
from functools import partial
from pathlib import Path
from types import ModuleType

from sae_research import parallel, store
from sae_research.paths import DATA, EMBEDDED

SOURCES = {
    "text": (
        "text/model",
        "text/documents",
        "text/frames",
        "text/grammar",
        "text/lexicon",
        "toy_model",
        "toy_saes",
    ),
    "survey": ("survey/model", "survey/population", "survey/prompts", "toy_model", "toy_saes"),
}
"""The specimens, each with the modules of this package that it is made by."""
SPECIMENS = tuple(SOURCES)


def _recipe(name: str, seed: int) -> tuple[ModuleType, object, dict]:
    """The module and settings of a specimen, and the key under which a killed build may take up its pieces again."""
    from sae_research import activations, saes, training
    from sae_research.world.survey import model as survey_model
    from sae_research.world.text import model as text_model

    module, settings = {
        "text": (text_model, text_model.TextSettings()),
        "survey": (survey_model, survey_model.SurveySettings()),
    }[name]
    files = [
        *(Path(__file__).parent / f"{source}.py" for source in SOURCES[name]),
        *(Path(used.__file__) for used in (activations, saes, training)),
    ]
    return (
        module,
        settings,
        {"settings": store.fingerprint(settings), "code": store.code(*files), "seed": seed},
    )


def _model(seed: int, folder: Path, name: str) -> Path:
    module, settings, key = _recipe(name, seed)
    return store.resumed(
        folder / name / "model",
        key,
        lambda part: module.train_model(settings, seed, part, threads=1),
    )


def _saes(seed: int, folder: Path, piece: tuple[str, int]) -> Path:
    name, place = piece
    module, settings, key = _recipe(name, seed)
    model = store.verified(folder / name / "model")
    return store.resumed(
        folder / name / f"saes-{place}",
        key,
        lambda part: module.train_saes(settings, model, seed, part, (place,)),
    )


def specimens(seed: int, folder: Path, n_jobs: int = 2) -> Path:
    """Both specimens below `folder`: models first, then the SAEs of each hook.

    Each piece has one thread whatever `n_jobs`, so that its bytes depend on the seed alone.
    """
    parallel.shards(partial(_model, seed, folder), SPECIMENS, n_jobs, desc="models")
    pieces = [(name, place) for name in SPECIMENS for place in (0, 1)]
    for (name, place), saes in zip(
        pieces,
        parallel.shards(partial(_saes, seed, folder), pieces, n_jobs, desc="SAEs"),
        strict=True,
    ):
        if place == 0:
            _copied([saes, saes.with_name("saes-1")], folder / name / "saes")
    return folder


def _copied(pieces: list[Path], target: Path) -> None:
    with store.writing(target) as part:
        for piece in pieces:
            shutil.copytree(
                store.verified(piece),
                part,
                dirs_exist_ok=True,
                ignore=shutil.ignore_patterns("key"),
            )


def build(seed: int = 0) -> Path:
    """Make `data/embedded` anew from `seed`; a build that was killed goes on where it stopped."""
    part = specimens(seed, DATA / "scratch" / f"world-{seed}")
    for name in SPECIMENS:
        for piece in ("model", "saes"):
            _copied([part / name / piece], EMBEDDED / name / piece)
    shutil.rmtree(part)
    return EMBEDDED


def model_folder(specimen: str, root: Path = EMBEDDED) -> Path:
    """The Hugging Face folder of a specimen, after its checksums were compared."""
    return store.verified(root / specimen / "model")


def saes_folder(specimen: str, root: Path = EMBEDDED) -> Path:
    """The folder with the SAELens folders of a specimen, after its checksums were compared."""
    return store.verified(root / specimen / "saes")


def sae_folders(specimen: str, root: Path = EMBEDDED) -> dict[str, Path]:
    """The SAELens folders of a specimen by name."""
    return {
        path.parent.name: path.parent
        for path in sorted(saes_folder(specimen, root).glob("*/cfg.json"))
    }
