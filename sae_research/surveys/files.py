"""A survey of your own: `load_survey` reads one csv in any of three layouts.

| layout | a row is | needed columns | optional columns |
|---|---|---|---|
| counts | a group's answers to a question | qkey, attribute, group, question, options, counts | ordinal, n, topic |
| long | a respondent's answer to a question | respondent, question, answer, attributes | weight |
| wide | a respondent | one per question, attributes | respondent, weight |

counts: `options`, `counts` and `ordinal` are lists such as ["no", "yes"]. Counts may be weighted;
`n` is the number of respondents, by default the sum of the counts. Without `ordinal` the options
ascend as listed; equal ordinals mean options without order. Rows of attribute and group `Overall`
are the population; without them it is pooled over the groups. `topic` is what a question is about.

long and wide: each attribute column (gender, party, ...) makes one group per value. Empty cells
are people who were not asked or did not answer. `weight` is a respondent's survey weight.
"""  # noqa: E501 - the table

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sae_research.errors import ResearchError, unknown
from sae_research.paths import relative
from sae_research.surveys.cells import MOST_OPTIONS, Cell, assemble, find_flaw, make_question
from sae_research.surveys.survey import OVERALL, Question, Survey
from sae_research.surveys.tables import (
    LARGEST,
    UNNAMED,
    Row,
    malformed,
    parse_literal,
    parse_number,
    read_rows,
)

if TYPE_CHECKING:
    from pandas import DataFrame, Series

COUNTS = ("qkey", "attribute", "group", "question", "options", "counts")
LONG = ("respondent", "question", "answer")
LAYOUTS = (
    f"A survey is a csv with one row per group and question (columns {', '.join(COUNTS)}), one row "
    f"per respondent and question (columns {', '.join(LONG)} and attributes), or one row per "
    "respondent (one column per question; name the attribute columns: "
    "`load_survey(path, attributes=['gender'])`)."
)


def load_survey(
    path: "Path | str",
    *,
    attributes: Sequence[str] = (),
    questions: "Sequence[str] | Mapping[str, str]" = (),
    options: Mapping[str, Sequence[str]] | None = None,
    weight: str = "weight",
) -> Survey:
    """A survey from a csv in the layout counts, long or wide (see the table of this module).

    `attributes` are the columns that make groups (long: by default all further columns; counts:
    the attributes to read, by default all), `questions` the ones to read (default: all), with their
    wordings if it is a mapping. `options` lists a question's answers in ascending order; without
    it, numbers ascend and words have no order. `weight` names the column of respondents' weights.

    >>> survey = load_survey("poll.csv", attributes=["party"], options={"tax": ["no", "yes"]})
    >>> survey = survey.split(seed=0)
    """
    path = Path(path).expanduser()
    rows = read_rows(path, layout=LAYOUTS)
    columns = list(rows[0][1])
    others = {*attributes, weight, "respondent"}
    if set(COUNTS) <= set(columns):
        _check_names("question", questions, (row["qkey"] for _, row in rows), path)
        _check_names("attribute", attributes, (row["attribute"] for _, row in rows), path)
        wanted = [r for r in rows if not questions or r[1]["qkey"] in questions]
        if attributes:
            wanted = [r for r in wanted if r[1]["attribute"] in (*attributes, OVERALL)]
        cells = _read_counts(wanted, path)
    else:
        _check_columns(rows, {*attributes, *questions, weight}, path)
        if set(LONG) <= set(columns):
            attributes = attributes or [c for c in columns if c not in (*LONG, weight)]
            answers = _read_long(rows, path, attributes, weight)
        elif attributes and (
            listed := questions or sorted(set(columns) - others, key=columns.index)
        ):
            answers = _read_wide(rows, path, attributes, listed, weight)
        else:
            found = ", ".join(columns[:8])
            raise ResearchError(f"{relative(path)} has the columns {found}. {LAYOUTS}")
        asked = answers["question"].unique()
        _check_names("question", options or (), [*asked, *columns], path)
        if questions:
            _check_names("question", questions, asked, path)
            answers = answers[answers["question"].isin(list(questions))]
        wordings = questions if isinstance(questions, Mapping) else {}
        cells = _count_answers(answers, path, attributes, wordings, options or {})
    if not cells:
        raise ResearchError(f"{relative(path)} holds no answers to the questions. {LAYOUTS}")
    return assemble(cells, relative(path))


