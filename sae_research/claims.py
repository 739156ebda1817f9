"""Claims stated before any run, and verdicts computed from what was measured.

`claims.yaml` maps each study to its claims. A notebook measures them and calls `record`; the
verdict follows from value, interval, control and rule alone.
"""

import json
import math
import typing
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic

from sae_research import ledger, paths, stages, store
from sae_research.errors import ResearchError, unknown

if TYPE_CHECKING:
    import pandas as pd

    from sae_research.stats import Interval

VERDICTS = ledger.VERDICTS
REPRODUCED, DIRECTION, CONFOUNDED, NOT_REPRODUCED, NOT_TESTABLE = VERDICTS

_SIDES = {
    "above": lambda x, bar: x > bar,
    "below": lambda x, bar: x < bar,
    "at least": lambda x, bar: x >= bar,
    "at most": lambda x, bar: x <= bar,
    "between": lambda x, bar: bar[0] <= x <= bar[1],
}
Number = int | Annotated[float, pydantic.AllowInfNan(False)]
_stated = pydantic.dataclasses.dataclass(
    frozen=True, config=pydantic.ConfigDict(extra="forbid", strict=True)
)


@_stated
class Expectation:
    """Where a number has to lie."""

    expect: Literal["above", "below", "at least", "at most", "between"]
    """On which side of the threshold."""
    threshold: Number | tuple[Number, Number]
    """The bar; two numbers for `between`."""
    interval: bool = True
    """Whether the whole interval has to lie there, not the value alone."""

    @pydantic.model_validator(mode="after")
    def _check_threshold(self) -> "Expectation":
        if self.expect != "between":
            if isinstance(self.threshold, tuple):
                raise ValueError(f"the threshold of `{self.expect}` must be one number")
        elif not isinstance(self.threshold, tuple) or self.threshold[0] > self.threshold[1]:
            raise ValueError("`between` needs two numbers, the smaller first")
        return self

    def is_met_at(self, x: float) -> bool:
        """Whether one number lies where it is expected."""
        return _SIDES[self.expect](x, self.threshold)

    def is_met_by(self, m: "Measurement") -> bool:
        """Whether the value, and if the rule asks for it the interval, lies as expected."""
        numbers = (m.value, m.low, m.high) if self.interval else (m.value,)
        return all(map(self.is_met_at, numbers))


@_stated
class Control(Expectation):
    """What the same measurement has to show under a control for the claim to stand."""

    name: str = ""
    """The control, in words that a reader understands."""


@_stated
class Rule(Expectation):
    """When a claim counts as reproduced."""

    direction: Number | None = None
    """The value of no effect, beyond which the direction holds; without it, the threshold."""
    control: Control | None = None
    """A control whose expectation must be met too; otherwise the claim is confounded."""

    @pydantic.model_validator(mode="after")
    def _check_direction(self) -> "Rule":
        if self.direction is None:
            return self
        if isinstance(self.threshold, tuple):
            raise ValueError("`between` has no `direction`")
        side = _SIDES[self.expect]
        if self.direction != self.threshold and not side(self.threshold, self.direction):
            raise ValueError("`direction` lies beyond the threshold")
        return self

    def leans_at(self, x: float) -> bool:
        """Whether the value lies at least in the claimed direction."""
        if self.direction is None:
            return self.is_met_at(x)
        return x > self.direction if self.expect in ("above", "at least") else x < self.direction


@_stated
class Claim:
    """One claim of a paper, and how we decide it."""

    id: str
    """`study.topic.detail`."""
    statement: str
    """What the paper says, in one sentence."""
    measure: str
    """The number that we compute, with its unit and what its interval covers."""
    rule: Rule
    """When the claim counts as reproduced."""
    paper: str = ""
    """The paper and where in it."""
    paper_value: str | Number = ""
    """The paper's number; empty when unknown."""
    evidence: str = ""
    """Where the paper's number comes from (abstract, table, figure, code); empty when unknown."""
    needs: str = ""
    """What some profiles lack to test the claim; only a claim that names it may go unmeasured."""
    study: str = ""
    """The study; given by the claim's place in claims.yaml."""

    @pydantic.model_validator(mode="after")
    def _check_id(self) -> "Claim":
        if not self.id.startswith(f"{self.study}."):
            raise ValueError(f"its id must start with '{self.study}.'")
        return self


