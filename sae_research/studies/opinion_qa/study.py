"""Study 1 as the runner needs it: settings are chosen per method, then one task per model and seed.

What no seed changes, and looks at one shift, belong to the first seed.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch

from sae_research import catalogue, paths
from sae_research.config import Profile
from sae_research.shifts import FittedShift, save_shift
from sae_research.studies.opinion_qa import baselines, generalise, meaning, methods, readers, tables
from sae_research.studies.opinion_qa.experiment import (
    Experiment,
    load_experiment,
    opinion_qa_folder,
)
from sae_research.studies.opinion_qa.methods import Choice, MethodResult, Plan
from sae_research.studies.opinion_qa.settings import (
    DENSE,
    LAST_TOKEN,
    NO_KL,
    SHUFFLED,
    SPARSEST,
    UNSTEERED,
    ShiftTraining,
)
from sae_research.studies.runner import Result, Task
from sae_research.surveys import scores
from sae_research.surveys.cached import OffTaskCost
from sae_research.surveys.group_prompts import GroupPrompts, measure_refusals
from sae_research.surveys.published import writable


def data_files(task: Task, profile: Profile) -> list[Path]:
    """The reader's own OpinionQA, for real models."""
    if catalogue.get(task["model"]).embedded:
        return []
    writable(paths.scratch(profile.name, "opinion_qa"), "OpinionQA")
    return sorted(path for path in opinion_qa_folder().rglob("*") if path.is_file())


# phase 1: settings from validation questions


def choice_tasks(profile: Profile) -> list[Task]:
    """One task per model and method."""
    return [
        {"model": name, "method": method}
        for name in profile.opinion_qa.models
        for method in methods.method_names(load_experiment(profile, name, 0))
    ]


def choose(task: Task, profile: Profile) -> Result:
    """KL and sparsity weight of one method."""
    exp = load_experiment(profile, task["model"], 0)
    return Result(facts=asdict(methods.choose_settings(exp, task["method"], 0)))


# phase 2: everything about one model and seed


def seed_tasks(profile: Profile, choices: list[Result]) -> list[Task]:
    """One task per model and seed, with the settings chosen for the model."""
    by_model: dict[str, dict] = defaultdict(dict)
    for result in choices:
        by_model[result.task["model"]][result.task["method"]] = result.facts
    return [
        {"model": name, "seed": seed, "choices": found}
        for name, found in by_model.items()
        for seed in range(profile.runtime.seeds)
    ]


def read_plan(task: Task) -> Plan:
    """What phase 1 decided for the model of a task."""
    choices = {}
    for name, facts in task["choices"].items():
        trainings = {key: ShiftTraining(**facts[key]) for key in ("best", "sparse")}
        choices[name] = Choice(**facts | trainings)
    return methods.make_plan(choices)


def run(task: Task, profile: Profile) -> Result:
    """Train and judge every method of one model with one seed."""
    name = task["model"]
    seed = task["seed"]
    plan = read_plan(task)
    exp = load_experiment(profile, name, seed)
    layers = [role for role in exp.settings.layers if role in catalogue.get(name).roles()]
    deeper = {role: load_experiment(profile, name, seed, role) for role in layers}
    results, made = measure_seed(exp, deeper, plan, seed)
    headline = next(r for r in results if r.name == plan.headline)
    made["results"], tensors = _pack(results)
    found = Result(made, tensors={**tensors, "shift.part": headline.shift.part})
    if seed == 0:
        found.facts = describe(exp, name)
        found.files = _read_saved(exp, name, headline, profile.runtime.device)
    return found


def describe(exp: Experiment, name: str) -> dict:
    """What a reader should know of model, survey and SAE before any result."""
    eval_set = exp.eval_set
    unsteered = exp.cache.measure_unsteered(eval_set.questions).probabilities[0]
    topics = [eval_set.survey.questions[i].topic for i in eval_set.questions]
    refusal = None
    if exp.template.refusing is not None:
        refusal = float(measure_refusals(exp.cache, exp.template.refusal_prompt).mean())
    return {
        "model": name,
        "sae": exp.settings.sae,
        "groups": len(exp.targets.groups),
        "training_questions": len(exp.targets.train),
        "validation_questions": len(exp.targets.validation),
        "test_questions": len(eval_set.questions),
        "clusters": len(set(eval_set.clusters.tolist())),
        "reliability": eval_set.reliability,
        "sampling_noise": eval_set.noise,
        "latents": exp.sae.size,
        "l0": exp.l0,
        "explained": exp.explained,
        "width": exp.cache.model.d_model,
        "noop": methods.measure_noop(exp),
        "consistency": scores.consistency(eval_set, unsteered, topics),
        "refusal": refusal,
    }


