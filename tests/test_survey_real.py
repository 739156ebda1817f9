"""Real respondents: counts, known facts, noise, correlations, and prompts about groups."""

import csv
import json
import re
import shutil

import numpy as np
import pytest

import sae_research as sr
from sae_research.errors import ResearchError
from sae_research.surveys import real
from sae_research.surveys.prompts import ENGLISH_TEMPLATE
from sae_research.surveys.scores import make_eval_set
from sae_research.surveys.selection import drop_small_groups
from sae_research.surveys.survey import OVERALL, Survey
from sae_research.surveys.targets import make_targets


@pytest.fixture(scope="module")
def politics() -> Survey:
    return real.load_real("politics")


def mean_answer(survey: Survey, group: str, question: str) -> float:
    """Mean place of the answer on the question's options, 0 to 1."""
    row = [g.name for g in survey.groups].index(group)
    column = [q.key for q in survey.questions].index(question)
    n = survey.questions[column].n_options
    return float(survey.distributions[row, column, :n] @ np.linspace(0, 1, n))


@pytest.mark.parametrize(
    ("name", "questions", "groups"),
    [("politics", 43, 13), ("ideology", 32, 18), ("region", 18, 17), ("personality", 25, 7)],
)
def test_every_survey_is_dense_and_its_splits_part_no_cluster(name, questions, groups):
    survey = real.load_real(name)
    assert (len(survey.questions), len(survey.groups)) == (questions, groups)
    assert survey.counts.sum(-1).min() >= 50
    clusters = real.find_clusters(survey)
    splits = {(c, q.split) for c, q in zip(clusters, survey.questions, strict=True)}
    assert len(splits) == len(set(clusters))
    assert all(len(survey.rows(split)) for split in ("train", "validation", "test"))
    unseen = [q for q in survey.questions if q.topic in real.SURVEYS[name].unseen]
    assert unseen
    assert {q.split for q in unseen} == {"test"}
    for pair in real.load_intersections(name):
        assert [q.key for q in pair.questions] == [q.key for q in survey.questions]
        assert pair.counts.sum(-1).min() >= 50


def test_counts_are_those_of_the_respondents():
    keys = [q.key for q in real.load_real("ideology").questions if q.key.startswith("gss")]
    people = sr.load_survey(real.FOLDER / "gss2018.csv", attributes=["sex", "race"], questions=keys)
    assert (len(people.groups), len(people.questions)) == (6, 25)
    table = {}
    with (real.FOLDER / "groups.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            table[row["group"], row["qkey"]] = json.loads(row["counts"])
    for i, group in enumerate(people.groups):
        for j, question in enumerate(people.questions):
            counts = people.counts[i, j, : question.n_options].tolist()
            assert counts == table[group.name, question.key]


def test_facts_that_every_poll_finds(politics):
    more = [("gss_natenvir", 0.1), ("gss_natrace", 0.1), ("cces_racerare", -0.1)]
    more += [("gss_natarms", -0.1), ("gss_abany", 0.05), ("anes_choice", 0.1)]
    for question, least in more:
        gap = mean_answer(politics, "Democrat", question)
        gap -= mean_answer(politics, "Republican", question)
        assert gap * np.sign(least) > abs(least), question
    assert mean_answer(politics, "Black", "cces_religimp") > mean_answer(
        politics, "white", "cces_religimp"
    )
    # a choice is favoured less than a danger to life
    assert mean_answer(politics, "65 or older", "anes_fatal") > mean_answer(
        politics, "65 or older", "anes_choice"
    )


def test_halves_differ_less_than_groups_and_party_divides_most(politics):
    table = real.tabulate_groups(politics).set_index("attribute")
    assert table["distance"][["age", "education", "race"]].max() < table["distance"]["party"]
    assert (table["halves"] < table["distance"]).loc[["party", "education", "race"]].all()
    assert table["noise"]["all groups"] == pytest.approx(real.OPINION_QA_NOISE, abs=0.004)
    # noise falls with the square root of the respondents: halves of a poll of 4 times as many
    few, many = (real.tabulate_groups(politics.sampled(n, 0)) for n in (200, 800))
    ratio = few["noise"][4] / many["noise"][4]
    assert ratio == pytest.approx(2, rel=0.15)


def test_correlations_of_items_within_groups():
    found = real.correlate_items("gss2018", "party")
    assert list(found) == [OVERALL, "Democrat", "Independent", "Republican"]
    for table in found.values():
        assert table.loc["gss_abany", "gss_abpoor"] > 0.5
        assert table.loc["gss_natsci", "gss_natspac"] > 0.1
    everybody = found[OVERALL]
    assert everybody.loc["gss_natarms", "gss_natrace"] < 0
    traits = real.correlate_items("ipip2010", "sex")[OVERALL]
    assert traits.loc["ipip_n1", "ipip_n2"] > 0.5
    assert traits.loc["ipip_e1", "ipip_e4"] < -0.2
    with pytest.raises(ResearchError, match=r"unknown source with respondents 'anes2012'"):
        real.correlate_items("anes2012", "party")


def test_the_study_takes_it_and_asks_about_groups(politics):
    kept = drop_small_groups(politics, 50)
    targets = make_targets(kept, 20.0)
    assert len(targets.groups) == len(set(targets.groups)) == 13
    judged = make_eval_set(kept, real.find_clusters(kept))
    assert judged.reliability > 0.7
    pair = real.load_intersections("politics")[0].groups[0]
    assert "Note: party: Democrat; age: 18-29." in ENGLISH_TEMPLATE.contexts["BIO"](pair, ())
    portrait = ENGLISH_TEMPLATE.contexts["PORTRAY"](pair, ())
    assert portrait == "Answer as a person would whose party is: Democrat and age is: 18-29."
    asked = ENGLISH_TEMPLATE.plain(kept.questions[0], False)
    assert asked.endswith("A. Too much\nB. About the right amount\nC. Too little\n"
                          "Answer with A, B or C.\n\nAnswer:")  # fmt: skip


def test_damage_and_missing_weights_are_named(tmp_path, monkeypatch):
    with pytest.raises(ResearchError, match=re.escape("line 1: column 'wtss' is missing")):
        sr.load_survey(real.FOLDER / "gss2018.csv", attributes=["party"], weight="wtss")
    shutil.copytree(real.FOLDER, tmp_path / "real")
    monkeypatch.setattr(real, "FOLDER", tmp_path / "real")
    path = tmp_path / "real" / "groups.csv"
    path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    with pytest.raises(ResearchError, match="does not match its checksum"):
        real.load_real()
    with pytest.raises(ResearchError, match="unknown survey 'politic'"):
        real.load_real("politic")
