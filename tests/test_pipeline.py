"""The chain as a reader runs it: in a working copy, through DVC, killed, resumed, forced, without git."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml
from tiny_study import alone_in, notebook
from workspace import Workspace, copied

from sae_research import notebooks, store

pytestmark = pytest.mark.slow

RESULTS = (
    "data/smoke/**/claims.json",
    "data/smoke/*/artefacts/*",
    "figures/smoke/**/*",
    "notebooks/executed/smoke/*",
)
CHAIN = ["60_tiny_run", "61_tiny_results", "62_other", "90_claims"]
SMOKE = ("reproduce", "--profile", "smoke")


def ran(printed):
    """Names of the notebooks that ran, in order."""
    return re.findall(r"(?m)^\[\d+/\d+\] (\w+) ", printed)


def configure(copy, study, **settings):
    """Set a study's block of the smoke profile."""
    params = yaml.safe_load((copy.root / "params.yaml").read_text())
    params["profiles"]["smoke"][study] = settings
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
    """A working copy with two small studies, run once."""
    copy = alone_in(copied(tmp_path_factory.mktemp("tiny")))
    copy.commit()
    copy.first = copy.run(*SMOKE)
    copy.results = copy.files(*RESULTS)
    return copy


def test_a_study_is_added_by_module_notebooks_settings_claims_and_stages(tiny):
    assert ran(tiny.first) == CHAIN
    assert {f"notebooks/executed/smoke/{name}.ipynb" for name in CHAIN} < set(tiny.results)
    assert "tiny.mean" in tiny.first
    assert re.search(r"other.real .*not testable here", tiny.first)
    assert (tiny.root / "data/embedded/world.txt").exists()


def test_another_profile_leaves_the_default_one_as_it_was(tiny):
    assert yaml.safe_load((tiny.root / "params.yaml").read_text())["profile"] == "cpu"
    changed = tiny.call("git", "status", "--porcelain").splitlines()
    assert sorted(changed) == ["?? data/", "?? dvc.lock"]
    assert set(yaml.safe_load((tiny.root / "dvc.lock").read_text())["stages"]) == {"world"}


def test_a_second_run_does_nothing_within_five_seconds(tiny):
    def worked():
        """Processor seconds of the processes that ended: other work on the machine does not count."""
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = worked()
    assert "nothing ran" in tiny.run(*SMOKE)
    assert worked() - before < 5


def test_a_forced_run_gives_the_same_bytes(tiny):
    assert ran(tiny.run(*SMOKE, "--force")) == CHAIN
    assert tiny.files(*RESULTS) == tiny.results


@pytest.mark.parametrize("victim", ["pipeline", "everything", "kernel"])
def test_a_killed_run_is_finished_by_the_next_one_with_the_same_results(tiny, victim):
    configure(tiny, "tiny", attempt=len(victim))
    scratch, hold = tiny.root / "data/scratch/smoke/60_tiny_run", tiny.root / "hold"
    hold.touch()
    process = tiny.start(*SMOKE)
    until((scratch / "1").exists)
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
    kept = (scratch / "0/x.npy").stat().st_mtime_ns
    again = tiny.start(*SMOKE)
    until(
        lambda: (
            {p.suffix[1:] for p in scratch.glob(".partial-2.*")}
            & {str(p.pid) for p in alive_in(tiny)}
        )
    )
    assert (scratch / "0/x.npy").stat().st_mtime_ns == kept, "finished work was done again"
    hold.unlink()
    assert ran(tiny.ended(again))[0] == "60_tiny_run"
    assert tiny.files(*RESULTS) == tiny.results
    assert not scratch.exists()
    assert yaml.safe_load((tiny.root / "params.yaml").read_text())["profile"] == "cpu"


def test_what_a_kill_leaves_of_dvc_does_not_block_the_next_run(tiny):
    ended = subprocess.Popen(["true"])
    ended.wait()
    writer = f'{{"write": {{"{tiny.root}/data/smoke/claims.json": {{"pid": {ended.pid}, "cmd": "repro"}}}}}}'
    for left in (writer, writer[:20]):
        (tiny.root / ".dvc/tmp/rwlock").write_text(left)
        (tiny.root / "dvc.lock").write_text("schema: '2.0'\nstages:\n  world:\n    cmd: [")
        assert "nothing ran" in tiny.run(*SMOKE)
        assert set(yaml.safe_load((tiny.root / "dvc.lock").read_text())["stages"]) == {"world"}


