"""Groups that the shift was not trained on: intersections, few answers, none (3.6 and 3.7)."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from sae_research.shifts import Shift
from sae_research.studies.opinion_qa.experiment import Experiment
from sae_research.studies.opinion_qa.fit import train_shift
from sae_research.studies.opinion_qa.settings import ShiftTraining
from sae_research.surveys import crossings
from sae_research.surveys.group_prompts import GroupPrompts
from sae_research.surveys.survey import Group, Survey
from sae_research.surveys.targets import Targets, drop_groups, forward_kl, make_targets, mean_kl

# intersections of two attributes


def compose_shifts(shift: Shift, groups: Sequence[Group], kappa: float = 1.0) -> torch.Tensor:
    """Delta_0 + kappa U (c_g1 + c_g2 + ...) of intersections g1|g2|..., [intersections, M]."""
    parts = [
        sum(shift.scores[shift.groups.index(name)] for name in group.name.split("|"))
        for group in groups
    ]
    return shift.shared + kappa * torch.stack(parts) @ shift.axes.T


def margin_deltas(shift: Shift, groups: Sequence[Group], place: int) -> torch.Tensor:
    """The shift of the `place`-th margin of every intersection, [intersections, M]."""
    return torch.stack([shift.delta(group.name.split("|")[place]) for group in groups])


def choose_kappa(
    exp: Experiment,
    shift: Shift,
    groups: Sequence[Group],
    kappas: Sequence[float] = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2),
) -> float:
    """The shrinkage with which compositions, mixed by shares, give their margins' answers back.

    On validation questions; of an intersection itself only its share is known.
    """
    validation = exp.targets.validation
    answers = exp.targets.answers[:, validation]
    # share of each intersection within each of the shift's groups, zero where it is none
    mixture = np.array(
        [[g.share if name in g.name.split("|") else 0.0 for g in groups] for name in shift.groups]
    )
    mixture = mixture / np.maximum(mixture.sum(1, keepdims=True), 1e-12)
    known = mixture.sum(1) > 0

    def loss(kappa: float) -> float:
        found = exp.answer(shift, compose_shifts(shift, groups, kappa), validation)
        return mean_kl(answers[known], np.einsum("gi,iqk->gqk", mixture[known], found))

    return min(kappas, key=loss)


def measure_composition(
    exp: Experiment, shift: Shift, best: ShiftTraining, seed: int
) -> pd.DataFrame:
    """WD to each pair of attributes' intersections by cluster of questions.

    Compared are the composed shift, its margins and the population. kappa comes from the margins'
    answers to validation questions. Two columns know more: people's own margins added up, and a
    shift trained on a poll of the intersections themselves (first seed).
    """
    rows = []
    for survey in exp.intersections:
        answers, kappa = _answer_intersections(exp, shift, best, survey, seed)
        truth = survey.distributions[:, exp.eval_set.questions]
        wd = {name: exp.eval_set.distance(a, truth).mean(0) for name, a in answers.items()}
        table = pd.DataFrame(wd).groupby(exp.eval_set.clusters).mean()
        about = {"pair": survey.groups[0].attribute, "kappa": kappa}
        rows.append(table.rename_axis("cluster").reset_index().assign(**about))
    if not rows:
        return pd.DataFrame(columns=["cluster", "pair", "kappa"])
    return pd.concat(rows, ignore_index=True)


def _answer_intersections(
    exp: Experiment, shift: Shift, best: ShiftTraining, survey: Survey, seed: int
) -> tuple[dict[str, np.ndarray], float]:
    """Answers of every way to the intersections of `survey`, and the kappa that was chosen."""
    groups = survey.groups
    kappa = choose_kappa(exp, shift, groups)
    deltas = {
        "composed": compose_shifts(shift, groups),
        "composed, shrunk": compose_shifts(shift, groups, kappa),
        "margin 1": margin_deltas(shift, groups, 0),
        "margin 2": margin_deltas(shift, groups, 1),
        "shared part": shift.shared[None],
    }
    if seed == 0:
        poll = survey.sampled(exp.settings.respondents, seed)
        targets = make_targets(poll, exp.settings.shrinkage)
        deltas["trained on them"] = train_shift(exp.cache, exp.sae, best, targets, seed).deltas
    answers = {name: exp.answer(shift, delta) for name, delta in deltas.items()}
    answers["mean of margins"] = (answers["margin 1"] + answers["margin 2"]) / 2
    # what people of both groups would answer if log-probabilities of margins added up
    names = [g.name for g in exp.truth.groups]
    margins = [
        exp.eval_set.truth[[names.index(g.name.split("|")[i]) for g in groups]] for i in (0, 1)
    ]
    overall = exp.truth.overall[exp.eval_set.questions]
    answers["population"] = overall[None]
    answers["people's margins, added"] = crossings.add_log_probabilities(
        *margins, overall, exp.eval_set.mask
    )
    return answers, kappa


# groups left out of training


def fit_few_shot(
    exp: Experiment,
    shift: Shift,
    answers: np.ndarray,
    questions: np.ndarray,
    ridge: float,
    *,
    free: bool,
    seed: int,
) -> torch.Tensor:
    """Shifts [groups, M] of new groups from their answers to few questions.

    `answers` are [groups, questions of the survey, options]. U stays frozen and only the r numbers
    c_new are fitted, with a ridge towards the population in units of the known groups' scores;
    `free` fits a whole vector instead.
    """
    cache = exp.cache
    steps = exp.settings.few_shot_steps
    rows = cache.prompts.prompt_ids(questions)
    device = cache.residual.device
    truth = torch.tensor(answers, dtype=torch.float32, device=device)
    axes = shift.axes * shift.scores.std(0)
    if free:
        axes = torch.eye(exp.sae.size) * shift.axes.abs().max()
    axes = axes.to(device)
    shared = shift.shared.to(device)
    scores = torch.zeros(len(answers), axes.shape[1], device=device, requires_grad=True)
    optimizer = torch.optim.Adam([scores], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    random = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        drawn = rows[torch.randperm(len(rows), generator=random)[:24]]
        optimizer.zero_grad()
        (ridge * scores.square().sum() / len(questions) / len(answers)).backward()
        for part in cache.microbatches(drawn, len(answers)):
            deltas = shared + scores @ axes.T
            x, _ = cache.apply_shift(exp.sae, shift.kind, deltas, part, shift.positions)
            logs = cache.log_probs(x.flatten(0, 1), part.repeat_interleave(len(answers)))
            target = truth[:, cache.prompts.question[part]].transpose(0, 1).flatten(0, 1)
            (forward_kl(target, logs).mean() * len(part) / len(drawn)).backward()
        optimizer.step()
        schedule.step()
    return (shared + scores @ axes.T).detach().cpu()


RIDGES = (0.0, 1e-3, 1e-2, 1e-1)


def choose_ridge(
    exp: Experiment, shift: Shift, answers: np.ndarray, questions: np.ndarray, **fitting: object
) -> float:
    """The ridge with which known groups, placed anew from `questions`, answer validation best.

    So a way is tuned without another answer of the new group, and each way has a ridge of its own.
    """
    validation = exp.targets.validation

    def loss(ridge: float) -> float:
        deltas = fit_few_shot(exp, shift, answers, questions, ridge, **fitting)
        return mean_kl(answers[:, validation], exp.answer(shift, deltas, validation))

    return min(RIDGES, key=loss)


def held_out_groups(targets: Targets, turn: int = 0) -> list[int]:
    """Groups to leave out: of every attribute with more than two, the last but `turn`."""
    names = np.array(targets.attributes)
    places = [np.flatnonzero(names == attribute) for attribute in dict.fromkeys(targets.attributes)]
    return [int(place[-1 - turn]) for place in places if len(place) > max(2, turn)]


def predict_from_states(
    shift: Shift, known: torch.Tensor, new: torch.Tensor, ridge: float = 0.1
) -> torch.Tensor:
    """Shifts [new groups, M] without any answers: c_g regressed on the model's state for the group.

    States are mean residuals over each group's prompts; `known`, [groups, d], are those of the
    shift's groups.
    """
    known = known.cpu()
    center = known.mean(0)
    scale = (known - center).norm(dim=1).mean()
    x = (known - center) / scale
    own = (new.cpu() - center) / scale
    c = shift.scores - shift.scores.mean(0)
    fitted = own @ x.T @ torch.linalg.solve(x @ x.T + ridge * torch.eye(len(x)), c)
    return shift.shared + (shift.scores.mean(0) + fitted) @ shift.axes.T


def measure_new_groups(
    exp: Experiment, best: ShiftTraining, prompted: GroupPrompts | None, seed: int
) -> pd.DataFrame:
    """Groups left out of training: U frozen and c_new from few questions, against other ways.

    The others are whole vectors, the population's shift, and a regression on the group's prompts.
    One group of each attribute is left out at a time, or a whole attribute, whose axis may then be
    missing (first seed). Rows are mean distances by group and cluster of questions; every seed
    draws other questions.
    """
    order = np.random.default_rng(seed).permutation(exp.targets.train)
    turns = [("", held_out_groups(exp.targets, t)) for t in range(exp.settings.n_holdout_rounds)]
    if exp.settings.unseen_attributes and seed == 0:
        names = np.array(exp.targets.attributes)
        turns += [
            (", attribute unseen", np.flatnonzero(names == attribute).tolist())
            for attribute in dict.fromkeys(names)
        ]
    rows = []
    ridges: dict[tuple[str, int], float] = {}
    for suffix, left_out in turns:
        if not left_out:
            continue
        shift, ways = _place_groups(exp, best, prompted, left_out, order, ridges, seed)
        for (way, n_questions), deltas in ways.items():
            table = _distances(exp, exp.answer(shift, deltas), left_out)
            ridge = ridges.get((way, n_questions), np.nan)
            rows.append(table.assign(way=way + suffix, n_questions=n_questions, ridge=ridge))
    return pd.concat(rows, ignore_index=True)


def _place_groups(
    exp: Experiment,
    best: ShiftTraining,
    prompted: GroupPrompts | None,
    left_out: list[int],
    order: np.ndarray,
    ridges: dict[tuple[str, int], float],
    seed: int,
) -> tuple[Shift, dict[tuple[str, int], torch.Tensor]]:
    """A shift trained without some groups, and their deltas in every way; fills `ridges`."""
    targets = exp.targets
    # groups that the first turn knows stand in for new ones, so that its ridges serve all turns
    stand_ins = held_out_groups(targets, 1)
    shift = train_shift(exp.cache, exp.sae, best, drop_groups(targets, left_out), seed)
    ways = {("population", 0): shift.shared.expand(len(left_out), -1)}
    if prompted is not None:
        known = [targets.groups.index(name) for name in shift.groups]
        states = prompted.block
        ways["from the prompt", 0] = predict_from_states(shift, states[known], states[left_out])
    for n in (n for n in exp.settings.few_shot_sizes if n <= len(order)):
        for way, free in (("scores, U frozen", False), ("whole vector", True)):
            fitting = {"free": free, "seed": seed}
            if (way, n) not in ridges:
                answers = targets.answers[stand_ins]
                ridges[way, n] = choose_ridge(exp, shift, answers, order[:n], **fitting)
            ways[way, n] = fit_few_shot(
                exp, shift, targets.answers[left_out], order[:n], ridges[way, n], **fitting
            )
    return shift, ways


def _distances(exp: Experiment, answers: np.ndarray, groups: list[int]) -> pd.DataFrame:
    """Mean WD of some groups by cluster of questions, one row each."""
    wd = exp.eval_set.distance(answers, exp.eval_set.truth[groups])
    names = [exp.targets.groups[g] for g in groups]
    table = pd.DataFrame(wd.T, columns=names).groupby(exp.eval_set.clusters).mean()
    return table.rename_axis("cluster").reset_index().melt("cluster", None, "group", "wd")
