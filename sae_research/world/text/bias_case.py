"""The biographies of the bias case study: an ambiguous training set, in which gender gives the
profession away, and balanced sets.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import LongTensor

from sae_research.world.text import documents, lexicon
from sae_research.world.text.corpus import BODY_OF_LIFE, Corpus


@dataclass
class Biographies:
    """Biographies with their labels; profession 0 is professor, gender 0 male."""

    tokens: LongTensor
    """Token ids [n, length], led by the start token, up to where the text names the profession."""
    gender: LongTensor
    profession: LongTensor

    def __getitem__(self, rows: object) -> "Biographies":
        return Biographies(self.tokens[rows], self.gender[rows], self.profession[rows])

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass
class BiasData:
    """All texts of the case study."""

    ambiguous: Biographies
    balanced: Biographies
    test: Biographies
    gender_words: frozenset[int]
    """Token types that tell a gender."""
    keywords: LongTensor
    """Token types of the concept bottleneck: words of both professions."""


def make_biographies(n: int, n_test: int, seed: int) -> BiasData:
    """`n` biographies of each kind to train on and `n_test` to test on; no text states the
    profession at once.
    """
    corpus = documents.without_stated(Corpus())
    rng = np.random.default_rng([seed, 31])
    ids = lexicon.lexicon().ids

    def draw(cells: list[tuple[int, int]], count: int) -> Biographies:
        rows = rng.permutation(np.arange(count) % len(cells))
        gender, profession = np.array(cells)[rows].T
        made = documents.make_documents(
            "life", count, rng, corpus, gender=gender, profession=profession
        )
        tokens = torch.from_numpy(made.tokens[:, : BODY_OF_LIFE.stop]).long()
        return Biographies(tokens, torch.from_numpy(gender), torch.from_numpy(profession))

    every = [(g, p) for g in (0, 1) for p in (0, 1)]
    words = [word for cues in lexicon.PROFESSIONS.values() for word in cues.split()[:10]]
    return BiasData(
        draw([(0, 0), (1, 1)], n),
        draw(every, n),
        draw(every, n_test),
        frozenset(ids[word] for pair in lexicon.GENDERS.values() for word in pair),
        torch.tensor([ids[word] for word in words]),
    )
