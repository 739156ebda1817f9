"""TopK and BatchTopK SAEs that train on the chosen latents alone.

Only the encoder's matrix product is dense. Decoding sums k decoder rows per token, and the
gradients of decoder rows and encoder columns are sums over the tokens that chose them. While
training, activations are a sparse tensor, as SAELens's own `use_sparse_activations` has them, so
SAELens's losses, its trainer and subclasses with a loss of their own work on them unchanged.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor

BLOCK = 32  # entries searched together for the largest
DENSE = 8  # dead latents, in numbers of those chosen, up to which a dense product is cheaper


def fast_class(kind: type) -> type:
    """The fast version of SAELens's TopK and BatchTopK training SAEs and of subclasses that say
    `sparse_codes`, since their own losses never read activations; any other kind as it is.
    """
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
    from sae_lens.saes.topk_sae import TopKTrainingSAE

    known = kind in (TopKTrainingSAE, BatchTopKTrainingSAE)
    return _sparse(kind) if known or getattr(kind, "sparse_codes", False) else kind


@cache
def _sparse(kind: type) -> type:
    return type(f"Sparse{kind.__name__}", (SparseCodes, kind), {})


class SparseCodes:
    """Mixed into a TopK or BatchTopK `TrainingSAE`: sparse activations [batch, d_sae] in training.

    Selection by `activation * norm of the decoder row` is kept; the gradients of the norms are
    left out, because those of encoding and decoding cancel.
    """

    def initialize_weights(self) -> None:
        super().initialize_weights()
        # Columns are read and updated one at a time: each lies in one piece.
        self.W_enc.data = self.W_enc.data.T.contiguous().T

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self.training:
            return super().encode_with_hidden_pre(x)
        x = self.process_sae_in(x)
        norms = self._norms()
        with torch.no_grad():
            hidden_pre = (x @ self.W_enc).add_(self.b_enc).mul_(norms)
            chosen = self._choose(hidden_pre)
        tokens, latents = chosen // self.cfg.d_sae, chosen % self.cfg.d_sae
        found = hidden_pre.flatten()[chosen] / norms[latents]
        acts = _Chosen.apply(x, self.W_enc, self.b_enc, found, tokens, latents) * norms[latents]
        places = torch.stack([tokens, latents])
        return torch.sparse_coo_tensor(
            places, acts.relu(), hidden_pre.shape, is_coalesced=True, check_invariants=False
        ), hidden_pre

    def _norms(self) -> Tensor:
        """What activations are multiplied with while latents are chosen [d_sae]."""
        if self.cfg.rescale_acts_by_decoder_norm:
            return self.W_dec.detach().norm(dim=-1)
        return self.W_dec.new_ones(self.cfg.d_sae)

    def _choose(self, hidden_pre: Tensor) -> LongTensor:
        """Places of the chosen entries in the flattened pre-activations, in order."""
        if hasattr(self, "topk_threshold"):
            return largest(hidden_pre.view(1, -1), int(self.cfg.k * len(hidden_pre)))[0].sort()[0]
        starts = torch.arange(len(hidden_pre), device=hidden_pre.device) * self.cfg.d_sae
        return (largest(hidden_pre, self.cfg.k).sort(-1)[0] + starts[:, None]).flatten()

    def decode(self, acts: Tensor) -> Tensor:
        if not acts.is_sparse:
            return super().decode(acts)
        tokens, latents = acts.indices()
        weights = acts.values() / self._norms()[latents]
        rows = weighted_sum(self.W_dec, latents, weights, tokens, len(acts))
        return self.run_time_activation_norm_fn_out(rows + self.b_dec)

    def update_topk_threshold(self, acts: Tensor) -> None:
        super().update_topk_threshold(acts.values() if acts.is_sparse else acts)

    def calculate_topk_aux_loss(
        self, sae_in: Tensor, sae_out: Tensor, hidden_pre: Tensor, dead_neuron_mask: Tensor | None
    ) -> Tensor:
        """SAELens's loss of dead latents (Gao et al., 2024, A.2), in the dead latents alone."""
        if dead_neuron_mask is None or not dead_neuron_mask.any():
            return sae_out.new_tensor(0.0)
        dead = dead_neuron_mask.nonzero().flatten()
        half = sae_in.shape[-1] // 2
        x = self.process_sae_in(sae_in)
        if len(dead) > DENSE * half:
            rebuilt = self._rebuild_sparsely(x, hidden_pre[:, dead], dead, half)
        else:
            rebuilt = self._rebuild_densely(x, dead, half)
        error = rebuilt - (sae_in - sae_out).detach()
        scale = self.cfg.aux_loss_coefficient * min(len(dead) / half, 1.0)
        return scale * error.square().sum(-1).mean()

    def _rebuild_densely(self, x: Tensor, dead: LongTensor, k: int) -> Tensor:
        """The sum of each token's k strongest dead latents [batch, d]."""
        acts = x @ self.W_enc.T[dead].T + self.b_enc[dead]
        if len(dead) > k:
            strongest = (acts.detach() * self._norms()[dead]).topk(k, sorted=False).indices
            acts = acts * torch.zeros_like(acts).scatter_(-1, strongest, 1.0)
        return acts @ self.W_dec[dead]

    def _rebuild_sparsely(self, x: Tensor, hidden_pre: Tensor, dead: LongTensor, k: int) -> Tensor:
        """The same from their pre-activations [batch, dead], cheaper where many are dead."""
        values, places = hidden_pre.topk(k, sorted=False)
        latents = dead[places].flatten()
        tokens = torch.arange(len(x), device=x.device).repeat_interleave(k)
        found = values.flatten() / self._norms()[latents]
        acts = _Chosen.apply(x, self.W_enc, self.b_enc, found, tokens, latents)
        return weighted_sum(self.W_dec, latents, acts, tokens, len(x))


