"""Everything that is measured on one subject with one seed: the shard that a profile runs once for every seed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch

from sae_research.studies.opinion_qa import (
    baselines,
    evaluate,
    generalise,
    laboratory,
    meaning,
    rivals,
    study,
)
from sae_research.studies.opinion_qa.fit import calibrate, fit
from sae_research.studies.opinion_qa.laboratory import Laboratory
from sae_research.studies.opinion_qa.settings import ShiftTraining
from sae_research.studies.opinion_qa.shift import Basis, Shift
from sae_research.studies.opinion_qa.study import Outcome, Plan
from sae_research.surveys import crossings
from sae_research.surveys.survey import Group

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


def run(lab: Laboratory, at: Callable[[str], Laboratory], plan: Plan, seed: int) -> Part:
    """Train and judge everything; rows that no seed changes, and looks at one shift, belong to the first seed.

    `at` opens the laboratory at the SAE of another role.
    """
    first, best = seed == 0, plan.best
    outcomes = [*_arms(lab, plan, seed)]
    found = {o.name: o for o in outcomes}[plan.headline].fit.shift
    asked = _told(lab) if first else None
    depth, layers = _depth(lab, at, plan, asked, seed)
    outcomes += [study.shuffled(lab, best, seed), *depth]
    tables = {
        "composition": _composition(lab, found, best, seed),
        "axes": _axes(lab, found, seed),
        "new_groups": _new_groups(lab, best, asked, seed),
    }
    if first:
        outcomes += [*_others(lab, best, asked, seed), *_ranks(lab, best, seed)]
        tables |= {
            "layers": layers,
            "dose": _doses(lab, {o.name: o for o in outcomes}),
            "off_target": _off_target(lab, found),
            "off_topic": _off_topic(lab, found),
            "latents": _latents(lab, found, asked),
            "causal": _causal(lab, found),
            "agreement": _agreement(lab, found, asked),
        }
    return Part(seed, tuple(replace(o, fit=None) for o in outcomes), tables, found)


def _left_out(lab: Laboratory, name: str, seed: int) -> bool:
    """Whether a method is for the first seed alone."""
    return seed > 0 and name in lab.settings.once


def _arms(lab: Laboratory, plan: Plan, seed: int) -> Iterator[Outcome]:
    """Every arm with its chosen settings, and how the headline changes with one of them."""
    for name, choice in plan.choices.items():
        if not _left_out(lab, name, seed):
            yield study.trained(lab, name, choice.best, seed, study.ARMS[name][0])
    variants = {study.SPARSE: plan.choices[plan.headline].sparse}
    variants |= {name: replace(plan.best, **changes) for name, changes in study.VARIANTS.items()}
    variants |= {
        f"{name}, {study.UNKEPT}": replace(plan.choices[name].best, keep=0.0)
        for name in _edits(plan)
    }
    for name, training in variants.items():
        if not _left_out(lab, name, seed):
            yield study.trained(lab, name, training, seed)


def _edits(plan: Plan) -> list[str]:
    """The edits in SAE space that keep the error term, the headline apart."""
    return [f"SAE {kind}" for kind in study.ERROR_KEEPING if f"SAE {kind}" != plan.headline]


LAST = "last token only"


def _told(lab: Laboratory, form: str = "BIO") -> baselines.Prompted:
    """The survey put to a member of every group."""
    return baselines.prompted(lab.bench, lab.sae, lab.dialect, form, lab.survey, lab.targets.train)


def _depth(
    lab: Laboratory,
    at: Callable[[str], Laboratory],
    plan: Plan,
    asked: baselines.Prompted | None,
    seed: int,
) -> tuple[list[Outcome], pd.DataFrame]:
    """The headline edit at other layers and on the last token alone, and a dense vector there, which no SAE limits.

    The table says where each lies, how well its SAE explains the survey's residuals, and its rows' names (H1, H2). The
    probe reads the layer that validation prefers (first seed).
    """
    settings, dense = lab.settings, plan.choices[study.DENSE].best
    trainings = {"all": plan.best, "answer": replace(plan.best, positions="answer"), "dense": dense}
    outcomes, layers, probes = [], [], []
    for role in (settings.sae, *settings.layers):
        here = role == settings.sae
        names = {
            "all": f"at {role}",
            "answer": f"at {role}, {LAST}",
            "dense": f"at {role}, dense vector",
        }
        if here:
            names = {"all": plan.headline, "answer": LAST, "dense": study.DENSE}
        wanted = [
            k for k in names if not _left_out(lab, names[k], seed) and (k == "answer" or not here)
        ]
        if not wanted:
            continue
        place = lab if here else at(role)
        for kind in wanted:
            basis = place.basis("dense" if kind == "dense" else "SAE", seed)
            found = fit(place.bench, basis, trainings[kind], place.targets, seed)
            outcomes.append(study.shifted(place, names[kind], basis, found))
        if asked is not None:
            probes.append(rivals.probe(place, asked if here else _told(place)))
        about = {"role": role, "blocks": place.bench.lens.depth(place.bench.hook)}
        layers.append(about | {"explained": place.explained, "l0": place.l0} | names)
    outcomes += [min(probes, key=lambda probe: probe[0])[1]] if probes else []
    return outcomes, pd.DataFrame(layers)


def _others(
    lab: Laboratory, best: ShiftTraining, asked: baselines.Prompted, seed: int
) -> Iterator[Outcome]:
    first = replace(best, calibration="first", sparsity=0.0)
    forms = {form: _told(lab, form) for form in lab.dialect.contexts if form != "BIO"}
    yield from rivals.fixed_rows(lab)
    yield from rivals.calibration_rows(lab, first, seed)
    yield from rivals.prompting_rows(lab, {"BIO": asked} | forms)
    yield from rivals.reader_rows(lab, asked)

    def shared(basis: Basis) -> torch.Tensor:
        return calibrate(lab.bench, basis, replace(first, kind="additive"), lab.targets, seed)

    yield from rivals.untrained_rows(lab, asked, shared)
    yield rivals.screened(lab, asked, best, seed)
    if lab.fresh is not None:
        yield from rivals.lora_rows(lab, asked, seed)


def _ranks(lab: Laboratory, best: ShiftTraining, seed: int) -> Iterator[Outcome]:
    for rank in lab.settings.ranks:
        found = fit(lab.bench, lab.sae, replace(best, rank=rank), lab.targets, seed)
        yield study.shifted(lab, f"rank {rank}", lab.sae, found)


def _answers(lab: Laboratory, shift: Shift, deltas: torch.Tensor) -> np.ndarray:
    return lab.bench.answers(
        lab.sae, shift.kind, deltas, lab.exam.questions, shift.positions
    ).probabilities


def _composition(lab: Laboratory, shift: Shift, best: ShiftTraining, seed: int) -> pd.DataFrame:
    """WD to each pair of attributes' intersections by cluster of questions: composed shift, margins, population.

    kappa comes from the margins' answers to validation questions. Two rows know more: people's own margins added up,
    and a shift trained on a poll of the intersections themselves (first seed).
    """
    rows, questions, validation = [], lab.exam.questions, lab.targets.validation
    for crossed in lab.crossed:
        groups, truth = crossed.groups, crossed.distributions[:, questions]
        known = lab.targets.answers[:, validation]
        kappa = generalise.best_kappa(lab.bench, lab.sae, shift, groups, known, validation)
        made = {"composed": generalise.composed(shift, groups)}
        made["composed, shrunk"] = generalise.composed(shift, groups, kappa)
        made |= {f"margin {i + 1}": generalise.margin(shift, groups, i) for i in (0, 1)}
        if seed == 0:
            poll = crossed.sampled(lab.settings.respondents, seed)
            targets = laboratory.learned_from(poll, lab.settings.shrinkage)
            made["trained on them"] = fit(lab.bench, lab.sae, best, targets, seed).shift.deltas
        answers = {name: _answers(lab, shift, deltas) for name, deltas in made.items()}
        answers["mean of margins"] = (answers["margin 1"] + answers["margin 2"]) / 2
        answers["shared part"] = _answers(lab, shift, shift.shared[None])
        answers["population"] = lab.truth.overall[questions][None]
        answers["people's margins, added"] = _added(lab, groups)
        wd = {name: lab.exam.distance(found, truth).mean(0) for name, found in answers.items()}
        table = pd.DataFrame(wd).groupby(lab.exam.clusters).mean()
        about = {"pair": groups[0].attribute, "kappa": kappa}
        rows.append(table.rename_axis("cluster").reset_index().assign(**about))
    return (
        pd.concat(rows, ignore_index=True)
        if rows
        else pd.DataFrame(columns=["cluster", "pair", "kappa"])
    )


def _added(lab: Laboratory, groups: Sequence[Group]) -> np.ndarray:
    """What people of both groups would answer if the log-probabilities of people's margins added up."""
    names = [g.name for g in lab.truth.groups]
    first, second = (
        lab.exam.truth[[names.index(g.name.split("|")[i]) for g in groups]] for i in (0, 1)
    )
    return crossings.added(first, second, lab.truth.overall[lab.exam.questions], lab.exam.mask)


