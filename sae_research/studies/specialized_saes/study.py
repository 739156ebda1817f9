"""Study 3 for the runner: for every seed, specialised SAEs on a model's text, the bias case study,
and the tier of synthetic vectors.
"""

from dataclasses import asdict, replace

import pandas as pd
import torch

from sae_research import activations, catalogue, conversion, explain, paths, training
from sae_research.config import Profile
from sae_research.errors import ResearchError
from sae_research.studies.runner import Result, Task
from sae_research.studies.specialized_saes import (
    evaluate,
    grounds,
    shift,
    specialize,
    synthetic,
    tails,
)
from sae_research.studies.specialized_saes.grounds import DOMAIN, Ground
from sae_research.studies.specialized_saes.settings import Settings
from sae_research.studies.specialized_saes.specialize import PLAIN, Arm
from sae_research.term import config, tilted
from sae_research.tilt import Tilt
from sae_research.world.text import bias_case

SPECIALIZE, SHIFT, SYNTHETIC = "specialize", "shift", "synthetic"


def tasks(profile: Profile) -> list[Task]:
    """Every part with every seed, without those that are switched off."""
    settings = profile.specialized_saes
    seeds = range(settings.seeds)
    parts = [{"part": SPECIALIZE, "model": m, "seed": s} for m in settings.models for s in seeds]
    model, few = settings.shift_model, seeds[: settings.shift.seeds]
    parts += [{"part": SHIFT, "model": model, "seed": s} for s in few if model]
    return parts + [{"part": SYNTHETIC, "seed": s} for s in seeds if settings.synthetic.vectors]


def run(task: Task, profile: Profile) -> Result:
    """One part with one seed: its own text, SAEs and trainings."""
    settings, seed = profile.specialized_saes, task["seed"]
    if task["part"] == SYNTHETIC:
        return Result({"synthetic": synthetic.run_tier(settings.synthetic, seed)})
    if task["part"] == SHIFT:
        return Result(run_shift(task["model"], settings, profile.runtime.device, seed))
    ground = grounds.load(task["model"], settings, profile.runtime.device, seed)
    return Result(run_ground(ground, settings, seed))


def run_ground(ground: Ground, settings: Settings, seed: int) -> dict[str, pd.DataFrame]:
    """General SAEs, selections, and every arm with its losses, tail and recall."""
    general = specialize.train_general(ground, settings, seed)
    ranked = specialize.rank_pool(ground, general["topk"], settings, seed)
    arms = specialize.make_arms(settings)
    recorder = _Recorder(ground, settings)
    for kind, sparsity in (("topk", settings.main_l0), ("relu", settings.main_penalty)):
        recorder.add(Arm("none", specialize.FINETUNE, kind, sparsity, PLAIN), general[kind])
    for selector in settings.selectors:
        tokens = specialize.choose_text(ground, selector, ranked, settings, seed)
        types = tokens[ground.model.content(tokens) & (tokens != ground.model.bos)]
        own = [arm for arm in arms if arm.selector == selector]
        found, log = specialize.specialize(
            own, general, ground.residuals(tokens), types, settings, seed
        )
        recorder.logs.append(log)
        for arm, sae in found.items():
            recorder.add(arm, sae)
    graded = specialize.grade_selectors(ground, ranked, settings)
    return {"selectors": graded, **recorder.tables()}


