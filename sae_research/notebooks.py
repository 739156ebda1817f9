"""Run a notebook with papermill and normalise it, so that two runs give the same bytes."""

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

from sae_research import config, paths, store
from sae_research.errors import ResearchError, unknown

if TYPE_CHECKING:
    from nbformat import NotebookNode

PARAMETERS = 'profile = "{}"'
_ADDRESS = re.compile(r"\b0x[0-9a-f]{6,}\b")
_STYLER = re.compile(r"\bT_[0-9a-f]{5}(?=_|\b)")
_WIDGET = "application/vnd.jupyter.widget-"


def names() -> list[str]:
    """All notebooks, in the order in which they are read and run."""
    return sorted(path.stem for path in paths.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))


def source(name: str) -> Path:
    """The source of a notebook."""
    if name not in names():
        raise unknown("notebook", name, names(), "notebooks")
    return paths.NOTEBOOKS / f"{name}.ipynb"


def stamp(profile: str, name: str) -> Path:
    """The file that proves that a notebook ran here; never committed, so a clone runs all."""
    return paths.DATA / profile / "runs" / f"{name}.json"


def environment(profile: config.Profile, folder: Path) -> dict[str, str]:
    """Environment of the kernel: fixed seeds and threads, no bars, no user configuration."""
    threads = str(profile.runtime.threads)
    return {
        "TQDM_DISABLE": "1",
        # tqdm.auto's widget ignores that; taking the kernel for a console, tqdm draws no widget
        "SPYDER_CONSOLE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONHASHSEED": "0",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "IPYTHONDIR": str(folder / "ipython"),
        paths.ASIDE: str(_aside(folder)),
        "JUPYTER_PREFER_ENV_PATH": "1",
        "JUPYTER_PLATFORM_DIRS": "1",
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        **({} if profile.runtime.hub else {"HF_HUB_OFFLINE": "1"}),
    }


def _aside(folder: Path) -> Path:
    return folder / "aside"


@contextmanager
def hold_lock(lock: Path, what: str, patience: float = 15) -> Iterator[None]:
    """Hold a lock that dies with the process; if another process keeps it, say which."""
    from filelock import FileLock, Timeout

    lock.parent.mkdir(parents=True, exist_ok=True)
    holder = lock.with_suffix(".pid")
    try:
        with FileLock(lock, timeout=patience):
            holder.write_text(str(os.getpid()))
            yield
    except Timeout as error:
        known = f" (process {holder.read_text()})" if holder.exists() else ""
        raise ResearchError(f"{what} is already running{known}; wait for it or stop it.") from error


def _die_with_pipeline() -> None:
    """End this process and its kernel soon after the pipeline that started it was killed."""
    if "DVC_STAGE" not in os.environ:
        return
    import psutil

    me = psutil.Process()
    others = (p for p in me.parents() if "sae_research run" not in " ".join(p.cmdline()))
    pipeline = next(others, None)
    if pipeline is None:
        os._exit(1)

    def watch() -> None:
        while pipeline.is_running() and pipeline.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.5)
        for child in me.children(recursive=True):
            child.kill()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _relative(text: str) -> str:
    """Text without what differs between machines and runs: folders, memory addresses, table ids."""
    for folder, short in ((str(paths.ROOT), ""), (str(Path.home()), "~")):
        if len(folder) > 1:
            text = text.replace(f"{folder}/", f"{short}/".lstrip("/")).replace(folder, short or ".")
    return _STYLER.sub("T_0", _ADDRESS.sub("0x0", text))


