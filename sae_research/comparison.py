"""Compare results with those that came with the repository: by bytes, else number by number.

Another processor rounds sums otherwise, so that the last digits of some numbers may differ.
"""

import json
import re

TOLERANCE = 1e-4
SAME = "as committed"
AGREES = f"agrees within {TOLERANCE:g}"
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


def compare(name: str, now: bytes, before: bytes) -> str:
    """`SAME`, `AGREES`, or the first difference in a few words."""
    if now == before:
        return SAME
    if name.endswith(".png"):
        return "another picture"
    try:
        texts = [_readable(name, content) for content in (now, before)]
    except (UnicodeDecodeError, ValueError):
        return "not readable"
    return _compare_text(*texts, printed=name.endswith(".ipynb"))


def _readable(name: str, content: bytes) -> str:
    """The text of a file; of a notebook, sources and outputs without pictures."""
    text = content.decode()
    if not name.endswith(".ipynb"):
        return text
    cells = json.loads(text)["cells"]
    for cell in cells:
        for out in cell.get("outputs", []):
            data = out.get("data", {})
            for kind in [kind for kind in data if kind.startswith("image/")]:
                data[kind] = ""
    return json.dumps(cells, indent=1, sort_keys=True)


def _compare_text(now: str, before: str, printed: bool) -> str:
    words = [_NUMBER.split(text) for text in (now, before)]
    numbers = [_NUMBER.findall(text) for text in (now, before)]
    for ours, theirs in zip(*words, strict=False):
        if ours.split() != theirs.split():
            return _first_difference(ours.split(), theirs.split())
    if len(numbers[0]) != len(numbers[1]):
        return f"{len(numbers[0])} numbers in place of {len(numbers[1])}"
    for ours, theirs in zip(*numbers, strict=True):
        a, b = float(ours), float(theirs)
        # what a notebook prints has few digits, of which rounding may move the last one by a unit
        unit = min(_last_digit(ours), _last_digit(theirs)) if printed else 0.0
        if abs(a - b) > max(TOLERANCE * max(abs(a), abs(b), 1e-2), 1.01 * unit):
            return f"{ours} in place of {theirs}"
    return AGREES


def _last_digit(number: str) -> float:
    """The value of a number's last printed decimal; 0 for a whole number."""
    mantissa, _, exponent = number.lower().partition("e")
    decimals = len(mantissa.partition(".")[2])
    return 10.0 ** (int(exponent or 0) - decimals) if decimals else 0.0


def _first_difference(ours: list[str], theirs: list[str]) -> str:
    """The first words that differ, with a few that follow."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    same = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
    a, b = (" ".join(words[same : same + 5]) or "nothing" for words in (ours, theirs))
    return f"'{a}' in place of '{b}'"
