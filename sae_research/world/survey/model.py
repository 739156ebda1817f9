"""The toy survey model: a small Llama that answers a planted survey as persons, and its SAEs."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy, log_softmax
from tqdm.auto import tqdm
from transformers import LlamaForCausalLM

from sae_research import models
from sae_research.errors import ResearchError
from sae_research.training import SAETraining
from sae_research.world import toy_model, toy_saes
from sae_research.world.survey.population import Population, PopulationSettings
from sae_research.world.survey.prompts import WORDS, Batch, Writer
from sae_research.world.toy_model import ToyLlama
from sae_research.world.toy_saes import ToySAEs

NAME = "world-survey"
"""How SAEs refer to the toy model."""


@dataclass(frozen=True)
class SurveySettings(ToyLlama):
    """How the toy survey model and its SAEs are made."""

    width: int = 64
    inner: int = 128
    scale: float = 0.1  # at 0.02 the answers are not learned in this budget
    steps: int = 1500
    batch_size: int = 192
    population: PopulationSettings = field(default_factory=PopulationSettings)
    """The planted survey that it learns."""
    attention_only_blocks: int = 1
    """First blocks without feed-forward layer: they only gather what was stated, so that a persona
    is a direction of its own before any layer multiplies it with the question.
    """
    most_stated: int = 4
    """Most attributes that a document states; it states each number from 0 on equally often."""
    off_task: float = 0.12
    """Share of documents that are toy arithmetic and toy stories."""
    warmup_fraction: float = 0.15
    """Share of the steps until the peak of the one-cycle learning rate."""
    answer_weight: float = 5.0
    """Weight of the exact answers; next tokens of surveys are taught every second step."""
    saes: ToySAEs = field(
        default_factory=lambda: ToySAEs(
            hooks=("blocks.0.hook_resid_post", "blocks.2.hook_resid_post"),
            latents=512,
            l0=8,
            documents=6000,
            calibration=1000,
            training=SAETraining(steps=2000, batch_size=256, lr=3e-3),
        )
    )
    """Its SAEs."""


def train_model(settings: SurveySettings, seed: int, folder: Path) -> None:
    """Train the model on exact answer distributions and next tokens; save it for Hugging Face."""
    tokenizer = toy_model.make_word_tokenizer(WORDS)
    writer = Writer(Population(settings.population), tokenizer.get_vocab())
    model = toy_model.make_llama(len(tokenizer), settings, seed).train()
    for block in model.model.layers[: settings.attention_only_blocks]:
        block.mlp.down_proj.weight.data.zero_().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.lr, total_steps=settings.steps, pct_start=settings.warmup_fraction
    )
    draws = np.random.default_rng([seed, 1])
    for step in tqdm(range(settings.steps), desc="toy survey model", leave=False):
        batch = writer.write_mixed(
            settings.batch_size, draws, settings.most_stated, settings.off_task
        )
        hidden = model.model(torch.from_numpy(batch.tokens)).last_hidden_state
        loss = settings.answer_weight * compute_answer_loss(model, hidden, batch, writer.letters)
        read = np.ones(settings.batch_size, dtype=bool) if step % 2 == 0 else batch.answer < 0
        if read.any():
            loss = loss + compute_next_token_loss(model, hidden, batch, read)
        if not torch.isfinite(loss):
            raise ResearchError(
                f"the toy survey model's loss is not finite at step {step}; "
                "lower `lr` and run again."
            )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        cycle.step()
    toy_model.save_model(model, tokenizer, folder)


def compute_answer_loss(
    model: LlamaForCausalLM, hidden: torch.Tensor, batch: Batch, letters: list[int]
) -> torch.Tensor:
    """Cross-entropy of the letter against its exact distribution, where there is a question."""
    asked = np.flatnonzero(batch.answer >= 0)
    states = hidden[asked, batch.answer[asked]]
    target = torch.from_numpy(batch.target[asked]).to(states.dtype)
    return -(target * log_softmax(model.lm_head(states), -1)[:, letters]).sum(-1).mean()


def compute_next_token_loss(
    model: LlamaForCausalLM, hidden: torch.Tensor, batch: Batch, read: np.ndarray
) -> torch.Tensor:
    """Cross-entropy of the next tokens in the documents of the mask `read`, but no letters."""
    following = torch.from_numpy(batch.tokens[:, 1:]).clone()
    asked = np.flatnonzero(batch.answer >= 0)
    following[asked, batch.answer[asked]] = model.config.pad_token_id
    logits = model.lm_head(hidden[read, :-1])
    return cross_entropy(
        logits.transpose(1, 2), following[read], ignore_index=model.config.pad_token_id
    )


def train_saes(
    settings: SurveySettings, model_folder: Path, seed: int, folder: Path, hook_index: int
) -> None:
    """Train the SAEs of one hook on mixed documents, into `folder`/name."""
    draws = np.random.default_rng([seed, 2])
    model = models.load_model(model_folder, name=NAME)
    writer = Writer(Population(settings.population), model.tokenizer.get_vocab())
    tokens, held_out = (
        writer.write_mixed(n, draws, settings.most_stated, settings.off_task).tokens
        for n in (settings.saes.documents, settings.saes.calibration)
    )
    toy_saes.train_saes(settings.saes, model, tokens, held_out, seed, folder, hook_index)
