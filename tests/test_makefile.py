"""The set-up of the environment: by uv or pip, once, anew after a change or an interruption."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from sae_research import paths

# Stand-ins for the installers: they only write down what they are asked.
PYTHON = f"""#!/bin/sh
if [ "$1 $2" = "-m venv" ]; then
  echo venv >> log
  test "$3" != --clear || rm -rf .venv
  mkdir -p .venv/bin
  cp pip .venv/bin/python
else
  exec {sys.executable} "$@"
fi
"""
PIP = """#!/bin/sh
echo "$@" >> log
case "$*" in
  *uv==*) test ! -e no-uv && cp uv .venv/bin/uv ;;
  *) test ! -e no-pip ;;
esac
"""
UV = """#!/bin/sh
echo "uv $@" >> log
echo "$UV_PROJECT_ENVIRONMENT $UV_PYTHON_DOWNLOADS $VIRTUAL_ENV" > uv-environment
test ! -e killed || kill -9 $PPID
test ! -e uv-fails || exit 1
if [ "$1" = export ]; then
  for target; do :; done
  printf "%s\\n" "torch==2.13.0" "pywin32==312 ; sys_platform == 'win32'" > "$target"
fi
"""

PIP_INSTALL = "-m pip install -q --disable-pip-version-check"
VERSION = re.search(
    r"^UV_VERSION := (\S+)$", (paths.ROOT / "Makefile").read_text(), re.MULTILINE
).group(1)
GET_UV = f"{PIP_INSTALL} uv=={VERSION}"
SYNC = "uv sync -q --frozen --inexact --python .venv/bin/python"
WITH_UV = ["venv", GET_UV, SYNC]
WITH_PIP = ["venv", f"{PIP_INSTALL} -c constraints.txt -e ."]


@pytest.fixture
def folder(tmp_path):
    for name in ("Makefile", "pyproject.toml", "uv.lock", "constraints.txt"):
        shutil.copy(paths.ROOT / name, tmp_path / name)
    for name, text in (("python", PYTHON), ("pip", PIP), ("uv", UV)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "log").touch()
    return tmp_path


def make(folder, target="setup", *settings, python="./python"):
    env = {**os.environ, "VIRTUAL_ENV": "/another"}
    # under `make test`, make would take this one for a sub-make and say which folder it enters
    for name in ("INSTALLER", "MAKEFLAGS", "MFLAGS", "MAKELEVEL"):
        env.pop(name, None)
    words = ["make", target, f"PYTHON={python}", *settings]
    return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, check=False)


def asked(folder):
    """What was done since the last look."""
    lines = (folder / "log").read_text().splitlines()
    (folder / "log").write_text("")
    return lines


@pytest.mark.parametrize("source", ["pyproject.toml", "uv.lock", "constraints.txt"])
def test_the_environment_is_made_once_and_anew_when_a_source_changes(folder, source):
    assert make(folder).returncode == 0
    assert asked(folder) == WITH_UV
    again = make(folder)
    assert (again.returncode, again.stdout, asked(folder)) == (0, "", [])
    with (folder / source).open("a") as file:
        file.write("# changed\n")
    assert make(folder).returncode == 0
    assert asked(folder) == WITH_UV


def test_it_says_what_it_does_and_how_long_it_took(folder):
    first, last = make(folder).stdout.splitlines()
    assert first.startswith("Setting up .venv.")
    assert re.fullmatch(r"\.venv is ready: installed with uv in \d+ s\.", last)


def test_uv_uses_the_given_python_and_this_folder_only(folder):
    make(folder)
    assert (folder / "uv-environment").read_text().split() == [".venv", "never"]


@pytest.mark.parametrize(("missing", "tried"), [("no-uv", WITH_UV[:2]), ("uv-fails", WITH_UV)])
def test_pip_takes_over_where_uv_cannot_be_had(folder, missing, tried):
    (folder / missing).touch()
    done = make(folder)
    assert done.returncode == 0
    assert asked(folder) == [*tried, *WITH_PIP]
    assert "trying pip" in done.stderr
    assert "installed with pip" in done.stdout
    assert make(folder).returncode == 0
    assert asked(folder) == []


def test_the_installer_can_be_named(folder):
    assert make(folder, "setup", "INSTALLER=pip").returncode == 0
    assert asked(folder) == WITH_PIP
    (folder / ".venv" / "ready").unlink()
    (folder / "no-uv").touch()
    assert make(folder, "setup", "INSTALLER=uv").returncode != 0
    assert asked(folder) == WITH_UV[:2]
    done = make(folder, "setup", "INSTALLER=poetry")
    assert done.returncode != 0
    assert "INSTALLER is auto, uv or pip, not 'poetry'" in done.stderr
    assert asked(folder) == []


@pytest.mark.parametrize("installer", ["auto", "uv"])
def test_a_set_up_killed_half_way_is_made_anew(folder, installer):
    (folder / "killed").touch()
    assert make(folder, "setup", f"INSTALLER={installer}").returncode != 0
    assert asked(folder) == WITH_UV
    (folder / "killed").unlink()
    assert make(folder).returncode == 0
    assert asked(folder) == WITH_UV


def test_a_set_up_that_failed_is_made_anew(folder):
    for missing in ("no-uv", "no-pip"):
        (folder / missing).touch()
    assert make(folder).returncode != 0
    assert asked(folder) == [*WITH_UV[:2], *WITH_PIP]
    for missing in ("no-uv", "no-pip"):
        (folder / missing).unlink()
    assert make(folder).returncode == 0
    assert asked(folder) == WITH_UV


def test_lock_writes_the_constraints_of_pip_without_markers(folder):
    assert make(folder, "lock").returncode == 0
    assert [line.split()[:2] for line in asked(folder)][-2:] == [["uv", "lock"], ["uv", "export"]]
    assert (folder / "constraints.txt").read_text().split() == ["torch==2.13.0", "pywin32==312"]


def test_an_old_python_is_refused_in_one_sentence(folder):
    (folder / "old").write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.1 || exit 1\n')
    (folder / "old").chmod(0o755)
    done = make(folder, python="./old")
    assert done.returncode != 0
    assert "Python 3.11 or newer is needed, but './old' is Python 3.9.1" in done.stderr
    assert asked(folder) == []
    assert "Python 3.11 or newer is needed" in make(folder, python="./missing").stderr
