"""Stages that fail, are stopped, killed or run out of disk: what git keeps stays as it was."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import yaml
from tiny_study import alone_in, notebook
from workspace import copied

from sae_research import config, notebooks
from sae_research.errors import ResearchError
from sae_research.world import build

pytestmark = [pytest.mark.slow, pytest.mark.faults]

KEPT = ("data/smoke/**/claims.json", "data/smoke/metrics.json", "data/smoke/settings.json")
KEPT += ("figures/smoke/**/*", "notebooks/executed/smoke/*")
SMOKE = ("reproduce", "--profile", "smoke")
HOLD = """
import time
---
while (paths.ROOT / "hold").exists():
    time.sleep(0.05)
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """One small study, run once, whose second notebook waits before its last cell if told to."""
    copy = alone_in(copied(tmp_path_factory.mktemp("tiny")))
    source = copy.root / "notebooks/61_tiny_results.ipynb"
    cells = json.loads(source.read_text())["cells"][1:]
    text = "---\n".join("".join(cell["source"]) + "\n" for cell in cells)
    drawn, _, last = text.rpartition("---\n")
    source.write_text(notebook(drawn + "---" + HOLD + "---\n" + last))
    copy.run("stages", "--write")
    copy.commit()
    copy.run(*SMOKE)
    copy.results = copy.files(*KEPT)
    assert {"figures/smoke/tiny/numbers.png", "data/smoke/tiny/claims.json"} <= set(copy.results)
    return copy


def start_and_wait(copy):
    """Start the chain and wait until the second notebook has drawn and stands before its end."""
    (copy.root / "hold").touch()
    copy.edit("notebooks/61_tiny_results.ipynb", "Numbers are ", "Numbers were ")
    process = copy.start(*SMOKE)
    drawn = copy.root / "data/scratch/smoke/61_tiny_results/aside/figures/smoke/tiny/numbers.svg"
    end = time.monotonic() + 240
    while not drawn.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)
    return process


def put_back(copy):
    """Undo the change; the next run is whole and ends with the first results."""
    (copy.root / "hold").unlink(missing_ok=True)
    copy.call("git", "checkout", "notebooks")
    copy.run(*SMOKE)
    assert copy.files(*KEPT) == copy.results


@pytest.mark.parametrize("how", ["kill all", "kill stage", "Ctrl-C to one"])
def test_a_stage_that_is_stopped_leaves_what_git_keeps(tiny, how):
    process = start_and_wait(tiny)
    begun = time.monotonic()
    if how == "kill all":
        os.killpg(process.pid, signal.SIGKILL)
    elif how == "kill stage":
        stages = psutil.Process(process.pid).children(recursive=True)
        next(p for p in stages if "run 61_tiny_results" in " ".join(p.cmdline())).kill()
    else:
        process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    assert tiny.files(*KEPT) == tiny.results, "results are gone or mixed"
    assert time.monotonic() - begun < 45
    if how == "kill stage":
        assert "killed from outside" in printed
    elif how == "Ctrl-C to one":
        assert "finished work is kept" in printed
        assert "Traceback" not in printed
    assert yaml.safe_load((tiny.root / "params.yaml").read_text())["profile"] in ("cpu", "smoke")
    put_back(tiny)


def test_a_cell_that_fails_leaves_what_git_keeps(tiny):
    source = tiny.root / "notebooks/61_tiny_results.ipynb"
    good = source.read_text()
    source.write_text(good.replace("import time", "raise ValueError('no')"))
    printed = tiny.run(*SMOKE, rc=1)
    assert "no" in printed
    assert tiny.files(*KEPT) == tiny.results
    source.write_text(good)
    tiny.run(*SMOKE)
    assert tiny.files(*KEPT) == tiny.results


def test_a_figure_that_is_no_longer_drawn_goes(tiny):
    (tiny.root / "figures/smoke/tiny/old.png").write_bytes(b"old")
    tiny.run("run", "61_tiny_results", "--profile", "smoke")
    assert tiny.files(*KEPT) == tiny.results


def test_a_notebook_that_does_not_write_its_results_is_told(tiny):
    source = tiny.root / "notebooks/61_tiny_results.ipynb"
    good = source.read_text()
    source.write_text(good.replace("claims.record(", "print("))
    printed = tiny.run("run", "61_tiny_results", "--profile", "smoke", rc=1)
    assert "did not write data/smoke/tiny/claims.json" in printed
    assert tiny.files(*KEPT) == tiny.results
    source.write_text(good)


