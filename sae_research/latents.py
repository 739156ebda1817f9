"""An SAE's latents: what they do on text, and what weights alone say of their directions."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from sae_lens import SAE

    from sae_research.last_token import LastToken
    from sae_research.models import LanguageModel

FIRES = 1e-6
"""A latent fires above this activation (published code of study 2)."""
LatentEncoder = Callable[[torch.Tensor], torch.Tensor]
"""Takes residuals [..., d] and returns float32 activations [..., latents]."""
TOP_LOGITS = (10, 50, 100, 500)
DIRECT_LOGIT = ("logit_l2", "logit_linf", "logit_entropy", "logit_exp_entropy")
DIRECT_LOGIT += tuple(f"logit_top{k}" for k in TOP_LOGITS)


# on text


def make_latent_encoder(sae: "SAE", latents: torch.Tensor) -> LatentEncoder:
    """An encoder of some latents alone, which computes no others where that is exact."""
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE
    from sae_lens.saes.standard_sae import StandardSAE

    latents = latents.to(sae.device)
    if not isinstance(sae, StandardSAE | JumpReLUSAE):  # in TopK SAEs latents compete
        return lambda residual: encode(sae, residual)[..., latents]
    W = sae.W_enc[:, latents]
    b = sae.b_enc[latents]
    threshold = sae.threshold[latents] if isinstance(sae, JumpReLUSAE) else None

    def encode_latents(residual: torch.Tensor) -> torch.Tensor:
        pre = sae.process_sae_in(residual.to(sae.device)) @ W + b
        post = sae.activation_fn(pre)
        return (post if threshold is None else post * (pre > threshold)).float()

    return encode_latents


def encode(sae: "SAE", residual: torch.Tensor) -> torch.Tensor:
    """All latents' activations as a dense float32 tensor."""
    return sae.encode(residual.to(sae.device)).to_dense().float()


class ActivationSums:
    """Sums over tokens of each latent's activation a, from which its statistics follow."""

    def __init__(self, n_latents: int, device: torch.device):
        self.n_tokens = 0
        # sums of a, a^2, a^3, a^4; of a ln a; tokens on which it fires; its largest activation
        self.powers = torch.zeros(4, n_latents, dtype=torch.float64, device=device)
        self.log_sum, self.firing, self.largest = self.powers.new_zeros(3, n_latents)

    def add(self, acts: torch.Tensor) -> None:
        """Count in the activations of some tokens [tokens, latents]."""
        self.n_tokens += len(acts)
        power = acts
        for k in range(4):
            self.powers[k] += power.sum(0)
            power = power * acts
        self.log_sum += torch.special.xlogy(acts, acts).sum(0)
        self.firing += (acts > FIRES).sum(0)
        self.largest = torch.maximum(self.largest, acts.max(0).values.double())

    def compute_statistics(self, latents: torch.Tensor) -> dict[str, np.ndarray]:
        """Mean, std, max, frequency, kurtosis m4/m2^2 and normalised entropy of some latents."""
        a1, a2, a3, a4 = self.powers[:, latents] / self.n_tokens
        variance = (a2 - a1**2).clamp(min=0)
        m4 = a4 - 4 * a1 * a3 + 6 * a1**2 * a2 - 3 * a1**4
        total = self.powers[0, latents].clamp(min=1e-12)
        entropy = (total.log() - self.log_sum[latents] / total) / np.log(self.n_tokens)
        statistics = {
            "mean": a1,
            "std": variance.sqrt(),
            "max": self.largest[latents],
            "frequency": self.firing[latents] / self.n_tokens,
            "kurtosis": m4 / variance.clamp(min=1e-12) ** 2,
            "entropy": entropy.clamp(0, 1),
        }
        return {name: value.cpu().numpy() for name, value in statistics.items()}


