"""What a shift is made of (section 5.5): its latents in context, and how much of the effect they carry."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

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


@torch.no_grad()
def latents(bench: Bench, basis: Basis, shift: Shift, axis: int, top: int = 5, contexts: int = 3) -> list[Latent]:
    """The latents with the largest weights on one axis, weighted by how strongly they act on the survey."""
    place = bench.prompts.editable("question")
    codes = basis.encode(bench.residual) * place[..., None]
    active = (codes > 0).flatten(0, 1).float().sum(0)
    mean = codes.flatten(0, 1).sum(0) / active.clamp(min=1)
    share = active / place.sum()
    effect = shift.axes[:, axis].abs() * mean * share.sqrt() * basis.rows.norm(dim=-1)
    found = []
    for index in effect.topk(min(top, int((effect > 0).sum()))).indices.tolist():
        where = _contexts(bench, codes[..., index], contexts)
        found.append(
            Latent(axis, index, float(shift.axes[index, axis]), float(mean[index]), float(share[index]), where)
        )
    return found


def _contexts(bench: Bench, codes: torch.Tensor, n: int, before: int = 4) -> tuple[str, ...]:
    """The text up to the tokens on which a latent fires most, each text once."""
    found: dict[str, None] = {}
    length = codes.shape[1]
    for flat in codes.flatten().argsort(descending=True)[: 20 * n].tolist():
        row, at = divmod(flat, length)
        words = [
            bench.lens.tokenizer.decode([t]).strip() for t in bench.prompts.tokens[row, max(1, at - before) : at + 1]
        ]
        if codes[row, at] > 0:
            found[" ".join([*words[:-1], f"[{words[-1]}]"])] = None
        if len(found) == n:
            break
    return tuple(found)


def causal_share(
    bench: Bench, basis: Basis, shift: Shift, exam: Exam, calibrated: np.ndarray, features: Sequence[int]
) -> dict[int, float]:
    """Share of the group part's gain in WD that the m largest latents alone keep."""

    def wd(of: Shift) -> float:
        found = bench.answers(basis, of.kind, of.deltas, exam.questions, of.positions).probabilities
        return float(exam.distance(found, exam.truth).mean())

    without, full = float(exam.distance(calibrated[None], exam.truth).mean()), wd(shift)
    gain = without - full
    return {m: (without - wd(shift.only(m))) / gain if abs(gain) > 1e-9 else float("nan") for m in features}


def selectivity(basis: Basis, asked: Prompted, targets_attributes: Sequence[str]) -> torch.Tensor:
    """AUC of each latent for telling prompts of each group from those of its siblings, [groups, M]."""
    with torch.no_grad():
        codes = basis.encode(asked.hidden)
    attributes = np.array(targets_attributes)
    found = []
    for g, attribute in enumerate(attributes):
        others = [h for h in range(len(attributes)) if attributes[h] == attribute and h != g]
        own, rest = codes[g], codes[others].flatten(0, 1)
        joined = torch.cat([own, rest])
        order = joined.argsort(dim=0).argsort(dim=0).double()
        ties = (joined[:, None] == 0).float().squeeze(1)  # silent latents tie at zero: their ranks are shared
        zeros = ties.sum(0)
        order = torch.where(joined == 0, (zeros - 1) / 2, order)
        u = order[: len(own)].sum(0) - len(own) * (len(own) - 1) / 2
        found.append(u / (len(own) * len(rest)))
    return torch.stack(found)


def agreement(basis: Basis, shift: Shift, asked: Prompted, contrast: torch.Tensor) -> np.ndarray:
    """Cosine, per group, of what the shift writes on average with what a group prompt changes in codes."""
    with torch.no_grad():
        codes = basis.encode(asked.hidden).mean(1)
    part = shift.scores @ shift.axes.T
    wrote = codes * torch.expm1(part) if shift.kind == "multiplicative" else part
    return torch.nn.functional.cosine_similarity(wrote @ basis.rows, contrast @ basis.rows, dim=1).numpy()


def stability(shifts: Sequence[Shift], top: int = 50) -> tuple[float, float]:
    """Over pairs of seeds: mean Jaccard of the `top` latents of the group part, and mean cosine of the deltas."""
    parts = [s.scores @ s.axes.T for s in shifts]
    sets = []
    for part in parts:
        chosen = np.zeros(part.shape[1], dtype=bool)
        chosen[part.norm(dim=0).topk(min(top, part.shape[1])).indices.numpy()] = True
        sets.append(chosen)
    pairs = [(i, j) for i in range(len(parts)) for j in range(i)]
    overlap = np.mean([jaccard(sets[i], sets[j]) for i, j in pairs])
    cosine = np.mean([torch.nn.functional.cosine_similarity(parts[i], parts[j], dim=1).mean().item() for i, j in pairs])
    return float(overlap), float(cosine)
