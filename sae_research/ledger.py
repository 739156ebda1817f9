"""What became of the claims, to read: the verdict table, counts, README's short table, agreement.

A ledger is the list of lines that `claims.record` and `claims.unite` write: one per claim, with its
verdict. Lines of the testbed check the toy models and are counted apart from claims of papers.
"""

from collections import Counter
from typing import TYPE_CHECKING

from sae_research import paths, store
from sae_research.claim_rules import TESTBED

if TYPE_CHECKING:
    import pandas as pd

    from sae_research.stats import Interval

VERDICTS = (
    *("reproduced", "direction only", "confounded"),
    *("undecided", "not reproduced", "not testable here"),
)
"""From the best to the worst; notebook 90 says what each means."""
PUBLISHED = "cpu"
"""The profile whose verdicts are published: `full` has not been run under the present rules."""
GROUNDS = {"world": PUBLISHED, "real": "real", "paper": "gpu"}
"""The profile whose ledger speaks for each ground."""
README = paths.ROOT / "README.md"
VERDICT_PAGE = paths.ROOT / "docs" / "verdicts.md"
HIGHLIGHTS = {
    "opinion_qa.shift.fit": "of the distance is left",
    "opinion_qa.rivals.lora": "WD minus LoRA's",
    "side_effects.predict.stability_over_frequency": "more rank correlation",
    "specialized_saes.term.rare_concepts": "F1 against plain fine-tuning",
    "meta_saes.phi.model": "change of mean phi",
    "safety_subspace.align.features": "of safety rate against random features",
    "real_model.pw_mcc": "mean cosine between seeds",
    "real_model.groups": "per unit of the difference between people",
}
"""The verdicts that README shows, with what their numbers are."""
_GROUND_WORDS = {"world": "toy models", "real": "real model", "paper": "the paper's models"}
_BEGIN, _END = "<!-- verdicts: begin -->", "<!-- verdicts: end -->"


def _show(x: float | str | None) -> str:
    return f"{x:.3g}" if isinstance(x, int | float) else x or ""


def _show_p(p: float | None) -> str:
    return "<0.001" if p is not None and p < 0.001 else _show(p)


def _interval(m: dict) -> str:
    ends = f" [{_show(m['low'])}, {_show(m['high'])}]" if m["low"] is not None else ""
    return _show(m["value"]) + ends


def to_interval(m: dict) -> "Interval":
    """A measurement of a ledger as an interval to draw; a single number has no width."""
    from sae_research.stats import Interval

    low, high = (m["value"] if m[end] is None else m[end] for end in ("low", "high"))
    return Interval(m["value"], low, high, m["n"] or 1)


def _bar_text(wanted: dict) -> str:
    """An expectation in words: `interval above 0.1`."""
    threshold = wanted["threshold"]
    numbers = threshold if isinstance(threshold, list | tuple) else [threshold]
    words = f"{wanted['expect']} {' and '.join(map(_show, numbers))}"
    return f"interval {words}" if wanted["interval"] else words


def rule_text(rule: dict) -> str:
    """A rule in words: `interval above 0.1; clear of its control (shuffled labels)`."""
    control = rule.get("control")
    if not control:
        return _bar_text(rule)
    if control["must"] is None:
        return f"{_bar_text(rule)}; clear of its control ({control['name']})"
    return f"{_bar_text(rule)}; control ({control['name']}): {_bar_text(control['must'])}"


COLUMNS = ("claim", "paper", "measured", "n", "control", "difference", "p", "rule", "verdict", "id")


def table(lines: list[dict]) -> "pd.DataFrame":
    """The verdict table: one row per claim, statement first; p-values are Holm's."""
    import pandas as pd

    rows = []
    for line in lines:
        changed = "".join(f" (until {c['date']}: {c['old']})" for c in line.get("history", []))
        if line.get("planted") and line.get("ground") == "world":
            changed += f" (planted: {line['planted']})"
        inner = {name: line.get(name) for name in ("control", "difference")}
        row = {
            "claim": line["statement"] + changed,
            "paper": _show(line["paper_value"]),
            "measured": _interval(line),
            "n": "" if line["n"] is None else str(line["n"]),
            "p": _show_p(line.get("p")),
            "rule": rule_text(line["rule"]) if "p" in line else "",
            "verdict": line["verdict"],
            "id": line["id"],
        }
        rows.append(row | {name: _interval(m) if m else "" for name, m in inner.items()})
    return pd.DataFrame(rows, columns=list(COLUMNS))


def paper_number(line: dict) -> float | None:
    """The paper's value to draw; None if the paper gives none, or several."""
    try:
        return float(line["paper_value"])
    except ValueError:
        return None


def text(lines: list[dict]) -> str:
    """The verdict table for a terminal: ids in place of statements."""
    columns = ["id", "paper", "measured", "n", "control", "difference", "p", "verdict"]
    return table(lines)[columns].to_string(index=False)


def markdown(lines: list[dict]) -> str:
    """The verdict table for a page."""
    frame = table(lines).replace(r"\|", r"\\|", regex=True)
    return frame.to_markdown(index=False, disable_numparse=True)


def count_verdicts(lines: list[dict]) -> "pd.DataFrame":
    """How many claims of each study have which verdict; the testbed's row comes last."""
    import pandas as pd

    counts = Counter((line["study"], line["verdict"]) for line in lines)
    frame = pd.Series(counts).unstack(fill_value=0)
    frame = frame[[v for v in VERDICTS if v in frame]]
    return frame.sort_index(key=lambda names: [(n == TESTBED, n) for n in names])


def group_families(lines: list[dict]) -> dict[str, list[dict]]:
    """Lines by study and family, in order; those of the testbed by the second part of their id."""
    found: dict[str, list[dict]] = {}
    for line in lines:
        family = line["family"] or line["id"].split(".")[1]
        found.setdefault(f"{line['study']}.{family}", []).append(line)
    return found


