"""What each profile scales down: its settings beside the papers' values, for the terminal and for the README."""

import ast
import inspect
import textwrap
from dataclasses import fields, is_dataclass

from sae_research import config, store
from sae_research.errors import ResearchError
from sae_research.paths import ROOT
from sae_research.tables import aligned

README = ROOT / "README.md"
PUBLISHED = ("cpu", "full")
_BEGIN, _END = "<!-- scaled down: begin -->", "<!-- scaled down: end -->"


def explanations(cls: type) -> dict[str, str]:
    """The sentence under each field of a settings class."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    found = {}
    for line, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(line, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            found[line.target.id] = str(after.value.value)
    return found


def departures(profiles: tuple[str, ...]) -> list[dict]:
    """Every setting in which one of `profiles` departs from the papers: block, setting, meaning, paper and profiles."""
    loaded = {name: config.load(name) for name in profiles}
    rows = []
    for f in fields(config.Profile):
        if f.name == "name":
            continue
        rows += _compare(f.name, "", config.default_of(config.Profile, f.name), _blocks(loaded, f.name))
    return rows


def text(profiles: tuple[str, ...] | None = None) -> str:
    """Every profile's settings against the papers' values, as a table for the terminal."""
    rows = departures(profiles or config.profiles())
    if not rows:
        return "No profile departs."
    return aligned(_table(rows, profiles or config.profiles(), meaning=False), widest=26)


def markdown(profiles: tuple[str, ...] = PUBLISHED) -> str:
    """The table of what the published profiles scale down."""
    head, *lines = _table(departures(profiles), profiles, meaning=True)
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in (head, ["---"] * len(head), *lines)]
    return "\n".join("| " + " | ".join(line) + " |" for line in escaped)


def refreshed(readme: str) -> str:
    """The text of the README with the table between its two markers made anew."""
    before, begin, rest = readme.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not (begin and end):
        raise ResearchError(f"README.md must hold the lines '{_BEGIN}' and '{_END}'; put them where the table belongs.")
    return f"{before}{_BEGIN}\n{markdown()}\n{_END}{after}"


def refresh() -> None:
    """Bring the table in the README in step with `params.yaml` and the papers' values."""
    store.write_text(README, refreshed(README.read_text()))


def _blocks(loaded: dict, name: str) -> dict:
    return {profile: getattr(block, name) for profile, block in loaded.items()}


def _compare(block: str, prefix: str, paper: object, given: dict) -> list[dict]:
    rows, meanings = [], explanations(type(paper))
    for f in fields(paper):
        value, values = getattr(paper, f.name), _blocks(given, f.name)
        if is_dataclass(value) and all(is_dataclass(v) for v in values.values()):
            rows += _compare(block, f"{prefix}{f.name}.", value, values)
        elif any(v != value for v in values.values()):
            meaning = " ".join(meanings.get(f.name, "").split())
            rows.append(
                {"block": block, "setting": prefix + f.name, "meaning": meaning, "paper": value, "profiles": values}
            )
    return rows


def _table(rows: list[dict], profiles: tuple[str, ...], meaning: bool) -> list[list[str]]:
    head = ["study", "setting", *(["what it is"] if meaning else []), "paper or default", *profiles]
    lines = [head]
    for row in rows:
        shown = [_show(row["paper"])]
        shown += ["=" if row["profiles"][p] == row["paper"] else _show(row["profiles"][p]) for p in profiles]
        lines.append([row["block"], row["setting"], *([row["meaning"]] if meaning else []), *shown])
    return lines


def _show(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, tuple | list):
        return ", ".join(map(_show, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_show(item)}" for key, item in value.items()) or "none"
    if is_dataclass(value):
        return ", ".join(f"{f.name} {_show(getattr(value, f.name))}" for f in fields(value))
    return "none" if value is None else str(value)
