"""Vectorised filling of sentence frames: tokens, log-probabilities, and slots filled."""

from dataclasses import dataclass, field

import numpy as np

from sae_research.world.text.lexicon import Lexicon, lexicon

LITERAL = -1


@dataclass
class Piece:
    """The same stretch of text in many documents."""

    tokens: np.ndarray
    """Token ids, one row per document."""
    floor: np.ndarray
    """Log-probability of each token given all before it, under the generator."""
    slots: np.ndarray
    """Index in `Grammar.names` of the slot that each token fills, or LITERAL."""


@dataclass
class Grammar:
    """Slots (what they may hold, given a document's variable) and the frames that use them."""

    options: dict[str, tuple[str | None, np.ndarray]]
    """Slot: the variable that selects a row (None: the only row), and the token ids to draw."""
    lexicon: Lexicon = field(default_factory=lexicon)

    def __post_init__(self) -> None:
        self.names = list(self.options)
        self.log_share = {
            name: np.log((table[:, :, None] == table[:, None, :]).mean(-1))
            for name, (_, table) in self.options.items()
        }

    def slot(self, name: str) -> int:
        """Index of a slot in `Piece.slots`."""
        return self.names.index(name)

    def _code(self, word: str) -> int:
        return -1 - self.slot(word) if word.isupper() else self.lexicon.ids[word]

    def fill(
        self,
        rng: np.random.Generator,
        n: int,
        frames: tuple[str, ...],
        variables: dict[str, np.ndarray],
        odds: np.ndarray | None = None,
        alternatives: dict[str, tuple[str, np.ndarray]] | None = None,
    ) -> Piece:
        """Draw one frame per document (with probabilities `odds`) and fill its slots.

        `alternatives` replaces a slot by another one, with a probability for each document and
        occurrence in the frame.
        """
        table = np.array([[self._code(word) for word in frame.split()] for frame in frames])
        odds = np.full(len(frames), 1 / len(frames)) if odds is None else odds
        odds = np.broadcast_to(odds, (n, len(frames)))
        choice = (rng.random((n, 1)) >= odds.cumsum(1)[:, :-1]).sum(1)
        codes = table[choice]
        floor = np.zeros(codes.shape, np.float64)
        floor[:, 0] = np.log(odds[np.arange(n), choice])
        for name, (other, share) in (alternatives or {}).items():
            rows, columns = np.nonzero(codes == -1 - self.slot(name))
            nth = (codes == -1 - self.slot(name)).cumsum(1)[rows, columns] - 1
            shares = np.broadcast_to(share, (n, share.shape[-1]))
            p = shares[rows, np.minimum(nth, share.shape[-1] - 1)]
            taken = rng.random(len(rows)) < p
            codes[rows[taken], columns[taken]] = -1 - self.slot(other)
            floor[rows, columns] += np.log(np.where(taken, p, 1 - p))
        tokens = codes.copy()
        for index, name in enumerate(self.names):
            rows, columns = np.nonzero(codes == -1 - index)
            if len(rows):
                variable, options = self.options[name]
                row = 0 if variable is None else variables[variable][rows]
                pick = rng.integers(options.shape[1], size=len(rows))
                tokens[rows, columns] = options[row, pick]
                floor[rows, columns] += self.log_share[name][row, pick]
        return Piece(tokens, floor, np.where(codes < 0, -1 - codes, LITERAL))


def join(pieces: list[Piece]) -> Piece:
    """Pieces one after the other."""
    parts = [(p.tokens, p.floor, p.slots) for p in pieces]
    return Piece(*(np.concatenate(same, axis=1) for same in zip(*parts, strict=True)))


def reveal(piece: Piece, where: np.ndarray, log_probability: np.ndarray | float) -> None:
    """Charge a hidden variable's log-probability to the first position where it shows."""
    rows = np.flatnonzero(where.any(1))
    charge = np.broadcast_to(log_probability, (len(where),))
    piece.floor[rows, where[rows].argmax(1)] += charge[rows]