def _axes(lab: Laboratory, shift: Shift, seed: int) -> pd.DataFrame:
    """Canonical correlations of c_g with the planted mean traits, beside those of permuted traits."""
    if lab.truth.traits is None:
        return pd.DataFrame(columns=["axis", "correlation", "chance"])
    scores, traits, weights = shift.scores.numpy(), lab.truth.traits, lab.truth.weights
    found = evaluate.canonical_correlations(scores, traits, weights)
    chance = evaluate.chance_correlations(scores, traits, weights, seed)
    return pd.DataFrame(
        {"axis": np.arange(1, len(found) + 1), "correlation": found, "chance": chance}
    )


def _doses(lab: Laboratory, outcomes: dict[str, Outcome]) -> pd.DataFrame:
    """WD, rho_dev and off-task cost of every trained shift, the whole of it scaled."""
    exam, rows = lab.exam, []
    unsteered = outcomes["no steering"].answers
    for name in [name for name in study.ARMS if name in outcomes]:
        basis, shift = lab.basis(study.ARMS[name][0], 0), outcomes[name].fit.shift
        for strength in lab.settings.strengths:
            deltas = strength * shift.deltas
            answers = lab.bench.answers(
                basis, shift.kind, deltas, exam.questions, shift.positions
            ).probabilities
            cost = lab.bench.cost(basis, shift.kind, deltas, "test").loss
            score = evaluate.scores(exam, answers, unsteered)
            rows.append(
                {
                    "method": name,
                    "strength": strength,
                    "wd": score.wd,
                    "rho_dev": score.rho_dev,
                    "cost": cost,
                }
            )
    return pd.DataFrame(rows)