@dataclass(frozen=True)
class Measurement:
    """What a run found."""

    value: float
    """The point estimate, in the unit that the claim's `measure` names."""
    low: float | None = None
    """Lower end of its interval."""
    high: float | None = None
    """Upper end of its interval."""
    n: int | None = None
    """How many independent items (seeds, features, persons) the number rests on."""
    control: "Measurement | None" = None
    """The same measurement under the control that the rule names."""

    def __post_init__(self) -> None:
        for name, kind in (("value", float), ("low", float), ("high", float), ("n", int)):
            given = getattr(self, name)
            object.__setattr__(self, name, given if given is None else kind(given))

    @classmethod
    def of(cls, found: "Interval", control: "Interval | None" = None) -> "Measurement":
        """From an estimate with its interval (and the same under the control)."""
        inner = None if control is None else cls.of(control)
        return cls(found.value, found.low, found.high, found.n, inner)


def _number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def parse(study: str, given: dict) -> Claim:
    """One claim from its block in claims.yaml, checked."""
    named = isinstance(given, dict) and "id" in given
    name = f"claim '{given['id']}'" if named else f"a claim of {study}"
    block = {**given, "study": study} if isinstance(given, dict) else given
    try:
        # JSON mode takes lists for tuples and still refuses text where a number belongs
        return pydantic.TypeAdapter(Claim).validate_json(json.dumps(block, default=str))
    except pydantic.ValidationError as error:
        raise _explain(error.errors()[0], name) from None


def _explain(error: Any, name: str) -> ResearchError:
    """One sentence for the first mistake in a claim, with the nearest valid name."""
    where, cls = name, Claim
    path = [str(key) for key in error["loc"]]
    for level, inner in (("rule", Rule), ("control", Control)):
        if path[:1] == [level]:
            where = f"the {level} of {name}"
            cls = inner
            path.pop(0)
    kind = error["type"]
    place = f"{where} in claims.yaml"
    if kind == "unexpected_keyword_argument":
        return unknown("field", path[-1], [f.name for f in fields(cls)], place)
    if kind == "literal_error":
        return unknown("expectation", str(error["input"]), _SIDES, place)
    if kind == "missing":
        return ResearchError(f"{place} lacks {path[-1]}; state it before any run.")
    if kind == "dataclass_type":
        return ResearchError(f"{place} must be a block of settings, not {error['input']!r}.")
    if kind == "value_error":
        return ResearchError(f"{place}: {error['ctx']['error']}.")
    wanted = {"interval": "true or false", "threshold": "one number, or two for `between`"}
    reason = wanted.get(path[0]) or ("a number" if path[0] == "direction" else "text")
    return ResearchError(f"{place}: `{path[0]}` must be {reason}, not {error['input']!r}.")


