"""Everything that is measured on one subject with one seed: the shard that a profile runs once for every seed."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from sae_research import catalogue, store
from sae_research.config import Profile, ShiftTraining
from sae_research.studies.opinion_qa import baselines, evaluate, generalise, meaning, rivals, study
from sae_research.studies.opinion_qa.fit import calibrate, fit
from sae_research.studies.opinion_qa.shift import Basis, Shift, save_shift
from sae_research.studies.opinion_qa.study import Laboratory, Outcome

Tables = dict[str, pd.DataFrame]


@dataclass(frozen=True)
class Part:
    """One seed."""

    seed: int
    """Draws polls, documents and the order of training."""
    outcomes: tuple[Outcome, ...]
    """Every method."""
    tables: Tables
    """What follows from the headline shift: composition, new groups, doses, meaning."""
    shift: Shift
    """The headline shift."""


def headline(lab: Laboratory) -> str:
    """The arm that the settings name."""
    return f"SAE {lab.settings.training.kind}"


def run(lab: Laboratory, late: Callable[[], Laboratory], chosen: dict[str, ShiftTraining], seed: int) -> Part:
    """Train and judge everything; rows that no seed changes, and looks at one shift, belong to the first seed."""
    best, first = chosen[headline(lab)], seed == 0
    left = () if first else lab.settings.once
    outcomes = [study.trained(lab, name, training, seed) for name, training in chosen.items() if name not in left]
    found = {o.name: o for o in outcomes}[headline(lab)].fit.shift
    outcomes += [study.shuffled(lab, best, seed), *_depth(lab, late(), best, seed)]
    tables = {"composition": _composition(lab, found), "axes": _axes(lab, found, seed)}
    if first:
        asked = {
            form: baselines.prompted(lab.bench, lab.dialect, form, lab.survey, lab.targets.train)
            for form in lab.dialect.contexts
        }
        outcomes += [*_others(lab, best, asked, seed), *_ranks(lab, best, seed)]
        tables |= {
            "dose": _doses(lab, {o.name: o for o in outcomes}),
            "off_target": _off_target(lab, found),
            "latents": _latents(lab, found),
            "causal": _causal(lab, found),
            "new_groups": _new_groups(lab, best, asked["BIO"], seed),
            "agreement": _agreement(lab, found, asked["BIO"]),
        }
    return Part(seed, tuple(replace(o, fit=None) for o in outcomes), tables, found)


def _depth(lab: Laboratory, late: Laboratory, best: ShiftTraining, seed: int) -> Iterator[Outcome]:
    """The headline edit at a later SAE, and on the last token alone (H1, H2)."""
    for name, at, positions in (
        ("last token only", lab, "answer"),
        ("later SAE", late, "all"),
        ("later SAE, last token only", late, "answer"),
    ):
        if seed and name in lab.settings.once:
            continue
        training = replace(best, positions=positions)
        yield study.shifted(at, name, at.sae, fit(at.bench, at.sae, training, at.targets, seed))


def _others(lab: Laboratory, best: ShiftTraining, asked: dict[str, baselines.Prompted], seed: int) -> Iterator[Outcome]:
    first = replace(best, calibration="first")
    yield from rivals.fixed_rows(lab)
    yield from rivals.calibration_rows(lab, first, seed)
    yield from rivals.prompting_rows(lab, asked)
    yield from rivals.reader_rows(lab, asked["BIO"])

    def shared(basis: Basis) -> torch.Tensor:
        return calibrate(lab.bench, basis, replace(first, kind="additive"), lab.targets, seed)

    yield from rivals.untrained_rows(lab, asked["BIO"], shared)
    yield rivals.screened(lab, asked["BIO"], best, seed)
    if lab.fresh is not None:
        yield from rivals.lora_rows(lab, asked["BIO"], seed)


def _ranks(lab: Laboratory, best: ShiftTraining, seed: int) -> Iterator[Outcome]:
    for rank in lab.settings.ranks:
        found = fit(lab.bench, lab.sae, replace(best, rank=rank), lab.targets, seed)
        yield study.shifted(lab, f"rank {rank}", lab.sae, found)


def _answers(lab: Laboratory, shift: Shift, deltas: torch.Tensor) -> np.ndarray:
    return lab.bench.answers(lab.sae, shift.kind, deltas, lab.exam.questions, shift.positions).probabilities


def _composition(lab: Laboratory, shift: Shift) -> pd.DataFrame:
    """WD to each pair of attributes' intersections by cluster of questions: composed shift, margins, population."""
    rows, questions = [], lab.exam.questions
    for crossed in lab.crossed:
        truth = crossed.distributions[:, questions]
        made = {"composed": generalise.composed(shift, crossed.groups)}
        made |= {f"margin {i + 1}": generalise.margin(shift, crossed.groups, i) for i in (0, 1)}
        answers = {name: _answers(lab, shift, deltas) for name, deltas in made.items()}
        answers["mean of margins"] = (answers["margin 1"] + answers["margin 2"]) / 2
        answers["shared part"] = _answers(lab, shift, shift.shared[None])
        answers["population"] = lab.truth.overall[questions][None]
        wd = {name: lab.exam.distance(found, truth).mean(0) for name, found in answers.items()}
        table = pd.DataFrame(wd).groupby(lab.exam.clusters).mean()
        rows.append(table.rename_axis("cluster").reset_index().assign(pair=crossed.groups[0].attribute))
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=["cluster", "pair"])


