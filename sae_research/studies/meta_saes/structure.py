"""What a decoder is made of: composition rate, nearest neighbours, recovery of a planted truth."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sae_research import activations, training
from sae_research.training import SAETraining

if TYPE_CHECKING:
    from sae_lens import TrainingSAE


META, EVALUATOR = 1_000_000, 2_000_000
"""Added to a run's seed for its meta SAE and for the fresh ones that judge: from the same seed they
would start as copies of the primary's own first rows.
"""


def train_meta(
    rows: Tensor, d_sae: int, k: float, settings: SAETraining, seed: int, aux: float = 1.0
) -> "TrainingSAE":
    """A BatchTopK SAE of unit rows [n, d], trained on batches of them."""
    from sae_research.studies.meta_saes import decomposable

    config = decomposable.meta_config(
        rows.shape[1], d_sae, k, aux_loss_coefficient=aux, device=str(rows.device)
    )
    batches = activations.batches(rows, settings.batch_size, settings.steps, seed)
    return training.train({"meta": config}, batches, settings, seed)["meta"]


@torch.no_grad()
def explained_variance(meta: "TrainingSAE", rows: Tensor) -> float:
    """Share of the rows' variance about their mean that the meta SAE rebuilds."""
    error = (rows - meta(rows)).square().sum()
    return 1 - (error / (rows - rows.mean(0)).square().sum()).item()


def composition_rate(rows: Tensor, steps: int, seed: int, evaluators: int = 3) -> float:
    """Variance of live decoder rows that fresh meta SAEs explain: a quarter of the latents, 4
    active (SAEBench's meta_structure), mean over `evaluators`; lower is more atomic.
    """
    settings = SAETraining(
        steps=steps,
        batch_size=min(1024, len(rows)),
        lr=5e-4,
        warmup_steps=0,
        decay=0.0,
        centre=False,
    )
    rows = normalize(rows, dim=-1)
    found = 0.0
    for i in range(evaluators):
        own = seed + EVALUATOR + i
        meta = train_meta(rows, math.ceil(len(rows) / 4), 4, settings, own)
        found += explained_variance(meta, rows) / evaluators
    return found


def recover(rows: Tensor, codes: Tensor, directions: Tensor, truth: Tensor) -> dict[str, float]:
    """How well live latents [n, d], with codes [tokens, n], stand for planted directions [m, d].

    Matching coefficient and uniqueness are SAELens', as are precision and recall of each latent for
    the direction nearest to it.
    """
    from sae_lens.synthetic.evals import (
        compute_classification_metrics,
        feature_uniqueness,
        mean_correlation_coefficient,
    )

    found = compute_classification_metrics(codes, truth, rows, directions)
    # the matched cosines, over all directions: those that find no row count as 0
    matched = min(len(rows), len(directions)) / len(directions)
    return {
        "mcc": mean_correlation_coefficient(rows, directions) * matched,
        "uniqueness": feature_uniqueness(rows, directions),
        "precision": found.precision,
        "recall": found.recall,
        "f1": found.f1_score,
    }
