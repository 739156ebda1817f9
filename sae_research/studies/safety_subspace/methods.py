"""Everything that is fine-tuned for safety at equal data, rank and freedom of s."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import LongTensor, Tensor

from sae_research.attack import reply_losses
from sae_research.errors import ResearchError
from sae_research.models import LanguageModel
from sae_research.saes import hook_of
from sae_research.studies.safety_subspace import adapter, subspace, theory
from sae_research.studies.safety_subspace.settings import (
    FROZEN,
    FULL,
    LORA,
    PENALISED,
    RANDOM,
    RANDOM_FROZEN,
    REQUESTS,
    REQUESTS_FROZEN,
    SAILS,
    SHUFFLED,
    USEFUL,
    Settings,
)
from sae_research.studies.safety_subspace.subspace import Contrast, Selection
from sae_research.world.text.chat import REPLY, Pairs

if TYPE_CHECKING:
    from sae_lens import SAE
    from transformers import PreTrainedModel

STOCK: dict[str, dict] = {
    LORA: {},
    "LoRA, orthogonal": {"init_lora_weights": "orthogonal"},
    "OLoRA": {"init_lora_weights": "olora"},
    "PiSSA": {"init_lora_weights": "pissa"},
    "MiCA": {"init_lora_weights": "mica"},
    "EVA": {"init_lora_weights": "eva"},
    "DoRA": {"use_dora": True},
}
"""Initialisations that peft brings along."""


@dataclass
class Setup:
    """A model that answers everything, its SAEs, and the data of one seed."""

    base: "PreTrainedModel"
    """The Hugging Face model, frozen."""
    model: LanguageModel
    """The same behind a bridge."""
    saes: "Mapping[int, SAE]"
    """The SAE of each block that has one."""
    safety: Pairs
    """Harmful requests, refused and answered."""
    useful: Pairs
    """Harmless requests, answered rightly and wrongly."""
    seed: int
    """Draws features, orders of training and initial weights."""
    reply: int = REPLY
    """Tokens of every reply, the last ones of every row."""
    inputs: Tensor | None = None
    """What the first block of `base` reads on the training rows, where `base` is only the upper
    blocks of `model`; blocks are then counted from its first."""
    first: int = 0
    """The block of `model` that this is."""
    nulls: "Mapping[str, Mapping[int, SAE]]" = field(default_factory=dict)
    """Dictionaries whose training leaves out what SAEs learn, by name and block: each becomes a
    method."""

    @property
    def training_rows(self) -> LongTensor:
        """Harmful requests refused and as many harmless ones answered."""
        return torch.cat([self.safety.aligned, self.useful.aligned])

    @property
    def replies(self) -> slice:
        """Where the replies stand in every row."""
        return slice(-self.reply, None)

    @property
    def n_blocks(self) -> int:
        """Blocks of `base`."""
        return len(self.base.model.layers)

    @cached_property
    def contrasts(self) -> dict[int, Contrast]:
        """Refused minus answered harmful requests, by block."""
        return measure_contrasts(self, self.saes, self.safety)

    @cached_property
    def reply_residuals(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Mean residual over each reply of the safety pairs, aligned and unaligned, by block."""
        sides = (self.safety.aligned, self.safety.unaligned)
        return {
            n: tuple(self.model.residual(r, hook_of(sae))[:, self.replies].mean(1) for r in sides)
            for n, sae in self.saes.items()
        }


def measure_contrasts(setup: Setup, saes: "Mapping[int, SAE]", pairs: Pairs) -> dict[int, Contrast]:
    """The contrast of pairs over the tokens of their replies, by block."""
    sides = pairs.aligned, pairs.unaligned
    return {
        n: subspace.measure_contrast(setup.model, sae, *sides, setup.replies)
        for n, sae in saes.items()
    }


def request_contrasts(setup: Setup) -> dict[int, Contrast]:
    """Harmful minus harmless requests of the training over the last tokens before the reply, where
    it is decided whether to refuse, by block.
    """
    sides = setup.safety.requests.tokens, setup.useful.requests.tokens
    return {
        n: subspace.measure_contrast(setup.model, sae, *sides, setup.replies)
        for n, sae in setup.saes.items()
    }


