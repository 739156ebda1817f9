"""The part of a model above a hook, run on residuals that were cached once.

The caller's model stays as it was: where another number format is asked for, the blocks above the
hook are copied.
"""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from sae_research.errors import ResearchError

if TYPE_CHECKING:
    from sae_research.models import LanguageModel

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Largest difference from the full pass, relative to the largest state; other formats: 5e-2."""


class ModelTail:
    """The blocks above a hook of the residual stream, with gradients, on rows [rows, positions, d].

    Rows may be padded on the right: attention is causal, so padding never reaches earlier text.
    """

    def __init__(self, model: "LanguageModel", hook: str, dtype: torch.dtype | None = None):
        """`dtype` runs the tail in another number format than the model."""
        bridge = model.bridge
        self.model = model
        self.hook = model.hook(hook)
        self.start_at_layer = model.depth(hook)
        self.n_layers = model.n_layers
        blocks = list(bridge.blocks)[self.start_at_layer :]
        norm = bridge.ln_final
        self.dtype = dtype or next(norm.parameters()).dtype
        if any(p.dtype != self.dtype for m in (*blocks, norm) for p in m.parameters()):
            blocks, norm = copy.deepcopy((blocks, norm))
            for module in (*blocks, norm):
                module.to(self.dtype)
        self.blocks = blocks
        self.norm = norm
        hf_model = bridge.original_model
        config = hf_model.config.get_text_config()
        self.rotary = getattr(hf_model.base_model, "rotary_emb", None)
        # Gemma 3 turns keys of its local blocks by other angles than those of its global ones
        by_kind = isinstance(getattr(self.rotary, "rope_type", None), dict)
        self.kinds = config.layer_types if by_kind else [None] * self.n_layers
        self.window = _attention_window(config)
        # GPT-Neo applies its window to the number of keys, packed copies of a token included
        self.window_counts_keys = isinstance(getattr(config, "window_size", None), int)
        self.softcap = getattr(config, "final_logit_softcapping", None)
        self.W_U = bridge.W_U.detach().float()
        b_U = getattr(bridge, "b_U", None)
        self.b_U = None if b_U is None else b_U.detach().float()
        self._compare_with_full_pass()

    def _compare_with_full_pass(self, length: int = 8) -> None:
        """Refuse an architecture whose blocks do more than this class knows of."""
        length = min(length, self.model.n_ctx)
        tokens = torch.arange(length, device=self.model.device)[None] % self.model.d_vocab
        with torch.no_grad():
            residual = self.model.residual(tokens, self.hook)
            expected = self.model.logits(tokens)
            error = (self.logits(self.states(residual)) - expected).abs().max()
        tolerance = max(_TOLERANCE.get(d, 5e-2) for d in (self.dtype, residual.dtype))
        if not error <= tolerance * max(1.0, float(expected.abs().max())):
            raise ResearchError(
                f"{self.model.name} cannot be run from '{self.hook}' upwards: logits differ from "
                f"the full pass by {float(error):.2g}; its architecture is not supported here."
            )

    def check_length(self, length: int) -> None:
        """Refuse texts that reach beyond a sliding attention window, which the tail leaves out."""
        if self.window is not None and length > self.window:
            raise ResearchError(
                f"texts of {length} tokens exceed the sliding window of {self.window} "
                f"of {self.model.name}; shorten them."
            )

    def run(
        self,
        residual: torch.Tensor,
        *,
        positions: torch.Tensor,
        mask: torch.Tensor,
        cache: object = None,
        read_layers: Sequence[int] = (),
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Residuals below the blocks `read_layers`, and the final normed states.

        `mask` is additive [rows, 1, queries, keys]; `cache` is a `DynamicCache` to read and fill.
        """
        kinds = {} if self.rotary is None else dict.fromkeys(self.kinds[self.start_at_layer :])
        rotary = {
            kind: self.rotary(residual, positions, *([kind] if kind else [])) for kind in kinds
        }
        # GPT-NeoX calls the cache layer_past
        caching = {} if cache is None else {"past_key_values": cache, "layer_past": cache}
        below = {}
        h = residual
        for layer, block in enumerate(self.blocks, start=self.start_at_layer):
            below[layer] = h
            h = block(
                h,
                attention_mask=mask,
                position_ids=positions,
                position_embeddings=rotary.get(self.kinds[layer]),
                use_cache=cache is not None,
                **caching,
            )
            h = h[0] if isinstance(h, tuple) else h
        below[self.n_layers] = h
        return [below[layer] for layer in read_layers], self.norm(h)

    def causal(self, residual: torch.Tensor) -> dict[str, torch.Tensor]:
        """Positions and mask of ordinary causal attention over whole rows, for `run`."""
        rows, length = residual.shape[:2]
        blocked = torch.finfo(self.dtype).min
        square = residual.new_full((length, length), blocked, dtype=self.dtype).triu(1)
        return {
            "positions": torch.arange(length, device=residual.device).expand(rows, length),
            "mask": square.expand(rows, 1, length, length),
        }

    def states(self, residual: torch.Tensor, last: torch.Tensor | None = None) -> torch.Tensor:
        """Final normed states: of all positions, or of position `last` of each row."""
        self.check_length(residual.shape[1])
        h = residual.to(self.dtype)
        _, final = self.run(h, **self.causal(h))
        return final if last is None else final[torch.arange(len(h), device=h.device), last]

    def logits(self, states: torch.Tensor, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of final states in float32, of the whole vocabulary or of `tokens`."""
        weights = self.W_U if tokens is None else self.W_U[:, tokens]
        logits = states.float() @ weights
        if self.b_U is not None:
            logits = logits + (self.b_U if tokens is None else self.b_U[tokens])
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def _attention_window(config: object) -> int | None:
    """The shortest attention window (Mistral: `sliding_window`, GPT-Neo: `window_size`)."""
    sizes = [getattr(config, name, None) for name in ("sliding_window", "window_size")]
    return min((size for size in sizes if isinstance(size, int)), default=None)
