"""The recipe (section 3): a general SAE, text chosen from a pool by each selector, and SAEs
specialised to it in three ways, all on the same budget of tokens.

SAEs of one selector run in lock-step on the same batches. All live in the ground's scaled units.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import LongTensor, Tensor

from sae_research import activations, conversion, term, training
from sae_research.errors import unknown
from sae_research.retrieval import selectors
from sae_research.retrieval.tracin import TracIn
from sae_research.studies.specialized_saes.grounds import DOMAIN, Ground
from sae_research.studies.specialized_saes.settings import Settings
from sae_research.tilt import Tilt

if TYPE_CHECKING:
    from sae_lens import SAE

PLAIN = "plain"
FINETUNE, RESIDUAL, DIRECT = "fine-tune", "residual", "direct"
NULL = "null: "  # how the way of null dictionaries begins; they are fine-tuned like the others


@dataclass(frozen=True)
class Arm:
    """One specialised SAE."""

    selector: str
    """Whose text it is trained on; `none` is the general SAE itself."""
    way: str
    """`fine-tune`, `residual`, `direct` or `null: ...`."""
    kind: str
    """`topk`, whose L0 is matched, or `relu`, whose L1 coefficient is (the paper's kind)."""
    sparsity: float
    """k, or the L1 coefficient."""
    tilt: str
    """Name of its tilt."""


def make_arms(settings: Settings) -> list[Arm]:
    """Every selector plain at each L0; tilts and other ways on one selector's text; the paper's
    comparison (general, tilted selector, tilts) at each L1 coefficient.
    """
    own = settings.tilted_selector
    arms = []
    for k in settings.l0s:
        arms += [Arm(s, FINETUNE, "topk", k, PLAIN) for s in settings.selectors]
        arms += [Arm(own, FINETUNE, "topk", k, tilt) for tilt in settings.tilts]
        arms += [Arm(own, way, "topk", k, PLAIN) for way in settings.ways]
    if DIRECT in settings.ways and "random" in settings.selectors:  # what is not the domain's doing
        arms.append(Arm("random", DIRECT, "topk", settings.main_l0, PLAIN))
    arms += [Arm(own, NULL + x, "topk", settings.main_l0, PLAIN) for x in settings.nulls]
    for penalty in settings.penalties:
        arms += [Arm(s, FINETUNE, "relu", penalty, PLAIN) for s in ("general", own)]
        arms += [Arm(own, FINETUNE, "relu", penalty, tilt) for tilt in settings.paper_tilts]
    return arms


def train_general(ground: Ground, settings: Settings, seed: int) -> "dict[str, SAE]":
    """A general TopK and a general ReLU SAE, and nulls of the first, on the same batches."""
    shape = ground.model.d_model, settings.latents
    configs = {
        "topk": term.config("topk", *shape, settings.main_l0),
        "relu": term.config("relu", *shape, settings.main_penalty),
    }
    configs |= {NULL + null: configs["topk"] for null in settings.nulls}
    acts = ground.residuals(ground.general)
    plan = settings.general.plan(len(acts))
    batches = activations.batches(acts, plan.batch_size, plan.steps, seed)
    trainers = {name: _frozen(name, term.tilted(Tilt())) for name in configs}
    trained = training.train(configs, batches, plan, seed, trainers)
    return {kind: sae.requires_grad_(False) for kind, sae in trained.items()}


def _frozen(way: str, make: "training.MakeTrainer") -> "training.MakeTrainer":
    """The trainer of a null dictionary; any other as it is."""
    return training.freeze(way.removeprefix(NULL), make) if way.startswith(NULL) else make


def rank_pool(
    ground: Ground, general: "SAE", settings: Settings, seed: int
) -> dict[str, np.ndarray]:
    """The pool as each selector ranks it; `general` and `seed only` do not rank."""
    pool, seeds = ground.pool, ground.seeds
    wanted = set(settings.selectors)
    scores = {}
    if any(name.startswith("bm25") or name == "fusion" for name in wanted):
        scores["bm25"] = selectors.bm25_scores(pool.texts, seeds.texts)
    if any(name.startswith("dense") or name == "fusion" for name in wanted):
        vectors, queries = embed(ground, settings)
        scores["dense"] = queries @ vectors.T
    found = {name: selectors.rank(s, settings.aggregation) for name, s in scores.items()}
    first = settings.tracin_candidates * settings.selected_chunks
    for name in tuple(found):
        if f"{name} tracin" in wanted:
            influence = score_tracin(ground, general, found[name][:first])
            found[f"{name} tracin"] = selectors.rerank(found[name], influence, first)
    if "fusion" in wanted:
        found["fusion"] = selectors.fuse([found["bm25"], found["dense"]])
    found["random"] = selectors.rank_randomly(len(pool), seed)
    found["oracle"] = selectors.rank_by_label(ground.in_domain, seed)
    return {name: found[name] for name in settings.selectors if name in found}


def embed(ground: Ground, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of pool and seeds for dense retrieval."""
    pool, seeds = ground.pool, ground.seeds
    if settings.dense == "lsa":
        return selectors.lsa_vectors(pool.texts, seeds.texts)
    if settings.dense == "residual":
        return selectors.residual_vectors(ground.model, ground.hook, pool, seeds)
    return (
        selectors.sentence_vectors(pool.texts, settings.dense),
        selectors.sentence_vectors(seeds.texts, settings.dense),
    )


def score_tracin(
    ground: Ground, general: "SAE", candidates: np.ndarray, batch: int = 256
) -> np.ndarray:
    """Mean influence of each candidate chunk's tokens, cosine-normalised, on the seeds' loss."""
    tracin = TracIn(conversion.unit_rows(general))
    seeds = tracin.mean_gradient(ground.residuals(ground.seeds.tokens).split(8192))
    chunks = ground.pool[candidates]
    n_tokens = ground.content(chunks).sum(1)
    found = []
    for start in range(0, len(chunks), batch):
        x = ground.residuals(chunks.tokens[start : start + batch])
        tokens = tracin.scores(x, seeds, normalise=True)
        sizes = n_tokens[start : start + batch].tolist()
        found += [part.mean().item() for part in tokens.split(sizes)]
    return np.array(found)


def grade_selectors(
    ground: Ground, ranked: dict[str, np.ndarray], settings: Settings, least: int = 5
) -> pd.DataFrame:
    """Precision, recall, nDCG and lift of each ranking at k, and the share of the domain's rare
    token types that occur at least `least` times in what it selects.
    """
    test = ground.tests[DOMAIN]
    size = ground.model.d_vocab
    counts = torch.bincount(test.tokens[ground.content(test)], minlength=size)
    seen = counts[counts > 0].float()
    rare = (counts > 0) & (counts <= seen.median())
    k = settings.selected_chunks
    rows = []
    for name, ranking in ranked.items():
        chosen = ground.pool.tokens[torch.from_numpy(ranking[:k].copy())]
        covered = torch.bincount(chosen.flatten(), minlength=size)[rare] >= least
        scores = selectors.score_ranking(ranking, ground.in_domain, k)
        rows.append({"selector": name, **scores, "tail_types": covered.float().mean().item()})
    return pd.DataFrame(rows)


def choose_text(
    ground: Ground, selector: str, ranked: dict[str, np.ndarray], settings: Settings, seed: int
) -> LongTensor:
    """The chunks that a selector's SAEs are trained on."""
    if selector == "seed only":
        return ground.seeds.tokens
    if selector == "general":
        budget = settings.fine_tuning.steps * settings.fine_tuning.batch_size
        n = -(-budget // (ground.pool.tokens.shape[1] - 1))
        ranking = selectors.rank_randomly(len(ground.pool), seed + 1)
        rows = ranking[~ground.in_domain[ranking]][:n]
    elif selector in ranked:
        rows = ranked[selector][: settings.selected_chunks]
    else:
        raise unknown("selector", selector, ranked, "the settings of study 3")
    return ground.pool.tokens[torch.from_numpy(rows.copy())]


def specialize(
    arms: list[Arm],
    general: "dict[str, SAE]",
    acts: Tensor,
    types: LongTensor,
    settings: Settings,
    seed: int,
) -> tuple[dict[Arm, "SAE"], pd.DataFrame]:
    """The SAEs of one selector, trained in lock-step on its activations, and what was logged.

    `types` are the token types of the activations, for tilts over frequency bins.
    """
    d, plan = acts.shape[1], settings.fine_tuning.plan(len(acts))
    configs, trainers, belows = {}, {}, {}
    for arm in arms:
        width, k = settings.latents, arm.sparsity
        null = arm.way.startswith(NULL)
        given = {"start": general[arm.way if null else arm.kind].state_dict()}
        if arm.way == RESIDUAL:
            k = max(1, round(settings.residual_share * arm.sparsity))
            belows[arm] = conversion.with_k(general["topk"], int(arm.sparsity) - k)
            given = {"before": belows[arm]}
        elif arm.way == DIRECT:
            given = {}
        if arm.way in (RESIDUAL, DIRECT):
            width = settings.small_latents
        tilt = settings.tilts.get(arm.tilt, Tilt())
        if tilt.bins:
            given["bins"] = (term.bin_by_frequency(types, settings.frequency_bins), seed)
        configs[arm] = term.config(arm.kind, d, width, k)
        trainers[arm] = _frozen(arm.way, term.tilted(tilt, lr=_rate(arm, settings), **given))
    batches = activations.batches(acts, plan.batch_size, plan.steps, seed)
    trained = training.train(configs, batches, plan, seed, trainers)
    logs = [pd.DataFrame(sae.log).assign(**vars(arm)) for arm, sae in trained.items()]
    found = {
        arm: conversion.Stacked(belows[arm], s) if arm in belows else s
        for arm, s in trained.items()
    }
    for sae in found.values():
        sae.eval().requires_grad_(False)
    return found, pd.concat(logs, ignore_index=True)


def _rate(arm: Arm, settings: Settings) -> float:
    return settings.anew_lr if arm.way in (RESIDUAL, DIRECT) else settings.fine_tuning.lr
