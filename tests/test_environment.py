"""pyproject.toml, constraints.txt and environment.yml describe one environment."""

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
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
BY_PLATFORM = ("nvidia-", "cuda-", "triton", "setuptools")


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
    unpinned = {
        name
        for name in needed([r.name for r in ASKED]) - set(PINS)
        if not name.startswith(BY_PLATFORM)
    }
    assert unpinned == set()


def test_torch_is_the_pinned_one_and_nothing_that_breaks_it_is_there():
    assert PINS["torch"] == "2.13.0"
    assert not {"torchvision", "torchaudio", "eai-delphi", "dictionary-learning"} & set(PINS)


def test_this_environment_is_the_pinned_one():
    here = {name: metadata.version(name) for name in needed([r.name for r in ASKED]) & set(PINS)}
    assert len(here) > 100
    assert {n: v for n, v in here.items() if Version(v).public != Version(PINS[n]).public} == {}
