"""What steering a feature does at the final token: spread, effect size, stability, divergence.

Sections 3.3 and 3.4 of the paper. D_x = l1 - l0 is the change of the logits in context x, u the
activations of the panel, the downstream latents in which effects are counted.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from sae_research.last_token import LastToken

EPS = 1e-8
ALL_ROWS = slice(None)


@dataclass
class SteeringEffects:
    """What each direction does in each of its contexts."""

    contexts: torch.Tensor
    """[directions, contexts]: which context each column of each row was."""
    counts: torch.Tensor
    """[directions, contexts, thresholds]: panel latents that moved by more than each tau."""
    panel_counts: torch.Tensor
    """[directions, contexts, sizes]: at the first threshold, for the most frequent latents only."""
    l2: torch.Tensor
    """[directions, contexts]: Euclidean norm of u1 - u0."""
    moved: torch.Tensor
    """[directions, contexts]: effective number of moved latents, exp of |u1 - u0|'s entropy."""
    clean: torch.Tensor
    """[used contexts, d]: final states before steering; `row_of` finds them."""
    row_of: torch.Tensor
    """Row of `clean` for each context of the pool."""
    steered: torch.Tensor
    """[directions, contexts, d]: final states after steering."""
    shift: torch.Tensor
    """[directions, panel]: mean of u1 - u0."""

    def take(self, rows: slice) -> "SteeringEffects":
        """The same for some directions."""
        shared = ("clean", "row_of")
        own = {name: value[rows] for name, value in vars(self).items() if name not in shared}
        return replace(self, **own)

    def states(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Final states of one direction before and after steering, [contexts, d] each."""
        return self.clean[self.row_of[self.contexts[row]]], self.steered[row]


@torch.no_grad()
def measure_effects(
    engine: LastToken,
    encode_panel: Callable[[torch.Tensor], torch.Tensor],
    tokens: torch.Tensor,
    directions: torch.Tensor,
    contexts: torch.Tensor,
    taus: tuple[float, ...],
    panel_sizes: tuple[int, ...] = (),
) -> SteeringEffects:
    """Add each of `directions` [K, d] to the last token of each of its `contexts` [K, n]."""
    K, n = contexts.shape
    device = directions.device
    d = directions.shape[1]
    contexts = contexts.to(device)
    flat = contexts.flatten()
    used = torch.unique(flat)
    row_of = torch.zeros(len(tokens), dtype=torch.long, device=device)
    row_of[used] = torch.arange(len(used), device=device)
    counts = torch.zeros(K * n, len(taus), device=device)
    panel_counts = torch.zeros(K * n, len(panel_sizes), device=device)
    l2, moved = (torch.zeros(K * n, device=device) for _ in range(2))
    clean = torch.zeros(len(used), d, device=device)
    steered = torch.zeros(K * n, d, device=device)
    shift: torch.Tensor | None = None
    with tqdm(total=K * n, desc="steering", leave=False) as progress:
        for rows, before, after in engine.sweep(tokens, contexts, directions):
            change = encode_panel(after.reads[0]) - encode_panel(before.reads[0])
            size = change.abs()
            for i, tau in enumerate(taus):
                counts[rows, i] = (size > tau).sum(1).float()
            for i, p in enumerate(panel_sizes):
                panel_counts[rows, i] = (size[:, :p] > taus[0]).sum(1).float()
            l2[rows] = size.norm(dim=1)
            total = size.sum(1)
            share = size / (total[:, None] + EPS)
            moved[rows] = torch.exp(-torch.special.xlogy(share, share).sum(1)) * (total > EPS)
            clean[row_of[flat[rows]]] = before.final
            steered[rows] = after.final
            shift = torch.zeros(K, change.shape[1], device=device) if shift is None else shift
            shift.index_add_(0, rows // n, change / n)
            progress.update(len(rows))
    found = (x.view(K, n, *x.shape[1:]) for x in (counts, panel_counts, l2, moved))
    return SteeringEffects(contexts, *found, clean, row_of, steered.view(K, n, d), shift)


def compute_stability(gram: torch.Tensor) -> dict[str, float]:
    """Effect size E, its variation, and the stabilities S, from the products <D_x, D_y>.

    S is the mean cosine of D_x with the mean over contexts, S_abs that of absolute cosines, S_loo
    with the context left out of the mean; pair and pair_abs are the cosines of pairs of contexts.
    """
    gram = gram.double()
    size = gram.diagonal().clamp(min=0).sqrt()
    found = {"E": float(size.mean()), "E_cv": float(size.std(correction=0) / (size.mean() + EPS))}
    nonzero = size > EPS
    gram = gram[nonzero][:, nonzero]
    size = size[nonzero]
    n = len(size)
    if n < 2:
        return found | dict.fromkeys(("S", "S_abs", "pair", "pair_abs", "S_loo"), 0.0)
    to_sum = gram.sum(1)  # <D_x, sum of all D>
    total = to_sum.sum()
    cosine_to_mean = to_sum / (size * total.clamp(min=EPS**2).sqrt())
    cosine = gram / (size[:, None] * size)
    off_diagonal = ~torch.eye(n, dtype=torch.bool, device=gram.device)
    size_of_others = (total - 2 * to_sum + gram.diagonal()).clamp(min=EPS**2).sqrt()
    cosine_to_others = (to_sum - gram.diagonal()) / (size * size_of_others)
    return found | {
        "S": float(cosine_to_mean.mean()),
        "S_abs": float(cosine_to_mean.abs().mean()),
        "pair": float(cosine[off_diagonal].mean()),
        "pair_abs": float(cosine[off_diagonal].abs().mean()),
        "S_loo": float(cosine_to_others.mean()),
    }


def simulate_noise(n_contexts: int, draws: int = 200, d: int = 1000) -> dict[str, np.ndarray]:
    """Stabilities of effects without any direction: the floor of S, about 1/sqrt(n), is not zero
    because each D_x is part of the mean that it is compared with.
    """
    torch.manual_seed(0)
    found = [compute_stability(D @ D.T) for D in torch.randn(draws, n_contexts, d)]
    return {name: np.array([f[name] for f in found]) for name in ("S", "S_abs", "S_loo")}


@torch.no_grad()
def compute_labels(
    engine: LastToken, effects: SteeringEffects, divergence: bool = True
) -> dict[str, np.ndarray]:
    """All labels of every direction: from the panel, from the logits, and C_per_E = C / (E + eps).

    Without a softcap D = dz W_U, so <D_x, D_y> = dz_x G dz_y and no tensor has vocabulary size.
    """
    G = engine.W_U @ engine.W_U.T if engine.softcap is None else None
    rows = []
    for row in range(len(effects.contexts)):
        before, after = effects.states(row)
        if G is not None:
            dz = after - before
            labels = compute_stability(dz @ G @ dz.T)
        if G is None or divergence:
            l0 = engine.logits(before)
            l1 = engine.logits(after)
        if G is None:
            labels = compute_stability((l1 - l0) @ (l1 - l0).T)
        if divergence:
            p0 = l0.log_softmax(-1)
            p1 = l1.log_softmax(-1)
            labels["KL"] = float((p0.exp() * (p0 - p1)).sum(-1).mean())
            labels["KL_reverse"] = float((p1.exp() * (p1 - p0)).sum(-1).mean())
            labels["KL_per_E"] = labels["KL"] / (labels["E"] + EPS)
        rows.append(labels)
    panel = {"C": effects.counts[:, :, 0], "L2": effects.l2, "moved": effects.moved}
    found = {name: value.mean(1).double().cpu().numpy() for name, value in panel.items()}
    found |= {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return found | {"C_per_E": found["C"] / (found["E"] + EPS)}


def compute_clean_score(
    frame: pd.DataFrame, formula: str = "log_over_effect", rows: np.ndarray | slice = ALL_ROWS
) -> np.ndarray:
    """z(|S|) - z(ln(1+C)/E) (GPT-2, Pythia, Gemma) or z(|S|) - z(ln(1+C/E)) (`log_of_ratio`,
    Llama), both standardised by the mean and spread of `rows`.
    """
    S, C, E = (frame[name].to_numpy(float) for name in ("S_abs", "C", "E"))
    E = E + 1e-8
    spread = np.log1p(C / E) if formula == "log_of_ratio" else np.log1p(C) / E

    def z(x: np.ndarray) -> np.ndarray:
        return (x - x[rows].mean()) / (x[rows].std() + 1e-12)

    return z(S) - z(spread)


def draw_random_directions(directions: torch.Tensor, seed: int) -> torch.Tensor:
    """One random direction of the same norm for each given one: the control of every claim."""
    noise = torch.from_numpy(np.random.default_rng(seed).standard_normal(tuple(directions.shape)))
    noise = noise.to(directions)
    return noise / noise.norm(dim=1, keepdim=True) * directions.norm(dim=1, keepdim=True)


@torch.no_grad()
def choose_tau(
    engine: LastToken,
    encode_panel: Callable[[torch.Tensor], torch.Tensor],
    tokens: torch.Tensor,
    directions: torch.Tensor,
    contexts: torch.Tensor,
    upper_quantile: float,
) -> tuple[float, float]:
    """The change that this fraction of the panel exceeds, and the fraction that changes at all.

    A TopK SAE of few active latents may leave most of its panel at zero: where the quantile is
    zero, tau is the median of the changes that are not.
    """
    sizes = torch.cat(
        [
            (encode_panel(after.reads[0]) - encode_panel(before.reads[0])).abs().flatten()
            for _, before, after in engine.sweep(tokens, contexts, directions)
        ]
    )
    changed = sizes[sizes > 1e-6]
    tau = float(sizes.kthvalue(max(1, round((1 - upper_quantile) * len(sizes)))).values)
    if tau <= 1e-6:
        tau = float(changed.median()) if len(changed) else 1e-6
    return tau, len(changed) / len(sizes)
