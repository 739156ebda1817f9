"""Documents of the toy text model, of one kind or mixed, whole or cut and packed."""

from dataclasses import replace

import numpy as np

from sae_research.world.text.articles import compute_concept_odds, make_articles, make_notes
from sae_research.world.text.corpus import KINDS, LENGTH, Corpus, Texts
from sae_research.world.text.lexicon import lexicon
from sae_research.world.text.people import make_biographies, make_chats, make_stories

_GENERATORS = {
    "article": make_articles,
    "life": make_biographies,
    "senses": make_notes,
    "chat": make_chats,
    "story": make_stories,
}


def make_documents(
    kind: str, n: int, seed: int | np.random.Generator, corpus: Corpus | None = None, **given
) -> Texts:
    """`n` documents of one kind; `given` fixes `concepts`, or `gender` and `profession`."""
    return _GENERATORS[kind](n, np.random.default_rng(seed), corpus or Corpus(), **given)


def without_stated(corpus: Corpus) -> Corpus:
    """The same odds, but no biography states its profession: the texts of a study of bias."""
    return replace(corpus, stated=0.0)


def make_mixture(n: int, seed: int | np.random.Generator, corpus: Corpus | None = None) -> Texts:
    """`n` documents of all kinds in random order, in the corpus's shares."""
    rng = np.random.default_rng(seed)
    corpus = corpus or Corpus()
    counts = rng.multinomial(n, corpus.shares)
    parts = [_GENERATORS[k](count, rng, corpus) for k, count in zip(KINDS, counts, strict=True)]
    return stack(parts)[rng.permutation(n)]


def make_physics(n: int, seed: int | np.random.Generator, corpus: Corpus | None = None) -> Texts:
    """`n` articles of the rare domain only, with its own concept frequencies."""
    rng = np.random.default_rng(seed)
    corpus = corpus or Corpus()
    lex = lexicon()
    odds = compute_concept_odds(corpus)[lex.physics]
    return make_articles(n, rng, corpus, rng.choice(lex.physics, size=n, p=odds / odds.sum()))


def stack(parts: list[Texts]) -> Texts:
    """Several sets of documents as one."""
    cat = np.concatenate
    return Texts(
        *(cat([getattr(p, name) for p in parts]) for name in ("tokens", "floor", "kind")),
        *(
            {k: cat([getattr(p, name)[k] for p in parts]) for k in getattr(parts[0], name)}
            for name in ("token_truth", "truth")
        ),
    )


def pack(first: Texts, second: Texts, seed: int | np.random.Generator) -> Texts:
    """Rows as a corpus reader meets them: half are cut anywhere and followed by another document.

    Only the per-token arrays describe such a row; `kind` and `truth` are those of its start.
    """
    rng = np.random.default_rng(seed)
    n = len(first)
    cut = np.where(rng.random(n) < 0.5, LENGTH, rng.integers(12, LENGTH, size=n))[:, None]
    position = np.arange(LENGTH)[None]
    later = np.maximum(position - cut, 0)

    def pick(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.where(position < cut, a, np.take_along_axis(b, later, axis=1))

    token_truth = {k: pick(v, second.token_truth[k]) for k, v in first.token_truth.items()}
    tokens, floor = pick(first.tokens, second.tokens), pick(first.floor, second.floor)
    return replace(first, tokens=tokens, floor=floor, token_truth=token_truth)


def make_rows(n: int, seed: int | np.random.Generator, corpus: Corpus | None = None) -> Texts:
    """`n` packed rows of the mixture: what the model and its SAEs are trained on."""
    rng = np.random.default_rng(seed)
    return pack(make_mixture(n, rng, corpus), make_mixture(n, rng, corpus), rng)
