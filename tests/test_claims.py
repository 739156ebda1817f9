"""Verdicts follow from value, interval, control and rule, and from nothing else."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest

from sae_research import claim_figures, claim_rules, claims, ledger, paths, stages
from sae_research.claims import (
    CONFOUNDED,
    DIRECTION,
    NOT_REPRODUCED,
    NOT_TESTABLE,
    REPRODUCED,
    UNDECIDED,
    Measurement,
)
from sae_research.errors import ResearchError


def claim(needs="", **rule):
    given = {"id": "s.a", "statement": "It holds.", "measure": "a number", "rule": rule}
    given |= {"unit": "seeds", "family": "f"}
    if "control" not in rule:
        given["no_control"] = "this test has none"
    return claim_rules.parse("s", {**given, "needs": needs} if needs else given)


def m(value, low=None, high=None, control=None, difference=None):
    return Measurement(value, low, high, n=5, control=control, difference=difference)


ABOVE = {"expect": "above", "threshold": 0.2, "direction": 0}
BELOW = {"expect": "below", "threshold": -0.2, "direction": 0}
UPWARD = ("above", "at least")


@pytest.mark.parametrize(
    ("rule", "measured", "verdict"),
    [
        (ABOVE, m(0.5, 0.3, 0.7), REPRODUCED),
        (
            ABOVE,
            m(0.5, 0.2, 0.7),
            DIRECTION,
        ),  # `above` is strict: an interval that touches the bar does not clear it
        (ABOVE, m(0.5, 0.1, 0.7), DIRECTION),
        (ABOVE, m(0.1, 0.05, 0.2), DIRECTION),
        (ABOVE, m(0.1, -0.1, 0.3), UNDECIDED),
        (ABOVE, m(0.0, -0.1, 0.1), NOT_REPRODUCED),
        (ABOVE, m(-0.5, -0.7, -0.3), NOT_REPRODUCED),
        (BELOW, m(-0.5, -0.7, -0.3), REPRODUCED),
        (BELOW, m(-0.5, -0.7, -0.1), DIRECTION),
        (BELOW, m(-0.1, -0.2, 0.1), NOT_REPRODUCED),  # -.2 is not below -.2
        (BELOW, m(-0.1, -0.21, 0.1), UNDECIDED),
        (BELOW, m(0.0, -0.2, 0.1), NOT_REPRODUCED),
        (BELOW, m(0.5, 0.3, 0.7), NOT_REPRODUCED),
        # without a value of no effect there is no direction: what the interval holds is open
        ({"expect": "above", "threshold": 0.2}, m(0.5, 0.1, 0.7), UNDECIDED),
        ({"expect": "above", "threshold": 0.2}, m(0.1, 0.05, 0.3), UNDECIDED),
        # without an interval in the rule, the value alone decides, and shows a direction at most
        ({**ABOVE, "interval": False}, m(0.5), DIRECTION),
        ({**ABOVE, "interval": False}, m(0.5, 0.4, 0.6), DIRECTION),
        ({**ABOVE, "interval": False}, m(-0.5), NOT_REPRODUCED),
        ({**ABOVE, "interval": False}, m(0.2), DIRECTION),
        # inclusive bars
        ({"expect": "at least", "threshold": 1.0}, m(1.0, 1.0, 1.0), REPRODUCED),
        ({"expect": "at least", "threshold": 1.0}, m(0.99, 0.98, 1.0), UNDECIDED),
        ({"expect": "at most", "threshold": 0.0}, m(0.0, 0.0, 0.0), REPRODUCED),
        ({"expect": "at most", "threshold": 0.0}, m(0.0, 0.0, 0.1), UNDECIDED),
        (
            {"expect": "at least", "threshold": 0.2, "direction": 0},
            m(0.0, 0.0, 0.0),
            NOT_REPRODUCED,
        ),
        # bands
        ({"expect": "between", "threshold": [0.4, 0.6]}, m(0.5, 0.4, 0.6), REPRODUCED),
        ({"expect": "between", "threshold": [0.4, 0.6]}, m(0.5, 0.3, 0.6), UNDECIDED),
        ({"expect": "between", "threshold": [0.4, 0.6]}, m(0.7, 0.5, 0.9), UNDECIDED),
        ({"expect": "between", "threshold": [0.4, 0.6]}, m(0.7, 0.3, 1.1), UNDECIDED),
        ({"expect": "between", "threshold": [0.4, 0.6]}, m(0.7, 0.65, 0.9), NOT_REPRODUCED),
    ],
)
def test_verdict(rule, measured, verdict):
    assert claims.judge(claim(**rule), measured) == verdict


BARRED = {"name": "shuffled labels", "must": {"expect": "below", "threshold": 0.1}}
PLACEBO = {**ABOVE, "control": BARRED}
PAIRED = {**ABOVE, "control": {"name": "shuffled labels"}}


@pytest.mark.parametrize(
    ("measured", "control", "verdict"),
    [
        # it is not paired, so nothing more than a direction
        (m(0.5, 0.3, 0.7), m(0.0, -0.05, 0.05), DIRECTION),
        (m(0.5, 0.3, 0.7), m(0.4, 0.3, 0.5), CONFOUNDED),
        # a control that cannot be told from an effect
        (m(0.5, 0.3, 0.7), m(0.05, 0.0, 0.2), CONFOUNDED),
        (m(0.1, 0.05, 0.2), m(0.0, -0.05, 0.05), DIRECTION),
        # the little that is there, the control has too
        (m(0.1, 0.05, 0.2), m(0.4, 0.3, 0.5), NOT_REPRODUCED),
        (m(-0.5, -0.7, -0.3), m(0.0, -0.05, 0.05), NOT_REPRODUCED),
    ],
)
def test_verdict_under_a_control_with_a_bar(measured, control, verdict):
    assert claims.judge(claim(**PLACEBO), replace(measured, control=control)) == verdict


@pytest.mark.parametrize(
    ("measured", "difference", "verdict"),
    [
        (m(0.5, 0.3, 0.7), m(0.4, 0.2, 0.6), REPRODUCED),
        (m(0.5, 0.3, 0.7), m(0.2, -0.1, 0.5), CONFOUNDED),
        (m(0.5, 0.3, 0.7), m(-0.1, -0.2, -0.05), CONFOUNDED),
        (m(0.1, 0.05, 0.2), m(0.1, 0.05, 0.2), DIRECTION),
        (m(0.1, 0.05, 0.2), m(0.0, -0.1, 0.1), NOT_REPRODUCED),
        # too noisy to tell; and so noisy, while the control shows clearly more
        (m(0.1, -0.2, 0.4), m(0.1, -0.2, 0.4), UNDECIDED),
        (m(0.1, -0.2, 0.4), m(-0.3, -0.5, -0.1), NOT_REPRODUCED),
        (m(-0.5, -0.7, -0.3), m(-0.5, -0.7, -0.3), NOT_REPRODUCED),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_verdict_reads_the_paired_difference(measured, difference, verdict, sign):
    """The same, mirrored, for a claim that goes down; how large the control is plays no part."""

    def mirrored(x):
        low, high = sorted((sign * x.low, sign * x.high))
        return m(sign * x.value, low, high)

    rule = {**(ABOVE if sign > 0 else BELOW), "control": {"name": "shuffled labels"}}
    for control in (m(0.0, -0.1, 0.1), m(9.0, 8.0, 10.0)):
        given = replace(mirrored(measured), control=control, difference=mirrored(difference))
        assert claims.judge(claim(**rule), given) == verdict


@pytest.mark.parametrize(
    ("rule", "given", "says"),
    [
        (PAIRED, m(0.5, 0.3, 0.7), "a control, but none"),
        (PAIRED, m(0.5, 0.3, 0.7, control=m(0.0)), "a difference from its control, but none"),
        (PAIRED, m(0.5, 0.3, 0.7, control=m(0.0), difference=m(0.4)), "no interval"),
        (PLACEBO, m(0.5, 0.3, 0.7, m(0.0, -0.1, 0.05), m(0.4, 0.3, 0.5)), "no difference"),
    ],
)
def test_rule_and_measurement_must_agree_on_the_control(rule, given, says):
    with pytest.raises(ResearchError, match=says):
        claims.judge(claim(**rule), given)


def test_p_value_is_that_of_the_t_test_behind_the_interval():
    from scipy.stats import ttest_1samp

    from sae_research import stats

    x = [0.3, 0.1, 0.4, 0.25, -0.05, 0.2]
    found = Measurement.of(stats.mean_interval(x))
    for bar in (0.0, 0.1):
        rule = claim(expect="above", threshold=bar).rule
        assert claims.p_value(rule, found) == pytest.approx(ttest_1samp(x, bar).pvalue)
    assert claims.p_value(claim(expect="below", threshold=0).rule, found) == 1
    band = claim(expect="between", threshold=[0.0, 1.0]).rule
    assert claims.p_value(band, found) == pytest.approx(ttest_1samp(x, 0).pvalue)
    assert claims.p_value(claim(**ABOVE, interval=False).rule, found) is None


def test_an_interval_clears_its_bar_where_p_is_below_the_level():
    rule = claim(expect="above", threshold=0).rule
    assert claims.p_value(rule, m(0.5, 0.001, 1.1)) < claims.LEVEL
    assert claims.p_value(rule, m(0.5, -0.001, 1.1)) > claims.LEVEL


def study_of_four():
    """One claim that its own interval just clears, among three that are unclear."""
    stated = [replace(claim(expect="above", threshold=0), id=f"s.{i}") for i in range(4)]
    close = m(0.5, 0.01, 0.99)
    return stated, {"s.0": close, **{f"s.{i}": m(0.1, -0.5, 0.7) for i in (1, 2, 3)}}


def test_a_study_is_corrected_together_whatever_its_families():
    stated, measured = study_of_four()
    p = claims.correct(stated, measured)
    assert p["s.0"] == pytest.approx(4 * claims.p_value(stated[0].rule, measured["s.0"]))
    assert claims.judge(stated[0], measured["s.0"], p["s.0"]) == DIRECTION
    alone = claims.correct(stated[:1], measured)
    assert claims.judge(stated[0], measured["s.0"], alone["s.0"]) == REPRODUCED
    apart = [replace(c, family=c.id) for c in stated]
    assert claims.correct(apart, measured) == p
    names = {c.id: c.id.replace("s.", "other.") for c in stated[1:]}
    elsewhere = [replace(c, study="other", id=names[c.id]) for c in stated[1:]]
    other = {name: measured[i] for i, name in names.items()}
    assert claims.correct([stated[0], *elsewhere], measured | other)["s.0"] == alone["s.0"]


def test_the_ledger_holds_the_corrected_verdict(tmp_path, monkeypatch):
    lines = "".join(
        f"  - {{id: s.{i}, statement: A., measure: a, rule: {{expect: above, threshold: 0}}, "
        "unit: seeds, family: f, no_control: x}\n"
        for i in range(4)
    )
    (tmp_path / "claims.yaml").write_text(f"s:\n{lines}")
    monkeypatch.setattr(paths, "CLAIMS", tmp_path / "claims.yaml")
    monkeypatch.setattr(paths, "DATA", tmp_path)
    _, measured = study_of_four()
    shown = claims.record("cpu", "s", "10_s", measured)
    assert shown["verdict"].tolist() == [DIRECTION] + [UNDECIDED] * 3
    assert shown["p"].tolist()[1:] == ["1"] * 3
    assert 0.05 < float(shown["p"][0]) < 0.25


@pytest.mark.parametrize(
    "measured",
    [
        m(0.001, 0.001, 0.001),
        m(0.001, 0.001, 0.5),  # its lower end was cut off at the value
        Measurement(0.5, 0.1, 0.9, n=1),
        Measurement(0.5, 0.1, 0.9),
    ],
)
def test_what_shows_no_spread_has_no_small_p(measured):
    assert claims.p_value(claim(expect="above", threshold=0).rule, measured) == 1


def test_a_claim_with_a_paired_control_has_the_larger_p_value():
    stated = claim(**PAIRED)
    clear = m(0.5, 0.4, 0.6)
    given = replace(clear, control=m(0.3, 0.1, 0.5), difference=m(0.2, 0.01, 0.39))
    p = claims.correct([stated], {"s.a": given})["s.a"]
    assert p == pytest.approx(claims.p_value(stated.rule.difference, given.difference))
    assert p > claims.p_value(stated.rule, clear)


def test_verdict_never_rises_when_the_evidence_gets_worse():
    order = [REPRODUCED, DIRECTION, UNDECIDED, NOT_REPRODUCED]
    for expect, sign in (("above", 1), ("below", -1)):
        rule = claim(expect=expect, threshold=0.2 * sign, direction=0)
        ranks = []
        for value in np.linspace(1, -1, 81) * sign:
            ranks.append(order.index(claims.judge(rule, m(value, value - 0.1, value + 0.1))))
        assert ranks == sorted(ranks)
        assert set(ranks) == {0, 1, 3}
        widths = [
            order.index(claims.judge(rule, m(0.5 * sign, 0.5 * sign - w, 0.5 * sign + w)))
            for w in (0.1, 0.4, 2)
        ]
        assert widths == sorted(widths)


@pytest.mark.parametrize(
    ("measured", "says"),
    [
        (m(math.nan, 0, 1), "finite"),
        (m(math.inf, 0, math.inf), "finite"),
        (m(0.5, math.nan, 1), "finite"),
        (m(0.5, 0, math.inf), "finite"),
        (m(0.5, 0.6, 0.7), "outside its interval"),
        (m(0.5, 0.1, 0.4), "outside its interval"),
        (m(0.5, 0.7, 0.3), "outside its interval"),
        (m(0.5), "no interval"),
        (m(0.5, low=0.3), "one end"),
        (m(0.5, 0.3, 0.7, control=m(0.0, 0.0, 0.0)), "control"),
        (None, "not measured"),
    ],
)
def test_a_measurement_that_no_verdict_can_rest_on_is_refused(measured, says):
    with pytest.raises(ResearchError, match=says):
        claims.judge(claim(**ABOVE), measured)


@pytest.mark.parametrize("control", [None, m(math.nan, 0, 1), m(0.0), m(0.5, 0.6, 0.7)])
def test_a_bad_control_is_refused(control):
    with pytest.raises(ResearchError, match="control"):
        claims.judge(claim(**PLACEBO), m(0.5, 0.3, 0.7, control=control))


def test_rounding_may_put_the_value_on_the_rim_of_its_interval():
    assert claims.judge(claim(**ABOVE), m(0.3, 0.3 + 1e-12, 0.7)) == REPRODUCED


def test_only_a_claim_that_says_what_it_needs_may_go_unmeasured():
    assert claims.judge(claim(**ABOVE, needs="real weights"), None) == NOT_TESTABLE
    assert claims.judge(claim(**ABOVE, needs="real weights"), m(0.5, 0.3, 0.7)) == REPRODUCED


def test_numbers_of_numpy_become_plain_ones():
    made = Measurement(np.float32(0.5), np.float64(0.25), np.float32(0.75), np.int64(3))
    assert (type(made.value), type(made.low), type(made.n)) == (float, float, int)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"statment": "x"}, "did you mean 'statement'"),
        ({"id": "other.a"}, "must start with 's.'"),
        ({"rule": {"expect": "abov", "threshold": 0}}, "did you mean 'above'"),
        ({"rule": {"expect": "above"}}, "lacks threshold"),
        ({"control": {"name": "x"}}, "unknown field 'control'"),
        ({"paper": "\ud800"}, "Invalid JSON"),
        ({"rule": {"expect": "above", "threshold": "high"}}, "one number"),
        ({"rule": {"expect": "above", "threshold": True}}, "one number"),
        ({"rule": {"expect": "above", "threshold": [1, 2]}}, "one number"),
        ({"rule": {"expect": "between", "threshold": [2, 1]}}, "smaller first"),
        ({"rule": {"expect": "between", "threshold": 1}}, "two numbers"),
        ({"rule": {"expect": "between", "threshold": [1, 2], "direction": 0}}, "direction"),
        ({"rule": {"expect": "above", "threshold": 0.2, "direction": 0.5}}, "beyond"),
        ({"rule": {"expect": "above", "threshold": 0, "interval": "yes"}}, "true or false"),
        (
            {"rule": {"expect": "above", "threshold": 0, "control": {"must": {"expect": "below"}}}},
            "lacks",
        ),
        ({"rule": "above 0"}, "block"),
        ({"rule": {"expect": ["above"], "threshold": 0}}, "unknown expectation"),
        ({"rule": {"expect": "above", "threshold": 10**400}}, "one number"),
        ({"rule": {"expect": "above", "threshold": float("nan")}}, "one number"),
        ({"rule": {"expect": "above", "threshold": 0, "control": {"name": ""}}}, "`name` must be"),
        ({"statement": None}, "`statement` must be"),
        ({"statement": " "}, "`statement` must be"),
        ({"needs": True}, "`needs` must be"),
        ({"unit": ""}, "lacks `unit`"),
        ({"family": ""}, "lacks `family`"),
        ({"no_control": ""}, "one of a `control`"),
        ({"against": "no steering"}, "one of a `control`"),
        ({"rule": {"expect": "between", "threshold": [0, 1], "control": {"name": "x"}}}, "side"),
    ],
)
def test_a_mistake_in_a_stated_claim_is_named(change, says):
    given = {
        "id": "s.a",
        "statement": "x",
        "measure": "y",
        "rule": {"expect": "above", "threshold": 0},
        "unit": "seeds",
        "family": "f",
        "no_control": "none",
    }
    with pytest.raises(ResearchError, match=says):
        claim_rules.parse("s", {**given, **change})


@pytest.mark.parametrize(
    "twice", ["s: []\ns: []\n", "s:\n- {id: s.a, rule: {expect: above}, id: s.b}"]
)
def test_a_study_or_a_field_stated_twice_is_refused(twice, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CLAIMS", tmp_path / "claims.yaml")
    (tmp_path / "claims.yaml").write_text(twice)
    with pytest.raises(ResearchError, match=r"claims.yaml cannot be read \(line 2: .* twice\)"):
        claim_rules.load_claims()


def test_every_claim_of_the_repository_is_stated_well_and_once():
    stated = claim_rules.load_claims()
    assert len(stated) == len(re.findall(r"(?m)(?:^\s*(?:- )?|, )id:", paths.CLAIMS.read_text()))
    for c in stated.values():
        assert c.statement.endswith(".")
        assert c.measure
        assert c.paper_value == "" or c.evidence, (
            f"{c.id} gives the paper's value without saying where it stands"
        )


CONTROLLED = {i: c for i, c in claim_rules.load_claims().items() if c.rule.control is not None}


@pytest.mark.parametrize("name", CONTROLLED)
def test_no_claim_stands_where_its_control_shows_the_same(name):
    """Planted: a number far beyond its bar, under the control too."""
    stated = CONTROLLED[name]
    rule = stated.rule
    bar = rule.threshold[0] if isinstance(rule.threshold, tuple) else rule.threshold
    far = 0.05 if rule.expect == "between" else {True: 10, False: -10}[rule.expect in UPWARD]
    strong = m(bar + far, bar + far - 0.01, bar + far + 0.01)
    if rule.difference is None:
        must = rule.control.must
        missed = must.threshold + (-1 if must.expect in UPWARD else 1)
        same = replace(strong, control=m(missed, missed - 0.01, missed + 0.01))
    else:
        same = replace(strong, control=replace(strong), difference=m(0.0, -0.01, 0.01))
    assert claims.judge(stated, same) == CONFOUNDED


@pytest.fixture
def folder(tmp_path, monkeypatch):
    book = """
