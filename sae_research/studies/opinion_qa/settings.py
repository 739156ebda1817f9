"""Settings of study 1; defaults are the papers' values."""

from dataclasses import field
from typing import ClassVar, Literal

from sae_research.config import settings


@settings
class ShiftTraining:
    """How a shift of study 1 is trained; section numbers are those of its notebook's method page."""

    kind: Literal["additive", "multiplicative", "gated", "literal"] = "multiplicative"
    """How the shift acts on codes (section 3.3)."""
    positions: Literal["answer", "question", "all"] = "all"
    """Where it acts (section 3.3); never on the start token."""
    rank: int | None = 4
    """r of Delta_g = Delta_0 + U c_g; none gives every group a free vector of its own (section 3.4)."""
    calibration: Literal["first", "axes", "none"] = "first"
    """Delta_0: `first` is free and trained on the population's answers before the groups, `axes` is U c_0 and trained
    with them, `none` is zero (section 3.4)."""
    movement: float = 0.0
    """lam_rec: weight of the relative squared movement of the residual (section 3.5)."""
    keep: float = 1.0
    """lam_keep: weight of KL(base || steered) on other text (section 3.5)."""
    sparsity: float = 0.0
    """lam_sp: weight of the group lasso, a proximal step after each step of Adam (section 3.5)."""
    rate: float = 3e-3
    """Learning rate of Delta_0 and U (section 3.5)."""
    score_rate: float = 3.0
    """Learning rate of c as a multiple of that of U (section 3.5: 1e-2 against 3e-3)."""
    calibration_steps: int = 500
    """Steps of the first stage, on four times as many prompts."""
    steps: int = 500
    """Steps of the second stage."""
    batch: int = 16
    """Prompts of a step; each is asked of every group of that step (section 3.5: questions B)."""
    groups: int = 8
    """Groups of a step, drawn anew each time if the survey has more (section 3.5: groups S)."""
    documents: int = 6
    """Documents of other text of a step, each under the shifts of `kept_groups` groups."""
    kept_groups: int = 3
    """Groups drawn for the documents of a step."""
    look: int = 50
    """Steps between looks at the validation questions; the best look is kept (section 3.5: early stopping)."""


@settings
class LoRATraining:
    """SubPOP's adapters, the strongest published rival of study 1."""

    rank: int = 8
    """r (SubPOP)."""
    alpha: int = 32
    """Scale: the update is alpha / r times B A (SubPOP)."""
    dropout: float = 0.05
    """Dropout on what enters the adapters (SubPOP)."""
    rate: float = 2e-4
    """Peak learning rate, with a cosine to zero (SubPOP)."""
    batch: int = 128
    """Prompts of a step (SubPOP)."""
    steps: int = 1000
    """Steps; SubPOP trains for 50 epochs."""


@settings
class Settings:
    """Study 1: survey answers of demographic groups through a sparse shift in SAE space."""

    ORDER: ClassVar[int] = 1
    RENAMED: ClassVar[dict[str, str]] = {"subjects": "models"}

    models: tuple[str, ...] = ("gemma-2-2b", "gemma-2-2b-it")
    """Models with their SAEs, by their name in the catalogue, the one that claims speak of first (abstract: Gemma-2-2B;
    section 6: base against instruction-tuned)."""
    sae: str = "primary"
    """Role of the SAE whose latents are shifted (section 3.1: block 12, width 16k)."""
    layers: tuple[str, ...] = ("layer_6", "layer_9", "layer_15", "layer_18", "layer_20", "layer_24")
    """Roles of SAEs at other layers, at which the headline is trained again; the deepest one stands for late layers in
    the hypotheses (section 6)."""
    once: tuple[str, ...] = (
        *(
            "SAE literal",
            "a vector a group",
            "two stages",
            "movement kept small",
            "last token only",
        ),
        *(
            f"{space} {kind}"
            for space in ("random", "PCA")
            for kind in ("multiplicative", "gated", "additive")
        ),
        *(f"SAE {kind}, nothing kept" for kind in ("multiplicative", "gated", "additive")),
        *(
            f"at layer_{n}{what}"
            for n in (6, 9, 15, 18, 20, 24)
            for what in ("", ", last token only", ", dense vector")
        ),
    )
    """Trained methods that only the first seed runs: no headline but of a claim or control that one run can answer."""
    ranks: tuple[int, ...] = (1, 2, 3, 8)
    """Further ranks of the headline shift (section 3.4)."""
    training: ShiftTraining = field(default_factory=ShiftTraining)
    """The shift."""
    lora: LoRATraining = field(default_factory=LoRATraining)
    """The rival whose weights change."""
    keeps: tuple[float, ...] = (1.0,)
    """Weights lam_keep to choose from on validation questions and documents."""
    sparsities: tuple[float, ...] = (0.0, 0.1)
    """Weights lam_sp to choose from there; one more row takes the sparsest within one standard error (section 3.5)."""
    harm: float = 0.02
    """Largest increase of cross-entropy on validation documents that a chosen setting may cost, in nats (section 9)."""
    shrinkage: float = 20.0
    """a of the shrunk targets (counts + a overall) / (n + a) (section 3.5)."""
    respondents: int = 1000
    """Respondents per group in the planted poll that shifts are trained on (section 7.1: 200 to 1500)."""
    thinning: int = 1
    """Ask only every n-th cluster of near-duplicate questions."""
    documents: int = 64
    """Documents of other text in each split."""
    strengths: tuple[float, ...] = (0.0, 0.5, 1.0, 1.5, 2.0, 4.0)
    """Strengths of the dose curve (section 3.3)."""
    features: tuple[int, ...] = (1, 5, 20, 100)
    """Largest latents that alone are kept when causal share is measured (section 5.5)."""
    shots: tuple[int, ...] = (2, 5, 10, 20, 50, 100)
    """Questions from which the scores of a new group are fitted (section 3.7)."""
    shot_steps: int = 40
    """Steps of that fit."""
    rounds: int = 3
    """Rounds of training without one group of every attribute of more than two, another one each (section 3.6)."""
    unseen_attributes: bool = True
    """Whether each attribute is left out of training as a whole too (section 3.6)."""
    adapters: bool = False
    """Whether LoRA is trained without group prompts too, one adapter a group (section 4); SubPOP trains one for all."""
    waves: tuple[int, ...] = (26, 27, 29, 32, 34, 36, 41, 42, 43, 45, 49, 50, 54, 82, 92)
    """Waves of OpinionQA (section 1.1); real models only."""
    unseen_waves: tuple[int, ...] = (34, 45, 92)
    """Waves that only test questions come from (section 3.6)."""
    fewest: int = 20
    """Groups with fewer answers to some question of a real poll are left out (section 10)."""
    similarity: float = 0.6
    """Wording similarity (cosine of tf-idf) from which two questions are near-duplicates, which no split may part."""
    rows: int = 48
    """Prompts, each under one shift, that go through the model at once; more are taken in parts, with equal results."""
