"""Settings of study 2; defaults are the paper's values."""

from typing import ClassVar

import pydantic

from sae_research.config import Share, settings
from sae_research.screening.settings import ScreenSettings, check_ascending


@settings
class Settings(ScreenSettings):
    """Study 2: predict steering side effects before steering."""

    ORDER: ClassVar[int] = 2
    RENAMED: ClassVar[dict[str, str]] = {
        "subjects": "models",
        "primaries": "primary_saes",
        "downstream": "downstream_saes",
        "contexts": "n_contexts",
        "fresh": "n_fresh_contexts",
        "length": "context_length",
        "features": "n_features",
        "fewest": "min_eligible_features",
        "band": "frequency_band",
        "each": "contexts_per_bucket",
        "panel": "n_downstream_latents",
        "taus": "tau_multiples",
        "panel_share": "tau_quantile",
        "residual_share": "dose_norm_fraction",
        "doses": "dose_multiples",
        "held_out": "holdout_fraction",
        "matched": "effect_quantiles",
        "group": "group_size",
        "splits": "n_splits",
        "permutations": "n_permutations",
        "draws": "n_bootstrap",
        "linear_contexts": "n_jacobian_contexts",
        "prompt": "output_score_prompt",
    }

    models: tuple[str, ...] = ("gpt2-small", "pythia-70m", "gemma-2-2b", "llama-3.1-8b")
    """Models with their SAEs, by their name in the catalogue (abstract)."""
    primary_saes: tuple[str, ...] = (
        "primary",
        "llama-3.1-8b-32x/primary",
        *(f"width_{768 * 2**i}" for i in range(8)),
    )
    """Roles of the SAEs whose features are steered, the main one first; a model skips those it
    lacks (App. G: 32x; GPT-2's ladder of widths is ours and serves the comparison of widths)."""
    null_saes: tuple[str, ...] = ()
    """Roles of null dictionaries, which are screened as the others and have no vote (ours)."""
    downstream_saes: tuple[str, ...] = ("downstream",)
    """Roles of the SAE in which side effects are counted: the first that a model has."""
    n_fresh_contexts: int = 512
    """Contexts of other text for the frozen confirmation."""
    holdout_fraction: Share = 0.4
    """Fraction of the features that screening chooses from, unseen in training."""
    effect_quantiles: tuple[Share, Share] = (0.1, 0.9)
    """Quantiles of the predicted effect size between which held-out features are kept, so that
    groups are matched in effect size."""
    group_size: int = 50
    """Features per group of the screening; at most a third of the effect-matched ones."""
    n_splits: int = 200
    """Random splits of the screening (the paper has one)."""
    n_permutations: int = 200
    """Label permutations of the null."""
    n_bootstrap: int = 10_000
    """Bootstrap draws of every interval over features."""
    output_score_prompt: str = "From my experience,"
    """Prompt of the output score (Arad et al. 2025); toy models use the beginning of their first
    context."""

    @pydantic.model_validator(mode="after")
    def _check_quantiles(self) -> "Settings":
        return check_ascending(self, "effect_quantiles")
