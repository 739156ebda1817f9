"""The decomposability penalty as a SAELens architecture (section 3 of the paper), and OrtSAE.

A meta SAE rebuilds the unit decoder rows of the primary SAE; the primary pays for every row that it
rebuilds well. Importing this module registers `decomp_batchtopk` and `ortsae_batchtopk`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from sae_lens import register_sae_training_class
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.sae import TrainCoefficientConfig, TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from torch.nn.functional import normalize

from sae_research import training
from sae_research.training import SAETraining

Rebuild = Callable[[Tensor], Tensor]
"""Unit decoder rows [n, d] to their reconstruction, without gradient."""


def reconstruction_errors(rows: Tensor, rebuilt: Tensor) -> Tensor:
    """e_i = |w_i - w_hat_i|^2 of each row [n]."""
    return (rows - rebuilt).square().sum(-1)


def penalty(errors: Tensor, sigma2: float) -> Tensor:
    """Mean over rows of exp(-e_i / sigma^2), between exp(-max e / sigma^2) and 1."""
    return (-errors / sigma2).exp().mean()


@dataclass
class MetaConfig:
    """The meta SAE and the alternation of the two trainings (section 3.2)."""

    d_sae: int = 1800
    k: float = 8
    n_primary_steps: int = 10
    n_meta_steps: int = 5
    kind: str = "trained"
    """`trained`; `random` is never trained; `shuffled` pushes each row away from another's
    reconstruction."""
    refresh_every: int = 1
    """Primary steps for which one reconstruction of the rows is used."""
    seed: int = 0


@dataclass
class BiasConfig(BatchTopKTrainingSAEConfig):
    """BatchTopK whose encoder has a bias or not; the paper's has none that enters its codes."""

    encoder_bias: bool = True


class BiasBatchTopK(BatchTopKTrainingSAE):
    """BatchTopK whose encoder bias may be held at zero."""

    cfg: BiasConfig
    sparse_codes = True

    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.b_enc.requires_grad_(self.cfg.encoder_bias)


@dataclass
class DecompBatchTopKConfig(BiasConfig):
    """A BatchTopK SAE that pays for decoder rows which a meta SAE rebuilds.

    `lambda2` is the paper's, for an MSE that is a mean over d; SAELens' is a sum, so the
    coefficient is d_in times as large.
    """

    lambda2: float = 0.3
    sigma2: float = 1.0
    warm_up_steps: int = 0
    meta: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def architecture(cls) -> str:
        return "decomp_batchtopk"


class DecompBatchTopK(BiasBatchTopK):
    """BatchTopK with one more term in its loss; without a critic the term is absent."""

    cfg: DecompBatchTopKConfig
    rebuild: Rebuild | None = None

    def get_coefficients(self) -> dict[str, TrainCoefficientConfig | float]:
        value = float(self.cfg.d_in * self.cfg.lambda2)
        return {"decomposability": TrainCoefficientConfig(value, self.cfg.warm_up_steps)}

    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        losses = super().calculate_aux_loss(step_input, feature_acts, hidden_pre, sae_out)
        if self.rebuild is not None:
            rows = normalize(self.W_dec, dim=-1)
            errors = reconstruction_errors(rows, self.rebuild(rows.detach()))
            coefficient = step_input.coefficients["decomposability"]
            losses["decomposability_loss"] = coefficient * penalty(errors, self.cfg.sigma2)
        return losses