def select(setup: Setup, contrast: Contrast, s: Settings) -> Selection:
    """The features of largest contrast at one block."""
    k = s.n_features
    return subspace.select_features(contrast, k, max_density=s.max_density, seed=setup.seed)


def _span(setup: Setup, contrasts: Mapping[int, Contrast], s: Settings, saes=None) -> dict:
    """Bases of the features with the largest contrasts."""
    saes = saes or setup.saes
    return {
        n: subspace.build_basis(
            subspace.decoder_rows(saes[n], select(setup, contrast, s).latents),
            rank=s.rank,
        )
        for n, contrast in contrasts.items()
    }


def random_features(setup: Setup, n: int, k: int, seed: int, max_density: float) -> LongTensor:
    """`k` latents at a block that fire on the pairs and pass the same filters, drawn at random."""
    contrast = setup.contrasts[n]
    alive = (contrast.density > 0) & (contrast.density <= max_density) & ~contrast.at_start
    pool = torch.nonzero(alive)[:, 0]
    if len(pool) < k:
        raise ResearchError(
            f"only {len(pool)} latents of block {n} fire on the pairs; ask for fewer than {k}."
        )
    return pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:k]]


def _random_span(setup: Setup, s: Settings) -> dict:
    how = s.n_features, setup.seed + 100, s.max_density
    rows = {
        n: subspace.decoder_rows(sae, random_features(setup, n, *how))
        for n, sae in setup.saes.items()
    }
    return {n: subspace.build_basis(found, rank=s.rank) for n, found in rows.items()}


