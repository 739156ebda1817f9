"""Settings: the papers' values by default, typed overrides, and a sentence with the nearest name
on any mistake.
"""

import typing
from dataclasses import FrozenInstanceError, field

import pytest

from sae_research import config
from sae_research.errors import ResearchError


@config.settings
class Inner:
    """A nested block."""

    rate: float = 0.1
    """A rate."""


@config.settings
class Example:
    """Every kind of setting."""

    RENAMED: typing.ClassVar[dict[str, str]] = {"pace": "rate"}

    steps: int = 10
    rate: float = 0.5
    name: str = "a"
    flag: bool = False
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[float, str] = (0.0, "x")
    limit: int | None = 3
    jobs: config.Jobs = 1
    grid: dict[str, float] = field(default_factory=dict)
    mode: typing.Literal["dense", "sparse"] = "dense"
    inner: Inner = field(default_factory=Inner)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"steps": 3}, 3),
        ({"rate": 1}, 1.0),
        ({"flag": True}, True),
        ({"sizes": [4, 5, 6]}, (4, 5, 6)),
        ({"sizes": []}, ()),
        ({"pair": [1, "y"]}, (1.0, "y")),
        ({"limit": None}, None),
        ({"limit": 7}, 7),
        ({"jobs": "ray"}, "ray"),
        ({"jobs": -1}, -1),
        ({"grid": {"a": 1}}, {"a": 1.0}),
        ({"mode": "sparse"}, "sparse"),
        ({"inner": {"rate": 2}}, Inner(2.0)),
    ],
)
def test_overrides_take_the_declared_type(given, expected):
    (name,) = given
    value = getattr(config.build(Example, given, "here"), name)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"step": 3}, "unknown setting 'step' in here; did you mean 'steps'"),
        ({"zzzz": 3}, "unknown setting 'zzzz' in here; valid: flag, grid"),
        ({"inner": {"rte": 1}}, "unknown setting 'rte' in here.inner; did you mean 'rate'"),
        ({"pace": 3}, "setting 'pace' in here is now called 'rate'"),
        ({"steps": "3"}, "'here.steps': input should be a valid integer, not '3'"),
        ({"steps": 3.5}, "'here.steps': input should be a valid integer"),
        ({"steps": True}, "'here.steps': input should be a valid integer, not True"),
        ({"rate": "fast"}, "'here.rate': input should be a valid number, not 'fast'"),
        ({"rate": None}, "'here.rate': input should be a valid number, not None"),
        ({"flag": 1}, "'here.flag': input should be a valid boolean, not 1"),
        ({"sizes": 4}, "'here.sizes': input should be a valid array, not 4"),
        ({"sizes": [1, "2"]}, "'here.sizes': input should be a valid integer, not '2'"),
        ({"pair": [1.0]}, "'here.pair'"),
        ({"limit": "x"}, "'here.limit': input should be a valid integer, not 'x'"),
        ({"jobs": 1.5}, "'here.jobs'"),
        ({"mode": "spars"}, "unknown choice 'spars' in here.mode; did you mean 'sparse'"),
        ({"inner": 3}, "'here.inner'"),
        ([1], "'here' in params.yaml must be a block of settings"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_place_and_the_nearest_name(given, words):
    with pytest.raises(ResearchError) as caught:
        config.build(Example, given, "here")
    assert words in str(caught.value)


@pytest.mark.parametrize("name", config.profiles())
def test_every_profile_of_the_repository_loads(name):
    profile = config.load(name)
    assert profile.name == name
    assert profile.runtime.seeds >= 2
    assert any(getattr(profile, study).models for study in config.study_names())


def test_the_profiles_of_the_design_are_there_and_cpu_is_the_default():
    assert {"cpu", "full", "smoke", "real", "laptop", "gpu"} <= set(config.profiles())
    assert config.load().name == "cpu"
    # the papers' values
    assert config.load("gpu").opinion_qa == config.block_classes()["opinion_qa"]()


def test_an_unknown_profile_or_study_names_the_nearest(tmp_path, monkeypatch):
    with pytest.raises(
        ResearchError, match=r"unknown profile 'laptp' in params.yaml; did you mean 'laptop'"
    ):
        config.load("laptp")
    monkeypatch.setattr(config, "PARAMS", tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("profile: a\nprofiles: {a: {opinion_q: {}}}\n")
    with pytest.raises(
        ResearchError, match=r"'opinion_q' in profiles.a; did you mean 'opinion_qa'"
    ):
        config.load()
    for broken in ("profile: a\n", "profiles: [", "- 1", ""):
        (tmp_path / "params.yaml").write_text(broken)
        with pytest.raises(ResearchError, match=r"params.yaml .*restore it"):
            config.load()
    (tmp_path / "params.yaml").unlink()
    with pytest.raises(ResearchError, match=r"params.yaml cannot be read"):
        config.load()
    (tmp_path / "params.yaml").write_text("profile: [a]\nprofiles: {a: {}}\n")
    with pytest.raises(ResearchError, match="unknown profile"):
        config.load()


def test_settings_are_frozen():
    with pytest.raises(FrozenInstanceError):
        config.load("cpu").runtime.seeds = 1


def test_settings_that_changed_their_name_are_refused_with_the_new_one():
    from dataclasses import fields, is_dataclass

    def walk(cls, place):
        names = {f.name for f in fields(cls)}
        for old, new in getattr(cls, "RENAMED", {}).items():
            assert old not in names
            assert new in names
            with pytest.raises(ResearchError, match=f"'{old}' in {place} is now called '{new}'"):
                config.build(cls, {old: 1}, place)
        for f in fields(cls):
            if is_dataclass(f.type):
                walk(f.type, f"{place}.{f.name}")

    for study, cls in config.block_classes().items():
        walk(cls, study)


def test_numbers_without_a_point_are_read_as_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "PARAMS", tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text(
        "profile: a\nprofiles: {a: {opinion_qa: {training: {lr: 1e-4}}}}\n"
    )
    assert config.load().opinion_qa.training.lr == 1e-4


@pytest.mark.parametrize(
    ("study", "given", "words"),
    [
        ("runtime", {"seeds": 0}, "'a.seeds' must be at least 1"),
        ("runtime", {"threads": 0}, "'a.threads' must be at least 1"),
        ("runtime", {"threads": 100_000}, "'a.threads'"),
        ("runtime", {"device": "gpu"}, "'a.device'"),
        ("runtime", {"dtype": "float8"}, "unknown choice 'float8' in a.dtype"),
        ("runtime", {"n_jobs": -2}, "'a.n_jobs' must be at least -1"),
        ("runtime", {"n_jobs": "many"}, "'a.n_jobs': input should be"),
        ("side_effects", {"n_features": -2}, "'a.n_features' must be at least 1"),
        ("side_effects", {"n_contexts": 0}, "'a.n_contexts' must be at least 1"),
        ("side_effects", {"n_downstream_latents": 0}, "'a.n_downstream_latents' must be"),
        ("side_effects", {"contexts_per_bucket": 0}, "'a.contexts_per_bucket' must be"),
        ("side_effects", {"n_features": 10**30}, "'a.n_features' must be"),
        ("side_effects", {"frequency_band": [0.5, 0.1]}, "`frequency_band` must be two numbers"),
        ("side_effects", {"holdout_fraction": 1.5}, "'a.holdout_fraction'"),
        ("side_effects", {"tau": float("nan")}, "'a.tau'"),
        ("side_effects", {"dose": float("inf")}, "'a.dose'"),
        ("opinion_qa", {"training": {"steps": 0}}, "'a.training.steps' must be at least 1"),
        ("opinion_qa", {"ranks": [1, -1]}, "'a.ranks' must be at least 0"),
        ("meta_saes", {"k": 30_000.0}, "`k` must be below `d_sae`"),
        ("meta_saes", {"meta_d_sae": 30_000}, "`meta_d_sae` must be below `d_sae`"),
        ("specialized_saes", {"main_l0": 7}, "7 is not among its `l0s`"),
        ("specialized_saes", {"latents": 10}, "more active latents than the 10"),
    ],
)
def test_a_number_out_of_range_or_at_odds_with_another_is_refused(study, given, words):
    with pytest.raises(ResearchError) as caught:
        config.build(config.block_classes()[study], given, "a")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("profile: a\nprofiles: {a: {world: {}, world: {}}}\n", "line 2: 'world' is no key, or"),
        ("profile: a\nprofile: b\nprofiles: {a: {}}\n", "line 2: 'profile' is no key, or"),
        ("profile: a\nprofiles: {a: [1]}\n", "'profiles.a' in params.yaml must be a block"),
        ("profile: a\nprofiles: {a: {world: 0}}\n", "must be a block of settings, not 0"),
        ("profile: a\nprofiles: {a: &x {world: {seeds: *x}}}\n", "params.yaml"),
        ("profiles: {a: {}}\n", "unknown profile 'None'"),
        ("profile: a\nprofiles: {a: {world: {seeds: 2020-13-01}}}\n", "cannot be read (month"),
        ("[" * 5_000, "params.yaml cannot be read"),
    ],
)
def test_a_damaged_file_of_settings_is_one_sentence(text, words, tmp_path, monkeypatch):
    monkeypatch.setattr(config, "PARAMS", tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(ResearchError) as caught:
        config.load()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_keys_are_words_and_a_merged_block_may_be_overruled(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text("a: &a {x: 1, on: 2}\nb: {<<: *a, x: 3, 1e9: 4}\n")
    assert config.read_yaml(path)["b"] == {"x": 3, "on": 2, "1e9": 4}
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ResearchError, match=r"some.yaml cannot be read"):
        config.read_yaml(path)
