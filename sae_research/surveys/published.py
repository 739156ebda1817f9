"""OpinionQA as its authors publish it on CodaLab.

Pew's American Trends Panel, which it holds, may not be passed on: `writable` refuses to write it
where git would pick it up.
"""

import re
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from sae_research.errors import ResearchError
from sae_research.paths import ROOT, relative
from sae_research.surveys.cells import Cell, assemble, find_flaw, make_question
from sae_research.surveys.survey import OVERALL, Question, Survey
from sae_research.surveys.tables import malformed, parse_literal, parse_number, read_rows

RESTRICTED = ("opinionqa", "subpop", "americantrendspanel", "atp", "pew")
"""What names of sources hold, in whatever spelling, whose data must stay with the reader."""


# OpinionQA


def load_opinion_qa(folder: Path, waves: Sequence[int]) -> Survey:
    """OpinionQA as published on CodaLab: `human_resp/American_Trends_Panel_W<wave>/` in `folder`.

    Each wave holds info.csv (key, question, references, option_ordinal), metadata.csv (key,
    options) and responses.csv (one row per respondent, weight in WEIGHT_W<wave>). Refusals are
    left out of the distributions.
    """
    cells: list[Cell] = []
    for wave in waves:
        place = Path(folder) / "human_resp" / f"American_Trends_Panel_W{wave}"
        items = [
            _make_opinion_item(row, place / "info.csv", line, wave)
            for line, row in read_rows(place / "info.csv", _INFO)
        ]
        attributes = _read_attributes(place / "metadata.csv")
        _refuse_twice([item.key for item, _ in items], place / "info.csv")
        weight = f"WEIGHT_W{wave}"
        needed = (weight, *attributes, *(q.key for q, _ in items))
        people = read_rows(place / "responses.csv", needed)
        responses = place / "responses.csv"
        weights = np.array([parse_number(row[weight], responses, i, weight) for i, row in people])
        answers = {q.key: _find_chosen(q, refusals, people, responses) for q, refusals in items}
        members = {(OVERALL, OVERALL): np.ones(len(people), dtype=bool)}
        for attribute, names in attributes.items():
            held = np.array([row[attribute] for _, row in people])
            members |= {(attribute, name): held == name for name in names}
        for item, _ in items:
            chosen = answers[item.key]
            for (attribute, name), inside in members.items():
                here = inside & (chosen >= 0)
                if not here.any():
                    continue
                shares = np.bincount(chosen[here], weights[here], item.n_options)
                if not shares.any():
                    raise ResearchError(
                        f"{relative(responses)}: everybody of group '{name}' who answered "
                        f"'{item.key}' has a {weight} of 0; correct the weights."
                    )
                cells.append(Cell(item, attribute, name, shares / shares.sum(), int(here.sum())))
    return assemble(cells, "OpinionQA")


_INFO = ("key", "question", "references", "option_ordinal")


def _read_attributes(path: Path) -> dict[str, list[str]]:
    """The groups of each attribute."""
    rows = read_rows(path, ("key", "options"))
    _refuse_twice([row["key"] for _, row in rows], path)
    found = {row["key"]: parse_literal(row["options"], list, path, line) for line, row in rows}
    for (line, row), names in zip(rows, found.values(), strict=True):
        if not all(isinstance(name, str) for name in names):
            raise malformed(path, line, f"a group of '{row['key']}' is no text")
    return found


def _refuse_twice(keys: Sequence[str], path: Path) -> None:
    if twice := [key for key, n in Counter(keys).items() if n > 1]:
        raise ResearchError(f"{relative(path)}: '{twice[0]}' has two rows; remove one.")


def _make_opinion_item(
    row: dict[str, str], path: Path, line: int, wave: int
) -> tuple[Question, set[str]]:
    options = parse_literal(row["references"], list, path, line)
    ordinal = parse_literal(row["option_ordinal"], list, path, line)
    if not 2 <= len(ordinal) <= len(options):
        counts = f"{len(options)} references but {len(ordinal)} ordinals"
        raise malformed(path, line, f"{counts}; refusals alone may lack one")
    if flaw := find_flaw(options[: len(ordinal)], ordinal):
        raise malformed(path, line, flaw)
    item, _ = make_question(row["key"], row["question"], options[: len(ordinal)], ordinal)
    return replace(item, topic=f"wave {wave}"), set(map(str, options[len(ordinal) :]))


def _find_chosen(
    item: Question, refusals: set[str], people: list[tuple[int, dict]], path: Path
) -> np.ndarray:
    """Index of the option that each respondent chose; -1 for refusals and the unasked."""
    index = {option: i for i, option in enumerate(item.options)}
    index |= dict.fromkeys(refusals | {"", "nan"}, -1)
    found = np.empty(len(people), dtype=int)
    for i, (line, row) in enumerate(people):
        if row[item.key] not in index:
            raise malformed(path, line, f"'{row[item.key]}' is no option of question '{item.key}'")
        found[i] = index[row[item.key]]
    return found


# what may be written where


def writable(path: Path, source: str) -> Path:
    """`path`, unless data of `source` may not be passed on and git would pick the file up."""
    path = Path(path).resolve()
    letters = re.sub("[^a-z]", "", source.lower())
    restricted = any(name in letters for name in RESTRICTED)
    if restricted and path.is_relative_to(ROOT) and not is_ignored(path):
        raise ResearchError(
            f"{source} holds Pew's American Trends Panel, which may not be redistributed, and git "
            f"would pick {relative(path)} up; write it outside the repository or to a folder that "
            "git ignores."
        )
    return path


def is_ignored(path: Path) -> bool:
    """Whether git leaves a path alone; an unpacked archive may lie in another repository."""
    if not any((folder / ".git").exists() for folder in (ROOT, *ROOT.parents)):
        return True
    try:
        ignored, tracked = (
            subprocess.run(["git", *words, str(path)], cwd=ROOT, capture_output=True, check=False)
            for words in (["check-ignore", "-q"], ["ls-files"])
        )
    except OSError:
        return False
    return ignored.returncode == 0 and not tracked.stdout.strip()
