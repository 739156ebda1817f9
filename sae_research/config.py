"""Typed settings: defaults are the papers' values, and a profile lists only its departures.

The settings of a study live in `studies/<study>/settings.py`, in a class `Settings` made with
`@settings`; a folder with that file is a study.
"""

import json
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform, get_args

import pydantic

from sae_research.errors import ResearchError, unknown
from sae_research.paths import PARAMS

T = TypeVar("T")
_TAKEN = ("cache", "embedded", "private", "real_saes", "scratch", "surveys")
"""Folders of `data` that are no profile's."""
_RULES = pydantic.ConfigDict(
    extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
)

Share = Annotated[float, pydantic.Field(ge=0, le=1)]
"""A number from 0 to 1."""
Jobs = int | Literal["ray"]
"""A number of processes; -1 is one a core."""


@dataclass_transform(frozen_default=True)
def settings(cls: type[T]) -> type[T]:
    """Make a frozen, validated settings class; the docstring under each field explains it."""
    return pydantic.dataclasses.dataclass(cls, frozen=True, config=_RULES)


@settings
class Runtime:
    """How a profile runs, whatever the study."""

    device: Annotated[str, pydantic.Field(pattern=r"^(cpu|cuda(:\d+)?)$")] = "cuda"
    """Where models and SAEs live: `cpu` or `cuda`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Number format of model weights; labels and answers are always read in float32."""
    threads: Annotated[int, pydantic.Field(le=1024)] = 8
    """CPU threads of torch; two threads on a tiny loop can be slower than one."""
    n_jobs: Jobs = 1
    """Tasks that run at once (joblib): 1 stays in one process, -1 is one per core, `ray` a Ray
    cluster."""
    seeds: int = 5
    """Seeds of every headline number."""
    ground: Literal["world", "real", "paper"] = "paper"
    """Where its verdicts are measured: `world` (toy models with known truth), `real` (a pretrained
    model that nobody here made), `paper` (the papers' own models)."""
    hub: bool = True
    """Whether models and SAEs come from the hub; the toy models need no network."""


@settings
class World:
    """The toy models, as notebook 00 checks them."""

    seeds: tuple[int, ...] = (0,)
    """Seeds of the toy models that are checked, to show that checks do not pass by luck."""
    passages: int = 800
    """Documents of each kind on which checks and latents are measured."""


@dataclass(frozen=True)
class Profile:
    """Everything that a run needs to know."""

    name: str
    runtime: Runtime = field(default_factory=Runtime)
    world: World = field(default_factory=World)
    studies: dict[str, Any] = field(default_factory=dict)
    """The settings of every study; `profile.side_effects` is `profile.studies["side_effects"]`."""

    def __getattr__(self, name: str) -> Any:
        studies = self.__dict__.get("studies", {})
        if name not in studies:
            raise AttributeError(name)
        return studies[name]

    def blocks(self) -> dict[str, Any]:
        """Runtime, world and every study, by name."""
        return {"runtime": self.runtime, "world": self.world, **self.studies}


def study_names() -> tuple[str, ...]:
    """All studies, in their order."""
    return tuple(_study_settings())


@cache
def _study_settings() -> dict[str, type]:
    from sae_research import studies

    names = [module.name for module in pkgutil.iter_modules(studies.__path__) if module.ispkg]
    found = {s: import_module(f"{studies.__name__}.{s}.settings").Settings for s in names}
    return dict(sorted(found.items(), key=lambda item: getattr(item[1], "ORDER", 99)))


def block_classes() -> dict[str, type]:
    """The settings class of runtime, world and every study."""
    return {"runtime": Runtime, "world": World, **_study_settings()}


def build(cls: type[T], overrides: object, where: str) -> T:
    """A settings object from its defaults and `overrides`; a mistake is one clear sentence."""
    if not isinstance(overrides, dict):
        words = f"'{where}' in params.yaml must be a block of settings"
        raise ResearchError(f"{words}, not {overrides!r}.")
    try:
        # JSON mode takes lists for tuples and still refuses text where a number belongs
        found = pydantic.TypeAdapter(cls).validate_json(json.dumps(overrides))
        _check_numbers(found, cls(), where)
        return found
    except pydantic.ValidationError as error:
        raise _explain(cls, error.errors()[0], where) from None
    except (TypeError, ValueError, RecursionError) as error:  # a date, or a block within itself
        raise ResearchError(f"'{where}' in params.yaml: {error}; correct it.") from error


def _check_numbers(found: Any, usual: Any, where: str) -> None:
    """No number is negative, and a count that is usually above zero stays so.

    A setting that takes zero for "none" is listed in its class's `MAY_BE_ZERO`.
    """
    for f in fields(found):
        value, default = getattr(found, f.name), getattr(usual, f.name)
        if is_dataclass(value):
            _check_numbers(value, default, f"{where}.{f.name}")
            continue
        counts = type(default) is int and default > 0
        least = int(counts and f.name not in getattr(found, "MAY_BE_ZERO", ()))
        if f.type == Jobs:
            least = -1
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not least <= number <= 1e12:
                raise ResearchError(
                    f"setting '{where}.{f.name}' must be at least {least} and below 1e12, not "
                    f"{number!r}; correct it in params.yaml."
                )


