"""Where things live; every path is absolute, so the working folder never matters."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARAMS = ROOT / "params.yaml"
CLAIMS = ROOT / "claims.yaml"
CONSTRAINTS = ROOT / "constraints.txt"
NOTEBOOKS = ROOT / "notebooks"
DATA = ROOT / "data"
EMBEDDED = DATA / "embedded"
REAL_SAES = DATA / "real_saes"
"""SAEs of real models that were trained here: `<model>/<role>`, in SAELens format."""
CACHE = Path(os.environ.get("SAE_RESEARCH_CACHE") or DATA / "cache").expanduser().resolve()
"""What can be fetched or made again: real models, their text and residuals."""
ASIDE = "SAE_RESEARCH_ASIDE"
"""The environment variable that names the folder for results of a notebook that still runs."""


def study_data(profile: str, study: str) -> Path:
    """Folder of a study's results in a profile; large artefacts go to its `artefacts` subfolder."""
    return DATA / profile / study


def artefacts(profile: str, study: str) -> Path:
    """Folder of a study's artefacts, cached by DVC and not by git."""
    return study_data(profile, study) / "artefacts"


def figures(profile: str, study: str) -> Path:
    """Folder of a study's figures."""
    return ROOT / "figures" / profile / study


def aside(path: Path) -> Path:
    """Where to write what git keeps: beside `path` while a stage runs, so that one that fails or is
    killed leaves the committed results as they were; `notebooks.run` puts all in place at the end.
    """
    folder = os.environ.get(ASIDE)
    if not folder or not path.is_relative_to(ROOT):
        return path
    return Path(folder) / path.relative_to(ROOT)


def executed(profile: str) -> Path:
    """Folder of the executed notebooks of a profile."""
    return NOTEBOOKS / "executed" / profile


def scratch(profile: str, name: str) -> Path:
    """Folder for a notebook's resumable work; emptied when the notebook succeeds."""
    return DATA / "scratch" / profile / name


def relative(path: Path) -> str:
    """`path` as shown to readers: from the repository root if below it, else its last part."""
    path = Path(path)
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