def _off_target(lab: Laboratory, shift: Shift) -> pd.DataFrame:
    answers, calibrated = (
        _answers(lab, shift, shift.deltas),
        _answers(lab, shift, shift.shared[None])[0],
    )
    matrix = evaluate.off_target(lab.exam, answers, calibrated)
    table = pd.DataFrame(matrix, index=list(shift.groups), columns=list(shift.groups))
    return (
        table.assign(on_target=evaluate.on_target(lab.exam, answers, calibrated))
        .rename_axis("shift")
        .reset_index()
    )


def _off_topic(lab: Laboratory, shift: Shift) -> pd.DataFrame:
    """Change in WD to its own group when a shift replaces calibration, by topic."""
    exam = lab.exam
    answers, calibrated = (
        _answers(lab, shift, shift.deltas),
        _answers(lab, shift, shift.shared[None]),
    )
    change = exam.distance(answers, exam.truth) - exam.distance(calibrated, exam.truth)
    topics = [exam.survey.questions[i].topic for i in exam.questions]
    table = pd.DataFrame(change.T, columns=list(shift.groups)).groupby(topics, sort=False).mean()
    return table.rename_axis("topic").reset_index()


def _latents(lab: Laboratory, shift: Shift, asked: baselines.Prompted) -> pd.DataFrame:
    found = meaning.latents(lab.bench, lab.sae, shift, asked, lab.targets.attributes)
    names = ("axis", "index", "weight", "activation", "frequency", "told", "selectivity")
    return pd.DataFrame(
        [{n: getattr(x, n) for n in names} | {"contexts": " / ".join(x.contexts)} for x in found]
    )


