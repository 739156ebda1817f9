"""The last-token engine: exact effects of edits to a context's final token, for many edits at once.

An edit of the last position leaves the keys and values of every earlier position as they were.
So each context runs in full once, and each edit afterwards costs one token: the edited copies
of the final token lie side by side on the query axis, all at position T-1, and a mask lets each
see the prefix and itself but no sibling. This is ordinary attention, so the blocks of the model
run unchanged, whatever the architecture.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from sae_research.errors import ResearchError
from sae_research.model_tail import ModelTail
from sae_research.models import LanguageModel
from sae_research.steering import add_direction


@dataclass
class State:
    """The final token of some rows: residuals at the reads, and the state after the final norm."""

    reads: tuple[torch.Tensor, ...]
    """One [rows, d] tensor for each read, in the order in which the engine was given them."""
    final: torch.Tensor
    """[rows, d], after the final norm: `LastToken.logits` unembeds it."""

    def take(self, rows: torch.Tensor) -> "State":
        """The same for some rows."""
        return State(tuple(r[rows] for r in self.reads), self.final[rows])


@dataclass
class Record:
    """What a clean pass over some contexts leaves behind for edits of their final tokens."""

    last: torch.Tensor
    """[contexts, d]: the residual of the final token at the edited hook."""
    keys: list[torch.Tensor]
    """One [contexts, heads, T-1, d_head] tensor for each block above the hook."""
    values: list[torch.Tensor]
    """As `keys`."""
    clean: State
    """The unedited final tokens."""


class LastToken(ModelTail):
    """Runs a model's tail on edited final tokens, in float32 even if the part below is not.

    The difference of two states' logits needs both `logits`, since a softcap is not linear.
    """

    def __init__(self, model: LanguageModel, hook: str, reads: tuple[str, ...] = ()):
        """Edit at `hook`, read at `reads`; the model itself stays in its own number format."""
        super().__init__(model, hook, torch.float32)
        self.reads = tuple(model.depth(read) for read in reads)
        for read, layer in zip(reads, self.reads, strict=True):
            if layer < self.start_at_layer:
                raise ResearchError(
                    f"read '{read}' lies below the edit at '{hook}' and would never change."
                )

    @torch.no_grad()
    def residual(self, tokens: torch.Tensor) -> torch.Tensor:
        """Residuals [B, T, d] at the edited hook."""
        self.check(tokens)
        return self.model.residual(tokens, self.hook).to(self.dtype)

    def check(self, tokens: torch.Tensor) -> None:
        """Refuse contexts that the engine cannot treat exactly."""
        if tokens.ndim != 2 or tokens.shape[1] < 2:
            raise ResearchError(
                "contexts must have at least two tokens (the last is edited), "
                f"not shape {tuple(tokens.shape)}."
            )
        self.check_length(tokens.shape[1])

    @torch.no_grad()
    def record(self, tokens: torch.Tensor, residual: torch.Tensor | None = None) -> Record:
        """A clean pass over contexts [B, T] without padding; `residual` at the hook if known."""
        from transformers import DynamicCache

        h = self.residual(tokens) if residual is None else residual
        cache = DynamicCache()
        reads, final = self.run(h, **self.causal(h), cache=cache, read_layers=self.reads)
        layers = cache.layers[self.start_at_layer :]
        return Record(
            last=h[:, -1].clone(),
            keys=[layer.keys[:, :, :-1].clone() for layer in layers],
            values=[layer.values[:, :, :-1].clone() for layer in layers],
            clean=State(tuple(r[:, -1].clone() for r in reads), final[:, -1].clone()),
        )

    @torch.no_grad()
    def steer(
        self,
        record: Record,
        contexts: torch.Tensor,
        which: torch.Tensor,
        directions: torch.Tensor,
        *,
        pack: int = 8,
        rows: int = 768,
    ) -> Iterator[tuple[torch.Tensor, State]]:
        """Yield (rows, edited states): row r adds `directions[which[r]]` in `contexts[r]`."""
        from transformers import DynamicCache

        prefix = record.keys[0].shape[2] if record.keys else 0
        if self.window_counts_keys:
            pack = max(1, min(pack, self.window - prefix))
        owner, slots = _chunks(contexts, pack)
        blocked = torch.finfo(self.dtype).min
        mask = torch.full((pack, prefix + pack), blocked, dtype=self.dtype, device=slots.device)
        mask[:, :prefix] = 0
        mask[:, prefix:].fill_diagonal_(0)
        for part in torch.arange(len(owner), device=slots.device).split(max(1, rows // pack)):
            context, slot = owner[part], slots[part]
            h = record.last[context][:, None] + directions[which[slot.clamp(min=0)]].to(self.dtype)
            cache = DynamicCache()
            layers = enumerate(zip(record.keys, record.values, strict=True), self.start_at_layer)
            for layer, (keys, values) in layers:
                cache.update(keys[context], values[context], layer)
            reads, final = self.run(
                h,
                positions=torch.full_like(slot, prefix),
                mask=mask.expand(len(part), 1, *mask.shape),
                cache=cache,
                read_layers=self.reads,
            )
            real = slot >= 0
            yield slot[real], State(tuple(reads), final).take(real)

    def sweep(
        self,
        tokens: torch.Tensor,
        contexts: torch.Tensor,
        directions: torch.Tensor,
        *,
        batch: int = 64,
        pack: int | None = None,
        rows: int = 768,
    ) -> Iterator[tuple[torch.Tensor, State, State]]:
        """Add each of `directions` [K, d] in each of its `contexts` [K, n], rows of `tokens`.

        Yields (row numbers of the K n edits, clean states, edited states), each row once. Contexts
        are recorded `batch` at a time and forgotten when all their rows are done, so memory does
        not grow with the pool. Doses are simply further directions.
        """
        self.check(tokens)
        wrong = contexts[(contexts < 0) | (contexts >= len(tokens))]
        if len(wrong):
            raise ResearchError(f"there is no context {int(wrong[0])}; there are {len(tokens)}.")
        n = contexts.shape[1]
        contexts = contexts.flatten().to(directions.device)
        used = torch.unique(contexts)
        if pack is None:
            pack = 8 if len(contexts) < 48 * len(used) else 32
        for some in used.split(batch):
            record = self.record(tokens[some])
            mine = torch.isin(contexts, some).nonzero()[:, 0]
            local = torch.searchsorted(some, contexts[mine])
            for r, edited in self.steer(record, local, mine // n, directions, pack=pack, rows=rows):
                yield mine[r], record.clean.take(local[r]), edited


def _chunks(contexts: torch.Tensor, pack: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The context of each chunk of at most `pack` rows, and its row numbers (-1 pads)."""
    order = torch.argsort(contexts, stable=True)
    sorted_contexts = contexts[order]
    _, counts = torch.unique_consecutive(sorted_contexts, return_counts=True)
    rank = torch.arange(len(order), device=order.device) - (
        counts.cumsum(0) - counts
    ).repeat_interleave(counts)
    first = rank % pack == 0
    chunk = first.cumsum(0) - 1
    slots = order.new_full((int(first.sum()), pack), -1)
    slots[chunk, rank % pack] = order
    return sorted_contexts[first], slots


