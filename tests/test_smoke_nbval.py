"""nbval on the notebooks of the smoke chain, once that has run."""

import shutil

import pytest
import smoke

from sae_research import store

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A working copy after its smoke chain."""
    return smoke.make(tmp_path_factory)


def test_nbval_finds_the_smoke_notebooks_unchanged_and_their_files_too(copy):
    for folder in copy.root.glob("data/smoke/*/artefacts"):
        if not (folder / "README.md").is_file():  # a page that says that a study was left out
            shutil.rmtree(folder)
    print(copy.run("validate", "--profile", "smoke"))
    for stamp in copy.root.glob("data/smoke/runs/*.json"):
        for name, checksum in store.read_json(stamp).items():
            same = name.startswith("notebooks/") or store.sha256(copy.root / name) == checksum
            assert same, f"{name} came out differently in a second run"
