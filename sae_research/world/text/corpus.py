"""What a document of the toy text model is: its kind, its odds, its tokens and their truth.

All documents have LENGTH tokens: the start token, then sentences of fixed length.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sae_research.world.text.grammar import Piece

LENGTH = 48
BOS_ID = 1
KINDS = ("article", "life", "senses", "chat", "story")
PER_TOKEN = ("concept_next", "topic_next", "sense", "request_topic_next", "action_next")
"""Truth per token, -1 for none: what the NEXT word is drawn from; for `sense`, the word's."""
PER_DOCUMENT = ("concept", "register", "synonym", "gender", "profession", "stated")
"""Truth per document, -1 for none: register 1 is "please explain", synonym 1 the second name."""
PER_TURN = ("topic", "action", "refused")
"""Truth per turn of a chat, [documents, 3]."""
BODY_OF_LIFE = slice(1, 39)
"""Tokens of a biography before the sentence that names the profession."""


@dataclass(frozen=True)
class Corpus:
    """The odds of the generators."""

    shares: tuple[float, ...] = (0.42, 0.22, 0.10, 0.13, 0.13)
    """Share of each kind of document: article, life, senses, chat, story."""
    physics: float = 0.06
    """Share of physics among all documents."""
    zipf: float = 0.9
    """Exponent of the physics concepts' frequencies."""
    explain: float = 0.2
    """Share of articles in the second register."""
    synonym: float = 0.4
    """Share of physics articles that use the synonym and the other half of the topic words."""
    stated: float = 0.5
    """Share of biographies that state the profession at once."""
    titled: float = 0.88
    """Share of biographies that open with a title, which tells the gender; where all do, a probe
    that goes by gender is never right about the exceptions.
    """
    pronoun: float = 0.5
    """Share of a biography's subjects that are pronouns; the third is if none was before."""
    cue: float = 0.7
    """Share of a biography's free objects that point to the profession."""
    contrary: float = 0.08
    """Share of cues to the other profession, so that gender is the easier thing to go by."""
    refusal: float = 0.25
    """Share of refusals where topic and action are both restricted; elsewhere none."""


@dataclass
class Texts:
    """Documents with their truth; every array has one row per document."""

    tokens: np.ndarray
    """Token ids, [n, LENGTH]; the first is the start token."""
    floor: np.ndarray
    """Log-probability of each token given all before it; 0 at the start token."""
    kind: np.ndarray
    """Index in KINDS."""
    token_truth: dict[str, np.ndarray]
    """PER_TOKEN labels, [n, LENGTH]."""
    truth: dict[str, np.ndarray]
    """PER_DOCUMENT labels, [n], and PER_TURN labels, [n, 3]."""

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: object) -> "Texts":
        return Texts(
            self.tokens[rows],
            self.floor[rows],
            self.kind[rows],
            {k: v[rows] for k, v in self.token_truth.items()},
            {k: v[rows] for k, v in self.truth.items()},
        )


def make_texts(
    kind: str,
    corpus: Corpus,
    piece: Piece,
    truth: Mapping = {},
    next_of: Mapping = {},
    here_of: Mapping = {},
) -> Texts:
    """A piece with its start token; `next_of` labels move back to where the word is predicted."""
    n = len(piece.tokens)
    start = np.zeros((n, 1))
    piece.floor[:, 0] += np.log(corpus.shares[KINDS.index(kind)])
    labels = {name: np.full((n, LENGTH), -1, np.int16) for name in PER_TOKEN}
    for name, values in next_of.items():
        labels[name][:, :-1] = values
    for name, values in here_of.items():
        labels[name][:, 1:] = values
    documents = {name: np.full(n, -1, np.int16) for name in PER_DOCUMENT}
    documents |= {name: np.full((n, 3), -1, np.int16) for name in PER_TURN}
    documents |= {name: np.asarray(value, np.int16) for name, value in truth.items()}
    tokens = np.concatenate([start + BOS_ID, piece.tokens], 1).astype(np.int32)
    floor = np.concatenate([start, piece.floor], 1).astype(np.float32)
    return Texts(tokens, floor, np.full(n, KINDS.index(kind)), labels, documents)
