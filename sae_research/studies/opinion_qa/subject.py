"""A subject from end to end: one shard a seed, kept on disk, and the tables that they add up to."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from sae_research import catalogue, parallel, store
from sae_research.config import Profile, ShiftTraining
from sae_research.studies.opinion_qa import evaluate, laboratory, meaning, report, rivals, study
from sae_research.studies.opinion_qa.batch import Part, Tables, headline, run
from sae_research.studies.opinion_qa.bench import Cost
from sae_research.studies.opinion_qa.laboratory import Laboratory
from sae_research.studies.opinion_qa.shift import load_shift, save_shift
from sae_research.studies.opinion_qa.study import Outcome

# shards on disk


def save(part: Part, folder: Path, model: str, sae: str) -> None:
    """Write a part: answers and shift as safetensors, the rest as JSON and CSV."""
    names = ("name", "parameters", "coordinates", "moved", "mass", "order")
    rows = [
        {n: getattr(o, n) for n in names} | {"loss": o.cost.loss, "divergence": o.cost.divergence}
        for o in part.outcomes
    ]
    store.write_json(folder / "outcomes.json", {"seed": part.seed, "rows": rows})
    store.write_tensors(folder / "answers.safetensors", {o.name: torch.tensor(o.answers) for o in part.outcomes})
    for name, table in part.tables.items():
        store.write_text(folder / f"{name}.csv", table.to_csv(index=False))
    save_headline(part, folder / "shift", model, sae)


def save_headline(part: Part, folder: Path, model: str, sae: str) -> None:
    """The headline shift with a card a group: its scores on the shared axes and how many latents they move."""
    cards = {
        group: {"scores": [round(x, 6) for x in row], "latents": int(part.shift.active.sum())}
        for group, row in zip(part.shift.groups, part.shift.scores.tolist(), strict=True)
    }
    save_shift(part.shift, folder, model=model, sae=sae, cards=cards)


def load(folder: Path) -> Part:
    """A part as `save` wrote it."""
    book = store.read_json(folder / "outcomes.json")
    answers = store.read_tensors(folder / "answers.safetensors")
    outcomes = []
    for row in book["rows"]:
        cost = Cost(row.pop("loss"), row.pop("divergence"))
        outcomes.append(Outcome(answers=answers[row["name"]].numpy(), cost=cost, **row))
    tables = {path.stem: pd.read_csv(path, float_precision="round_trip") for path in sorted(folder.glob("*.csv"))}
    return Part(book["seed"], tuple(outcomes), tables, load_shift(folder / "shift"))


def resumed(task: tuple[str, int, dict[str, ShiftTraining]], profile: Profile, scratch: Path) -> Part:
    """`run`, unless the same settings have already been run into `scratch`: a killed run goes on where it stopped."""
    name, seed, chosen = task
    settings = profile.opinion_qa

    def build(folder: Path) -> None:
        lab = laboratory.opened(profile, name, seed)
        part = run(lab, lambda role: laboratory.opened(profile, name, seed, role), chosen, seed)
        save(part, folder, lab.bench.lens.name, settings.sae)

    key = {"task": task, "settings": settings, "runtime": profile.runtime.dtype}
    key |= {"code": store.code(*Path(__file__).parent.glob("*.py")), "subject": catalogue.get(name).content()}
    return load(store.resumed(scratch / f"{name}-{seed}", key, build))


# a subject


@dataclass(frozen=True)
class Run:
    """Everything about one subject."""

    chosen: dict[str, ShiftTraining]
    """The settings of every arm."""
    facts: dict
    """Single numbers and names."""
    tables: Tables
    """The tables that results are drawn from."""
    first: Part
    """The first seed, whose shift is published."""


def complete(profile: Profile, name: str, scratch: Path) -> Run:
    """Choose settings on validation questions, run every seed as a shard of its own, and join them."""
    runtime = profile.runtime
    subject = catalogue.get(name)
    roles = tuple(role for role in profile.opinion_qa.layers if role in subject.roles())
    profile = replace(profile, opinion_qa=replace(profile.opinion_qa, layers=roles))
    lab = laboratory.opened(profile, name, 0)
    chosen, facts, exam = study.arms(lab, 0), about(lab, name), lab.exam
    del lab  # each shard opens its own, and two may not fit
    tasks = [(name, seed, chosen) for seed in range(runtime.seeds)]
    one = partial(resumed, profile=profile, scratch=scratch)
    parts = parallel.shards(one, tasks, runtime.n_jobs, threads=runtime.threads)
    best = headline(profile.opinion_qa)
    tables = {
        "scores": report.scores(exam, parts),
        "intervals": report.intervals(exam, parts),
        "paired": report.paired(exam, parts, best),
        "groups": report.groups(exam, parts),
        "topics": report.topics(exam, parts),
        "attributes": report.attributes(exam, parts, [best, report.SHUFFLED]),
    } | report.collected(parts)
    overlap, cosine = meaning.stability([part.shift for part in parts])
    prompt = next(o.name for o in parts[0].outcomes if o.name.endswith("(best on validation)"))
    return Run(chosen, facts | {"prompt": prompt, "jaccard": overlap, "cosine": cosine}, tables, parts[0])


def about(lab: Laboratory, name: str) -> dict:
    """What a reader should know of the subject before any result."""
    exam = lab.exam
    unsteered = lab.bench.unsteered(exam.questions).probabilities[0]
    topics = [exam.survey.questions[i].topic for i in exam.questions]
    refuses = lab.dialect.refusing is not None
    return {
        "subject": name,
        "model": lab.bench.lens.name,
        "headline": headline(lab.settings),
        "groups": len(lab.targets.groups),
        "training_questions": len(lab.targets.train),
        "validation_questions": len(lab.targets.validation),
        "test_questions": len(exam.questions),
        "families": len(set(exam.clusters.tolist())),
        "reliability": exam.reliability,
        "sampling_noise": exam.noise,
        "sae": lab.settings.sae,
        "latents": lab.sae.size,
        "l0": lab.l0,
        "explained": lab.explained,
        "width": lab.bench.lens.d_model,
        "noop": study.noop(lab),
        "consistency": evaluate.consistency(exam, unsteered, topics),
        "refusal": float(rivals.refusals(lab.bench, lab.dialect.offering_refusal).mean()) if refuses else None,
    }


def write(found: Run, folder: Path) -> None:
    """The subject's tables, facts and published shift."""
    for name, table in found.tables.items():
        store.write_text(folder / f"{name}.csv", table.to_csv(index=False))
    store.write_json(folder / "facts.json", found.facts)
    save_headline(found.first, folder / "shift", found.facts["model"], found.facts["sae"])
