"""TracIn for SAEs in closed form: the inner product of a chunk's gradient with the seeds'.

TracIn (Pruthi et al., 2020) scores a training example by the inner product of its loss gradient
with that of the examples of interest. For an SAE with loss |x - x_hat|^2 + c sum_i f_i |w_i| all
four gradients of a token are outer products or vectors, so that no backward pass is needed.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sae_lens import SAE


@dataclass
class TokenGradients:
    """Factors of the gradients of a batch of tokens."""

    acts: Tensor
    """Activations f [tokens, latents]; the decoder's gradient is f_i (-2 r + c w_i / |w_i|)."""
    pull: Tensor
    """-2 r, r being the error x - x_hat [tokens, d]."""
    inputs: Tensor
    """What the encoder reads, u [tokens, d]; the encoder's gradient is u delta^T."""
    delta: Tensor
    """Gradient at the pre-activations [tokens, latents], also that of the encoder's bias."""
    b_dec: Tensor
    """Gradient of the decoder's bias [tokens, d]."""


@dataclass
class Gradient:
    """A gradient of the four parameter blocks."""

    W_dec: Tensor
    W_enc: Tensor
    b_enc: Tensor
    b_dec: Tensor


class TracIn:
    """Scores of chunks by one SAE, whose activations must not be rescaled by decoder norms."""

    def __init__(self, sae: "SAE", penalty: float = 0.0):
        """`penalty` is the coefficient of the L1 term (activations times decoder norms)."""
        self.sae = sae
        self.penalty = penalty
        self.W_dec, self.W_enc = sae.W_dec.detach(), sae.W_enc.detach()
        self.norm = self.W_dec.norm(dim=1)
        self.unit = self.W_dec / self.norm.clamp(min=1e-8)[:, None]

    @torch.no_grad()
    def _factors(self, x: Tensor) -> TokenGradients:
        acts = self.sae.encode(x)
        pull = 2 * (self.sae.decode(acts) - x)
        delta = (acts > 0) * (pull @ self.W_dec.T + self.penalty * self.norm)
        inputs, b_dec = x, pull
        if self.sae.cfg.apply_b_dec_to_input:
            inputs = x - self.sae.b_dec.detach()
            b_dec = pull - delta @ self.W_enc.T
        return TokenGradients(acts, pull, inputs, delta, b_dec)

    def mean_gradient(self, batches: Iterable[Tensor]) -> Gradient:
        """Mean gradient over all tokens of some batches [tokens, d]."""
        total, n = None, 0
        for x in batches:
            g = self._factors(x)
            part = Gradient(
                g.acts.T @ g.pull + self.penalty * g.acts.sum(0)[:, None] * self.unit,
                g.inputs.T @ g.delta,
                g.delta.sum(0),
                g.b_dec.sum(0),
            )
            total = part if total is None else _combine(total, part)
            n += len(x)
        return Gradient(*(value / n for value in vars(total).values()))

    def scores(self, x: Tensor, seeds: Gradient, normalise: bool = False) -> Tensor:
        """Inner product of each token's gradient with the seeds' [tokens].

        `normalise` divides by the token's gradient norm: raw TracIn prefers tokens of high loss.
        """
        g = self._factors(x)
        along = (self.unit * seeds.W_dec).sum(1)
        decoder = g.acts * (g.pull @ seeds.W_dec.T + self.penalty * along)
        found = decoder.sum(1) + ((g.inputs @ seeds.W_enc) * g.delta).sum(1)
        found += g.delta @ seeds.b_enc + g.b_dec @ seeds.b_dec
        return found / self._norms(g).clamp(min=1e-12) if normalise else found

    def _norms(self, g: TokenGradients) -> Tensor:
        """Norm of each token's gradient over all four blocks."""
        slope = 2 * self.penalty * (g.pull @ self.unit.T) + self.penalty**2
        rows = g.pull.square().sum(1, keepdim=True) + slope
        decoder = (g.acts.square() * rows).sum(1)
        encoder = (g.inputs.square().sum(1) + 1) * g.delta.square().sum(1)
        return (decoder + encoder + g.b_dec.square().sum(1)).clamp(min=0).sqrt()


def _combine(a: Gradient, b: Gradient) -> Gradient:
    return Gradient(*(x + y for x, y in zip(vars(a).values(), vars(b).values(), strict=True)))
