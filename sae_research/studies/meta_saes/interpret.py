"""Detection, fuzzing and strength ranking of explained latents (section 5.2; Delphi's definitions).

A judge explains a latent from examples and answers questions about contexts. Negatives are contexts
in which a neighbour is active and the latent is not, so that too broad an explanation fails.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import LongTensor, Tensor

SHARE_OF_MAX = 0.3
"""From this share of a latent's largest activation on, a token is marked (Delphi's threshold)."""


@dataclass
class Context:
    """A stretch of text with a latent's activations."""

    tokens: LongTensor
    """Token ids [length]."""
    acts: Tensor
    """Activations [length]."""


class Judge(Protocol):
    """Explains latents and predicts from the explanation alone."""

    def explain(self, examples: Sequence[Context]) -> Any:
        """An explanation of what the latent is active on."""

    def detects(self, explanation: Any, tokens: LongTensor) -> bool:
        """Whether the latent is active somewhere in the text."""

    def fits(self, explanation: Any, tokens: LongTensor, marked: Tensor) -> bool:
        """Whether the marked tokens are those that it is active on."""

    def strength(self, explanation: Any, tokens: LongTensor) -> float:
        """How active it is on the last token."""


class TokenRule:
    """A deterministic stand-in for a language model: the explanation is a mean activation by token.

    It knows no context, so it bounds what can be said of a latent by its tokens alone.
    """

    def explain(self, examples: Sequence[Context]) -> dict[int, float]:
        """Mean activation on each token seen."""
        tokens = torch.cat([example.tokens for example in examples])
        acts = torch.cat([example.acts for example in examples])
        seen, place = tokens.unique(return_inverse=True)
        total = torch.zeros(len(seen)).index_add_(0, place, acts.float())
        mean = total / torch.bincount(place, minlength=len(seen))
        return dict(zip(seen.tolist(), mean.tolist(), strict=True))

    def _bar(self, rule: dict[int, float]) -> float:
        return SHARE_OF_MAX * max(rule.values())

    def detects(self, explanation: dict[int, float], tokens: LongTensor) -> bool:
        found = [explanation.get(token, 0.0) for token in tokens.tolist()]
        return max(found) > self._bar(explanation)

    def fits(self, explanation: dict[int, float], tokens: LongTensor, marked: Tensor) -> bool:
        found = [explanation.get(token, 0.0) for token in tokens[marked].tolist()]
        return sum(found) / len(found) > self._bar(explanation)

    def strength(self, explanation: dict[int, float], tokens: LongTensor) -> float:
        return explanation.get(int(tokens[-1]), 0.0)


@dataclass
class LanguageJudge:
    """A language model judges: `ask` answers a prompt, `words` turns token ids into strings."""

    ask: Callable[[str], str]
    words: Callable[[LongTensor], list[str]]

    def _marked(self, tokens: LongTensor, marked: Tensor) -> str:
        pairs = zip(self.words(tokens), marked.tolist(), strict=True)
        return " ".join(f"<<{word}>>" if mark else word for word, mark in pairs)

    def explain(self, examples: Sequence[Context]) -> str:
        top = max(float(example.acts.max()) for example in examples)
        lines = [self._marked(e.tokens, e.acts > SHARE_OF_MAX * top) for e in examples]
        return self.ask(
            "A feature of a language model is active on the words between << and >>. Say in one "
            "sentence what it stands for.\n\n" + "\n".join(lines)
        ).strip()

    def _yes(self, question: str) -> bool:
        return self.ask(f"{question}\n\nAnswer 1 for yes or 0 for no.").strip().startswith("1")

    def detects(self, explanation: str, tokens: LongTensor) -> bool:
        text = " ".join(self.words(tokens))
        return self._yes(f"Feature: {explanation}\nText: {text}\nIs the feature present?")

    def fits(self, explanation: str, tokens: LongTensor, marked: Tensor) -> bool:
        text = self._marked(tokens, marked)
        return self._yes(f"Feature: {explanation}\nText: {text}\nAre the marked words examples?")

    def strength(self, explanation: str, tokens: LongTensor) -> float:
        text = " ".join(self.words(tokens))
        answer = self.ask(
            f"Feature: {explanation}\nText: {text}\nHow strongly is it active on the last word, "
            "from 0 to 10? Answer with one number."
        )
        number = re.search(r"\d+(\.\d+)?", answer)
        return float(number[0]) if number else 0.0


def rank_correlation(actual: Sequence[float], predicted: Sequence[float]) -> float:
    """Spearman's rank correlation; 0 where the prediction is constant (as in the paper's code)."""
    from scipy.stats import spearmanr

    if len(set(predicted)) < 2 or len(set(actual)) < 2:
        return 0.0
    return float(spearmanr(actual, predicted).statistic)


@dataclass
class Interpreter:
    """Scores latents on contexts that no explanation was made from."""

    tokens: LongTensor
    """Contexts [n, length]; the first half serves explanations, the second tests."""
    judge: Judge
    n_examples: int
    n_tests: int
    seed: int

    def _draw(self, rows: Tensor, n: int, latent: int) -> LongTensor:
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + latent)
        return rows[torch.randperm(len(rows), generator=draw)[:n]]

    def score(self, acts: Tensor, near: Tensor, latent: int) -> dict[str, float] | None:
        """Scores of a latent with activations [n, length]; `near` [n] says where a neighbour is
        active. None if there are too few contexts of either kind.
        """
        on = acts.amax(1) > 0
        later = torch.arange(len(acts)) >= len(acts) // 2
        picks = [
            self._draw(kind.nonzero().flatten(), n, latent)
            for kind, n in (
                (on & ~later, self.n_examples),
                (on & later, self.n_tests),
                (near & ~on & later, self.n_tests),
            )
        ]
        if min(map(len, picks)) < self.n_tests:
            return None
        return self._score_one(acts, *picks)

    def _score_one(
        self, acts: Tensor, examples: Tensor, positives: Tensor, negatives: Tensor
    ) -> dict[str, float]:
        from sklearn.metrics import balanced_accuracy_score

        judge = self.judge
        said = judge.explain([Context(self.tokens[i], acts[i]) for i in examples.tolist()])
        chosen = [*positives.tolist(), *negatives.tolist()]
        truth = [True] * len(positives) + [False] * len(negatives)
        marks = acts > SHARE_OF_MAX * acts.max()
        marks |= (acts == acts.amax(1, keepdim=True)) & (acts > 0)
        n_marked = max(1, round(float(marks[positives].sum(1).float().mean())))
        for i in negatives.tolist():
            places = self._draw(torch.arange(acts.shape[1]), n_marked, i)
            marks[i, places] = True
        ends = [int(acts[i].argmax()) for i in positives.tolist()]
        pairs = list(zip(positives.tolist(), ends, strict=True))
        detected = [judge.detects(said, self.tokens[i]) for i in chosen]
        fitting = [judge.fits(said, self.tokens[i], marks[i]) for i in chosen]
        return {
            "detection": balanced_accuracy_score(truth, detected),
            "fuzzing": balanced_accuracy_score(truth, fitting),
            "strength": rank_correlation(
                [float(acts[i, end]) for i, end in pairs],
                [judge.strength(said, self.tokens[i, : end + 1]) for i, end in pairs],
            ),
        }


def nearest_neighbours(rows: Tensor, live: Tensor, n: int = 5) -> LongTensor:
    """The live latents whose unit decoder rows are nearest to each latent's [d_sae, n]."""
    cosines = rows @ rows.T
    cosines.fill_diagonal_(-2.0)
    cosines[:, ~live] = -2.0
    return cosines.topk(n).indices
