"""What a shift is made of (section 5.5): its latents in context, and how much of the effect they
carry.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata

from sae_research.studies.opinion_qa.baselines import GroupPrompts, latent_contrasts
from sae_research.studies.opinion_qa.cache import CachedPrompts
from sae_research.studies.opinion_qa.evaluate import (
    EvalSet,
    canonical_correlations,
    chance_correlations,
    jaccard,
)
from sae_research.studies.opinion_qa.experiment import Experiment
from sae_research.studies.opinion_qa.shift import Basis, Shift


@dataclass(frozen=True)
class Latent:
    """One coordinate of an axis."""

    axis: int
    """Column of U."""
    index: int
    """Number of the latent in its SAE: what Neuronpedia's pages are named by."""
    weight: float
    """U[index, axis]."""
    activation: float
    """Mean activation on the survey's tokens where it fires."""
    frequency: float
    """Share of the survey's tokens on which it fires."""
    contexts: tuple[str, ...]
    """Where it fires most, the token in brackets."""
    group: str
    """The group whose prompts it tells best from those of its siblings."""
    selectivity: float
    """AUC of telling them: .5 knows nothing, 1 or 0 all."""


class LatentActivity:
    """Where the coordinates of a basis fire on the survey."""

    @torch.no_grad()
    def __init__(self, cache: CachedPrompts, basis: Basis):
        self.cache = cache
        self.basis = basis
        self.place = cache.prompts.editable("question")
        self.parts = cache.microbatches(torch.arange(len(cache.residual)), 1)
        total = active = 0.0
        for rows in self.parts:
            acts = basis.encode(cache.residual[rows])[self.place[rows]]
            total = total + acts.sum(0)
            active = active + (acts > 0).float().sum(0)
        self.mean = (total / active.clamp(min=1)).cpu()
        self.share = (active / self.place.sum()).cpu()

    def effect(self, weights: torch.Tensor) -> torch.Tensor:
        """How strongly weights on latents [..., M] act on the survey."""
        return weights.abs() * self.mean * self.share.sqrt() * self.basis.decoder.norm(dim=-1).cpu()

    @torch.no_grad()
    def contexts(self, latents: torch.Tensor) -> list[tuple[str, ...]]:
        """The text on which each of some latents fires most."""
        acts = torch.cat(
            [
                self.basis.encode(self.cache.residual[r])[..., latents] * self.place[r][..., None]
                for r in self.parts
            ]
        ).cpu()
        return [_contexts(self.cache, acts[..., i]) for i in range(len(latents))]


def _strongest(effect: torch.Tensor, top: int) -> torch.Tensor:
    return effect.topk(min(top, int((effect > 0).sum()))).indices


def describe_latents(
    cache: CachedPrompts,
    basis: Basis,
    shift: Shift,
    prompted: GroupPrompts,
    attributes: Sequence[str],
    top: int = 5,
) -> list[Latent]:
    """The latents with the largest weights on each axis, weighted by their effect on the survey."""
    activity = LatentActivity(cache, basis)
    chosen = [_strongest(effect, top) for effect in activity.effect(shift.axes.T)]
    every = torch.cat(chosen).unique()
    auc = measure_selectivity(basis, prompted, attributes, every)
    contexts = activity.contexts(every)
    best = np.abs(auc - 0.5).argmax(0)
    found = []
    for axis, indices in enumerate(chosen):
        for index in indices.tolist():
            at = int((every == index).nonzero())
            found.append(
                Latent(
                    axis,
                    index,
                    weight=float(shift.axes[index, axis]),
                    activation=float(activity.mean[index]),
                    frequency=float(activity.share[index]),
                    contexts=contexts[at],
                    group=shift.groups[best[at]],
                    selectivity=float(auc[best[at], at]),
                )
            )
    return found


def find_main_latents(
    cache: CachedPrompts, basis: Basis, shift: Shift, top: int = 5
) -> list[list[dict]]:
    """For each group, the latents through which its own part acts most, with the text on which
    they fire.
    """
    activity, own = LatentActivity(cache, basis), shift.scores @ shift.axes.T
    chosen = [_strongest(effect, top) for effect in activity.effect(own)]
    every = torch.cat(chosen).unique()
    contexts = activity.contexts(every)
    return [
        [
            {
                "latent": i,
                "weight": round(float(row[i]), 5),
                "fires_on": list(contexts[int((every == i).nonzero())]),
            }
            for i in indices.tolist()
        ]
        for row, indices in zip(own, chosen, strict=True)
    ]


def _contexts(
    cache: CachedPrompts, acts: torch.Tensor, n: int = 3, before: int = 4
) -> tuple[str, ...]:
    """The text up to the tokens on which a latent fires most, each text once."""
    found: dict[str, None] = {}
    length = acts.shape[1]
    for flat in acts.flatten().argsort(descending=True, stable=True)[: 20 * n].tolist():
        row, at = divmod(flat, length)
        words = [
            cache.model.tokenizer.decode([t]).strip()
            for t in cache.prompts.tokens[row, max(1, at - before) : at + 1].tolist()
        ]
        if acts[row, at] > 0:
            found[" ".join([*words[:-1], f"[{words[-1]}]"])] = None
        if len(found) == n:
            break
    return tuple(found)


