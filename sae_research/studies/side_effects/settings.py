"""Settings of study 2; defaults are the paper's values."""

from typing import ClassVar, Literal

from sae_research.config import settings


@settings
class Settings:
    """Study 2: predict steering side effects before steering."""

    ORDER: ClassVar[int] = 2
    RENAMED: ClassVar[dict[str, str]] = {"subjects": "models"}

    models: tuple[str, ...] = ("gpt2-small", "pythia-70m", "gemma-2-2b", "llama-3.1-8b")
    """Models with their SAEs, by their name in the catalogue (abstract)."""
    primaries: tuple[str, ...] = (
        "primary",
        "llama-3.1-8b-32x/primary",
        *(f"width_{768 * 2**i}" for i in range(8)),
    )
    """Roles of the dictionaries that are screened, the main one first; a subject skips those it lacks (App. G: 32x; the
    ladder of widths of GPT-2 is ours and serves the comparison of widths alone)."""
    downstream: tuple[str, ...] = ("downstream",)
    """Role of the dictionary in which side effects are counted, whatever the primary: the first that a subject has."""
    protocol: Literal["author", "replication"] = "author"
    """Contexts, sampling, co-activation and residualisation as published, or as its replication corrected them."""
    contexts: int = 2048
    """Clean contexts."""
    fresh: int = 512
    """Contexts of other text for the frozen confirmation."""
    length: int = 48
    """Tokens of a context, BOS included; the last one is steered."""
    features: int = 300
    """Features that are steered, of each dictionary."""
    fewest: int | None = None
    """If set, a dictionary with fewer eligible features than that is screened whole, if it has at least this many."""
    band: tuple[float, float] = (0.002, 0.5)
    """Final-token frequencies between which a feature is eligible."""
    each: int = 16
    """Contexts of each sort a feature: most active, least active, random."""
    panel: int = 2048
    """Downstream latents, the most frequent ones, in which effects are counted."""
    tau: float = 0.05
    """A downstream latent counts as moved if its activation changes by more."""
    taus: tuple[float, ...] = (0.2, 0.4, 2.0, 4.0)
    """Further thresholds, as multiples of the first (the replication's .01 to .2)."""
    panel_share: float | None = None
    """If set, tau is the change that this share of the panel exceeds on average, in place of `tau`."""
    dose: float = 1.0
    """Alpha: multiple of the dose c, the median over features of max(95 % quantile of the activation, 1)."""
    residual_share: float | None = None
    """If set, c makes the median decoder row this share of the mean residual's length, in place of the above."""
    doses: tuple[float, ...] = (0.5, 2.0, 4.0)
    """Further doses, as multiples of the first."""
    selector: str = "full_no_magnitude"
    """Predictor set that screens (published: this one, but geometry_only for GPT-2)."""
    held_out: float = 0.4
    """Share of the features that screening chooses from, unseen in training."""
    matched: tuple[float, float] = (0.1, 0.9)
    """Quantiles of the predicted effect between which held-out features are kept, so that groups differ in no dose."""
    group: int = 50
    """Features asked for in each group of the screening; at most a third of the effect-matched ones."""
    clean_score: Literal["log_over_effect", "log_of_ratio"] = "log_over_effect"
    """z(|S|) less z(ln(1+C)/E), or less z(ln(1+C/E)) as published for Llama."""
    splits: int = 200
    """Random splits of the screening (the paper has one)."""
    permutations: int = 200
    """Label permutations of the null."""
    draws: int = 10_000
    """Bootstrap draws of every interval over features."""
    linear_contexts: int = 16
    """Clean contexts whose Jacobians the linear forecast uses."""
    prompt: str = "From my experience,"
    """Prompt of the output score (Arad et al. 2025); specimens use the beginning of their first context."""
