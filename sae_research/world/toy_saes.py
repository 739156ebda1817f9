"""The SAEs of a toy model: how they are trained and loaded, what screening can use of them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from sae_research import activations, saes, training
from sae_research.models import LanguageModel
from sae_research.training import SAETraining

if TYPE_CHECKING:
    from sae_lens import SAE
    from sae_lens.saes.sae import TrainingSAEConfig


@dataclass(frozen=True)
class ToySAEs:
    """The SAEs of a toy model: three kinds at each of its hooks, and one four times wider."""

    hooks: tuple[str, str]
    """An early hook and one two blocks later."""
    latents: int
    """Latents of each, eight times the residual's width."""
    l0: int
    """Mean number of active latents per token."""
    documents: int
    """Documents whose residuals the SAEs are trained on."""
    calibration: int
    """Further documents on which thresholds are calibrated."""
    relu_l0: int = 20
    """`l0` of the ReLU kind, whose L1 penalty costs too much at that of the others."""
    training: SAETraining = field(default_factory=SAETraining)
    """How they are trained."""

    @property
    def first(self) -> dict[str, str]:
        """The top-k SAE at each hook."""
        return {hook: f"block{hook.split('.')[1]}_topk" for hook in self.hooks}

    def make_configs(self, width: int, hook: str) -> "dict[str, TrainingSAEConfig]":
        """The SAEs at one hook of a residual stream of this width, by name."""
        block = f"block{hook.split('.')[1]}"
        chosen: dict[str, TrainingSAEConfig] = {
            f"{block}_topk": training.topk(width, self.latents, self.l0),
            f"{block}_jumprelu": training.jumprelu(width, self.latents, self.l0),
            f"{block}_relu": training.relu(width, self.latents),
        }
        if hook == self.hooks[0]:
            chosen[f"{block}_topk_wide"] = training.topk(width, 4 * self.latents, self.l0)
        return chosen


def train_saes(
    recipe: ToySAEs,
    model: LanguageModel,
    tokens: np.ndarray,
    held_out: np.ndarray,
    seed: int,
    folder: Path,
    hook_index: int,
) -> None:
    """Train the SAEs of the hook at `hook_index` on `tokens`, into `folder`/name.

    They run in lock-step on the same batches; thresholds are set on `held_out`.
    """
    hook = recipe.hooks[hook_index]
    acts, calibration = (
        activations.collect(model, torch.from_numpy(part).long(), hook, batch=256)
        for part in (tokens, held_out)
    )
    configs = recipe.make_configs(model.d_model, hook)
    for config in configs.values():
        config.metadata = saes.metadata(model, hook)
    trained = training.train(
        configs,
        activations.batches(acts, recipe.training.batch_size, recipe.training.steps, seed),
        recipe.training,
        seed,
        {name: training.aimed_at(recipe.relu_l0) for name in configs if name.endswith("_relu")}
        | {name: training.held_at(recipe.l0) for name in configs if name.endswith("_jumprelu")},
    )
    for name, sae in trained.items():
        saes.save(training.inference(sae, calibration, recipe.l0), Path(folder) / name, half=True)


def load_saes(folder: Path) -> "dict[str, SAE]":
    """The SAEs of a folder by name, early hooks first."""
    found = sorted(Path(folder).glob("*/cfg.json"))
    return {path.parent.name: saes.load_sae(path.parent) for path in found}


def count_eligible(model: LanguageModel, sae: "SAE", contexts: torch.Tensor) -> int:
    """How many latents fire on the last token of .2 to 50 % of contexts, as screening needs."""
    with torch.no_grad():
        last = [model.residual(rows, saes.hook_of(sae))[:, -1] for rows in contexts.split(256)]
        frequency = (sae.encode(torch.cat(last)) > 0).double().mean(0)
    return int(((frequency >= 0.002) & (frequency <= 0.5)).sum())
