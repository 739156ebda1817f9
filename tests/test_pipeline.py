"""The chain as a reader runs it: in a working copy, killed, resumed, forced, without git."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml
from dvc.utils.serialize import dump_yaml
from tiny_study import alone_in, notebook
from workspace import Workspace, copied

from sae_research import pipeline

pytestmark = pytest.mark.slow

FILES = (
    "data/smoke/**/claims.json",
    "data/smoke/*/artefacts/**/*",
    "figures/smoke/**/*",
    "notebooks/executed/smoke/*",
)
CHAIN = ["60_tiny_run", "61_tiny_results", "90_claims"]
SMOKE = ("reproduce", "--profile", "smoke")


def ran(printed):
    """Names of the notebooks that ran, in order."""
    return re.findall(r"(?m)^\[\d+/\d+\] (\w+) ", printed)


def configure(copy, block, **settings):
    """Change settings in a block of the smoke profile."""
    params = yaml.safe_load((copy.root / "params.yaml").read_text())
    params["profiles"]["smoke"][block].update(settings)
    (copy.root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


def alive_in(copy):
    """Processes that work in a copy."""
    found = []
    for process in psutil.process_iter():
        try:
            if (
                process.cwd().startswith(str(copy.root))
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(process)
        except psutil.Error:
            continue
    return found


def until(condition, seconds=300):
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A working copy with one small study, added as CONTRIBUTING.md says and run once."""
    copy = alone_in(copied(tmp_path_factory.mktemp("tiny")))
    copy.commit()
    copy.first = copy.run(*SMOKE)
    copy.results = copy.files(*FILES)
    return copy


def shards(copy):
    """When each finished task was written, by seed."""
    folders = (copy.root / "data/scratch/smoke/tiny").glob("run-*")
    return {f.name.split("-")[1]: (f / "numbers.csv").stat().st_mtime_ns for f in folders}


def waits(copy):
    """Whether a living process is at the task that the file `hold` stops."""
    parts = (copy.root / "data/scratch/smoke/tiny").glob(".partial-run-2-*")
    return bool({p.suffix[1:] for p in parts} & {str(p.pid) for p in alive_in(copy)})


@pytest.fixture
def hold(tiny):
    """While this file is there, the study waits in its third task."""
    path = tiny.root / "hold"
    path.touch()
    yield path
    path.unlink(missing_ok=True)


def test_a_study_is_added_in_four_steps(tiny):
    assert ran(tiny.first) == CHAIN
    assert {f"notebooks/executed/smoke/{name}.ipynb" for name in CHAIN} < set(tiny.results)
    assert re.search(r"tiny.draws.mean .*reproduced", tiny.first)
    assert re.search(r"tiny.draws.real .*not testable here", tiny.first)
    assert (tiny.root / "data/embedded/tiny/world.txt").exists()


def test_another_profile_leaves_the_default_one_as_it_was(tiny):
    assert yaml.safe_load((tiny.root / "params.yaml").read_text())["profile"] == "cpu"
    changed = tiny.call("git", "status", "--porcelain").splitlines()
    assert sorted(changed) == ["?? data/", "?? dvc.lock"]
    assert set(yaml.safe_load((tiny.root / "dvc.lock").read_text())["stages"]) == {"world"}


def test_a_second_run_does_nothing_and_soon_ends(tiny):
    def worked():
        """Processor seconds of the processes that ended: other work does not count."""
        used = os.times()
        return used.children_user + used.children_system

    before = worked()
    assert "nothing ran" in tiny.run(*SMOKE)
    assert worked() - before < 12  # about five on an idle core


def test_a_forced_run_gives_the_same_bytes(tiny):
    assert ran(tiny.run(*SMOKE, "--force")) == CHAIN
    assert tiny.files(*FILES) == tiny.results


