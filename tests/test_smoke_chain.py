"""The real chain on the smoke profile, through DVC and then nbval; a file of its own runs beside
others.
"""

import re
import shutil
import subprocess
import sys

import pytest
from workspace import copied

from sae_research import notebooks, store

pytestmark = pytest.mark.slow
SMOKE = ("reproduce", "--profile", "smoke")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A working copy after its smoke chain."""
    copy = copied(tmp_path_factory.mktemp("smoke"))
    copy.commit()
    stale = subprocess.run(
        [sys.executable, "-m", "dvc", "status", "world"],
        cwd=copy.root,
        env=copy.env,
        capture_output=True,
        text=True,
    )
    assert "up to date" in stale.stdout, (
        f"data/embedded is not what its code makes: `dvc repro world`\n{stale.stdout}"
    )
    copy.printed = copy.run(*SMOKE)
    return copy


def test_the_smoke_chain_runs_every_notebook(smoke):
    assert re.findall(r"(?m)^\[\d+/\d+\] (\w+) ", smoke.printed) == notebooks.names()
    assert "nothing ran" in smoke.run(*SMOKE)


def test_nbval_finds_the_smoke_notebooks_unchanged_and_their_files_too(smoke):
    for folder in smoke.root.glob("data/smoke/*/artefacts"):
        if not (folder / "README.md").is_file():  # a page that says that a study was left out
            shutil.rmtree(folder)
    print(smoke.run("validate", "--profile", "smoke"))
    for stamp in smoke.root.glob("data/smoke/runs/*.json"):
        for name, checksum in store.read_json(stamp).items():
            same = name.startswith("notebooks/") or store.sha256(smoke.root / name) == checksum
            assert same, f"{name} came out differently in a second run"