def _explain(cls: type, error: Any, where: str) -> ResearchError:
    """One sentence for the first mistake, with the nearest valid name."""
    current: Any = cls
    path = []
    for key in error["loc"]:
        if inner := [a for a in get_args(current) if is_dataclass(a)]:  # one of several blocks
            current = inner[0]
        elif is_dataclass(current) and key in {f.name for f in fields(current)}:
            current = next(f.type for f in fields(current) if f.name == key)
        else:
            break
        path.append(str(key))
    place = ".".join([where, *path])
    if error["type"] == "unexpected_keyword_argument":
        given = str(error["loc"][-1])
        renamed = getattr(current, "RENAMED", {})
        if given in renamed:
            return ResearchError(f"setting '{given}' in {place} is now called '{renamed[given]}'.")
        return unknown("setting", given, [f.name for f in fields(current)], place)
    if error["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        return unknown("choice", str(error["input"]), choices, place)
    if error["type"] == "value_error":
        return ResearchError(f"{place}: {error['ctx']['error']}; correct it in params.yaml.")
    reason = error["msg"][0].lower() + error["msg"][1:]
    return ResearchError(
        f"setting '{place}': {reason}, not {error['input']!r}; correct it in params.yaml."
    )


@cache
def _loader() -> type:
    """A YAML loader that reads 1e-4, without a point, as a number; keys are text, none twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        """PyYAML follows YAML 1.1, where only 1.0e-4 is a number, and takes the last of equals."""

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            seen: set[str] = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode) or key.value in seen:
                    line = key.start_mark.line + 1
                    raise yaml.YAMLError(f"line {line}: '{key.value}' is no key, or stands twice")
                seen.add(key.value)
                if key.tag != "tag:yaml.org,2002:merge":
                    key.tag = self.DEFAULT_SCALAR_TAG  # `1e9`, `on` and `500` are names here
            return node

    number = re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    return Loader


def read_yaml(path: Path) -> object:
    """A file of the project; what cannot be read is told in one sentence."""
    import yaml

    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_loader())
    # PyYAML hands on what its constructors raise: a date of month 13, brackets without end
    except (OSError, yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ResearchError(
            f"{path.name} cannot be read ({reason}); correct it or restore it from the repository."
        ) from error


def read_params() -> dict:
    """The content of `params.yaml`."""
    params = read_yaml(PARAMS)
    if not isinstance(params, dict) or not isinstance(params.get("profiles"), dict):
        raise ResearchError(
            "params.yaml must hold `profile` and `profiles`; restore it from the repository."
        )
    for name in params["profiles"]:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or name in _TAKEN:
            raise ResearchError(
                f"'{name}' in params.yaml cannot be the name of a profile; use letters, digits, "
                f"'-' and '_', and none of the folders {', '.join(_TAKEN)}."
            )
    return params


def profiles() -> tuple[str, ...]:
    """Names of the profiles in `params.yaml`."""
    return tuple(read_params()["profiles"])


def load(profile: str | None = None) -> Profile:
    """The settings of `profile`, or of the one that `params.yaml` names."""
    params = read_params()
    name = str(params.get("profile") if profile is None else profile)
    if name not in params["profiles"]:
        raise unknown("profile", name, params["profiles"], "params.yaml")
    given = params["profiles"][name]
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise ResearchError(f"'profiles.{name}' in params.yaml must be a block, not {given!r}.")
    classes = block_classes()
    for key in given:
        if key not in classes:
            raise unknown("setting", str(key), classes, f"profiles.{name}")
    blocks = {
        key: build(cls, {} if given.get(key) is None else given[key], f"profiles.{name}.{key}")
        for key, cls in classes.items()
    }
    return Profile(name, blocks.pop("runtime"), blocks.pop("world"), blocks)


def as_json(profile: Profile) -> dict:
    """All settings in force, as plain values."""
    return {name: asdict(block) for name, block in profile.blocks().items()}


def departures(names: tuple[str, ...]) -> list[dict]:
    """Every setting in which one of the profiles `names` departs from the default.

    Each row holds block, setting, meaning, default and the values by profile.
    """
    loaded = {name: load(name) for name in names}
    rows: list[dict] = []
    for block, cls in block_classes().items():
        values = {name: profile.blocks()[block] for name, profile in loaded.items()}
        rows += _compare(block, "", cls(), values)
    return rows


def _compare(block: str, prefix: str, default: Any, given: dict[str, Any]) -> Iterator[dict]:
    for f in fields(default):
        value = getattr(default, f.name)
        values = {name: getattr(settings, f.name) for name, settings in given.items()}
        if is_dataclass(value):
            yield from _compare(block, f"{prefix}{f.name}.", value, values)
        elif any(v != value for v in values.values()):
            meaning = " ".join((explanation(type(default), f.name)).split())
            row = {"block": block, "setting": prefix + f.name, "meaning": meaning}
            yield {**row, "default": value, "profiles": values}


def explanation(cls: type, name: str) -> str:
    """The docstring under a setting, which pydantic keeps in the class that states it."""
    found = (getattr(c, "__pydantic_fields__", {}).get(name) for c in cls.__mro__)
    return next((field.description for field in found if field and field.description), "")
