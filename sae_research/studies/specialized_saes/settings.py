"""Settings of study 3; defaults are the paper's values where they are known, and otherwise those of
the precursor (Drori 2024, jacobcd52/specialised-SAEs).
"""

from dataclasses import asdict, field
from typing import TYPE_CHECKING, ClassVar, Literal

import pydantic

from sae_research.config import settings
from sae_research.tilt import Tilt

if TYPE_CHECKING:
    from sae_research.training import SAETraining


@settings
class Training:
    """How an SAE is trained, as `training.SAETraining`."""

    MAY_BE_ZERO: ClassVar[tuple[str, ...]] = ("warmup_steps",)

    steps: int = 2_000
    """Training steps."""
    batch_size: int = 4_096
    """Activations a step."""
    lr: float = 1e-4
    """Peak learning rate of Adam."""
    warmup_steps: int = 0
    """Steps of linear warm-up of the learning rate."""
    decay: float = 0.2
    """Last share of the steps, in which the learning rate falls linearly."""
    centre: bool = False
    """Whether the decoder bias starts at the data's mean instead of where it is."""

    def plan(self, n: int) -> "SAETraining":
        """For `training.train` on n activations: with fewer than a batch, the same number of tokens
        in more, smaller steps.
        """
        from sae_research.training import SAETraining

        batch = min(self.batch_size, n)
        own = {"batch_size": batch, "steps": self.steps * self.batch_size // batch}
        return SAETraining(**{**asdict(self), **own})


@settings
class Shift:
    """The bias case study (Table 1) and its circuits."""

    seeds: int = 5
    """How many of the study's seeds it has (ours)."""
    documents: int = 22_400
    """Biographies of the ambiguous training set; the balanced one has as many in all four cells."""
    test_documents: int = 1_736
    """Biographies of the balanced test set."""
    hooks: tuple[str, ...] = tuple(f"blocks.{n}.hook_resid_post" for n in range(5))
    """Places of the residual stream with an SAE whose latents are ablated (the paper's dictionaries
    read the outputs of attention and MLP too)."""
    probe_hook: str = "blocks.4.hook_resid_post"
    """Where the probe reads the mean residual over text."""
    probe_seeds: int = 5
    """Trainings of every probe."""
    probe_lr: float = 1e-2
    """Learning rate of the probe's AdamW, one pass."""
    probe_batch: int = 128
    """Batch of the probe."""
    examples: int = 100
    """Training texts on which effects are averaged."""
    steps: int = 10
    """Steps of integrated gradients."""
    node_threshold: float = 0.1
    """Smallest size of the effect of a latent in the circuit (T_N)."""
    edge_threshold: float = 0.01
    """Smallest size of the effect of an edge (T_E)."""
    n_ablated: int | None = None
    """If set, so many latents are ablated, those of the largest effects; otherwise the smaller of
    the two SAEs' counts of gender latents in the circuit."""
    auroc: float = 0.8
    """From this AUROC on, within each profession, a latent tells the gender."""
    top_tokens: int = 8
    """A latent is also about gender if its so many strongest token types all are."""
    skyline: int = 55
    """Neurons or latents that a skyline ablates (55 in the paper)."""
    compressed: float = 0.125
    """Share of the latents that the compressed dictionaries keep, the most active ones."""
    tilt: Tilt = field(default_factory=lambda: Tilt(t=500.0))
    """Tilt of the fine-tuning on biographies."""
    overrides: str | None = None
    """A YAML file in which a person overrules the gender rule: SAE, hook, latent, true or false."""


@settings
class Synthetic:
    """The tier of vectors that are sums of known directions (SAELens' generators)."""

    MAY_BE_ZERO: ClassVar[tuple[str, ...]] = ("vectors",)

    d: int = 64
    """Dimensions."""
    general: int = 320
    """General directions."""
    domain: int = 96
    """Directions of the rare domain, which follow a Zipf law."""
    active: int = 4
    """Directions in every vector."""
    domain_share: float = 0.03
    """Share of domain vectors in general text."""
    latents: int = 288
    """Latents of the SAEs."""
    shares: tuple[float, ...] = (1.0, 0.99, 0.95, 0.9, 0.7, 0.5, 0.1)
    """Effective sample sizes of the tilts."""
    steps: int = 600
    """Steps of the general SAE, and of each fine-tuning."""
    vectors: int = 60_000
    """Vectors of each text; 0 leaves the tier out."""


@settings
class Settings:
    """Study 3: SAEs tuned on a retrieved subdomain with a tilted loss."""

    ORDER: ClassVar[int] = 3
    RENAMED: ClassVar[dict[str, str]] = {"subjects": "models"}

    models: tuple[str, ...] = ("gpt2-small", "pythia-70m")
    """Models with their SAEs: the language model of Figs 1 to 14 is not known to us; Table 1 uses
    Pythia-70M."""
    hook: str | None = None
    """Where the SAEs read; without it, the catalogue's `train` hook of the model."""
    domain: str = ""
    """The domain, a library or subdomain of a real model's corpus such as `statsmodels`; toy models
    have their own."""
    register: str = ""
    """The same for its second register, such as `scipy.stats`."""
    chunk_tokens: int = 48
    """Tokens of a chunk of that corpus, BOS included."""
    file_chunks: int = 8
    """Most chunks of one of its files in a part."""
    shift_model: str = "pythia-70m"
    """The model of the bias case study; without one, the study is left out."""
    seed_chunks: int = 40
    """Chunks of the domain that are given. The paper's number is unknown."""
    pool_chunks: int = 100_000
    """Chunks to retrieve from. The paper's number is unknown."""
    selected_chunks: int = 10_000
    """Chunks that a selector takes (k). The paper's number is unknown."""
    general_chunks: int = 100_000
    """Chunks on which the general SAE is trained."""
    test_chunks: int = 2_000
    """Test chunks of each kind."""
    loss_chunks: int = 256
    """Of these, chunks on which the loss with a spliced SAE is measured."""
    selectors: tuple[str, ...] = (
        "general",
        "bm25",
        "dense",
        "bm25 tracin",
        "dense tracin",
        "random",
        "seed only",
        "oracle",
        "fusion",
    )
    """Ways to choose the training text; `general` is the baseline that goes on with general text
    (OWT)."""
    aggregation: Literal["mean", "max", "round robin"] = "mean"
    """How the scores of all seed chunks become one ranking; the paper's way is unknown."""
    dense: str = "facebook/contriever"
    """What dense retrieval compares: a sentence embedder of the hub, `lsa` (TF-IDF with truncated
    SVD) or `residual` (the model's own mean residual)."""
    tracin_candidates: int = 4
    """TracIn reranks the first so many times k chunks."""
    latents: int = 24_576
    """Latents of the general SAE and of those fine-tuned from it."""
    small_latents: int = 1_536
    """Latents of the residual and of the direct SAE (expansion 2 in the precursor)."""
    l0s: tuple[int, ...] = (23, 33, 46)
    """L0 of TopK SAEs, at which all are compared (those of the precursor's fine-tuned SAE)."""
    main_l0: int = 33
    """The one of `l0s` at which tails are compared."""
    penalties: tuple[float, ...] = (4.0, 2.0, 1.0)
    """L1 coefficients of ReLU SAEs, the paper's kind (the precursor's grid)."""
    main_penalty: float = 2.0
    """The one of `penalties` at which tails are compared as the paper does, with L0 left free."""
    residual_share: float = 0.25
    """Share of the L0 that a residual SAE has; the general SAE below it has the rest."""
    ways: tuple[str, ...] = ("residual", "direct")
    """Ways to specialise beside fine-tuning, on `tilted_selector`'s text."""
    nulls: tuple[str, ...] = ("frozen_decoder", "soft_frozen_decoder", "frozen_encoder")
    """Null dictionaries that are trained and specialised beside them (ours)."""
    seeds: int = 5
    """Seeds of text, SAEs and trainings (ours)."""
    tilts: dict[str, Tilt] = field(
        default_factory=lambda: {
            "500": Tilt(t=500.0),
            "1e9": Tilt(t=1e9),
            "ess 0.9": Tilt(t=0.9, unit="effective sample size"),
        }
    )
    """Tilts by name, the paper's and a mild one; fine-tuning without any is `plain`."""
    paper_tilts: tuple[str, ...] = ("500", "1e9")
    """Those of `tilts` that ReLU SAEs have too."""
    tilted_selector: str = "dense"
    """The selector whose text the tilted SAEs see."""
    general: Training = field(
        default_factory=lambda: Training(steps=20_000, lr=4e-4, warmup_steps=1_000, centre=True)
    )
    """Training of the general SAEs."""
    fine_tuning: Training = field(default_factory=Training)
    """Training of every specialised SAE: the same budget of tokens for all."""
    anew_lr: float = 1e-3
    """Peak learning rate of residual and direct SAEs, which start from nothing."""
    frequency_bins: int = 20
    """Bins of token types by frequency, where a tilt is over bins."""
    found_f1: float = 0.5
    """F1 from which a concept counts as found."""
    explainer: str | None = None
    """If set, a language model (name in the catalogue or on the hub, or a folder) that explains
    latents; its answers are kept in data/private and replayed."""
    explained_latents: int = 50
    """Latents of each compared SAE that it explains."""
    synthetic: Synthetic = field(default_factory=Synthetic)
    """The tier of synthetic vectors."""
    shift: Shift = field(default_factory=Shift)
    """The bias case study."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> "Settings":
        main = ((self.main_l0, "l0s"), (self.main_penalty, "penalties"))
        for value, name in (*main, *((tilt, "tilts") for tilt in self.paper_tilts)):
            if value not in getattr(self, name):
                raise ValueError(f"{value!r} is not among its `{name}`")
        if max(self.l0s) > self.latents:
            raise ValueError(
                f"`l0s` asks for more active latents than the {self.latents} there are"
            )
        return self

    def describe(self) -> str:
        """Models and text of a run: domain, second register, and what is known of them."""
        models = ", ".join(self.models)
        if not self.domain:
            return (
                f"{models}, on generated text: the domain is physics, the second register asks to "
                "explain it, and which concept every position depends on is known."
            )
        return (
            f"{models}, on docstrings of installed libraries: the domain is `{self.domain}`, the "
            f"second register `{self.register}`, general text is all else. A chunk's label is the "
            "module that it stands in, and no file is in two parts. Its concepts are not known, so "
            "what needs them is not measured."
        )
