"""What became of the claims, to read: the verdict table, distances to the bars, agreement of two ledgers.

A ledger is the list of lines that `claims.record` and `claims.union` write: one a claim, with its verdict.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from sae_research.stats import Interval


def _show(x: float | None) -> str:
    return "" if x is None else f"{x:.3g}"


def _interval(m: dict) -> str:
    return _show(m["value"]) + (
        f" [{_show(m['low'])}, {_show(m['high'])}]" if m["low"] is not None else ""
    )


def rule_text(rule: dict) -> str:
    """A rule in words: `interval above 0.1; control (shuffled labels): below 0.6`."""
    bar = rule["threshold"]
    words = f"{rule['expect']} {_show(bar) if not isinstance(bar, list | tuple) else ' and '.join(map(_show, bar))}"
    words = f"interval {words}" if rule["interval"] else words
    control = rule.get("control")
    return f"{words}; control ({control['name']}): {rule_text(control)}" if control else words


def table(lines: list[dict]) -> "pd.DataFrame":
    """The verdict table: one row a claim."""
    import pandas as pd

    rows = [
        {
            "claim": e["id"],
            "paper": e["paper_value"]
            if isinstance(e["paper_value"], str)
            else _show(e["paper_value"]),
            "measured": _interval(e),
            "n": "" if e["n"] is None else str(e["n"]),
            "control": _interval(e["control"]) if e["control"] else "",
            "rule": rule_text(e["rule"]),
            "verdict": e["verdict"],
        }
        for e in lines
    ]
    return pd.DataFrame(
        rows, columns=["claim", "paper", "measured", "n", "control", "rule", "verdict"]
    )


def text(lines: list[dict]) -> str:
    """The verdict table for a terminal."""
    return table(lines).drop(columns="rule").to_string(index=False)


def markdown(lines: list[dict]) -> str:
    """The verdict table for a page."""
    frame = table(lines)
    rows = [frame.columns, ["---"] * frame.shape[1], *frame.itertuples(index=False)]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows
    )


def margins(lines: list[dict], reach: float = 2.0) -> "list[Interval]":
    """How far each number lies past its bar (above 0: where it is expected), in units of the bar, cut at `reach`."""
    from sae_research.stats import Interval

    def margin(x: float, rule: dict) -> float:
        bar = rule["threshold"]
        if rule["expect"] == "between":
            middle, half = (bar[0] + bar[1]) / 2, (bar[1] - bar[0]) / 2 or 1
            past = 1 - abs(x - middle) / half
        else:
            past = (
                (x - bar) / (abs(bar) or 1) * (1 if rule["expect"] in ("above", "at least") else -1)
            )
        return max(-reach, min(reach, past))

    found = []
    for line in lines:
        points = [
            margin(x, line["rule"])
            for x in (line["value"], line["low"], line["high"])
            if x is not None
        ]
        found.append(Interval(points[0], min(points), max(points), line["n"] or 1))
    return found


def agreement(lines: list[dict], published: list[dict]) -> tuple[int, list[tuple[str, str, str]]]:
    """How many verdicts are the same in two ledgers, and (id, ours, theirs) of those that differ."""
    theirs = {e["id"]: e["verdict"] for e in published}
    both = [(e["id"], e["verdict"], theirs[e["id"]]) for e in lines if e["id"] in theirs]
    return sum(a == b for _, a, b in both), [line for line in both if line[1] != line[2]]
