"""The study runner: pure tasks, shards that survive a kill, and none that outlives what made it."""

import ast
import sys
import types
from dataclasses import replace

import pandas as pd
import pytest
import torch

from sae_research import config, dependencies, hub, paths, store
from sae_research.errors import ResearchError
from sae_research.studies import runner
from sae_research.studies.runner import Result

MODULE = "sae_research.studies.counted.study"


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """A study that counts how often each task ran, and a profile that has it."""
    ran = []
    module = types.ModuleType(MODULE)

    def run(task, profile):
        ran.append(task["seed"])
        if task["seed"] == module.stop_at:
            raise KeyboardInterrupt
        table = pd.DataFrame({"x": [task["seed"] + profile.counted.start + 1e-17, 1 / 3]})
        tensors = {"t": torch.tensor([1.0])}
        return Result({"t": table}, {"half": 0.5}, tensors, {"more/note.txt": b"hello"})

    run.__module__ = MODULE
    module.run = run
    module.tasks = lambda profile: [{"seed": seed} for seed in range(3)]
    module.stop_at = None

    @config.settings
    class Settings:
        """Settings."""

        start: int = 0
        """Where to start."""

    monkeypatch.setitem(sys.modules, MODULE, module)
    monkeypatch.setattr(paths, "DATA", tmp_path)
    monkeypatch.setattr(dependencies, "code_fingerprint", lambda name: module.code)
    module.code = "as written"
    runtime = replace(config.Runtime(), device="cpu", threads=1)
    profile = config.Profile("p", runtime, studies={"counted": Settings()})
    return module, profile, ran


def test_results_are_published_with_their_tasks_and_read_back(counted, tmp_path):
    _, profile, ran = counted
    found = runner.run_study("counted", profile)[""]
    assert ran == [0, 1, 2]
    assert list(found.tables["t"].columns) == ["seed", "x"]
    assert found.tables["t"]["x"].tolist() == [0, 0.333333, 1, 0.333333, 2, 0.333333]
    assert found.facts["results"][1] == {"seed": 1, "half": 0.5}
    text = (tmp_path / "p" / "counted" / "artefacts" / "t.csv").read_text()
    assert "e-1" not in text  # rounding noise is zero
    again = runner.read("p", "counted")[""]
    assert again.tables["t"].equals(found.tables["t"])


def test_finished_tasks_survive_a_stop_and_a_change_of_n_jobs(counted):
    module, profile, ran = counted
    module.stop_at = 2
    with pytest.raises(KeyboardInterrupt):
        runner.run_study("counted", profile)
    module.stop_at = None
    others = replace(profile, runtime=replace(profile.runtime, n_jobs=2, threads=2))
    monkey = runner.parallel.shards

    def in_this_process(function, items, n_jobs, **rest):
        return monkey(function, items, 1, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner.parallel, "shards", in_this_process)
        runner.run_study("counted", others)
    assert ran == [0, 1, 2, 2]


@pytest.mark.parametrize("change", ["code", "setting", "dtype", "library"])
def test_no_shard_outlives_what_made_it(counted, change, monkeypatch):
    module, profile, ran = counted
    runner.run_study("counted", profile)
    if change == "code":
        module.code = "mended"
    elif change == "setting":
        settings = replace(profile.counted, start=5)
        profile = replace(profile, studies={"counted": settings})
    elif change == "dtype":
        profile = replace(profile, runtime=replace(profile.runtime, dtype="float32"))
    else:
        monkeypatch.setattr(dependencies, "library_versions", lambda: {"torch": "99"})
    runner.run_study("counted", profile)
    assert ran == [0, 1, 2] * 2


def test_data_files_are_part_of_the_key(counted, tmp_path):
    module, profile, ran = counted
    data = tmp_path / "answers.csv"
    data.write_text("a")
    module.data_files = lambda task, profile: [data]
    runner.run_study("counted", profile)
    data.write_text("b")
    runner.run_study("counted", profile)
    assert ran == [0, 1, 2] * 2


def test_another_revision_of_a_hub_model_is_another_key(counted, tmp_path, monkeypatch):
    module, profile, ran = counted
    module.tasks = lambda profile: [{"seed": 0, "model": "gpt2-small"}]
    for commit, of_saes in (("aaa", "1"), ("aaa", "1"), ("bbb", "1"), ("bbb", "2")):
        monkeypatch.setattr(
            hub, "download", lambda model, commit=commit, **_: tmp_path / model / commit
        )
        monkeypatch.setattr(hub, "sae_commit", lambda release, of_saes=of_saes: of_saes)
        runner.run_study("counted", profile)
    assert ran == [0, 0, 0]


def test_a_revision_that_cannot_be_looked_up_says_what_to_do():
    with pytest.raises(ResearchError, match="not on this machine and the hub cannot be reached"):
        hub.sae_commit("gpt2-small-res-jb")


def test_results_keep_tables_tensors_and_files(tmp_path):
    given = Result(
        {"a": pd.DataFrame({"x": [0.1 + 0.2]})},
        {"n": 3},
        {"w": torch.eye(2)},
        {"deep/er.bin": b"\x00\x01"},
        {"seed": 1},
    )
    given.save(tmp_path)
    again = runner.load_result(tmp_path)
    assert again.tables["a"].equals(given.tables["a"])  # unrounded: the next phase sees it all
    assert torch.equal(again.tensors["w"], given.tensors["w"])
    assert (again.facts, again.files, again.task) == (given.facts, given.files, given.task)


@pytest.mark.parametrize("study", ["opinion_qa", "side_effects"])
def test_the_key_covers_every_module_that_a_study_rests_on(study, tmp_path, monkeypatch):
    """Each file is changed in turn; the fingerprint of the study must change with it."""
    name = f"sae_research.studies.{study}.study"
    files = dependencies.source_files([ast.parse(f"import {name}")])
    shown = {dependencies.relative(path) for path in files}
    assert {f"sae_research/{m}.py" for m in ("models", "saes", "steering", "model_tail")} <= shown
    before = dependencies.code_fingerprint(name)
    content = {path: path.read_bytes() for path in files}
    whole = type(paths.ROOT).read_bytes
    for changed in files:
        monkeypatch.setattr(
            type(paths.ROOT),
            "read_bytes",
            lambda path, changed=changed: content.get(path, b"") + b"#" * (path == changed),
        )
        assert dependencies.code_fingerprint(name) != before, changed
    monkeypatch.setattr(type(paths.ROOT), "read_bytes", whole)
    assert dependencies.code_fingerprint(name) == before


def test_published_artefacts_are_checked_when_they_are_read(counted, tmp_path):
    _, profile, _ = counted
    runner.run_study("counted", profile)
    path = tmp_path / "p" / "counted" / "artefacts" / "t.csv"
    path.write_text(path.read_text().replace("0.333333", "0.333334"))
    with pytest.raises(Exception, match=r"t.csv does not match its checksum"):
        runner.read("p", "counted")
    assert store.CHECKSUMS
