"""Training SAEs with SAELens: several SAEs in lock-step on identical batches, the three usual
kinds, exports of exact L0.

A study with a loss of its own subclasses a `TrainingSAE`; a study with a schedule of its own
subclasses `SAETrainer` and hands it over in `trainers`. Everything else (batches, seeds,
checks) stays the same for all SAEs.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm.auto import tqdm

from sae_research import activations, conversion, fast_training, saes
from sae_research.errors import ResearchError
from sae_research.hub import quiet
from sae_research.models import LanguageModel

if TYPE_CHECKING:
    from sae_lens import SAE, TrainingSAE
    from sae_lens.saes.sae import TrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    MakeTrainer = Callable[["TrainingSAE", "SAETraining"], "SAETrainer"]

NULLS = ("frozen_decoder", "soft_frozen_decoder", "frozen_encoder")
"""The null dictionaries of arXiv:2602.14111: SAEs that hardly learn directions of their own."""
SOFT_COSINE = 0.8
"""Least cosine of a soft-frozen decoder row to where it started."""


@dataclass(frozen=True)
class SAETraining:
    """How SAEs are trained; the kind and the width belong to each SAE's own config."""

    steps: int = 1000
    """Training steps."""
    batch_size: int = 1024
    """Activations a step."""
    lr: float = 1e-3
    """Peak learning rate of Adam."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Momentum terms of Adam."""
    warmup_steps: int = 50
    """Steps of linear warm-up of the learning rate."""
    decay: float = 0.3
    """Last share of the steps, in which the learning rate falls linearly to a hundredth."""
    dead_window: int = 100
    """Steps without firing after which a latent is dead (TopK's auxiliary loss revives it)."""
    centre: bool = True
    """Whether the decoder bias starts at the first batch's mean instead of zero."""


