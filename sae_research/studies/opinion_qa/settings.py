"""Settings of study 1; defaults are the papers' values."""

from dataclasses import field
from typing import ClassVar, Literal

from sae_research.config import Share, settings

# names of methods, as tables and figures show them
DENSE = "dense vector, low rank"
FREE = "dense vector, free"
RAW = "raw coordinates multiplicative"
PER_TOKEN = "per-token vector"
PER_GROUP = "per-group vector"
NO_KL = "no KL term"
MOVEMENT = "movement penalty"
TWO_STAGES = "two stages"
SPARSEST = "sparsest within one s.e."
SHUFFLED = "shuffled groups"
LAST_TOKEN = "last token only"
UNSTEERED = "no steering"
HUMAN_OVERALL = "human overall marginal"
MEANS = "difference of means, calibrated"
LORA_PER_GROUP = "LoRA, per group"

SPACES = ("SAE", "random", "PCA")
EDIT_KINDS = ("multiplicative", "gated", "additive")


@settings
class ShiftTraining:
    """How a shift of study 1 is trained; section numbers are those of its notebook's method
    page.
    """

    RENAMED: ClassVar[dict[str, str]] = {
        "movement": "movement_weight",
        "keep": "kl_weight",
        "sparsity": "sparsity_weight",
        "rate": "lr",
        "score_rate": "score_lr_mult",
        "batch": "batch_size",
        "groups": "n_groups",
        "documents": "n_documents",
        "kept_groups": "n_kl_groups",
        "look": "eval_every",
    }

    kind: Literal["additive", "multiplicative", "gated", "literal"] = "multiplicative"
    """How the shift acts on latent activations (section 3.3)."""
    positions: Literal["answer", "question", "all"] = "all"
    """Where it acts (section 3.3); never on the start token."""
    rank: int | None = 4
    """r of Delta_g = Delta_0 + U c_g; none gives every group a free vector of its own (section
    3.4).
    """
    calibration: Literal["first", "axes", "none"] = "first"
    """Delta_0: `first` is free and trained on the population's answers before the groups, `axes`
    is U c_0 and trained with them, `none` is zero (section 3.4).
    """
    movement_weight: float = 0.0
    """lam_rec: weight of the relative squared movement of the residual (section 3.5)."""
    kl_weight: float = 1.0
    """lam_keep: weight of KL(base || steered) on other text (section 3.5)."""
    sparsity_weight: float = 0.0
    """lam_sp: weight of the group lasso, a proximal step after each step of Adam (section 3.5)."""
    lr: float = 3e-3
    """Learning rate of Delta_0 and U (section 3.5)."""
    score_lr_mult: float = 3.0
    """Learning rate of c as a multiple of that of U (section 3.5: 1e-2 against 3e-3)."""
    calibration_steps: int = 500
    """Steps of the first stage, on four times as many prompts."""
    steps: int = 500
    """Steps of the second stage."""
    batch_size: int = 16
    """Prompts of a step; each is asked of every group of that step (section 3.5: questions B)."""
    n_groups: int = 8
    """Groups of a step, drawn anew each time if the survey has more (section 3.5: groups S)."""
    n_documents: int = 6
    """Documents of other text of a step, each under the shifts of `n_kl_groups` groups."""
    n_kl_groups: int = 3
    """Groups drawn for the documents of a step."""
    eval_every: int = 50
    """Steps between evaluations on the validation questions; the best one counts (section 3.5:
    early stopping).
    """


@settings
class LoRATraining:
    """SubPOP's adapters, the strongest published baseline of study 1."""

    RENAMED: ClassVar[dict[str, str]] = {"rate": "lr", "batch": "batch_size"}

    rank: int = 8
    """r (SubPOP)."""
    alpha: int = 32
    """Scale: the update is alpha / r times B A (SubPOP)."""
    dropout: Share = 0.05
    """Dropout on what enters the adapters (SubPOP)."""
    lr: float = 2e-4
    """Peak learning rate, with a cosine to zero (SubPOP)."""
    batch_size: int = 128
    """Prompts of a step (SubPOP)."""
    steps: int = 1000
    """Steps; SubPOP trains for 50 epochs."""


