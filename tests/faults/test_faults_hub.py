"""A hub that refuses, falls silent, breaks off or sends rubbish: each answer has its sentence."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests
import torch
from safetensors.torch import save

from sae_research import paths, saes
from sae_research.errors import ResearchError

pytestmark = [pytest.mark.slow, pytest.mark.faults]

SHA = "a" * 40
WEIGHTS = save({"w": torch.zeros(4_000_000)})
"""More than the 10 MB that the client writes at once, so that a broken download has a beginning."""
FILES = {"config.json": b'{"model_type": "gpt2"}', "model.safetensors": WEIGHTS}


class Hub(BaseHTTPRequestHandler):
    """The hub's routes for one repository, with one fault."""

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        fault = self.server.fault
        self.server.asked.append((self.command, self.path, self.headers.get("Range")))
        if fault == "silence" or (fault == "silence later" and "/tree/" in self.path):
            self.server.released.wait(60)
        elif fault == "page":
            self.answer(200, b"<html>Log in</html>", Content_Type="text/html")
        elif fault == "loop":
            self.answer(302, Location=self.path)
        elif fault == "a date":
            self.answer(429, b"{}", Retry_After="Wed, 21 Oct 2026 07:28:00 GMT")
        elif isinstance(fault, int):
            extra = {"Retry_After": 7} if fault == 429 else {}
            self.answer(fault, b"{}", **extra)
        elif fault == "gated":
            self.answer(403, b"{}", X_Error_Code="GatedRepo")
        elif self.path.startswith("/api/"):
            self.list_files(fault)
        else:
            self.send_file(fault)

    def list_files(self, fault):
        if fault in ("{}", "null", "[]"):
            return self.answer(200, fault.encode())
        if fault == "no gzip":
            return self.answer(200, b"{}", Content_Encoding="gzip")
        found = [{"rfilename": name, "type": "file", "path": name, "oid": SHA, "size": len(body)}
                 for name, body in FILES.items()]  # fmt: skip
        about = {"id": "o/m", "sha": SHA, "siblings": found, "private": False, "tags": []}
        about |= {"no commit": {"sha": None}, "no files": {"siblings": []}}.get(fault, {})
        self.answer(200, json.dumps(found if "/tree/" in self.path else about).encode())

    def send_file(self, fault):
        name = self.path.rpartition("/")[2]
        body = FILES[name]
        if name == "model.safetensors" and fault == "damaged":
            body = body[:4] + bytes(1000)
        headers = {"ETag": f'"{name}{len(body)}"', "X_Repo_Commit": SHA}
        if fault == "no mark":
            headers = {}
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        breaks = fault == "cut" or (fault == "cut once" and not start)
        if self.command == "GET" and name == "model.safetensors" and breaks:
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            self.wfile.write(body[:12_000_000] if not start else b"")
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif start:
            whole = f"bytes {start}-{len(body) - 1}/{len(body)}"
            self.answer(206, body[start:], Content_Range=whole, **headers)
        else:
            self.answer(200, body, **headers)

    def handle(self):
        with contextlib.suppress(OSError):
            super().handle()

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    server.fault, server.asked, server.released = None, [], threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


def fetch(home, endpoint, **env):
    """What a reader sees who asks for the model, and the seconds it took."""
    code = "from sae_research import hub\ntry: print('got', hub.download('o/m'))\n"
    code += "except Exception as error: print(type(error).__name__, error)"
    given = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    given |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "PYTHONPATH": str(paths.ROOT), **env}
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], env=given, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), time.monotonic() - start


def address(server):
    return f"http://127.0.0.1:{server.server_port}"


def test_a_whole_model_comes_and_stays_without_the_hub(hub, tmp_path):
    said, _ = fetch(tmp_path, address(hub))
    assert said.startswith("got ")
    hub.fault = 503
    assert fetch(tmp_path, address(hub))[0] == said
    assert fetch(tmp_path, "http://127.0.0.1:9", HF_HUB_OFFLINE="1")[0] == said


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (401, "HF_TOKEN"),
        (403, "may not be fetched (403)"),
        ("gated", "is gated: accept its licence"),
        (404, "404"),
        (429, "run again in 7 s"),
        (500, "out of order (500)"),
        (503, "out of order (503)"),
        ("a date", "run again in some minutes"),
        ("page", "a page, not the hub, answers"),
        ("loop", "a page, not the hub, answers"),
        *((fault, "a page, not the hub, answers") for fault in ("{}", "null", "[]", "no gzip")),
        ("no mark", "a page, not the hub, answers"),
        ("no commit", "a page, not the hub, answers"),
        ("no files", "has no file *.safetensors or"),
        ("silence", "did not answer in 10 s"),
        ("silence later", "did not answer in 10 s"),
        ("cut", "came in part"),
        ("damaged", "is damaged"),
    ],
)
def test_each_answer_has_its_own_sentence(hub, tmp_path, fault, words):
    hub.fault = fault
    said, seconds = fetch(tmp_path, address(hub))
    assert said.startswith("ResearchError "), said
    assert words in said, said
    assert said.count("\n") == 0
    assert "no network" not in said
    assert seconds < 120


@pytest.mark.parametrize(
    ("endpoint", "words"),
    [("127.0.0.1:9", "HF_ENDPOINT is no address"), ("http://127.0.0.1:9", "no network")],
)
def test_an_address_that_is_none_and_one_where_nobody_is(tmp_path, endpoint, words):
    said, _ = fetch(tmp_path, endpoint)
    assert said.startswith("ResearchError "), said
    assert words in said, said


def test_a_cache_that_does_not_know_its_commit_is_named(hub, tmp_path):
    fetch(tmp_path, address(hub))
    (ref,) = tmp_path.rglob("refs/main")
    ref.write_text("")  # as a power cut leaves it
    hub.fault = 503
    said, _ = fetch(tmp_path, address(hub))
    assert said.endswith("holds of o/m is damaged; delete models--o--m there."), said
    hub.fault = None
    assert fetch(tmp_path, address(hub))[0].startswith("got ")


def test_a_cache_that_cannot_be_written_is_named(hub, tmp_path):
    (tmp_path / "file").touch()
    for place in ("file", "file/hub"):
        said, _ = fetch(tmp_path, address(hub), HF_HUB_CACHE=str(tmp_path / place))
        assert said.startswith("ResearchError o/m cannot be kept: no room or no right"), said


def test_a_download_goes_on_where_it_broke_off(hub, tmp_path):
    hub.fault = "cut once"
    said, _ = fetch(tmp_path, address(hub))
    assert said.startswith("got "), said
    ranges = [r for command, path, r in hub.asked if command == "GET" and "safetensors" in path]
    assert len(ranges) == 2
    assert ranges[1].startswith("bytes=")
    assert ranges[1] != "bytes=0-"


def refused():
    answer = requests.Response()
    answer.status_code = 403
    return requests.HTTPError(response=answer)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (refused(), "may not be fetched (403)"),
        (requests.ConnectionError(), "no network"),
        (requests.ReadTimeout(), "did not answer"),
    ],
)
def test_what_saelens_fetches_by_itself_is_explained_too(tmp_path, monkeypatch, error, words):
    def fail(*_, **__):
        raise error

    (tmp_path / "blocks.8.hook_resid_pre").mkdir()
    monkeypatch.setattr(saes, "download", lambda *_: tmp_path)
    monkeypatch.setattr("sae_lens.SAE.from_pretrained", fail)
    with pytest.raises(ResearchError, match=re.escape(words)):
        saes.load_sae("gpt2-small-res-jb", "blocks.8.hook_resid_pre")