@pytest.mark.parametrize(
    ("victim", "change"), [("everything", "nothing"), ("kernel", "n_jobs"), ("pipeline", "code")]
)
def test_a_killed_run_is_finished_by_the_next_one_with_the_same_results(tiny, hold, victim, change):
    configure(tiny, "tiny", attempt=len(victim))
    configure(tiny, "runtime", n_jobs=1)
    process = tiny.start(*SMOKE)
    until(lambda: waits(tiny))
    if victim == "pipeline":
        assert "already running" in tiny.run(*SMOKE, rc=1)
        process.kill()
    elif victim == "everything":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        next(p for p in alive_in(tiny) if "ipykernel" in " ".join(p.cmdline())).kill()
    printed, _ = process.communicate(timeout=300)
    if victim == "kernel":
        assert process.returncode == 1
        assert "the kernel of notebook 60_tiny_run died" in printed
    else:
        assert process.returncode == -signal.SIGKILL
    until(lambda: not alive_in(tiny), 60)
    old = shards(tiny)
    assert set(old) == {"0", "1"}
    if change == "n_jobs":
        configure(tiny, "runtime", n_jobs=2)
    elif change == "code":
        # the study itself does not import it, but what it rests on does
        with (tiny.root / "sae_research/saes.py").open("a") as file:
            file.write("# changed\n")
    again = tiny.start(*SMOKE)
    until(lambda: waits(tiny))
    kept = {seed for seed, when in shards(tiny).items() if when == old.get(seed)}
    assert kept == (set() if change == "code" else {"0", "1"})
    hold.unlink()
    assert ran(tiny.ended(again))[0] == "60_tiny_run"
    assert tiny.files(*FILES) == tiny.results
    assert yaml.safe_load((tiny.root / "params.yaml").read_text())["profile"] == "cpu"


def test_a_change_of_any_module_behind_a_study_changes_the_keys_of_its_tasks(tiny):
    program = """
import ast
from sae_research import dependencies
module = "sae_research.studies.tiny.study"
files = dependencies.source_files([ast.parse(f"import {module}")])
key = dependencies.code_fingerprint(module)
for path in sorted(files):
    text = path.read_text()
    path.write_text(text + "# changed\\n")
    assert dependencies.code_fingerprint(module) != key, path
    path.write_text(text)
print(*map(dependencies.relative, files))
"""
    files = tiny.call(sys.executable, "-c", program).split()
    stage = yaml.safe_load((tiny.root / "dvc.yaml").read_text())["stages"]["60_tiny_run"]
    for dep in stage["deps"]:
        assert not dep.startswith("sae_research") or any(f.startswith(dep) for f in files), dep


def test_a_lock_is_read_as_dvc_writes_it(tmp_path):
    stages = {"run": {"params": {"settings.json": {"on": "total", "lr": 1e-05, "no": None}}}}
    dump_yaml(tmp_path / "dvc.lock", {"schema": "2.0", "stages": stages})
    assert pipeline._read_lock(tmp_path / "dvc.lock") == stages


def test_what_a_kill_leaves_of_dvc_does_not_block_the_next_run(tiny):
    ended = subprocess.Popen(["true"])
    ended.wait()
    locked = {f"{tiny.root}/data/smoke/claims.json": {"pid": ended.pid, "cmd": "repro"}}
    writer = json.dumps({"write": locked})
    for left in (writer, writer[:20]):
        (tiny.root / ".dvc/tmp/rwlock").write_text(left)
        (tiny.root / "dvc.lock").write_text("schema: '2.0'\nstages:\n  world:\n    cmd: [")
        assert "nothing ran" in tiny.run(*SMOKE)
        assert set(yaml.safe_load((tiny.root / "dvc.lock").read_text())["stages"]) == {"world"}


