"""English prose in the docstrings of installed libraries, whose code is read and never run."""

import ast
import importlib.util
import inspect
import re
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from tqdm.auto import tqdm

LIBRARIES = {
    "matplotlib": "matplotlib",
    "networkx": "networkx",
    "nltk": "nltk",
    "pandas": "pandas",
    "plotly": "plotly",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "statsmodels": "statsmodels",
    "sympy": "sympy",
    "torch": "torch",
    "transformers": "transformers",
}
"""The package of each library by its import name."""
_LEAST_WORDS = 10


def provenance() -> list[dict[str, str]]:
    """Library, version and licence of every source of the docstrings."""
    rows = []
    for library, package in LIBRARIES.items():
        about = metadata.metadata(package)
        said = [line.split(" :: ")[-1] for line in about.get_all("Classifier") or ()]
        named = [line for line in said if "icense" in line and line != "OSI Approved"]
        licence = about.get("License-Expression") or "; ".join(named) or about.get("License", "")
        rows.append(
            {
                "library": library,
                "version": metadata.version(package).partition("+")[0],
                "licence": licence.splitlines()[0] if licence else "see its files",
            }
        )
    return rows


def find_paragraphs() -> Iterator[tuple[str, str, str]]:
    """Text, library and module file of every prose paragraph of the libraries.

    What differs from an earlier one in names and numbers alone is the same paragraph.
    """
    seen = set()
    files = []
    for library in LIBRARIES:
        root = Path(importlib.util.find_spec(library).origin).parent
        files += [(library, root, path) for path in sorted(root.rglob("*.py"))]
    for library, root, path in tqdm(files, desc="docstrings", leave=False):
        inner = path.relative_to(root)
        if {"tests", "testing", "_vendor"} & set(inner.parts):
            continue
        for docstring in _read_docstrings(path):
            for text in prose(docstring):
                core = " ".join(re.findall(r"\b[a-z]+\b", text))
                if core in seen:
                    continue
                seen.add(core)
                yield text, library, f"{library}/{inner.as_posix()}"


def _read_docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return  # written for a newer Python
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop(0)
        waiting += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
        if isinstance(node, holders) and (found := ast.get_docstring(node)):
            yield found


_MARKUP = (
    (r":[a-zA-Z:]+:`~?([^`<]*?)(?:\s*<[^`]*>)?`", r"\1"),
    (r"`([^`<]*?)\s*<[^`]*>`_+", r"\1"),
    (r"\[([^\]]+)\]\([^)]*\)", r"\1"),
    (r"``?([^`]*)``?_*", r"\1"),
    (r"\s*\[[\w#*-]+\]_", ""),
    (r"\*\*?([^*\s][^*]*)\*\*?", r"\1"),
    (r"\s+", " "),
)
_COMMON = re.compile(
    "an?|and|are|as|at|be|by|can|for|from|has|have|if|in|is|its?|may|not|of|on|or|that|the|their|"
    "then|this|to|used|was|we|when|where|which|will|with|you"
)
_NOT_PROSE = re.compile(r"\.\. |::|[=<>~^*]{2}|[\\{}|^$`]|https?:|--")


def prose(docstring: str) -> Iterator[str]:
    """The paragraphs of a docstring that are English prose: no examples, signatures or tables."""
    for text in _blocks(docstring):
        if len(text) < 4 * _LEAST_WORDS or ">>>" in text:
            continue
        for pattern, plain in _MARKUP:
            text = re.sub(pattern, plain, text)
        if _is_prose(text.strip()):
            yield text.strip()


def _blocks(docstring: str) -> Iterator[str]:
    """Runs of lines of one indentation between blank lines, without underlined headings."""
    block: list[str] = []
    depth = 0
    for line in [*inspect.cleandoc(docstring).splitlines(), ""]:
        here = len(line) - len(line.lstrip())
        if re.fullmatch(r"\s*[-=~^*]{3,}\s*", line):
            block = block[:-1]  # the heading
            line = ""
        if block and (here != depth or not line):
            yield " ".join(block)
            block = []
        if line.strip():
            block.append(line.strip())
        depth = here


def _is_prose(text: str) -> bool:
    words = text.split()
    if len(words) < _LEAST_WORDS or not text[0].isupper() or text[-1] not in ".!?":
        return False
    if _NOT_PROSE.search(text):
        return False
    plain = sum(re.fullmatch(r"[A-Za-z][a-z'-]*[.,;:!?)]*", word) is not None for word in words)
    common = sum(_COMMON.fullmatch(word) is not None for word in words)
    return text.isascii() and plain >= 0.8 * len(words) and common >= 0.15 * len(words)