def _axes(lab: Laboratory, shift: Shift, seed: int) -> pd.DataFrame:
    """Canonical correlations of c_g with the planted mean traits, beside those of permuted traits."""
    if lab.truth.traits is None:
        return pd.DataFrame(columns=["axis", "correlation", "chance"])
    scores, traits, weights = shift.scores.numpy(), lab.truth.traits, lab.truth.weights
    found = evaluate.canonical_correlations(scores, traits, weights)
    chance = evaluate.chance_correlations(scores, traits, weights, seed)
    return pd.DataFrame({"axis": np.arange(1, len(found) + 1), "correlation": found, "chance": chance})


def _doses(lab: Laboratory, outcomes: dict[str, Outcome]) -> pd.DataFrame:
    """WD, rho_dev and off-task cost of edits whose whole shift is scaled."""
    exam, rows = lab.exam, []
    unsteered = outcomes["no steering"].answers
    shown = [n for n in study.ARMS if n.endswith((lab.settings.training.kind, "low rank")) or n.startswith("SAE ")]
    for name in shown:
        basis, shift = lab.basis(study.ARMS[name][0], 0), outcomes[name].fit.shift
        for strength in lab.settings.strengths:
            deltas = strength * shift.deltas
            answers = lab.bench.answers(basis, shift.kind, deltas, exam.questions, shift.positions).probabilities
            cost = lab.bench.cost(basis, shift.kind, deltas[:: max(1, len(deltas) // 4)], "test").loss
            score = evaluate.scores(exam, answers, unsteered)
            rows.append({"method": name, "strength": strength, "wd": score.wd, "rho_dev": score.rho_dev, "cost": cost})
    return pd.DataFrame(rows)


def _off_target(lab: Laboratory, shift: Shift) -> pd.DataFrame:
    answers, calibrated = _answers(lab, shift, shift.deltas), _answers(lab, shift, shift.shared[None])[0]
    matrix = evaluate.off_target(lab.exam, answers, calibrated)
    table = pd.DataFrame(matrix, index=list(shift.groups), columns=list(shift.groups))
    return table.assign(on_target=evaluate.on_target(lab.exam, answers, calibrated)).rename_axis("shift").reset_index()


def _latents(lab: Laboratory, shift: Shift) -> pd.DataFrame:
    found = [x for axis in range(shift.rank) for x in meaning.latents(lab.bench, lab.sae, shift, axis)]
    names = ("axis", "index", "weight", "activation", "frequency")
    return pd.DataFrame([{n: getattr(x, n) for n in names} | {"contexts": " / ".join(x.contexts)} for x in found])


def _causal(lab: Laboratory, shift: Shift) -> pd.DataFrame:
    calibrated = _answers(lab, shift, shift.shared[None])[0]
    found = meaning.causal_share(lab.bench, lab.sae, shift, lab.exam, calibrated, lab.settings.features)
    return pd.DataFrame({"latents": list(found), "share": list(found.values())})


def _agreement(lab: Laboratory, shift: Shift, asked: baselines.Prompted) -> pd.DataFrame:
    contrast, _ = baselines.latent_contrasts(lab.bench, lab.sae, asked, lab.targets)
    cosine = meaning.agreement(lab.sae, shift, asked, contrast)
    return pd.DataFrame({"group": list(shift.groups), "cosine": cosine})


def _new_groups(lab: Laboratory, best: ShiftTraining, asked: baselines.Prompted, seed: int) -> pd.DataFrame:
    """Groups left out of training: U frozen and c_new from a few questions, against whole vectors and none at all."""
    out, targets, draws = generalise.held_out(lab.targets), lab.targets, np.random.default_rng(seed)
    shift = fit(lab.bench, lab.sae, best, generalise.without(targets, out), seed).shift
    truth, rows = lab.exam.truth[out], []

    def add(way: str, shots: int, deltas: torch.Tensor) -> None:
        wd = lab.exam.distance(_answers(lab, shift, deltas), truth).mean(1)
        rows.extend(
            {"way": way, "shots": shots, "group": targets.groups[g], "wd": w} for g, w in zip(out, wd, strict=True)
        )

    add("population", 0, shift.shared.expand(len(out), -1))
    order = draws.permutation(targets.train)
    for shots in (n for n in lab.settings.shots if n <= len(order)):
        for way, free in (("scores, U frozen", False), ("whole vector", True)):
            add(
                way,
                shots,
                generalise.few_shot(lab.bench, lab.sae, shift, targets.answers[out], order[:shots], free=free),
            )
    known = [g for g in range(len(targets.groups)) if g not in set(out)]
    add("from the prompt", 0, generalise.from_states(shift, asked.block[known], asked.block[out]))
    return pd.DataFrame(rows)


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
    from sae_research.studies.opinion_qa.bench import Cost
    from sae_research.studies.opinion_qa.shift import load_shift

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
        lab = study.opened(profile, name, seed)
        part = run(lab, lambda: study.opened(profile, name, seed, settings.late), chosen, seed)
        save(part, folder, lab.bench.lens.name, settings.sae)

    key = {"task": task, "settings": settings, "runtime": profile.runtime.dtype}
    key |= {"code": store.code(*Path(__file__).parent.glob("*.py")), "subject": catalogue.get(name).content()}
    return load(store.resumed(scratch / f"{name}-{seed}", key, build))
