"""A subject from end to end: one shard a seed, kept on disk, and the tables that they add up to."""

import shutil
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from sae_research import catalogue, parallel, store
from sae_research.config import Profile
from sae_research.studies.opinion_qa import evaluate, laboratory, meaning, report, rivals, study
from sae_research.studies.opinion_qa.batch import Part, Tables, run
from sae_research.studies.opinion_qa.bench import Cost
from sae_research.studies.opinion_qa.laboratory import Laboratory
from sae_research.studies.opinion_qa.settings import ShiftTraining
from sae_research.studies.opinion_qa.shift import Shift, load_shift, save_shift
from sae_research.studies.opinion_qa.study import Choice, Outcome, Plan
from sae_research.surveys.files import writable

# shards on disk


def save(part: Part, folder: Path, lab: Laboratory) -> None:
    """Write a part: answers and shift as safetensors, the rest as JSON and CSV."""
    written = [f.name for f in fields(Outcome) if f.name not in {"answers", "cost", "fit"}]
    rows = [
        {n: getattr(o, n) for n in written} | {"loss": o.cost.loss, "divergence": o.cost.divergence}
        for o in part.outcomes
    ]
    store.write_json(folder / "outcomes.json", {"seed": part.seed, "rows": rows})
    store.write_tensors(
        folder / "answers.safetensors", {o.name: torch.tensor(o.answers) for o in part.outcomes}
    )
    for name, table in part.tables.items():
        store.write_text(folder / f"{name}.csv", table.to_csv(index=False))
    fits = {"model": lab.bench.lens.name, "sae": lab.settings.sae, "rows": lab.sae.rows}
    save_shift(part.shift, folder / "shift", **fits, cards=cards(part.shift, lab))


def cards(shift: Shift, lab: Laboratory, top: int = 5) -> dict[str, dict]:
    """What to know of each group's shift: scores on the shared axes, distance before and after, its main latents."""
    bench, exam = lab.bench, lab.exam
    answers = bench.answers(
        lab.sae, shift.kind, shift.deltas, exam.questions, shift.positions
    ).probabilities
    before, after = (
        exam.distance(p, exam.truth).mean(1)
        for p in (bench.unsteered(exam.questions).probabilities, answers)
    )
    latents = meaning.main_latents(bench, lab.sae, shift, top)
    return {
        name: {
            "scores": [round(x, 6) for x in shift.scores[g].tolist()],
            "latents_moved": int((shift.deltas[g] != 0).sum()),
            "wd_before": round(float(before[g]), 5),
            "wd_after": round(float(after[g]), 5),
            "main_latents": latents[g],
        }
        for g, name in enumerate(shift.groups)
    }


def load(folder: Path) -> Part:
    """A part as `save` wrote it."""
    book = store.read_json(folder / "outcomes.json")
    answers = store.read_tensors(folder / "answers.safetensors")
    outcomes = []
    for row in book["rows"]:
        cost = Cost(row.pop("loss"), row.pop("divergence"))
        outcomes.append(Outcome(answers=answers[row["name"]].numpy(), cost=cost, **row))
    tables = {
        path.stem: pd.read_csv(path, float_precision="round_trip")
        for path in sorted(folder.glob("*.csv"))
    }
    return Part(book["seed"], tuple(outcomes), tables, load_shift(folder / "shift"))


def resumed(task: tuple[str, int, Plan], profile: Profile, scratch: Path) -> Part:
    """`run`, unless the same settings have already been run into `scratch`: a killed run goes on where it stopped."""
    name, seed, plan = task
    folder = scratch / f"{name}-{seed}"
    _free_to_write(folder, name)

    def build(part: Path) -> None:
        lab = laboratory.opened(profile, name, seed)
        save(
            run(lab, lambda role: laboratory.opened(profile, name, seed, role), plan, seed),
            part,
            lab,
        )

    return load(store.resumed(folder, _key(profile, name, task), build))


def chosen(task: tuple[str, tuple[str, ...]], profile: Profile, scratch: Path) -> dict[str, Choice]:
    """What validation says of some arms on the first seed, resumed likewise."""
    name, arms = task
    folder = scratch / f"{name}-choices-{store.fingerprint(arms)[:8]}"
    _free_to_write(folder, name)

    def build(part: Path) -> None:
        lab = laboratory.opened(profile, name, 0)
        store.write_json(
            part / "choices.json", {arm: asdict(study.choose(lab, arm, 0)) for arm in arms}
        )

    book = store.read_json(store.resumed(folder, _key(profile, name, task), build) / "choices.json")
    return {
        arm: Choice(ShiftTraining(**row.pop("best")), ShiftTraining(**row.pop("sparse")), **row)
        for arm, row in book.items()
    }


