"""The doctor's verdicts on machines that lack one thing, and its report on this one."""

import dataclasses
import os
import stat
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from sae_research import catalogue, config, doctor, machine, store
from sae_research.errors import ResearchError

GOOD = doctor.Machine(
    python=(3, 11, 7),
    cores=16,
    memory=64,
    disk=500,
    cache_disk=500,
    gpus={"0: a GPU": 80.0},
    torch="2.13.0",
    token=True,
)


def taking_part(profile: str) -> list[str]:
    """Studies that have a model in the profile."""
    settings = config.load(profile)
    return [study for study in config.study_names() if getattr(settings, study).models]


def missing(profile: str, study: str, **changes) -> str:
    return "; ".join(
        doctor.judge(config.load(profile), dataclasses.replace(GOOD, **changes))[study]
    )


@pytest.mark.parametrize("profile", config.profiles())
def test_a_machine_with_everything_runs_everything(profile):
    verdicts = doctor.judge(config.load(profile), GOOD)
    assert list(verdicts) == taking_part(profile)
    assert not any(verdicts.values())


@pytest.mark.parametrize(
    ("profile", "study", "changes", "words"),
    [
        ("cpu", "meta_saes", {"python": (3, 10, 1)}, "Python 3.11"),
        ("cpu", "meta_saes", {"absent": ("peft", "dvc")}, "packages peft, dvc: run `make setup`"),
        ("cpu", "meta_saes", {"disk": 0.5}, "2 GB of free disk (0.5 are free)"),
        ("cpu", "meta_saes", {"writable": False}, "folder that can be written"),
        ("cpu", "meta_saes", {"memory": 1.0}, "3 GB of memory at least (1 here)"),
        (
            "cpu",
            "meta_saes",
            {"world": {"text": "the text world is broken"}},
            "the text world is broken",
        ),
        (
            "laptop",
            "opinion_qa",
            {"hub": "the network (it does not answer)"},
            "the network (it does not answer)",
        ),
        ("laptop", "opinion_qa", {"cache_disk": 0.1}, "GB of disk for downloads"),
        ("gpu", "opinion_qa", {"gpus": {}}, "an NVIDIA GPU with 9 GB at least"),
        ("gpu", "meta_saes", {"gpus": {"0: small": 16.0}}, "a GPU with 24 GB at least (16 here)"),
        ("gpu", "opinion_qa", {"torch": "2.13.0+cpu"}, "torch with CUDA (installed: 2.13.0+cpu)"),
        ("gpu", "opinion_qa", {"token": False}, "a token for google/gemma-2-2b"),
        (
            "gpu",
            "opinion_qa",
            {"refused": {"google/gemma-2-2b": "accept its licence on its page"}},
            "accept its licence",
        ),
    ],
)
def test_what_is_missing_is_named(profile, study, changes, words):
    assert words in missing(profile, study, **changes)


def test_only_what_a_study_needs_is_asked_of_it():
    assert (
        missing("cpu", "opinion_qa", world={"text": "broken"}) == ""
    )  # it stands on the survey model
    assert missing("cpu", "meta_saes", gpus={}, hub="none", token=False, torch="2.13.0+cpu") == ""
    assert (
        missing("laptop", "opinion_qa", gpus={}, token=False, world={"text": "x", "survey": "y"})
        == ""
    )
    assert missing("laptop", "opinion_qa", hub="none", cached=frozenset({"gpt2-small"})) == ""
    assert missing("gpu", "specialized_saes", token=False) == ""  # its models are open


def test_memory_follows_parameters_and_number_format(tmp_path, monkeypatch):
    (tmp_path / "params.yaml").write_text(
        "profile: big\nprofiles:\n  big:\n    runtime: {device: cpu, dtype: float32}\n"
        "    opinion_qa: {models: [llama-3.1-8b]}\n"
    )
    monkeypatch.setattr(config, "PARAMS", tmp_path / "params.yaml")
    assert "39 GB of memory" in missing(
        "big", "opinion_qa", memory=32
    )  # 8.03e9 x 4 bytes x 1.2 / 2^30 + 3
    assert missing("big", "opinion_qa", memory=40) == ""


def test_the_world_is_intact_missing_or_damaged(tmp_path):
    models = [f"{name}{seed}/model" for name in ("text", "survey") for seed in ("", "-1", "-2")]
    for piece in (*models, "text/saes", "survey/saes"):
        with store.writing(tmp_path / piece) as partial:
            (partial / "weights").write_text("w")
    assert machine.world_problems(tmp_path) == {}
    (tmp_path / "text" / "saes" / "weights").write_text("v")
    problems = machine.world_problems(tmp_path)
    assert set(problems) == {"text"}
    assert "weights does not match its checksum" in problems["text"]
    assert set(machine.world_problems(tmp_path / "nowhere")) == {"text", "survey"}