@pytest.mark.parametrize("damage", ["byte", "stray", "code"])
def test_toy_models_are_rebuilt_only_if_asked(tiny, damage):
    world = tiny.root / "data/embedded/tiny/world.txt"
    before = world.read_bytes()
    code = tiny.root / "sae_research/world/build.py"
    stray = tiny.root / "data/embedded/notes.txt"
    if damage == "byte":
        world.write_bytes(b"A" + before[1:])
        words = "data/embedded/tiny/world.txt does not match its checksum"
    elif damage == "stray":
        stray.write_text("mine")
        words = "data/embedded/notes.txt is no part of the toy models"
    else:
        code.write_text(code.read_text() + "# changed\n")
        words = "data/embedded is made from changed (sae_research/world/build.py)"
    printed = tiny.run(*SMOKE, rc=1)
    assert words in printed
    assert printed.count("\n") == 1
    world.write_bytes(before)
    stray.unlink(missing_ok=True)
    if damage == "code":
        tiny.call("git", "checkout", "sae_research")
    for name in (".DS_Store", "tiny/config.json~"):
        (tiny.root / "data/embedded" / name).write_text("left by an editor")
    assert "nothing ran" in tiny.run(*SMOKE)


def test_clean_keeps_what_tells_delivered_results_from_own_ones(tiny):
    kept = tiny.root / ".reproduce/as-delivered/smoke/claims.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text("as delivered")
    rule = (tiny.root / "Makefile").read_text().partition("\nclean:")[2]
    assert ".reproduce" not in rule
    assert kept.exists()


@pytest.mark.parametrize("file", ["params.yaml", "claims.yaml", "dvc.yaml"])
def test_a_file_of_the_project_that_is_no_text_is_one_sentence(tiny, file):
    good = (tiny.root / file).read_bytes()
    (tiny.root / file).write_bytes(b"\xff\xfe" + good)
    for words in (("run", "61_tiny_results", "--profile", "smoke"), SMOKE):
        printed = tiny.run(*words, rc=1)
        assert f"{file} cannot be read" in printed
        assert words != SMOKE or printed.count("\n") == 1
        assert "Traceback" not in printed
    (tiny.root / file).write_bytes(good)


def test_a_full_disk_is_one_sentence_and_leaves_the_old_artefact(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("no right to mount a small file system")
    code = """
import sys
from pathlib import Path
from sae_research import errors, store
place = Path(sys.argv[1])
(place / "new").mkdir(); (place / "new" / "a").write_bytes(bytes(20_000))
store.install(place / "new", place / "figures")
before = (place / "figures" / "a").read_bytes()
def fill(path): return lambda: store.write_bytes(path, bytes(400_000))
def whole():
    with store.writing(place / "art") as part: (part / "b").write_bytes(bytes(400_000))
def copied():
    (place / "new" / "b").write_bytes(bytes(150_000))
    store.install(place / "new", place / "figures")
for write in (fill(place / "f"), whole, copied):
    try: write(); print("WRITTEN")
    except errors.ResearchError as error: print(error)
assert (place / "figures" / "a").read_bytes() == before
print(sorted(p.name for p in place.iterdir()))
"""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, str(disk)], capture_output=True, text=True, check=False
        )
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert done.returncode == 0, done.stderr
    *said, left = done.stdout.splitlines()
    assert len(said) == 3
    assert all("No space left on device; free disk space" in line for line in said), said
    assert left == "['figures', 'new']"


def test_a_build_of_the_toy_models_goes_on_after_its_last_whole_piece(tmp_path, monkeypatch):
    made, breaks_at = [], ("text", 1)

    def piece(name, seed, what, folder):
        if (name, seed) == breaks_at:
            raise MemoryError
        made.append((name, seed, what))
        (folder / str(what)).write_text(f"{name} {seed}")

    def recipe(name, seed):
        trained = SimpleNamespace(
            train_model=lambda settings, seed, folder: piece(name, seed, "model", folder),
            train_saes=lambda settings, model, seed, folder, hook_index: piece(
                name, seed, hook_index, folder
            ),
        )
        return trained, None, {"name": name, "seed": seed}

    monkeypatch.setattr(build, "_load_recipe", recipe)
    given = {"seeds": (0, 1), "n_jobs": 1, "root": tmp_path / "root", "scratch": tmp_path / "parts"}
    with pytest.raises(ResearchError, match="'text', 1"):
        build.build(**given)
    assert not (tmp_path / "root").exists()
    whole, breaks_at = list(made), None
    build.build(**given)
    assert whole == [("text", 0, "model"), ("survey", 0, "model")]
    assert len(made) == len(set(made)) == 8
    assert (build.saes_folder("survey", tmp_path / "root") / "1").is_file()


def test_a_kernel_that_dies_before_it_answers_is_one_sentence(tmp_path, monkeypatch):
    def die(*_, **__):
        raise RuntimeError("Kernel died before replying to kernel_info")

    monkeypatch.setattr("papermill.execute_notebook", die)
    with pytest.raises(ResearchError, match="the kernel of notebook 90_claims died"):
        notebooks._execute("90_claims", config.load("smoke"), tmp_path)
