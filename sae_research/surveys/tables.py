"""One csv reader for surveys, and parsers of cells that name file, line and reason."""

import ast
import csv
from collections.abc import Sequence
from pathlib import Path

from sae_research.errors import ResearchError
from sae_research.paths import relative

Row = tuple[int, dict[str, str]]
"""A row of a csv with its line number."""
UNNAMED = "unnamed column "
"""What a column without a name is called, before its place."""


def read_rows(path: Path, columns: Sequence[str] = (), layout: str = "") -> list[Row]:
    """Rows of a csv; a missing column or cell and an empty file are named, with the `layout`."""
    try:
        # csv finds ends of lines itself; utf-8-sig drops the mark that spreadsheets put first
        with path.open(encoding="utf-8-sig", newline="") as file:
            return _read_rows(csv.DictReader(file, strict=True), path, columns, layout)
    except (OSError, ValueError) as error:  # such as a name with a null character
        raise ResearchError(
            f"{relative(path)} cannot be read ({error}); check the path, and save it as UTF-8 text."
        ) from error


def _read_rows(
    reader: csv.DictReader, path: Path, columns: Sequence[str], layout: str
) -> list[Row]:
    rows = []
    try:
        header = [name.strip() for name in reader.fieldnames or ()]  # `party, weight`
        if not "".join(header):
            words = layout or "fetch the data set again."
            raise ResearchError(f"{relative(path)} is empty; {words}")
        header = [name or f"{UNNAMED}{i}" for i, name in enumerate(header, 1)]
        reader.fieldnames = header
        where = f"{relative(path)}, line 1: column"
        if missing := [column for column in columns if column not in header]:
            raise ResearchError(f"{where} '{missing[0]}' is missing. {layout}".rstrip())
        if twice := [column for column in header if header.count(column) > 1]:
            raise ResearchError(f"{where} '{twice[0]}' stands twice; rename one. {layout}".rstrip())
        for row in reader:
            if None in row or None in row.values():
                kind = "more" if None in row else "fewer"
                reason = f"the row has {kind} cells than the header"
                raise malformed(path, reader.line_num, reason)
            if "\0" in "".join([*header, *row.values()]):  # numpy would drop it
                reason = "the row, or the header, holds a null character"
                raise malformed(path, reader.line_num, reason)
            rows.append((reader.line_num, row))
    except csv.Error as error:
        raise malformed(path, reader.line_num, str(error)) from error
    if not rows:
        raise ResearchError(f"{relative(path)} has a header but no rows. {layout}".rstrip())
    return rows


def parse_literal(text: str, kind: type, path: Path, line: int, name: str = "") -> object:
    """A list or dict that was written as JSON or Python text; nothing is executed."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        value = None
    if not isinstance(value, kind):
        what = f"'{name}' holds {text[:40]!r}, which" if name else repr(text[:40])
        raise malformed(path, line, f"{what} is not a {kind.__name__}")
    return value


LARGEST = 1e12
"""No count, weight or value on a scale is larger; beyond it whole numbers lose their digits."""


def parse_number(text: str, path: Path, line: int, name: str, least: float = 0) -> float:
    """A number of at least `least`."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not least <= value <= LARGEST:
        reason = f"'{name}' is {text[:40]!r}, not a number of at least {least:g}"
        raise malformed(path, line, reason)
    return value


def malformed(path: Path, line: int, reason: str) -> ResearchError:
    """The error for one row."""
    return ResearchError(f"{relative(path)}, line {line}: {reason}; correct the row.")
