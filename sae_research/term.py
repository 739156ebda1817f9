"""Tilted empirical risk (TERM; Li et al., 2021) for SAEs: R(t) = (1/t) log mean exp(t loss_i).

Its gradient is that of the mean loss under the weights w = softmax(t loss), which are computed in
float32 and detached: nothing overflows, and no loss is clamped.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import LongTensor, Tensor

from sae_research import activations, training
from sae_research.errors import ResearchError
from sae_research.tilt import Tilt

if TYPE_CHECKING:
    from sae_lens import SAE, TrainingSAE
    from sae_lens.saes.sae import TrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer


def tilted_mean(losses: Tensor, t: float) -> Tensor:
    """(1/t) log mean exp(t loss), in float32; the mean for t = 0."""
    losses = losses.float()
    if not t:
        return losses.mean()
    top = losses.detach().max()
    return top + ((t * (losses - top)).exp().mean()).log() / t


def tilt_weights(losses: Tensor, t: float | Tensor) -> Tensor:
    """softmax(t loss) over the batch, detached, in float32."""
    losses = losses.detach().float()
    weights = torch.softmax(t * (losses - losses.max()), -1)
    if not torch.isfinite(weights).all():
        raise ResearchError(
            f"a tilt of {float(t):.3g} overflows on losses up to {float(losses.max()):.3g}; lower "
            "`t`, or aim at an effective sample size."
        )
    return weights


def effective_share(weights: Tensor) -> Tensor:
    """Effective sample size as a share of the batch: 1 / (B sum w^2), 1/B to 1."""
    return 1 / (weights.shape[-1] * weights.square().sum(-1))


def tilt_for_share(losses: Tensor, share: float, grid: int = 24) -> Tensor:
    """The tilt at which the effective share is `share`, by two grids over t mean loss."""
    scaled = losses.detach().float()
    scaled = (scaled - scaled.max()) / scaled.mean().clamp(min=1e-12)
    low, high = -4.0, 5.0
    for _ in range(2):
        exponents = torch.linspace(low, high, grid, device=losses.device)
        reached = effective_share(torch.softmax(10 ** exponents[:, None] * scaled, -1))
        after = int((reached >= share).sum().clamp(1, grid - 1))
        low, high = exponents[after - 1].item(), exponents[after].item()
    return 10 ** ((low + high) / 2) / losses.detach().float().mean().clamp(min=1e-12)


def bin_weights(losses: Tensor, bins: Tensor, t: float) -> Tensor:
    """Weights of tokens where the mean losses of bins are tilted (hierarchical TERM)."""
    count = torch.bincount(bins).clamp(min=1)
    means = torch.bincount(bins, weights=losses.detach().double()) / count
    seen = torch.bincount(bins) > 0
    scaled = torch.where(seen, t * (means - means[seen].max()), -torch.inf)
    return (torch.softmax(scaled, -1) / count)[bins].float()


def choose_weights(losses: Tensor, tilt: Tilt, bins: Tensor | None = None) -> Tensor:
    """Weights of the batch's tokens; they sum to one."""
    if not tilt.t or (tilt.unit == "effective sample size" and tilt.t >= 1):
        return torch.full_like(losses, 1 / len(losses), dtype=torch.float32)
    if tilt.unit == "effective sample size":
        return tilt_weights(losses, tilt_for_share(losses, tilt.t))
    t = tilt.t
    if tilt.unit == "mean loss":
        t /= max(losses.detach().float().mean().item(), 1e-12)
    return tilt_weights(losses, t) if bins is None else bin_weights(losses, bins, t)


