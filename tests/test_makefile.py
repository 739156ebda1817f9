"""The set-up of the environment: once, anew after a change, cleanly after an interruption."""

import os
import shutil
import subprocess
import sys

import pytest

from sae_research import paths

PYTHON = f"""#!/bin/sh
# Python itself, but for `venv`, which takes too long here: it makes a Python that only writes down what it is asked
if [ "$1 $2" = "-m venv" ]; then
  echo venv >> log; mkdir -p .venv/bin; cp pip .venv/bin/python
else
  exec {sys.executable} "$@"
fi
"""
PIP = '#!/bin/sh\necho "$@" >> log\ntest ! -e interrupted\n'


@pytest.fixture
def folder(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(paths.ROOT / name, tmp_path / name)
    for name, text in (("python", PYTHON), ("pip", PIP)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "log").touch()
    return tmp_path


def setup(folder, python="./python"):
    env = {**os.environ, "MAKEFLAGS": "", "MFLAGS": ""}
    words = ["make", "setup", f"PYTHON={python}"]
    return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, check=False)


def asked(folder):
    """What was done since the last look."""
    lines = (folder / "log").read_text().splitlines()
    (folder / "log").write_text("")
    return lines


INSTALL = ["venv", "-m pip install --disable-pip-version-check -c constraints.txt -e ."]


def test_the_environment_is_made_once_and_anew_when_its_sources_change(folder):
    assert setup(folder).returncode == 0
    assert asked(folder) == INSTALL
    assert setup(folder).returncode == 0
    assert asked(folder) == []
    with (folder / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    assert setup(folder).returncode == 0
    assert asked(folder) == INSTALL


def test_an_interrupted_set_up_is_made_anew(folder):
    (folder / "interrupted").touch()
    assert setup(folder).returncode != 0
    assert asked(folder) == INSTALL
    (folder / "interrupted").unlink()
    assert setup(folder).returncode == 0
    assert asked(folder) == INSTALL


def test_an_old_python_is_refused_in_one_sentence(folder):
    (folder / "old").write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.1 || exit 1\n')
    (folder / "old").chmod(0o755)
    done = setup(folder, "./old")
    assert done.returncode != 0
    assert "Python 3.11 or newer is needed, but './old' is Python 3.9.1" in done.stderr
    assert asked(folder) == []
    assert "Python 3.11 or newer is needed" in setup(folder, "./missing").stderr
