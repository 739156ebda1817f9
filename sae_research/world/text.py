"""The text specimen: a small Llama that reads the mixture of documents, and the SAEs of its residual stream."""

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from sae_research import activations, dictionaries, training
from sae_research import lens as lenses
from sae_research.errors import ResearchError
from sae_research.progress import bar
from sae_research.training import SAETraining
from sae_research.world import specimen
from sae_research.world.documents import BOS_ID, LENGTH, Corpus, rows
from sae_research.world.lexicon import lexicon

if TYPE_CHECKING:
    from sae_lens.saes.sae import TrainingSAEConfig
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
    steps: int = 2600
    """Training steps."""
    batch: int = 64
    """Rows of 48 tokens a step."""
    lr: float = 3e-3
    """Peak learning rate of AdamW."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Momentum terms of AdamW."""
    weight_decay: float = 0.1
    """Weight decay of AdamW."""
    warm_up: int = 100
    """Steps of linear warm-up, followed by a cosine down to a hundredth of the peak."""
    clip: float = 1.0
    """Largest gradient norm."""
    bfloat16: bool = True
    """Whether matrix products run in bfloat16 (autocast); weights and loss stay in float32."""


@dataclass(frozen=True)
class TextSAEs:
    """The SAEs of the text specimen: three kinds at two hooks, and one four times wider."""

    hooks: tuple[str, ...] = ("blocks.1.hook_resid_post", "blocks.3.hook_resid_post")
    """An early-middle hook and one two blocks later."""
    kinds: tuple[str, ...] = ("topk", "jumprelu", "relu")
    """Kinds of SAE at every hook."""
    width: int = 1024
    """Latents of each, eight times the residual's width."""
    wide: int = 4
    """The first kind is also trained this many times wider at the first hook (0: not)."""
    l0: int = 10
    """Mean number of active latents a token."""
    relu_l0: int = 20
    """The same for the ReLU kind, whose L1 penalty shrinks all codes and costs too much at `l0`."""
    rows: int = 8192
    """Rows of text whose residuals the SAEs are trained on."""
    calibration: int = 512
    """Further rows on which thresholds are calibrated."""
    training: SAETraining = field(default_factory=SAETraining)
    """How they are trained."""


@dataclass(frozen=True)
class TextSettings:
    """Everything that the text specimen depends on."""

    corpus: Corpus = field(default_factory=Corpus)
    """The odds of the text generators."""
    model: TextModel = field(default_factory=TextModel)
    """The language model."""
    saes: TextSAEs = field(default_factory=TextSAEs)
    """Its SAEs."""


@contextmanager
def running_on(n: int) -> Iterator[None]:
    """Run torch on `n` threads: results depend on their number, so it is part of the recipe."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def token_losses(model: "LlamaForCausalLM", tokens: torch.Tensor) -> torch.Tensor:
    """Next-token cross-entropy, [rows, LENGTH - 1]; 0 where the next token is a start token, which nothing predicts."""
    logits = model(tokens).logits[:, :-1].float()
    target = tokens[:, 1:].masked_fill(tokens[:, 1:] == BOS_ID, -100)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target)


def fit(settings: TextSettings, seed: int, watch: Callable[[int, float], None] | None = None) -> "LlamaForCausalLM":
    """Train the language model; `watch` sees every step and its loss."""
    recipe = settings.model
    model = specimen.small_llama(
        len(lexicon().words) + 4,
        width=recipe.width,
        blocks=recipe.blocks,
        heads=recipe.heads,
        inner=recipe.inner,
        context=LENGTH,
        seed=seed,
    )
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / recipe.warm_up) * (0.01 + 0.99 * (1 + math.cos(math.pi * step / recipe.steps)) / 2)
        ),
    )
    for step, tokens in enumerate(bar(_batches(settings, seed), total=recipe.steps, desc="text model")):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.bfloat16):
            losses = token_losses(model, tokens)
        loss = losses.sum() / (tokens[:, 1:] != BOS_ID).sum()
        if not torch.isfinite(loss):
            raise ResearchError(f"the text model's loss is not finite at step {step}; lower its learning rate.")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        schedule.step()
        if watch:
            watch(step, loss.item())
    return model.eval()


def _batches(settings: TextSettings, seed: int) -> Iterator[torch.Tensor]:
    """Fresh batches of rows, generated a hundred at a time."""
    recipe = settings.model
    rng = np.random.default_rng([seed, 1])
    for start in range(0, recipe.steps, 100):
        count = min(100, recipe.steps - start)
        tokens = torch.from_numpy(rows(count * recipe.batch, rng, settings.corpus).tokens).long()
        yield from tokens.split(recipe.batch)


def train_model(settings: TextSettings, seed: int, folder: Path, threads: int = 2) -> None:
    """Train the language model and write it with its tokenizer as a Hugging Face folder."""
    with running_on(threads):
        model = fit(settings, seed)
    specimen.save(model, specimen.word_tokenizer(lexicon().words), folder)


def residuals(lens: lenses.Lens, tokens: torch.Tensor, hook: str, batch: int = 128) -> torch.Tensor:
    """Residuals of every text position of packed rows, [tokens, width]; start tokens are left out wherever they are."""
    found = []
    for chunk in bar(tokens.split(batch), total=math.ceil(len(tokens) / batch), desc=f"residuals at {hook}"):
        found.append(lens.residual(chunk, hook)[chunk != BOS_ID])
    return torch.cat(found)


def arms(settings: TextSettings, place: int) -> "dict[str, TrainingSAEConfig]":
    """The SAEs at one hook (its place in the settings), by name."""
    width, saes = settings.model.width, settings.saes
    make = {
        "topk": lambda latents: training.topk(width, latents, saes.l0),
        "jumprelu": lambda latents: training.jumprelu(width, latents, saes.l0),
        "relu": lambda latents: training.relu(width, latents),
    }
    block = saes.hooks[place].split(".")[1]
    chosen = {f"block{block}_{kind}": make[kind](saes.width) for kind in saes.kinds}
    if saes.wide and place == 0:
        chosen[f"block{block}_{saes.kinds[0]}_wide"] = make[saes.kinds[0]](saes.wide * saes.width)
    return chosen


def train_saes(
    settings: TextSettings, model_folder: Path, seed: int, out_folder: Path, places: Collection[int] | None = None
) -> None:
    """Train the SAEs of all hooks, or of those at `places`, each hook's in lock-step, into `out_folder`/name."""
    saes, rng = settings.saes, np.random.default_rng([seed, 2])
    lens = lenses.load(model_folder)
    read, held = (torch.from_numpy(rows(n, rng, settings.corpus).tokens).long() for n in (saes.rows, saes.calibration))
    for place, hook in enumerate(saes.hooks):
        if places is not None and place not in places:
            continue
        acts, calibration = residuals(lens, read, hook), residuals(lens, held, hook)
        configs = arms(settings, place)
        for config in configs.values():
            config.metadata = dictionaries.metadata(lens, hook)
        trained = training.train(
            configs,
            activations.batches(acts, saes.training.batch, saes.training.steps, seed),
            saes.training,
            seed,
            {name: training.aimed_at(saes.relu_l0) for name in configs if name.endswith("_relu")}
            | {name: training.held_at(saes.l0) for name in configs if name.endswith("_jumprelu")},
        )
        for name, sae in trained.items():
            training.save(training.inference(sae, calibration, saes.l0), Path(out_folder) / name)
