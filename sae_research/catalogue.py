"""The models and SAEs that the studies name: where each comes from and what it must show before a
run relies on it.

A number that no source gives is None.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sae_research.errors import ResearchError, unknown

if TYPE_CHECKING:
    from pathlib import Path

    from sae_lens import SAE

    from sae_research.models import LanguageModel


@dataclass(frozen=True)
class ModelSpec:
    """One model with the SAEs that the studies use on it."""

    name: str
    """The name that `params.yaml` uses."""
    model: str
    """Name on the hub; for a toy model, its name there."""
    gated: bool = False
    """Whether the hub asks for an accepted licence and a token."""
    parameters: int | None = None
    """Weights of the model, each counted once; None where the model is built here."""
    embedded: bool = False
    """Whether model and SAEs lie in `data/embedded`."""
    hooks: Mapping[str, str] = field(default_factory=dict)
    """Place of the residual stream by role: those of the SAEs, and `train` where a study trains
    its own.
    """
    saes: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """SAELens release and id by role; a toy model's are found in its folder, by their folder
    names.
    """
    trained_on: str = ""
    """The model whose SAEs these are, where this one has none: they are put on its residuals all
    the same.
    """
    chat: bool = False
    """Whether it was tuned on dialogues: prompts then go through its tokenizer's chat template."""
    mean_l0: Mapping[str, float] = field(default_factory=dict)
    """Mean L0 at the final token by role, as independently measured: a check on loading."""
    eligible: int | None = None
    """Latents of `primary` whose final-token frequency lies in [.002, .5] of 2,048 contexts,
    likewise.
    """
    note: str = field(default="", compare=False)
    """What a reader should know."""

    def load(self, *, device: str = "cpu", dtype: str = "float32") -> "LanguageModel":
        """The model."""
        from sae_research import models

        if not self.embedded:
            return models.load_model(self.model, device=device, dtype=dtype)
        from sae_research.world import build

        return models.load_model(
            build.model_folder(self.model), device=device, dtype=dtype, name=self.name
        )

    def roles(self) -> tuple[str, ...]:
        """Roles that have an SAE to load."""
        return tuple(self._folders() if self.embedded else self.saes)

    def sae(self, role: str, *, device: str = "cpu", dtype: str = "float32") -> "SAE":
        """The SAE of a role."""
        from sae_research import saes

        roles = self.roles()
        if not roles:
            raise ResearchError(
                f"{self.name} comes without SAEs; the studies that use it train their own."
            )
        if role not in roles:
            raise unknown("SAE role", role, roles, f"the catalogue's entry '{self.name}'")
        source = (self._folders()[role],) if self.embedded else self.saes[role]
        sae = saes.load_sae(*source, device=device, dtype=dtype)
        if self.trained_on:
            sae.cfg.metadata.model_name = (
                self.model
            )  # said openly: `check_fit` refuses every other stranger
        return sae

    def content(self) -> list[str]:
        """What tells it from another one of its name: a toy model's checksums, else its name on the
        hub.
        """
        from sae_research import store
        from sae_research.paths import EMBEDDED

        if not self.embedded:
            return [self.model]
        return [
            (EMBEDDED / self.model / piece / store.CHECKSUMS).read_text()
            for piece in ("model", "saes")
        ]

    def _folders(self) -> dict:
        from sae_research.world import build

        return build.sae_folders(self.model)


def _gpt2_small() -> ModelSpec:
    release, ladder = "gpt2-small-res-jb", "gpt2-small-res-jb-feature-splitting"
    widths = (768, 1536, 3072, 6144, 12288, 24576, 49152, 98304)
    layers = {f"layer_{n}": f"blocks.{n}.hook_resid_pre" for n in range(12)}
    paper = {"primary": layers["layer_8"], "downstream": layers["layer_10"]}
    steps = {f"width_{width}": layers["layer_8"] for width in widths}
    return ModelSpec(
        name="gpt2-small",
        model="gpt2",
        parameters=124_439_808,
        hooks={**paper, **layers, **steps, "train": layers["layer_8"]},
        saes={role: (release, hook) for role, hook in {**paper, **layers}.items()}
        | {f"width_{width}": (ladder, f"{layers['layer_8']}_{width}") for width in widths},
        mean_l0={"primary": 71.8, "downstream": 60.0},
        eligible=7532,
        note=(
            "SAEs trained with centred writing weights; the ladder of widths at block 8 is not "
            "the paper's"
        ),
    )


def _gpt2_large() -> ModelSpec:
    return ModelSpec(
        name="gpt2-large",
        model="gpt2-large",
        parameters=774_030_080,
        hooks={"train": "blocks.20.hook_resid_pre"},
        note="study 4 trains its own SAEs, 20,480 latents wide",
    )


def _pythia() -> ModelSpec:
    release = "pythia-70m-deduped-res-sm"
    layers = {f"layer_{n}": f"blocks.{n}.hook_resid_post" for n in range(6)}
    paper = {"primary": layers["layer_4"], "downstream": layers["layer_5"]}
    return ModelSpec(
        name="pythia-70m",
        model="EleutherAI/pythia-70m-deduped",
        parameters=70_426_624,
        hooks={**paper, **layers, "train": layers["layer_4"]},
        saes={role: (release, hook) for role, hook in {**paper, **layers}.items()},
        mean_l0={"primary": 68.3, "downstream": 118.6},
        eligible=4375,
        note=(
            "block 5 is the last; study 3's sixteen dictionaries on attention and MLP outputs "
            "are not in SAELens"
        ),
    )


