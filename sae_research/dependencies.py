"""Which files of the package some code rests on, read from its imports and never listed by hand.

Resume keys (`studies/runner.py`) and the stages of `dvc.yaml` (`python -m sae_research stages`)
both come from here, so that no result outlives a change of the code that made it.
"""

import ast
import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

from sae_research.paths import ROOT

PACKAGE = ROOT / "sae_research"
PINS = ROOT / "uv.lock"
# What every notebook runs on without being a result of it: a change here reruns no study. Settings
# reach stages and keys by value.
PLUMBING = {
    "sae_research/__init__.py",
    "sae_research/errors.py",
    "sae_research/paths.py",
    "sae_research/store.py",
    "sae_research/config.py",
    "sae_research/notebooks.py",
    "sae_research/pipeline.py",
    "sae_research/dependencies.py",
    "sae_research/parallel.py",
    "sae_research/stages.py",
    "sae_research/comparison.py",
    "sae_research/settings_page.py",
}
LIBRARIES = ("torch", "transformers", "transformer-lens", "sae-lens", "peft", "numpy", "scipy")


def relative(path: Path) -> str:
    """A path as `dvc.yaml` names it."""
    return path.relative_to(ROOT).as_posix()


def module_files(name: str) -> Iterator[Path]:
    """The files behind a dotted name; a package whose `__init__` only documents leaves no trace."""
    path = ROOT / name.replace(".", "/")
    if path.with_suffix(".py").is_file():
        yield path.with_suffix(".py")
    elif (path / "__init__.py").is_file() and len(_tree(path / "__init__.py").body) > 1:
        yield path / "__init__.py"


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_files(tree: ast.AST) -> Iterator[Path]:
    """Files that code imports, inside functions too, but not for type checking alone."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.partition(".")[0] == PACKAGE.name:
                yield from module_files(name)


def source_files(trees: Iterable[ast.AST]) -> set[Path]:
    """All files of the package that code rests on, directly or not, without the plumbing."""
    found: set[Path] = set()
    waiting = [path for tree in trees for path in imported_files(tree)]
    while waiting:
        path = waiting.pop()
        if path in found or relative(path) in PLUMBING:
            continue
        found.add(path)
        waiting += imported_files(_tree(path))
    return found


def code_fingerprint(module: str) -> str:
    """A hash of a module and of everything in the package that it rests on."""
    tree = ast.parse(f"import {module}")
    digest = hashlib.sha256()
    for path in sorted(source_files([tree])):
        digest.update(relative(path).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def library_versions() -> dict[str, str]:
    """Installed versions of the libraries that set the numbers."""
    return {name: metadata.version(name) for name in LIBRARIES}


def notebook_code(path: Path) -> list[ast.Module]:
    """The code cells of a notebook."""
    import nbformat

    cells = nbformat.read(path, as_version=4).cells
    return [ast.parse(cell.source) for cell in cells if cell.cell_type == "code"]
