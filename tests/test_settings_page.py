"""The table of what is scaled down says exactly what the profiles change, and the README carries it."""

import typing
from dataclasses import dataclass, field, fields, is_dataclass

import pytest

from sae_research import config, settings_page
from sae_research.errors import ResearchError


def settings_classes(cls: type = config.Profile) -> list[type]:
    kinds = typing.get_type_hints(cls)
    nested = [kinds[f.name] for f in fields(cls) if is_dataclass(kinds[f.name])]
    return nested + [deeper for kind in nested for deeper in settings_classes(kind)]


@pytest.mark.parametrize("cls", settings_classes(), ids=lambda c: c.__name__)
def test_every_setting_is_explained(cls):
    assert [f.name for f in fields(cls) if not settings_page.explanations(cls).get(f.name)] == []


@dataclass(frozen=True)
class Sparse:
    """A nested block."""

    k: int = 32
    """Active latents | of each token."""


@dataclass(frozen=True)
class Runtime:
    """A block."""

    steps: int = 100_000
    """Training
    steps."""
    rate: float = 3e-4
    """Learning rate."""
    limit: int | None = None
    """Some limit."""
    sparse: Sparse = field(default_factory=Sparse)
    """How sparse."""


@dataclass(frozen=True)
class Profile:
    """Blocks."""

    name: str
    runtime: Runtime = field(default_factory=Runtime)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    (tmp_path / "params.yaml").write_text(
        "profile: cpu\nprofiles: {cpu: {runtime: {steps: 50, sparse: {k: 4}}}, "
        "full: {runtime: {steps: 100000, limit: 3}}}\n"
    )
    monkeypatch.setattr(config, "PARAMS", tmp_path / "params.yaml")
    monkeypatch.setattr(config, "Profile", Profile)


@pytest.mark.usefixtures("toy")
def test_only_departures_are_listed_with_paper_and_profile_values():
    assert settings_page.markdown().splitlines() == [
        "| study | setting | what it is | paper or default | cpu | full |",
        "| --- | --- | --- | --- | --- | --- |",
        "| runtime | steps | Training steps. | 100,000 | 50 | = |",
        "| runtime | limit | Some limit. | none | = | 3 |",
        r"| runtime | sparse.k | Active latents \| of each token. | 32 | 4 | = |",
    ]
    assert settings_page.text().splitlines()[2].split() == [
        "runtime",
        "steps",
        "100,000",
        "50",
        "=",
    ]
    assert settings_page.text(("cpu",)).splitlines()[0].split() == [
        "study",
        "setting",
        "paper",
        "or",
        "default",
        "cpu",
    ]


def test_values_are_shown_as_people_write_them():
    for value, shown in [
        (True, "yes"),
        (1e-4, "0.0001"),
        (0.5, "0.5"),
        (9999, "9999"),
        ((), "none"),
        ({"a": 1.0}, "a: 1"),
    ]:
        assert settings_page._show(value) == shown


@pytest.mark.usefixtures("toy")
def test_refreshing_replaces_what_is_between_the_markers_and_nothing_else():
    text = "# Title\n<!-- scaled down: begin -->\nold\n<!-- scaled down: end -->\nafter\n"
    new = settings_page.refreshed(text)
    assert new == text.replace("old", settings_page.markdown())
    assert settings_page.refreshed(new) == new
    with pytest.raises(ResearchError, match="must hold the lines"):
        settings_page.refreshed("# Title\n")


def test_the_readme_is_in_step_with_the_profiles():
    readme = settings_page.README.read_text()
    assert readme == settings_page.refreshed(readme), (
        "run `python -m sae_research profiles --write` and commit README.md"
    )


def test_the_terminal_table_holds_every_override_of_every_profile():
    shown = settings_page.text()
    for name in config.profiles():
        for block, overrides in config.read_params()["profiles"][name].items():
            for setting in overrides or {}:
                if getattr(getattr(config.load(name), block), setting) != getattr(
                    config.default_of(config.Profile, block), setting
                ):
                    assert f"{block}" in shown
                    assert f" {setting}" in shown
