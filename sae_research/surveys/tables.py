"""One csv reader for surveys, and parsers of cells that name file, line and reason."""

import ast
import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sae_research.errors import ResearchError
from sae_research.paths import relative

Row = tuple[int, dict[str, str]]
"""A row of a csv with its line number."""


def read_rows(path: Path, columns: Sequence[str] = (), layout: str = "") -> list[Row]:
    """Rows of a csv; a missing column or cell and an empty file are named, with the `layout`."""
    try:
        # without the byte-order mark that spreadsheets put in front
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ResearchError(
            f"{relative(path)} cannot be read ({error}); check the path, and save it as UTF-8 text."
        ) from error
    if not text.strip():
        raise ResearchError(f"{relative(path)} is empty; {layout or 'fetch the data set again.'}")
    reader = csv.DictReader(text.splitlines(keepends=True))
    header = reader.fieldnames or ()
    if missing := [column for column in columns if column not in header]:
        words = f"{relative(path)}, line 1: column '{missing[0]}' is missing. {layout}"
        raise ResearchError(words.rstrip())
    rows = []
    for row in reader:
        if any(row[column] is None for column in columns or header):
            raise malformed(path, reader.line_num, "the row has fewer cells than the header")
        rows.append((reader.line_num, row))
    if not rows:
        raise ResearchError(f"{relative(path)} has a header but no rows. {layout}".rstrip())
    return rows


def parse_literal(text: str, kind: type, path: Path, line: int, name: str = "") -> object:
    """A list or dict that was written as JSON or Python text; nothing is executed."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = None
    if not isinstance(value, kind):
        what = f"'{name}' holds {text[:40]!r}, which" if name else repr(text[:40])
        raise malformed(path, line, f"{what} is not a {kind.__name__}")
    return value


def parse_number(text: str, path: Path, line: int, name: str) -> float:
    """A finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not (np.isfinite(value) and value >= 0):
        raise malformed(path, line, f"'{name}' is {text!r}, not a number of at least 0")
    return value


def malformed(path: Path, line: int, reason: str) -> ResearchError:
    """The error for one row."""
    return ResearchError(f"{relative(path)}, line {line}: {reason}; correct the row.")
