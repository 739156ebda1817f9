"""Settings of study 4; defaults are the paper's values for GPT-2 large."""

from dataclasses import asdict, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pydantic

from sae_research.config import settings

if TYPE_CHECKING:
    from sae_research.training import SAETraining

VECTORS = "vectors"
"""The name, among models, of sparse sums of planted directions."""
RELEASE = {"meta_k": 4, "n_primary_steps": 100, "n_meta_steps": 10}
"""Where the released scripts differ from the paper (they also train on 200 M tokens)."""


@settings
class Training:
    """How an SAE is trained, as `training.SAETraining`; defaults are the paper's 100 M tokens."""

    steps: int = 24_414
    """Training steps."""
    batch_size: int = 4096
    """Activations a step."""
    lr: float = 3e-4
    """Peak learning rate of Adam, of the meta SAE too."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Momentum terms of Adam."""
    warmup_steps: int = 0
    """Steps of linear warm-up of the learning rate."""
    decay: float = 0.0
    """Last share of the steps, in which the primary's learning rate falls to a hundredth."""
    dead_window: int = 5
    """Steps without firing after which a latent is dead."""
    centre: bool = False
    """Whether the decoder bias starts at the first batch's mean instead of zero."""

    def plan(self) -> "SAETraining":
        """For `training.train`."""
        from sae_research.training import SAETraining

        return SAETraining(**asdict(self))


DEPARTURES: dict[str, dict[str, Any]] = {
    "gemma-2-9b": {
        "d_sae": 65_536,
        "k": 100.0,
        "meta_d_sae": 5000,
        "grid_sigma2": (1.0, 3.0),
        "training": Training(steps=18_310),
        "phi_tokens": 5_000_000,
    },
    "gpt2-small": {"d_sae": 12_288, "k": 32.0, "meta_d_sae": 1024, "meta_k": 4.0},
}
"""What the paper (section 6) and the development runs (GPT-2 small) do differently by model."""


@settings
class Vectors:
    """Sums of planted directions in a hierarchy, from SAELens' generators."""

    d_in: int = 32
    """Dimensions."""
    n_features: int = 120
    """Planted directions; parents with their children, and single ones."""
    n_parents: int = 24
    """Directions with children."""
    n_children: int = 3
    """Children of each parent: they are active only where it is."""
    probabilities: tuple[float, float, float] = (0.06, 0.25, 0.04)
    """How often parents, children given their parent, and single directions are active."""
    rows: int = 120_000
    """Vectors to train on."""
    held_out: int = 20_000
    """Vectors for calibration, and as many for evaluation."""
    d_sae: int = 128
    """Latents."""
    k: float = 4.0
    """Mean active latents."""
    meta_d_sae: int = 12
    """Latents of the meta SAE."""
    meta_k: float = 2.0
    """Mean active latents of the meta SAE."""
    training: Training = field(
        default_factory=lambda: Training(steps=2500, batch_size=512, lr=1e-3)
    )
    """How SAEs are trained."""