def _check_columns(rows: list[Row], wanted: Iterable[str], path: Path) -> None:
    """Refuse what would be read as a question, or as groups, and is meant otherwise."""
    for name in rows[0][1]:
        meant, reason = name.casefold(), ""
        if meant in ("weight", "respondent") and name not in (meant, *wanted):
            reason = f"column '{name}' must be spelt '{meant}'; rename it."
        if meant.startswith(("unnamed:", UNNAMED)) and any(row[name].strip() for _, row in rows):
            reason = f"'{name}' holds values; name it or remove it."
        if reason:
            raise ResearchError(f"{relative(path)}, line 1: {reason} {LAYOUTS}")


def _check_names(kind: str, wanted: Iterable[str], present: Iterable[str], path: Path) -> None:
    present = set(present)
    for name in wanted:
        if name not in present:
            raise unknown(kind, name, present, relative(path))


# one row per group and question


def _read_counts(rows: list[Row], path: Path) -> list[Cell]:
    """Cells from counts; a row without counts is a question that the group did not answer."""
    cells: dict[tuple[str, str, str], Cell] = {}
    known: dict[str, Question] = {}
    pooled: dict[str, np.ndarray] = {}
    for line, row in rows:
        if not row["counts"].strip():
            continue
        if empty := [name for name in COUNTS if not row[name].strip()]:
            raise malformed(path, line, f"'{empty[0]}' is empty")
        item, counts = _parse_counts(row, path, line)
        if known.setdefault(item.key, item) != item:
            reason = f"question '{item.key}' has another wording or other options than before"
            raise malformed(path, line, reason)
        if (row["attribute"] == OVERALL) != (row["group"] == OVERALL):
            reason = f"the population has '{OVERALL}' as attribute and group, nobody else has"
            raise malformed(path, line, reason)
        place = (row["attribute"], row["group"], item.key)
        if place in cells:
            reason = f"question '{item.key}' of group '{row['group']}' appears twice"
            raise malformed(path, line, reason)
        n = (row.get("n") or "").strip()
        respondents = round(parse_number(n, path, line, "n", least=1) if n else counts.sum())
        shares = counts / counts.sum()
        cells[place] = Cell(item, row["attribute"], row["group"], shares, max(1, respondents))
        pooled[item.key] = pooled.get(item.key, 0) + counts
    found = list(cells.values())
    if not any(cell.attribute == OVERALL for cell in found):
        for key, counts in pooled.items():
            shares = counts / counts.sum()
            found.append(Cell(known[key], OVERALL, OVERALL, shares, round(counts.sum())))
    return found


def _parse_counts(row: dict[str, str], path: Path, line: int) -> tuple[Question, np.ndarray]:
    options, counts = (
        parse_literal(row[name], list, path, line, name) for name in ("options", "counts")
    )
    ordinal = list(range(1, len(options) + 1))
    if (row.get("ordinal") or "").strip():
        ordinal = parse_literal(row["ordinal"], list, path, line, "ordinal")
    if flaw := find_flaw(options, ordinal):
        raise malformed(path, line, flaw)
    if len(set(ordinal)) not in (1, len(ordinal)):
        reason = f"'ordinal' must hold different numbers, or equal ones for no order: {ordinal}"
        raise malformed(path, line, reason)
    if len(counts) != len(options):
        raise malformed(path, line, f"{len(options)} options and {len(counts)} counts")
    numeric = all(type(c) in (int, float) and 0 <= c <= LARGEST for c in counts)
    if not numeric or sum(counts) == 0:
        reason = f"'counts' must be numbers of at least 0, not all 0: {str(counts)[:80]}"
        raise malformed(path, line, reason)
    item, order = make_question(row["qkey"], row["question"], options, ordinal)
    item = replace(item, topic=(row.get("topic") or "").strip())
    return item, np.array(counts, dtype=float)[order]


# one row per respondent (and question)


def _read_long(rows: list[Row], path: Path, attributes: Sequence[str], weight: str) -> "DataFrame":
    """The answers of a long csv; the columns that `_count_answers` takes."""
    frame = _read_people(rows, path, attributes, weight, ("question", "answer"))
    frame["question"] = [row["question"].strip() for _, row in rows]
    frame["answer"] = [row["answer"].strip() for _, row in rows]
    people = frame.assign(who=[row["respondent"].strip() for _, row in rows])
    _refuse(people.duplicated(["who", "question"]), people, path, "has answered the question")
    for name, column in {weight: "_weight", **{name: name for name in attributes}}.items():
        other = people[column] != people.groupby("who")[column].transform("first")
        _refuse(other, people, path, f"had another '{name}'")
    return frame


