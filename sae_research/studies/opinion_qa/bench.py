"""The bench on which every method is measured: survey prompts and other text with their residuals, cached once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from sae_research.model_tail import ModelTail
from sae_research.models import LanguageModel
from sae_research.studies.opinion_qa.letters import (
    Letters,
    Reading,
    averaged,
    by_ordinal,
    most_options,
    option_log_probs,
)
from sae_research.studies.opinion_qa.shift import Basis, displacement
from sae_research.surveys.survey import Question

Writer = Callable[[Question, bool], str]
"""The prompt of a question up to its answer's letter; the second argument lists the options from the top."""


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
    ladder: torch.Tensor
    """Number of options, [prompts]."""

    def editable(self, positions: str) -> torch.Tensor:
        """Where a shift acts, [prompts, positions]; a prompt is its survey block, as it carries no group text."""
        place = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        if positions == "answer":
            return place == self.last[:, None]
        return (place > 0) & (place <= self.last[:, None])

    def rows(self, questions: Sequence[int]) -> torch.Tensor:
        """Prompts of some questions, in both orders."""
        return torch.isin(self.question, torch.as_tensor(questions).to(self.question)).nonzero()[
            :, 0
        ]


def prompts(lens: LanguageModel, questions: Sequence[Question], write: Writer) -> Prompts:
    """Tokens of every question in both orders."""
    texts = [write(q, reverse) for reverse in (False, True) for q in questions]
    place = torch.arange(len(texts))
    lengths = [len(ids) for ids in lens.tokenizer(texts, add_special_tokens=False)["input_ids"]]
    ladders = [q.ladder for q in questions] * 2
    about = (
        torch.tensor(lengths),
        place % len(questions),
        place >= len(questions),
        torch.tensor(ladders),
    )
    return Prompts(lens.tokens(texts), *(column.to(lens.device) for column in about))


@dataclass(frozen=True)
class Cost:
    """What a shift does to other text when it is always on."""

    loss: float
    """Increase of next-token cross-entropy in nats."""
    divergence: float
    """KL(base || steered) per token in nats."""


_SAMPLE = 16_384
"""Survey tokens that statistics of a basis rest on."""


