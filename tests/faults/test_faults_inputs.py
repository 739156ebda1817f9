"""Thousands of damaged inputs: each is taken and whole, or refused in one sentence."""

import json
import math
import os
import re
import warnings
from dataclasses import fields
from pathlib import Path

import nbformat
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from survey_samples import COUNTS, LONG, SCALES, WIDE

from sae_research import (
    claim_rules,
    claims,
    config,
    ledger,
    notebooks,
    paths,
    pipeline,
    stages,
    store,
)
from sae_research.errors import ResearchError
from sae_research.surveys.files import load_survey
from sae_research.surveys.published import load_opinion_qa

pytestmark = [pytest.mark.slow, pytest.mark.faults]

NASTY = (
    *("", "0", "-1", "1e999", "nan", "inf", "9" * 400, "1e300", "true", "null", "[]", "{}", "[[]]"),
    *("{[]: 1}", "'", '"', ",", "\n", "\r", "\r\n", "\0", "\ufeff", "\u2028", "\x85", "\f", "é"),
    *("<<", "*a", "&a", "&a [*a]", ": ", "- ", "? [1]", "!!python/name:os", "2020-13-01", "\ud800"),
    *("x" * 140_000, "[" * 2_000, "../../x", "~", "on", "1e9", "red", "tax", "yes"),
)
OPINION = {
    "info.csv": """key,question,references,option_ordinal
CARS,More?,"['More', 'Fewer', 'Same', 'Refused']","[1.0, 2.0, 1.5]"
WORK,Where?,"['Farm', 'Mine', 'Refused']","[1, 1]"
""",
    "metadata.csv": "key,options\nSEX,\"['Male', 'Female']\"\n",
    "responses.csv": """SEX,CARS,WORK,WEIGHT_W27
Male,More,Farm,2.0
Male,Same,Mine,1.0
Female,Fewer,Mine,1.0
Female,Refused,,0
""",
}
PARTY = {"attributes": ["party"]}
CLAIM = {
    "id": "s.a",
    "statement": "x",
    "measure": "y",
    "rule": {"expect": "above", "threshold": 0, "control": {"name": "c"}},
    "unit": "seeds",
    "family": "f",
}


def many(n: int):
    """So many inputs, the same ones every time; FAULT_TIMES multiplies them."""
    slow = list(HealthCheck)
    n *= int(os.environ.get("FAULT_TIMES", "1"))
    return settings(max_examples=n, derandomize=True, deadline=None, suppress_health_check=slow)


@st.composite
def mutated(draw, text: str) -> str:
    """The text with one to three pieces cut, doubled or replaced."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.sampled_from((0, 1, 1, 3, 8, 30))))
        piece = draw(st.sampled_from((*NASTY, text[start:end] * 2, text[max(0, start - 60) : end])))
        text = text[:start] + piece + text[end:]
    return text


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(errors="surrogatepass"))
    return path


def refused_or(load):
    """What was loaded, or None if it was refused in one sentence."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load()
    except ResearchError as error:
        said = str(error)
        assert 0 < len(said) <= 1000
        assert "\n" not in said
        return None


def check_survey(survey) -> None:
    if survey is None:
        return
    assert np.isfinite(survey.distributions).all()
    assert np.allclose(survey.distributions.sum(-1), 1)
    assert np.allclose(survey.overall.sum(-1), 1)
    assert np.isfinite(survey.gaps[[q.ordered for q in survey.questions]]).all()
    for names in (
        [q.key for q in survey.questions],
        [(g.attribute, g.name) for g in survey.groups],
    ):
        assert len(set(names)) == len(names)
    for question in survey.questions:
        assert 2 <= len(set(question.options)) == question.n_options <= 26
    assert math.isclose(survey.weights.sum(), 1)
    if survey.counts is not None:
        assert (survey.counts.sum(-1) >= 1).all()