def measure_seed(
    exp: Experiment, deeper: dict[str, Experiment], plan: Plan, seed: int
) -> tuple[list[MethodResult], dict[str, pd.DataFrame]]:
    """Results of every method, and tables of what follows from the headline shift.

    `deeper` are experiments at the SAEs of other layers.
    """
    first = seed == 0
    best = plan.best
    results = [*_evaluate_methods(exp, plan, seed)]
    headline = next(r for r in results if r.name == plan.headline)
    shift = headline.shift
    prompted = exp.group_prompts() if first else None
    by_layer, layers = _evaluate_layers(exp, deeper, plan, prompted, seed)
    shuffled = methods.shuffle_groups(exp.targets, exp.clusters, seed)
    results += [methods.train_method(exp, SHUFFLED, best, seed, targets=shuffled), *by_layer]
    made = {
        "composition": generalise.measure_composition(exp, shift, best, seed),
        "axes": meaning.measure_axes(exp, shift, seed),
        "new_groups": generalise.measure_new_groups(exp, best, prompted, seed),
    }
    if first:
        results += [*_evaluate_baselines(exp, best, prompted, seed)]
        for rank in exp.settings.ranks:
            training = replace(best, rank=rank)
            results.append(methods.train_method(exp, f"rank {rank}", training, seed))
        made |= {
            "layers": layers,
            "dose": _measure_doses(exp, {r.name: r for r in results}),
            **meaning.describe_shift(exp, shift, headline.answers, prompted),
        }
    return results, made


def _skipped(exp: Experiment, name: str, seed: int) -> bool:
    """Whether a method is for the first seed alone."""
    return seed > 0 and name in exp.settings.first_seed_only


def _evaluate_methods(exp: Experiment, plan: Plan, seed: int) -> Iterator[MethodResult]:
    """Every method with its chosen settings, and how the headline changes with one of them."""
    for name, choice in plan.choices.items():
        if not _skipped(exp, name, seed):
            basis = exp.basis(methods.METHODS[name][0], seed)
            yield methods.train_method(exp, name, choice.best, seed, basis)
    variants = {SPARSEST: plan.choices[plan.headline].sparse}
    variants |= {name: replace(plan.best, **changes) for name, changes in methods.VARIANTS.items()}
    for kind in methods.ERROR_KEEPING:
        name = f"SAE {kind}"
        if name != plan.headline:
            variants[f"{name}, {NO_KL}"] = replace(plan.choices[name].best, kl_weight=0.0)
    for name, training in variants.items():
        if not _skipped(exp, name, seed):
            yield methods.train_method(exp, name, training, seed)


def _evaluate_layers(
    exp: Experiment,
    deeper: dict[str, Experiment],
    plan: Plan,
    prompted: GroupPrompts | None,
    seed: int,
) -> tuple[list[MethodResult], pd.DataFrame]:
    """The headline edit at other layers and on the last token alone, and a dense vector there.

    No SAE limits the dense vector. The table says where each layer lies, how well its SAE explains
    the survey's residuals, and the names of its methods (H1, H2). On the first seed, the probe
    reads the layer that validation prefers.
    """
    trainings = {
        "all": plan.best,
        "answer": replace(plan.best, positions="answer"),
        "dense": plan.choices[DENSE].best,
    }
    results, layers, probes = [], [], []
    for role, here in {exp.settings.sae: exp, **deeper}.items():
        at_sae = here is exp
        names = {
            "all": plan.headline if at_sae else f"at {role}",
            "answer": LAST_TOKEN if at_sae else f"at {role}, {LAST_TOKEN}",
            "dense": DENSE if at_sae else f"at {role}, dense vector",
        }
        # at the study's own SAE, the other two are among the methods already
        wanted = [
            place
            for place in (("answer",) if at_sae else names)
            if not _skipped(exp, names[place], seed)
        ]
        if not wanted:
            continue
        for place in wanted:
            basis = here.basis("dense" if place == "dense" else "SAE", seed)
            results.append(methods.train_method(here, names[place], trainings[place], seed, basis))
        if prompted is not None:
            own = prompted if at_sae else here.group_prompts()
            probes.append(readers.evaluate_probe(here, own))
        blocks = here.cache.model.depth(here.cache.hook)
        about = {"role": role, "blocks": blocks, "explained": here.explained, "l0": here.l0}
        layers.append({**about, **names})
    if probes:
        results.append(min(probes, key=lambda probe: probe[0])[1])
    return results, pd.DataFrame(layers)