def _key(profile: Profile, name: str, task: object) -> dict:
    """What a shard depends on."""
    return {
        "task": task,
        "settings": profile.opinion_qa,
        "runtime": profile.runtime.dtype,
        "code": store.code(*Path(__file__).parent.glob("*.py")),
        "subject": catalogue.get(name).content(),
    }


def _free_to_write(folder: Path, name: str) -> None:
    """Refuse to write what rests on OpinionQA where git would pick it up."""
    if not catalogue.get(name).embedded:
        writable(folder, "Settings")


# a subject


@dataclass(frozen=True)
class Run:
    """Everything about one subject."""

    plan: Plan
    """The headline and the settings of every arm."""
    facts: dict
    """Single numbers and names."""
    tables: Tables
    """The tables that results are drawn from."""
    shift: Path
    """The folder of the first seed's shift, which is published."""


def complete(profile: Profile, name: str, scratch: Path) -> Run:
    """Choose settings on validation questions, run every seed as a shard of its own, and join them."""
    runtime, subject = profile.runtime, catalogue.get(name)
    roles = tuple(role for role in profile.opinion_qa.layers if role in subject.roles())
    own = replace(profile.opinion_qa, layers=roles)
    profile = replace(profile, studies={**profile.studies, "opinion_qa": own})
    lab = laboratory.opened(profile, name, 0)
    facts, exam, names = about(lab, name), lab.exam, study.arms(lab)
    del lab  # each shard opens its own, and two may not fit
    parts = runtime.n_jobs if isinstance(runtime.n_jobs, int) and runtime.n_jobs > 0 else len(names)
    spread = {"n_jobs": runtime.n_jobs, "threads": runtime.threads}
    one = partial(chosen, profile=profile, scratch=scratch)
    found = parallel.shards(
        one, [(name, tuple(names[i::parts])) for i in range(min(parts, len(names)))], **spread
    )
    by_name = {arm: choice for part in found for arm, choice in part.items()}
    plan = study.planned({arm: by_name[arm] for arm in names})
    tasks = [(name, seed, plan) for seed in range(runtime.seeds)]
    parts = parallel.shards(partial(resumed, profile=profile, scratch=scratch), tasks, **spread)
    overlap, cosine = meaning.stability([part.shift for part in parts])
    prompt = next(o.name for o in parts[0].outcomes if o.name.endswith("(best on validation)"))
    facts |= {"headline": plan.headline, "prompt": prompt, "jaccard": overlap, "cosine": cosine}
    return Run(plan, facts, report.tables(exam, parts, plan), scratch / f"{name}-0" / "shift")


def about(lab: Laboratory, name: str) -> dict:
    """What a reader should know of the subject before any result."""
    exam = lab.exam
    unsteered = lab.bench.unsteered(exam.questions).probabilities[0]
    topics = [exam.survey.questions[i].topic for i in exam.questions]
    refuses = lab.dialect.refusing is not None
    return {
        "subject": name,
        "model": lab.bench.lens.name,
        "sae": lab.settings.sae,
        "groups": len(lab.targets.groups),
        "training_questions": len(lab.targets.train),
        "validation_questions": len(lab.targets.validation),
        "test_questions": len(exam.questions),
        "families": len(set(exam.clusters.tolist())),
        "reliability": exam.reliability,
        "sampling_noise": exam.noise,
        "latents": lab.sae.size,
        "l0": lab.l0,
        "explained": lab.explained,
        "width": lab.bench.lens.d_model,
        "noop": study.noop(lab),
        "consistency": evaluate.consistency(exam, unsteered, topics),
        "refusal": float(rivals.refusals(lab.bench, lab.dialect.offering_refusal).mean())
        if refuses
        else None,
    }


def write(found: Run, folder: Path) -> None:
    """The subject's tables, facts and published shift."""
    _free_to_write(folder, found.facts["subject"])
    for name, table in found.tables.items():
        store.write_text(folder / f"{name}.csv", table.to_csv(index=False))
    store.write_json(folder / "facts.json", found.facts)
    shutil.copytree(store.verified(found.shift), folder / "shift")