def trainer(
    sae: "TrainingSAE", settings: SAETraining, kind: "type[SAETrainer] | None" = None
) -> "SAETrainer":
    """SAELens's trainer (or a subclass of it) for one SAE."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    config = SAETrainerConfig(
        total_training_samples=settings.steps * settings.batch_size,
        train_batch_size_samples=settings.batch_size,
        lr=settings.lr,
        lr_end=settings.lr / 100,
        lr_warm_up_steps=settings.warmup_steps,
        lr_decay_steps=int(settings.decay * settings.steps),
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        dead_feature_window=settings.dead_window,
        feature_sampling_window=settings.steps + 1,
        device=sae.cfg.device,
    )
    run = (kind or SAETrainer)(config, sae, data_provider=iter(()))
    run.optimizer.param_groups[0]["fused"] = True
    return run


def train(
    configs: "dict[str, TrainingSAEConfig]",
    batches: Iterable[Tensor],
    settings: SAETraining,
    seed: int,
    trainers: "dict[str, MakeTrainer] | None" = None,
) -> "dict[str, TrainingSAE]":
    """Train all SAEs on the same batches in the same order, each started from the same seed.

    SAEs that ask for `expected_average_only_in` see activations of mean norm sqrt(d); the scale
    is folded back at the end. `trainers` names the SAEs that need more than SAELens's own
    trainer.
    """
    from sae_lens import TrainingSAE

    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise ResearchError("there are no activations to train on; collect some first.")
    scale = math.sqrt(first.shape[-1]) / first.norm(dim=-1).mean().item()
    running = {}
    with quiet():
        for name, config in configs.items():
            torch.manual_seed(seed)
            kind = TrainingSAE.get_sae_class_for_architecture(config.architecture())
            sae = fast_training.fast_class(kind)(config)
            running[name] = (trainers or {}).get(name, trainer)(sae, settings)
            scaled = config.normalize_activations == "expected_average_only_in"
            if scaled:
                running[name].activation_scaler.scaling_factor = scale
            if settings.centre:
                sae.b_dec.data = (first.mean(0) * (scale if scaled else 1.0)).to(sae.b_dec)
    steps = 0
    stream = islice(chain([first], batches), settings.steps)
    for batch in tqdm(stream, total=settings.steps, desc="SAEs", leave=False):
        for name, run in running.items():
            loss = run.step(batch).loss
            run.n_training_steps += 1
            if not torch.isfinite(loss):
                raise ResearchError(
                    f"the loss of SAE '{name}' is not finite at step {steps}; lower its learning "
                    "rate."
                )
        steps += 1
    if steps < settings.steps:
        raise ResearchError(
            f"the activations ended after {steps} of {settings.steps} steps; give more batches."
        )
    for run in running.values():
        if run.activation_scaler.scaling_factor is not None:
            run.sae.fold_activation_norm_scaling_factor(run.activation_scaler.scaling_factor)
            run.activation_scaler.scaling_factor = None
        run.set_final_sae_metadata()
        run.sae.W_enc.data = run.sae.W_enc.data.contiguous()
    return {name: run.sae.eval() for name, run in running.items()}


def train_sae(
    model: LanguageModel,
    hook: str,
    texts: list[str] | Tensor,
    *,
    width: int,
    k: int,
    settings: SAETraining | None = None,
    seed: int = 0,
) -> "SAE":
    """A TopK SAE of a model's residuals at `hook` on `texts` (or rows of tokens), ready to use.

    It knows its model and hook; `saes.save` writes it in SAELens format.
    """
    settings = settings or SAETraining()
    tokens = texts
    if not isinstance(texts, torch.Tensor):
        tokens = model.packed(list(texts), min(model.n_ctx, 128))
        tokens = tokens if len(tokens) else model.tokens(list(texts))
    data = activations.collect(model, tokens, hook)
    config = topk(model.d_model, width, k, metadata=saes.metadata(model, hook))
    stream = activations.batches(data, settings.batch_size, settings.steps, seed)
    return inference(train({"sae": config}, stream, settings, seed)["sae"], data)


_COMMON = {
    "dtype": "float32",
    "device": "cpu",
    "normalize_activations": "expected_average_only_in",
}


def topk(d_in: int, d_sae: int, k: int, **given) -> "TrainingSAEConfig":
    """A TopK SAE: every token keeps its `k` largest latents."""
    from sae_lens.saes.topk_sae import TopKTrainingSAEConfig

    return TopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae, **_COMMON, k=k, **given)


def jumprelu(
    d_in: int, d_sae: int, l0: float, coefficient: float = 0.2, **given
) -> "TrainingSAEConfig":
    """A JumpReLU SAE with a quadratic pull of the mean L0 towards `l0`.

    Only thresholds learn through the straight-through estimator: where it reaches the input
    too, most latents die.
    """
    from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAEConfig

    shape = {
        "jumprelu_sparsity_loss_mode": "quadratic",
        "target_l0": l0,
        "l0_coefficient": coefficient,
        "jumprelu_init_threshold": 0.1,
        "jumprelu_bandwidth": 0.1,
        "jumprelu_ste_to_input": False,
        "l0_warm_up_steps": 500,
    }
    return JumpReLUTrainingSAEConfig(d_in=d_in, d_sae=d_sae, **_COMMON, **(shape | given))


def relu(d_in: int, d_sae: int, coefficient: float = 0.3, **given) -> "TrainingSAEConfig":
    """A ReLU SAE with an L1 penalty; `aimed_at` steers the penalty to a mean L0."""
    from sae_lens.saes.standard_sae import StandardTrainingSAEConfig

    return StandardTrainingSAEConfig(
        d_in=d_in, d_sae=d_sae, **_COMMON, l1_coefficient=coefficient, **given
    )


def aimed_at(l0: float, rate: float = 0.01, gain: float = 0.5) -> "MakeTrainer":
    """A trainer whose sparsity coefficient follows (now and in sum) the log ratio of L0 to `l0`."""
    from sae_lens.training.sae_trainer import SAETrainer

    class AimedTrainer(SAETrainer):
        total = 0.0

        def step(self, batch: Tensor):
            output = super().step(batch)
            found = (output.feature_acts > 0).sum().item() / len(batch)
            excess = max(-1.0, min(1.0, math.log(max(found, 1e-3) / l0)))
            self.total += rate * excess
            for schedule in self.coefficient_schedulers.values():
                schedule.current_value = schedule.final_value * math.exp(self.total + gain * excess)
            return output

    return lambda sae, settings: trainer(sae, settings, AimedTrainer)


def held_at(l0: float, rate: float = 0.005) -> "MakeTrainer":
    """A trainer that scales all thresholds of a JumpReLU so that the L0 found stays near `l0`.

    The penalty alone is too slow: Adam moves a threshold by at most its learning rate a step.
    """
    from sae_lens.training.sae_trainer import SAETrainer

    class HeldTrainer(SAETrainer):
        def step(self, batch: Tensor):
            output = super().step(batch)
            found = (output.feature_acts > 0).sum().item() / len(batch)
            self.sae.threshold.data *= (max(found, 1e-3) / l0) ** rate
            return output

    return lambda sae, settings: trainer(sae, settings, HeldTrainer)


def with_nulls(
    configs: "Mapping[str, TrainingSAEConfig]",
    trainers: "Mapping[str, MakeTrainer] | None" = None,
) -> "tuple[dict[str, TrainingSAEConfig], dict[str, MakeTrainer]]":
    """The SAEs and the three null dictionaries of each, `<name>_<null>`: what `train` takes.

    Nulls have the same config, trainer and calibration as the SAE that they stand beside.
    """
    all_configs = dict(configs)
    all_trainers = dict(trainers or {})
    for name, config in configs.items():
        for null in NULLS:
            all_configs[f"{name}_{null}"] = copy.deepcopy(config)
            all_trainers[f"{name}_{null}"] = freeze(null, (trainers or {}).get(name, trainer))
    return all_configs, all_trainers


def freeze(null: str, make: "MakeTrainer" = trainer) -> "MakeTrainer":
    """The trainer of a null dictionary: `make`'s, with decoder or encoder kept where it starts."""

    def make_frozen(sae: "TrainingSAE", settings: SAETraining) -> "SAETrainer":
        if null == "frozen_encoder":
            sae.W_enc.requires_grad_(False)
            sae.b_enc.requires_grad_(False)
        elif null == "frozen_decoder":
            sae.W_dec.requires_grad_(False)
        run = make(sae, settings)
        if null == "soft_frozen_decoder":
            start = normalize(sae.W_dec.detach().clone(), dim=-1)
            step = run.step

            def step_and_return(batch: Tensor):
                output = step(batch)
                sae.W_dec.data = keep_near(sae.W_dec.data, start)
                return output

            run.step = step_and_return
        return run

    return make_frozen


def keep_near(rows: Tensor, start: Tensor, cosine: float = SOFT_COSINE) -> Tensor:
    """Rows turned towards their unit `start`, as little as a cosine of at least `cosine` asks."""
    norms = rows.norm(dim=-1, keepdim=True)
    along = (rows * start).sum(-1, keepdim=True)
    across = normalize(rows - along * start, dim=-1)
    turned = norms * (cosine * start + math.sqrt(1 - cosine**2) * across)
    return torch.where(along < cosine * norms, turned, rows)


def inference(sae: "TrainingSAE", activations: Tensor, k: float | None = None) -> "SAE":
    """The inference SAE, its weights float16 values: TopK and ReLU as trained, others of L0 `k`."""
    from sae_lens import SAE

    if sae.cfg.architecture() not in ("topk", "standard"):
        return conversion.exact_l0(sae, activations, k, half=True)
    with TemporaryDirectory() as folder, quiet():
        sae.save_inference_model(folder)
        export = SAE.load_from_disk(folder).eval().requires_grad_(False)
    return conversion.calibrated(conversion.rounded(export), activations)
