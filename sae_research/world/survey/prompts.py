"""What the toy survey model reads: one question per document, and off-task text.

The entropy of all text is known word by word.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from sae_research.surveys.survey import Question
from sae_research.world.survey.population import ATTRIBUTES, OPTION_SETS, TOPICS, VERBS, Population
from sae_research.world.toy_model import BOS, EOS, PAD

LETTERS = ("A", "B", "C", "D")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ANIMALS = ("cat", "dog", "fox", "owl")
DEEDS = ("saw", "met", "fed")
FRAME = ("i", "am", ".", "question", ":", "should", "we", "?", "answer")
SUMS = ("plus", "minus", "is", "the")
VALUES = tuple(value for values in ATTRIBUTES.values() for value in values)
WORDS = [
    *FRAME, *SUMS, *VALUES, *VERBS, *TOPICS,
    *(option for options in OPTION_SETS for option in options),
    *LETTERS, *NUMBERS, *ANIMALS, *DEEDS,
]  # fmt: skip
SENTENCES = 4
"""Sentences of an off-task document."""
CONTEXT = 16
"""Tokens of the shortest document, BOS included: contexts cut here need no padding."""

Scored = list[tuple[str, float]]
"""Words, each with its surprisal in nats under the generator."""


def prompt(question: Question, stated: Iterable[str] = (), reverse: bool = False) -> str:
    """The text up to the answer's letter; `reverse` lists the options from the top."""
    persona = [f"i am {value} ." for value in stated]
    options = question.options[::-1] if reverse else question.options
    lettered = [f"{letter} {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return " ".join([*persona, "question :", question.text, *lettered, "answer :"])


def order_by_letter(
    distribution: np.ndarray, n_options: np.ndarray | int, reverse: np.ndarray | bool
) -> np.ndarray:
    """Probabilities by ordinal as probabilities by letter, or back; [..., options]."""
    places = np.arange(distribution.shape[-1])
    n_options, reverse = np.asarray(n_options)[..., None], np.asarray(reverse)[..., None]
    source = np.where(reverse & (places < n_options), n_options - 1 - places, places)
    return np.take_along_axis(distribution, np.broadcast_to(source, distribution.shape), -1)


def write_arithmetic(draws: np.random.Generator) -> Scored:
    """Sums and differences within nine: `two plus three is five .`"""
    words: Scored = []
    for _ in range(SENTENCES):
        a, plus = draws.integers(10), draws.integers(2)
        choices = 10 - a if plus else a + 1
        b = draws.integers(choices)
        result = a + b if plus else a - b
        words += [
            (NUMBERS[a], np.log(10)), ("plus" if plus else "minus", np.log(2)),
            (NUMBERS[b], np.log(choices)), ("is", 0.0), (NUMBERS[result], 0.0), (".", 0.0),
        ]  # fmt: skip
    return words


def write_story(draws: np.random.Generator) -> Scored:
    """A chain of animals; each sentence goes on with the last one: `the cat saw the dog .`"""
    words: Scored = []
    who = ANIMALS[draws.integers(len(ANIMALS))]
    surprisal = np.log(len(ANIMALS))
    for _ in range(SENTENCES):
        others = [animal for animal in ANIMALS if animal != who]
        whom = others[draws.integers(len(others))]
        words += [
            ("the", 0.0), (who, surprisal), (DEEDS[draws.integers(len(DEEDS))], np.log(len(DEEDS))),
            ("the", 0.0), (whom, np.log(len(others))), (".", 0.0),
        ]  # fmt: skip
        who = whom
        surprisal = 0.0
    return words


OFF_TASK: tuple[Callable[[np.random.Generator], Scored], ...] = (write_arithmetic, write_story)


@dataclass(frozen=True)
class Batch:
    """Documents as token ids with what is known about them."""

    tokens: np.ndarray
    """Ids padded on the right, [documents, positions]."""
    answer: np.ndarray
    """Position whose next token is the answer's letter; -1 in off-task documents."""
    target: np.ndarray
    """Exact probability of each letter there, [documents, 4]; zero in off-task documents."""
    surprisal: np.ndarray
    """Generator's surprisal of each token of off-task documents; nan for what it does not score."""


class Writer:
    """Writes documents by authors of a population, as token ids."""

    def __init__(self, population: Population, vocabulary: dict[str, int]):
        self.population = population
        self.ids = vocabulary
        self.n_options = np.array([q.n_options for q in population.questions])
        self.prompts = [
            [self._encode(prompt(q, reverse=reverse)) for reverse in (False, True)]
            for q in population.questions
        ]
        self.statements = {value: self._encode(f"i am {value} .") for value in VALUES}
        self.letters = [vocabulary[letter] for letter in LETTERS]

    def _encode(self, text: str) -> list[int]:
        return [self.ids[word] for word in text.split()]

    def write_survey(self, n: int, draws: np.random.Generator, most_stated: int) -> Batch:
        """`n` questions to persons with up to `most_stated` attributes; if none, to web authors."""
        question, reverse = draws.integers(len(self.prompts), size=n), draws.integers(2, size=n)
        stated = [self._draw_stated(draws, most_stated) for _ in range(n)]
        exact = np.stack([self._exact_answers(s, q) for s, q in zip(stated, question, strict=True)])
        target = order_by_letter(exact, self.n_options[question], reverse.astype(bool))
        drawn = (target.cumsum(-1) < draws.random((n, 1)) * target.sum(-1, keepdims=True)).sum(-1)
        rows = []
        answer = np.zeros(n, dtype=int)
        for i, persona in enumerate(stated):
            said = [token for v in persona.values() for token in self.statements[v]]
            start = [self.ids[BOS], *said, *self.prompts[question[i]][reverse[i]]]
            answer[i] = len(start) - 1
            rows.append([*start, self.letters[drawn[i]], self.ids["."], self.ids[EOS]])
        tokens = self._pad(rows)
        return Batch(tokens, answer, target, np.full(tokens.shape, np.nan))

    def write_off_task(self, n: int, draws: np.random.Generator) -> Batch:
        """`n` documents of toy arithmetic and toy stories in equal shares."""
        texts = [OFF_TASK[i % len(OFF_TASK)](draws) for i in range(n)]
        rows = [[self.ids[BOS], *(self.ids[w] for w, _ in text), self.ids[EOS]] for text in texts]
        surprisal = np.array([[np.nan, np.nan, *(s for _, s in text[1:]), 0.0] for text in texts])
        target = np.zeros((n, len(LETTERS)))
        return Batch(self._pad(rows), np.full(n, -1), target, surprisal.reshape(n, -1))

    def write_mixed(
        self, n: int, draws: np.random.Generator, most_stated: int, off_task: float
    ) -> Batch:
        """`n` documents of which the share `off_task` is off-task text, in random order."""
        aside = round(n * off_task)
        asked = self.write_survey(n - aside, draws, most_stated)
        parts = [asked, self.write_off_task(aside, draws)]
        width = max(p.tokens.shape[1] for p in parts)
        order = draws.permutation(n)

        def join(name: str, fill: float) -> np.ndarray:
            arrays = (getattr(p, name) for p in parts)
            return np.concatenate(
                [np.pad(a, ((0, 0), (0, width - a.shape[1])), constant_values=fill) for a in arrays]
            )

        return Batch(
            join("tokens", self.ids[PAD])[order],
            np.concatenate([p.answer for p in parts])[order],
            np.concatenate([p.target for p in parts])[order],
            join("surprisal", np.nan)[order],
        )

    def _draw_stated(self, draws: np.random.Generator, most: int) -> dict[str, str]:
        attributes = draws.permutation(list(ATTRIBUTES))[: draws.integers(most + 1)]
        return {str(a): ATTRIBUTES[a][draws.integers(len(ATTRIBUTES[a]))] for a in attributes}

    def _exact_answers(self, stated: dict[str, str], question: int) -> np.ndarray:
        return (self.population.answers_given(stated) if stated else self.population.web)[question]

    def _pad(self, rows: Sequence[list[int]]) -> np.ndarray:
        width = max(map(len, rows), default=0)
        padded = [row + [self.ids[PAD]] * (width - len(row)) for row in rows]
        return np.array(padded).reshape(len(rows), width)
