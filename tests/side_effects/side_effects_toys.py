"""Tiny models and SAEs whose side effects are known."""

from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from sae_research import saes
from sae_research.models import LanguageModel
from sae_research.screening import predictors
from sae_research.studies.side_effects.settings import Settings

D, HOOK, READ = 32, "blocks.1.hook_resid_post", "blocks.3.hook_resid_post"
SETTINGS = replace(
    Settings(),
    protocol="replication",
    n_contexts=256,
    context_length=8,
    n_features=60,
    frequency_band=(0.01, 0.9),
    contexts_per_bucket=4,
    n_downstream_latents=96,
    dose_norm_fraction=0.2,
    tau_quantile=0.02,
    n_bootstrap=200,
    n_jacobian_contexts=4,
)


def make_sae(
    model: LanguageModel,
    hook: str,
    decoder: torch.Tensor,
    bias: float = 0.0,
    kind: str = "relu",
    k: int = 6,
):
    """A tied SAE with these decoder rows."""
    import sae_lens

    given = {
        "d_in": decoder.shape[1],
        "d_sae": len(decoder),
        "metadata": saes.metadata(model, hook),
    }
    if kind == "relu":
        sae = sae_lens.StandardSAE(sae_lens.StandardSAEConfig(**given))
    elif kind == "topk":
        sae = sae_lens.TopKSAE(sae_lens.TopKSAEConfig(k=k, **given))
    else:
        sae = sae_lens.JumpReLUSAE(sae_lens.JumpReLUSAEConfig(**given))
        sae.threshold.data = torch.full((len(decoder),), 0.3)
    sae.W_dec.data = decoder.clone()
    sae.W_enc.data = decoder.T.clone()
    sae.b_enc.data = torch.full((len(decoder),), bias)
    return sae.eval().requires_grad_(False)


def silence_upper_blocks(model: LanguageModel, start: int) -> LanguageModel:
    """Make the blocks from `start` on add nothing to the residual."""
    with torch.no_grad():
        for layer in model.bridge.original_model.model.layers[start:]:
            for name, weight in layer.named_parameters():
                if "o_proj" in name or "down_proj" in name:
                    weight.zero_()
    return model


def unit(rows: torch.Tensor) -> torch.Tensor:
    """Rows of norm 1."""
    return rows / rows.norm(dim=1, keepdim=True)


def make_frame(n: int = 200, seed: int = 0) -> pd.DataFrame:
    """Predictors without any meaning, effect sizes and natural activations."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((n, len(predictors.ALL)))
    frame = pd.DataFrame(noise, columns=list(predictors.ALL))
    frame["E"] = rng.uniform(1, 2, n)
    frame["natural_mean"] = rng.standard_normal(n)
    return frame


def make_labelled(n: int = 300) -> pd.DataFrame:
    """The same with labels that crowding decides."""
    frame = make_frame(n)
    rng = np.random.default_rng(4)
    frame["S_abs"] = 0.5 + 0.1 * frame["crowding"] + 0.02 * rng.standard_normal(n)
    frame["C"] = np.exp(1 - 0.5 * frame["crowding"] + 0.05 * rng.standard_normal(n))
    C_per_E = frame["C"] / frame["E"]
    return frame.assign(S=frame["S_abs"], C_per_E=C_per_E, KL_per_E=rng.random(n))
