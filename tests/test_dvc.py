"""dvc.yaml says what is true: every notebook has a stage, and every stage names the files that it
uses.
"""

import ast
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

from sae_research import claims, config, dependencies, notebooks, paths, stages

STAGES = yaml.safe_load((paths.ROOT / "dvc.yaml").read_text())["stages"]
PACKAGE = paths.ROOT / "sae_research"


def flat(listed):
    return [item if isinstance(item, str) else next(iter(item)) for item in listed]


def modules(name):
    """Files of the package behind a dotted name; packages whose __init__ is only a docstring leave
    no trace.
    """
    path = PACKAGE.parent / name.replace(".", "/")
    if path.with_suffix(".py").is_file():
        yield path.with_suffix(".py")
    elif (path / "__init__.py").is_file() and len(
        ast.parse((path / "__init__.py").read_text()).body
    ) > 1:
        yield path / "__init__.py"


def imported(tree):
    """Files of the package that some code imports, inside functions too, but not for type checking
    alone.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.split(".")[0] == "sae_research":
                yield from modules(name)


def used(trees):
    """All package files that code rests on, as dvc.yaml names them, the plumbing left out."""
    found, left = set(), [p for tree in trees for p in imported(tree)]
    while left:
        path = left.pop()
        if path in found or path.relative_to(paths.ROOT).as_posix() in dependencies.PLUMBING:
            continue
        found.add(path)
        left += imported(ast.parse(path.read_text()))
    return {path.relative_to(paths.ROOT).as_posix() for path in found}


def code(name):
    cells = nbformat.read(notebooks.source(name), as_version=4).cells
    return [ast.parse(c.source) for c in cells if c.cell_type == "code"]


def package_deps(name):
    return {dep for dep in flat(STAGES[name]["deps"]) if dep.startswith("sae_research")}


def test_the_file_is_in_step_with_the_notebooks_and_the_imports():
    assert (paths.ROOT / "dvc.yaml").read_text(encoding="utf-8") == stages.text(), (
        "run `python -m sae_research stages --write`"
    )


def missing_from(name, wanted):
    """Files that no dependency of a stage covers, as a file or by its folder."""
    deps = package_deps(name)
    return {file for file in wanted if not {file, *(str(p) for p in Path(file).parents)} & deps}


def test_every_notebook_has_a_stage_and_every_stage_a_notebook():
    assert set(STAGES) - {"world", "settings"} == set(notebooks.names())


def test_settings_depend_on_what_they_inherit():
    deps = STAGES["settings"]["deps"]
    assert {f"sae_research/studies/{s}/settings.py" for s in config.study_names()} < set(deps)
    assert {"sae_research/config.py", "sae_research/screening/settings.py"} < set(deps)


@pytest.mark.parametrize("name", notebooks.names())
def test_a_notebook_stage_has_the_common_form(name):
    stage = STAGES[name]
    assert stage["cmd"] == f"python -m sae_research run {name} --profile ${{profile}}"
    assert f"notebooks/{name}.ipynb" in stage["deps"]
    assert f"data/${{profile}}/runs/{name}.json" in stage["outs"]
    kept = {"cache": False, "persist": True}  # DVC would remove it before the stage runs
    assert {f"notebooks/executed/${{profile}}/{name}.ipynb": kept} in stage["outs"]
    for out in [*stage["outs"], *stage.get("metrics", [])]:
        path = out if isinstance(out, str) else next(iter(out))
        cached = isinstance(out, str)
        assert cached or out[path] == kept
        assert cached == ("/runs/" in path or path.endswith("/artefacts")), f"{name}: {path}"


@pytest.mark.parametrize("name", notebooks.names())
def test_a_stage_depends_on_the_package_files_that_its_notebook_uses(name):
    trees = code(name)
    if name.endswith("_run"):
        trees.append(ast.parse(f"import sae_research.studies.{name[3:-4]}.study"))
    assert missing_from(name, used(trees)) == set()
    assert "uv.lock" in STAGES[name]["deps"]


def test_the_world_depends_on_all_that_sets_its_bytes():
    wanted = used([ast.parse("import sae_research.world.build")])
    assert {"sae_research/models.py", "sae_research/saes.py", "sae_research/training.py"} <= wanted
    assert missing_from("world", wanted) == set()
    assert "uv.lock" in STAGES["world"]["deps"]


def test_a_folder_stands_only_for_files_that_are_all_needed():
    folder = paths.ROOT / "sae_research" / "world"
    files = {p for p in folder.rglob("*.py") if p.name != "__init__.py"}
    assert stages.list_dependencies(files) == ["sae_research/world"]
    few = files - {folder / "checks.py"}
    listed = stages.list_dependencies(few)
    assert "sae_research/world" not in listed
    assert {"sae_research/world/survey", "sae_research/world/text"} <= set(listed)


@pytest.mark.parametrize("name", notebooks.names())
def test_a_stage_depends_on_the_settings_and_claims_that_its_notebook_uses(name):
    params = {
        file: keys
        for p in STAGES[name].get("params", [])
        if isinstance(p, dict)
        for file, keys in p.items()
    }
    text = "\n".join(ast.unparse(tree) for tree in code(name))
    settings = params.get("data/${profile}/settings.json", [])
    if "config.load" in text:
        assert settings, (
            f"{name} loads settings: it needs params of data/${{profile}}/settings.json"
        )
        for block in ("runtime", *config.study_names()):
            if f".{block}" in text:
                assert block in settings, f"{name} uses the settings of {block}"
    for out in flat(STAGES[name]["outs"]):
        if out.endswith("/claims.json") and out.count("/") == 3:
            assert out.split("/")[2] in params.get("claims.yaml", []), (
                f"{name} judges claims: it needs params of them"
            )


def test_ledgers_come_together_in_the_last_notebook():
    outs = {out for stage in STAGES.values() for out in flat(stage["outs"])}
    ledgers = {out for out in outs if out.endswith("/claims.json") and out.count("/") == 3}
    assert ledgers == {dep for dep in STAGES["90_claims"]["deps"] if dep.endswith("claims.json")}
    assert {ledger.split("/")[2] for ledger in ledgers} <= {
        c.study for c in claims.load_claims().values()
    }


def test_dependencies_exist():
    outs = {
        o for stage in STAGES.values() for o in flat([*stage["outs"], *stage.get("metrics", [])])
    }
    for name, stage in STAGES.items():
        for dep in flat(stage["deps"]):
            assert dep in outs or (paths.ROOT / dep).exists(), (
                f"{name} depends on {dep}, which does not exist"
            )


def test_the_committed_lock_matches_the_code():
    words = [sys.executable, "-m", "dvc", "repro", "--allow-missing", "--dry"]
    done = subprocess.run(words, cwd=paths.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Running stage" not in done.stdout, (
        f"results are older than the code, run `make reproduce`:\n{done.stdout}"
    )
