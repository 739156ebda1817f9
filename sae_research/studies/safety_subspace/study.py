"""Study 5 for the runner: planted worlds, the alignment of models, the judge of free text."""

from dataclasses import replace
from pathlib import Path

import pandas as pd

from sae_research import catalogue, judge, paths, real_saes
from sae_research.config import Profile
from sae_research.studies.runner import Result, Task
from sae_research.studies.safety_subspace import real, theory
from sae_research.studies.safety_subspace.alignment import Alignment
from sae_research.studies.safety_subspace.settings import Settings

TAUS = (0.8, 0.9, 0.95, 1.0)
_XSTEST = paths.DATA / "private" / "xstest"


def tasks(profile: Profile) -> list[Task]:
    """A task for each seed of a toy model's alignment, for each seed and method of a real one's,
    for each planted world, and one for the judge.
    """
    settings = profile.safety_subspace
    usable = [
        name
        for name in settings.models
        if catalogue.get(name).embedded or name in real_saes.RECIPES
    ]
    found: list[Task] = []
    first = settings.pilot_seeds
    for seed in range(first, first + settings.seeds if usable else first):
        task = {"part": "alignment", "model": usable[seed % len(usable)], "seed": seed}
        toy = catalogue.get(task["model"]).embedded
        found += [task] if toy else [{**task, "method": m} for m in settings.methods]
    found += [{"part": "theory", "seed": s} for s in range(settings.theory.seeds)]
    judged = settings.judge and _XSTEST.is_dir()
    return [*found, {"part": "judge"}] if judged else found


def data_files(task: Task, profile: Profile) -> list[Path]:
    """The reader's labelled completions, for the judge, and own pairs, for alignment."""
    if task["part"] == "judge":
        return sorted(_XSTEST.glob("completions_*.csv"))
    own = Path(profile.safety_subspace.pairs_file).expanduser()
    return [own] if task["part"] == "alignment" and own.is_file() else []


def run(task: Task, profile: Profile) -> Result:
    """One part with one seed."""
    settings = profile.safety_subspace
    if task["part"] == "judge":
        agreement = judge.measure_agreement(judge.read_completions(_XSTEST))
        return Result({"agreement": agreement}, {"judge": judge.choose_judge(agreement)})
    if task["part"] == "theory":
        return _recover(task["seed"], settings)
    if "method" in task:
        return real.compare(task["model"], task["seed"], settings, task["method"])
    return Alignment(task["model"], task["seed"], settings).run()


def _recover(seed: int, settings: Settings) -> Result:
    sizes = settings.theory
    worlds = [theory.SMALL, *([replace(theory.SMALL, loud=3.0)] if sizes.loud else [])]
    trained = [
        row for world in worlds for row in theory.trained_sae(world, seed, sizes.sae_steps, TAUS)
    ]
    rows = theory.sweep(range(seed, seed + 1), sizes.samples)
    return Result({"recovery": pd.DataFrame(rows), "trained_sae": pd.DataFrame(trained)})