class _Recorder:
    """What is measured of every SAE, in the order of training; `general` is trained first."""

    def __init__(self, ground: Ground, settings: Settings):
        self.ground, self.settings = ground, settings
        self.splicer = evaluate.Splicer(ground, settings.loss_chunks)
        chunks = ground.tests[DOMAIN]
        content = ground.content(chunks)
        half = torch.from_numpy(chunks.document % 2 == 0)[:, None].expand_as(content)
        self.text = tails.TestText(
            ground.residuals(chunks.tokens),
            chunks.tokens[content],
            chunks.tokens.roll(1, 1)[content],
            half[content],
        )
        self.ask = None
        if settings.explainer is not None:
            self.words = ground.model.tokenizer.convert_ids_to_tokens(self.text.tokens.tolist())
            answers = paths.DATA / "private" / "explanations" / f"{ground.model.name}.json"
            model = catalogue.load_model(settings.explainer)
            self.ask = explain.recorded(explain.ask_model(model), answers)
        self.baseline: dict[str, torch.Tensor] = {}
        self.rows: dict[str, list[pd.DataFrame]] = {"losses": []}
        self.logs: list[pd.DataFrame] = []
        model = pd.DataFrame(self.splicer.measure(None))
        self.rows["losses"].append(model.assign(selector="model"))

    def add(self, arm: Arm, sae) -> None:
        """Measure one SAE; tails in full where arms are compared, numbers for all."""
        settings = self.settings
        about = asdict(arm)
        report = tails.tail_report(sae, self.text)
        tables = {
            "losses": pd.DataFrame(self.splicer.measure(sae)),
            "summary": pd.DataFrame([report.summary]),
        }
        if self.ground.truth is not None:
            f1 = settings.found_f1
            tables["recall"] = evaluate.measure_recall(self.ground, report.acts, f1)
        if arm.sparsity in (settings.main_l0, settings.main_penalty):
            tables |= self._full(arm, report)
            if self.ask is not None:
                tables["explanations"] = explain.explain_latents(
                    self.ask, report.acts, self.words, self.text.train, settings.explained_latents
                )
            if arm.kind == "topk":
                tables["decoders"] = tails.spread_of(sae.W_dec)
        for name, table in tables.items():
            self.rows.setdefault(name, []).append(table.assign(**about))

    def _full(self, arm: Arm, report: tails.TailReport) -> dict[str, pd.DataFrame]:
        tables = {
            name: getattr(report, name) for name in ("bins", "coverage", "densities", "ranks")
        }
        if arm.selector == "general" and arm.tilt == PLAIN:
            self.baseline[arm.kind] = report.counts
        elif arm.way == specialize.FINETUNE and arm.kind in self.baseline:
            ratio = tails.compare_counts(report.counts, self.baseline[arm.kind])
            tables["count_ratios"] = tails.quantiles({"log ratio": ratio})
        return tables

    def tables(self) -> dict[str, pd.DataFrame]:
        """All tables, one row led by its arm."""
        found = {name: pd.concat(parts, ignore_index=True) for name, parts in self.rows.items()}
        return found | {"log": pd.concat(self.logs, ignore_index=True)}


def run_shift(name: str, settings: Settings, device: str, seed: int) -> dict[str, pd.DataFrame]:
    """Table 1: dictionaries of general text and those fine-tuned on biographies, by hook."""
    ground = grounds.load(name, settings, device, seed)
    model = ground.model
    if not catalogue.get(name).embedded:
        raise ResearchError(
            f"no biographies are known for {name}; set `shift_model` to a toy text model, or to "
            "'' to leave the bias case study out."
        )
    counts = settings.shift.documents, settings.shift.test_documents
    data = bias_case.make_biographies(*counts, seed)
    general, special = {}, {}
    for hook in settings.shift.hooks:
        here = replace(ground, hook=hook)
        general[hook], special[hook] = _train_pair(here, data.ambiguous.tokens, settings, seed)
    return shift.run_table(shift.Case(model, data, settings.shift, seed), general, special)


def _train_pair(ground: Ground, texts: torch.LongTensor, settings: Settings, seed: int) -> tuple:
    """A general TopK SAE and its fine-tuning on `texts`, in raw units with unit decoder rows."""
    shape = ("topk", ground.model.d_model, settings.latents, settings.main_l0)
    start, pair = None, []
    for tokens, given, tilt in (
        (ground.general, settings.general, Tilt()),
        (texts, settings.fine_tuning, settings.shift.tilt),
    ):
        acts = ground.residuals(tokens)
        plan = given.plan(len(acts))
        batches = activations.batches(acts, plan.batch_size, plan.steps, seed)
        trainers = {"sae": tilted(tilt, start)}
        sae = training.train({"sae": config(*shape)}, batches, plan, seed, trainers)["sae"]
        start = {name: value.clone() for name, value in sae.state_dict().items()}
        pair.append(conversion.in_raw_units(sae, ground.scale))
    return tuple(pair)