class JointTrainer(SAETrainer):
    """Trains primary and meta SAE in turns: n_p primary steps, then n_m meta steps.

    The meta SAE and its optimiser stay outside the primary's parameters and state.
    """

    def __init__(self, cfg: SAETrainerConfig, sae: DecompBatchTopK, data_provider) -> None:
        super().__init__(cfg, sae, data_provider)
        self.schedule = MetaConfig(**sae.cfg.meta)
        self.meta = self._make_meta(cfg)
        self.n_meta_steps = 0
        self._rebuilt: Tensor | None = None
        draw = torch.Generator().manual_seed(self.schedule.seed)
        self._others = torch.randperm(sae.cfg.d_sae, generator=draw).to(sae.W_dec.device)
        object.__setattr__(sae, "rebuild", self._rebuild)  # no submodule, no parameter

    def _make_meta(self, primary: SAETrainerConfig) -> SAETrainer:
        """The meta SAE's own trainer; every batch of it is the whole decoder."""
        cfg, schedule = self.sae.cfg, self.schedule
        torch.manual_seed(schedule.seed)
        meta_sae = BatchTopKTrainingSAE(
            meta_config(
                cfg.d_in,
                schedule.d_sae,
                schedule.k,
                aux_loss_coefficient=cfg.aux_loss_coefficient,
                device=cfg.device,
            )
        )
        macro_steps = primary.total_training_steps // schedule.n_primary_steps
        settings = SAETraining(
            steps=max(1, macro_steps * schedule.n_meta_steps),
            batch_size=cfg.d_sae,
            lr=primary.lr,
            betas=(primary.adam_beta1, primary.adam_beta2),
            warmup_steps=0,
            decay=0.0,
            dead_window=primary.dead_feature_window,
        )
        return training.trainer(meta_sae, settings)

    @torch.no_grad()
    def _rebuild(self, rows: Tensor) -> Tensor:
        """The meta SAE's reconstruction; unlike a training pass it counts no dead latents."""
        if self._rebuilt is None or self.n_training_steps % self.schedule.refresh_every == 0:
            self._rebuilt = self.meta.sae(rows)
        if self.schedule.kind == "shuffled":
            return self._rebuilt[self._others]
        return self._rebuilt

    def step(self, batch: Tensor):
        output = super().step(batch)
        turn = (self.n_training_steps + 1) % self.schedule.n_primary_steps == 0
        if turn and self.schedule.kind != "random":
            rows = normalize(self.sae.W_dec.detach(), dim=-1)
            for _ in range(self.schedule.n_meta_steps):
                self.meta.step(rows)
                self.meta.n_training_steps += 1
                self.n_meta_steps += 1
        return output

    @torch.no_grad()
    def errors(self) -> Tensor:
        """How badly the meta SAE rebuilds each row now [n]."""
        rows = normalize(self.sae.W_dec, dim=-1)
        return reconstruction_errors(rows, self.meta.sae(rows))


def meta_config(d_in: int, d_sae: int, k: float, **given) -> BatchTopKTrainingSAEConfig:
    """An unmodified BatchTopK SAE of decoder rows, its own rows of unit norm at the start."""
    return BatchTopKTrainingSAEConfig(
        d_in=d_in, d_sae=d_sae, k=k, decoder_init_norm=1.0, apply_b_dec_to_input=True, **given
    )


@dataclass
class OrtBatchTopKConfig(BiasConfig):
    """OrtSAE (arXiv 2509.22033): BatchTopK that pays for the nearest decoder row in a chunk.

    `gamma` belongs to an MSE that is a mean over d, as `lambda2` does.
    """

    gamma: float = 0.25
    chunk: int = 8192

    @classmethod
    def architecture(cls) -> str:
        return "ortsae_batchtopk"


class OrtBatchTopK(BiasBatchTopK):
    """BatchTopK with the mean squared largest cosine in random chunks of the decoder."""

    cfg: OrtBatchTopKConfig

    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        losses = super().calculate_aux_loss(step_input, feature_acts, hidden_pre, sae_out)
        draw = torch.Generator().manual_seed(step_input.n_training_steps)
        order = torch.randperm(self.cfg.d_sae, generator=draw).to(self.W_dec.device)
        rows = normalize(self.W_dec, dim=-1)[order]
        chunks = rows.split(self.cfg.chunk)
        nearest = torch.stack([largest_cosine(part).square().mean() for part in chunks])
        losses["orthogonality_loss"] = self.cfg.d_in * self.cfg.gamma * nearest.mean()
        return losses


def largest_cosine(rows: Tensor) -> Tensor:
    """The cosine of each unit row with its nearest other row [n]."""
    own = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    return (rows @ rows.T).masked_fill(own, -1.0).max(-1).values


_KINDS = ((DecompBatchTopK, DecompBatchTopKConfig), (OrtBatchTopK, OrtBatchTopKConfig))
for _kind, _config in _KINDS:
    if _config.architecture() not in SAE_TRAINING_CLASS_REGISTRY:
        register_sae_training_class(_config.architecture(), _kind, _config)
