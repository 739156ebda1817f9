"""SAEs like the committed ones of the toy text model: from further seeds, or null dictionaries."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from sae_research import activations, saes, training
from sae_research.models import LanguageModel
from sae_research.world.text.documents import make_rows
from sae_research.world.toy_saes import ToySAEs

if TYPE_CHECKING:
    from sae_lens import SAE


def train_like(
    sae: "SAE", model: LanguageModel, recipe: ToySAEs, seed: int, nulls: tuple[str, ...] = ()
) -> "dict[str, SAE]":
    """The TopK SAE `sae` trained again from another seed, as "SAE", or null dictionaries of it.

    `model` is the one whose residuals `sae` was trained on; the text is drawn anew.
    """
    rng = np.random.default_rng([seed, 56])
    rows = torch.from_numpy(make_rows(recipe.documents + recipe.calibration, rng).tokens).long()
    hook = saes.hook_of(sae)
    acts, held_out = (
        activations.collect(model, part, hook, batch=256)
        for part in rows.split([recipe.documents, recipe.calibration])
    )
    about = saes.metadata(model, hook)
    config = training.topk(model.d_model, sae.cfg.d_sae, sae.cfg.k, metadata=about)
    how = recipe.training
    found = training.train(
        dict.fromkeys(nulls or ("SAE",), config),
        activations.batches(acts, how.batch_size, how.steps, seed),
        how,
        seed,
        {null: training.freeze(null) for null in nulls},
    )
    return {name: training.inference(trained, held_out) for name, trained in found.items()}