@torch.no_grad()
def run_naive(
    model: LanguageModel,
    hook: str,
    reads: tuple[str, ...],
    tokens: torch.Tensor,
    direction: torch.Tensor,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Last-token logits and reads by a full forward pass under hooks: the engine's judge."""
    found: dict[str, torch.Tensor] = {}

    def keep(read: str, residual: torch.Tensor) -> torch.Tensor:
        found[read] = residual[:, -1].clone()
        return residual

    # the edit stands below the reads, so that a read at the edited hook sees it
    with model.edited({hook: add_direction(direction, 1.0, "last")}):
        logits = model.logits(tokens, {read: partial(keep, read) for read in reads})[:, -1]
    return logits, tuple(found[read] for read in reads)


def discrepancy(
    model: LanguageModel,
    hook: str,
    reads: tuple[str, ...],
    tokens: torch.Tensor,
    directions: torch.Tensor,
    **settings: int,
) -> dict[str, float]:
    """Largest error of the engine over every context and direction, beside the largest effect."""
    contexts = torch.arange(len(tokens)).expand(len(directions), -1)
    truth = [run_naive(model, hook, reads, tokens, d) for d in directions]
    logits = torch.cat([t[0] for t in truth])
    read = [torch.cat([t[1][i] for t in truth]) for i in range(len(reads))]
    engine = LastToken(model, hook, reads)
    error = effect = 0.0
    seen = 0
    for rows, clean, edited in engine.sweep(tokens, contexts, directions, **settings):
        got = engine.logits(edited.final)
        effect = max(effect, float((got - engine.logits(clean.final)).abs().max()))
        differences = [
            got - logits[rows],
            *(e - r[rows] for e, r in zip(edited.reads, read, strict=True)),
        ]
        error = max(error, *(float(d.abs().max()) for d in differences))
        seen += len(rows)
    return {"error": error, "effect": effect, "rows": seen}