def load_claims(study: str | None = None) -> dict[str, Claim]:
    """The claims of claims.yaml by id, of one study or of all."""
    import yaml

    try:
        book = yaml.safe_load(paths.CLAIMS.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ResearchError(
            f"claims.yaml cannot be read ({error}); restore it from the repository."
        ) from error
    if not isinstance(book, dict) or not all(isinstance(block, list) for block in book.values()):
        raise ResearchError(
            "claims.yaml must map each study to a list of claims; restore it from the repository."
        )
    if study is not None and study not in book:
        raise unknown("study", study, book, "claims.yaml")
    claims: dict[str, Claim] = {}
    for name, block in book.items():
        for given in block:
            claim = parse(name, given)
            if claim.id in claims:
                words = f"claim '{claim.id}' is stated twice in claims.yaml"
                raise ResearchError(f"{words}; give each claim its own id.")
            claims[claim.id] = claim
    return {i: c for i, c in claims.items() if study in (None, c.study)}


def _check(m: Measurement, wanted: Expectation, what: str) -> None:
    """Refuse a measurement that no verdict can rest on."""
    problem = ""
    if not _number(m.value):
        problem = f"was measured as {m.value}; a verdict needs a finite number"
    elif (m.low is None) != (m.high is None):
        problem = "has one end of its interval only; give `low` and `high`, or neither"
    elif m.low is None:
        if wanted.interval:
            problem = "has no interval, but its rule asks for one; measure `low` and `high`"
    elif not (_number(m.low) and _number(m.high)):
        problem = f"has the interval [{m.low}, {m.high}]; both ends must be finite numbers"
    else:
        slack = 1e-9 * max(1.0, abs(m.value))  # rounding may put the value on an end
        if not m.low - slack <= m.value <= m.high + slack:
            problem = f"has a value of {m.value} outside its interval [{m.low}, {m.high}]"
    if problem:
        raise ResearchError(f"{what} {problem}.")


def judge(claim: Claim, measurement: Measurement | None) -> str:
    """The verdict that follows from value, interval, control and rule."""
    rule = claim.rule
    if measurement is None:
        if not claim.needs:
            raise ResearchError(
                f"claim '{claim.id}' was not measured; only one with `needs` may be left out."
            )
        return NOT_TESTABLE
    _check(measurement, rule, f"claim '{claim.id}'")
    if (rule.control is None) != (measurement.control is None):
        raise ResearchError(
            f"claim '{claim.id}' states {'a' if rule.control else 'no'} control, but "
            f"{'none' if rule.control else 'one'} was measured; make rule and measurement agree."
        )
    stands = True
    if rule.control is not None:
        _check(measurement.control, rule.control, f"the control of claim '{claim.id}'")
        stands = rule.control.is_met_by(measurement.control)
    if rule.is_met_by(measurement):
        return REPRODUCED if stands else CONFOUNDED
    return DIRECTION if rule.leans_at(measurement.value) and stands else NOT_REPRODUCED


def _as_json(rule: Rule) -> dict:
    """A rule as a ledger holds it: lists for tuples."""
    return json.loads(json.dumps(asdict(rule)))


def entry(claim: Claim, measurement: Measurement | None, notebook: str) -> dict:
    """The ledger's line for one claim, judged as written: numbers have 6 significant digits."""
    measurement = _rounded(measurement)
    numbers = dict.fromkeys(("value", "low", "high", "n", "control"))
    if measurement is not None:
        numbers = asdict(measurement)
        if numbers["control"] is not None:
            del numbers["control"]["control"]
    stated = ("id", "study", "statement", "paper_value", "evidence")
    return {
        **{key: getattr(claim, key) for key in stated},
        **numbers,
        "rule": _as_json(claim.rule),
        "verdict": judge(claim, measurement),
        "notebook": notebook,
    }


def _rounded(m: Measurement | None) -> Measurement | None:
    if m is None:
        return None
    value, low, high = typing.cast(list, store.rounded([m.value, m.low, m.high]))
    return Measurement(value, low, high, m.n, _rounded(m.control))


def _file(profile: str, study: str) -> Path:
    return paths.study_data(profile, study) / "claims.json"


def record(
    profile: str, study: str, notebook: str, measurements: dict[str, Measurement | None]
) -> "pd.DataFrame":
    """Judge every claim of a study and write its `claims.json`; returns the table to show."""
    claims = load_claims(study)
    for given in measurements:
        if given not in claims:
            raise unknown("claim", given, claims, f"the measurements of {notebook}")
    missing = sorted(set(claims) - set(measurements))
    if missing:
        raise ResearchError(
            f"{notebook} did not measure {', '.join(missing)}; every claim of {study} needs one."
        )
    lines = [entry(claim, measurements[i], notebook) for i, claim in claims.items()]
    store.write_json(_file(profile, study), lines)
    return ledger.table(lines)


def read(profile: str) -> list[dict]:
    """The ledger of a whole profile as it was last put together."""
    return typing.cast(list, store.read_json(paths.DATA / profile / "claims.json"))


def unite(profile: str) -> list[dict]:
    """Put all studies' ledgers together; `metrics.json` repeats them for `dvc metrics diff`."""
    written = {out for outs in stages.read_outputs(profile).values() for out in outs}
    lines = []
    for claim in load_claims().values():
        file = _file(profile, claim.study)
        if file not in written:
            continue
        found = {line["id"]: line for line in typing.cast(list, store.read_json(file))}
        if claim.id not in found or found[claim.id]["rule"] != _as_json(claim.rule):
            raise ResearchError(
                f"{paths.relative(file)} does not hold claim '{claim.id}' as claims.yaml states "
                "it; run `make reproduce` to measure it again."
            )
        lines.append(found[claim.id])
    store.write_json(paths.DATA / profile / "claims.json", lines)
    metrics = {line["id"]: {"value": line["value"], "verdict": line["verdict"]} for line in lines}
    store.write_json(paths.DATA / profile / "metrics.json", metrics)
    return lines