def test_ctrl_c_between_two_stages_starts_no_further_one():
    code = """
import os, signal, subprocess, threading, time
from sae_research import pipeline
def stages(force):
    time.sleep(1)  # DVC compares checksums
    return subprocess.run(["sleep", "30"]).returncode
pipeline._run_stages = stages
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits none
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
begun = time.monotonic()
try:
    pipeline._dvc(False)
except KeyboardInterrupt:
    print(time.monotonic() - begun)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 20


def test_a_truncated_artefact_is_named_and_then_mended(tiny):
    damaged = tiny.root / "data/smoke/tiny/artefacts/numbers.csv"
    damaged.chmod(0o644)
    damaged.write_bytes(damaged.read_bytes()[:-8])
    printed = tiny.run("run", "61_tiny_results", "--profile", "smoke", rc=1)
    assert "data/smoke/tiny/artefacts/numbers.csv does not match its checksum" in printed
    tiny.run(*SMOKE)
    assert tiny.files(*FILES) == tiny.results


def test_results_from_a_zip_without_git_are_the_same_in_another_folder(tiny, tmp_path):
    names = {
        *tiny.call("git", "ls-files").split(),
        *tiny.results,
        *tiny.files("data/embedded/**/*"),
        "data/smoke/dvc.lock",
        "dvc.lock",
    }
    for name in sorted(n for n in names if "/artefacts/" not in n):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(tiny.root / name, tmp_path / name)
    copy = Workspace(tmp_path)
    tools = tmp_path.parent / "tools"
    tools.mkdir()
    for tool in ("sh", "bash"):
        (tools / tool).symlink_to(shutil.which(tool))
    copy.env["PATH"] = str(tools)  # a machine without git
    printed = copy.run(*SMOKE)
    assert ran(printed) == CHAIN, "a fresh folder must run everything again"
    for line in ("claims: 2 as committed", "figures: 4 as committed", "notebooks: 3 as committed"):
        assert f"\n{line}\n" in printed
    assert copy.files(*FILES) == tiny.results


def test_nbval_compares_outputs(tiny):
    """Only the altered cell is told; that all pass unaltered is what test_smoke_nbval.py shows."""
    name = "notebooks/executed/smoke/61_tiny_results.ipynb"
    text = (tiny.root / name).read_text()
    altered = re.sub(r'"0\.\d{3}\\n"', r'"0.999\\n"', text)
    assert altered != text
    (tiny.root / name).write_text(altered)
    printed = tiny.run("validate", "--profile", "smoke", rc=1)
    assert "Cell outputs differ" in printed
    assert re.search(r"\b1 failed, \d+ passed", printed)
    (tiny.root / name).write_bytes(tiny.results[name])
    assert tiny.files(*FILES) == tiny.results


def test_a_failing_notebook_is_told_in_one_sentence(tiny):
    source = tiny.root / "notebooks/61_tiny_results.ipynb"
    good = source.read_text()
    source.write_text(notebook('raise ValueError("something is odd")\n'))
    printed = tiny.run(*SMOKE, rc=1)
    failed = r"notebook 61_tiny_results failed in cell \[\d\]: ValueError: something is odd"
    assert re.search(f"(?m)^{failed}", printed)
    assert "Traceback" not in printed
    assert (tiny.root / "data/scratch/smoke/61_tiny_results/61_tiny_results.ipynb").exists()
    source.write_text(good)
    tiny.run(*SMOKE)
    assert tiny.files(*FILES) == tiny.results


def test_a_bad_name_is_told_in_one_sentence(tiny):
    for words, says in (
        (("reproduce", "--profile", "smok"), "did you mean 'smoke'?"),
        (("run", "90_claims", "--profile", "smok"), "did you mean 'smoke'?"),
        (("run", "90_claim"), "did you mean '90_claims'?"),
    ):
        printed = tiny.run(*words, rc=1)
        assert printed.count("\n") == 1
        assert says in printed


# These change the copy for good, so they come last; each expects what depends on its own change.


def test_a_changed_setting_reruns_its_study_and_no_other(tiny):
    configure(tiny, "side_effects", models=[])
    assert ran(tiny.run(*SMOKE)) == []
    tiny.edit("sae_research/studies/tiny/settings.py", "mean: float = 0.5", "mean: float = 0.6")
    assert ran(tiny.run(*SMOKE)) == CHAIN


def test_a_changed_claim_reruns_its_verdicts_alone(tiny):
    stated = "The mean is positive.\n    measure: the mean\n    rule: {expect: above, threshold: "
    tiny.edit("claims.yaml", f"{stated}0", f"{stated}9")
    printed = tiny.run(*SMOKE)
    assert ran(printed) == CHAIN[1:]
    assert re.search(r"tiny.draws.mean .*not reproduced", printed)
