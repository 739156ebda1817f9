"""Tables for the terminal."""

import textwrap
from collections.abc import Sequence


def aligned(
    rows: Sequence[Sequence[str]], *, header: bool = True, widest: int | None = None
) -> str:
    """Columns side by side; cells longer than `widest` go on in further lines. The first row may be the header."""
    folded = [
        [(textwrap.wrap(cell, widest) if widest else [cell]) or [""] for cell in row]
        for row in rows
    ]
    widths = [max(len(part) for row in folded for part in row[i]) for i in range(len(rows[0]))]
    lines = []
    for number, row in enumerate(folded):
        for level in range(max(map(len, row))):
            cells = [cell[level] if level < len(cell) else "" for cell in row]
            lines.append(
                "  ".join(
                    cell.ljust(width) for cell, width in zip(cells, widths, strict=True)
                ).rstrip()
            )
        if header and number == 0:
            lines.append("  ".join("-" * width for width in widths))
    return "\n".join(lines)
