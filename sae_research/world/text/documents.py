"""The five kinds of documents, each with its truth and with the exact log-probability of every token.

All documents have LENGTH tokens: the start token, then sentences of fixed length. Truth is given per token (what the
next word depends on, the sense of a word) and per document (who or what it is about).
"""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from sae_research.world.text import frames
from sae_research.world.text.grammar import Grammar, Piece, joined, reveal
from sae_research.world.text.lexicon import (
    ACTION_ENDINGS,
    CITIES,
    DEEDS,
    DOINGS,
    ENDINGS,
    FOUNDERS,
    GENDERS,
    HEROES,
    MONTHS,
    MOODS,
    OBJECTS,
    PETS,
    PLACES,
    PROFESSIONS,
    ROLES,
    SENSES,
    SURNAMES,
    THINGS,
    TOPIC_ENDINGS,
    TOPICS,
    lexicon,
)

LENGTH = 48
BOS_ID = 1
KINDS = ("article", "life", "senses", "chat", "story")
PER_TOKEN = ("concept_next", "topic_next", "sense", "request_topic_next", "action_next")
"""Truth per token, -1 where there is none: the concept (topic, ...) that the NEXT word is drawn from, the sense."""
PER_DOCUMENT = ("concept", "register", "synonym", "gender", "profession", "stated")
"""Truth per document, -1 where there is none: register 1 is "please explain", synonym 1 the second name of physics."""
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
    """Share of biographies that open with a title, which gives the gender away at once; where all do, a probe that goes
    by gender is never right about the exceptions."""
    pronoun: float = 0.5
    """Share of a biography's subjects that are pronouns instead of the surname; the third is one if none was before."""
    cue: float = 0.7
    """Share of a biography's free objects that point to the profession."""
    contrary: float = 0.08
    """Share of those cues that belong to the other profession, so that gender is the easier thing to go by."""
    refusal: float = 0.25
    """Share of refusals where topic and action are both restricted; elsewhere none."""


@dataclass
class Texts:
    """Documents with their truth; every array has one row a document."""

    tokens: np.ndarray
    """Token ids, [n, LENGTH]; the first is the start token."""
    floor: np.ndarray
    """Log-probability of each token given all before it, under the generator; 0 at the start token."""
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


def _texts(
    kind: str, corpus: Corpus, piece: Piece, next_of: dict, here_of: dict, truth: dict
) -> Texts:
    """A piece with its start token; `next_of` labels move one position back, to where the word is predicted."""
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


def _halves(words: str, split: bool) -> list[list[str]]:
    """Both vocabularies of a topic: its words twice, or (physics) a half each, so that synonyms keep other company."""
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


def concept_odds(corpus: Corpus) -> np.ndarray:
    """Probability of each concept in an article."""
    lex = lexicon()
    odds = np.where(lex.topic_of == 0, 0.0, 1.0)
    physics = corpus.physics / corpus.shares[0]
    odds *= (1 - physics) / odds.sum()
    zipf = np.arange(1, len(lex.physics) + 1) ** -corpus.zipf
    odds[lex.physics] = physics * zipf / zipf.sum()
    return odds


def articles(
    n: int, rng: np.random.Generator, corpus: Corpus, concepts: np.ndarray | None = None
) -> Texts:
    """Encyclopedia articles, one concept each (drawn, or given): name, topic words, private words, two facts."""
    lex, grammar = lexicon(), _article_grammar()
    odds = concept_odds(corpus)
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
    opening = grammar.fill(
        rng, n, openings, variables, np.array([1 - corpus.explain, corpus.explain])
    )
    register = (opening.tokens[:, 0] == lex.ids["please"]).astype(int)
    bodies = frames.ARTICLE_BODY + frames.EXPLAIN_BODY + frames.ARTICLE_FACT
    of_register = np.array([[1 / 4] * 4 + [0] * 3, [0] * 4 + [1 / 3] * 3])[register]
    pieces, told = [opening], np.zeros(n, bool)
    for left in (4, 3, 2, 1):
        due = np.where(told, 0.0, 1 / left)[:, None]
        pieces.append(
            grammar.fill(rng, n, bodies, variables, np.hstack([of_register * (1 - due), due]))
        )
        told |= (pieces[-1].slots == grammar.slot("FOUNDER")).any(1)
    piece = joined(pieces)
    share = np.where(synonym, corpus.synonym, 1 - corpus.synonym)
    named = np.log(odds[concept]) + np.where(topic == 0, np.log(share), 0.0)
    reveal(piece, piece.slots == grammar.slot("NAME"), named)
    private = piece.slots == grammar.slot("PRIVATE")
    shared = np.isin(piece.slots, [grammar.slot(s) for s in ("NOUN", "VERB", "ADJECTIVE")])
    next_of = {
        "concept_next": np.where(private, concept[:, None], -1),
        "topic_next": np.where(shared, topic[:, None], -1),
    }
    return _texts(
        "article",
        corpus,
        piece,
        next_of,
        {},
        {"concept": concept, "register": register, "synonym": synonym},
    )