def _evaluate_baselines(
    exp: Experiment, best: ShiftTraining, prompted: GroupPrompts, seed: int
) -> Iterator[MethodResult]:
    calibration = replace(best, calibration="first", sparsity_weight=0.0)
    others = [form for form in exp.template.contexts if form != "BIO"]
    forms = {"BIO": prompted} | {f: exp.group_prompts(f) for f in others}
    yield from baselines.evaluate_fixed(exp)
    yield from baselines.evaluate_calibration(exp, calibration, seed)
    yield from baselines.evaluate_prompting(exp, forms)
    yield from readers.evaluate_unembeddings(exp, prompted)
    yield from baselines.evaluate_untrained(exp, prompted, calibration, seed)
    yield baselines.evaluate_screened_latents(exp, prompted, best, seed)
    yield from readers.evaluate_lora(exp, prompted, seed)


def _measure_doses(exp: Experiment, results: dict[str, MethodResult]) -> pd.DataFrame:
    """WD, rho_dev and off-task cost of every trained shift, the whole of it scaled."""
    unsteered = results[UNSTEERED].answers
    rows = []
    for name in [name for name in methods.METHODS if name in results]:
        basis = exp.basis(methods.METHODS[name][0], 0)
        shift = results[name].shift
        for coefficient in exp.settings.coefficients:
            deltas = coefficient * shift.deltas
            found = exp.cache.measure_answers(
                basis, shift.kind, deltas, exp.eval_set.questions, shift.positions
            )
            score = scores.compute_scores(exp.eval_set, found.probabilities, unsteered)
            cost = exp.cache.measure_cost(basis, shift.kind, deltas, "test").loss
            about = {"method": name, "coefficient": coefficient}
            rows.append(about | {"wd": score.wd, "rho_dev": score.rho_dev, "cost": cost})
    return pd.DataFrame(rows)


# results on disk


_PLAIN = [f.name for f in fields(MethodResult) if f.name not in ("answers", "cost", "shift")]


def _pack(results: list[MethodResult]) -> tuple[pd.DataFrame, dict[str, torch.Tensor]]:
    """The numbers of all methods as a table, their answers as tensors."""
    rows = [
        {name: getattr(r, name) for name in _PLAIN}
        | {"loss": r.cost.loss, "divergence": r.cost.divergence}
        for r in results
    ]
    return pd.DataFrame(rows), {f"answers.{r.name}": torch.tensor(r.answers) for r in results}


def unpack(result: Result) -> list[MethodResult]:
    """The methods of one seed as `_pack` wrote them."""
    return [
        MethodResult(
            answers=result.tensors[f"answers.{row['name']}"].numpy(),
            cost=OffTaskCost(row.pop("loss"), row.pop("divergence")),
            **row,
        )
        for row in result.tables["results"].to_dict("records")
    ]


def _read_saved(
    exp: Experiment, name: str, headline: MethodResult, device: str
) -> dict[str, bytes]:
    """The files of the saved headline shift."""
    spec = catalogue.get(name)
    template = "toy"
    if not spec.embedded:
        template = "english chat" if spec.chat else "english"
    sae = spec.sae(exp.settings.sae, device=device)
    fitted = FittedShift(headline.shift, exp.cache.model, sae, template)
    with TemporaryDirectory() as folder:
        save_shift(fitted, Path(folder) / "shift", make_cards(exp, headline))
        files = sorted((Path(folder) / "shift").iterdir())
        return {f"shift/{path.name}": path.read_bytes() for path in files}


def make_cards(exp: Experiment, headline: MethodResult, top: int = 5) -> dict[str, dict]:
    """What to know of each group's shift: scores, distance before and after, main latents."""
    shift = headline.shift
    truth = exp.eval_set.truth
    unsteered = exp.cache.measure_unsteered(exp.eval_set.questions).probabilities
    before, after = (exp.eval_set.distance(p, truth).mean(1) for p in (unsteered, headline.answers))
    latents = meaning.find_main_latents(exp, shift, top)
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


PHASES = ((choice_tasks, choose), (seed_tasks, run))


def summarise(results: list[Result], profile: Profile) -> dict[str, Result]:
    """The published tables, facts and first shift of each model."""
    published = {}
    for name in profile.opinion_qa.models:
        own = [r for r in results if r.task["model"] == name]
        exp = load_experiment(profile, name, 0)
        seeds = {r.task["seed"]: unpack(r) for r in own}
        plan = read_plan(own[0].task)
        made = tables.make_tables(exp.eval_set, seeds, plan) | tables.join_seeds(own)
        overlap, cosine = meaning.measure_stability([r.tensors["shift.part"] for r in own])
        prompt = next(r.name for r in seeds[0] if r.name.endswith("(best on validation)"))
        facts = {"headline": plan.headline, "prompt": prompt, "jaccard": overlap, "cosine": cosine}
        published[name] = Result(made, own[0].facts | facts, files=own[0].files)
    return published
