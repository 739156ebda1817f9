"""pyproject.toml, uv.lock, constraints.txt and environment.yml describe one environment."""

import tomllib
from importlib import metadata

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from sae_research.paths import CONSTRAINTS, ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ASKED = [Requirement(line) for line in PROJECT["dependencies"]]
PINS = {
    canonicalize_name(name): version
    for name, version in (line.split("==") for line in CONSTRAINTS.read_text().split())
}
LOCK = tomllib.loads((ROOT / "uv.lock").read_text())
LOCKED = {package["name"]: package for package in LOCK["package"]}
OURS = LOCKED["sae-research"]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]


def test_the_lock_was_made_from_this_project_file():
    asked = {str(Requirement(line)) for line in PROJECT["dependencies"]}
    for extra, lines in PROJECT["optional-dependencies"].items():
        asked |= {f"{line}; extra == '{extra}'" for line in lines}
    locked = set()
    for needed in OURS["metadata"]["requires-dist"]:
        marker = f"; {needed['marker']}" if "marker" in needed else ""
        locked.add(f"{needed['name']}{needed.get('specifier', '')}{marker}")
    assert {spelled(line) for line in locked} == {spelled(line) for line in asked}, (
        "run `make lock`"
    )
    assert LOCK["requires-python"] == PROJECT["requires-python"]


def spelled(line: str) -> tuple:
    """A requirement in a form that does not depend on how it is written."""
    asked = Requirement(line)
    return canonicalize_name(asked.name), asked.specifier, str(asked.marker)


def test_the_lock_has_one_version_of_each_package_from_the_public_index_with_hashes():
    assert len(LOCKED) == len(LOCK["package"])
    for package in LOCK["package"]:
        if package is OURS:
            assert package["source"] == {"editable": "."}
            continue
        assert package["source"] == {"registry": "https://pypi.org/simple"}
        files = [*package.get("wheels", []), *([package["sdist"]] if "sdist" in package else [])]
        assert files
        for file in files:
            assert file["url"].startswith("https://files.pythonhosted.org/")
            assert file["hash"].startswith("sha256:")


def test_the_constraints_of_pip_are_those_of_the_lock():
    locked = {name: package["version"] for name, package in LOCKED.items() if package is not OURS}
    assert locked == PINS, "run `make lock`"


def test_every_dependency_is_pinned_within_its_range():
    for asked in ASKED:
        pin = PINS.get(canonicalize_name(asked.name))
        assert pin, f"{asked.name} of pyproject.toml is not pinned in constraints.txt"
        assert Version(pin) in asked.specifier, (
            f"{asked.name} is pinned to {pin}, outside '{asked.specifier}'"
        )


def test_conda_users_get_the_same_names_ranges_and_pins():
    (pip,) = [entry["pip"] for entry in CONDA if isinstance(entry, dict)]
    assert pip[:2] == ["-c constraints.txt", "-e ."]
    assert pip[2:] == PROJECT["dependencies"]
    assert f"python{PROJECT['requires-python']}" in CONDA


def needed(names: list[str]) -> set[str]:
    """Everything that `names` pull in on this machine."""
    found, left = set(), [canonicalize_name(name) for name in names]
    while left:
        name = left.pop()
        if name in found:
            continue
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # a marker of another platform
        found.add(name)
        for requirement in map(Requirement, requires):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                left.append(canonicalize_name(requirement.name))
    return found


def test_what_the_dependencies_pull_in_is_pinned_too():
    assert needed([r.name for r in ASKED]) - set(PINS) == set()


def test_torch_is_the_pinned_one_and_nothing_that_breaks_it_is_there():
    assert PINS["torch"] == "2.13.0"
    assert not {"torchvision", "torchaudio", "eai-delphi", "dictionary-learning"} & set(PINS)


def test_this_environment_is_the_pinned_one():
    here = {name: metadata.version(name) for name in needed([r.name for r in ASKED]) & set(PINS)}
    assert len(here) > 100
    assert {n: v for n, v in here.items() if Version(v).public != Version(PINS[n]).public} == {}