def _charge_later(piece: Piece, at: int) -> None:
    """Move the frame's log-probability to the word that tells the frames apart, when they begin with the same words.

    The words before it must be free of choice under every frame, or charged by `reveal`.
    """
    shared = piece.floor[:, 0].copy()
    piece.floor[:, 0] = 0.0
    piece.floor[:, at] += shared


@cache
def _life_grammar() -> Grammar:
    lex = lexicon()
    return Grammar(
        {
            "SURNAME": ("surname", lex.table(SURNAMES.split())),
            "SUBJECT": ("surname", lex.table(SURNAMES.split())),
            "TITLE": ("gender", lex.table([title for title, _ in GENDERS.values()])),
            "PRONOUN": ("gender", lex.table([pronoun for _, pronoun in GENDERS.values()])),
            "CITY": (None, lex.table([CITIES.split()])),
            "MONTH": (None, lex.table([MONTHS.split()])),
            "DEED": (None, lex.table([DEEDS.split()])),
            "THING": (None, lex.table([THINGS.split()])),
            "CUE": ("profession", lex.table([cues.split() for cues in PROFESSIONS.values()])),
            "CONTRARY": ("other", lex.table([cues.split() for cues in PROFESSIONS.values()])),
            "PROFESSION": ("profession", lex.table(list(PROFESSIONS))),
        }
    )


def lives(n: int, rng: np.random.Generator, corpus: Corpus, gender=None, profession=None) -> Texts:
    """Biographies with independent gender and profession (drawn, or given): two or more cues to the latter."""
    grammar = _life_grammar()
    gender = rng.integers(2, size=n) if gender is None else np.asarray(gender)
    profession = rng.integers(2, size=n) if profession is None else np.asarray(profession)
    variables = {"gender": gender, "profession": profession, "surname": rng.integers(16, size=n)}
    variables["other"] = 1 - profession
    contrary = ("CONTRARY", np.array([corpus.contrary]))
    odds = np.outer(
        [1 - corpus.titled, corpus.titled], [1 - corpus.stated, corpus.stated]
    ).flatten()
    opening = grammar.fill(rng, n, frames.LIFE_OPENING, variables, odds)
    titled, stated = (
        (opening.slots == grammar.slot(s)).any(1).astype(int) for s in ("TITLE", "PROFESSION")
    )
    # The title shows at once, the stated profession only in the word after the surname.
    opening.floor[:, 0] += np.log(np.where(titled, corpus.titled, 1 - corpus.titled)) - np.log(
        odds[2 * titled + stated]
    )
    opening.floor[np.arange(n), 1 + titled] += np.log(
        np.where(stated, corpus.stated, 1 - corpus.stated)
    )
    pieces, shown = [opening], np.zeros(n, bool)
    for sentence in range(3):
        cue = ("CUE", np.array([corpus.cue, corpus.cue if sentence == 1 else 1.0]))
        pronoun = ("PRONOUN", np.where((sentence == 2) & ~shown, 1.0, corpus.pronoun)[:, None])
        swaps = {"SUBJECT": pronoun, "THING": cue, "CUE": contrary}
        pieces.append(grammar.fill(rng, n, frames.LIFE_BODY, variables, None, swaps))
        shown |= (pieces[-1].slots == grammar.slot("PRONOUN")).any(1)
    pieces.append(grammar.fill(rng, n, frames.LIFE_CLOSING, variables))
    piece = joined(pieces)
    reveal(
        piece, np.isin(piece.slots, [grammar.slot("TITLE"), grammar.slot("PRONOUN")]), np.log(1 / 2)
    )
    reveal(piece, piece.slots == grammar.slot("SURNAME"), np.log(1 / 16))
    _charge_profession(piece, grammar, corpus, stated == 1)
    return _texts(
        "life",
        corpus,
        piece,
        {},
        {},
        {"gender": gender, "profession": profession, "stated": stated},
    )


