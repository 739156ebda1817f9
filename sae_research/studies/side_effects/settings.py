"""Settings of study 2; defaults are the paper's values."""

from typing import ClassVar, Literal

import pydantic

from sae_research.config import Share, settings


@settings
class Settings:
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
    protocol: Literal["author", "replication"] = "author"
    """Contexts, sampling, co-activation and residualisation as published, or as its replication
    corrected them."""
    n_contexts: int = 2048
    """Clean contexts."""
    n_fresh_contexts: int = 512
    """Contexts of other text for the frozen confirmation."""
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
    holdout_fraction: Share = 0.4
    """Fraction of the features that screening chooses from, unseen in training."""
    effect_quantiles: tuple[Share, Share] = (0.1, 0.9)
    """Quantiles of the predicted effect size between which held-out features are kept, so that
    groups are matched in effect size."""
    group_size: int = 50
    """Features per group of the screening; at most a third of the effect-matched ones."""
    clean_score: Literal["log_over_effect", "log_of_ratio"] = "log_over_effect"
    """z(|S|) minus z(ln(1+C)/E), or minus z(ln(1+C/E)) as published for Llama."""
    n_splits: int = 200
    """Random splits of the screening (the paper has one)."""
    n_permutations: int = 200
    """Label permutations of the null."""
    n_bootstrap: int = 10_000
    """Bootstrap draws of every interval over features."""
    n_jacobian_contexts: int = 16
    """Clean contexts whose Jacobians the linear forecast uses."""
    output_score_prompt: str = "From my experience,"
    """Prompt of the output score (Arad et al. 2025); toy models use the beginning of their first
    context."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> "Settings":
        for name in ("frequency_band", "effect_quantiles"):
            low, high = getattr(self, name)
            if low >= high:
                raise ValueError(f"`{name}` must be two numbers, the smaller first")
        return self
