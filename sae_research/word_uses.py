"""Words of real text that two libraries use in different senses, told apart by the library.

Who wrote a docstring of networkx had a graph of nodes and edges in mind, and one of torch a graph
of operations. The words were chosen by us, by how often the libraries use them, before any SAE had
read them; which sense an occurrence has, its file says. Only held-out files count.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import LongTensor, Tensor

from sae_research.prose import Corpus, Paragraph

if TYPE_CHECKING:
    from sae_research.models import LanguageModel

WORDS = {
    "basis": ("statsmodels", "sympy"),  # of splines or formulas; of ideals
    "degree": ("sympy", "networkx"),  # of a polynomial; of a node
    "element": ("sympy", "pandas"),  # of a group or field; of an array
    "expression": ("sympy", "nltk"),  # algebra; logic or a regular expression
    "graph": ("networkx", "torch"),  # nodes and edges; operations
    "group": ("pandas", "sympy"),  # rows that share a key; algebra
    "model": ("transformers", "statsmodels"),  # a network; a regression
    "node": ("networkx", "torch"),  # of a network; an operation
    "order": ("torch", "sympy"),  # a sequence; of a group or series
    "path": ("networkx", "nltk"),  # along edges; to a file
    "shape": ("scipy", "transformers"),  # of a distribution; of a tensor
    "state": ("torch", "transformers"),  # of modules and optimisers; hidden
    "tree": ("nltk", "networkx"),  # of a sentence; without cycles
    "window": ("scipy", "transformers"),  # on a signal; of attention
}
"""Words with the two libraries that use them most, each at least 20 times in held-out files."""
SPLITS = ("test", "fresh")
LEAST, MOST = 12, 40
"""Occurrences of each sense below which a word is left out, and above which no more are taken."""


@dataclass
class Uses:
    """Occurrences of words, each at the end of what stands before it."""

    tokens: LongTensor
    """Token ids [n, length], led by BOS and padded at the end."""
    place: LongTensor
    """Where the word's token stands [n]."""
    sense: LongTensor
    """Sense of each [n]."""
    half: Tensor
    """Whether its file is one on which latents are chosen [n]."""
    senses: list[str]
    """Senses as word/library; those of a word are neighbours."""


def find_uses(
    corpus: Corpus,
    model: "LanguageModel",
    words: Mapping[str, tuple[str, str]] | None = None,
    length: int = 48,
) -> Uses:
    """As many occurrences of both senses of each word (by default `WORDS`), one from a paragraph,
    files mixed.
    """
    paragraphs = [p for split in SPLITS for p in corpus.mixed(split)]
    files = {name: i for i, name in enumerate(dict.fromkeys(p.file for p in paragraphs))}
    rows, senses = [], []
    for word, libraries in (words or WORDS).items():
        found = [_before(word, paragraphs, library) for library in libraries]
        n = min(MOST, *map(len, found))
        if n < LEAST or len(model.tokenizer.tokenize(f" {word}")) != 1:
            continue
        for library, own in zip(libraries, found, strict=True):
            rows += [(text, len(senses), files[file] % 2 == 0) for text, file in own[:n]]
            senses.append(f"{word}/{library}")
    if not rows:
        nothing = torch.empty(0, dtype=torch.long)
        return Uses(nothing[:, None], nothing, nothing, nothing.bool(), [])
    ids = model.tokenizer([text for text, _, _ in rows], add_special_tokens=False)["input_ids"]
    ids = [[model.bos, *own[-(length - 1) :]] for own in ids]
    tokens = torch.full((len(ids), length), model.pad)
    for row, own in zip(tokens, ids, strict=True):
        row[: len(own)] = torch.tensor(own)
    place = torch.tensor([len(own) - 1 for own in ids], dtype=torch.long)
    sense = torch.tensor([sense for _, sense, _ in rows], dtype=torch.long)
    return Uses(tokens, place, sense, torch.tensor([half for _, _, half in rows]), senses)


def _before(word: str, paragraphs: list[Paragraph], library: str) -> list[tuple[str, str]]:
    """Up to a word's first occurrence in each paragraph of a library that has it, and the file."""
    pattern = re.compile(rf" {word}\b")
    own = ((p, pattern.search(p.text)) for p in paragraphs if p.library == library)
    return [(p.text[: hit.end()], p.file) for p, hit in own if hit]
