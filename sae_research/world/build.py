"""Build the embedded world: every piece resumable in a scratch folder, all of it put in place at the end."""

import hashlib
import shutil
from functools import partial
from pathlib import Path

from sae_research import parallel, store
from sae_research.paths import DATA, EMBEDDED

SOURCES = {
    "text": ("text", "documents", "frames", "grammar", "lexicon", "specimen"),
    "survey": ("survey", "survey_population", "survey_text", "specimen"),
}
"""The specimens, each with the modules of this package that it is made by."""


def _specimen(seed: int, folder: Path, name: str) -> list[Path]:
    """Train one specimen and its SAEs below `folder`, or take up again what a killed build left there."""
    from sae_research import training
    from sae_research.world import survey, text

    module, settings = {
        "text": (text, text.TextSettings()),
        "survey": (survey, survey.SurveySettings()),
    }[name]
    files = [*(Path(__file__).with_name(f"{source}.py") for source in SOURCES[name]), Path(training.__file__)]
    key = {
        "settings": store.fingerprint(settings),
        "code": hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest(),
        "seed": seed,
    }
    model = store.resumed(
        folder / name / "model", key, lambda part: module.train_model(settings, seed, part, threads=1)
    )
    saes = store.resumed(folder / name / "saes", key, lambda part: module.train_saes(settings, model, seed, part))
    return [model, saes]


def specimens(seed: int, folder: Path, n_jobs: int = 2) -> list[Path]:
    """Both specimens below `folder`, one process and one thread each, so that their bytes depend on the seed alone."""
    done = parallel.shards(partial(_specimen, seed, folder), SOURCES, n_jobs, threads=1, desc="specimens")
    return [piece for pieces in done for piece in pieces]


def build(seed: int = 0) -> Path:
    """Make `data/embedded` anew from `seed`; a build that was killed goes on where it stopped."""
    part = DATA / "scratch" / f"world-{seed}"
    for piece in specimens(seed, part):
        with store.writing(EMBEDDED / piece.relative_to(part)) as target:
            shutil.copytree(piece, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("key"))
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
    return {path.parent.name: path.parent for path in sorted(saes_folder(specimen, root).glob("*/cfg.json"))}