def agreement(lines: list[dict], published: list[dict]) -> tuple[int, list[tuple[str, str, str]]]:
    """How many verdicts are the same in two ledgers, and (id, ours, theirs) of the others."""
    theirs = {line["id"]: line["verdict"] for line in published}
    both = [(e["id"], e["verdict"], theirs[e["id"]]) for e in lines if e["id"] in theirs]
    return sum(a == b for _, a, b in both), [line for line in both if line[1] != line[2]]


def read_grounds() -> dict[str, list[dict]]:
    """The published ledger of each ground that has one."""
    from sae_research import claims

    present = {g: p for g, p in GROUNDS.items() if (paths.DATA / p / "claims.json").is_file()}
    return {ground: claims.read(profile) for ground, profile in present.items()}


def compare_grounds(ledgers: dict[str, list[dict]]) -> "pd.DataFrame":
    """What each ground says of a claim: verdict and number side by side; checks are left out."""
    import pandas as pd

    rows: dict[str, dict[str, str]] = {}
    for ground, lines in ledgers.items():
        for line in lines:
            if line["study"] != TESTBED:
                row = rows.setdefault(line["id"], {"claim": line["statement"]})
                row[ground] = " ".join(filter(None, (line["verdict"], _interval(line))))
    return pd.DataFrame(rows.values(), columns=["claim", *ledgers]).fillna("").assign(id=list(rows))


def highlights(lines: list[dict]) -> str:
    """README's table: the main claims on every ground that measured them."""
    import pandas as pd

    rows = [
        {
            "claim": line["statement"],
            "measured": f"{_interval(line)} {words}",
            "minus its control": _interval(line["difference"]) if line["difference"] else "",
            "on": _GROUND_WORDS[line["ground"]],
            "verdict": line["verdict"],
        }
        for i, words in HIGHLIGHTS.items()
        for line in lines
        if line["id"] == i and line["value"] is not None
    ]
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)


def insert_highlights(readme: str, lines: list[dict]) -> str:
    """The README with the verdicts of `lines` between its markers."""
    before, _, rest = readme.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return f"{before}{_BEGIN}\n{highlights(lines)}\n{_END}{after}"


def disagreements(ledgers: dict[str, list[dict]]) -> "pd.DataFrame":
    """The claims that several grounds measured and judged unlike, with what each says."""
    seen: dict[str, set[str]] = {}
    for lines in ledgers.values():
        for line in lines:
            if line["value"] is not None:
                seen.setdefault(line["id"], set()).add(line["verdict"])
    frame = compare_grounds(ledgers)
    return frame[[len(seen.get(i, ())) > 1 for i in frame["id"]]]


def verdict_page(ledgers: dict[str, list[dict]]) -> str:
    """The page that sets the verdicts of all grounds side by side, disagreements first."""
    frame = compare_grounds(ledgers).rename(columns=_GROUND_WORDS)
    unlike = disagreements(ledgers).rename(columns=_GROUND_WORDS)
    words = " and ".join(
        f"{_GROUND_WORDS[ground]} (profile `{GROUNDS[ground]}`)" for ground in ledgers
    )
    parts = [
        "# Verdicts on each ground, side by side",
        "Generated by `python -m sae_research claims --write` from the ledgers of "
        f"{words}. [90_claims](../notebooks/executed/{PUBLISHED}/90_claims.ipynb) says what each "
        "verdict means, [claims.yaml](../claims.yaml) holds rule, control and unit of each claim.",
        "## Where the grounds disagree",
        f"{len(unlike)} claims were measured on several grounds and judged unlike.",
        _page_table(unlike),
        "## All claims",
    ]
    studies = frame["id"].str.split(".").str[0]
    for study in dict.fromkeys(studies):
        parts += [f"### {study}", _page_table(frame[studies == study])]
    return "\n\n".join(parts) + "\n"


def _page_table(frame: "pd.DataFrame") -> str:
    return frame.to_markdown(index=False, disable_numparse=True)


def write_pages() -> None:
    """Bring README's table and docs/verdicts.md in step with the published verdicts."""
    readme = README.read_text(encoding="utf-8")
    store.write_text(README, insert_highlights(readme, read_published()))
    store.write_text(VERDICT_PAGE, verdict_page(read_grounds()))


def read_published() -> list[dict]:
    """The lines of every ground that has a ledger, toy models first."""
    return [line for lines in read_grounds().values() for line in lines]


def summarize(lines: list[dict]) -> str:
    """How the claims came out, in a few sentences of Markdown."""
    tested = [line for line in lines if line["study"] != TESTBED]
    measured = Counter(line["verdict"] for line in tested if line["value"] is not None)
    checks = [line["verdict"] for line in lines if line["study"] == TESTBED]
    said = ", ".join(f"**{n} {verdict}**" for verdict, n in measured.most_common())
    words = [
        f"Of {len(tested)} claims of papers, this profile can test {measured.total()}: {said}.",
        f"{len(tested) - measured.total()} need weights or data that it lacks.",
    ]
    if checks:
        held = checks.count("reproduced")
        words.append(f"{held} of {len(checks)} checks of the toy models hold.")
    failed = [line["statement"] for line in tested if line["verdict"] == "confounded"]
    if failed:
        words.append(f"Explained by its control: {' '.join(failed)}")
    return " ".join(words)


def family_title(name: str, lines: list[dict]) -> str:
    """What a family's figure finds: how many of its claims have which verdict."""
    counts = Counter(line["verdict"] for line in lines)
    return f"{name.replace('.', ', ')}: {', '.join(f'{n} {v}' for v, n in counts.items())}"