def test_a_truncated_artefact_is_named_and_then_mended(tiny):
    damaged = tiny.root / "data/smoke/tiny/artefacts/x.npy"
    damaged.chmod(0o644)
    damaged.write_bytes(damaged.read_bytes()[:-8])
    printed = tiny.run("run", "61_tiny_results", "--profile", "smoke", rc=1)
    assert "data/smoke/tiny/artefacts/x.npy does not match its checksum" in printed
    tiny.run(*SMOKE)
    assert tiny.files(*RESULTS) == tiny.results


def test_results_from_a_zip_without_git_are_the_same_in_another_folder(tiny, tmp_path):
    names = {
        *tiny.call("git", "ls-files").split(),
        *tiny.results,
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
    for line in ("claims: 3 as committed", "figures: 7 as committed", "notebooks: 4 as committed"):
        assert f"\n{line}\n" in printed
    assert copy.files(*RESULTS) == tiny.results


def test_nbval_compares_outputs(tiny):
    assert re.search(r"\b18 passed", tiny.run("validate", "--profile", "smoke"))
    assert tiny.files(*RESULTS) == tiny.results
    name = "notebooks/executed/smoke/61_tiny_results.ipynb"
    tiny.edit(name, '"0.535\\n"', '"0.536\\n"')
    assert "Cell outputs differ" in tiny.run("validate", "--profile", "smoke", rc=1)
    (tiny.root / name).write_bytes(tiny.results[name])


def test_a_failing_notebook_is_told_in_one_sentence(tiny):
    source = tiny.root / "notebooks/62_other.ipynb"
    good = source.read_text()
    source.write_text(notebook('raise ValueError("something is odd")\n'))
    printed = tiny.run(*SMOKE, rc=1)
    assert re.search(
        r"(?m)^notebook 62_other failed in cell \[\d\]: ValueError: something is odd", printed
    )
    assert "Traceback" not in printed
    assert (tiny.root / "data/scratch/smoke/62_other/62_other.ipynb").exists()
    source.write_text(good)
    tiny.run(*SMOKE)
    assert tiny.files(*RESULTS) == tiny.results


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


def test_a_changed_setting_reruns_its_study_and_the_claims(tiny):
    configure(tiny, "other", size=4)
    assert ran(tiny.run(*SMOKE)) == ["62_other", "90_claims"]


def test_a_changed_default_reruns_its_study_and_the_claims(tiny):
    tiny.edit("sae_research/config.py", "mean: float = 0.5", "mean: float = 0.6")
    assert ran(tiny.run(*SMOKE)) == ["60_tiny_run", "61_tiny_results", "90_claims"]


def test_changed_code_and_a_changed_claim_rerun_their_stages_and_nothing_whose_inputs_came_out_the_same(
    tiny,
):
    tiny.edit("sae_research/studies/tiny.py", "All pieces,", "Every piece,")
    tiny.edit("claims.yaml", "{expect: at least, threshold: 3,", "{expect: at least, threshold: 9,")
    printed = tiny.run(*SMOKE)
    assert ran(printed) == ["60_tiny_run", "62_other", "90_claims"]
    assert re.search(r"other.size .*not reproduced", printed)


# The real chain on the smoke profile.


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
    assert ran(smoke.printed) == notebooks.names()
    assert "nothing ran" in smoke.run(*SMOKE)


def test_nbval_finds_the_smoke_notebooks_unchanged_and_their_files_too(smoke):
    for folder in smoke.root.glob("data/smoke/*/artefacts"):
        shutil.rmtree(folder)
    print(smoke.run("validate", "--profile", "smoke"))
    for stamp in smoke.root.glob("data/smoke/runs/*.json"):
        for name, checksum in store.read_json(stamp).items():
            same = name.startswith("notebooks/") or store.sha256(smoke.root / name) == checksum
            assert same, f"{name} came out differently in a second run"
