"""From cells (a group's answers to a question) to a survey."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sae_research.errors import ResearchError
from sae_research.surveys.survey import OVERALL, Group, Question, Survey
from sae_research.surveys.tables import LARGEST


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


MOST_OPTIONS = 26
"""Options are lettered, so no question can have more."""


def find_flaw(options: Sequence[object], ordinal: Sequence[object]) -> str:
    """Why these cannot be a question's options with their ordinals; empty if they can."""
    if not 2 <= len(options) == len(ordinal) <= MOST_OPTIONS:
        counts = f"{len(options)} options and {len(ordinal)} ordinals"
        return f"{counts}; there must be equally many, from 2 to {MOST_OPTIONS}"
    if not all(type(o) in (str, int, float) and str(o).strip() for o in options):
        return f"an option is no text: {str(options)[:80]}"
    if len(set(map(str, options))) < len(options):
        return f"an option stands twice: {str(options)[:80]}"
    if not all(type(o) in (int, float) and -LARGEST <= o <= LARGEST for o in ordinal):
        return f"'ordinal' must hold numbers: {str(ordinal)[:80]}"
    return ""


def make_question(
    key: str, text: str, options: Sequence[str], ordinal: Sequence[float]
) -> tuple[Question, list[int]]:
    """An item with its options in ascending order, and that order.

    Equal ordinals throughout mean a nominal item.
    """
    order = sorted(range(len(options)), key=lambda i: ordinal[i])
    ordered = len(set(ordinal)) > 1
    scale = [ordinal[i] for i in order] if ordered else range(len(options))
    names = tuple(str(options[i]) for i in order)
    return Question(key, text, names, tuple(map(float, scale)), ordered=ordered), order


def assemble(cells: Sequence[Cell], source: str) -> Survey:
    """The survey of the groups that answered every question.

    The population is the group `Overall`, or the mean of the groups where the source has none.
    """
    if not cells:
        raise ResearchError(f"{source} holds no answers; load at least one question, wave or file.")
    questions: dict[str, Question] = {}
    found: dict[tuple[str, str], dict[str, Cell]] = {}
    for cell in cells:
        key = cell.question.key
        row = found.setdefault((cell.attribute, cell.group), {})
        if key in row or questions.setdefault(key, cell.question) != cell.question:
            raise ResearchError(
                f"{source}: question '{key}' appears twice for group '{cell.group}', or with "
                "another wording or other options; give each question a key of its own."
            )
        row[key] = cell
    width = max(q.n_options for q in questions.values())
    full = {name: row for name, row in found.items() if len(row) == len(questions)}
    tables = {
        name: np.stack([_pad(row[q].shares, width) for q in questions])
        for name, row in full.items()
    }
    overall = tables.pop((OVERALL, OVERALL), None)
    if not tables:
        raise ResearchError(
            f"no group of {source} answered all {len(questions)} questions; "
            "load fewer questions, waves or files."
        )
    _warn_of_left_out(found, list(questions), source)
    sizes = {n: [full[n][q].respondents for q in questions] for n in tables}
    known = all(size is not None for row in sizes.values() for size in row)
    mean = {n: float(np.mean(row)) if known else 1.0 for n, row in sizes.items()}
    total = {a: sum(m for (b, _), m in mean.items() if b == a) for a, _ in mean}
    distributions = np.stack(list(tables.values()))
    counts = None
    if known:
        counts = np.stack([_to_whole_counts(tables[n], np.array(sizes[n])) for n in tables])
    groups = tuple(Group(a, g, mean[a, g] / total[a]) for a, g in tables)
    if overall is None:
        share = np.array([g.share for g in groups])
        overall = np.tensordot(share / share.sum(), distributions, 1)
    return Survey(tuple(questions.values()), groups, distributions, overall, counts=counts)


def _warn_of_left_out(
    found: Mapping[tuple[str, str], Mapping[str, Cell]], keys: Sequence[str], source: str
) -> None:
    """Say which groups are not in the survey, each with the first question that it lacks."""
    lacking = {" ".join(name): [k for k in keys if k not in row] for name, row in found.items()}
    missing = [f"'{name}' has no answer to '{gone[0]}'" for name, gone in lacking.items() if gone]
    if missing:
        listed = "; ".join(missing)
        warnings.warn(
            f"{source}: groups without answers to every question are left out: {listed}.",
            stacklevel=4,
        )


def _pad(shares: np.ndarray, width: int) -> np.ndarray:
    return np.pad(shares, (0, width - len(shares)))


def _to_whole_counts(shares: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Counts that sum to n, as near to n times the shares as whole numbers come.

    What rounding down leaves goes to the largest remainders.
    """
    exact = shares * n[:, None]
    counts = np.floor(exact).astype(int)
    for row, (target, low) in enumerate(zip(exact, counts, strict=True)):
        rest = int(n[row] - low.sum())
        counts[row, np.argsort(low - target)[:rest]] += 1
    return counts
