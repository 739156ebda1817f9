"""What a shift is made of (section 5.5): its latents in context, their effect, what it spills."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata

from sae_research.bases import Basis
from sae_research.shifts import Shift
from sae_research.studies.opinion_qa.experiment import Experiment
from sae_research.surveys.activity import LatentActivity
from sae_research.surveys.group_prompts import GroupPrompts, latent_contrasts
from sae_research.surveys.scores import (
    canonical_correlations,
    chance_correlations,
    off_target,
    on_target,
)


def _find_strongest(
    exp: Experiment, weights: torch.Tensor, top: int
) -> tuple[LatentActivity, list[list[int]], dict[int, tuple[str, ...]]]:
    """The latents of each row of weights that act most on the survey, and where each fires."""
    activity = LatentActivity(exp.cache, exp.sae)
    chosen = [
        effect.topk(min(top, int((effect > 0).sum()))).indices.tolist()
        for effect in activity.effect(weights)
    ]
    every = sorted({latent for row in chosen for latent in row})
    contexts = activity.contexts(torch.tensor(every, dtype=torch.long))
    return activity, chosen, dict(zip(every, contexts, strict=True))


def describe_latents(
    exp: Experiment, shift: Shift, prompted: GroupPrompts, top: int = 5
) -> pd.DataFrame:
    """The latents with the largest weights on each axis, weighted by their effect on the survey.

    `activation` is a latent's mean where it fires on the survey, `frequency` the share of tokens on
    which it does, and `group` the one whose prompts it tells best from those of its siblings, with
    an AUC of `selectivity`: .5 knows nothing, 1 or 0 all.
    """
    activity, chosen, contexts = _find_strongest(exp, shift.axes.T, top)
    every = torch.tensor(list(contexts), dtype=torch.long)
    auc = measure_selectivity(exp.sae, prompted, exp.targets.attributes, every)
    best = np.abs(auc - 0.5).argmax(0)
    place = {latent: at for at, latent in enumerate(contexts)}
    rows = [
        {
            "axis": axis,
            "index": latent,
            "weight": float(shift.axes[latent, axis]),
            "activation": float(activity.mean[latent]),
            "frequency": float(activity.share[latent]),
            "contexts": " / ".join(contexts[latent]),
            "group": shift.groups[best[place[latent]]],
            "selectivity": float(auc[best[place[latent]], place[latent]]),
        }
        for axis, latents in enumerate(chosen)
        for latent in latents
    ]
    return pd.DataFrame(rows)


def find_main_latents(exp: Experiment, shift: Shift, top: int = 5) -> list[list[dict]]:
    """For each group, the latents through which its own part acts most, and where they fire."""
    own = shift.part
    _, chosen, contexts = _find_strongest(exp, own, top)
    return [
        [
            {"latent": i, "weight": round(float(row[i]), 5), "fires_on": list(contexts[i])}
            for i in latents
        ]
        for row, latents in zip(own, chosen, strict=True)
    ]


def measure_causal_share(
    exp: Experiment, shift: Shift, answers: np.ndarray, calibrated: np.ndarray
) -> dict[int, float]:
    """Share of the group part's gain in WD that the m largest latents alone keep.

    `answers` are those under the whole shift, `calibrated` those under Delta_0 alone.
    """

    def wd(found: np.ndarray) -> float:
        return float(exp.eval_set.distance(found, exp.eval_set.truth).mean())

    without = wd(calibrated[None])
    gain = without - wd(answers)
    return {
        m: (without - wd(exp.answer(shift, shift.only(m).deltas))) / gain
        if abs(gain) > 1e-9
        else float("nan")
        for m in exp.settings.top_latents
    }


def measure_selectivity(
    basis: Basis, prompted: GroupPrompts, attributes: Sequence[str], latents: torch.Tensor
) -> np.ndarray:
    """AUC with which latents tell a group's last tokens from its siblings', [groups, latents]."""
    with torch.no_grad():
        own = [basis.encode(hidden)[:, latents].cpu().numpy() for hidden in prompted.hidden]
        acts = np.stack(own)
    attributes = np.array(attributes)
    found = []
    for g, attribute in enumerate(attributes):
        others = [h for h in range(len(attributes)) if attributes[h] == attribute and h != g]
        own = acts[g]
        rest = acts[others].reshape(-1, acts.shape[-1])
        # ties, as of silent latents, share their rank
        ranks = rankdata(np.concatenate([own, rest]), axis=0)[: len(own)].sum(0)
        found.append((ranks - len(own) * (len(own) + 1) / 2) / (len(own) * len(rest)))
    return np.stack(found)


def measure_agreement(
    basis: Basis, shift: Shift, prompted: GroupPrompts, contrast: torch.Tensor
) -> np.ndarray:
    """Cosine, per group, of what the shift writes into the block with what a group prompt does."""
    part = shift.part.to(prompted.acts)
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
    """Over pairs of seeds: mean Jaccard of the group parts' `top` latents, and mean cosine."""
    sets = [set(p.norm(dim=0).topk(min(top, p.shape[1])).indices.tolist()) for p in parts]
    pairs = list(combinations(range(len(parts)), 2))
    if not pairs:
        return float("nan"), float("nan")
    cosine = torch.nn.functional.cosine_similarity
    return (
        float(np.mean([len(sets[i] & sets[j]) / len(sets[i] | sets[j]) for i, j in pairs])),
        float(np.mean([cosine(parts[j], parts[i], dim=1).mean().item() for i, j in pairs])),
    )


def measure_axes(exp: Experiment, shift: Shift, seed: int) -> pd.DataFrame:
    """Canonical correlations of c_g with planted mean traits, beside those of permuted traits."""
    if exp.truth.traits is None:
        return pd.DataFrame(columns=["axis", "correlation", "chance"])
    case = (shift.scores.numpy(), exp.truth.traits, exp.truth.weights)
    found = canonical_correlations(*case)
    chance = chance_correlations(*case, seed)
    axis = np.arange(1, len(found) + 1)
    return pd.DataFrame({"axis": axis, "correlation": found, "chance": chance})


def describe_shift(
    exp: Experiment, shift: Shift, answers: np.ndarray, prompted: GroupPrompts
) -> dict[str, pd.DataFrame]:
    """Tables: what the shift spills, its main latents, causal share, agreement with group prompts.

    `answers` are those under the shift. `off_target` and `off_topic` hold changes in WD when each
    group's shift replaces calibration: to every group, and to its own by topic.
    """
    eval_set = exp.eval_set
    names = list(shift.groups)
    calibrated = exp.answer(shift, shift.shared[None])[0]
    spilled = pd.DataFrame(off_target(eval_set, answers, calibrated), index=names, columns=names)
    change = on_target(eval_set, answers, calibrated)
    topics = [eval_set.survey.questions[i].topic for i in eval_set.questions]
    by_topic = pd.DataFrame(change.T, columns=names).groupby(topics, sort=False).mean()
    share = measure_causal_share(exp, shift, answers, calibrated)
    contrast, _ = latent_contrasts(prompted, exp.targets)
    cosine = measure_agreement(exp.sae, shift, prompted, contrast)
    spilled = spilled.assign(on_target=change.mean(1))
    return {
        "off_target": spilled.rename_axis("shift").reset_index(),
        "off_topic": by_topic.rename_axis("topic").reset_index(),
        "latents": describe_latents(exp, shift, prompted),
        "causal": pd.DataFrame({"latents": list(share), "share": list(share.values())}),
        "agreement": pd.DataFrame({"group": names, "cosine": cosine}),
    }
