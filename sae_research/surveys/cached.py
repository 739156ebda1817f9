"""Survey prompts and other text with their residuals, cached once: what every method runs on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from sae_research.bases import Basis, compute_displacement
from sae_research.errors import ResearchError
from sae_research.model_tail import ModelTail
from sae_research.models import LanguageModel
from sae_research.surveys.prompts import (
    AnswerDistribution,
    OptionLetters,
    average_orders,
    sort_by_ordinal,
)
from sae_research.surveys.survey import Question

Writer = Callable[[Question, bool], str]
"""The prompt of a question up to its answer's letter; True lists the options from the top."""


@dataclass(frozen=True)
class Prompts:
    """Every question in both option orders: first all in ascending order, then all reversed."""

    tokens: torch.Tensor
    """[prompts, positions], padded on the right."""
    last: torch.Tensor
    """Position whose next token is the letter, [prompts]."""
    question: torch.Tensor
    """Index of the question, [prompts]."""
    reverse: torch.Tensor
    """Whether the options are listed from the top, [prompts]."""
    n_options: torch.Tensor
    """Number of options, [prompts]."""

    def editable(self, positions: str) -> torch.Tensor:
        """Where a shift acts, [prompts, positions]: no prompt here carries any group text."""
        place = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        if positions == "answer":
            return place == self.last[:, None]
        return (place > 0) & (place <= self.last[:, None])

    def prompt_ids(self, questions: Sequence[int]) -> torch.Tensor:
        """Prompts of some questions, in both orders."""
        wanted = torch.as_tensor(questions).to(self.question)
        return torch.isin(self.question, wanted).nonzero()[:, 0]

    def sort_scores(self, scores: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Letter scores [..., rows, letters] of the prompts `rows`, by ordinal position."""
        return sort_by_ordinal(scores, self.n_options[rows], self.reverse[rows])


def make_prompts(model: LanguageModel, questions: Sequence[Question], write: Writer) -> Prompts:
    """Tokens of every question in both orders."""
    texts = [write(q, reverse) for reverse in (False, True) for q in questions]
    index = torch.arange(len(texts), device=model.device)
    lengths = [len(ids) for ids in model.tokenizer(texts, add_special_tokens=False)["input_ids"]]
    return Prompts(
        tokens=model.tokens(texts),
        # the start token comes first, so a text's length is the place of its last token
        last=torch.tensor(lengths, device=model.device),
        question=index % len(questions),
        reverse=index >= len(questions),
        n_options=torch.tensor([q.n_options for q in questions] * 2, device=model.device),
    )


@dataclass(frozen=True)
class OffTaskCost:
    """What a shift does to other text when it is always on."""

    loss: float
    """Increase of next-token cross-entropy in nats."""
    divergence: float
    """KL(base || steered) per token in nats."""


NO_COST = OffTaskCost(0.0, 0.0)
SPLITS = ("train", "validation", "test")
_SAMPLE = 16_384
"""Survey tokens that statistics of a basis rest on."""


def split_passages(
    model: LanguageModel, passages: Sequence[str], n_documents: int
) -> dict[str, torch.Tensor]:
    """Other text in rows of at most 64 tokens, `n_documents` of them for each split."""
    length = min(64, model.n_ctx)
    tokens = model.packed(list(passages), length)
    if len(tokens) < len(SPLITS):
        raise ResearchError(
            f"the other text (passages.txt) gives {len(tokens)} rows of {length} tokens and each "
            "split needs at least one; add text."
        )
    share = min(n_documents, len(tokens) // len(SPLITS))
    return dict(zip(SPLITS, tokens[: len(SPLITS) * share].split(share), strict=True))


class CachedPrompts:
    """One model, one hook, one survey: runs only the blocks above the hook.

    `batch` is how many rows, prompts or documents each under one shift, go through them at once.
    """

    def __init__(
        self,
        model: LanguageModel,
        hook: str,
        questions: Sequence[Question],
        write: Writer,
        texts: dict[str, torch.Tensor],
        batch: int = 512,
    ):
        self.model = model
        self.hook = model.hook(hook)
        self.questions = tuple(questions)
        self.write = write
        self.batch = batch
        self.letters = OptionLetters(model.tokenizer, max(q.n_options for q in questions))
        self.tail = ModelTail(model, hook)
        self.prompts = make_prompts(model, questions, write)
        self.texts = {split: tokens.to(model.device) for split, tokens in texts.items()}
        self.residual = self.compute_residuals(self.prompts.tokens)

    def compute_residuals(self, tokens: torch.Tensor) -> torch.Tensor:
        """Residuals of all positions at the hook, in float32."""
        return torch.cat(
            [self.model.residual(rows, self.hook).float() for rows in tokens.split(self.batch)]
        )

    @cached_property
    def text_residual(self) -> dict[str, torch.Tensor]:
        """Residuals of the other text, by split."""
        return {split: self.compute_residuals(tokens) for split, tokens in self.texts.items()}

    @cached_property
    def text_content(self) -> dict[str, torch.Tensor]:
        """Where the other text has tokens that a shift touches, by split."""
        return {split: self.model.content(tokens) for split, tokens in self.texts.items()}

    @cached_property
    def survey_residuals(self) -> torch.Tensor:
        """Residuals of the survey's own tokens but the start token, [tokens, d], for bases.

        At most `_SAMPLE` of them, spread evenly over the prompts.
        """
        return self.residual[self._sampled]

    @cached_property
    def survey_tokens(self) -> torch.Tensor:
        """The tokens of `survey_residuals`, [tokens]."""
        return self.prompts.tokens[self._sampled]

    @property
    def _sampled(self) -> tuple[torch.Tensor, ...]:
        own = self.prompts.editable("question").nonzero()
        return tuple(own[:: -(-len(own) // _SAMPLE)].T)

    def microbatches(self, rows: torch.Tensor, copies: int) -> tuple[torch.Tensor, ...]:
        """`rows` in parts that go through the blocks at once, each row under `copies` shifts."""
        return rows.split(max(1, self.batch // copies))

    # answers

    def log_probs(self, residual: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """log P_theta(k | q) for residuals [n, positions, d] of the prompts `rows`, [n, options].

        Options are by ordinal position; those that a question lacks have -inf.
        """
        states = self.tail.states(residual, self.prompts.last[rows])
        scores = self.letters.score_states(self.tail, states)
        return self.prompts.sort_scores(scores, rows).log_softmax(-1)

    def apply_shift(
        self, basis: Basis, kind: str, delta: torch.Tensor, rows: torch.Tensor, positions: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Residuals x' [rows, shifts, positions, d] of prompts under every shift, and x' - x."""
        x = self.residual[rows]
        moved = compute_displacement(basis, kind, x, basis.encode(x), delta)
        moved = moved * self.prompts.editable(positions)[rows][:, None, :, None]
        return x[:, None] + moved, moved

    @torch.no_grad()
    def measure_answers(
        self, basis: Basis, kind: str, delta: torch.Tensor, questions: Sequence[int], positions: str
    ) -> AnswerDistribution:
        """What the model answers under every shift, [shifts, questions, options]."""
        rows = self.prompts.prompt_ids(questions)
        found, mass = [], []
        for part in self.microbatches(rows, len(delta)):
            x, _ = self.apply_shift(basis, kind, delta, part, positions)
            read, letters = self.read_answers(x.flatten(0, 1), part.repeat_interleave(len(delta)))
            found.append(read.unflatten(0, (len(part), -1)))
            mass.append(letters.unflatten(0, (len(part), -1)))
        return average_orders(torch.cat(found).transpose(0, 1), torch.cat(mass).T)

    @torch.no_grad()
    def read_answers(
        self, residual: torch.Tensor, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities by ordinal position and the letters' share of all next-token mass."""
        logits = self.tail.logits(self.tail.states(residual, self.prompts.last[rows]))
        scores = self.prompts.sort_scores(self.letters.score_logits(logits), rows)
        return scores.softmax(-1), (scores.logsumexp(-1) - logits.logsumexp(-1)).exp()

    def measure_unsteered(self, questions: Sequence[int]) -> AnswerDistribution:
        """What the frozen model answers, [1, questions, options]."""
        rows = self.prompts.prompt_ids(questions)
        found = [self.read_answers(self.residual[part], part) for part in rows.split(self.batch)]
        probabilities, mass = (torch.cat(part)[None] for part in zip(*found, strict=True))
        return average_orders(probabilities, mass)

    # other text

    def text_logits(
        self, split: str, docs: torch.Tensor, moved: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits of other text, with what a shift adds to its residuals."""
        x = self.text_residual[split][docs]
        return self.tail.logits(self.tail.states(x if moved is None else x + moved))

    @torch.no_grad()
    def measure_cost(
        self, basis: Basis, kind: str, delta: torch.Tensor, split: str, positions: str = "all"
    ) -> OffTaskCost:
        """Mean cost over shifts of leaving each always on, on the other text of `split`.

        A shift of the survey block leaves other text as it is.
        """
        if positions != "all":
            return NO_COST
        tokens, content = self.texts[split], self.text_content[split]
        totals = np.zeros(2)
        for docs in self.microbatches(torch.arange(len(tokens)), 4):
            base = self.text_logits(split, docs).log_softmax(-1)
            x = self.text_residual[split][docs]
            acts = basis.encode(x)
            for row in delta:
                moved = compute_displacement(basis, kind, x, acts, row[None])[:, 0]
                moved = moved * content[docs][..., None]
                new = self.text_logits(split, docs, moved).log_softmax(-1)
                totals += self.sum_costs(split, docs, base, new) / self.count_text(split)
        return OffTaskCost(*(totals / len(delta)).tolist())

    def count_text(self, split: str) -> np.ndarray:
        """Tokens of other text that are predicted, and all that have content."""
        content = self.text_content[split]
        return np.array([content[:, 1:].sum().item(), content.sum().item()])

    def sum_costs(
        self, split: str, docs: torch.Tensor, base: torch.Tensor, new: torch.Tensor
    ) -> np.ndarray:
        """Summed over tokens of `docs`: loss of `new` log-probabilities minus `base`'s, and KL."""
        real = self.text_content[split][docs]
        gaps = base - new
        lost = gaps[:, :-1].gather(-1, self.texts[split][docs, 1:, None])[..., 0][real[:, 1:]]
        away = (base.exp() * gaps).sum(-1)[real]
        return np.array([lost.double().sum().item(), away.double().sum().item()])
