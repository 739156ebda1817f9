"""Settings of a screen; defaults are those of the paper that study 2 reproduces."""

from typing import Literal

import pydantic

from sae_research.config import Share, settings


@settings
class ScreenSettings:
    """Which features are steered, where, how far, and what counts as an effect."""

    protocol: Literal["author", "replication"] = "author"
    """Contexts, sampling, co-activation and residualisation as published, or as its replication
    corrected them."""
    n_contexts: int = 2048
    """Clean contexts."""
    context_length: int = 48
    """Tokens per context, BOS included; the last one is steered."""
    n_features: int = 300
    """Features that are steered, per SAE."""
    min_eligible_features: int | None = None
    """If set, an SAE with fewer eligible features than `n_features` but at least this many has all
    of them steered."""
    frequency_band: tuple[Share, Share] = (0.002, 0.5)
    """Final-token firing frequencies between which a feature is eligible."""
    contexts_per_bucket: int = 16
    """Every feature is steered in the same random contexts, three times as many as this (ours).
    As published it is also steered in contexts of its own, so many from each of three buckets: most
    active, least active, random."""
    n_downstream_latents: int = 2048
    """Downstream latents, the most frequent ones, in which effects are counted."""
    tau: float = 0.05
    """A downstream latent counts as moved if its activation changes by more than this."""
    tau_multiples: tuple[float, ...] = (0.2, 0.4, 2.0, 4.0)
    """Further thresholds, as multiples of the first (the replication's .01 to .2)."""
    tau_quantile: Share | None = None
    """If set, tau is the change that this fraction of downstream latents exceeds (an upper
    quantile), in place of `tau`."""
    dose: float = 1.0
    """Multiple of c, the median over features of max(95 % quantile of the activation, 1). A step is
    as long for every feature (ours): c times the median norm of their decoder rows."""
    dose_norm_fraction: float | None = None
    """If set, one dose makes the median steering step this fraction of the mean residual's norm, in
    place of the above."""
    dose_multiples: tuple[float, ...] = (0.5, 2.0, 4.0)
    """Further doses, as multiples of the first."""
    selector: str = "full_no_magnitude"
    """Predictor set that screens (published: this one, but geometry_only for GPT-2)."""
    clean_score: Literal["log_over_effect", "log_of_ratio"] = "log_over_effect"
    """z(|S|) minus z(ln(1+C)/E), or minus z(ln(1+C/E)) as published for Llama."""
    n_jacobian_contexts: int = 16
    """Clean contexts whose Jacobians the linear forecast uses."""

    @pydantic.model_validator(mode="after")
    def _check_band(self) -> "ScreenSettings":
        return check_ascending(self, "frequency_band")


def check_ascending(settings: "ScreenSettings", name: str) -> "ScreenSettings":
    """The settings, if the pair of numbers `name` ascends."""
    low, high = getattr(settings, name)
    if low >= high:
        raise ValueError(f"`{name}` must be two numbers, the smaller first")
    return settings
