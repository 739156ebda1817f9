"""The SAEs of a specimen: how they are trained, how they are read back, and what screening can use of them."""

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sae_research import activations, saes, training
from sae_research.models import LanguageModel
from sae_research.training import SAETraining

if TYPE_CHECKING:
    from sae_lens import SAE
    from sae_lens.saes.sae import TrainingSAEConfig


@dataclass(frozen=True)
class SpecimenSAEs:
    """The SAEs of a specimen: some kinds at each of its hooks, and one wider."""

    hooks: tuple[str, str]
    """An early hook and one two blocks later."""
    latents: int
    """Latents of each, eight times the residual's width."""
    l0: int
    """Mean number of active latents a token."""
    documents: int
    """Documents whose residuals the SAEs are trained on."""
    calibration: int
    """Further documents on which thresholds are calibrated."""
    relu_l0: int = 20
    """`l0` of the ReLU kind, whose L1 penalty shrinks all codes and costs too much at that of the others."""
    kinds: tuple[str, ...] = ("topk", "jumprelu", "relu")
    """Kinds of SAE at every hook."""
    wide: int = 4
    """The first kind is also trained this many times wider at the first hook (0: not)."""
    training: SAETraining = field(default_factory=SAETraining)
    """How they are trained."""

    @property
    def first(self) -> dict[str, str]:
        """The SAE of the first kind at each hook."""
        return {hook: _name(hook, self.kinds[0]) for hook in self.hooks}

    def arms(self, width: int, hook: str) -> "dict[str, TrainingSAEConfig]":
        """The SAEs at one hook of a residual stream of this width, by name."""
        make = {
            "topk": lambda latents: training.topk(width, latents, self.l0),
            "jumprelu": lambda latents: training.jumprelu(width, latents, self.l0),
            "relu": lambda latents: training.relu(width, latents),
        }
        chosen = {_name(hook, kind): make[kind](self.latents) for kind in self.kinds}
        if self.wide and hook == self.hooks[0]:
            chosen[f"{self.first[hook]}_wide"] = make[self.kinds[0]](self.wide * self.latents)
        return chosen


def _name(hook: str, kind: str) -> str:
    return f"block{hook.split('.')[1]}_{kind}"


def train(
    saes: SpecimenSAEs,
    lens: LanguageModel,
    read: torch.Tensor,
    held: torch.Tensor,
    seed: int,
    folder: Path,
    places: Collection[int] | None = None,
) -> None:
    """Train the SAEs of all hooks, or of those at `places`, on the tokens `read`, into `folder`/name.

    Those of a hook run in lock-step on the same batches; thresholds are set on the tokens `held`.
    """
    for place, hook in enumerate(saes.hooks):
        if places is not None and place not in places:
            continue
        acts, calibration = (
            activations.collect(lens, tokens, hook, batch=256) for tokens in (read, held)
        )
        configs = saes.arms(lens.d_model, hook)
        for config in configs.values():
            config.metadata = saes.metadata(lens, hook)
        trained = training.train(
            configs,
            activations.batches(acts, saes.training.batch, saes.training.steps, seed),
            saes.training,
            seed,
            {name: training.aimed_at(saes.relu_l0) for name in configs if name.endswith("_relu")}
            | {name: training.held_at(saes.l0) for name in configs if name.endswith("_jumprelu")},
        )
        for name, sae in trained.items():
            saes.save(training.inference(sae, calibration, saes.l0), Path(folder) / name, half=True)


def load(folder: Path) -> "dict[str, SAE]":
    """The SAEs of a folder by name, early hooks first."""
    return {
        path.parent.name: saes.load_sae(path.parent)
        for path in sorted(Path(folder).glob("*/cfg.json"))
    }


def eligible(lens: LanguageModel, sae: "SAE", contexts: torch.Tensor) -> int:
    """Latents that fire on the last token of .2 to 50 % of contexts of one length, as a screening study needs them."""
    with torch.no_grad():
        last = [lens.residual(rows, saes.hook_of(sae))[:, -1] for rows in contexts.split(256)]
        frequency = (sae.encode(torch.cat(last)) > 0).double().mean(0)
    return int(((frequency >= 0.002) & (frequency <= 0.5)).sum())
