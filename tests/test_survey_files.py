"""Published surveys in their true layouts: small files, and every kind of damage named."""

import csv
import subprocess
from pathlib import Path

import numpy as np
import pytest

from sae_research import paths, store
from sae_research.errors import ResearchError
from sae_research.paths import ROOT
from sae_research.surveys import published, survey
from sae_research.surveys.files import load_survey
from sae_research.surveys.splits import find_families, split_by_topic

SHARED = ROOT.parent / "shared" / "real" / "opinions"


def write_csv(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def opinion_qa(tmp_path):
    """One wave of three questions: the middle option listed last, a nominal item, refusals,
    weights.
    """
    place = tmp_path / "human_resp" / "American_Trends_Panel_W27"
    write_csv(
        place / "info.csv",
        [
            {
                "key": "CARS_W27",
                "question": "More or fewer?",
                "references": str(["More", "Fewer", "Same", "Refused"]),
                "option_ordinal": "[1.0, 2.0, 1.5]",
            },
            {
                "key": "INDUSTRY_W27",
                "question": "Where do you work?",
                "references": str(["Farm", "Mine", "Mill", "Refused"]),
                "option_ordinal": "[1, 1, 1]",
            },
        ],
    )
    write_csv(place / "metadata.csv", [{"key": "SEX", "options": "['Male', 'Female']"}])
    people = [
        ("Male", "More", "Farm", 2.0),
        ("Male", "Same", "Mine", 1.0),
        ("Male", "Refused", "Refused", 5.0),
        ("Female", "Fewer", "Mill", 1.0),
        ("Female", "Fewer", "", 1.0),
        ("Refused", "Same", "Mill", 4.0),
    ]
    names = ("SEX", "CARS_W27", "INDUSTRY_W27", "WEIGHT_W27")
    write_csv(place / "responses.csv", [dict(zip(names, row, strict=True)) for row in people])
    return tmp_path


def test_opinion_qa_sorts_options_weights_respondents_and_leaves_refusals_out(opinion_qa):
    found = published.load_opinion_qa(opinion_qa, [27])
    cars, industry = found.questions
    assert cars.options == ("More", "Same", "Fewer")
    assert cars.ordinal == (1.0, 1.5, 2.0)
    assert cars.ordered
    assert not industry.ordered
    assert [(g.attribute, g.name) for g in found.groups] == [("SEX", "Male"), ("SEX", "Female")]
    assert np.allclose(found.distributions[0, 0], [2 / 3, 1 / 3, 0])
    assert np.allclose(found.distributions[1, 0], [0, 0, 1])
    assert np.allclose(found.overall[0], [2 / 9, 5 / 9, 2 / 9])
    assert found.counts[0, 0].sum() == 2
    assert found.counts[1].sum(-1).tolist() == [2, 1]
    one = found.distance(found.distributions[0], found.distributions[1])
    assert one[0] == pytest.approx(2 / 3 + 1 / 3 * 0.5)
    assert one[1] == pytest.approx(1.0)  # nominal: total variation, whatever lies between


@pytest.mark.parametrize(
    ("file", "old", "new", "reason"),
    [
        (
            "responses.csv",
            "Male,More",
            "Male,Mare",
            r"responses.csv, line 2: 'Mare' is no option of question 'CARS_W27'",
        ),
        (
            "responses.csv",
            "Farm,2.0",
            "Farm,heavy",
            r"responses.csv, line 2: 'WEIGHT_W27' is 'heavy'",
        ),
        ("responses.csv", "SEX,", "GENDER,", r"responses.csv, line 1: column 'SEX' is missing"),
        ("info.csv", "[1.0, 2.0, 1.5]", "1 2 1.5", r"info.csv, line 2: '1 2 1.5' is not a list"),
        ("info.csv", "[1, 1, 1]", "[1]", r"info.csv, line 3: 4 references but 1 ordinals"),
        (
            "metadata.csv",
            "['Male', 'Female']",
            "__import__('os')",
            r"metadata.csv, line 2: .* is not a list",
        ),
        ("metadata.csv", "'Female'", "['Female']", r"metadata.csv, line 2: a group of 'SEX' is no"),
        ("metadata.csv", "[", "[{[]: 1}, ", r"metadata.csv, line 2: .* is not a list"),
        ("info.csv", "INDUSTRY_W27", "CARS_W27", r"info.csv: 'CARS_W27' has two rows"),
        ("info.csv", "'Fewer'", "'More'", r"info.csv, line 2: an option stands twice"),
        ("info.csv", "[1, 1, 1]", "[1, 1, 1e999]", r"info.csv, line 3: 'ordinal' must hold num"),
        ("info.csv", "[1, 1, 1]", f"[1, 1, 1{'0' * 400}]", r"info.csv, line 3: 'ordinal' must"),
        ("info.csv", "[1, 1, 1]", "[1, 1, '2']", r"info.csv, line 3: 'ordinal' must hold num"),
        ("info.csv", "Where do", f"{'x' * 140_000}Where do", r"info.csv, line \d: field larger"),
        ("responses.csv", "Farm,2.0", "Farm,1e300", r"responses.csv, line 2: 'WEIGHT_W27' is"),
        ("responses.csv", "Farm,2.0", "Farm,2.0,9", r"responses.csv, line 2: the row has more"),
        ("responses.csv", "Male,More", '"Male,More', r"responses.csv, line \d+: unexpected end"),
        ("responses.csv", "Mill,1.0", "Mill,0", r"'Female' who answered 'INDUSTRY_W27' .* of 0"),
    ],
)
def test_damage_to_opinion_qa_is_named_by_file_line_and_reason(opinion_qa, file, old, new, reason):
    path = opinion_qa / "human_resp" / "American_Trends_Panel_W27" / file
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ResearchError, match=reason):
        published.load_opinion_qa(opinion_qa, [27])


