"""The one exception that is meant for the reader of a notebook or a terminal."""

import difflib
import re
from collections.abc import Iterable


class ResearchError(Exception):
    """One sentence that says what is wrong and what to do; the command line prints it."""

    def __str__(self) -> str:
        """On one line, and without the middle of what a damaged file put into it."""
        said = re.sub(r"\s*\n\s*", " ", super().__str__())
        return said if len(said) <= 1000 else f"{said[:700]} ... {said[-250:]}"


def unknown(kind: str, given: str, valid: Iterable[str], where: str) -> ResearchError:
    """The error for a name that does not exist: it offers the nearest valid one."""
    valid = sorted(valid)
    near = difflib.get_close_matches(given, valid, n=1, cutoff=0.4)
    hint = f"did you mean '{near[0]}'?" if near else f"valid: {', '.join(valid) or 'none'}."
    return ResearchError(f"unknown {kind} '{given}' in {where}; {hint}")