def _charge_profession(piece: Piece, grammar: Grammar, corpus: Corpus, stated: np.ndarray) -> None:
    """Charge what each cue tells of a profession that was not stated, by Bayes' rule over the two professions."""
    own, contrary, named = (
        piece.slots == grammar.slot(s) for s in ("CUE", "CONTRARY", "PROFESSION")
    )
    reveal(piece, named & stated[:, None], np.log(1 / 2))
    true = np.where(own, 1 - corpus.contrary, np.where(contrary, corpus.contrary, 1.0))
    false = np.where(own, corpus.contrary, np.where(contrary, 1 - corpus.contrary, 1.0))
    so_far, otherwise = true.cumprod(1), false.cumprod(1)
    marginal = (so_far + otherwise) / 2
    before = np.hstack([np.ones((len(marginal), 1)), marginal[:, :-1]])
    told = (
        np.log(marginal / before)
        - np.log(true)
        + np.where(named, np.log(so_far / (so_far + otherwise)), 0.0)
    )
    piece.floor += np.where(stated[:, None], 0.0, told)


@cache
def _sense_grammar() -> Grammar:
    lex = lexicon()
    company = [words for senses in SENSES.values() for words in senses.values()]
    return Grammar(
        {
            "COMPANY": ("sense", lex.table(company)),
            "POLYSEMOUS": ("sense", lex.table(lex.sense_word)),
        }
    )


def senses(n: int, rng: np.random.Generator, corpus: Corpus) -> Texts:
    """Notes of five sentences, each with one polysemous word in a sense that only its company tells."""
    lex, grammar = lexicon(), _sense_grammar()
    pieces, labels = [grammar.fill(rng, n, frames.SENSE_OPENING, {})], []
    for _ in range(5):
        sense = rng.integers(len(lex.senses), size=n)
        piece = grammar.fill(rng, n, frames.SENSE_BODY, {"sense": sense})
        reveal(piece, piece.slots == grammar.slot("COMPANY"), -np.log(len(lex.senses)))
        labels.append(np.where(piece.slots == grammar.slot("POLYSEMOUS"), sense[:, None], -1))
        pieces.append(piece)
    here = {"sense": np.concatenate([np.full((n, 2), -1), *labels], axis=1)}
    return _texts("senses", corpus, joined(pieces), {}, here, {})


@cache
def _chat_grammar() -> Grammar:
    lex = lexicon()
    return Grammar(
        {
            "ACTION": ("action", lex.table(lex.actions)),
            "TOPIC": ("topic", lex.table(lex.request_topics)),
            "DO": ("action", lex.table([[a + e for e in ACTION_ENDINGS] for a in lex.actions])),
            "FROM": (
                "topic",
                lex.table([[t + e for e in TOPIC_ENDINGS] for t in lex.request_topics]),
            ),
        }
    )


def chats(n: int, rng: np.random.Generator, corpus: Corpus) -> Texts:
    """Chats of three requests (action and topic), each answered; refusals only where both are restricted."""
    lex, grammar = lexicon(), _chat_grammar()
    pieces, turns = [grammar.fill(rng, n, frames.CHAT_OPENING, {})], []
    for _ in range(3):
        topic, action = (
            rng.integers(len(lex.request_topics), size=n),
            rng.integers(len(lex.actions), size=n),
        )
        variables = {"topic": topic, "action": action}
        harmful = (topic < lex.n_restricted_topics) & (action < lex.n_restricted_actions)
        refusing = np.where(harmful, corpus.refusal, 0.0)
        request = grammar.fill(rng, n, frames.CHAT_REQUEST, variables)
        reveal(request, request.slots == grammar.slot("ACTION"), -np.log(len(lex.actions)))
        reveal(request, request.slots == grammar.slot("TOPIC"), -np.log(len(lex.request_topics)))
        reply = grammar.fill(
            rng, n, frames.CHAT_REPLY, variables, np.stack([1 - refusing, refusing], axis=1)
        )
        _charge_later(reply, 1)
        refused = reply.tokens[:, 1] == lex.ids["sorry"]
        pieces += [request, reply]
        turns.append((topic, action, refused))
    piece = joined(pieces)
    topic, action, refused = (np.stack(values, axis=1) for values in zip(*turns, strict=True))
    turn = np.r_[0, 0, np.repeat([0, 1, 2], 15)]
    next_of = {
        "request_topic_next": np.where(piece.slots == grammar.slot("FROM"), topic[:, turn], -1),
        "action_next": np.where(piece.slots == grammar.slot("DO"), action[:, turn], -1),
    }
    return _texts(
        "chat", corpus, piece, next_of, {}, {"topic": topic, "action": action, "refused": refused}
    )


