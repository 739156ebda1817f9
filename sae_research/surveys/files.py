"""Surveys as others publish them: OpinionQA in its CodaLab layout, SubPOP's jsonl, GlobalOpinionQA's csv.

Pew's American Trends Panel, which the first two hold, may not be passed on: `writable` refuses to write it where git
would pick it up.
"""

import ast
import csv
import json
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sae_research.errors import ResearchError
from sae_research.paths import ROOT, relative
from sae_research.surveys.survey import OVERALL, Group, Question, Survey

SPLITS = ("train", "validation", "test")
RESTRICTED = ("OpinionQA", "SubPOP")
"""Sources whose data must stay with the reader."""


@dataclass(frozen=True)
class Cell:
    """How one group answered one question."""

    question: Question
    """The item, options ascending."""
    attribute: str
    """The group's attribute."""
    group: str
    """The group."""
    shares: np.ndarray
    """Share of each option, in the order of the question's options."""
    respondents: int | None
    """How many answered; None where the source does not say."""


def assemble(cells: Sequence[Cell], source: str) -> Survey:
    """The survey of the groups that answered every question; the population is `Overall`, else the groups' mean."""
    questions = {c.question.key: c.question for c in cells}
    width = max(q.n_options for q in questions.values())
    found: dict[tuple[str, str], dict[str, Cell]] = {}
    for cell in cells:
        found.setdefault((cell.attribute, cell.group), {})[cell.question.key] = cell
    full = {name: row for name, row in found.items() if len(row) == len(questions)}
    tables = {
        name: np.stack([_padded(row[q].shares, width) for q in questions])
        for name, row in full.items()
    }
    overall = tables.pop((OVERALL, OVERALL), None)
    if not tables:
        raise ResearchError(
            f"no group of {source} answered all {len(questions)} questions; load fewer waves or files."
        )
    sizes = {n: [full[n][q].respondents for q in questions] for n in tables}
    known = all(size is not None for row in sizes.values() for size in row)
    mean = {n: float(np.mean(row)) if known else 1.0 for n, row in sizes.items()}
    total = {a: sum(m for (b, _), m in mean.items() if b == a) for a, _ in mean}
    distributions = np.stack(list(tables.values()))
    counts = None
    if known:
        counts = np.stack([_whole(tables[n], np.array(sizes[n])) for n in tables])
    groups = tuple(Group(a, g, mean[a, g] / total[a]) for a, g in tables)
    if overall is None:
        share = np.array([g.share for g in groups])
        overall = np.tensordot(share / share.sum(), distributions, 1)
    return Survey(tuple(questions.values()), groups, distributions, overall, counts=counts)


def _padded(shares: np.ndarray, width: int) -> np.ndarray:
    return np.pad(shares, (0, width - len(shares)))


