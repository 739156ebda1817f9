"""Two studies of a few seconds, put into a working copy the way any study is added: module, notebooks, settings,
claims and stages. They stand in for the real ones where a test is about the pipeline and not about a study."""

import shutil

import nbformat
import yaml
from workspace import Workspace

from sae_research import notebooks

SETTINGS = '''@dataclass(frozen=True)
class Tiny:
    """Means of random numbers."""

    mean: float = 0.5
    """Their mean."""
    parts: int = 4
    """Pieces, each resumable."""
    attempt: int = 0
    """Nothing; a change runs the study again."""
    names: tuple[str, ...] = ("a", "b")
    """Nothing; a setting of this type."""


@dataclass(frozen=True)
class Other:
    """A second study, which must not run when the first changes."""

    size: int = 3
    """A number."""


'''

TINY = '''"""Means of random numbers, in resumable pieces."""

import time
from pathlib import Path

from sae_research import paths, store


def samples(settings, scratch: Path):
    """All pieces, those of a killed run included."""
    import numpy as np

    def build(part: Path, seed: int) -> None:
        while seed == 2 and (paths.ROOT / "hold").exists():  # how a test stops it in the middle
            time.sleep(0.05)
        np.save(part / "x.npy", np.random.default_rng(seed).normal(settings.mean, 1, 50))

    key = [settings.mean, settings.parts]
    made = [store.resumed(scratch / str(i), [*key, i], lambda part, i=i: build(part, i)) for i in range(settings.parts)]
    return np.concatenate([np.load(folder / "x.npy") for folder in made])
'''

RUN = """import sys

import numpy as np

from sae_research import config, paths, store
from tqdm.auto import tqdm
from sae_research.studies import tiny
---
settings = config.load(profile).tiny
for _ in tqdm(range(3), desc="nothing"):
    x = tiny.samples(settings, paths.scratch(profile, "60_tiny_run"))
with store.writing(paths.artefacts(profile, "tiny")) as folder:
    np.save(folder / "x.npy", x)
---
print("noise that differs", id(x), file=sys.stderr)
print(len(x), "numbers", object(), paths.ROOT / "data")
"""

RESULTS = """import numpy as np

from sae_research import claims, paths, store
---
x = np.load(store.verified(paths.artefacts(profile, "tiny")) / "x.npy")
half = 2 * x.std() / len(x) ** 0.5
store.write_text(paths.figures(profile, "tiny") / "mean.svg", f"<svg><title>{x.mean():.3f}</title></svg>\\n")
print(f"{x.mean():.3f}")
---
measured = claims.Measurement(x.mean(), x.mean() - half, x.mean() + half, len(x))
claims.record(profile, "tiny", "61_tiny_results", {"tiny.mean": measured})
"""

OTHER = """from sae_research import claims, config
---
size = config.load(profile).other.size
claims.record(profile, "other", "62_other", {"other.size": claims.Measurement(size), "other.real": None})
"""

CLAIMS = """tiny:
  - {id: tiny.mean, statement: The mean is positive., measure: the mean, rule: {expect: above, threshold: 0}}
other:
  - {id: other.size, statement: It is big., measure: size, rule: {expect: at least, threshold: 3, interval: false}}
  - {id: other.real, statement: It is real., measure: size, rule: {expect: above, threshold: 0}, needs: real weights}
"""

STAGES = """
  60_tiny_run:
    cmd: python -m sae_research run 60_tiny_run --profile ${profile}
    deps: [notebooks/60_tiny_run.ipynb, sae_research/studies/tiny.py, data/embedded]
    params:
      - data/${profile}/settings.json: [runtime, tiny]
    outs:
      - data/${profile}/runs/60_tiny_run.json
      - data/${profile}/tiny/artefacts
      - notebooks/executed/${profile}/60_tiny_run.ipynb: {cache: false}
  61_tiny_results:
    cmd: python -m sae_research run 61_tiny_results --profile ${profile}
    deps: [notebooks/61_tiny_results.ipynb, 'data/${profile}/tiny/artefacts']
    params:
      - claims.yaml: [tiny]
    outs:
      - data/${profile}/runs/61_tiny_results.json
      - data/${profile}/tiny/claims.json: {cache: false}
      - figures/${profile}/tiny: {cache: false}
      - notebooks/executed/${profile}/61_tiny_results.ipynb: {cache: false}
  62_other:
    cmd: python -m sae_research run 62_other --profile ${profile}
    deps: [notebooks/62_other.ipynb]
    params:
      - data/${profile}/settings.json: [other]
      - claims.yaml: [other]
    outs:
      - data/${profile}/runs/62_other.json
      - data/${profile}/other/claims.json: {cache: false}
      - notebooks/executed/${profile}/62_other.ipynb: {cache: false}
"""

BUILD = '''"""A world of one file."""

from sae_research import paths, store


def build() -> None:
    """Write it."""
    store.write_text(paths.EMBEDDED / "world.txt", "a small world\\n")
'''


def notebook(text: str) -> str:
    """The source of a notebook from its cells."""
    stated = nbformat.v4.new_code_cell('profile = "cpu"', metadata={"tags": ["parameters"]})
    cells = [nbformat.v4.new_code_cell(cell.strip()) for cell in text.split("---\n")]
    return (
        nbformat.writes(notebooks.cleared(nbformat.v4.new_notebook(cells=[stated, *cells]))) + "\n"
    )


def alone_in(copy: Workspace) -> Workspace:
    """Replace the studies and the world of a working copy by the two small ones."""
    stages = yaml.safe_load((copy.root / "dvc.yaml").read_text())["stages"]
    for path in (copy.root / "notebooks").glob("[0-9]*.ipynb"):
        if path.stem != "90_claims":
            path.unlink()
    for folder in ("data", "figures", "notebooks/executed"):
        shutil.rmtree(copy.root / folder, ignore_errors=True)
    (copy.root / "dvc.lock").unlink(missing_ok=True)
    (copy.root / "sae_research/world/build.py").write_text(BUILD)
    (copy.root / "sae_research/studies/tiny.py").write_text(TINY)
    for name, cells in (("60_tiny_run", RUN), ("61_tiny_results", RESULTS), ("62_other", OTHER)):
        (copy.root / f"notebooks/{name}.ipynb").write_text(notebook(cells))
    (copy.root / "claims.yaml").write_text(CLAIMS)
    copy.edit(
        "sae_research/config.py",
        "@dataclass(frozen=True)\nclass Profile:",
        f"{SETTINGS}@dataclass(frozen=True)\nclass Profile:",
    )
    added = "    tiny: Tiny = field(default_factory=Tiny)\n    other: Other = field(default_factory=Other)\n\n\nSTUDIES ="
    copy.edit("sae_research/config.py", "\n\nSTUDIES =", added)
    params = yaml.safe_load((copy.root / "params.yaml").read_text())
    for block in params["profiles"].values():
        block.update(tiny={}, other={})
    (copy.root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    kept = {**stages["world"], "deps": ["sae_research/world/build.py"]}
    ledgers = [f"data/${{profile}}/{study}/claims.json" for study in ("tiny", "other")]
    last = stages["90_claims"]
    last["deps"] = [d for d in last["deps"] if not d.endswith("/claims.json")] + ledgers
    made = {
        "world": kept,
        "settings": stages["settings"],
        **yaml.safe_load(STAGES),
        "90_claims": last,
    }
    (copy.root / "dvc.yaml").write_text(yaml.safe_dump({"stages": made}, sort_keys=False))
    return copy
