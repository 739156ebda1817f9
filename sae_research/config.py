"""Typed settings: defaults are the papers' values, and a profile lists only the ways in which it departs from them."""

import types
import typing
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields, is_dataclass

from sae_research.errors import ResearchError, unknown
from sae_research.paths import PARAMS


@dataclass(frozen=True)
class Runtime:
    """How a profile runs, whatever the study."""

    device: str = "cuda"
    """Where models and SAEs live: `cpu` or `cuda`."""
    dtype: str = "bfloat16"
    """Number format of the model's weights; labels and letters are always read in float32."""
    threads: int = 8
    """CPU threads of torch; two threads on a tiny loop can be slower than one."""
    n_jobs: int | str = 1
    """Independent shards that run at once (joblib): 1 stays in one process, -1 is one a core, `ray` a Ray cluster."""
    seeds: int = 5
    """Seeds of every headline number."""
    hub: bool = True
    """Whether models and SAEs come from the hub; the embedded world needs no network."""


@dataclass(frozen=True)
class World:
    """The embedded world, as notebook 00 looks at it."""

    rebuilds: tuple[int, ...] = ()
    """Further seeds that the whole world is built with, to show that its gates do not hold by luck."""
    passages: int = 800
    """Documents of each kind on which gates and latents are measured."""


