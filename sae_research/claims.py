"""Claims as claims.yaml states them, and verdicts computed from what was measured.

`claims.yaml` maps each study to its claims. A notebook measures them and calls `record`; the
verdict follows from value, interval, control and rule alone.
"""

import json
import math
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pydantic

from sae_research import config, ledger, paths, stages, store
from sae_research.claim_rules import (
    TESTBED,
    Change,
    Claim,
    Expectation,
    Rule,
    Words,
    load_claims,
)
from sae_research.errors import ResearchError, unknown

if TYPE_CHECKING:
    import pandas as pd

    from sae_research.stats import Interval

VERDICTS = ledger.VERDICTS
REPRODUCED, DIRECTION, CONFOUNDED, UNDECIDED, NOT_REPRODUCED, NOT_TESTABLE = VERDICTS
LEVEL = 0.05
"""The error rate of all claims of a study."""


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
    difference: "Measurement | None" = None
    """The measurement minus that of the control, paired."""

    def __post_init__(self) -> None:
        for name, kind in (("value", float), ("low", float), ("high", float), ("n", int)):
            given = getattr(self, name)
            object.__setattr__(self, name, given if given is None else kind(given))

    @classmethod
    def of(
        cls,
        found: "Interval",
        control: "Interval | None" = None,
        difference: "Interval | None" = None,
    ) -> "Measurement":
        """From an estimate with its interval, the same under the control, and their difference."""
        inner = [None if x is None else cls.of(x) for x in (control, difference)]
        return cls(found.value, found.low, found.high, found.n, *inner)


def _number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


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


def p_value(wanted: Expectation, m: Measurement) -> float | None:
    """Two-sided p-value of "the number lies on the threshold", read off its 95 % interval.

    It is that of a t statistic with n - 1 degrees of freedom whose 95 % interval ends where the
    measured one ends towards the threshold. One unit, or an interval without width on that side,
    shows no spread to judge by: 1. Without an interval: None.
    """
    from scipy.stats import t

    if not wanted.interval or m.low is None or m.high is None:
        return None
    if not wanted.is_met_at(m.value) or m.n is None or m.n < 2:
        return 1.0
    law = t(m.n - 1)
    found = []
    for bar in wanted.threshold if isinstance(wanted.threshold, tuple) else (wanted.threshold,):
        reach = m.value - m.low if m.value > bar else m.high - m.value
        gap = abs(m.value - bar)
        found.append(2 * float(law.sf(gap / reach * law.ppf(0.975))) if reach > 0 else 1.0)
    return max(found)


def _claim_p(rule: Rule, m: Measurement) -> float | None:
    """The larger p-value of rule and paired difference: both must hold."""
    found = [p_value(rule, m)]
    if rule.difference is not None and m.difference is not None:
        found.append(p_value(rule.difference, m.difference))
    return max((p for p in found if p is not None), default=None)


def correct(claims: Sequence[Claim], measured: dict[str, Measurement | None]) -> dict[str, float]:
    """Holm's p-values of the claims of each study that have an interval."""
    from sae_research.stats import holm

    found: dict[str, dict[str, float]] = {}
    for claim in claims:
        m = measured[claim.id]
        p = None if m is None else _claim_p(claim.rule, m)
        if p is not None and claim.study != TESTBED:
            found.setdefault(claim.study, {})[claim.id] = p
    return {
        name: value
        for own in found.values()
        for name, value in zip(own, holm(list(own.values())), strict=True)
    }


def _against(claim: Claim, m: Measurement) -> tuple[Expectation, Measurement] | None:
    """What the control asks for and the number that has to meet it; None without a control."""
    rule = claim.rule
    needed = {
        "control": rule.control is not None,
        "difference from its control": rule.difference is not None,
    }
    for (what, stated), given in zip(needed.items(), (m.control, m.difference), strict=True):
        if stated != (given is not None):
            raise ResearchError(
                f"claim '{claim.id}' states {'a' if stated else 'no'} {what}, but "
                f"{'none' if stated else 'one'} was measured; make rule and measurement agree."
            )
    if rule.difference is not None:
        wanted, given, what = rule.difference, m.difference, "difference"
    elif rule.control is not None:
        wanted, given, what = rule.control.must, m.control, "control"
    else:
        return None
    _check(given, wanted, f"the {what} of claim '{claim.id}'")
    return wanted, given