def _gemma(
    size: str, parameters: int, layers: tuple[int, ...], tuned: str = "", **others: object
) -> ModelSpec:
    release = f"gemma-scope-{size}-pt-res-canonical"
    hooks = others.pop("hooks")
    layers = {f"layer_{n}": f"blocks.{n}.hook_resid_post" for n in layers}
    with_saes = {role: hook for role, hook in {**hooks, **layers}.items() if role != "train"}
    return ModelSpec(
        name=f"gemma-2-{size}{tuned}",
        model=f"google/gemma-2-{size}{tuned}",
        gated=True,
        parameters=parameters,
        hooks={**hooks, **layers},
        saes={
            role: (release, f"layer_{hook.split('.')[1]}/width_16k/canonical")
            for role, hook in with_saes.items()
        },
        **others,
    )


def _llama(expansion: int, layers: tuple[int, ...] = (), **others: object) -> ModelSpec:
    paper = {"primary": "blocks.16.hook_resid_post", "downstream": "blocks.20.hook_resid_post"}
    hooks = {**paper, **{f"layer_{n}": f"blocks.{n}.hook_resid_post" for n in layers}}
    return ModelSpec(
        model="meta-llama/Llama-3.1-8B",
        gated=True,
        parameters=8_030_261_248,
        hooks=hooks,
        saes={
            role: (f"llama_scope_lxr_{expansion}x", f"l{hook.split('.')[1]}r_{expansion}x")
            for role, hook in hooks.items()
        },
        **others,
    )


def _toy_model(which: str) -> ModelSpec:
    return ModelSpec(
        name=f"world-{which}",
        model=which,
        embedded=True,
        note="built by notebook 00 with known truth; no network",
    )


_GEMMA_2B = {"primary": "blocks.12.hook_resid_post", "downstream": "blocks.16.hook_resid_post"}
_GEMMA_2B_LAYERS = (5, 6, 9, 10, 15, 18, 20, 24)
"""Study 5's layers (5, 10, 15, 20) and those of study 1's sweep."""

MODEL_SPECS = {
    spec.name: spec
    for spec in (
        _gpt2_small(),
        _gpt2_large(),
        _pythia(),
        _gemma(
            "2b",
            2_614_341_888,
            _GEMMA_2B_LAYERS,
            hooks=_GEMMA_2B,
            mean_l0={"primary": 83.0, "downstream": 79.3},
            eligible=7517,
            note="final logits are soft-capped: the Gram identity of study 2 does not hold",
        ),
        _gemma(
            "2b",
            2_614_341_888,
            _GEMMA_2B_LAYERS,
            "-it",
            hooks=_GEMMA_2B,
            trained_on="gemma-2-2b",
            chat=True,
            note=(
                "instruction-tuned; the SAEs are those of the base model, as Gemma Scope has "
                "none for this one"
            ),
        ),
        _gemma(
            "9b",
            9_241_705_984,
            (10, 15, 20, 25, 30),
            hooks={"train": "blocks.23.hook_resid_pre"},
            note=(
                "study 4's paper says layer 23, its release 31; the block's input is inferred "
                "from gpt2-large"
            ),
        ),
        _llama(
            8,
            (10, 15, 20, 25, 30),
            name="llama-3.1-8b",
            mean_l0={"primary": 32.2, "downstream": 31.4},
            eligible=2837,
            note=(
                "SAELens' threshold is the release's times its norm factor; the release states "
                "an L0 of 50"
            ),
        ),
        _llama(
            32,
            name="llama-3.1-8b-32x",
            note=(
                "the width comparison of study 2; whether its downstream SAE was widened too "
                "is unknown"
            ),
        ),
        _toy_model("text"),
        _toy_model("survey"),
    )
}


def get(name: str) -> ModelSpec:
    """The model called `name`."""
    if name not in MODEL_SPECS:
        raise unknown("model", name, MODEL_SPECS, "the catalogue")
    return MODEL_SPECS[name]


def load_model(
    source: "str | Path", *, device: str = "cpu", dtype: str = "float32", name: str | None = None
) -> "LanguageModel":
    """A model by its name in this catalogue, by its name on the hub, or from a local folder.

    >>> load_model("world-survey")
    LanguageModel(world-survey: 4 blocks, d_model 64, on cpu)
    """
    from sae_research import models

    if name is None and str(source) in MODEL_SPECS:
        return MODEL_SPECS[str(source)].load(device=device, dtype=dtype)
    return models.load_model(source, device=device, dtype=dtype, name=name)


def load_sae(
    release: "str | Path",
    sae_id: str | None = None,
    *,
    model: "LanguageModel | None" = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> "SAE":
    """An SAE by SAELens release and id, by model and role of this catalogue, or from a folder.

    With `model`, explained variance and L0 are looked at on a few tokens: a wrong load is
    warned of.

    >>> load_sae("world-survey", "block0_topk").cfg.d_in
    64
    """
    from sae_research import saes

    if sae_id is None or str(release) not in MODEL_SPECS:
        return saes.load_sae(release, sae_id, model=model, device=device, dtype=dtype)
    sae = MODEL_SPECS[str(release)].sae(sae_id, device=device, dtype=dtype)
    if model is not None:
        saes.warn_if_wrong(model, sae)
    return sae
