"""Everything that is measured on one subject with one seed: the shard that a profile runs once for every seed."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch

from sae_research.config import OpinionQA, ShiftTraining
from sae_research.studies.opinion_qa import baselines, evaluate, generalise, laboratory, meaning, rivals, study
from sae_research.studies.opinion_qa.fit import calibrate, fit
from sae_research.studies.opinion_qa.laboratory import Laboratory
from sae_research.studies.opinion_qa.shift import Basis, Shift
from sae_research.studies.opinion_qa.study import Outcome

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


def headline(settings: OpinionQA) -> str:
    """The arm that the settings name."""
    return f"SAE {settings.training.kind}"


def run(lab: Laboratory, at: Callable[[str], Laboratory], chosen: dict[str, ShiftTraining], seed: int) -> Part:
    """Train and judge everything; rows that no seed changes, and looks at one shift, belong to the first seed.

    `at` opens the laboratory at the SAE of another role.
    """
    best, first = chosen[headline(lab.settings)], seed == 0
    left = () if first else lab.settings.once
    outcomes = [study.trained(lab, name, training, seed) for name, training in chosen.items() if name not in left]
    found = {o.name: o for o in outcomes}[headline(lab.settings)].fit.shift
    depth, layers = _depth(lab, at, chosen, seed)
    outcomes += [study.shuffled(lab, best, seed), *depth]
    tables = {"composition": _composition(lab, found, best, seed), "axes": _axes(lab, found, seed)}
    if first:
        asked = {
            form: baselines.prompted(lab.bench, lab.dialect, form, lab.survey, lab.targets.train)
            for form in lab.dialect.contexts
        }
        outcomes += [*_others(lab, best, asked, seed), *_ranks(lab, best, seed)]
        tables |= {
            "layers": layers,
            "dose": _doses(lab, {o.name: o for o in outcomes}),
            "off_target": _off_target(lab, found),
            "latents": _latents(lab, found, asked["BIO"]),
            "causal": _causal(lab, found),
            "new_groups": _new_groups(lab, best, asked["BIO"], seed),
            "agreement": _agreement(lab, found, asked["BIO"]),
        }
    return Part(seed, tuple(replace(o, fit=None) for o in outcomes), tables, found)


LAST = "last token only"


def _depth(
    lab: Laboratory, at: Callable[[str], Laboratory], chosen: dict[str, ShiftTraining], seed: int
) -> tuple[list[Outcome], pd.DataFrame]:
    """The headline edit at other layers and on the last token alone, and a dense vector there, which no SAE limits.

    The table says where each lies, how well its SAE explains the survey's residuals, and its rows' names (H1, H2).
    """
    settings, main = lab.settings, headline(lab.settings)
    trainings = {"all": chosen[main], "answer": replace(chosen[main], positions="answer"), "dense": chosen[study.DENSE]}
    outcomes, layers = [], []
    for role in (settings.sae, *settings.layers):
        here = role == settings.sae
        names = {"all": f"at {role}", "answer": f"at {role}, {LAST}", "dense": f"at {role}, dense vector"}
        if here:
            names = {"all": main, "answer": LAST, "dense": study.DENSE}
        wanted = ["answer"] if here else list(names)
        wanted = [kind for kind in wanted if seed == 0 or names[kind] not in settings.once]
        if not wanted:
            continue
        place = lab if here else at(role)
        for kind in wanted:
            basis = place.basis("dense" if kind == "dense" else "SAE", seed)
            found = fit(place.bench, basis, trainings[kind], place.targets, seed)
            outcomes.append(study.shifted(place, names[kind], basis, found))
        about = {"role": role, "blocks": place.bench.lens.depth(place.bench.hook)}
        layers.append(about | {"explained": place.explained, "l0": place.l0} | names)
    return outcomes, pd.DataFrame(layers)


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


def _composition(lab: Laboratory, shift: Shift, best: ShiftTraining, seed: int) -> pd.DataFrame:
    """WD to each pair of attributes' intersections by cluster of questions: composed shift, margins, population.

    kappa shrinks a composition; it is the one that fits the validation questions of the other pairs best. The shift
    that was trained on a poll of the intersections themselves belongs to the first seed.
    """
    rows, questions, validation = [], lab.exam.questions, lab.targets.validation
    for crossed in lab.crossed:
        truth, others = crossed.distributions[:, questions], [c for c in lab.crossed if c is not crossed]
        known = [(c.groups, c.distributions[:, validation]) for c in others]
        kappa = generalise.best_kappa(lab.bench, lab.sae, shift, known, validation) if known else 1.0
        made = {"composed": generalise.composed(shift, crossed.groups)}
        made["composed, shrunk"] = generalise.composed(shift, crossed.groups, kappa)
        made |= {f"margin {i + 1}": generalise.margin(shift, crossed.groups, i) for i in (0, 1)}
        if seed == 0:
            poll = crossed.sampled(lab.settings.respondents, seed)
            targets = laboratory.learned_from(poll, lab.settings.shrinkage)
            made["trained on them"] = fit(lab.bench, lab.sae, best, targets, seed).shift.deltas
        answers = {name: _answers(lab, shift, deltas) for name, deltas in made.items()}
        answers["mean of margins"] = (answers["margin 1"] + answers["margin 2"]) / 2
        answers["shared part"] = _answers(lab, shift, shift.shared[None])
        answers["population"] = lab.truth.overall[questions][None]
        wd = {name: lab.exam.distance(found, truth).mean(0) for name, found in answers.items()}
        table = pd.DataFrame(wd).groupby(lab.exam.clusters).mean()
        about = {"pair": crossed.groups[0].attribute, "kappa": kappa}
        rows.append(table.rename_axis("cluster").reset_index().assign(**about))
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=["cluster", "pair", "kappa"])


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


def _latents(lab: Laboratory, shift: Shift, asked: baselines.Prompted) -> pd.DataFrame:
    found = meaning.latents(lab.bench, lab.sae, shift, asked, lab.targets.attributes)
    names = ("axis", "index", "weight", "activation", "frequency", "told", "selectivity")
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
    """Groups left out of training: U frozen and c_new from a few questions, against whole vectors and none at all.

    One group of each attribute is left out at a time, or a whole attribute, whose axis may then be missing.
    """
    targets, rows = lab.targets, []
    order = np.random.default_rng(seed).permutation(targets.train)
    turns = [("", generalise.held_out(targets, turn)) for turn in range(lab.settings.rounds)]
    if lab.settings.unseen_attributes:
        names = np.array(targets.attributes)
        turns += [(", attribute unseen", np.flatnonzero(names == a).tolist()) for a in dict.fromkeys(names)]
    for unseen, out in turns:
        if not out:
            continue
        shift = fit(lab.bench, lab.sae, best, generalise.without(targets, out), seed).shift
        known = [g for g in range(len(targets.groups)) if g not in set(out)]
        made = {("population", 0): shift.shared.expand(len(out), -1)}
        made["from the prompt", 0] = generalise.from_states(shift, asked.block[known], asked.block[out])
        for shots in (n for n in lab.settings.shots if n <= len(order)):
            for way, free in (("scores, U frozen", False), ("whole vector", True)):
                some = order[:shots]
                made[way, shots] = generalise.few_shot(lab.bench, lab.sae, shift, targets.answers[out], some, free=free)
        for (way, shots), deltas in made.items():
            wd = lab.exam.distance(_answers(lab, shift, deltas), lab.exam.truth[out]).mean(1)
            about = {"way": way + unseen, "shots": shots}
            rows += [about | {"group": targets.groups[g], "wd": w} for g, w in zip(out, wd, strict=True)]
    return pd.DataFrame(rows)
