"""The part of a model above a hook, run on residuals that were cached once: what every fit repeats."""

import torch

from sae_research.errors import ResearchError
from sae_research.models import LanguageModel


class ModelTail:
    """The blocks above a place of the residual stream, with gradients, on rows of [rows, positions, d].

    Rows may be padded on the right: attention is causal, so padding never reaches the text before it.
    """

    def __init__(self, lens: LanguageModel, hook: str):
        self.lens, self.hook = lens, lens.hook(hook)
        self.start = lens.depth(hook)
        self.blocks = list(lens.bridge.blocks)[self.start :]
        model = lens.bridge.original_model
        config = model.config.get_text_config()
        self.rotary = getattr(model.base_model, "rotary_emb", None)
        self.window = getattr(config, "sliding_window", None)
        self.softcap = getattr(config, "final_logit_softcapping", None)
        self.norm = lens.bridge.ln_final
        self.unembedding = lens.bridge.W_U.detach().float()
        bias = getattr(lens.bridge, "b_U", None)
        self.bias = None if bias is None else bias.detach().float()

    def states(self, residual: torch.Tensor, last: torch.Tensor | None = None) -> torch.Tensor:
        """Final normed states: of all positions, or of position `last` of each row."""
        rows, length = residual.shape[:2]
        if self.window is not None and length > self.window:
            raise ResearchError(
                f"{length} tokens exceed the sliding window of {self.window}; shorten the prompts."
            )
        h = residual.to(next(self.norm.parameters()).dtype)
        positions = torch.arange(length, device=h.device).expand(rows, length)
        hidden = torch.full(
            (length, length), torch.finfo(h.dtype).min, dtype=h.dtype, device=h.device
        ).triu(1)
        mask = hidden.expand(rows, 1, length, length)
        rotary = None if self.rotary is None else self.rotary(h, positions[:1])
        for block in self.blocks:
            h = block(
                h,
                attention_mask=mask,
                position_ids=positions,
                position_embeddings=rotary,
                use_cache=False,
            )
            h = h[0] if isinstance(h, tuple) else h
        if last is not None:
            h = h[torch.arange(rows, device=h.device), last]
        return self.norm(h)

    def logits(self, states: torch.Tensor, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of final states in float32, of the whole vocabulary or of `tokens`; a softcap is applied."""
        weights = self.unembedding if tokens is None else self.unembedding[:, tokens]
        logits = states.float() @ weights
        if self.bias is not None:
            logits = logits + (self.bias if tokens is None else self.bias[tokens])
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
