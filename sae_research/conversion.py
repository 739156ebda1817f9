"""An SAE in another form: a JumpReLU SAE at an exact L0, unit decoder rows, another k, stacked."""

import copy
from dataclasses import fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae_research.errors import ResearchError
from sae_research.hub import quiet
from sae_research.saes import freeze

if TYPE_CHECKING:
    from sae_lens import SAE


def exact_l0(
    sae: "SAE", activations: Tensor, k: float, batch: int = 4096, half: bool = False
) -> "SAE":
    """A JumpReLU SAE with `sae`'s weights and unit decoder rows whose mean L0 on `activations` is
    `k`.

    All thresholds (those of a JumpReLU, else zero) move by one shift: the quantile of
    pre-activation less threshold that leaves k active latents a token. `half` rounds the
    weights before, as `save` will, so that L0 stays exact.
    """
    export = _unit_jumprelu(sae)
    if half:
        rounded(export)
    wanted = round(k * len(activations))
    best = torch.empty(0)
    active = 0
    with torch.no_grad():
        for x in activations.split(batch):
            pre = export.process_sae_in(x.to(export.device)) @ export.W_enc + export.b_enc
            margin = (pre - export.threshold)[pre > 0].float().cpu()
            active += len(margin)
            if len(best) > wanted:
                margin = margin[margin >= best[-1]]
            best = torch.cat([best, margin]).sort(descending=True).values[: wanted + 1]
        if active < wanted or wanted < 1:
            raise ResearchError(
                f"no threshold gives {k} active latents a token: this SAE has "
                f"{active / len(activations):.1f} with a positive pre-activation; ask for fewer, "
                "or train it less sparsely."
            )
        weakest = best[wanted - 1]
        shift = (weakest + best[wanted]) / 2 if active > wanted else weakest - weakest.abs() / 2
        export.threshold.data = (export.threshold + shift.item()).clamp(min=0)
    return calibrated(export, activations, batch)


def calibrated(sae: "SAE", activations: Tensor, batch: int = 4096) -> "SAE":
    """The SAE, with its mean L0 on `activations` in its metadata."""
    l0 = sum((sae.encode(x) > 0).sum().item() for x in activations.split(batch)) / len(activations)
    sae.cfg.metadata.calibrated_l0 = l0
    sae.cfg.metadata.calibration_tokens = len(activations)
    return sae


def rounded(sae: "SAE") -> "SAE":
    """The SAE with all but its thresholds rounded to float16 values, kept in its own format."""
    for name, parameter in sae.named_parameters():
        if name != "threshold":
            parameter.data = parameter.half().to(parameter.dtype)
    return sae


def _unit_jumprelu(sae: "SAE") -> "SAE":
    """The dictionary as a JumpReLU SAE of unit decoder rows (activations take up the norms)."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE
    from sae_lens.saes.standard_sae import StandardSAE, StandardTrainingSAE
    from sae_lens.saes.topk_sae import TopKSAE, TopKTrainingSAE

    jump = isinstance(sae, JumpReLUSAE | JumpReLUTrainingSAE)
    if not jump and not isinstance(
        sae, StandardSAE | StandardTrainingSAE | TopKSAE | TopKTrainingSAE
    ):
        raise ResearchError(
            f"an SAE of kind '{sae.cfg.architecture()}' has no threshold; use ReLU or TopK kinds."
        )
    if sae.cfg.normalize_activations == "expected_average_only_in":
        raise ResearchError(
            "fold the activation scale into the SAE first (`fold_activation_norm_scaling_factor`)."
        )
    with quiet(), torch.no_grad():
        shared = {field.name: getattr(sae.cfg, field.name) for field in fields(JumpReLUSAEConfig)}
        config = JumpReLUSAEConfig(**shared)
        config.metadata = copy.deepcopy(sae.cfg.metadata)
        export = JumpReLUSAE(config)
        norm = sae.W_dec.norm(dim=-1).clamp(min=1e-8)
        export.W_dec.data = sae.W_dec / norm[:, None]
        export.b_dec.data = sae.b_dec.clone()
        export.W_enc.data = sae.W_enc * norm
        export.b_enc.data = sae.b_enc * norm
        export.threshold.data = (
            sae.threshold.to(norm).clamp(min=0) * norm if jump else torch.zeros_like(norm)
        )
    return freeze(export)


def unit_rows(sae: "SAE") -> "SAE":
    """A TopK SAE whose decoder rows have norm 1, so that activations need no rescaling."""
    if not getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        return sae
    own = copy.deepcopy(sae)
    own.fold_W_dec_norm()
    own.cfg.rescale_acts_by_decoder_norm = False
    return own


def in_raw_units(sae: "SAE", scale: float) -> "SAE":
    """The SAE for residuals as the model has them, frozen, with unit decoder rows."""
    own = unit_rows(sae)
    own.fold_activation_norm_scaling_factor(scale)
    # the rows now have norm 1 / scale: activations take it up
    norm = own.W_dec.norm(dim=1, keepdim=True)
    own.W_enc.data *= norm.T
    own.b_enc.data *= norm[:, 0]
    own.W_dec.data /= norm
    return own.eval().requires_grad_(False)


class Stacked(torch.nn.Module):
    """A general SAE and a small one on its error, as one SAE (SAE Boost; Drori 2024)."""

    def __init__(self, general: "SAE", small: "SAE"):
        super().__init__()
        self.general, self.small = general, small
        self.cfg = copy.copy(general.cfg)
        self.cfg.d_sae = general.cfg.d_sae + small.cfg.d_sae
        self.device = general.device

    @property
    def W_dec(self) -> Tensor:
        return torch.cat([self.general.W_dec, self.small.W_dec])

    def encode(self, x: Tensor) -> Tensor:
        acts = self.general.encode(x)
        return torch.cat([acts, self.small.encode(x - self.general.decode(acts))], -1)

    def decode(self, acts: Tensor) -> Tensor:
        own, small = acts.split([self.general.cfg.d_sae, self.small.cfg.d_sae], -1)
        return self.general.decode(own) + self.small.decode(small)


def with_k(sae: "SAE", k: int) -> "SAE":
    """The same TopK SAE with another k."""
    cfg = copy.copy(sae.cfg)
    cfg.k = k
    own = type(sae)(cfg)
    own.load_state_dict(sae.state_dict())
    return own.eval().requires_grad_(False)