class _Tilted:
    """What TERM changes of a `TrainingSAE`: the loss of its training step."""

    tilt = Tilt()
    bins: Tensor | None = None
    """Frequency bin of each token of the batch, where bins are tilted."""
    first_step = 0
    """Step at which the tilt sets in."""
    log_every = 20
    """Steps between two entries of the log."""

    def start_log(self, tilt: Tilt, steps: int) -> None:
        """Set the tilt for a training of `steps` steps."""
        self.tilt = tilt
        self.first_step = round(tilt.start * steps)
        self.log: list[dict[str, float]] = []

    def _losses(self, x: Tensor, out: Tensor, acts: Tensor, step_input: Any) -> Tensor:
        """Loss of each token in float32, also under autocast [tokens]."""
        with torch.autocast(x.device.type, enabled=False):
            losses = (out.float() - x.float()).square().sum(-1)
            if self.tilt.on == "total" and "l1" in step_input.coefficients:
                losses = losses + self._penalties(acts, step_input)
        return losses

    def _penalties(self, acts: Tensor, step_input: Any) -> Tensor:
        norms = acts.float() * self.W_dec.float().norm(dim=1)
        return step_input.coefficients["l1"] * norms.norm(p=self.cfg.lp_norm, dim=-1)

    def training_forward_pass(self, step_input: Any) -> Any:
        """SAELens's forward pass with the tilted mean in place of the mean over tokens."""
        from sae_lens.saes.sae import TrainStepOutput

        tilting = bool(self.tilt.t) and step_input.n_training_steps >= self.first_step
        fired = None
        if tilting and self.tilt.sampled is not None:
            step_input, fired, scored = self._draw(step_input)
        x = step_input.sae_in
        acts, hidden_pre = self.encode_with_hidden_pre(x)
        out = self.decode(acts)
        losses = self._losses(x, out, acts, step_input)
        if fired is None:
            weights = choose_weights(losses, self.tilt if tilting else Tilt(), self.bins)
            loss = (weights * losses).sum()
            scored = losses.detach(), weights
        else:
            loss = losses.mean()
        parts = {"mse_loss": loss}
        total = self.tilt.on == "total" and "l1" in step_input.coefficients
        if not total:
            parts |= self.calculate_aux_loss(step_input, acts, hidden_pre, out)
        loss = torch.stack([part.float() for part in parts.values()]).sum()
        self._check(loss, step_input.n_training_steps)
        if step_input.n_training_steps % self.log_every == 0:
            self.log.append({"step": step_input.n_training_steps, **describe(*scored)})
        acts = acts if fired is None else fired
        return TrainStepOutput(step_input.sae_in, out, acts, hidden_pre, loss, parts)

    @torch.no_grad()
    def _draw(self, step_input: Any) -> tuple[Any, Tensor, tuple[Tensor, Tensor]]:
        """The tokens of the backward pass, drawn by weight: their plain mean is unbiased."""
        x = step_input.sae_in
        acts, _ = self.encode_with_hidden_pre(x)
        losses = self._losses(x, self.decode(acts), acts, step_input)
        weights = choose_weights(losses, self.tilt, self.bins)
        n = max(1, round(self.tilt.sampled * len(x)))
        chosen = torch.multinomial(weights, n, replacement=True)
        return replace(step_input, sae_in=x[chosen]), acts, (losses, weights)

    def _check(self, loss: Tensor, step: int) -> None:
        """Stop before the weights change: the SAE keeps its last good state."""
        if not torch.isfinite(loss):
            raise ResearchError(
                f"the tilted loss is not finite at step {step} (t = {self.tilt.t:g}); lower the "
                "learning rate or the tilt. The SAE keeps the state before this step."
            )


def describe(losses: Tensor, weights: Tensor) -> dict[str, float]:
    """What is logged of a step: mean, 99 % quantile and maximum of the loss, effective share."""
    return {
        "mean": losses.mean().item(),
        "p99": losses.float().quantile(0.99).item(),
        "max": losses.max().item(),
        "effective_share": effective_share(weights).item(),
        "t_mean_loss": _scale_free(losses, weights),
    }