def _shuffled(setup: Setup) -> dict[int, Contrast]:
    """The contrasts after aligned and unaligned changed places in exactly half of the pairs."""
    g = torch.Generator().manual_seed(setup.seed + 200)
    n = len(setup.safety.aligned)
    swap = (torch.randperm(n, generator=g) < n // 2)[:, None]
    return {
        n: Contrast(
            torch.where(swap, c.unaligned, c.aligned),
            torch.where(swap, c.aligned, c.unaligned),
            c.density,
            c.at_start,
        )
        for n, c in setup.contrasts.items()
    }


def _from_residuals(setup: Setup, s: Settings, estimate: Callable) -> dict:
    """Bases that an estimator finds in the residuals themselves, filled up with random ones."""
    found = {}
    for n, pair in setup.reply_residuals.items():
        own = estimate(*pair)[:, : s.rank]
        d = own.shape[0]
        rest = theory.random_basis(d, s.rank, setup.seed + n)[:, own.shape[1] :]
        found[n] = torch.linalg.qr(torch.cat([own, rest], 1)).Q
    return found


SUBSPACES: dict[str, Callable[[Setup, Settings], dict]] = {
    "mean difference": lambda s, c: _from_residuals(s, c, theory.mean_difference),
    "paired PCA": lambda s, c: _from_residuals(s, c, lambda a, b: theory.paired_pca(a, b, c.rank)),
    "covariance difference": lambda s, c: _from_residuals(
        s, c, lambda a, b: theory.covariance_difference(a, b, c.rank)
    ),
    SAILS: lambda s, c: _span(s, s.contrasts, c),
    FROZEN: lambda s, c: _span(s, s.contrasts, c),
    PENALISED: lambda s, c: _span(s, s.contrasts, c),
    REQUESTS: lambda s, c: _span(s, request_contrasts(s), c),
    REQUESTS_FROZEN: lambda s, c: _span(s, request_contrasts(s), c),
    RANDOM: _random_span,
    RANDOM_FROZEN: _random_span,
    SHUFFLED: lambda s, c: _span(s, _shuffled(s), c),
    USEFUL: lambda s, c: _span(s, measure_contrasts(s, s.saes, s.useful), c),
    "random subspace": lambda s, c: {
        n: theory.random_basis(s.model.d_model, c.rank, s.seed + 300 + n) for n in s.saes
    },
}
"""Methods whose adapters start in a subspace, and how each finds it at the blocks with an SAE."""


def find_bases(setup: Setup, method: str, s: Settings) -> dict[int, Tensor]:
    """The subspace of a method at every block."""
    if method in setup.nulls:
        saes = setup.nulls[method]
        found = _span(setup, measure_contrasts(setup, saes, setup.safety), s, saes)
    else:
        found = SUBSPACES[method](setup, s)
    return subspace.assign_bases(found, setup.n_blocks, s.assignment)


def prepare(
    setup: Setup, method: str, s: Settings, bases: subspace.Bases | None = None
) -> "torch.nn.Module":
    """A copy of the base model with what the method trains; `bases` replace its subspace."""
    torch.manual_seed(setup.seed)
    base = copy.deepcopy(setup.base)
    if method == FULL:
        # below the upper blocks nothing is trained: neither are the tied embeddings
        (base if setup.inputs is None else base.model.layers).requires_grad_(True)
        return base
    if method in STOCK:
        return _stock_adapter(setup, base, STOCK[method], s.rank)
    bases = bases or find_bases(setup, method, s)
    return adapter.make_adapter(base, bases, frozen=method.endswith("frozen"))


def find_penalty(setup: Setup, method: str, s: Settings, model: "torch.nn.Module") -> Callable:
    """What the method adds to its loss."""
    if method != PENALISED:
        return lambda: 0.0
    bases = find_bases(setup, method, s)
    return lambda: s.penalty * adapter.penalty(model, bases)


def _stock_adapter(setup: Setup, base: "PreTrainedModel", given: dict, rank: int):
    from peft import EvaConfig, get_peft_model, initialize_lora_eva_weights

    ranks = dict.fromkeys(range(setup.n_blocks), rank)
    eva = given.get("init_lora_weights") == "eva"
    if eva:
        given = {**given, "eva_config": EvaConfig(rho=1.0)}  # the same rank everywhere
    model = get_peft_model(base, adapter.lora_config(ranks, **given))
    if eva:
        rows = setup.training_rows
        batches = [{"input_ids": part, "attention_mask": part > 0} for part in rows.split(32)]
        initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    return model


def fine_tune(
    model: "torch.nn.Module",
    rows: LongTensor,
    *,
    steps: int,
    lr: float,
    seed: int,
    batch_size: int = 16,
    penalty: Callable[[], Tensor | float] = lambda: 0.0,
    reply: int = REPLY,
    inputs: Tensor | None = None,
) -> Iterator[int]:
    """Train on the replies of `rows` with AdamW, whose rate falls linearly to zero; yields the
    number of steps done after each. The model reads `inputs` in place of embeddings, if given.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    g = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for step in range(1, steps + 1):
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(rows), generator=g)])
        drawn = order[:batch_size]
        read = None if inputs is None else inputs[drawn]
        loss = reply_losses(model, rows[drawn], reply, read).mean() + penalty()
        order = order[batch_size:]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        yield step


def merged(model: "torch.nn.Module") -> "PreTrainedModel":
    """The model with its adapter added to its weights, if it has one; frozen."""
    done = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    return done.requires_grad_(False).eval()


@torch.no_grad()
def project_update(
    base: "PreTrainedModel", tuned: "PreTrainedModel", bases: subspace.Bases, inside: bool
) -> tuple["PreTrainedModel", float]:
    """The part of attention's update inside or outside a subspace, at the whole update's energy,
    and the share of the energy that it had (compared by Ponkshe et al. 2025).
    """
    model = copy.deepcopy(base)
    parts = []
    whole = 0.0
    for n, block in enumerate(model.model.layers):
        for name in adapter.ATTENTION:
            weight = getattr(block.self_attn, name).weight
            update = getattr(tuned.model.layers[n].self_attn, name).weight - weight
            part = adapter.part_in_span(block, name, update, bases[n])
            parts.append((weight, part if inside else update - part))
            whole += float(update.square().sum())
    kept = sum(float(part.square().sum()) for _, part in parts)
    for weight, part in parts:
        weight += part * (whole / max(kept, 1e-12)) ** 0.5
    return model, kept / whole