class _Chosen(torch.autograd.Function):
    """Pre-activations of the chosen latents, already known, with the gradients of `x @ W + b`."""

    @staticmethod
    def forward(ctx, x, weight, bias, found, tokens, latents):
        ctx.save_for_backward(x, weight, tokens, latents)
        return found.clone()

    @staticmethod
    def backward(ctx, grad):
        x, weight, tokens, latents = ctx.saved_tensors
        n = weight.shape[1]
        grads = [None] * 6
        if ctx.needs_input_grad[0]:
            grads[0] = weighted_sum(weight.T, latents, grad, tokens, len(x))
        if ctx.needs_input_grad[1]:
            grads[1] = weighted_sum(x, tokens, grad, latents, n).T
        if ctx.needs_input_grad[2]:
            grads[2] = grad.new_zeros(n).index_add_(0, latents, grad)
        return tuple(grads)


def weighted_sum(
    rows: Tensor, which: LongTensor, weights: Tensor, into: LongTensor, n: int
) -> Tensor:
    """`out[into[i]] += weights[i] * rows[which[i]]`, [n, d]."""
    order = into.argsort(stable=True)
    ends = torch.bincount(into, minlength=n).cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    return F.embedding_bag(
        which[order], rows, starts, mode="sum", per_sample_weights=weights[order]
    )


def largest(x: Tensor, k: int) -> LongTensor:
    """Places of the k largest entries of each row of x [rows, n], in any order.

    They lie in the k blocks of the largest maxima, so only those blocks are searched.
    """
    rows, n = x.shape
    if n % BLOCK or n // BLOCK <= k:
        return x.topk(k, sorted=False).indices
    blocks = x.view(rows, n // BLOCK, BLOCK)
    best = blocks.amax(-1).topk(k, sorted=False).indices
    found = blocks.gather(1, best[..., None].expand(-1, -1, BLOCK)).flatten(1)
    inside = found.topk(k, sorted=False).indices
    return best.gather(1, inside // BLOCK) * BLOCK + inside % BLOCK
