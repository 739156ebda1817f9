"""Settings of study 5; defaults are the paper's values, and None or empty where no source says."""

from typing import ClassVar, Literal

from sae_research.config import settings

FULL, LORA, SAILS = "full fine-tuning", "LoRA", "SAILS"
FROZEN, PENALISED = "SAILS, frozen", "SAILS, penalised"
RANDOM, SHUFFLED, USEFUL = "random SAE features", "shuffled labels", "useful behaviour"
RANDOM_FROZEN = "random SAE features, frozen"
REQUESTS, REQUESTS_FROZEN = "request features", "request features, frozen"
NULL = "null: "
"""What names of methods with null dictionaries begin with."""
METHODS = (
    *(FULL, LORA, "LoRA, orthogonal", "OLoRA", "PiSSA", "MiCA", "EVA", "DoRA"),
    *("mean difference", "paired PCA", "covariance difference", SAILS, FROZEN, PENALISED),
    *(RANDOM, RANDOM_FROZEN, SHUFFLED, USEFUL, "random subspace", REQUESTS, REQUESTS_FROZEN),
)
"""Everything that can be compared."""


@settings
class Theory:
    """Recovery of planted features; the sizes are ours."""

    MAY_BE_ZERO: ClassVar[tuple[str, ...]] = ("seeds",)

    seeds: int = 10
    """Planted worlds of every setting."""
    samples: int = 30_000
    """Largest sample of a class; elsewhere 6,000 or this, if it is smaller."""
    sae_steps: int = 1200
    """Training steps of the SAEs of planted worlds."""
    loud: bool = True
    """Whether SAEs are also trained in worlds with loud features that both classes share."""


@settings
class Settings:
    """Study 5: fine-tuning inside a subspace that SAE features span."""

    ORDER: ClassVar[int] = 5
    MAY_BE_ZERO: ClassVar[tuple[str, ...]] = ("benign_steps", "n_retrained", "pilot_seeds")
    RENAMED: ClassVar[dict[str, str]] = {"subjects": "models"}

    models: tuple[str, ...] = ("gemma-2-2b", "gemma-2-9b", "llama-3.1-8b")
    """Models with their SAEs, by their name in the catalogue (abstract); seeds take turns. Models
    that are neither toys nor have SAEs made here are passed over: their data are missing."""
    sae_roles: tuple[str, ...] = tuple(f"layer_{n}" for n in (5, 10, 15, 20, 25, 30))
    """Roles of the SAEs that span the subspace; a model skips those it lacks (second-hand)."""
    sae_seeds: int = 0
    """Further SAEs that are trained at the first hook, to compare their subspaces (ours)."""
    nulls: tuple[str, ...] = ("frozen_decoder", "soft_frozen_decoder", "frozen_encoder")
    """Null dictionaries that are trained beside the SAEs, each of them one more method (ours)."""
    seeds: int = 5
    """Seeds of alignment: of splits, pairs, orders and initial weights (ours)."""
    pilot_seeds: int = 0
    """Seeds that a pilot has seen and that are left out: those of the study come after them."""
    rank: int = 16
    """Rank of every adapter (inferred from the share of parameters)."""
    n_features: int = 20
    """Features of largest contrast at each SAE (unknown; with tau .8 it gives rank 16)."""
    max_density: float = 1.0
    """Share of tokens above which a firing feature is passed over (the paper names no filter)."""
    assignment: Literal["nearest", "pooled", "sae_layers_only"] = "nearest"
    """What blocks without an SAE get (unknown)."""
    penalty: float = 1.0
    """Weight of what leaves the subspace, in the penalised method (ours)."""
    methods: tuple[str, ...] = METHODS
    """What is compared, at equal rank, data and learning rates."""
    n_pairs: int | None = None
    """Safety pairs of the main comparison (unknown)."""
    pairs_file: str = ""
    """The reader's own pairs for a real model, csv or jsonl with prompt, chosen and rejected, or a
    file of HH-RLHF; empty takes a harmless stand-in, gardening to be declined (ours)."""
    reply_tokens: int = 10
    """Tokens of a real model's replies, in training and test (ours)."""
    tested: int = 32
    """Most test requests of each kind to a real model (ours)."""
    pair_budgets: tuple[int, ...] = ()
    """Further numbers of pairs."""
    ranks: tuple[int, ...] = ()
    """Further ranks."""
    sweep_methods: tuple[str, ...] = (FULL, LORA, SAILS, RANDOM)
    """What is compared at further numbers of pairs and ranks, and attacked."""
    base_steps: int = 60
    """Steps that teach the toy model to answer everything (ours)."""
    steps: int | None = None
    """Steps of fine-tuning (unknown)."""
    batch_size: int = 16
    """Requests a step (ours)."""
    learning_rates: tuple[float, ...] = ()
    """Learning rates of every adapter, chosen on validation requests (unknown)."""
    full_learning_rates: tuple[float, ...] = ()
    """Those of full fine-tuning, which needs lower ones: as many (unknown)."""
    benign_steps: int = 30
    """Steps of later fine-tuning of all weights on harmless requests, 0 for none (ours)."""
    benign_lr: float = 3e-4
    """Its learning rate (ours)."""
    draws: int = 4
    """Replies that are sampled to every request (ours)."""
    attack_steps: int = 50
    """Steps of greedy coordinate gradient (ours)."""
    attack_restarts: int = 5
    """Random suffixes that it starts from; the best on the training requests counts (ours)."""
    attack_candidates: int = 64
    """Suffixes that each of them tries (ours)."""
    n_random_features: int = 20
    """Random features whose removal is compared with that of the selected ones (ours)."""
    n_retrained: int = 2
    """Selected features at each SAE without which the frozen adapter is trained anew (ours)."""
    judge: bool = True
    """Whether the judge of free text is measured on the reader's copy of XSTest's completions."""
    theory: Theory = Theory()
    """Recovery of planted features."""
