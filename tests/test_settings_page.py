"""The settings page says exactly what the profiles change, and is in step with them."""

from dataclasses import fields, is_dataclass

import pytest

from sae_research import config, settings_page


def settings_classes(classes=None):
    for cls in classes or config.block_classes().values():
        yield cls
        yield from (
            settings_classes([f.type for f in fields(cls) if is_dataclass(f.type)] or None)
            if (any(is_dataclass(f.type) for f in fields(cls)))
            else ()
        )


@pytest.mark.parametrize("cls", list(settings_classes()), ids=lambda c: c.__qualname__)
def test_every_setting_is_explained(cls):
    for f in fields(cls):
        assert config.explanation(cls, f.name).strip(), f.name


@pytest.fixture
def toy(tmp_path, monkeypatch):
    (tmp_path / "params.yaml").write_text(
        "profile: cpu\nprofiles:\n  cpu: {runtime: {threads: 2}, opinion_qa: {training: {steps: "
        "50}}}\n"
        "  full: {world: {seeds: [0, 1, 2]}}\n"
    )
    monkeypatch.setattr(config, "PARAMS", tmp_path / "params.yaml")


@pytest.mark.usefixtures("toy")
def test_only_departures_are_listed_with_default_and_profile_values():
    rows = [row[:2] + row[3:] for row in settings_page._table(("cpu", "full"))]
    assert rows == [
        ["runtime", "threads", "8", "2", "="],
        ["world", "seeds", "0", "=", "0, 1, 2"],
        ["opinion_qa", "training.steps", "500", "50", "="],
    ]
    assert settings_page.text(("cpu",)).splitlines()[2].split() == ["runtime", "threads", "8", "2"]


def test_values_are_shown_as_people_write_them():
    for value, shown in [
        (True, "yes"),
        (1e-4, "0.0001"),
        (0.5, "0.5"),
        (9999, "9999"),
        (10_000, "10,000"),
        ((), "none"),
        ({"a": 1.0}, "a: 1"),
    ]:
        assert settings_page.show(value) == shown


def test_the_page_is_in_step_with_the_profiles():
    assert settings_page.PAGE.read_text(encoding="utf-8") == settings_page.page(), (
        "run `python -m sae_research profiles --write` and commit docs/settings.md"
    )


def test_the_terminal_table_holds_every_override_of_every_profile():
    shown = settings_page.text()
    for row in config.departures(config.profiles()):
        assert f" {row['setting']} " in shown
