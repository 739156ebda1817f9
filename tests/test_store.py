"""Artefacts survive killed writers, damage is named, and a full disk is one clear sentence."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from sae_research import store
from sae_research.errors import ResearchError


def make(folder: Path, text: str = "old") -> Path:
    with store.writing(folder) as partial:
        (partial / "deep").mkdir()
        (partial / "deep" / "a.txt").write_text(text)
        (partial / "b.bin").write_bytes(bytes(range(256)))
    return folder


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_an_artefact_is_written_checked_and_replaced(tmp_path):
    folder = make(tmp_path / "art")
    assert store.verified(folder) == folder
    assert set(json.loads((folder / "checksums.json").read_text())) == {"b.bin", "deep/a.txt"}
    make(folder, "new")
    assert (store.verified(folder) / "deep" / "a.txt").read_text() == "new"
    assert names(tmp_path) == ["art"]


def test_a_failing_block_changes_nothing_and_keeps_its_own_error(tmp_path):
    folder = make(tmp_path / "art")
    with pytest.raises(ZeroDivisionError), store.writing(folder) as partial:
        (partial / "half").write_text(str(1 / 0))
    with pytest.raises(FileNotFoundError), store.writing(folder):
        Path(
            tmp_path / "input that is missing"
        ).read_text()  # an error of reading is not explained as one of writing
    with pytest.raises(ConnectionError), store.writing(folder):
        raise ConnectionError("the hub does not answer")
    assert (store.verified(folder) / "deep" / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["art"]


@pytest.mark.parametrize(
    "damage",
    ["truncate", "alter", "delete", "checksums", "list", "pairs", "none", "stray", "no checksums"],
)
def test_damage_is_detected_and_the_file_named(tmp_path, damage):
    folder = make(tmp_path / "art")
    victim = folder / "b.bin"
    if damage == "truncate":
        os.truncate(victim, 100)
    elif damage == "alter":
        victim.write_bytes(bytes(255 - b for b in range(256)))
    elif damage == "delete":
        victim.unlink()
    elif damage == "checksums":
        os.truncate(folder / "checksums.json", 20)
    elif damage == "list":
        (folder / "checksums.json").write_text("[1, 2]")
    elif damage == "pairs":
        (folder / "checksums.json").write_text("[[1, 2]]")
    elif damage == "none":
        (folder / "checksums.json").write_text("{}")
    elif damage == "stray":
        (folder / ".DS_Store").write_text("left by a file manager")
        assert store.verified(folder) == folder
        (folder / "deep" / "mine.txt").write_text("mine")
    else:
        (folder / "checksums.json").unlink()
    named = {
        "checksums": "checksums.json is damaged",
        **dict.fromkeys(("list", "pairs", "none"), "checksums.json is damaged"),
        "stray": "mine.txt is no part of",
        "no checksums": "art",
    }
    with pytest.raises(ResearchError, match=named.get(damage, "b.bin")):
        store.verified(folder)


KILLED = """
import sys, time
from pathlib import Path
from sae_research import store
folder = Path(sys.argv[1])
with store.writing(folder) as partial:
    for i in range(1000):
        (partial / f"{i}.bin").write_bytes(b"x" * 100_000)
        print(i, flush=True)
        time.sleep(0.001)
"""


def test_a_writer_killed_midway_leaves_the_old_artefact_and_no_trace_later(tmp_path):
    folder = make(tmp_path / "art")
    for wait in (1, 30):
        writer = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(wait):
            writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
        assert writer.wait() == -signal.SIGKILL
        assert (store.verified(folder) / "deep" / "a.txt").read_text() == "old"
        assert len(names(tmp_path)) == 2  # the half-written sibling
    make(folder, "new")
    assert (store.verified(folder) / "deep" / "a.txt").read_text() == "new"
    assert names(tmp_path) == ["art"]


REPLACING = """
import sys
from pathlib import Path
from sae_research import store
i = 0
while True:
    i += 1
    with store.writing(Path(sys.argv[1])) as partial:
        for name in "abc":
            (partial / name).write_text(str(i))
    store.write_text(Path(sys.argv[1] + ".txt"), str(i) * 10_000)
    print(i, flush=True)