one:
  - {id: one.a, statement: A., measure: a, rule: {expect: above, threshold: 0}, paper_value: .58,
     evidence: Table 2, unit: seeds, family: f, no_control: x,
     history: [{date: 2026-01-02, old: at least 1, reason: seen}]}
  - {id: one.b, statement: B., measure: b, rule: {expect: below, threshold: 1, interval: false},
     needs: real weights, unit: seeds, family: f, against: x}
two:
  - {id: two.a, statement: C., measure: c, rule: {expect: above, threshold: 0}, unit: seeds,
     family: f, no_control: x}
"""
    (tmp_path / "claims.yaml").write_text(book)
    monkeypatch.setattr(paths, "CLAIMS", tmp_path / "claims.yaml")
    monkeypatch.setattr(paths, "DATA", tmp_path)
    monkeypatch.setattr(
        stages,
        "read_outputs",
        lambda profile: {"10_one": [tmp_path / profile / "one" / "claims.json"]},
    )
    return tmp_path


def test_record_and_unite(folder):
    frame = claims.record("cpu", "one", "10_one", {"one.a": m(0.5, 0.3, 0.7), "one.b": None})
    assert list(frame["verdict"]) == [REPRODUCED, NOT_TESTABLE]
    lines = claims.unite("cpu")
    assert claims.read("cpu") == lines
    keys = "id study statement paper_value evidence unit family against value low high n control"
    keys += " difference p rule history measure no_control verdict notebook planted ground"
    assert set(lines[0]) == set(keys.split())
    assert "A. (until 2026-01-02: at least 1)" in ledger.markdown(lines)
    assert lines[0]["paper_value"] == 0.58
    assert lines[0]["notebook"] == "10_one"
    assert "0.5 [0.3, 0.7]" in ledger.markdown(lines)
    assert ledger.agreement(lines, lines) == (2, [])
    other = [{**lines[0], "verdict": NOT_REPRODUCED}, lines[1]]
    assert ledger.agreement(lines, other) == (1, [("one.a", REPRODUCED, NOT_REPRODUCED)])


def test_unknown_and_missing_claims_are_refused(folder):
    with pytest.raises(ResearchError, match=r"did you mean 'one.b'"):
        claims.record("cpu", "one", "10_one", {"one.a": m(0.5, 0.3, 0.7), "one.bb": None})
    with pytest.raises(ResearchError, match=r"one.b"):
        claims.record("cpu", "one", "10_one", {"one.a": m(0.5, 0.3, 0.7)})
    with pytest.raises(ResearchError, match="did you mean 'one'"):
        claims.record("cpu", "onee", "10_one", {})
    assert not (folder / "cpu").exists()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("threshold: 0}, paper", "threshold: .1}, paper"),
        ("unit: seeds, family: f, no_control: x,", "unit: SAEs, family: f, no_control: x,"),
        ("measure: a", "measure: another"),
    ],
)
def test_a_ledger_that_was_judged_as_another_claim_is_refused(folder, old, new):
    claims.record("cpu", "one", "10_one", {"one.a": m(0.5, 0.3, 0.7), "one.b": None})
    assert paths.CLAIMS.read_text().count(old) == 1
    paths.CLAIMS.write_text(paths.CLAIMS.read_text().replace(old, new))
    with pytest.raises(ResearchError, match=r"one.a.*as claims.yaml states it"):
        claims.unite("cpu")


def test_numbers_are_written_with_six_digits_and_judged_as_written(folder):
    exact = m(1 / 3, 0.3 + 1e-12, 2 / 3)
    claims.record("cpu", "one", "10_one", {"one.a": exact, "one.b": None})
    (line, _) = claims.unite("cpu")
    assert (line["value"], line["low"], line["high"]) == (0.333333, 0.3, 0.666667)
    assert ledger.to_interval(line).value == 0.333333


def test_readme_shows_the_published_verdicts():
    readme = ledger.README.read_text(encoding="utf-8")
    assert readme == ledger.insert_highlights(readme, ledger.read_published()), (
        "run `python -m sae_research claims --write`"
    )
    for line in claims.read(ledger.PUBLISHED):
        if line["id"] in ledger.HIGHLIGHTS:
            assert line["statement"] in readme
    page = ledger.VERDICT_PAGE.read_text(encoding="utf-8")
    assert page == ledger.verdict_page(ledger.read_grounds()), (
        "run `python -m sae_research claims --write`"
    )


def test_grounds_disagree_where_both_measured_and_judged_unlike():
    world = [line for line in claims.read(ledger.PUBLISHED) if line["study"] != "world"][:4]
    real = [dict(line, ground="real") for line in world]
    for line in (*world, *real):
        line |= {"verdict": REPRODUCED, "value": 0.5}
    real[1]["verdict"] = NOT_REPRODUCED
    real[2] |= {"verdict": "not testable here", "value": None}
    found = ledger.disagreements({"world": world, "real": real})
    assert list(found["id"]) == [world[1]["id"]]
    assert NOT_REPRODUCED in found["real"].item()


def test_checks_of_the_testbed_are_counted_apart():
    lines = claims.read(ledger.PUBLISHED)
    counts = ledger.count_verdicts(lines)
    assert counts.index[-1] == ledger.TESTBED
    assert int(counts.to_numpy().sum()) == len(lines)
    families = ledger.group_families(lines)
    assert sum(map(len, families.values())) == len(lines)
    assert {line["study"] for line in families["opinion_qa.hypotheses"]} == {"opinion_qa"}


def test_a_panel_holds_claims_of_one_measure_and_one_bar():
    lines = claims.read(ledger.PUBLISHED)
    for name, own in ledger.group_families(lines).items():
        panels = claim_figures.group_panels(own)
        shown = [line for panel in panels.values() for line in panel]
        assert sorted(line["id"] for line in shown) == sorted(
            line["id"] for line in own if line["value"] is not None
        ), name
        for panel in panels.values():
            assert len({str(line["rule"]["threshold"]) for line in panel}) == 1


def test_a_family_that_cannot_be_tested_has_no_figure():
    lines = [line for line in claims.read(ledger.PUBLISHED) if line["value"] is None]
    assert claim_figures.draw_family(lines, "none") is None


def test_the_summary_counts_every_claim():
    lines = claims.read(ledger.PUBLISHED)
    said = ledger.summarize(lines)
    tested = [line for line in lines if line["study"] != ledger.TESTBED]
    assert f"Of {len(tested)} claims of papers" in said
    numbers = re.findall(r"\*\*(\d+) ", said)
    assert sum(map(int, numbers)) == sum(line["value"] is not None for line in tested)
