"""Importing the package is cheap: what is heavy is imported where it is used."""

import subprocess
import sys

from sae_research import paths

HEAVY = (
    "torch",
    "transformers",
    "transformer_lens",
    "sae_lens",
    "sklearn",
    "matplotlib",
    "pandas",
    "scipy",
    "peft",
)
MODULES = (
    *("paths", "config", "errors", "store", "stats", "figures", "claims", "ledger", "notebooks"),
    *("parallel", "doctor", "machine", "settings_page", "catalogue", "pipeline", "stages"),
    *("comparison", "dependencies", "hub", "surveys.files"),
)
EVERY = [
    ".".join(path.relative_to(paths.ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((paths.ROOT / "sae_research").rglob("*.py"))
    if path.name != "__main__.py"
]


def imported_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_light_modules_import_nothing_heavy():
    """Each is imported as if it were the first of the package, all in one process."""
    code = f"""
import importlib, sys
for module in {MODULES!r}:
    for name in [n for n in sys.modules if n.partition(".")[0] == "sae_research"]:
        del sys.modules[name]
    importlib.import_module("sae_research." + module)
    for name in {HEAVY!r}:
        if name in sys.modules:
            sys.exit(f"sae_research.{{module}} imports {{name}}")
print("none")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "none", done.stderr[-2000:]


def processor_seconds(statement: str) -> float:
    """The least of three tries; other work on the machine does not count."""
    code = f"import time; t = time.process_time(); {statement}; print(time.process_time() - t)"
    command = [sys.executable, "-c", code]
    done = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(3)]
    return min(float(each.stdout) for each in done)


def test_the_package_imports_in_a_moment():
    assert processor_seconds("import sae_research") < 0.3
    assert not imported_by("import sae_research") & set(HEAVY)


def test_all_light_modules_together_import_in_a_moment():
    names = ", ".join(f"sae_research.{name}" for name in MODULES)
    assert processor_seconds(f"import {names}") < 1  # a heavy library alone takes more


def test_the_measure_sees_a_heavy_import():
    assert {"scipy", "numpy"} <= imported_by("import scipy.stats")


def test_every_module_imports_where_unix_only_modules_are_missing():
    """Windows has neither `fcntl` nor `resource`."""
    code = """
import builtins, importlib
real = builtins.__import__

def guarded(name, globals=None, *rest, **named):
    ours = (globals or {}).get("__name__", "").startswith("sae_research")
    if ours and name in ("fcntl", "resource", "pwd", "grp", "termios"):
        raise ModuleNotFoundError(name)
    return real(name, globals, *rest, **named)

builtins.__import__ = guarded
"""
    code += f"for name in {EVERY!r}: importlib.import_module(name)\nprint('all')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "all", done.stderr[-2000:]