"""


def test_killed_at_any_moment_every_artefact_is_whole(tmp_path):
    folder = tmp_path / "art"
    for attempt in range(6):
        writer = subprocess.Popen(
            [sys.executable, "-c", REPLACING, str(folder)], stdout=subprocess.PIPE, text=True
        )
        writer.stdout.readline()
        time.sleep(0.013 * attempt)
        writer.kill()
        writer.wait()
        store.verified(folder)
        assert len({(folder / name).read_text() for name in "abc"}) == 1
        text = (tmp_path / "art.txt").read_text()
        assert text == text[: len(text) // 10_000] * 10_000


REWRITING = """
import sys
from pathlib import Path
from sae_research import store
for i in range(1000):
    store.write_text(Path(sys.argv[1]), str(i % 10) * 3_000_000)
    print(i, flush=True)
"""


def test_a_reader_never_meets_half_a_file(tmp_path):
    path = tmp_path / "note.txt"
    writer = subprocess.Popen(
        [sys.executable, "-c", REWRITING, str(path)], stdout=subprocess.PIPE, text=True
    )
    writer.stdout.readline()
    try:
        for _ in range(100):
            text = path.read_text()
            assert len(text) == 3_000_000
            assert len(set(text)) == 1
    finally:
        writer.kill()
        writer.wait()


WAITING = """
import sys
from pathlib import Path
from sae_research import store
with store.writing(Path(sys.argv[1])) as partial:
    (partial / "a").write_text("theirs")
    print("ready", flush=True)
    sys.stdin.readline()
"""


def test_two_processes_may_write_the_same_artefact_and_the_last_one_stays(tmp_path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    other = subprocess.Popen([sys.executable, "-c", WAITING, str(tmp_path / "art")], **pipes)
    assert other.stdout.readline() == "ready\n"
    make(tmp_path / "art", "ours")
    assert (store.verified(tmp_path / "art") / "deep" / "a.txt").read_text() == "ours"
    other.communicate("go on\n")
    assert other.returncode == 0
    assert (store.verified(tmp_path / "art") / "a").read_text() == "theirs"
    assert names(tmp_path) == ["art"]


def test_killed_between_the_two_renames_the_old_artefact_comes_back(tmp_path):
    folder = make(tmp_path / "art")
    folder.rename(tmp_path / ".partial-art.old")  # what a writer leaves that dies just there
    assert (store.verified(folder) / "deep" / "a.txt").read_text() == "old"
    folder.rename(tmp_path / ".partial-art.old")
    with pytest.raises(ZeroDivisionError), store.writing(folder):
        raise ZeroDivisionError
    assert (store.verified(folder) / "deep" / "a.txt").read_text() == "old"


def test_writers_of_neighbours_do_not_meet(tmp_path):
    with store.writing(tmp_path / "sae-wide") as outer:
        (outer / "x").write_text("wide")
        make(tmp_path / "sae")
        make(tmp_path / "sae-wide.1")
        store.write_text(tmp_path / "sae-wide.txt", "t")
        assert (outer / "x").read_text() == "wide"
    assert (store.verified(tmp_path / "sae-wide") / "x").read_text() == "wide"


def test_resumed_builds_once_rebuilds_on_new_settings_and_checks(tmp_path):
    built = []

    def build(partial):
        built.append(1)
        (partial / "x").write_text(str(len(built)))

    for key in ({"lr": 0.1}, {"lr": 0.1}, {"lr": 0.2}):
        store.resumed(tmp_path / "art", key, build)
    assert len(built) == 2
    (tmp_path / "art" / "x").write_text("3")
    with pytest.raises(ResearchError, match="x does not match"):
        store.resumed(tmp_path / "art", {"lr": 0.2}, build)
    (tmp_path / "art" / "key").write_bytes(b"\xff\xfe")
    store.resumed(tmp_path / "art", {"lr": 0.2}, build)
    assert len(built) == 3


@dataclass(frozen=True)
class Settings:
    rate: float = 0.1
    names: frozenset = frozenset({"a", "b", "c", "d"})
    folder: Path = Path("x/y")


def test_fingerprints_are_stable_across_processes_and_refuse_what_is_not():
    code = "from test_store import *; print(store.fingerprint([Settings(), {'k': (1, 2)}]))"
    outs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parent)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert outs == {store.fingerprint([Settings(), {"k": (1, 2)}]) + "\n"}
    assert store.fingerprint(Settings(rate=0.2)) != store.fingerprint(Settings())
    with pytest.raises(TypeError, match="no stable fingerprint"):
        store.fingerprint({"f": object()})


def test_a_full_disk_is_one_sentence_and_nothing_is_left(tmp_path):
    """A limit on file size gives the same error as a full disk, at any place and for any user."""
    folder = make(tmp_path / "art")
    code = f"""