class Bench:
    """One model, one hook, one survey: runs only the blocks above the hook on residuals that no group text enters.

    `batch` is how many rows, prompts or documents each under one shift, go through those blocks at once.
    """

    def __init__(
        self,
        lens: LanguageModel,
        hook: str,
        questions: Sequence[Question],
        write: Writer,
        texts: dict[str, torch.Tensor],
        batch: int = 512,
    ):
        self.lens, self.hook, self.questions, self.write, self.batch = (
            lens,
            lens.hook(hook),
            tuple(questions),
            write,
            batch,
        )
        self.letters = Letters(lens.tokenizer, most_options(questions))
        self.upper = ModelTail(lens, hook)
        self.prompts = prompts(lens, questions, write)
        self.texts = {split: tokens.to(lens.device) for split, tokens in texts.items()}
        self.residual = self.residuals(self.prompts.tokens)

    def residuals(self, tokens: torch.Tensor) -> torch.Tensor:
        """Residuals of all positions at the hook, in float32."""
        return torch.cat(
            [self.lens.residual(rows, self.hook).float() for rows in tokens.split(self.batch)]
        )

    @cached_property
    def text_residual(self) -> dict[str, torch.Tensor]:
        """Residuals of the other text, by split."""
        return {split: self.residuals(tokens) for split, tokens in self.texts.items()}

    @cached_property
    def text_content(self) -> dict[str, torch.Tensor]:
        """Where the other text has tokens that a shift touches, by split."""
        return {split: self.lens.content(tokens) for split, tokens in self.texts.items()}

    @cached_property
    def block(self) -> torch.Tensor:
        """Residuals of the survey's own tokens, start token left out, [tokens, d]: what a basis is made from.

        At most `_SAMPLE` of them, spread evenly over the prompts.
        """
        return self.residual[self._sampled]

    @cached_property
    def block_tokens(self) -> torch.Tensor:
        """The tokens of `block`, [tokens]."""
        return self.prompts.tokens[self._sampled]

    @property
    def _sampled(self) -> tuple[torch.Tensor, ...]:
        own = self.prompts.editable("question").nonzero()
        return tuple(own[:: -(-len(own) // _SAMPLE)].T)

    def parts(self, rows: torch.Tensor, copies: int) -> tuple[torch.Tensor, ...]:
        """`rows` in parts that go through the blocks at once when each is run under `copies` shifts."""
        return rows.split(max(1, self.batch // copies))

    # answers

    def log_probs(self, residual: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """log P_theta(k | q) by ordinal position for residuals [n, positions, d] of the prompts `rows`."""
        scores = self.letters.unembedded(
            self.upper, self.upper.states(residual, self.prompts.last[rows])
        )
        return option_log_probs(scores, self.prompts.ladder[rows], self.prompts.reverse[rows])

    def steered(
        self, basis: Basis, kind: str, delta: torch.Tensor, rows: torch.Tensor, positions: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Residuals x' [rows, shifts, positions, d] of prompts under every shift, and x' - x."""
        x = self.residual[rows]
        moved = displacement(basis, kind, x, basis.encode(x), delta)
        moved = moved * self.prompts.editable(positions)[rows][:, None, :, None]
        return x[:, None] + moved, moved

    @torch.no_grad()
    def answers(
        self, basis: Basis, kind: str, delta: torch.Tensor, questions: Sequence[int], positions: str
    ) -> Reading:
        """What the model answers under every shift, [shifts, questions, options]."""
        rows = self.prompts.rows(questions)
        found, mass = [], []
        for part in self.parts(rows, len(delta)):
            x, _ = self.steered(basis, kind, delta, part, positions)
            read, letters = self.read(x.flatten(0, 1), part.repeat_interleave(len(delta)))
            found.append(read.unflatten(0, (len(part), -1)))
            mass.append(letters.unflatten(0, (len(part), -1)))
        return self._averaged(torch.cat(found), torch.cat(mass))

    @torch.no_grad()
    def read(self, residual: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities by ordinal position and the letters' share of all next-token mass."""
        logits = self.upper.logits(self.upper.states(residual, self.prompts.last[rows]))
        scores = by_ordinal(
            self.letters.scores(logits), self.prompts.ladder[rows], self.prompts.reverse[rows]
        )
        return scores.softmax(-1), (scores.logsumexp(-1) - logits.logsumexp(-1)).exp()

    def unsteered(self, questions: Sequence[int]) -> Reading:
        """What the frozen model answers, [1, questions, options]."""
        rows = self.prompts.rows(questions)
        found = [self.read(self.residual[part], part) for part in rows.split(self.batch)]
        return self._averaged(*(torch.cat(part)[:, None] for part in zip(*found, strict=True)))

    @staticmethod
    def _averaged(found: torch.Tensor, mass: torch.Tensor) -> Reading:
        """[both orders of the questions, shifts, ...] to a reading of [shifts, questions, ...]."""
        by_order = [half.transpose(0, 1).double().cpu().numpy() for half in found.chunk(2)]
        return averaged(by_order, [half.T.double().cpu().numpy() for half in mass.chunk(2)])

    # other text

    def text_logits(
        self, split: str, docs: torch.Tensor, moved: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits of other text, with what a shift adds to its residuals."""
        x = self.text_residual[split][docs]
        return self.upper.logits(self.upper.states(x if moved is None else x + moved))

    @torch.no_grad()
    def cost(self, basis: Basis, kind: str, delta: torch.Tensor, split: str) -> Cost:
        """Mean cost over shifts of leaving each always on, on the other text of `split`."""
        tokens, content = self.texts[split], self.text_content[split]
        real = content[:, 1:]
        count, predicted, totals = content.sum().item(), real.sum().item(), np.zeros(2)
        for docs in self.parts(torch.arange(len(tokens)), 4):
            base = self.text_logits(split, docs).log_softmax(-1)
            x = self.text_residual[split][docs]
            codes = basis.encode(x)
            following = tokens[docs, 1:, None]
            for row in delta:
                moved = (
                    displacement(basis, kind, x, codes, row[None])[:, 0] * content[docs][..., None]
                )
                new = self.text_logits(split, docs, moved).log_softmax(-1)
                lost = (base - new)[:, :-1].gather(-1, following)[..., 0][real[docs]]
                away = (base.exp() * (base - new)).sum(-1)[content[docs]]
                totals += (
                    lost.double().sum().item() / predicted,
                    away.double().sum().item() / count,
                )
        return Cost(*(totals / len(delta)).tolist())
