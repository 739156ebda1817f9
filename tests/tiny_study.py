"""A whole study in about a hundred lines, added to a working copy by the four steps of
CONTRIBUTING.md. It stands in for the real ones where a test is about the pipeline.
"""

import re
import shutil

import nbformat
from workspace import Workspace

from sae_research import notebooks

# Step 1: a folder with settings, the work, and what is found

SETTINGS = '''"""Settings of a study of random numbers."""

from typing import ClassVar

from sae_research.config import settings


@settings
class Settings:
    """Means of random numbers."""

    ORDER: ClassVar[int] = 9
    RENAMED: ClassVar[dict[str, str]] = {"middle": "mean"}

    mean: float = 0.5
    """Their mean."""
    tasks: int = 4
    """Pieces, each resumable."""
    attempt: int = 0
    """Nothing; a change runs the study again."""
'''

STUDY = '''"""Means of random numbers, one task per seed."""

import time

import numpy as np
import pandas as pd

from sae_research import paths
from sae_research.studies.runner import Result


def tasks(profile) -> list[dict]:
    """One per seed."""
    return [{"seed": seed} for seed in range(profile.tiny.tasks)]


def run(task, profile) -> Result:
    """Draw numbers."""
    while task["seed"] == 2 and (paths.ROOT / "hold").exists():  # a test stops it here
        time.sleep(0.05)
    x = np.random.default_rng(task["seed"]).normal(profile.tiny.mean, 1, 50)
    return Result({"numbers": pd.DataFrame({"x": x})}, {"mean": float(x.mean())})
'''

FINDINGS = '''"""What the claims measure."""

from sae_research.claims import Measurement


def measure_claims(results) -> dict:
    """Measurements by claim."""
    x = results[""].tables["numbers"]["x"]
    half = 2 * x.std() / len(x) ** 0.5
    mean = Measurement(x.mean(), x.mean() - half, x.mean() + half, len(x))
    return {"tiny.draws.mean": mean, "tiny.draws.real": None}
'''

# Step 2: a block in params.yaml (here an empty one in each profile) and one in claims.yaml

CLAIMS = """tiny:
  - id: tiny.draws.mean
    statement: The mean is positive.
    measure: the mean
    rule: {expect: above, threshold: 0}
    unit: draws
    family: draws
    no_control: a sum has no ingredient to remove
  - id: tiny.draws.real
    statement: It is real.
    measure: the mean
    rule: {expect: above, threshold: 0}
    needs: real weights
    unit: draws
    family: draws
    no_control: a sum has no ingredient to remove
"""

# Step 3: a notebook that runs and one that judges

RUN = """import sys

from sae_research import config, paths
from sae_research.studies import runner
---
results = runner.run_study("tiny", config.load(profile))
---
print("noise that differs", id(results), file=sys.stderr)
print(len(results[""].tables["numbers"]), "numbers", object(), paths.ROOT / "data")
"""

RESULTS = """from sae_research import claims, figures, paths
from sae_research.studies import runner
from sae_research.studies.tiny import findings
---
results = runner.read(profile, "tiny")
figure, axes = figures.canvas("Numbers are positive", x="number")
axes.hist(results[""].tables["numbers"]["x"])
path = figures.save(figure, paths.figures(profile, "tiny"), "numbers")
measured = findings.measure_claims(results)
print(f"{measured['tiny.draws.mean'].value:.3f}")
---
claims.record(profile, "tiny", "61_tiny_results", measured)
"""

# What follows makes a working copy small; it is no part of adding a study.

BUILD = '''"""Toy models of one file."""

from sae_research import paths, store


def build() -> None:
    """Write it."""
    with store.writing(paths.EMBEDDED / "tiny") as folder:
        (folder / "world.txt").write_text("a small world\\n")
'''


def notebook(text: str) -> str:
    """The source of a notebook from its cells."""
    stated = nbformat.v4.new_code_cell('profile = "cpu"', metadata={"tags": ["parameters"]})
    cells = [nbformat.v4.new_code_cell(cell.strip()) for cell in text.split("---\n")]
    made = nbformat.v4.new_notebook(cells=[stated, *cells])
    return nbformat.writes(notebooks.cleared(made)) + "\n"


def configure(copy: Workspace, **settings) -> None:
    """Set the study's block in every profile of params.yaml."""
    params = copy.root / "params.yaml"
    text = re.sub(r"(?m)^    tiny: .*\n", "", params.read_text())
    params.write_text(re.sub(r"(?m)^(    runtime: .*\n)", rf"\1    tiny: {settings}\n", text))


def add_study(copy: Workspace) -> None:
    """The four steps but for the run."""
    folder = copy.root / "sae_research/studies/tiny"
    folder.mkdir()
    sources = {"__init__": '"""Random numbers."""\n', "settings": SETTINGS, "study": STUDY}
    for name, text in {**sources, "findings": FINDINGS}.items():
        (folder / f"{name}.py").write_text(text)
    configure(copy)
    with (copy.root / "claims.yaml").open("a") as file:
        file.write(CLAIMS)
    for name, cells in (("60_tiny_run", RUN), ("61_tiny_results", RESULTS)):
        (copy.root / f"notebooks/{name}.ipynb").write_text(notebook(cells))
    copy.run("stages", "--write")


def alone_in(copy: Workspace) -> Workspace:
    """Replace the studies and toy models of a working copy by this small study."""
    for path in (copy.root / "notebooks").glob("[0-9]*.ipynb"):
        if path.stem != "90_claims":
            path.unlink()
    for folder in ("data", "figures", "notebooks/executed"):
        shutil.rmtree(copy.root / folder, ignore_errors=True)
    (copy.root / "dvc.lock").unlink(missing_ok=True)
    (copy.root / "claims.yaml").write_text("")
    (copy.root / "sae_research/world/build.py").write_text(BUILD)
    add_study(copy)
    return copy