@settings
class Settings:
    """Study 4: joint training with a decomposability penalty."""

    ORDER: ClassVar[int] = 4
    NOT_MODELS: ClassVar[tuple[str, ...]] = (VECTORS,)
    RENAMED: ClassVar[dict[str, str]] = {"subjects": "models"}

    models: tuple[str, ...] = ("gpt2-large", "gemma-2-9b")
    """Models whose residual stream the SAEs are trained on (sections 4 and 6), or `vectors`."""
    hook: str | None = None
    """If set, the place in the residual stream, instead of the catalogue's `train`."""
    protocol: Literal["paper", "release"] = "paper"
    """Whether the paper's values or those of its released scripts hold where the two differ."""
    d_sae: int = 20_480
    """Latents of the primary SAE."""
    k: float = 64.0
    """Mean active latents a token."""
    meta_d_sae: int = 1800
    """Latents of the meta SAE."""
    meta_k: float = 8.0
    """Mean active latents of the meta SAE for a decoder row."""
    n_primary_steps: int = 10
    """Steps of the primary before the meta SAE's turn."""
    n_meta_steps: int = 5
    """Steps of the meta SAE in its turn, each on the whole decoder."""
    lambda2: float = 0.3
    """Weight of the penalty, for an MSE that is a mean over d (the paper's choice of nine)."""
    sigma2: float = 1.0
    """Width of the penalty's kernel (likewise)."""
    grid_lambda2: tuple[float, ...] = (0.1, 0.3, 1.0)
    """Weights of the grid (Table 1)."""
    grid_sigma2: tuple[float, ...] = (0.3, 1.0, 3.0)
    """Widths of the grid."""
    penalty_warmup_steps: int = 0
    """Steps over which the weight rises from zero; the paper has none."""
    encoder_bias: bool = False
    """Whether the encoder has a bias; the paper's has one that never enters its codes."""
    aux_loss_coefficient: float = 1 / 32
    """Weight of the loss that revives dead latents."""
    ortsae_gamma: float = 0.25
    """Weight of OrtSAE's orthogonality (its paper's value)."""
    matryoshka_shares: tuple[float, ...] = (0.0625, 0.125, 0.25, 0.5)
    """Widths of Matryoshka's inner SAEs as shares of `d_sae`."""
    smaller_k: tuple[float, ...] = (0.9, 0.75)
    """Solo SAEs of fewer active latents, as shares of `k`: between them one rebuilds as badly as
    the joint one."""
    training: Training = field(default_factory=Training)
    """How SAEs are trained."""
    arms: tuple[str, ...] = (
        *("random meta", "shuffled meta", "OrtSAE", "Matryoshka", "smaller k", "nulls"),
    )
    """What is trained beside `solo` and `joint`, for every seed."""
    seeds: int = 5
    """Seeds of initial weights, text and order of batches (ours; the paper has one or four)."""
    grid_seeds: int = 5
    """How many of them have the grid too."""
    grid_models: tuple[str, ...] = ("gpt2-large", "gemma-2-9b")
    """Models on which the grid is run, with `penalty 0` and `lazy meta` (which rebuilds the rows
    once in `n_primary_steps`)."""
    train_rows: int = 787_402
    """Rows of text to train on (each pass shuffles anew)."""
    row_tokens: int = 128
    """Tokens of a row, BOS included."""
    buffer_rows: int = 32_768
    """Rows whose residuals are kept and shuffled at once."""
    calibration_tokens: int = 5_000_000
    """Tokens on which every SAE's threshold is set."""
    phi_tokens: int = 35_000_000
    """Held-out tokens on which co-occurrence is counted."""
    loss_rows: int = 3200
    """Held-out rows on which the model's loss is measured."""
    tail: tuple[float, ...] = (0.01, 0.05)
    """Values of phi beyond which a pair counts as the positive tail."""
    split_phi: float = 0.3
    """A latent splits if two latents of the other SAE reach this phi with it and stay below it
    with each other (ours)."""
    composition_steps: int = 1500
    """Steps of the fresh meta SAE that measures the composition rate (SAEBench)."""
    n_interpreted: int = 1000
    """Latents of each SAE that are explained and scored."""
    n_examples: int = 50
    """Contexts that an explanation is made from."""
    n_test_examples: int = 25
    """Contexts of each kind (active, neighbour's) on which it is scored."""
    context_length: int = 32
    """Tokens of a context (Delphi's)."""
    interpretation_tokens: int = 5_000_000
    """Held-out tokens that contexts come from."""
    explainer: str | None = None
    """If set, a language model (as `catalogue.load_model` takes it) that explains and judges in the
    token rule's place; its answers are kept in data/private and replayed."""
    own_latent_f1: float = 0.7
    """From this held-out F1 on, a planted sense has a latent of its own (ours)."""
    sense_documents: int = 2000
    """Documents with polysemous words on which senses are scored."""
    vectors: Vectors = field(default_factory=Vectors)
    """The ground of planted directions."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> "Settings":
        for fewer, more in (("k", "d_sae"), ("meta_k", "meta_d_sae"), ("meta_d_sae", "d_sae")):
            if getattr(self, fewer) >= getattr(self, more):
                raise ValueError(f"`{fewer}` must be below `{more}`")
        return self


def for_model(given: Settings, model: str) -> Settings:
    """The settings with what the paper does differently for this model, and the chosen protocol."""
    own = dict(DEPARTURES.get(model, {}))
    if model == VECTORS:
        shared = ("d_sae", "k", "meta_d_sae", "meta_k", "training")
        own = {name: getattr(given.vectors, name) for name in shared}
    if given.protocol == "release":
        own |= RELEASE
    return replace(given, **own)
