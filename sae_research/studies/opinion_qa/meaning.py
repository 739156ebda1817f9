"""What a shift is made of (section 5.5): its latents in context, and how much of the effect they carry."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import rankdata

from sae_research.studies.opinion_qa.baselines import Prompted
from sae_research.studies.opinion_qa.bench import Bench
from sae_research.studies.opinion_qa.evaluate import Exam, jaccard
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
    """Mean code on the survey's tokens where it fires."""
    frequency: float
    """Share of the survey's tokens on which it fires."""
    contexts: tuple[str, ...]
    """Where it fires most, the token in brackets."""
    told: str
    """The group whose prompts it tells best from those of its siblings."""
    selectivity: float
    """AUC of telling them: .5 knows nothing, 1 or 0 all."""


class Activity:
    """Where the coordinates of a basis fire on the survey."""

    @torch.no_grad()
    def __init__(self, bench: Bench, basis: Basis):
        self.bench, self.basis, self.place = bench, basis, bench.prompts.editable("question")
        self.parts = bench.parts(torch.arange(len(bench.residual)), 1)
        total, active = 0.0, 0.0
        for rows in self.parts:
            codes = basis.encode(bench.residual[rows])[self.place[rows]]
            total, active = total + codes.sum(0), active + (codes > 0).float().sum(0)
        self.mean = (total / active.clamp(min=1)).cpu()
        self.share = (active / self.place.sum()).cpu()

    def effect(self, weights: torch.Tensor) -> torch.Tensor:
        """How strongly weights on latents [..., M] act on the survey."""
        return weights.abs() * self.mean * self.share.sqrt() * self.basis.rows.norm(dim=-1).cpu()

    @torch.no_grad()
    def contexts(self, latents: torch.Tensor) -> list[tuple[str, ...]]:
        """The text on which each of some latents fires most."""
        codes = torch.cat(
            [
                self.basis.encode(self.bench.residual[r])[..., latents] * self.place[r][..., None]
                for r in self.parts
            ]
        ).cpu()
        return [_contexts(self.bench, codes[..., i]) for i in range(len(latents))]


def _strongest(effect: torch.Tensor, top: int) -> torch.Tensor:
    return effect.topk(min(top, int((effect > 0).sum()))).indices


def latents(
    bench: Bench,
    basis: Basis,
    shift: Shift,
    asked: Prompted,
    attributes: Sequence[str],
    top: int = 5,
) -> list[Latent]:
    """The latents with the largest weights on each axis, weighted by how strongly they act on the survey."""
    activity = Activity(bench, basis)
    chosen = [_strongest(effect, top) for effect in activity.effect(shift.axes.T)]
    every = torch.cat(chosen).unique()
    known, contexts = selectivity(basis, asked, attributes, every), activity.contexts(every)
    best = np.abs(known - 0.5).argmax(0)
    found = []
    for axis, indices in enumerate(chosen):
        for index in indices.tolist():
            at = int((every == index).nonzero())
            acts = (
                float(shift.axes[index, axis]),
                float(activity.mean[index]),
                float(activity.share[index]),
            )
            told = shift.groups[best[at]], float(known[best[at], at])
            found.append(Latent(axis, index, *acts, contexts[at], *told))
    return found


def main_latents(bench: Bench, basis: Basis, shift: Shift, top: int = 5) -> list[list[dict]]:
    """For each group, the latents through which its own part acts most, with the text on which they fire."""
    activity, own = Activity(bench, basis), shift.scores @ shift.axes.T
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


def _contexts(bench: Bench, codes: torch.Tensor, n: int = 3, before: int = 4) -> tuple[str, ...]:
    """The text up to the tokens on which a latent fires most, each text once."""
    found: dict[str, None] = {}
    length = codes.shape[1]
    for flat in codes.flatten().argsort(descending=True, stable=True)[: 20 * n].tolist():
        row, at = divmod(flat, length)
        words = [
            bench.lens.tokenizer.decode([t]).strip()
            for t in bench.prompts.tokens[row, max(1, at - before) : at + 1].tolist()
        ]
        if codes[row, at] > 0:
            found[" ".join([*words[:-1], f"[{words[-1]}]"])] = None
        if len(found) == n:
            break
    return tuple(found)


def causal_share(
    bench: Bench,
    basis: Basis,
    shift: Shift,
    exam: Exam,
    calibrated: np.ndarray,
    features: Sequence[int],
) -> dict[int, float]:
    """Share of the group part's gain in WD that the m largest latents alone keep."""

    def wd(of: Shift) -> float:
        found = bench.answers(basis, of.kind, of.deltas, exam.questions, of.positions).probabilities
        return float(exam.distance(found, exam.truth).mean())

    without, full = float(exam.distance(calibrated[None], exam.truth).mean()), wd(shift)
    gain = without - full
    return {
        m: (without - wd(shift.only(m))) / gain if abs(gain) > 1e-9 else float("nan")
        for m in features
    }


def selectivity(
    basis: Basis, asked: Prompted, attributes: Sequence[str], latents: torch.Tensor
) -> np.ndarray:
    """AUC of some latents, [groups, latents]: do they tell a group's prompts from its siblings' at the last token?"""
    with torch.no_grad():
        codes = np.stack(
            [basis.encode(hidden)[:, latents].cpu().numpy() for hidden in asked.hidden]
        )
    attributes = np.array(attributes)
    found = []
    for g, attribute in enumerate(attributes):
        others = [h for h in range(len(attributes)) if attributes[h] == attribute and h != g]
        own, rest = codes[g], codes[others].reshape(-1, codes.shape[-1])
        ranks = rankdata(np.concatenate([own, rest]), axis=0)[: len(own)].sum(
            0
        )  # ties, as of silent latents, share
        found.append((ranks - len(own) * (len(own) + 1) / 2) / (len(own) * len(rest)))
    return np.stack(found)


def agreement(basis: Basis, shift: Shift, asked: Prompted, contrast: torch.Tensor) -> np.ndarray:
    """Cosine, per group, of what the shift writes into the survey block on average with what a group prompt changes."""
    part = (shift.scores @ shift.axes.T).to(asked.codes)
    wrote = part
    if shift.kind == "multiplicative":
        wrote = asked.codes * torch.expm1(part)
    elif shift.kind == "gated":
        wrote = asked.fires * part
    found = torch.nn.functional.cosine_similarity(wrote @ basis.rows, contrast @ basis.rows, dim=1)
    return found.cpu().numpy()


def stability(shifts: Sequence[Shift], top: int = 50) -> tuple[float, float]:
    """Over pairs of seeds: mean Jaccard of the `top` latents of the group part, and mean cosine of the deltas."""
    parts = [s.scores @ s.axes.T for s in shifts]
    sets = []
    for part in parts:
        chosen = np.zeros(part.shape[1], dtype=bool)
        chosen[part.norm(dim=0).topk(min(top, part.shape[1])).indices.numpy()] = True
        sets.append(chosen)
    pairs = [(i, j) for i in range(len(parts)) for j in range(i)]
    if not pairs:
        return float("nan"), float("nan")
    overlap = np.mean([jaccard(sets[i], sets[j]) for i, j in pairs])
    cosine = np.mean(
        [
            torch.nn.functional.cosine_similarity(parts[i], parts[j], dim=1).mean().item()
            for i, j in pairs
        ]
    )
    return float(overlap), float(cosine)