@pytest.mark.parametrize(
    ("text", "options"),
    [(COUNTS, {}), (LONG, {}), (WIDE, PARTY), (SCALES, PARTY)],
    ids=["counts", "long", "wide", "scales"],
)
def test_a_survey_of_ones_own(text, options, tmp_path):
    @many(900)
    @given(mutated(text))
    def check(damaged):
        path = write(tmp_path / "poll.csv", damaged)
        check_survey(refused_or(lambda: load_survey(path, **options)))

    check()


@pytest.mark.parametrize("name", OPINION)
def test_opinion_qa(name, tmp_path):
    place = tmp_path / "human_resp" / "American_Trends_Panel_W27"

    @many(500)
    @given(mutated(OPINION[name]))
    def check(damaged):
        for file, text in OPINION.items():
            write(place / file, damaged if file == name else text)
        check_survey(refused_or(lambda: load_opinion_qa(tmp_path, [27])))

    check()


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from((10**400, -(10**20), float("nan"), float("inf"), -0.5, 1e-300, 2.5))
    | st.sampled_from(("", "cpu", "cuda:x", "primary", "../../x", "nan")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@pytest.mark.parametrize("block", config.block_classes())
def test_settings(block):
    cls = config.block_classes()[block]
    names = st.sampled_from([f.name for f in fields(cls)]) | st.text(max_size=4)

    @many(250)
    @given(st.dictionaries(names, VALUES, min_size=1, max_size=2))
    def check(overrides):
        found = refused_or(lambda: config.build(cls, overrides, block))
        for f in fields(cls) if found is not None else ():
            value = getattr(found, f.name)
            for number in value if isinstance(value, tuple) else [value]:
                if isinstance(number, int | float):
                    assert -1 <= number <= 1e12

    check()


@pytest.mark.parametrize("file", ["params.yaml", "claims.yaml", "dvc.yaml"])
def test_files_of_the_project(file, tmp_path):
    whole = re.sub(r"(?m)^ *#.*\n", "", (paths.ROOT / file).read_text()).lstrip()
    end = "\n  - id" if file == "claims.yaml" else "\n"
    text = whole[: 1500 if file != "params.yaml" else 900].rpartition(end)[0] + "\n"
    loads = {
        "params.yaml": (config, "PARAMS", config.load),
        "claims.yaml": (paths, "CLAIMS", claim_rules.load_claims),
        "dvc.yaml": (stages, "FILE", lambda: stages.read_outputs("cpu")),
    }
    module, name, load = loads[file]

    @many(300)
    @given(mutated(text))
    @example(text)
    def check(damaged):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, name, write(tmp_path / file, damaged))
            assert refused_or(load) or damaged != text

    check()


def test_claims():
    names = st.sampled_from([f.name for f in fields(claim_rules.Claim)])
    rules = st.fixed_dictionaries(
        {},
        optional={
            "expect": st.sampled_from(("above", "below", "between", "abov", ["above"], None)),
            "threshold": VALUES,
            "direction": VALUES,
            "interval": VALUES,
            "control": VALUES
            | st.fixed_dictionaries({}, optional={"name": VALUES, "must": VALUES}),
        },
    )

    @many(1000)
    @given(st.dictionaries(names, VALUES, max_size=2), rules, st.booleans(), st.sets(names))
    def check(change, rule, keep, dropped):
        block = CLAIM | ({} if keep else {"rule": CLAIM["rule"] | rule})
        block = {name: block[name] for name in block if name not in dropped} | change
        claim = refused_or(lambda: claim_rules.parse("s", block))
        if claim is not None:
            assert claim.statement.strip()
            bars = claim.rule.threshold
            for bar in bars if isinstance(bars, tuple) else (bars,):
                assert abs(float(bar)) <= 1e12

    check()