def _plain(value: object) -> object:
    """The same at any depth of a cell's output."""
    if isinstance(value, dict):
        return {_relative(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return _relative(value) if isinstance(value, str) else value


def _outputs(outputs: "list[NotebookNode]") -> "list[NotebookNode]":
    """Outputs that two runs share: streams joined; bars, warnings and widgets dropped."""
    kept: list[NotebookNode] = []
    for out in outputs:
        if out.output_type == "stream":
            if out.name == "stderr":
                continue
            if kept and kept[-1].output_type == "stream":
                kept[-1].text += _relative(out.text)
                continue
            out.text = _relative(out.text)
        elif out.output_type in ("display_data", "execute_result"):
            if any(kind.startswith(_WIDGET) for kind in out.data):
                continue
            for kind, shown in out.data.items():
                if not kind.startswith("image/") or kind == "image/svg+xml":
                    out.data[kind] = _plain(shown)
            out.metadata = {}
        elif out.output_type == "error":
            for part in ("ename", "evalue", "traceback"):
                out[part] = _plain(out[part])
        kept.append(out)
    return kept


def cleared(notebook: "NotebookNode") -> "NotebookNode":
    """A notebook source as it is committed: no outputs, no counts, steady ids."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
            cell.execution_count = None
    return _steady(notebook)


def clear() -> list[str]:
    """Clear the sources of all notebooks; returns the names of those that changed."""
    import nbformat

    changed = []
    for name in names():
        before = source(name).read_text(encoding="utf-8")
        after = nbformat.writes(cleared(nbformat.reads(before, as_version=4))) + "\n"
        if after != before:
            store.write_text(source(name), after)
            changed.append(name)
    return changed


def _steady(notebook: "NotebookNode") -> "NotebookNode":
    """Metadata, cell ids and format that do not depend on the tool that saved the notebook."""
    for index, cell in enumerate(notebook.cells):
        tags = [tag for tag in cell.metadata.get("tags", []) if not tag.startswith("papermill")]
        cell.metadata = {"tags": tags} if tags else {}
        cell.id = f"cell-{index:02d}"
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook


def normalised(notebook: "NotebookNode", profile: str) -> "NotebookNode":
    """The executed notebook with everything removed that would differ in a second run."""
    injected = "injected-parameters"
    notebook.cells = [c for c in notebook.cells if injected not in c.metadata.get("tags", [])]
    count = 0
    for cell in _steady(notebook).cells:
        if cell.cell_type != "code":
            continue
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = PARAMETERS.format(profile)
        count += 1
        cell.execution_count = count
        cell.outputs = _outputs(cell.outputs)
        for out in cell.outputs:
            if "execution_count" in out:
                out.execution_count = count
    return notebook


def _execute(name: str, profile: config.Profile, folder: Path) -> "NotebookNode":
    """Execute a notebook into `folder`; on failure the part that ran stays there for reading."""
    import logging

    import papermill
    from traitlets.config import Config

    part = folder / f"{name}.ipynb"
    read = f"what ran is in {paths.relative(part)}."
    logging.getLogger("papermill").setLevel(logging.ERROR)
    form = {"bar_format": "{desc} |{bar}| {n_fmt}/{total_fmt} {elapsed}"}
    bar = {"desc": name, "leave": False, **form} if sys.stderr.isatty() else False
    # no port that others on the machine could reach
    transport = {"transport": "ipc" if os.name == "posix" else "tcp"}
    try:
        return papermill.execute_notebook(
            str(source(name)),
            str(part),
            parameters={"profile": profile.name},
            kernel_name="python3",
            progress_bar=bar,
            cwd=str(paths.NOTEBOOKS),
            extra_arguments=["--log-level=CRITICAL"],
            config=Config(KernelManager=transport),
        )
    except papermill.PapermillExecutionError as error:
        fault = error.evalue if error.ename == "ResearchError" else f"{error.ename}: {error.evalue}"
        said = f"failed in cell [{error.exec_count}]: {fault.strip()}"
        raise ResearchError(f"notebook {name} {said} ({read})") from error
    except RuntimeError as error:
        if "died" not in str(error):  # while it ran, or before it answered at all
            raise
        raise ResearchError(
            f"the kernel of notebook {name} died, most likely for want of memory; close other "
            f"programs and run again ({read})"
        ) from error


def is_left_out(name: str, profile: config.Profile) -> bool:
    """Whether the notebook belongs to a study, or to toy models, that the profile is without."""
    match = re.fullmatch(r"\d\d_(.+)_(run|results)", name)
    if match is None:
        return name.startswith("00") and not profile.world.seeds
    return not getattr(profile.studies[match[1]], "models", True)


def _leave_out(name: str, profile: str, outputs: list[Path]) -> "NotebookNode":
    """Empty outputs, and in place of the executed notebook a page that says so."""
    from nbformat import v4

    for out in outputs:
        if out.suffix == ".json":
            store.write_json(out, [])
        elif not out.suffix:
            with store.writing(out) as folder:
                (folder / "README.md").write_text(f"Not part of the profile `{profile}`.\n")
    words = f"# {name}\n\nThe profile `{profile}` has no model for it: nothing was run."
    return _steady(v4.new_notebook(cells=[v4.new_markdown_cell(words)]))


def run(name: str, profile: str) -> Path:
    """Execute one notebook of a profile, publish its normalised copy and stamp what it wrote."""
    import nbformat

    settings = config.load(profile)
    source(name)
    from sae_research.stages import read_outputs

    declared = read_outputs(profile).get(name)
    if declared is None:
        raise ResearchError(
            f"notebook {name} has no stage in dvc.yaml; "
            "run `python -m sae_research stages --write`."
        )
    scratch = paths.scratch(profile, name)
    published = paths.executed(profile) / f"{name}.ipynb"
    own = [stamp(profile, name), published]
    _die_with_pipeline()
    started = time.monotonic()
    with hold_lock(scratch.with_name(f"{name}.lock"), f"notebook {name} ({profile})"):
        scratch.mkdir(parents=True, exist_ok=True)
        if is_left_out(name, settings):
            notebook = _leave_out(name, profile, [o for o in declared if o not in own])
        else:
            shutil.rmtree(_aside(scratch), ignore_errors=True)
            with patch.dict(os.environ, environment(settings, scratch)):
                notebook = normalised(_execute(name, settings, scratch), profile)
            results = [o for o in declared if o not in own and o.name != "artefacts"]
            _publish(name, results, _aside(scratch))
        store.write_text(published, nbformat.writes(notebook) + "\n")
        _stamp(profile, name, [out for out in declared if out != own[0]])
        shutil.rmtree(scratch, ignore_errors=True)
        study = re.fullmatch(r"\d\d_(.+)_run", name)
        if study:  # its shards are published now
            shutil.rmtree(paths.scratch(profile, study[1]), ignore_errors=True)
    place = f"[{names().index(name) + 1}/{len(names())}]"
    print(f"{place} {name} ({profile}): {time.monotonic() - started:.0f} s", flush=True)
    return published


def _publish(name: str, results: list[Path], aside: Path) -> None:
    """Put what a notebook wrote aside in place, once all of it is there."""
    written = [aside / out.relative_to(paths.ROOT) for out in results]
    for out, new in zip(results, written, strict=True):
        if not new.exists():
            raise _undelivered(name, out)
    for out, new in zip(results, written, strict=True):
        store.install(new, out)


def _undelivered(name: str, out: Path) -> ResearchError:
    return ResearchError(
        f"notebook {name} did not write {paths.relative(out)}, which its stage declares."
    )


def validate(profile: str) -> int:
    """Run the executed notebooks again (nbval), compare every output; pytest's exit code."""
    settings = config.load(profile)
    if not any(paths.executed(profile).glob("*.ipynb")):
        raise ResearchError(
            f"no executed notebooks of '{profile}'; run `make reproduce PROFILE={profile}` first."
        )
    scratch = paths.scratch(profile, "validate")
    words = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", "--nbval", "--nbval-current-env"]
    words += ["--nbval-sanitize-with", "tests/nbval_sanitize.cfg"]
    command = [sys.executable, "-m", "pytest", *words, paths.relative(paths.executed(profile))]
    env = {**os.environ, **environment(settings, scratch)}
    done = subprocess.run(command, cwd=paths.ROOT, env=env, check=False)
    shutil.rmtree(scratch, ignore_errors=True)
    return done.returncode


def _stamp(profile: str, name: str, outputs: list[Path]) -> None:
    """Write the checksum of every output, after making sure that all of them are there."""
    for out in outputs:
        if not out.exists():
            raise _undelivered(name, out)
    found = [f for out in outputs for f in (out.rglob("*") if out.is_dir() else [out])]
    sums = {paths.relative(f): store.sha256(f) for f in found if f.is_file()}
    store.write_json(stamp(profile, name), sums)
