"""What is claimed: the blocks of `claims.yaml`, checked, with the rule that decides each claim.

The rule book: a control is the same measurement with the claimed ingredient removed, and the
verdict reads the paired difference; the unit is what the claim generalises over; all claims of a
study are corrected together; a claim that changes keeps its old form beside it.
"""

import json
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic

from sae_research import config, paths
from sae_research.errors import ResearchError, unknown

if TYPE_CHECKING:
    from sae_research.claims import Measurement

TESTBED = "world"
"""The owner of checks of the toy models, which are no claims of a paper."""
_SIDES = {
    "above": lambda x, bar: x > bar,
    "below": lambda x, bar: x < bar,
    "at least": lambda x, bar: x >= bar,
    "at most": lambda x, bar: x <= bar,
    "between": lambda x, bar: bar[0] <= x <= bar[1],
}
_FINITE = pydantic.Field(ge=-1e12, le=1e12, allow_inf_nan=False)
Number = Annotated[int, _FINITE] | Annotated[float, _FINITE]
Words = Annotated[str, pydantic.Field(pattern=r"\S")]
"""Text that is not empty."""
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

    def may_hold(self, m: "Measurement") -> bool:
        """Whether the interval reaches where it is expected, so that nothing is refuted."""
        if not self.interval or m.low is None or m.high is None:
            return self.is_met_at(m.value)
        if isinstance(self.threshold, tuple):
            return m.low <= self.threshold[1] and m.high >= self.threshold[0]
        return self.is_met_at(m.low) or self.is_met_at(m.high)


@_stated
class Control:
    """The same measurement with the claimed ingredient removed."""

    name: Words
    """The control, in words that a reader understands."""
    must: Expectation | None = None
    """Where the control's own number has to lie. Without it, the verdict reads the paired
    difference: claim minus control must lie beyond zero on the claimed side.
    """


@_stated
class Rule(Expectation):
    """When a claim counts as reproduced."""

    direction: Number | None = None
    """The value of no effect, beyond which the direction holds; without it, the threshold."""
    control: Control | None = None
    """A control that the number must differ from; otherwise the claim is confounded."""

    @property
    def difference(self) -> Expectation | None:
        """Where the paired difference from the control has to lie, whole interval."""
        if self.control is None or self.control.must is not None:
            return None
        return Expectation("above" if self.expect in ("above", "at least") else "below", 0)

    @pydantic.model_validator(mode="after")
    def _check_direction(self) -> "Rule":
        if self.expect == "between" and self.difference is not None:
            raise ValueError("a paired control needs a claimed side, which `between` has not")
        if self.direction is None:
            return self
        if isinstance(self.threshold, tuple):
            raise ValueError("`between` has no `direction`")
        side = _SIDES[self.expect]
        if self.direction != self.threshold and not side(self.threshold, self.direction):
            raise ValueError("`direction` lies beyond the threshold")
        return self

    def leans(self, m: "Measurement") -> bool:
        """Whether all of a measurement that misses the bar still lies beyond no effect."""
        if self.direction is None:
            return False
        side = "above" if self.expect in ("above", "at least") else "below"
        return Expectation(side, self.direction, self.interval).is_met_by(m)


@_stated
class Change:
    """An earlier form of a claim, which stays beside the present one."""

    date: Words
    """When the claim changed, YYYY-MM-DD."""
    old: Words
    """What the rule or the measure was until then."""
    reason: Words
    """Why it changed, and whether results had been seen."""


@_stated
class Claim:
    """One claim of a paper, and how we decide it."""

    id: Words
    """`study.topic.detail`."""
    statement: Words
    """What the paper says, in one sentence."""
    measure: Words
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
    unit: str = ""
    """What the interval generalises over: models, SAEs, seeds of training, questions, features."""
    family: str = ""
    """Claims that answer one question, drawn together."""
    planted: str = ""
    """What of the claim the toy models hold by construction: a verdict on them cannot show it."""
    against: str = ""
    """The control, where the measure itself is the paired difference from it."""
    no_control: str = ""
    """Why the claim has no control."""
    history: tuple[Change, ...] = ()
    """Earlier forms, oldest first."""
    study: str = ""
    """The study; given by the claim's place in claims.yaml."""

    @pydantic.model_validator(mode="after")
    def _check_claim(self) -> "Claim":
        if not self.id.startswith(f"{self.study}."):
            raise ValueError(f"its id must start with '{self.study}.'")
        if self.study == TESTBED:
            return self
        for name in ("unit", "family"):
            if not getattr(self, name):
                raise ValueError(f"it lacks `{name}`")
        if sum(map(bool, (self.rule.control, self.against, self.no_control))) != 1:
            raise ValueError(
                "it needs one of a `control` in its rule, `against` (its measure is the paired "
                "difference from that control) and `no_control` (the reason)"
            )
        return self


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
    except (ValueError, RecursionError) as error:  # a block within itself
        raise ResearchError(f"{name} in claims.yaml: {error}; correct it.") from error


def _explain(error: Any, name: str) -> ResearchError:
    """One sentence for the first mistake in a claim, with the nearest valid name."""
    where, cls = name, Claim
    path = [str(key) for key in error["loc"]]
    for level, inner in (("rule", Rule), ("control", Control), ("must", Expectation)):
        if path[:1] == [level] and path[1:]:
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
        place = f"the {'.'.join(path)} of {name} in claims.yaml" if path else place
        return ResearchError(f"{place} must be a block of settings, not {error['input']!r}.")
    if kind == "value_error":
        return ResearchError(f"{place}: {error['ctx']['error']}.")
    if not path:  # no JSON could be made of the block
        return ResearchError(f"{place}: {error['msg']}; correct it.")
    wanted = {"interval": "true or false", "threshold": "one number, or two for `between`"}
    reason = wanted.get(path[0]) or ("a number" if path[0] == "direction" else "text")
    return ResearchError(f"{place}: `{path[0]}` must be {reason}, not {error['input']!r}.")


def load_claims(study: str | None = None) -> dict[str, Claim]:
    """The claims of claims.yaml by id, of one study or of all."""
    book = config.read_yaml(paths.CLAIMS)
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
