"""Build the embedded world: every piece resumable in a scratch folder, all of it put in place at the end."""

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from sae_research import store
from sae_research.paths import DATA, EMBEDDED

SPECIMENS = ("text", "survey")


def _recipe(seed: int, threads: int) -> dict[str, str]:
    """What the pieces depend on; a killed build goes on only with the same settings and the same code."""
    from sae_research import training
    from sae_research.world import survey, text

    sources = [*sorted(Path(__file__).parent.glob("*.py")), Path(training.__file__)]
    return {
        "text": store.fingerprint(text.TextSettings()),
        "survey": store.fingerprint(survey.SurveySettings()),
        "code": hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest(),
        "seed": str(seed),
        "threads": str(threads),
    }


def pieces(seed: int, folder: Path, threads: int = 2) -> Iterator[Path]:
    """Build (or take up again) model and SAEs of each specimen below `folder`, yielding each as it is done."""
    from sae_research.world import survey, text

    key = _recipe(seed, threads)
    for name, module, settings in (("survey", survey, survey.SurveySettings()), ("text", text, text.TextSettings())):
        model = folder / name / "model"
        yield store.resumed(model, key, lambda part, m=module, s=settings: m.train_model(s, seed, part, threads))
        yield store.resumed(
            folder / name / "saes",
            key,
            lambda part, m=module, s=settings, model=model: m.train_saes(s, model, seed, part),
        )


def build(seed: int = 0, threads: int = 2) -> Path:
    """Make `data/embedded` anew from `seed`; a build that was killed goes on where it stopped."""
    import torch

    torch.set_num_threads(threads)
    part = DATA / "scratch" / f"world-{seed}"
    done = list(pieces(seed, part, threads))
    for piece in done:
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