def test_near_duplicates_are_found_across_waves_by_wording():
    stem = "How much confidence, if any, do you have in the following people "
    stem += "to act in the interests of the public?"
    texts = [
        f"{stem} Scientists",
        f"{stem} Journalists",
        "Do you own a dog?",
        "Do you ever read the news in print?",
        f"{stem} Elected officials",
        "Do you own a dog or a cat?",
    ]
    questions = [
        survey.Question(f"Q{i}", text, ("No", "Yes"), (1, 2)) for i, text in enumerate(texts)
    ]
    assert find_families(questions, 0.6) == ("Q0", "Q0", "Q2", "Q3", "Q0", "Q2")
    assert find_families(questions, 0.999) == tuple(q.key for q in questions)


def test_whole_waves_are_kept_for_the_test_and_families_stay_together():
    questions = [
        survey.Question(f"Q{w}{i}", f"Question {i}", ("No", "Yes"), (1, 2), f"wave {w}")
        for w in (26, 34)
        for i in range(40)
    ]
    names = [f"{w} {i // 2}" for w in (26, 34) for i in range(40)]
    names[0] = names[1] = names[40]  # asked again in an unseen wave
    p = np.full((1, 80, 2), 0.5)
    asked = survey.Survey(tuple(questions), (survey.Group("a", "b", 1.0),), p, p[0])
    found = split_by_topic(asked, ["wave 34"], names, seed=0)
    splits = np.array([q.split for q in found.questions])
    assert (splits[40:] == "test").all()
    assert (splits[:2] == "test").all()
    assert [(splits[2:40] == s).sum() for s in ("train", "validation", "test")] == [24, 6, 8]
    assert (splits[:40:2] == splits[1:40:2]).all()
    again = split_by_topic(asked, ["wave 34"], names, seed=1)
    assert [q.split for q in again.questions] != splits.tolist()


def test_a_group_of_opinion_qa_without_answers_to_every_question_is_named(opinion_qa):
    path = opinion_qa / "human_resp" / "American_Trends_Panel_W27" / "responses.csv"
    path.write_text(path.read_text().replace("Female,Fewer,Mill", "Female,Fewer,"))
    with pytest.warns(UserWarning, match="'SEX Female' has no answer to 'INDUSTRY_W27'"):
        found = published.load_opinion_qa(opinion_qa, [27])
    assert [g.name for g in found.groups] == ["Male"]


@pytest.mark.parametrize("waves", [[], [27, 27]])
def test_no_wave_and_the_same_wave_twice_are_refused(opinion_qa, waves):
    with pytest.raises(ResearchError, match=r"OpinionQA(:| holds) "):
        published.load_opinion_qa(opinion_qa, waves)


def test_a_missing_wave_is_named(opinion_qa):
    with pytest.raises(ResearchError, match=r"info.csv cannot be read"):
        published.load_opinion_qa(opinion_qa, [92])


def test_pew_data_is_never_written_where_git_would_pick_it_up(tmp_path):
    if subprocess.run(["git", "rev-parse"], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("this copy of the repository has no git")
    for place in (
        "data/cpu/opinion_qa/claims.json",
        "notebooks/executed/cpu/x.ipynb",
        "README.md",
        "pew.csv",
    ):
        with pytest.raises(ResearchError, match="may not be redistributed"):
            published.writable(ROOT / place, "OpinionQA")
        assert published.writable(ROOT / place, "GSS") == ROOT / place
    assert published.writable(tmp_path / "pew.csv", "OpinionQA") == (tmp_path / "pew.csv").resolve()
    assert published.writable(ROOT / "data" / "scratch" / "pew.csv", "SubPOP")
    for spelling in ("opinionqa", "Opinion QA", "ATP", "American Trends Panel", "Pew, wave 92"):
        with pytest.raises(ResearchError, match="may not be redistributed"):
            published.writable(ROOT / "pew.csv", spelling)


def test_pew_data_is_kept_from_a_repository_around_an_unpacked_archive(tmp_path, monkeypatch):
    inside = tmp_path / "thesis" / "sae_research"
    inside.mkdir(parents=True)
    subprocess.run(["git", "init", "-q", str(tmp_path / "thesis")], check=True)
    (tmp_path / "thesis" / ".gitignore").write_text("scratch/\n")
    monkeypatch.setattr(published, "ROOT", inside)
    with pytest.raises(ResearchError, match="may not be redistributed"):
        published.writable(inside / "pew.csv", "OpinionQA")
    assert published.writable(inside / "scratch" / "pew.csv", "OpinionQA")


def test_artefacts_may_hold_it_while_they_are_written_too(tmp_path, monkeypatch):
    for profile in ("gpu", "laptop"):
        folder = paths.artefacts(profile, "opinion_qa")
        for place in (folder, store._partial(folder), paths.scratch(profile, "10_opinion_qa_run")):
            assert published.writable(place / "gemma-2-2b", "OpinionQA")
    monkeypatch.setattr(published, "ROOT", tmp_path)  # no repository there
    assert published.writable(tmp_path / "pew.csv", "OpinionQA")


def test_the_real_opinions_give_their_reference_numbers():
    table = SHARED / "gss2018_spending_groups.csv"
    if not table.exists():
        pytest.skip(f"{table} is not here")
    found = load_survey(table)
    assert found.distance(found.uniform, found.distributions).mean() == pytest.approx(
        0.214, abs=0.001
    )
    assert found.distance(found.overall, found.distributions).mean() == pytest.approx(
        0.041, abs=0.001
    )
    assert np.mean([survey.sampling_noise(found, s) for s in range(5)]) == pytest.approx(
        0.014, abs=0.001
    )
