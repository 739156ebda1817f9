"""A lock belongs to one profile; what a killed run left is put back and nothing else is touched."""

import json

import pytest
import yaml

from sae_research import config, paths, pipeline
from sae_research.errors import ResearchError


def stages(profile):
    return {"90_claims": {"cmd": f"python -m sae_research run 90_claims --profile {profile}"}}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repository of three profiles with the default one's lock."""
    monkeypatch.setattr(paths, "DATA", tmp_path / "data")
    for module in (paths, config):
        monkeypatch.setattr(module, "PARAMS", tmp_path / "params.yaml")
    monkeypatch.setattr(pipeline, "LOCK", tmp_path / "dvc.lock")
    monkeypatch.setattr(pipeline, "STATE", tmp_path / ".reproduce")
    monkeypatch.setattr(pipeline, "_MARKER", tmp_path / ".reproduce" / "state.json", raising=False)
    (tmp_path / "params.yaml").write_text(
        "profile: cpu\nprofiles: {cpu: {}, full: {}, smoke: {}}\n"
    )
    pipeline._write_lock({"cmd": "world"}, stages("cpu"))
    return tmp_path


def read(path):
    return yaml.safe_load(path.read_text())["stages"]


def kill_run(profile):
    """A run of `profile` that never comes to putting things back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_restore", lambda state: None)
        with pipeline.selected(profile):
            pipeline._write_lock({"cmd": "world"}, stages(profile))


def test_a_killed_profile_keeps_its_lock_and_the_default_one_comes_back(root):
    before = (root / "dvc.lock").read_text()
    kill_run("full")
    with pipeline.selected("smoke"):
        assert yaml.safe_load((root / "params.yaml").read_text())["profile"] == "smoke"
    assert (root / "dvc.lock").read_text() == before
    assert set(read(root / "data/full/dvc.lock")) == {"world", *stages("full")}


@pytest.mark.parametrize("restored", [("dvc.lock",), ("params.yaml", "dvc.lock")])
def test_what_the_reader_put_back_after_a_kill_goes_to_no_other_profile(root, restored):
    full = root / "data/full/dvc.lock"
    full.parent.mkdir(parents=True)
    full.write_text(yaml.safe_dump({"schema": "2.0", "stages": stages("full")}))
    delivered, before = full.read_bytes(), {n: (root / n).read_bytes() for n in restored}
    kill_run("full")
    for name, content in before.items():
        (root / name).write_bytes(content)
    with pipeline.selected("cpu"):
        assert read(root / "dvc.lock")["90_claims"] == stages("cpu")["90_claims"]
    assert full.read_bytes() == delivered


@pytest.mark.parametrize(
    "state", ["{}", "[1]", '{"running": "../../y", "before": "cpu"}', '{"running": [1]}', "{"]
)
def test_a_damaged_note_of_a_killed_run_writes_nowhere(root, state):
    (root / ".reproduce").mkdir()
    (root / ".reproduce/state.json").write_text(state)
    with pipeline.selected("cpu"):
        pass
    assert not (root / "y").exists()
    assert sorted(p.name for p in root.iterdir()) == [".reproduce", "dvc.lock", "params.yaml"]


@pytest.mark.parametrize("name", ["../../x", "embedded", "a b", "", ".", "scratch"])
def test_a_profile_has_a_name_that_is_a_safe_folder(root, name):
    text = json.dumps({"profile": "cpu", "profiles": {"cpu": {}, name: {}}})
    (root / "params.yaml").write_text(text)
    with pytest.raises(ResearchError, match="cannot be the name of a profile"):
        config.load("cpu")


def test_no_name_is_no_profile(root):
    with pytest.raises(ResearchError, match="unknown profile ''"):
        config.load("")
