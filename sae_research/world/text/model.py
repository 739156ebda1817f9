"""The toy text model: a small Llama that reads all kinds of documents, and its SAEs."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm.auto import tqdm

from sae_research import models
from sae_research.errors import ResearchError
from sae_research.world import toy_model, toy_saes
from sae_research.world.text.corpus import BOS_ID, Corpus
from sae_research.world.text.documents import make_rows
from sae_research.world.text.lexicon import lexicon
from sae_research.world.toy_model import ToyLlama
from sae_research.world.toy_saes import ToySAEs

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


@dataclass(frozen=True)
class TextModel(ToyLlama):
    """The language model and its training."""

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


def compute_token_losses(model: "LlamaForCausalLM", tokens: torch.Tensor) -> torch.Tensor:
    """Next-token cross-entropy, [rows, LENGTH - 1]; 0 before a start token."""
    logits = model(tokens).logits[:, :-1].float()
    target = tokens[:, 1:].masked_fill(tokens[:, 1:] == BOS_ID, -100)
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), target.flatten(), reduction="none"
    ).view_as(target)


def train_transformer(settings: TextSettings, seed: int) -> "LlamaForCausalLM":
    """Train the language model."""
    recipe = settings.model
    model = toy_model.make_llama(len(lexicon().words) + 4, recipe, seed)
    optimizer = _make_optimizer(recipe, model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_share(recipe, step))
    first = min(recipe.steps - 1, round((1 - recipe.averaged) * recipe.steps))
    mean = [torch.zeros_like(parameter) for parameter in model.parameters()]
    batches = tqdm(_make_batches(settings, seed), "text model", recipe.steps, leave=False)
    for step, tokens in enumerate(batches):
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
    for average, parameter in zip(mean, model.parameters(), strict=True):
        parameter.data = average
    return model.eval()


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
        rows = make_rows(count * recipe.batch_size, rng, settings.corpus)
        yield from torch.from_numpy(rows.tokens).long().split(recipe.batch_size)


def train_model(settings: TextSettings, seed: int, folder: Path) -> None:
    """Train the language model and write it with its tokenizer as a Hugging Face folder."""
    model = train_transformer(settings, seed)
    toy_model.save_model(model, toy_model.make_word_tokenizer(lexicon().words), folder)


def train_saes(
    settings: TextSettings, model_folder: Path, seed: int, folder: Path, hook_index: int
) -> None:
    """Train the SAEs of one hook on packed rows, into `folder`/name."""
    rng = np.random.default_rng([seed, 2])
    tokens, held_out = (
        make_rows(n, rng, settings.corpus).tokens
        for n in (settings.saes.documents, settings.saes.calibration)
    )
    model = models.load_model(model_folder)
    toy_saes.train_saes(settings.saes, model, tokens, held_out, seed, folder, hook_index)