def _causal(lab: Laboratory, shift: Shift) -> pd.DataFrame:
    calibrated = _answers(lab, shift, shift.shared[None])[0]
    found = meaning.causal_share(
        lab.bench, lab.sae, shift, lab.exam, calibrated, lab.settings.features
    )
    return pd.DataFrame({"latents": list(found), "share": list(found.values())})


def _agreement(lab: Laboratory, shift: Shift, asked: baselines.Prompted) -> pd.DataFrame:
    contrast, _ = baselines.latent_contrasts(asked, lab.targets)
    cosine = meaning.agreement(lab.sae, shift, asked, contrast)
    return pd.DataFrame({"group": list(shift.groups), "cosine": cosine})


def _new_groups(
    lab: Laboratory, best: ShiftTraining, asked: baselines.Prompted | None, seed: int
) -> pd.DataFrame:
    """Groups left out of training: U frozen and c_new from a few questions, against whole vectors and none at all.

    One group of each attribute is left out at a time, or a whole attribute, whose axis may then be missing (first
    seed). Rows are mean distances by group and cluster of questions; every seed draws other questions.
    """
    targets, rows, ridges = lab.targets, [], {}
    standing_in = generalise.held_out(targets, 1)  # known in the first turn, whose ridges serve all
    order = np.random.default_rng(seed).permutation(targets.train)
    turns = [("", generalise.held_out(targets, turn)) for turn in range(lab.settings.rounds)]
    if lab.settings.unseen_attributes and seed == 0:
        names = np.array(targets.attributes)
        turns += [
            (", attribute unseen", np.flatnonzero(names == a).tolist())
            for a in dict.fromkeys(names)
        ]
    for unseen, out in turns:
        if not out:
            continue
        shift = fit(lab.bench, lab.sae, best, generalise.without(targets, out), seed).shift
        known = [g for g in range(len(targets.groups)) if g not in set(out)]
        made = {("population", 0): shift.shared.expand(len(out), -1)}
        if asked is not None:
            made["from the prompt", 0] = generalise.from_states(
                shift, asked.block[known], asked.block[out]
            )
        for shots in (n for n in lab.settings.shots if n <= len(order)):
            for way, free in (("scores, U frozen", False), ("whole vector", True)):
                case, some = (lab.bench, lab.sae, shift), order[:shots]
                how = {"free": free, "steps": lab.settings.shot_steps, "seed": seed}
                if (way, shots) not in ridges:
                    ridges[way, shots] = generalise.best_ridge(
                        *case, targets.answers[standing_in], some, targets.validation, **how
                    )
                made[way, shots] = generalise.few_shot(
                    *case, targets.answers[out], some, ridge=ridges[way, shots], **how
                )
        for (way, shots), deltas in made.items():
            wd = lab.exam.distance(_answers(lab, shift, deltas), lab.exam.truth[out])
            by_cluster = (
                pd.DataFrame(wd.T, columns=[targets.groups[g] for g in out])
                .groupby(lab.exam.clusters)
                .mean()
            )
            table = (
                by_cluster.rename_axis("cluster")
                .reset_index()
                .melt("cluster", var_name="group", value_name="wd")
            )
            rows.append(
                table.assign(way=way + unseen, shots=shots, ridge=ridges.get((way, shots), np.nan))
            )
    return pd.concat(rows, ignore_index=True)