def test_a_model_is_downloaded_when_its_model_and_main_saes_are(hub_cache, tmp_path):
    away = [spec for spec in catalogue.MODEL_SPECS.values() if spec.from_hub]
    files = machine.cached_files(hub_cache)
    assert [spec.name for spec in away if not machine.downloaded(spec, files)] == []
    assert machine.cached_files(tmp_path / "nowhere") == {}
    (tmp_path / "file").touch()
    assert machine.cached_files(tmp_path / "file") == {}
    del files["jbloom/GPT2-Small-SAEs-Reformatted"], files["gpt2-large"]
    gone = {spec.name for spec in away if not machine.downloaded(spec, files)}
    assert gone == {"gpt2-small", "gpt2-large"}


def test_the_readers_data_is_looked_for(tmp_path):
    folder = "data/private/opinion_qa"
    assert machine.missing_data(tmp_path) == {"opinion_qa": folder}
    absent = {"opinion_qa": folder}
    assert folder in missing("laptop", "opinion_qa", no_data=absent)
    assert missing("cpu", "opinion_qa", no_data=absent) == ""
    assert missing("laptop", "side_effects", no_data=absent) == ""
    store.write_text(tmp_path / folder / "human_resp" / "info.csv", "x")
    assert machine.missing_data(tmp_path) == {}


class _Hub(BaseHTTPRequestHandler):
    status = 200

    body = b'{"model_type": "gpt2"}'

    def do_GET(self):
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_):
        pass


def test_the_hub_is_asked_and_its_answer_is_told():
    server = HTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        assert machine.hub_problem(address) is None
        _Hub.status = 503
        assert (
            machine.hub_problem(address) == f"the hub (127.0.0.1:{server.server_port} answers 503)"
        )
        _Hub.status, _Hub.body = 200, b"<html>Log in to this network</html>"
        assert "answers with a page" in machine.hub_problem(address)
        assert "HF_HUB_OFFLINE" in machine.hub_problem(address, offline=True)
    finally:
        server.shutdown()
        server.server_close()
    assert "does not answer" in machine.hub_problem(address, timeout=1)
    assert "without https://" in machine.hub_problem("not an address")


def test_gpus_are_read_from_the_drivers_tool(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '0, NVIDIA H100 80GB HBM3, 81559'\necho '1, Other, [N/A]'\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert machine._gpus() == {"0: NVIDIA H100 80GB HBM3": pytest.approx(79.6, abs=0.1)}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine._gpus() == {}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    tool.write_text("#!/bin/sh\necho 'no driver' >&2\nexit 9\n")
    assert machine._gpus() == {}


def test_versions_are_compared_with_the_pins(tmp_path, monkeypatch):
    assert machine.packages() == ((), ())
    pins = machine.paths.CONSTRAINTS.read_text().replace("pyyaml==6.0.3", "pyyaml==5.0.0")
    (tmp_path / "constraints.txt").write_text(pins)
    monkeypatch.setattr(machine.paths, "CONSTRAINTS", tmp_path / "constraints.txt")
    (tmp_path / "pyproject.toml").write_text(
        '[project]\ndependencies = ["pyyaml", "no-such-package>=3"]\n'
    )
    monkeypatch.setattr(machine.paths, "ROOT", tmp_path)
    absent, differing = machine.packages()
    assert absent == ("no-such-package",)
    assert differing == ("pyyaml 6.0.3 (pinned 5.0.0)",)


def test_the_report_on_this_machine_judges_the_profile_asked_and_shows_no_token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    monkeypatch.setattr(machine, "hub_problem", lambda *_: "the network (not asked in this test)")
    text, code = doctor.run("gpu")
    assert "hf_secret" not in text
    assert "present" in text
    assert code == 1
    assert text.endswith("This machine cannot run the profile 'gpu'.")
    assert [line.split()[:2] for line in text.splitlines() if line.startswith("gpu ")] == [
        ["gpu", study] for study in taking_part("gpu")
    ]
    text, code = doctor.run("cpu")
    problems = doctor.judge(config.load("cpu"), doctor.examine([config.load("cpu")]))
    assert code == (1 if any(problems.values()) else 0)
    with pytest.raises(ResearchError, match="did you mean 'laptop'"):
        doctor.run("lapto")