def test_ledgers(tmp_path, monkeypatch):
    good = json.loads((paths.DATA / "cpu/claims.json").read_text())[20::60]
    monkeypatch.setattr(paths, "DATA", tmp_path)
    whole, other = good[:2]
    names = st.sampled_from([*whole, "x"])

    def read():
        lines = claims.read("cpu")
        if lines:
            ledger.count_verdicts(lines)
        return ledger.markdown(lines) + ledger.summarize(lines) + ledger.text(lines)

    @many(500)
    @given(
        mutated(json.dumps(good, indent=1))
        | st.dictionaries(names, VALUES, min_size=1).map(lambda change: [other, whole | change])
        | st.sets(names).map(lambda gone: [{k: whole[k] for k in whole.keys() - gone}])
    )
    def check(damaged):
        text = damaged if isinstance(damaged, str) else json.dumps(damaged)
        write(tmp_path / "cpu/claims.json", text)
        refused_or(read)

    check()


def test_locks_and_notes_of_a_killed_run(tmp_path, monkeypatch):
    lock = (paths.ROOT / "dvc.lock").read_text()[:2000]
    monkeypatch.setattr(pipeline, "_MARKER", tmp_path / "state.json")

    @many(200)
    @given(mutated(lock), mutated('{"before": "cpu", "running": "smoke"}'))
    def check(damaged, note):
        pipeline._find_owner(pipeline._read_lock(write(tmp_path / "dvc.lock", damaged)) or {})
        write(tmp_path / "state.json", note)
        pipeline._read_marker()

    check()


@pytest.mark.parametrize("content", ["stages: {}".encode("utf-16"), b"[" * 20_000])
def test_a_lock_that_cannot_be_read_counts_as_none(tmp_path, content):
    (tmp_path / "dvc.lock").write_bytes(content)
    assert pipeline._read_lock(tmp_path / "dvc.lock") is None


def test_a_mistake_in_one_of_several_blocks_is_named():
    cls = config.block_classes()["specialized_saes"]
    with pytest.raises(ResearchError, match=r"'unti' in here.tilts.a; did you mean 'unit'"):
        config.build(cls, {"tilts": {"a": {"t": 1, "unti": "x"}}}, "here")


def test_manifests_and_json(tmp_path):
    with store.writing(tmp_path / "art") as folder:
        (folder / "a.txt").write_text("a")
    manifest = tmp_path / "art" / store.CHECKSUMS
    good = manifest.read_text()

    @many(500)
    @given(mutated(good) | st.recursive(VALUES, st.lists).map(json.dumps))
    def check(damaged):
        write(manifest, damaged)
        if refused_or(lambda: store.verified(tmp_path / "art")) is not None:
            assert json.loads(manifest.read_text()).keys() == {"a.txt"}
        refused_or(lambda: store.read_json(manifest))

    check()


PIECES = st.lists(
    st.sampled_from(
        (str(paths.ROOT), str(Path.home()), "/", "/data/x.json", "0x7f12ab34cd56", "T_1a2b3", " ")
    )
    | st.text(max_size=5),
    max_size=5,
).map("".join)
DATA = st.recursive(
    PIECES | st.integers(),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(PIECES, x, max_size=3),
    max_leaves=4,
)


@many(1000)
@given(st.lists(PIECES, max_size=3), DATA, PIECES)
def test_the_normaliser_is_done_after_once_and_leaves_no_folder_of_this_machine(texts, data, said):
    def make():
        outputs = [nbformat.v4.new_output("stream", text=text) for text in texts]
        shown = {"text/plain": said, "application/json": data}
        outputs.append(nbformat.v4.new_output("display_data", shown))
        outputs.append(
            nbformat.v4.new_output("error", ename=said, evalue=said, traceback=[said, *texts])
        )
        cell = nbformat.v4.new_code_cell("x", outputs=outputs)
        return nbformat.v4.new_notebook(cells=[cell])

    once = nbformat.writes(notebooks.normalised(make(), "cpu"))
    again = nbformat.writes(notebooks.normalised(nbformat.reads(once, as_version=4), "cpu"))
    assert once == again
    assert f"{paths.ROOT}/" not in once
