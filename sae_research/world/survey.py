"""The survey specimen: a small Llama that answers a planted survey as the persons it reads about, and its SAEs."""

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.functional import cross_entropy, log_softmax
from transformers import LlamaForCausalLM

from sae_research import activations, dictionaries, training
from sae_research import lens as lenses
from sae_research.errors import ResearchError
from sae_research.progress import bar
from sae_research.training import SAETraining
from sae_research.world import specimen
from sae_research.world.survey_population import Population, PopulationSettings
from sae_research.world.survey_text import WORDS, Batch, Writer

if TYPE_CHECKING:
    from sae_lens.saes.sae import TrainingSAEConfig

NAME = "world-survey"
"""How SAEs refer to the specimen."""


@dataclass(frozen=True)
class SurveySAEs:
    """The SAEs of the survey specimen: three kinds at two hooks, and one four times wider."""

    hooks: tuple[str, ...] = ("blocks.0.hook_resid_post", "blocks.2.hook_resid_post")
    """An early hook, where personas are told from each other best, and one two blocks later."""
    kinds: tuple[str, ...] = ("topk", "jumprelu", "relu")
    """Kinds of SAE at every hook."""
    latents: int = 512
    """Latents of each, eight times the residual's width."""
    wide: int = 4
    """The first kind is also trained this many times wider at the first hook (0: not)."""
    l0: int = 8
    """Mean number of active latents a token."""
    relu_l0: int = 20
    """The same for ReLU SAEs, whose penalty also shrinks what is active."""
    documents: int = 6000
    """Documents whose residuals the SAEs are trained on."""
    calibration: int = 1000
    """Further documents on which thresholds are calibrated."""
    training: SAETraining = field(default_factory=lambda: SAETraining(steps=2000, batch=256, lr=3e-3))
    """How they are trained."""


@dataclass(frozen=True)
class SurveySettings:
    """How the survey specimen and its SAEs are made."""

    population: PopulationSettings = field(default_factory=PopulationSettings)
    """The planted survey that it learns."""
    width: int = 64
    """Size of the residual stream."""
    blocks: int = 4
    """Transformer blocks."""
    heads: int = 4
    """Attention heads of a block."""
    inner: int = 128
    """Width of the feed-forward layer."""
    context: int = 48
    """Longest document in tokens."""
    scale: float = 0.1
    """Standard deviation of the initial weights; at 0.02 the answers are not learned in this budget."""
    most_stated: int = 4
    """Most attributes that a document states; it states each number from 0 on equally often."""
    off_task: float = 0.12
    """Share of documents that are toy arithmetic and toy stories."""
    steps: int = 1500
    """Training steps."""
    batch: int = 192
    """Documents of a step."""
    rate: float = 3e-3
    """Peak of the one-cycle learning rate."""
    warm_up: float = 0.15
    """Share of the steps until that peak."""
    answer_weight: float = 5.0
    """Weight of the exact answers beside next tokens, which survey documents teach on every second step only."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    saes: SurveySAEs = field(default_factory=SurveySAEs)
    """Its SAEs."""


def train_model(settings: SurveySettings, seed: int, folder: Path, threads: int = 2) -> None:
    """Train the specimen on exact answer distributions and next tokens, and save it as a Hugging Face folder."""
    torch.set_num_threads(threads)
    tokenizer = specimen.word_tokenizer(WORDS)
    writer = Writer(Population(settings.population), tokenizer.get_vocab())
    model = specimen.small_llama(
        len(tokenizer),
        width=settings.width,
        blocks=settings.blocks,
        heads=settings.heads,
        inner=settings.inner,
        context=settings.context,
        seed=seed,
        scale=settings.scale,
    )
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.rate, total_steps=settings.steps, pct_start=settings.warm_up
    )
    draws = np.random.default_rng([seed, 1])
    for step in bar(range(settings.steps), desc="survey specimen"):
        batch = writer.mixed(settings.batch, draws, settings.most_stated, settings.off_task)
        hidden = model.model(torch.from_numpy(batch.tokens)).last_hidden_state
        loss = settings.answer_weight * answer_loss(model, hidden, batch, writer.letters)
        read = np.ones(settings.batch, dtype=bool) if step % 2 == 0 else batch.answer < 0
        if read.any():
            loss = loss + next_token_loss(model, hidden, batch, read)
        if not torch.isfinite(loss):
            raise ResearchError(f"the survey specimen's loss is not finite at step {step}; lower `rate` and run again.")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        cycle.step()
    specimen.save(model, tokenizer, folder)


def answer_loss(model: LlamaForCausalLM, hidden: torch.Tensor, batch: Batch, letters: list[int]) -> torch.Tensor:
    """Cross-entropy of the letter against its exact distribution, over documents with a question."""
    asked = np.flatnonzero(batch.answer >= 0)
    states = hidden[asked, batch.answer[asked]]
    target = torch.from_numpy(batch.target[asked]).to(states.dtype)
    return -(target * log_softmax(model.lm_head(states), -1)[:, letters]).sum(-1).mean()


def next_token_loss(model: LlamaForCausalLM, hidden: torch.Tensor, batch: Batch, read: np.ndarray) -> torch.Tensor:
    """Cross-entropy of the next tokens in the documents of the mask `read`, all but the answers' letters."""
    following = torch.from_numpy(batch.tokens[:, 1:]).clone()
    asked = np.flatnonzero(batch.answer >= 0)
    following[asked, batch.answer[asked]] = model.config.pad_token_id
    logits = model.lm_head(hidden[read, :-1])
    return cross_entropy(logits.transpose(1, 2), following[read], ignore_index=model.config.pad_token_id)


def arms(saes: SurveySAEs, width: int, hook: str) -> "dict[str, TrainingSAEConfig]":
    """The SAEs at one hook, by name."""
    make = {
        "topk": lambda latents: training.topk(width, latents, saes.l0),
        "jumprelu": lambda latents: training.jumprelu(width, latents, saes.l0),
        "relu": lambda latents: training.relu(width, latents),
    }
    block = hook.split(".")[1]
    chosen = {f"block{block}_{kind}": make[kind](saes.latents) for kind in saes.kinds}
    if saes.wide and hook == saes.hooks[0]:
        chosen[f"block{block}_{saes.kinds[0]}_wide"] = make[saes.kinds[0]](saes.wide * saes.latents)
    return chosen


def train_saes(
    settings: SurveySettings, model_folder: Path, seed: int, out_folder: Path, places: Collection[int] | None = None
) -> None:
    """Train the SAEs of all hooks, or of those at `places`, each hook's in lock-step, into `out_folder`/name."""
    saes, draws = settings.saes, np.random.default_rng([seed, 2])
    lens = lenses.load(model_folder, name=NAME)
    writer = Writer(Population(settings.population), lens.tokenizer.get_vocab())
    read, held = (
        torch.from_numpy(writer.mixed(n, draws, settings.most_stated, settings.off_task).tokens)
        for n in (saes.documents, saes.calibration)
    )
    for place, hook in enumerate(saes.hooks):
        if places is not None and place not in places:
            continue
        acts, calibration = (activations.collect(lens, tokens, hook, batch=256) for tokens in (read, held))
        configs = arms(saes, lens.d_model, hook)
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
