"""The toy text model: a small Llama that reads all kinds of documents, and its SAEs."""

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm.auto import tqdm

from sae_research import models
from sae_research.errors import ResearchError
from sae_research.world import toy_model, toy_saes
from sae_research.world.text.corpus import BOS_ID, LENGTH, Corpus
from sae_research.world.text.documents import make_rows
from sae_research.world.text.lexicon import lexicon
from sae_research.world.toy_saes import ToySAEs

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


@dataclass(frozen=True)
class TextModel:
    """The language model and its training."""

    width: int = 128
    """Width of the residual stream."""
    blocks: int = 4
    """Transformer blocks."""
    heads: int = 4
    """Attention heads."""
    inner: int = 352
    """Width of the MLPs."""
    scale: float = 0.06
    """Standard deviation of the initial weights."""
    steps: int = 2800
    """Training steps."""
    batch_size: int = 64
    """Rows of 48 tokens per step."""
    lr: float = 3e-3
    """Peak learning rate of AdamW."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Momentum terms of AdamW."""
    weight_decay: float = 0.1
    """Weight decay of AdamW."""
    warmup_steps: int = 100
    """Steps of linear warm-up of the learning rate."""
    decay: float = 0.4
    """Last share of the steps, in which the learning rate falls along a cosine to a hundredth of
    its peak; falling from the start, some trainings never find out what the words of a
    biography say of the profession.
    """
    averaged: float = 0.1
    """Last share of the steps whose weights are averaged, which steadies rates of refusal."""
    clip: float = 1.0
    """Largest gradient norm."""
    bfloat16: bool = True
    """Whether matrix products run in bfloat16 (autocast); weights and loss stay in float32."""


@dataclass(frozen=True)
class TextSettings:
    """Everything that the toy text model depends on."""

    corpus: Corpus = field(default_factory=Corpus)
    """The odds of the text generators."""
    model: TextModel = field(default_factory=TextModel)
    """The language model."""
    saes: ToySAEs = field(
        default_factory=lambda: ToySAEs(
            hooks=("blocks.1.hook_resid_post", "blocks.3.hook_resid_post"),
            latents=1024,
            l0=10,
            documents=8192,
            calibration=512,
        )
    )
    """Its SAEs."""


@contextmanager
def use_threads(n: int) -> Iterator[None]:
    """Run torch on `n` threads: results depend on their number, so it is part of the recipe."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compute_token_losses(model: "LlamaForCausalLM", tokens: torch.Tensor) -> torch.Tensor:
    """Next-token cross-entropy, [rows, LENGTH - 1]; 0 before a start token."""
    logits = model(tokens).logits[:, :-1].float()
    target = tokens[:, 1:].masked_fill(tokens[:, 1:] == BOS_ID, -100)
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), target.flatten(), reduction="none"
    ).view_as(target)


def train_transformer(
    settings: TextSettings, seed: int, watch: Callable[[int, float], None] | None = None
) -> "LlamaForCausalLM":
    """Train the language model; `watch` sees every step and its loss."""
    recipe = settings.model
    model = _make_model(settings.model, seed)
    optimizer = _make_optimizer(settings.model, model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_share(recipe, step))
    first = min(recipe.steps - 1, round((1 - recipe.averaged) * recipe.steps))
    mean = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for step, tokens in enumerate(
        tqdm(_make_batches(settings, seed), total=recipe.steps, desc="text model", leave=False)
    ):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.bfloat16):
            losses = compute_token_losses(model, tokens)
        loss = losses.sum() / (tokens[:, 1:] != BOS_ID).sum()
        if not torch.isfinite(loss):
            raise ResearchError(
                f"the text model's loss is not finite at step {step}; lower its learning rate."
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        schedule.step()
        if step >= first:
            for average, parameter in zip(mean, model.parameters(), strict=True):
                average.lerp_(parameter.detach(), 1 / (step - first + 1))
        if watch:
            watch(step, loss.item())
    for average, parameter in zip(mean, model.parameters(), strict=True):
        parameter.data = average
    return model.eval()


def _make_model(recipe: TextModel, seed: int) -> "LlamaForCausalLM":
    return toy_model.make_llama(
        len(lexicon().words) + 4,
        width=recipe.width,
        blocks=recipe.blocks,
        heads=recipe.heads,
        inner=recipe.inner,
        context=LENGTH,
        seed=seed,
        scale=recipe.scale,
    )


def _make_optimizer(recipe: TextModel, model: "LlamaForCausalLM") -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, fused=True)


def _lr_share(recipe: TextModel, step: int) -> float:
    """Share of the peak learning rate: up in a line, then level, then down along a cosine."""
    start = (1 - recipe.decay) * recipe.steps
    falling = max(0.0, (step - start) / (recipe.steps - start))
    return min(1.0, (step + 1) / recipe.warmup_steps) * (
        0.01 + 0.99 * (1 + math.cos(math.pi * falling)) / 2
    )


def _make_batches(settings: TextSettings, seed: int) -> Iterator[torch.Tensor]:
    """Fresh batches of rows, generated a hundred at a time."""
    recipe = settings.model
    rng = np.random.default_rng([seed, 1])
    for start in range(0, recipe.steps, 100):
        count = min(100, recipe.steps - start)
        tokens = torch.from_numpy(
            make_rows(count * recipe.batch_size, rng, settings.corpus).tokens
        ).long()
        yield from tokens.split(recipe.batch_size)


def train_model(settings: TextSettings, seed: int, folder: Path, threads: int = 2) -> None:
    """Train the language model and write it with its tokenizer as a Hugging Face folder."""
    with use_threads(threads):
        model = train_transformer(settings, seed)
    toy_model.save_model(model, toy_model.make_word_tokenizer(lexicon().words), folder)


def train_saes(
    settings: TextSettings,
    model_folder: Path,
    seed: int,
    folder: Path,
    hook_indices: Collection[int] | None = None,
) -> None:
    """Train the SAEs of the hook at `hook_index` on packed rows, into `folder`/name."""
    rng = np.random.default_rng([seed, 2])
    tokens, held_out = (
        torch.from_numpy(make_rows(n, rng, settings.corpus).tokens).long()
        for n in (settings.saes.documents, settings.saes.calibration)
    )
    model = models.load_model(model_folder)
    toy_saes.train_saes(settings.saes, model, tokens, held_out, seed, folder, hook_indices)
