"""Runs a study: its tasks as resumable shards, then one published folder of tables and facts.

A study is a folder `studies/<study>/` with `settings.py` and `study.py`. The latter offers

- `tasks(profile)`: a list of dicts, one per independent piece of work, such as
  `{"model": "gpt2-small", "seed": 0}`;
- `run(task, profile)`: a pure function from one task to a `Result`;

and, if it needs more, `PHASES`: pairs `(tasks, run)`, each later `tasks` taking the results before
it as a second argument; `summarise(results, profile)`: published results by folder name, in place
of plain concatenation; `data_files(task, profile)`: files outside the repository that a task reads.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_research import catalogue, dependencies, parallel, paths, store

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from sae_research.config import Profile

Task = dict[str, Any]
DIGITS = 6
"""Significant digits of what is published, so that another processor writes the same bytes."""


@dataclass
class Result:
    """What one task, or a whole study, found."""

    tables: "dict[str, pd.DataFrame]" = field(default_factory=dict)
    """Data frames by name."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Single numbers and names."""
    tensors: "dict[str, torch.Tensor]" = field(default_factory=dict)
    """Arrays that later steps need."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Further files by relative path, such as a saved shift that other tools open."""
    task: Task = field(default_factory=dict)
    """The task that it belongs to."""

    def save(self, folder: Path, digits: int | None = None) -> None:
        """Write into an existing folder; `digits` rounds tables and facts to significant digits."""
        facts = self.facts
        form = None
        if digits is not None:
            facts = store.rounded(facts, digits)
            form = f"%.{digits}g"
        for name, table in self.tables.items():
            table = table if digits is None else _without_noise(table)
            store.write_text(folder / f"{name}.csv", table.to_csv(index=False, float_format=form))
        store.write_json(folder / "facts.json", {"task": self.task, "facts": facts})
        if self.tensors:
            store.write_tensors(folder / "tensors.safetensors", self.tensors)
        for name, content in self.files.items():
            store.write_bytes(folder / "files" / name, content)


def load_result(folder: Path) -> Result:
    """A result as `save` wrote it."""
    import pandas as pd

    about = dict(store.read_json(folder / "facts.json"))
    found = Result(facts=about["facts"], task=about["task"])
    for path in sorted(folder.glob("*.csv")):
        found.tables[path.stem] = pd.read_csv(path, float_precision="round_trip")
    if (folder / "tensors.safetensors").is_file():
        found.tensors = store.read_tensors(folder / "tensors.safetensors")
    for path in sorted((folder / "files").rglob("*")):
        if path.is_file():
            name = path.relative_to(folder / "files").as_posix()
            found.files[name] = path.read_bytes()
    return found


def _without_noise(table: "pd.DataFrame") -> "pd.DataFrame":
    """The table with floats that are rounding noise (below 1e-12) set to zero."""
    floats = table.select_dtypes("float")
    return table.assign(
        **{name: column.mask(column.abs() < 1e-12, 0.0) for name, column in floats.items()}
    )


def task_key(run: Callable, task: Task, profile: "Profile", study: str) -> dict:
    """All that a task's result depends on: settings, code, libraries, model, SAEs and data.

    How many tasks run at once is no part of it.
    """
    module = import_module(f"sae_research.studies.{study}.study")
    data = getattr(module, "data_files", lambda task, profile: [])(task, profile)
    model = task.get("model")
    return {
        "task": task,
        "function": run.__name__,
        "settings": asdict(profile.studies[study]),
        "runtime": [profile.runtime.device, profile.runtime.dtype],
        "code": dependencies.code_fingerprint(run.__module__),
        "libraries": dependencies.library_versions(),
        "model": catalogue.get(model).content() if model in catalogue.MODEL_SPECS else model,
        "data": {path.name: store.sha256(path) for path in data},
    }


def _shard(task: Task, run: Callable, profile: "Profile", study: str, scratch: Path) -> Result:
    """One task's result, taken from disk if the same key has been run before."""
    label = "-".join(str(v).replace("/", "_") for v in task.values() if isinstance(v, str | int))
    folder = scratch / f"{run.__name__}-{label}-{store.fingerprint(task)[:8]}"

    def build(part: Path) -> None:
        result = run(task, profile)
        result.task = task
        result.save(part)

    return load_result(store.resumed(folder, task_key(run, task, profile, study), build))


def execute(
    run: Callable[[Task, "Profile"], Result],
    tasks: Sequence[Task],
    profile: "Profile",
    study: str,
    scratch: Path | None = None,
) -> list[Result]:
    """The results of all tasks in order; finished ones survive a kill and a change of `n_jobs`."""
    scratch = scratch or paths.scratch(profile.name, study)
    one = partial(_shard, run=run, profile=profile, study=study, scratch=scratch)
    runtime = profile.runtime
    return parallel.shards(one, tasks, runtime.n_jobs, threads=runtime.threads, desc=study)


def concatenate(results: Sequence[Result]) -> Result:
    """All tables under one another, each row led by its task; facts become a table of their own."""
    import pandas as pd

    names = dict.fromkeys(name for result in results for name in result.tables)
    tables = {}
    for name in names:
        keyed = [_keyed(r.tables[name], r.task) for r in results if name in r.tables]
        tables[name] = pd.concat(keyed, ignore_index=True)
    facts = {"results": [{**r.task, **r.facts} for r in results]}
    return Result(tables, facts)


def _keyed(table: "pd.DataFrame", task: Task) -> "pd.DataFrame":
    keys = {name: value for name, value in task.items() if name not in table}
    return table.assign(**keys)[[*keys, *table.columns]]


def run_study(study: str, profile: "Profile", scratch: Path | None = None) -> dict[str, Result]:
    """Run every task of a study and publish what they add up to; returns it by folder name."""
    module = import_module(f"sae_research.studies.{study}.study")
    results: list[Result] | None = None
    for tasks, run in getattr(module, "PHASES", None) or ((module.tasks, module.run),):
        todo = tasks(profile) if results is None else tasks(profile, results)
        results = execute(run, todo, profile, study, scratch)
    summarise = getattr(module, "summarise", lambda results, profile: {"": concatenate(results)})
    published = summarise(results, profile)
    with store.writing(paths.artefacts(profile.name, study)) as folder:
        for name, result in published.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            result.save(folder / name, DIGITS)
    return read(profile.name, study)


def read(profile: str, study: str) -> dict[str, Result]:
    """The published results of a study by folder name, after their checksums were compared."""
    folder = store.verified(paths.artefacts(profile, study))
    return {
        path.parent.relative_to(folder).as_posix().removeprefix("."): load_result(path.parent)
        for path in sorted(folder.rglob("facts.json"))
        if "files" not in path.relative_to(folder).parts
    }