def _refuse(wrong: "Series", people: "DataFrame", path: Path, reason: str) -> None:
    if wrong.any():
        line = int(people["_line"][wrong].iloc[0])
        raise malformed(path, line, f"this respondent {reason} before")


def _read_wide(
    rows: list[Row], path: Path, attributes: Sequence[str], questions: Sequence[str], weight: str
) -> "DataFrame":
    """The same for a wide csv, question after question."""
    import pandas as pd

    people = _read_people(rows, path, attributes, weight, questions)
    if "respondent" in rows[0][1]:
        who = pd.Series([row["respondent"].strip() for _, row in rows])
        _refuse(who.duplicated(), people, path, "stands in a row")
    answers = {name: [row[name].strip() for _, row in rows] for name in questions}
    asked = [people.assign(question=name, answer=given) for name, given in answers.items()]
    return pd.concat(asked, ignore_index=True)


def _read_people(
    rows: list[Row], path: Path, attributes: Sequence[str], weight: str, needed: Sequence[str]
) -> "DataFrame":
    """Line, weight and attributes of each row."""
    import pandas as pd

    header = rows[0][1]
    if taken := {"question", "answer", "_line", "_weight", OVERALL}.intersection(attributes):
        where = f"{relative(path)}, line 1"
        raise ResearchError(f"{where}: '{taken.pop()}' cannot be an attribute; rename the column.")
    wanted = [*attributes, *needed] + ([weight] if weight != "weight" else [])
    if missing := [column for column in wanted if column not in header]:
        where = f"{relative(path)}, line 1"
        raise ResearchError(f"{where}: column '{missing[0]}' is missing. {LAYOUTS}")
    frame = pd.DataFrame({"_line": [line for line, _ in rows]})
    frame["_weight"] = 1.0
    if weight in header:
        frame["_weight"] = [parse_number(row[weight], path, line, weight) for line, row in rows]
    frame[OVERALL] = OVERALL
    for name in attributes:
        frame[name] = [row[name].strip() for _, row in rows]
    return frame


def _count_answers(
    answers: "DataFrame",
    path: Path,
    attributes: Sequence[str],
    wordings: Mapping[str, str],
    options: Mapping[str, Sequence[str]],
) -> list[Cell]:
    """Weighted shares of each group's answers to each question, and how many people answered."""
    cells = []
    for key, asked in answers[answers["answer"] != ""].groupby("question", sort=False):
        item = _infer_question(key, wordings.get(key, key), asked["answer"], options.get(key))
        unknown = asked[~asked["answer"].isin(item.options)]
        if len(unknown):
            answer = unknown["answer"].iloc[0]
            reason = f"'{answer}' is no option of question '{key}': {', '.join(item.options)}"
            raise malformed(path, int(unknown["_line"].iloc[0]), reason)
        chosen = asked["answer"].map(item.options.index).to_numpy()
        weights = asked["_weight"].to_numpy()
        for attribute in (OVERALL, *attributes):
            values = asked[attribute].to_numpy()
            for value in sorted(set(values) - {""}):
                inside = values == value
                counts = np.bincount(chosen[inside], weights[inside], item.n_options)
                if counts.sum() > 0:
                    shares = counts / counts.sum()
                    cells.append(Cell(item, attribute, value, shares, int(inside.sum())))
    return cells


def _infer_question(
    key: str, wording: str, answers: Sequence[str], options: Sequence[str] | None
) -> Question:
    """A question with the options that are given, or else with those that occur."""
    if options:
        if flaw := find_flaw(options, range(len(options))):
            raise ResearchError(f"the options of '{key}': {flaw}.")
        return make_question(key, wording, options, range(len(options)))[0]
    found = sorted(set(answers))
    if not 2 <= len(found) <= MOST_OPTIONS:
        raise ResearchError(
            f"'{key}' has {len(found)} different answers, so it is no question with options; "
            "leave it out with `questions=[...]` or list its `options`."
        )
    try:
        ordinal = [float(answer) for answer in found]
    except ValueError:
        ordinal = [0.0] * len(found)
    else:
        flaw = find_flaw(found, ordinal)
        if flaw or len(set(ordinal)) < len(found):
            reason = flaw or "two of them are the same number"
            raise ResearchError(
                f"the answers to '{key}' ({', '.join(found)}) are no scale: {reason}; "
                "correct them, or list its `options`."
            )
    return make_question(key, wording, found, ordinal)[0]
