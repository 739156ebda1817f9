"""Documents split into parts before they are cut into chunks, so that no chunk of a test document
is ever in the pool.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import LongTensor

from sae_research.errors import ResearchError


@dataclass
class Chunks:
    """Chunks of text with the documents that they come from."""

    tokens: LongTensor
    """Token ids [chunks, length], each row led by the start token."""
    texts: list[str]
    """The same as text, for selectors that read words."""
    document: np.ndarray
    """Number of each chunk's document."""

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, rows: np.ndarray) -> "Chunks":
        rows = np.arange(len(self))[rows]
        texts = [self.texts[i] for i in rows]
        return Chunks(self.tokens[torch.from_numpy(rows)], texts, self.document[rows])


def split_documents(
    documents: Sequence[int], shares: dict[str, float], seed: int
) -> dict[str, np.ndarray]:
    """A boolean mask over chunks for each part; all chunks of one document fall into one part."""
    documents = np.asarray(documents)
    if abs(sum(shares.values()) - 1) > 1e-9:
        raise ResearchError(f"the shares of the parts sum to {sum(shares.values())}; make it 1.")
    names = np.unique(documents)
    order = np.random.default_rng(seed).permutation(names)
    ends = np.rint(np.cumsum(list(shares.values())) * len(order)).astype(int)
    starts = [0, *ends[:-1]]
    return {
        part: np.isin(documents, order[a:b])
        for part, a, b in zip(shares, starts, ends, strict=True)
    }


def exclude_test(pool: Chunks, *tests: Chunks) -> Chunks:
    """The pool without chunks of test documents and without exact copies of test chunks."""
    documents = np.concatenate([test.document for test in tests])
    copies = {text for test in tests for text in test.texts}
    kept = ~np.isin(pool.document, documents)
    kept &= np.array([text not in copies for text in pool.texts], dtype=bool)
    if not kept.any():
        raise ResearchError(
            "the retrieval pool is empty once test documents are left out; give other documents."
        )
    return pool[np.flatnonzero(kept)]


def check_seeds(seeds: Chunks, *tests: Chunks) -> Chunks:
    """The seed chunks, if none of their documents is a test document."""
    shared = set(seeds.document) & {d for test in tests for d in test.document}
    if shared:
        raise ResearchError(
            f"{len(shared)} seed document(s) are in the test split, such as {min(shared)}; "
            "seeds and tests need different documents."
        )
    return seeds