@torch.no_grad()
def find_top_contexts(
    engine: "LastToken", sae: "SAE", tokens: torch.Tensor, latents: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The `k` contexts in which each latent is most active at any token but BOS.

    Returns activations, contexts and positions, each [k, latents], the most active first.
    """
    best: tuple[torch.Tensor, ...] | None = None
    encode_latents = make_latent_encoder(sae, latents)
    for contexts in torch.arange(len(tokens), device=tokens.device).split(64):
        acts, position = encode_latents(engine.residual(tokens[contexts]))[:, 1:].max(1)
        found = (acts, contexts[:, None].expand_as(position).to(position), position + 1)
        if best is not None:
            found = tuple(torch.cat(pair) for pair in zip(best, found, strict=True))
        order = found[0].topk(min(k, len(found[0])), dim=0).indices
        best = tuple(value.gather(0, order) for value in found)
    return best


# from weights alone


def measure_crowding(
    decoder: torch.Tensor, features: torch.Tensor, nearest: int = 20, chunk: int = 4096
) -> torch.Tensor:
    """[features, nearest]: the largest |cos| of each decoder row with any other, descending."""
    unit = decoder / decoder.norm(dim=1, keepdim=True).clamp(min=1e-8)
    best = torch.empty(len(features), 0, device=decoder.device)
    for start in range(0, len(unit), chunk):
        cosine = (unit[features] @ unit[start : start + chunk].T).abs()
        inside = (features >= start) & (features < start + chunk)
        cosine[inside.nonzero()[:, 0], features[inside] - start] = 0.0
        best = torch.cat([best, cosine], dim=1).sort(dim=1, descending=True).values[:, :nearest]
    return best


def find_neighbours(
    decoder: torch.Tensor, feature: int, nearest: int = 10
) -> list[tuple[int, float]]:
    """The decoder rows most aligned with one feature's, with their signed cosines."""
    unit = decoder / decoder.norm(dim=1, keepdim=True).clamp(min=1e-8)
    cosine = unit @ unit[feature]
    cosine[feature] = 0.0
    found = cosine.abs().topk(min(nearest, len(cosine) - 1)).indices
    return [(int(i), float(cosine[i])) for i in found]


@torch.no_grad()
def fold_unembedding(model: "LanguageModel", folded: bool = True) -> torch.Tensor:
    """W_U in float32; `folded` takes in the final norm's gain (and centring) and centres over the
    vocabulary.

    The gain is read off the norm's response to one vector, however a model stores it.
    """
    W = model.bridge.W_U.detach().float()
    if not folded:
        return W
    norm = model.bridge.ln_final
    dtype = next(norm.parameters()).dtype
    sign = torch.ones(model.d_model, device=W.device, dtype=dtype)
    sign[1::2] = -1  # mean 0 and root mean square 1, so neither kind of norm changes its scale
    W = ((norm(sign) - norm(-sign)).float() / 2 * sign.float())[:, None] * W
    centres = torch.allclose(norm(sign + 1), norm(sign), atol=1e-2)
    W = W - W.mean(0, keepdim=True) if centres else W
    return W - W.mean(1, keepdim=True)


def measure_direct_logits(directions: torch.Tensor, W: torch.Tensor) -> dict[str, np.ndarray]:
    """Statistics of r_f = d_f W_U and of its mass m = |r| / sum |r|."""
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in DIRECT_LOGIT}
    for part in directions.split(64):
        size = (part @ W).abs()
        mass = size / size.sum(1, keepdim=True).clamp(min=1e-12)
        entropy = -torch.special.xlogy(mass, mass).sum(1)
        top = mass.sort(dim=1, descending=True).values.cumsum(1)
        rows["logit_l2"].append(size.norm(dim=1))
        rows["logit_linf"].append(size.max(1).values)
        rows["logit_entropy"].append(entropy)
        rows["logit_exp_entropy"].append(entropy.exp())
        for k in TOP_LOGITS:
            # all of a small vocabulary is 1 exactly, without the noise of a sum
            whole = k >= top.shape[1]
            rows[f"logit_top{k}"].append(torch.ones_like(top[:, 0]) if whole else top[:, k - 1])
    return {name: torch.cat(parts).cpu().numpy() for name, parts in rows.items()}
