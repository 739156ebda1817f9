"""Documents split into parts before they are cut into chunks, so that no chunk of a test document
is ever in the pool.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import LongTensor

from sae_research.errors import ResearchError
from sae_research.models import LanguageModel
from sae_research.prose import Corpus, Paragraph


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


class Files:
    """The files of a corpus in random order; each gives its chunks to one part alone."""

    def __init__(
        self,
        model: LanguageModel,
        corpus: Corpus,
        label: Callable[[Paragraph], str],
        rng: np.random.Generator,
    ):
        files: dict[str, list[Paragraph]] = {}
        for paragraph in corpus.paragraphs:
            files.setdefault(paragraph.file, []).append(paragraph)
        self.files = list(files.values())
        self.labels = np.array([label(paragraphs[0]) for paragraphs in self.files])
        """Label of each file; a chunk's `document` is the file's number."""
        self.model, self.rng = model, rng
        self.left = rng.permutation(len(self.files)).tolist()

    def take(
        self,
        n: int,
        labels: Sequence[str],
        splits: Sequence[str],
        *,
        length: int,
        most: int,
        least: int | None = None,
    ) -> Chunks:
        """`n` chunks of `length` tokens with BOS, at random, at most `most` of one file.

        A later split is read only where those before it have too few; `least` chunks will do.
        """
        rows, owners = [], []
        for i in [i for split in splits for i in self._waiting(labels, split)]:
            if len(owners) >= n:
                break
            self.left.remove(i)
            text = "\n\n".join(paragraph.text for paragraph in self.files[i])
            found = self.model.packed([text], length).cpu()
            rows.append(found[self.rng.permutation(len(found))[:most]])
            owners += [i] * len(rows[-1])
        if len(owners) < (least or n):
            raise ResearchError(
                f"the corpus gives {len(owners)} chunks of {', '.join(labels)} text in "
                f"{' and '.join(splits)}, and {least or n} are needed; ask for fewer or shorter "
                "ones."
            )
        order = self.rng.permutation(len(owners))[:n]
        tokens = torch.cat(rows)[torch.from_numpy(order)]
        texts = self.model.tokenizer.batch_decode(tokens[:, 1:], skip_special_tokens=True)
        return Chunks(tokens, texts, np.array(owners)[order])

    def _waiting(self, labels: Sequence[str], split: str) -> list[int]:
        return [
            i for i in self.left if self.labels[i] in labels and self.files[i][0].split == split
        ]
