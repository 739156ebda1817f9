"""Forests of claims: one figure per family, each claim in the unit of its own measure."""

import re
import textwrap
from typing import TYPE_CHECKING

from sae_research import claims, figures, ledger

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROW = 0.62
"""Inches that one claim takes."""


def group_panels(lines: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """Measured lines by what they measure and where its bar lies: one panel each."""
    measures = _measures()
    found: dict[tuple[str, str], list[dict]] = {}
    for line in lines:
        if line["value"] is not None:
            quantity = re.split("[,;]", measures[line["id"]])[0]
            bar = ledger.rule_text({**line["rule"], "control": None, "interval": False})
            found.setdefault((quantity, bar), []).append(line)
    return found


def _measures() -> dict[str, str]:
    """What each claim measures, without what its interval covers."""
    return {i: claim.measure.partition(";")[0] for i, claim in claims.load_claims().items()}


def draw_family(lines: list[dict], title: str) -> "Figure | None":
    """The measured claims of one family; None if this profile can test none of them."""
    import numpy as np

    panels = group_panels(lines)
    if not panels:
        return None
    measures = _measures()
    sizes = [len(own) for own in panels.values()]
    height = 1.2 + _ROW * sum(sizes) + 0.55 * len(sizes)
    figure, axes = figures.canvas(title, height=height, rows=len(sizes))
    grid = np.atleast_1d(axes)
    # the label of an axis and its ticks take as much room as one more claim
    grid[0].get_gridspec().set_height_ratios([size + 0.4 for size in sizes])
    for panel, ((quantity, bar), own) in zip(grid, panels.items(), strict=True):
        figures.forest(
            panel,
            [textwrap.fill(line["statement"], 46) for line in own],
            [ledger.to_interval(line) for line in own],
            verdicts=[line["verdict"] for line in own],
            controls=[ledger.to_interval(c) if (c := line["control"]) else None for line in own],
            published=[ledger.paper_number(line) for line in own],
        )
        threshold = own[0]["rule"]["threshold"]
        for number in threshold if isinstance(threshold, list | tuple) else [threshold]:
            panel.axvline(number, color=figures.GREY, linestyle="--", linewidth=1.2)
        shared = f"{quantity}, as each claim compares it"
        measure = measures[own[0]["id"]] if len(own) == 1 else shared
        panel.set_xlabel(textwrap.fill(f"{measure} (claimed: {bar})", 62), fontsize=8)
        panel.tick_params(labelsize=8)
        panel.locator_params(axis="x", nbins=5)
    return figure