def _scale_free(losses: Tensor, weights: Tensor) -> float:
    """t times the mean loss, read off the weights of the largest and the smallest loss."""
    gap = (losses.max() - losses.min()).item()
    low, high = weights.min().item(), weights.max().item()
    if gap <= 0 or low <= 0:
        return 0.0 if gap <= 0 else float("inf")
    return float(torch.tensor(high / low).log()) / gap * losses.mean().item()


@cache
def tilted_classes() -> dict[str, tuple[type, type]]:
    """TERM's SAE and config class by kind (`topk`, `relu`), registered with SAELens once."""
    from sae_lens import registry
    from sae_lens.saes import standard_sae, topk_sae

    def make(name: str, sae: type, config: type, inference: type) -> tuple[type, type]:
        architecture = f"term_{name}"
        tilted_config = dataclass(
            type(
                f"Tilted{config.__name__}",
                (config,),
                {
                    "architecture": classmethod(lambda cls: architecture),
                    "get_inference_config_class": lambda self: inference,
                },
            )
        )
        tilted_sae = type(f"Tilted{sae.__name__}", (_Tilted, sae), {})
        if architecture not in registry.SAE_TRAINING_CLASS_REGISTRY:
            registry.register_sae_training_class(architecture, tilted_sae, tilted_config)
        return registry.get_sae_training_class(architecture)

    topk = (topk_sae.TopKTrainingSAE, topk_sae.TopKTrainingSAEConfig, topk_sae.TopKSAEConfig)
    relu = (
        standard_sae.StandardTrainingSAE,
        standard_sae.StandardTrainingSAEConfig,
        standard_sae.StandardSAEConfig,
    )
    return {"topk": make("topk", *topk), "relu": make("standard", *relu)}


def config(kind: str, d_in: int, d_sae: int, sparsity: float) -> "TrainingSAEConfig":
    """The config of a tilted SAE: `sparsity` is k of a TopK SAE, the L1 coefficient of a ReLU."""
    own = {"k": int(sparsity)} if kind == "topk" else {"l1_coefficient": float(sparsity)}
    given = {"d_in": d_in, "d_sae": d_sae, "dtype": "float32", "device": "cpu"}
    return tilted_classes()[kind][1](**given, **own)


def tilted(
    tilt: Tilt,
    start: "dict[str, Tensor] | None" = None,
    before: "SAE | None" = None,
    bins: tuple[Tensor, int] | None = None,
    lr: float | None = None,
) -> "training.MakeTrainer":
    """A trainer with a tilt, for `training.train`.

    It begins from the weights `start`, or anew; with `before` it learns that SAE's error instead
    of the residual. `bins` are the frequency bins of all activations and the seed of their order;
    `lr` replaces the settings' peak learning rate.
    """
    from sae_lens.training.sae_trainer import SAETrainer

    class TiltedTrainer(SAETrainer):
        stream = None

        def step(self, batch: Tensor):
            if self.stream is not None:
                self.sae.bins = next(self.stream)
            return super().step(batch if before is None else _error(before, batch))

    def make(sae: "TrainingSAE", settings: training.SAETraining) -> "SAETrainer":
        if start is not None:
            sae.load_state_dict(start)
        sae.start_log(tilt, settings.steps)
        settings = settings if lr is None else replace(settings, lr=lr)
        made = training.trainer(sae, settings, TiltedTrainer)
        if bins is not None:
            labels, seed = bins
            made.stream = activations.batches(labels, settings.batch_size, settings.steps, seed)
        return made

    return make


@torch.no_grad()
def _error(sae: "SAE", x: Tensor) -> Tensor:
    return x - sae.decode(sae.encode(x))


def bin_by_frequency(types: LongTensor, bins: int) -> LongTensor:
    """A bin for each token: types in `bins` equally large groups by frequency."""
    counts = torch.bincount(types)
    order = counts[counts > 0].argsort(stable=True).argsort(stable=True)
    group = torch.zeros_like(counts)
    group[counts > 0] = order * bins // len(order)
    return group[types]