def judge(claim: Claim, measurement: Measurement | None, p: float | None = None) -> str:
    """The verdict that follows from value, interval, control, rule and corrected p-value.

    Without an interval, or with a control that is not paired, no claim is reproduced. Undecided is
    one whose bar, and whose control's, lie within the intervals.
    """
    rule = claim.rule
    if measurement is None:
        if not claim.needs:
            raise ResearchError(
                f"claim '{claim.id}' was not measured; only one with `needs` may be left out."
            )
        return NOT_TESTABLE
    _check(measurement, rule, f"claim '{claim.id}'")
    tests = [(rule, measurement), *filter(None, [_against(claim, measurement)])]
    stands = all(wanted.is_met_by(m) for wanted, m in tests[1:])
    if rule.is_met_by(measurement):
        if not stands:
            return CONFOUNDED
        weak = not rule.interval or (rule.control is not None and rule.difference is None)
        return DIRECTION if weak or (p is not None and p > LEVEL) else REPRODUCED
    if rule.leans(measurement) and stands:
        return DIRECTION
    return UNDECIDED if all(wanted.may_hold(m) for wanted, m in tests) else NOT_REPRODUCED


def _repeat(claim: Claim) -> dict:
    """What a ledger repeats of a claim, as JSON holds it: lists for tuples."""
    names = ("id", "study", "statement", "measure", "paper_value", "evidence")
    names += ("unit", "family", "planted", "against", "no_control", "rule", "history")
    stated = asdict(claim)
    return json.loads(json.dumps({name: stated[name] for name in names}))


def entry(
    claim: Claim, measurement: Measurement | None, notebook: str, p: float | None = None
) -> dict:
    """The ledger's line for one claim; `p` is its p-value after correction."""
    numbers = dict.fromkeys(("value", "low", "high", "n", "control", "difference"))
    if measurement is not None:
        numbers = asdict(measurement)
        for inner in filter(None, (numbers["control"], numbers["difference"])):
            del inner["control"], inner["difference"]
    return {
        **_repeat(claim),
        **numbers,
        "p": p,
        "verdict": judge(claim, measurement, p),
        "notebook": notebook,
    }


def _rounded(m: Measurement | None) -> Measurement | None:
    if m is None:
        return None
    value, low, high = typing.cast(list, store.rounded([m.value, m.low, m.high]))
    return Measurement(value, low, high, m.n, _rounded(m.control), _rounded(m.difference))


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
    # judged as written: numbers have 6 significant digits
    found = {i: _rounded(m) for i, m in measurements.items()}
    p = store.rounded(correct(list(claims.values()), found))
    where = {"ground": config.load(profile).runtime.ground}
    lines = [entry(claim, found[i], notebook, p.get(i)) | where for i, claim in claims.items()]
    store.write_json(paths.aside(_file(profile, study)), lines)
    return ledger.table(lines)


class _Number(pydantic.BaseModel, strict=True, allow_inf_nan=False):
    """What every number of a ledger has."""

    value: float | None
    low: float | None
    high: float | None
    n: int | None


class _OldLine(_Number):
    """What is read of a ledger's line, whenever it was written."""

    id: Words
    study: Words
    statement: Words
    paper_value: str | float
    history: tuple[Change, ...] = ()
    control: _Number | None = None
    difference: _Number | None = None
    verdict: typing.Literal[VERDICTS]  # type: ignore[valid-type]


class _Line(_OldLine):
    """What is read of a line since p-values are corrected."""

    family: str
    rule: Rule
    p: float | None


def _read(file: Path) -> list[dict]:
    """The lines of a ledger, if each has what is read of it."""
    lines = store.read_json(file)
    for i, line in enumerate(lines if isinstance(lines, list) else [lines]):
        try:
            (_Line if "p" in line else _OldLine).model_validate_json(json.dumps(line))
        except (TypeError, ValueError) as error:
            raise ResearchError(
                f"entry {i} of {paths.relative(file)} is damaged; restore the file from the "
                "repository, or delete it and run `make reproduce`."
            ) from error
    return typing.cast(list, lines)


def read(profile: str) -> list[dict]:
    """The ledger of a whole profile as it was last put together."""
    return _read(paths.DATA / profile / "claims.json")


def unite(profile: str) -> list[dict]:
    """Put all studies' ledgers together; `metrics.json` repeats them for `dvc metrics diff`."""
    written = {out for outs in stages.read_outputs(profile).values() for out in outs}
    lines = []
    for claim in load_claims().values():
        file = _file(profile, claim.study)
        if file not in written:
            continue
        found = {line["id"]: line for line in _read(file)}
        if not found:  # the study has no model in this profile
            continue
        line = found.get(claim.id, {})
        if any(line.get(name) != value for name, value in _repeat(claim).items()):
            raise ResearchError(
                f"{paths.relative(file)} does not hold claim '{claim.id}' as claims.yaml states "
                "it; run `make reproduce` to measure it again."
            )
        lines.append(line)
    folder = paths.aside(paths.DATA / profile)
    store.write_json(folder / "claims.json", lines)
    metrics = {line["id"]: {"value": line["value"], "verdict": line["verdict"]} for line in lines}
    store.write_json(folder / "metrics.json", metrics)
    return lines