def measure_causal_share(
    cache: CachedPrompts,
    basis: Basis,
    shift: Shift,
    eval_set: EvalSet,
    calibrated: np.ndarray,
    top_latents: Sequence[int],
) -> dict[int, float]:
    """Share of the group part's gain in WD that the m largest latents alone keep."""

    def wd(of: Shift) -> float:
        found = cache.measure_answers(
            basis, of.kind, of.deltas, eval_set.questions, of.positions
        ).probabilities
        return float(eval_set.distance(found, eval_set.truth).mean())

    without, full = float(eval_set.distance(calibrated[None], eval_set.truth).mean()), wd(shift)
    gain = without - full
    return {
        m: (without - wd(shift.only(m))) / gain if abs(gain) > 1e-9 else float("nan")
        for m in top_latents
    }


def measure_selectivity(
    basis: Basis, prompted: GroupPrompts, attributes: Sequence[str], latents: torch.Tensor
) -> np.ndarray:
    """AUC of some latents, [groups, latents]: do they tell a group's prompts from its siblings' at
    the last token?
    """
    with torch.no_grad():
        acts = np.stack(
            [basis.encode(hidden)[:, latents].cpu().numpy() for hidden in prompted.hidden]
        )
    attributes = np.array(attributes)
    found = []
    for g, attribute in enumerate(attributes):
        others = [h for h in range(len(attributes)) if attributes[h] == attribute and h != g]
        own, rest = acts[g], acts[others].reshape(-1, acts.shape[-1])
        ranks = rankdata(np.concatenate([own, rest]), axis=0)[: len(own)].sum(
            0
        )  # ties, as of silent latents, share
        found.append((ranks - len(own) * (len(own) + 1) / 2) / (len(own) * len(rest)))
    return np.stack(found)


def measure_agreement(
    basis: Basis, shift: Shift, prompted: GroupPrompts, contrast: torch.Tensor
) -> np.ndarray:
    """Cosine, per group, of what the shift writes into the survey block on average with what a
    group prompt changes.
    """
    part = (shift.scores @ shift.axes.T).to(prompted.acts)
    wrote = part
    if shift.kind == "multiplicative":
        wrote = prompted.acts * torch.expm1(part)
    elif shift.kind == "gated":
        wrote = prompted.fires * part
    found = torch.nn.functional.cosine_similarity(
        wrote @ basis.decoder, contrast @ basis.decoder, dim=1
    )
    return found.cpu().numpy()


def measure_stability(parts: Sequence[torch.Tensor], top: int = 50) -> tuple[float, float]:
    """Over pairs of seeds: mean Jaccard of the `top` latents of the group parts, and mean
    cosine.
    """
    sets = []
    for part in parts:
        chosen = np.zeros(part.shape[1], dtype=bool)
        chosen[part.norm(dim=0).topk(min(top, part.shape[1])).indices.numpy()] = True
        sets.append(chosen)
    pairs = [(i, j) for i in range(len(parts)) for j in range(i)]
    if not pairs:
        return float("nan"), float("nan")
    cosine = torch.nn.functional.cosine_similarity
    return (
        float(np.mean([jaccard(sets[i], sets[j]) for i, j in pairs])),
        float(np.mean([cosine(parts[i], parts[j], dim=1).mean().item() for i, j in pairs])),
    )


def measure_axes(exp: Experiment, shift: Shift, seed: int) -> pd.DataFrame:
    """Canonical correlations of c_g with the planted mean traits, beside those of permuted
    traits.
    """
    if exp.truth.traits is None:
        return pd.DataFrame(columns=["axis", "correlation", "chance"])
    case = (shift.scores.numpy(), exp.truth.traits, exp.truth.weights)
    found = canonical_correlations(*case)
    chance = chance_correlations(*case, seed)
    axis = np.arange(1, len(found) + 1)
    return pd.DataFrame({"axis": axis, "correlation": found, "chance": chance})


def describe_shift(
    exp: Experiment, shift: Shift, prompted: GroupPrompts
) -> dict[str, pd.DataFrame]:
    """Tables: the main latents of each axis, their causal share, agreement with group prompts."""
    latents = describe_latents(exp.cache, exp.sae, shift, prompted, exp.targets.attributes)
    calibrated = exp.cache.measure_answers(
        exp.sae, shift.kind, shift.shared[None], exp.eval_set.questions, shift.positions
    ).probabilities[0]
    share = measure_causal_share(
        exp.cache, exp.sae, shift, exp.eval_set, calibrated, exp.settings.top_latents
    )
    contrast, _ = latent_contrasts(prompted, exp.targets)
    cosine = measure_agreement(exp.sae, shift, prompted, contrast)
    return {
        "latents": pd.DataFrame(
            [{**asdict(x), "contexts": " / ".join(x.contexts)} for x in latents]
        ),
        "causal": pd.DataFrame({"latents": list(share), "share": list(share.values())}),
        "agreement": pd.DataFrame({"group": list(shift.groups), "cosine": cosine}),
    }