@cache
def _story_grammar() -> Grammar:
    lex = lexicon()
    told = {"ROLE": ("role", ROLES), "HERO": ("hero", HEROES), "PET": ("pet", PETS)}
    free = {"DOING": DOINGS, "OBJECT": OBJECTS, "MOOD": MOODS}
    return Grammar(
        {slot: (variable, lex.table(words.split())) for slot, (variable, words) in told.items()}
        | {slot: (None, lex.table([words.split()])) for slot, words in free.items()}
    )


def stories(n: int, rng: np.random.Generator, corpus: Corpus) -> Texts:
    """Plain stories about a hero, a role and a pet: neutral ground for side effects."""
    grammar = _story_grammar()
    variables = {v: rng.integers(len(table), size=n) for v, table in grammar.options.values() if v}
    pieces = [grammar.fill(rng, n, frames.STORY_OPENING, variables)]
    pieces += [grammar.fill(rng, n, frames.STORY_BODY, variables) for _ in range(4)]
    piece = joined(pieces)
    for name, (variable, table) in grammar.options.items():
        if variable:
            reveal(piece, piece.slots == grammar.slot(name), -np.log(len(table)))
    return _texts("story", corpus, piece, {}, {}, {})


_GENERATORS = {
    "article": articles,
    "life": lives,
    "senses": senses,
    "chat": chats,
    "story": stories,
}


def documents(
    kind: str, n: int, seed: int | np.random.Generator, corpus: Corpus | None = None, **given
) -> Texts:
    """`n` documents of one kind; `given` fixes truths (articles: `concepts`; lives: `gender`, `profession`)."""
    return _GENERATORS[kind](n, np.random.default_rng(seed), corpus or Corpus(), **given)


def unstated(corpus: Corpus) -> Corpus:
    """The same odds, but no biography states its profession: the texts of a study of bias."""
    return replace(corpus, stated=0.0)


def mixture(n: int, seed: int | np.random.Generator, corpus: Corpus | None = None) -> Texts:
    """`n` documents of all kinds in random order, in the corpus's shares."""
    rng, corpus = np.random.default_rng(seed), corpus or Corpus()
    counts = rng.multinomial(n, corpus.shares)
    parts = [
        _GENERATORS[kind](count, rng, corpus) for kind, count in zip(KINDS, counts, strict=True)
    ]
    return stacked(parts)[rng.permutation(n)]


def physics(n: int, seed: int | np.random.Generator, corpus: Corpus | None = None) -> Texts:
    """`n` articles of the rare domain only, with its own concept frequencies."""
    rng, corpus, lex = np.random.default_rng(seed), corpus or Corpus(), lexicon()
    odds = concept_odds(corpus)[lex.physics]
    return articles(n, rng, corpus, rng.choice(lex.physics, size=n, p=odds / odds.sum()))


def stacked(parts: list[Texts]) -> Texts:
    """Several sets of documents as one."""
    cat = np.concatenate
    return Texts(
        *(cat([getattr(p, name) for p in parts]) for name in ("tokens", "floor", "kind")),
        *(
            {k: cat([getattr(p, name)[k] for p in parts]) for k in getattr(parts[0], name)}
            for name in ("token_truth", "truth")
        ),
    )


def packed(first: Texts, second: Texts, seed: int | np.random.Generator) -> Texts:
    """Rows as a corpus reader meets them: half are whole documents, half are cut anywhere and followed by another one.

    Only the per-token arrays describe such a row; `kind` and `truth` are those of its first document.
    """
    rng = np.random.default_rng(seed)
    n = len(first)
    cut = np.where(rng.random(n) < 0.5, LENGTH, rng.integers(12, LENGTH, size=n))[:, None]
    position = np.arange(LENGTH)[None]
    later = np.maximum(position - cut, 0)

    def pick(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.where(position < cut, a, np.take_along_axis(b, later, axis=1))

    token_truth = {k: pick(v, second.token_truth[k]) for k, v in first.token_truth.items()}
    return Texts(
        pick(first.tokens, second.tokens),
        pick(first.floor, second.floor),
        first.kind,
        token_truth,
        first.truth,
    )


def rows(n: int, seed: int | np.random.Generator, corpus: Corpus | None = None) -> Texts:
    """`n` packed rows of the mixture: what the model and its SAEs are trained on."""
    rng = np.random.default_rng(seed)
    return packed(mixture(n, rng, corpus), mixture(n, rng, corpus), rng)