@dataclass(frozen=True)
class ShiftTraining:
    """How a shift of study 1 is trained; section numbers are those of its notebook's method page."""

    kind: typing.Literal["additive", "multiplicative", "gated", "literal"] = "multiplicative"
    """How the shift acts on codes (section 3.3)."""
    positions: typing.Literal["answer", "question", "all"] = "all"
    """Where it acts (section 3.3); never on the start token."""
    rank: int | None = 4
    """r of Delta_g = Delta_0 + U c_g; none gives every group a free vector of its own (section 3.4)."""
    calibration: typing.Literal["first", "axes", "none"] = "first"
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


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class OpinionQA:
    """Study 1: survey answers of demographic groups through a sparse shift in SAE space."""

    subjects: tuple[str, ...] = ("gemma-2-2b", "gemma-2-2b-it")
    """Models with their SAEs, by their name in the catalogue, the one that claims speak of first (abstract: Gemma-2-2B;
    section 6: base against instruction-tuned)."""
    sae: str = "primary"
    """Role of the SAE whose latents are shifted (section 3.1: block 12, width 16k)."""
    layers: tuple[str, ...] = ("layer_6", "layer_9", "layer_15", "layer_18", "layer_20", "layer_24")
    """Roles of SAEs at other layers, at which the headline is trained again; the deepest one stands for late layers in
    the hypotheses (section 6)."""
    once: tuple[str, ...] = (
        *("SAE literal", "a vector a group", "two stages", "movement kept small", "last token only"),
        *(f"{space} {kind}" for space in ("random", "PCA") for kind in ("multiplicative", "gated", "additive")),
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


@dataclass(frozen=True)
class SideEffects:
    """Study 2: predict steering side effects before steering."""

    subjects: tuple[str, ...] = ("gpt2-small", "pythia-70m", "gemma-2-2b", "llama-3.1-8b")
    """Models with their SAEs, by their name in the catalogue (abstract)."""
    primaries: tuple[str, ...] = ("primary", "llama-3.1-8b-32x/primary", *(f"width_{768 * 2**i}" for i in range(8)))
    """Roles of the dictionaries that are screened, the main one first; a subject skips those it lacks (App. G: 32x; the
    ladder of widths of GPT-2 is ours and serves the comparison of widths alone)."""
    downstream: tuple[str, ...] = ("downstream",)
    """Role of the dictionary in which side effects are counted, whatever the primary: the first that a subject has."""
    protocol: typing.Literal["author", "replication"] = "author"
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
    clean_score: typing.Literal["log_over_effect", "log_of_ratio"] = "log_over_effect"
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


@dataclass(frozen=True)
class SpecializedSAEs:
    """Study 3: SAEs tuned on a retrieved subdomain with a tilted loss."""

    subjects: tuple[str, ...] = ("gpt2-small", "pythia-70m")
    """Models with their SAEs: the language model of Figs 1 to 14 is not known to us; Table 1 uses Pythia-70M."""


@dataclass(frozen=True)
class MetaSAEs:
    """Study 4: joint training with a decomposability penalty."""

    subjects: tuple[str, ...] = ("gpt2-large", "gemma-2-9b")
    """Models whose residual stream the SAEs are trained on (sections 4 and 6)."""


@dataclass(frozen=True)
class SafetySubspace:
    """Study 5: fine-tuning inside a subspace that SAE features span."""

    subjects: tuple[str, ...] = ("gemma-2-2b", "gemma-2-9b", "llama-3.1-8b")
    """Models with their SAEs, by their name in the catalogue (abstract)."""


@dataclass(frozen=True)
class Profile:
    """Everything that a run needs to know; one block a study."""

    name: str
    runtime: Runtime = field(default_factory=Runtime)
    world: World = field(default_factory=World)
    opinion_qa: OpinionQA = field(default_factory=OpinionQA)
    side_effects: SideEffects = field(default_factory=SideEffects)
    specialized_saes: SpecializedSAEs = field(default_factory=SpecializedSAEs)
    meta_saes: MetaSAEs = field(default_factory=MetaSAEs)
    safety_subspace: SafetySubspace = field(default_factory=SafetySubspace)


STUDIES = tuple(f.name for f in fields(Profile) if f.name not in {"name", "runtime", "world"})


def _convert(value: object, expected: object, where: str) -> object:
    """`value` from YAML as the type that the setting declares, or one clear sentence."""
    origin, args = typing.get_origin(expected), typing.get_args(expected)
    if origin in (types.UnionType, typing.Union):
        arms = [a for a in args if a is not type(None)]
        if value is None and len(arms) < len(args):
            return None
        if len(arms) == 1:
            return _convert(value, arms[0], where)
        for arm in arms:
            with suppress(ResearchError):
                return _convert(value, arm, where)
    elif origin is typing.Literal:
        if value in args:
            return value
        raise unknown("choice", str(value), map(str, args), where)
    elif origin is tuple and isinstance(value, list | tuple):
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(kinds) == len(value):
            return tuple(_convert(v, k, where) for v, k in zip(value, kinds, strict=True))
    elif origin is dict and isinstance(value, dict):
        return {_convert(k, args[0], where): _convert(v, args[1], where) for k, v in value.items()}
    elif is_dataclass(expected) and isinstance(value, dict):
        return build(expected, value, where)
    elif expected is float and not isinstance(value, bool):
        with suppress(TypeError, ValueError):  # YAML reads 1e-4, without a point, as text
            return float(value)
    elif isinstance(expected, type) and type(value) is expected:
        return value
    name = str(expected) if origin else expected.__name__
    raise ResearchError(f"setting '{where}' must be {name}, not {value!r}; correct it in params.yaml.")


def build(cls: type, overrides: dict, where: str, **given: object):
    """A settings object from its defaults and `overrides`; an unknown key names the nearest valid one."""
    if not isinstance(overrides, dict):
        raise ResearchError(f"'{where}' in params.yaml must be a block of settings, not {overrides!r}.")
    kinds = typing.get_type_hints(cls)
    valid = {f.name for f in fields(cls)} - set(given)
    for key in overrides:
        if key not in valid:
            raise unknown("setting", str(key), valid, where)
    return cls(**given, **{k: _convert(v, kinds[k], f"{where}.{k}") for k, v in overrides.items()})


def read_params() -> dict:
    """The content of `params.yaml`."""
    import yaml

    try:
        params = yaml.safe_load(PARAMS.read_text())
    except (OSError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ResearchError(f"params.yaml cannot be read ({reason}); restore it from the repository.") from error
    if not isinstance(params, dict) or not isinstance(params.get("profiles"), dict):
        raise ResearchError("params.yaml must hold `profile` and `profiles`; restore it from the repository.")
    return params


def profiles() -> tuple[str, ...]:
    """Names of the profiles in `params.yaml`."""
    return tuple(read_params()["profiles"])


def load(profile: str | None = None) -> Profile:
    """The settings of `profile`, or of the one that `params.yaml` names."""
    params = read_params()
    name = str(profile or params.get("profile"))
    if name not in params["profiles"]:
        raise unknown("profile", name, params["profiles"], "params.yaml")
    return build(Profile, params["profiles"][name] or {}, f"profiles.{name}", name=name)


def default_of(cls: type, name: str) -> object:
    """The default (the paper's value) of one setting."""
    f = next(f for f in fields(cls) if f.name == name)
    return f.default_factory() if f.default is MISSING else f.default