import resource, signal
from pathlib import Path
from sae_research import store
from sae_research.errors import ResearchError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, {resource.RLIM_INFINITY}))
root = Path({str(tmp_path)!r})
for attempt in range(4):
    try:
        if attempt == 0:
            with store.writing(root / "art") as partial:
                (partial / "big").write_bytes(b"x" * 100_000)
        elif attempt == 1:
            store.write_bytes(root / "file", b"x" * 100_000)
        elif attempt == 2:
            import torch
            store.write_tensors(root / "weights.safetensors", {{"w": torch.zeros(100_000)}})
        else:
            from safetensors.torch import save_file
            with store.writing(root / "art") as partial:
                save_file({{"w": torch.zeros(100_000)}}, partial / "w.safetensors")
    except ResearchError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    for line, name in zip(lines, ("art", "file", "weights.safetensors", "art"), strict=True):
        assert line.startswith(f"cannot write {name}: File too large; free disk space")
    assert (store.verified(folder) / "deep" / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["art"]


def test_an_unwritable_folder_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("a regular file, below which nobody can write")
    for write in (
        lambda: make(tmp_path / "file" / "art"),
        lambda: store.write_text(tmp_path / "file" / "note.txt", "x"),
        lambda: store.write_json(tmp_path / "file" / "deep" / "note.json", {}),
    ):
        with pytest.raises(
            ResearchError,
            match=r"cannot write (art|note.txt|note.json): .*make the folder writable",
        ):
            write()


def test_json_and_tensors_round_trip_and_name_what_is_missing_or_damaged(tmp_path):
    import torch

    store.write_json(tmp_path / "a.json", {"b": [1, 0.1], "a": "é"})
    assert (tmp_path / "a.json").read_text() == '{\n "a": "é",\n "b": [\n  1,\n  0.1\n ]\n}\n'
    assert store.read_json(tmp_path / "a.json") == {"b": [1, 0.1], "a": "é"}
    weights = {"w": torch.arange(6.0).reshape(2, 3).T}
    store.write_tensors(tmp_path / "w.safetensors", weights)
    assert torch.equal(store.read_tensors(tmp_path / "w.safetensors")["w"], weights["w"])
    about = {name: "x" for name in ["hook", "positions", "sae", "kind", "model"]}
    for i in range(8):  # several keys would come in another order now and then
        store.write_tensors(tmp_path / f"{i}.safetensors", weights, about)
    assert len({(tmp_path / f"{i}.safetensors").read_bytes() for i in range(8)}) == 1
    for name, read in (("a.json", store.read_json), ("w.safetensors", store.read_tensors)):
        os.truncate(tmp_path / name, 5)
        with pytest.raises(ResearchError, match=f"{name} is damaged"):
            read(tmp_path / name)
        (tmp_path / name).unlink()
        with pytest.raises(ResearchError, match=f"{name} is missing"):
            read(tmp_path / name)


def test_content_tells_when_resumed_work_is_out_of_date():
    from sae_research import catalogue

    assert catalogue.get("world-text").content() != catalogue.get("world-survey").content()