@settings
class Settings:
    """Study 1: survey answers of demographic groups through a sparse shift in SAE space."""

    ORDER: ClassVar[int] = 1
    READERS_DATA: ClassVar[str] = "data/private/opinion_qa"
    RENAMED: ClassVar[dict[str, str]] = {
        "subjects": "models",
        "once": "first_seed_only",
        "keeps": "kl_weights",
        "sparsities": "sparsity_weights",
        "harm": "max_off_task_loss",
        "thinning": "every_nth_cluster",
        "documents": "n_documents",
        "strengths": "coefficients",
        "features": "top_latents",
        "shots": "few_shot_sizes",
        "shot_steps": "few_shot_steps",
        "rounds": "n_holdout_rounds",
        "adapters": "lora_per_group",
        "fewest": "min_responses",
        "rows": "max_rows_per_forward",
    }

    models: tuple[str, ...] = ("gemma-2-2b", "gemma-2-2b-it")
    """Models with their SAEs, by their name in the catalogue, the one that claims speak of first
    (abstract: Gemma-2-2B; section 6: base against instruction-tuned).
    """
    sae: str = "primary"
    """Role of the SAE whose latents are shifted (section 3.1: block 12, width 16k)."""
    layers: tuple[str, ...] = ("layer_6", "layer_9", "layer_15", "layer_18", "layer_20", "layer_24")
    """Roles of SAEs at other layers, at which the headline shift is trained again; the deepest one
    stands for late layers in the hypotheses (section 6).
    """
    first_seed_only: tuple[str, ...] = (
        "SAE literal",
        PER_GROUP,
        TWO_STAGES,
        MOVEMENT,
        LAST_TOKEN,
        *(f"{space} {kind}" for space in SPACES[1:] for kind in EDIT_KINDS),
        *(f"SAE {kind}, {NO_KL}" for kind in EDIT_KINDS),
        *(
            f"at layer_{n}{what}"
            for n in (6, 9, 15, 18, 20, 24)
            for what in ("", f", {LAST_TOKEN}", ", dense vector")
        ),
    )
    """Trained methods that only the first seed runs: no headline but of a claim or control that
    one run can answer.
    """
    ranks: tuple[int, ...] = (1, 2, 3, 8)
    """Further ranks of the headline shift (section 3.4)."""
    training: ShiftTraining = field(default_factory=ShiftTraining)
    """The shift."""
    lora: LoRATraining = field(default_factory=LoRATraining)
    """The baseline whose weights change."""
    kl_weights: tuple[float, ...] = (1.0,)
    """KL weights lam_keep to choose from on validation questions and documents."""
    sparsity_weights: tuple[float, ...] = (0.0, 0.1)
    """Weights lam_sp to choose from there; one more row takes the sparsest within one standard
    error (section 3.5).
    """
    max_off_task_loss: float = 0.02
    """Largest increase of cross-entropy on validation documents that a chosen setting may cost, in
    nats (section 9).
    """
    shrinkage: float = 20.0
    """a of the shrunk targets (counts + a overall) / (n + a) (section 3.5)."""
    respondents: int = 1000
    """Respondents per group in the planted poll that shifts are trained on (section 7.1: 200 to
    1500).
    """
    every_nth_cluster: int = 1
    """Ask only every n-th cluster of near-duplicate questions."""
    n_documents: int = 64
    """Documents of other text in each split."""
    coefficients: tuple[float, ...] = (0.0, 0.5, 1.0, 1.5, 2.0, 4.0)
    """Coefficients of the dose curve (section 3.3)."""
    top_latents: tuple[int, ...] = (1, 5, 20, 100)
    """Largest latents that alone are kept when causal share is measured (section 5.5)."""
    few_shot_sizes: tuple[int, ...] = (2, 5, 10, 20, 50, 100)
    """Questions from which the scores of a new group are fitted (section 3.7)."""
    few_shot_steps: int = 40
    """Steps of that fit."""
    n_holdout_rounds: int = 3
    """Rounds of training without one group of every attribute of more than two, another one each
    (section 3.6).
    """
    unseen_attributes: bool = True
    """Whether each attribute is left out of training as a whole too (section 3.6)."""
    lora_per_group: bool = False
    """Whether LoRA is trained without group prompts too, one adapter per group (section 4); SubPOP
    trains one for all.
    """
    waves: tuple[int, ...] = (26, 27, 29, 32, 34, 36, 41, 42, 43, 45, 49, 50, 54, 82, 92)
    """Waves of OpinionQA (section 1.1); real models only."""
    unseen_waves: tuple[int, ...] = (34, 45, 92)
    """Waves that only test questions come from (section 3.6)."""
    min_responses: int = 20
    """Groups with fewer answers to some question of a real poll are left out (section 10)."""
    similarity: float = 0.6
    """Wording similarity (cosine of tf-idf) from which two questions are near-duplicates, which no
    split may part.
    """
    max_rows_per_forward: int = 48
    """Prompts, each under one shift, that go through the model at once; more are taken in parts,
    with equal results.
    """
