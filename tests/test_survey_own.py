"""A survey of one's own: three layouts of a csv, what spreadsheets do to them, splits."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
from survey_samples import LONG, WIDE

import sae_research as sr
from sae_research.errors import ResearchError
from sae_research.surveys.survey import reliability

COLUMNS = ["qkey", "attribute", "group", "question", "options", "ordinal", "counts", "n"]
GOOD = {
    "qkey": "space", "attribute": "SEX", "group": "Female", "question": "Space?",
    "options": '["More", "Same", "Less"]', "ordinal": "[3, 2, 1]", "counts": "[5, 3, 2]", "n": "10",
}  # fmt: skip
ORDER = {"tax": ["no", "yes"], "guns": ["no", "yes"]}


def counts_csv(path: Path, *rows: dict, leave: str = "") -> Path:
    with path.open("w", newline="") as file:
        names = [c for c in COLUMNS if c != leave]
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_counts_are_sorted_by_ordinal(tmp_path):
    loaded = sr.load_survey(counts_csv(tmp_path / "t.csv", GOOD))
    assert loaded.questions[0].options == ("Less", "Same", "More")
    assert loaded.distributions[0, 0] == pytest.approx([0.2, 0.3, 0.5])
    assert loaded.counts[0, 0].tolist() == [2, 3, 5]
    assert loaded.overall[0] == pytest.approx([0.2, 0.3, 0.5])


def test_counts_need_neither_ordinal_nor_n_and_may_be_weighted(tmp_path):
    row = {**GOOD, "counts": "[2.5, 1.5, 1.0]", "ordinal": "", "n": ""}
    other = {**GOOD, "group": "Male", "counts": "[1, 0, 0]", "ordinal": "", "n": "30"}
    found = sr.load_survey(counts_csv(tmp_path / "t.csv", row, other))
    assert found.questions[0].options == ("More", "Same", "Less")
    assert found.distributions[0, 0] == pytest.approx([0.5, 0.3, 0.2])
    assert found.counts.sum(-1).ravel().tolist() == [5, 30]
    assert found.overall[0] == pytest.approx([3.5 / 6, 1.5 / 6, 1 / 6])
    plain = sr.load_survey(
        counts_csv(tmp_path / "u.csv", {**row, "counts": "[5, 3, 2]"}, leave="n")
    )
    assert plain.counts.sum() == 10


@pytest.mark.parametrize("text", [LONG, WIDE])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_long_and_wide_answers_are_weighted_and_empty_cells_left_out(tmp_path, text, mark):
    path = tmp_path / "poll.csv"
    path.write_text(mark + text, encoding="utf-8")
    found = sr.load_survey(path, attributes=["party"], options=ORDER)
    assert [q.key for q in found.questions] == ["tax", "guns"]
    assert [g.name for g in found.groups] == ["blue", "red"]
    blue, red = found.distributions
    assert blue == pytest.approx(np.array([[0, 1], [3 / 4, 1 / 4]]))
    assert red == pytest.approx(np.array([[1 / 3, 2 / 3], [1, 0]]))
    assert found.overall == pytest.approx(np.array([[1 / 4, 3 / 4], [5 / 6, 1 / 6]]))
    assert found.counts.sum(-1).tolist() == [[1, 2], [2, 1]]
    assert found.questions[0].ordered


def test_unweighted_answers_count_once_and_wordings_and_questions_are_chosen(tmp_path):
    path = tmp_path / "poll.csv"
    path.write_text(WIDE.replace(",weight", ",points"))
    with pytest.raises(ResearchError, match=r"column 'mass' is missing"):
        sr.load_survey(path, attributes=["party"], questions=["tax"], weight="mass")
    found = sr.load_survey(
        path, attributes=["party"], questions={"tax": "Is the tax right?"}, options=ORDER
    )
    assert [q.text for q in found.questions] == ["Is the tax right?"]
    assert found.distributions[1, 0] == pytest.approx([0.5, 0.5])
    weighted = sr.load_survey(path, attributes=["party"], questions=["tax"], weight="points")
    assert weighted.distributions[1, 0] == pytest.approx([1 / 3, 2 / 3])
    assert not weighted.questions[0].ordered  # words without `options` have no order


def test_numbers_are_a_scale_in_ascending_order(tmp_path):
    path = tmp_path / "poll.csv"
    path.write_text("party,trust\nred,10\nred,2\nblue,2\nblue,1\n")
    found = sr.load_survey(path, attributes=["party"])
    assert found.questions[0].options == ("1", "2", "10")
    assert found.questions[0].ordered


def test_blanks_in_the_header_and_empty_columns_change_nothing(tmp_path):
    path = tmp_path / "poll.csv"
    path.write_text(WIDE)
    plain = sr.load_survey(path, attributes=["party"], options=ORDER)
    head, *rows = WIDE.splitlines()
    path.write_text("\n".join([head.replace(",", ", ") + ",,", *(row + ",," for row in rows)]))
    found = sr.load_survey(path, attributes=["party"], options=ORDER)
    assert found.questions == plain.questions
    assert np.array_equal(found.distributions, plain.distributions)


def test_a_group_without_answers_to_every_question_is_named_and_left_out(tmp_path):
    path = tmp_path / "poll.csv"
    path.write_text(WIDE + "green,1,yes,\n")
    with pytest.warns(UserWarning, match="'party green' has no answer to 'guns'"):
        found = sr.load_survey(path, attributes=["party"])
    assert [g.name for g in found.groups] == ["blue", "red"]
    other = {**GOOD, "qkey": "parks"}
    empty = {**other, "group": "Male", "counts": "", "n": ""}
    table = counts_csv(tmp_path / "t.csv", GOOD, {**GOOD, "group": "Male"}, other, empty)
    with pytest.warns(UserWarning, match="'SEX Male' has no answer to 'parks'"):
        assert [g.name for g in sr.load_survey(table).groups] == ["Female"]


@pytest.mark.parametrize(
    ("text", "given", "reason"),
    [
        ("", {}, r"poll.csv is empty; A survey is a csv with one row per group and question"),
        ("\ufeff\n", {}, "is empty"),
        ("party,tax\n", {}, "has a header but no rows"),
        ("party,tax\nred,no\n", {}, r"has the columns party, tax. A survey is a csv .*attributes="),
        ("party,tax\nred,no\n", {"attributes": ["sex"]}, "line 1: column 'sex' is missing"),
        ("party,weight\nred,1\n", {"attributes": ["party"]}, "has the columns party, weight"),
        (WIDE.replace("red,2", "red\0,2"), {"attributes": ["party"]}, "line 2: .* null character"),
        ("party,tax\nred\n", {"attributes": ["party"]}, "line 2: the row has fewer cells"),
        ("party,tax\nred,no\n", {"attributes": ["party"]}, "'tax' has 1 different answers"),
        ("party,tax\nred,\n", {"attributes": ["party"]}, "holds no answers"),
        (WIDE, {"attributes": ["party"], "options": {"tax": ["no", "aye"]}}, "line 2: 'yes' is no"),
        (WIDE.replace("red,2", "red,-2"), {"attributes": ["party"]}, "line 2: 'weight' is '-2'"),
        (LONG + "1,tax,no,red,2\n", {}, "line 9: this respondent has answered the question before"),
        (LONG + "4,tax,no,red,3\n", {}, "line 9: this respondent had another 'party' before"),
        (LONG + "4,tax,no,blue,2\n", {}, "line 9: this respondent had another 'weight' before"),
        (LONG, {"options": {"tacks": ["no"]}}, "unknown question 'tacks' .*did you mean 'tax'"),
        (WIDE.replace("weight", "Weight"), {"attributes": ["party"]}, "'Weight' must be spelt 'w"),
        (LONG.replace("weight", "WEIGHT"), {}, "line 1: column 'WEIGHT' must be spelt 'weight'"),
        (WIDE.replace("party", "answer"), {"attributes": ["answer"]}, "'answer' cannot be an attr"),
        (LONG, {"questions": ["tacks"]}, "unknown question 'tacks' in .*did you mean 'tax'"),
        (LONG, {"options": {"tax": ["no", "yes", "no"]}}, "an option stands twice"),
        (",party,tax,\n0,red,no,\n", {"attributes": ["party"]}, "line 1: 'unnamed column 1' holds"),
        ("party,tax,tax\nred,no,no\n", {"attributes": ["party"]}, "column 'tax' stands twice"),
        ("party,tax\nred,no,1\n", {"attributes": ["party"]}, "line 2: the row has more cells"),
        ("party,tax\nred,1\nred,nan\n", {"attributes": ["party"]}, "'tax' .* are no scale"),
        ("party,tax\nred,1\nred,1.0\n", {"attributes": ["party"]}, "the same number"),
        (
            "respondent,party,tax\n1,red,no\n1,red,yes\n",
            {"attributes": ["party"]},
            "line 3: this respondent stands in a row before",
        ),
    ],
)
def test_what_is_wrong_is_one_sentence_that_names_the_layouts(tmp_path, text, given, reason):
    path = tmp_path / "poll.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ResearchError, match=reason):
        sr.load_survey(path, **given)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"counts": "[5, 3"}, "'counts' holds .* not a list"),
        ({"counts": "[5, 5]"}, "3 options and 2 counts"),
        ({"counts": "[5, -3, 8]"}, "numbers of at least 0"),
        ({"counts": "[0, 0, 0]", "n": "0"}, "not all 0"),
        ({"ordinal": "[1, 1, 2]"}, "different numbers"),
        ({"ordinal": "[1, 2, 1e999]"}, "'ordinal' must hold numbers"),
        ({"ordinal": '["2", "3", "10"]'}, "'ordinal' must hold numbers"),
        ({"counts": "[5, 1e999, 2]"}, "numbers of at least 0"),
        ({"counts": f"[5, 1{'0' * 400}, 2]"}, "numbers of at least 0"),
        ({"options": '["More", "More", "Less"]'}, "an option stands twice"),
        ({"options": '["More", ["Same"], "Less"]'}, "an option is no text"),
        ({"options": '["More"]', "ordinal": "[1]", "counts": "[1]"}, "from 2 to 26"),
        ({"group": "Male", "n": "0"}, "'n' is '0', not a number of at least 1"),
        ({"group": "Male", "n": "-5"}, "'n' is '-5'"),
        ({"group": "Male", "n": "1e300"}, "'n' is '1e300'"),
        ({"group": " "}, "'group' is empty"),
        (
            {"attribute": "Overall", "group": "All"},
            "the population has 'Overall' as attribute and group",
        ),
        ({"group": "Overall"}, "the population has 'Overall' as attribute and group"),
        ({"group": "Male", "n": "many"}, "'n' is 'many'"),
        ({}, "appears twice"),
        ({"group": "Male", "options": '["A", "B", "C"]'}, "another wording or other options"),
    ],
)
def test_a_malformed_row_is_named_by_file_line_and_reason(tmp_path, wrong, reason):
    path = counts_csv(tmp_path / "poll.csv", GOOD, {**GOOD, **wrong})
    with pytest.raises(ResearchError, match=reason) as error:
        sr.load_survey(path)
    assert "poll.csv, line 3:" in str(error.value)


@pytest.mark.parametrize("end", ["\u2028", "\u0085", "\f", "\x1e"])
def test_only_ends_of_lines_end_a_row(tmp_path, end):
    table = counts_csv(tmp_path / "t.csv", {**GOOD, "question": f"Space{end}or sea?"})
    assert sr.load_survey(table).questions[0].text == f"Space{end}or sea?"


def test_groups_and_attributes_that_are_not_there_are_named(tmp_path):
    table = counts_csv(tmp_path / "t.csv", GOOD)
    with pytest.raises(ResearchError, match="unknown attribute 'sexx'"):
        sr.load_survey(table, attributes=["sexx"])
    with pytest.raises(ResearchError, match=r"unknown question 'spice' .*did you mean 'space'"):
        sr.load_survey(table, questions=["space", "spice"])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ResearchError, match=r"absent.csv cannot be read"):
        sr.load_survey(tmp_path / "absent.csv")


def test_columns_beside_the_layout_are_ignored(tmp_path):
    path = tmp_path / "t.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["source", *COLUMNS])
        writer.writeheader()
        writer.writerow({"source": "GSS", **GOOD})
    assert sr.load_survey(path).counts[0, 0].tolist() == [2, 3, 5]


TOPICS = ("tax", "guns", "bees", "roads", "ships", "trees", "kites", "songs", "wells", "lamps")


def test_split_makes_all_three_and_keeps_near_duplicates_together(tmp_path):
    path = tmp_path / "poll.csv"
    names = [f"{topic} {again}" for topic in TOPICS for again in ("today", "now")]
    draws = np.random.default_rng(0)
    rows = [f"{p},{','.join(draws.choice(['no', 'yes'], len(names)))}" for p in ["a", "b"] * 40]
    path.write_text(f"party,{','.join(names)}\n" + "\n".join(rows) + "\n")
    found = sr.load_survey(path, attributes=["party"])
    assert not len(found.rows("train"))
    split = found.split(seed=3, similarity=0.3)
    by_topic = {}
    for question in split.questions:
        by_topic.setdefault(question.key.split()[0], set()).add(question.split)
    # today and now are shared words: what hangs together by the rarer word stays together
    assert all(len(splits) == 1 for splits in by_topic.values())
    assert sorted(len(split.rows(s)) for s in ("train", "validation", "test")) == [4, 4, 12]
    assert [q.split for q in found.split(4, 0.3).questions] != [q.split for q in split.questions]
    assert np.isfinite(reliability(split, 0))


def test_too_few_questions_for_a_split_are_refused(tmp_path):
    path = tmp_path / "poll.csv"
    path.write_text(WIDE)
    with pytest.raises(ResearchError, match=re.escape("2 families of different questions")):
        sr.load_survey(path, attributes=["party"]).split(seed=0)