def _whole(shares: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Counts that sum to n, as near to n times the shares as whole numbers come (largest remainders)."""
    exact = shares * n[:, None]
    counts = np.floor(exact).astype(int)
    for row, (target, low) in enumerate(zip(exact, counts, strict=True)):
        rest = int(n[row] - low.sum())
        counts[row, np.argsort(low - target)[:rest]] += 1
    return counts


def question(
    key: str, text: str, options: Sequence[str], ordinal: Sequence[float]
) -> tuple[Question, list[int]]:
    """An item with its options in ascending order, and that order; equal ordinals throughout mean a nominal item."""
    order = sorted(range(len(options)), key=lambda i: ordinal[i])
    ordered = len(set(ordinal)) > 1
    values = (
        tuple(float(ordinal[i]) for i in order)
        if ordered
        else tuple(map(float, range(len(options))))
    )
    return Question(
        key, text, tuple(str(options[i]) for i in order), values, ordered=ordered
    ), order


# OpinionQA


def load_opinion_qa(folder: Path, waves: Sequence[int]) -> Survey:
    """OpinionQA as its authors publish it on CodaLab: `human_resp/American_Trends_Panel_W<wave>/` below `folder`.

    Each wave holds info.csv (key, question, references, option_ordinal), metadata.csv (key, options) and responses.csv
    (one respondent a row, weight in WEIGHT_W<wave>). Refusals are left out of the distributions.
    """
    cells: list[Cell] = []
    for wave in waves:
        place = Path(folder) / "human_resp" / f"American_Trends_Panel_W{wave}"
        items = [
            _opinion_item(row, place / "info.csv", line, wave)
            for line, row in rows(place / "info.csv", _INFO)
        ]
        attributes = {
            row["key"]: literal(row["options"], list, place / "metadata.csv", line)
            for line, row in rows(place / "metadata.csv", ("key", "options"))
        }
        weight = f"WEIGHT_W{wave}"
        needed = (weight, *attributes, *(q.key for q, _ in items))
        people = list(rows(place / "responses.csv", needed))
        weights = np.array(
            [number(row[weight], place / "responses.csv", line, weight) for line, row in people]
        )
        answers = {
            q.key: _chosen(q, refusals, people, place / "responses.csv") for q, refusals in items
        }
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
                cells.append(Cell(item, attribute, name, shares / shares.sum(), int(here.sum())))
    return assemble(cells, "OpinionQA")


_INFO = ("key", "question", "references", "option_ordinal")


def families(questions: Sequence[Question], similarity: float) -> tuple[str, ...]:
    """The family of near-duplicates of each question, by the key of its first member, whatever the wave.

    Two wordings are near-duplicates if the cosine of their tf-idf vectors is at least `similarity`; families are what
    hangs together by that.
    """
    from scipy.sparse.csgraph import connected_components
    from sklearn.feature_extraction.text import TfidfVectorizer

    words = TfidfVectorizer(token_pattern=r"\w+").fit_transform([q.text for q in questions])
    _, labels = connected_components((words @ words.T) >= similarity, directed=False)
    first: dict[int, str] = {}
    return tuple(
        first.setdefault(int(label), q.key) for label, q in zip(labels, questions, strict=True)
    )


def split_by_wave(survey: Survey, unseen: Sequence[int], names: Sequence[str], seed: int) -> Survey:
    """Test questions: all of the `unseen` waves and a quarter of the others; the rest trains (60 of 75) or validates.

    `names` are the questions' families: none is parted, and one that reaches into an unseen wave is for the test alone.
    """
    waves = {f"wave {wave}" for wave in unseen}
    apart = {name for name, q in zip(names, survey.questions, strict=True) if q.topic in waves}
    seen = [name for name in dict.fromkeys(names) if name not in apart]
    order = np.random.default_rng(seed).permutation(len(seen))
    bounds = (0.6 * len(seen), 0.75 * len(seen))
    part = {
        seen[i]: SPLITS[int(np.searchsorted(bounds, place, side="right"))]
        for place, i in enumerate(order)
    }
    questions = [
        replace(q, split=part.get(name, "test"))
        for q, name in zip(survey.questions, names, strict=True)
    ]
    return replace(survey, questions=tuple(questions))


def _opinion_item(
    row: dict[str, str], path: Path, line: int, wave: int
) -> tuple[Question, set[str]]:
    options = literal(row["references"], list, path, line)
    ordinal = literal(row["option_ordinal"], list, path, line)
    if not 2 <= len(ordinal) <= len(options):
        raise malformed(
            path,
            line,
            f"{len(options)} references but {len(ordinal)} ordinals; refusals alone may lack one",
        )
    item, _ = question(row["key"], row["question"], options[: len(ordinal)], ordinal)
    return replace(item, topic=f"wave {wave}"), set(map(str, options[len(ordinal) :]))


def _chosen(
    item: Question, refusals: set[str], people: list[tuple[int, dict]], path: Path
) -> np.ndarray:
    """Index of the option that each respondent chose; -1 for refusals and people who were not asked."""
    index = {option: i for i, option in enumerate(item.options)} | dict.fromkeys(
        refusals | {"", "nan"}, -1
    )
    found = np.empty(len(people), dtype=int)
    for i, (line, row) in enumerate(people):
        if row[item.key] not in index:
            raise malformed(path, line, f"'{row[item.key]}' is no option of question '{item.key}'")
        found[i] = index[row[item.key]]
    return found


# SubPOP


def load_subpop(path: Path) -> Survey:
    """SubPOP's jsonl: a question and group a line, with qkey, question, options, ordinal, attribute, group, responses.

    `responses` holds the shares of the options without refusal; `n` (respondents) is read where it is given.
    """
    path, cells = Path(path), []
    for line, text in enumerate(_text(path).splitlines(), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise malformed(path, line, f"it is not JSON ({error.msg})") from error
        for name in ("qkey", "question", "options", "ordinal", "attribute", "group", "responses"):
            if name not in row:
                raise malformed(path, line, f"'{name}' is missing")
        options, ordinal, shares = (
            as_list(row[name], path, line, name) for name in ("options", "ordinal", "responses")
        )
        if not 2 <= len(ordinal) == len(shares) <= len(options):
            reason = f"{len(options)} options, {len(ordinal)} ordinals and {len(shares)} responses"
            raise malformed(path, line, reason)
        item, order = question(str(row["qkey"]), row["question"], options[: len(ordinal)], ordinal)
        found = checked(shares, path, line)[order]
        n = row.get("n")
        cells.append(
            Cell(item, row["attribute"], row["group"], found, None if n is None else int(n))
        )
    if not cells:
        raise ResearchError(f"{relative(path)} holds no rows.")
    return assemble(cells, "SubPOP")


# GlobalOpinionQA


def load_global_opinions(path: Path, countries: Sequence[str]) -> Survey:
    """GlobalOpinionQA's csv (question, selections, options): the questions that all `countries` answered.

    The file says nothing on the options' order, so they count as nominal and distances are total variation.
    """
    path, cells = Path(path), []
    for line, row in rows(path, ("question", "selections", "options")):
        text = row["selections"]
        inner = text[text.find("{") : text.rfind("}") + 1]
        answers = literal(inner, dict, path, line)
        options = literal(row["options"], list, path, line)
        if not all(country in answers for country in countries):
            continue
        item, _ = question(f"line {line}", row["question"], options, [0.0] * len(options))
        for country in countries:
            shares = answers[country]
            if not isinstance(shares, list) or len(shares) != len(options):
                raise malformed(
                    path, line, f"'{country}' has no share for each of the {len(options)} options"
                )
            cells.append(Cell(item, "country", country, checked(shares, path, line), None))
    if not cells:
        raise ResearchError(
            f"{relative(path)} has no question that all of {', '.join(countries)} answered."
        )
    return assemble(cells, "GlobalOpinionQA")


# the gate


def writable(path: Path, source: str) -> Path:
    """`path`, unless data of `source` may not be passed on and git would pick the file up."""
    path = Path(path).resolve()
    if source in RESTRICTED and path.is_relative_to(ROOT) and not ignored(path):
        raise ResearchError(
            f"{source} holds Pew's American Trends Panel, which may not be redistributed, and git would pick "
            f"{relative(path)} up; write it outside the repository or to a folder that git ignores."
        )
    return path


def ignored(path: Path) -> bool:
    """Whether git leaves a path of this folder alone; an unpacked archive has no repository that could pick it up."""
    if not (ROOT / ".git").exists():
        return True
    try:
        found = subprocess.run(
            ["git", "check-ignore", "-q", str(path)], cwd=ROOT, capture_output=True, check=False
        )
        tracked = subprocess.run(
            ["git", "ls-files", str(path)], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except OSError:
        return False
    return found.returncode == 0 and not tracked.stdout.strip()


# reading


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ResearchError(
            f"{relative(path)} cannot be read ({error}); fetch the data set again."
        ) from error


def rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a csv with their line numbers; a missing file, column or cell is named."""
    reader = csv.DictReader(_text(path).splitlines(keepends=True))
    missing = [c for c in columns if c not in (reader.fieldnames or ())]
    if missing:
        raise ResearchError(f"{relative(path)}, line 1: column '{missing[0]}' is missing.")
    for row in reader:
        if any(row[c] is None for c in columns):
            raise malformed(path, reader.line_num, "the row has fewer cells than the header")
        yield reader.line_num, row


def literal(text: str, kind: type, path: Path, line: int) -> object:
    """A list or dict that was written as Python text; nothing is executed."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = None
    if not isinstance(value, kind):
        raise malformed(path, line, f"{text[:40]!r} is not a {kind.__name__}")
    return value


def as_list(value: object, path: Path, line: int, name: str) -> list:
    """A list, or the text of one."""
    value = literal(value, list, path, line) if isinstance(value, str) else value
    if not isinstance(value, list):
        raise malformed(path, line, f"'{name}' is not a list")
    return value


def number(text: str, path: Path, line: int, name: str) -> float:
    """A finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not (np.isfinite(value) and value >= 0):
        raise malformed(path, line, f"'{name}' is {text!r}, not a number of at least 0")
    return value


def checked(shares: Sequence[object], path: Path, line: int) -> np.ndarray:
    """Shares as an array that sums to one."""
    good = all(
        isinstance(s, int | float) and not isinstance(s, bool) and np.isfinite(s) and s >= 0
        for s in shares
    )
    if not good or not 0.9 <= sum(shares) <= 1.1:  # type: ignore[arg-type]
        raise malformed(
            path, line, f"shares must be at least 0 and sum to about 1: {list(shares)[:6]}"
        )
    found = np.array(shares, dtype=float)
    return found / found.sum()


def malformed(path: Path, line: int, reason: str) -> ResearchError:
    """The error for one row."""
    return ResearchError(f"{relative(path)}, line {line}: {reason}; correct the row.")
