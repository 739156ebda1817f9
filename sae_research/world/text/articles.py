"""Encyclopedia articles about concepts, and notes with words of several senses."""

from functools import cache

import numpy as np

from sae_research.world.text import frames
from sae_research.world.text.corpus import Corpus, Texts, make_texts
from sae_research.world.text.grammar import Grammar, join, reveal
from sae_research.world.text.lexicon import ENDINGS, FOUNDERS, PLACES, SENSES, TOPICS, lexicon


def _halves(words: str, split: bool) -> list[list[str]]:
    """Two vocabularies of a topic; those of physics differ: synonyms keep other company."""
    words = words.split()
    half = len(words) // 2
    return [words[:half] * 2, words[half:] * 2] if split else [words, words]


@cache
def _article_grammar() -> Grammar:
    lex = lexicon()
    shared = {
        slot: [row for topic in TOPICS for row in _halves(TOPICS[topic][i], topic == "physics")]
        for i, slot in enumerate(("NOUN", "VERB", "ADJECTIVE"), start=1)
    }
    return Grammar(
        {
            "NAME": ("name", lex.table([*lex.concepts, *lex.synonyms])),
            "PRIVATE": ("concept", lex.table([[c + e for e in ENDINGS] for c in lex.concepts])),
            **{slot: ("vocabulary", lex.table(rows)) for slot, rows in shared.items()},
            "FOUNDER": ("founder", lex.table(FOUNDERS.split())),
            "PLACE": ("place", lex.table(PLACES.split())),
        }
    )


def compute_concept_odds(corpus: Corpus) -> np.ndarray:
    """Probability of each concept in an article."""
    lex = lexicon()
    odds = np.where(lex.topic_of == 0, 0.0, 1.0)
    physics = corpus.physics / corpus.shares[0]
    odds *= (1 - physics) / odds.sum()
    zipf = np.arange(1, len(lex.physics) + 1) ** -corpus.zipf
    odds[lex.physics] = physics * zipf / zipf.sum()
    return odds


def make_articles(
    n: int, rng: np.random.Generator, corpus: Corpus, concepts: np.ndarray | None = None
) -> Texts:
    """Articles about one concept each (drawn, or given): name, topic and private words, facts."""
    lex = lexicon()
    grammar = _article_grammar()
    odds = compute_concept_odds(corpus)
    concept = rng.choice(len(odds), size=n, p=odds) if concepts is None else np.asarray(concepts)
    topic = lex.topic_of[concept]
    synonym = ((topic == 0) & (rng.random(n) < corpus.synonym)).astype(int)
    variables = {
        "concept": concept,
        "name": np.where(synonym, len(odds) + np.searchsorted(lex.physics, concept), concept),
        "vocabulary": 2 * topic + synonym,
        "founder": lex.founder_of[concept],
        "place": lex.place_of[concept],
    }
    openings = frames.ARTICLE_OPENING + frames.EXPLAIN_OPENING
    explain = np.array([1 - corpus.explain, corpus.explain])
    opening = grammar.fill(rng, n, openings, variables, explain)
    register = (opening.tokens[:, 0] == lex.ids["please"]).astype(int)
    bodies = frames.ARTICLE_BODY + frames.EXPLAIN_BODY + frames.ARTICLE_FACT
    of_register = np.array([[1 / 4] * 4 + [0] * 3, [0] * 4 + [1 / 3] * 3])[register]
    pieces = [opening]
    told = np.zeros(n, bool)
    for left in (4, 3, 2, 1):
        due = np.where(told, 0.0, 1 / left)[:, None]
        odds_of_body = np.hstack([of_register * (1 - due), due])
        pieces.append(grammar.fill(rng, n, bodies, variables, odds_of_body))
        told |= (pieces[-1].slots == grammar.slot("FOUNDER")).any(1)
    piece = join(pieces)
    share = np.where(synonym, corpus.synonym, 1 - corpus.synonym)
    named = np.log(odds[concept]) + np.where(topic == 0, np.log(share), 0.0)
    reveal(piece, piece.slots == grammar.slot("NAME"), named)
    private = piece.slots == grammar.slot("PRIVATE")
    shared = np.isin(piece.slots, [grammar.slot(s) for s in ("NOUN", "VERB", "ADJECTIVE")])
    next_of = {
        "concept_next": np.where(private, concept[:, None], -1),
        "topic_next": np.where(shared, topic[:, None], -1),
    }
    truth = {"concept": concept, "register": register, "synonym": synonym}
    return make_texts("article", corpus, piece, truth, next_of)


@cache
def _sense_grammar() -> Grammar:
    lex = lexicon()
    company = [words for senses in SENSES.values() for words in senses.values()]
    slots = {"COMPANY": company, "POLYSEMOUS": lex.sense_word}
    return Grammar({slot: ("sense", lex.table(rows)) for slot, rows in slots.items()})


def make_notes(n: int, rng: np.random.Generator, corpus: Corpus) -> Texts:
    """Notes of five sentences, each with a polysemous word whose sense its company tells."""
    lex = lexicon()
    grammar = _sense_grammar()
    pieces, labels = [grammar.fill(rng, n, frames.SENSE_OPENING, {})], []
    for _ in range(5):
        sense = rng.integers(len(lex.senses), size=n)
        piece = grammar.fill(rng, n, frames.SENSE_BODY, {"sense": sense})
        reveal(piece, piece.slots == grammar.slot("COMPANY"), -np.log(len(lex.senses)))
        labels.append(np.where(piece.slots == grammar.slot("POLYSEMOUS"), sense[:, None], -1))
        pieces.append(piece)
    here = {"sense": np.concatenate([np.full((n, 2), -1), *labels], axis=1)}
    return make_texts("senses", corpus, join(pieces), here_of=here)
