"""Biographies with gender and profession, chats with refusals, and plain stories."""

from functools import cache

import numpy as np

from sae_research.world.text import frames
from sae_research.world.text import lexicon as words
from sae_research.world.text.corpus import Corpus, Texts, make_texts
from sae_research.world.text.grammar import Grammar, Piece, join, reveal


@cache
def _life_grammar() -> Grammar:
    lex = words.lexicon()
    return Grammar(
        {
            "SURNAME": ("surname", lex.table(words.SURNAMES.split())),
            "SUBJECT": ("surname", lex.table(words.SURNAMES.split())),
            "TITLE": ("gender", lex.table([title for title, _ in words.GENDERS.values()])),
            "PRONOUN": ("gender", lex.table([pronoun for _, pronoun in words.GENDERS.values()])),
            "CITY": (None, lex.table([words.CITIES.split()])),
            "MONTH": (None, lex.table([words.MONTHS.split()])),
            "DEED": (None, lex.table([words.DEEDS.split()])),
            "THING": (None, lex.table([words.THINGS.split()])),
            "CUE": ("profession", lex.table([cues.split() for cues in words.PROFESSIONS.values()])),
            "CONTRARY": ("other", lex.table([cues.split() for cues in words.PROFESSIONS.values()])),
            "PROFESSION": ("profession", lex.table(list(words.PROFESSIONS))),
        }
    )


def make_biographies(
    n: int, rng: np.random.Generator, corpus: Corpus, gender=None, profession=None
) -> Texts:
    """Biographies with independent gender and profession (drawn, or given)."""
    grammar = _life_grammar()
    gender = rng.integers(2, size=n) if gender is None else np.asarray(gender)
    profession = rng.integers(2, size=n) if profession is None else np.asarray(profession)
    variables = {"gender": gender, "profession": profession, "surname": rng.integers(16, size=n)}
    variables["other"] = 1 - profession
    contrary = ("CONTRARY", np.array([corpus.contrary]))
    shares = [[1 - share, share] for share in (corpus.titled, corpus.stated)]
    odds = np.outer(*shares).flatten()
    opening = grammar.fill(rng, n, frames.LIFE_OPENING, variables, odds)
    titled, stated = (
        (opening.slots == grammar.slot(s)).any(1).astype(int) for s in ("TITLE", "PROFESSION")
    )
    # The title shows at once, the stated profession only in the word after the surname.
    of_title, of_statement = np.array(shares)
    opening.floor[:, 0] += np.log(of_title[titled]) - np.log(odds[2 * titled + stated])
    opening.floor[np.arange(n), 1 + titled] += np.log(of_statement[stated])
    pieces = [opening]
    shown = np.zeros(n, bool)
    for sentence in range(3):
        cue = ("CUE", np.array([corpus.cue, corpus.cue if sentence == 1 else 1.0]))
        pronoun = ("PRONOUN", np.where((sentence == 2) & ~shown, 1.0, corpus.pronoun)[:, None])
        swaps = {"SUBJECT": pronoun, "THING": cue, "CUE": contrary}
        pieces.append(grammar.fill(rng, n, frames.LIFE_BODY, variables, None, swaps))
        shown |= (pieces[-1].slots == grammar.slot("PRONOUN")).any(1)
    pieces.append(grammar.fill(rng, n, frames.LIFE_CLOSING, variables))
    piece = join(pieces)
    gendered = [grammar.slot("TITLE"), grammar.slot("PRONOUN")]
    reveal(piece, np.isin(piece.slots, gendered), np.log(1 / 2))
    reveal(piece, piece.slots == grammar.slot("SURNAME"), np.log(1 / 16))
    _charge_profession(piece, grammar, corpus, stated == 1)
    truth = {"gender": gender, "profession": profession, "stated": stated}
    return make_texts("life", corpus, piece, truth)


def _charge_profession(piece: Piece, grammar: Grammar, corpus: Corpus, stated: np.ndarray) -> None:
    """Charge what each cue reveals of an unstated profession, by Bayes' rule over the two."""
    own, contrary, named = (
        piece.slots == grammar.slot(s) for s in ("CUE", "CONTRARY", "PROFESSION")
    )
    reveal(piece, named & stated[:, None], np.log(1 / 2))
    true = np.where(own, 1 - corpus.contrary, np.where(contrary, corpus.contrary, 1.0))
    false = np.where(own, corpus.contrary, np.where(contrary, 1 - corpus.contrary, 1.0))
    so_far = true.cumprod(1)
    otherwise = false.cumprod(1)
    marginal = (so_far + otherwise) / 2
    before = np.hstack([np.ones((len(marginal), 1)), marginal[:, :-1]])
    last = np.where(named, np.log(so_far / (so_far + otherwise)), 0.0)
    told = np.log(marginal / before) - np.log(true) + last
    piece.floor += np.where(stated[:, None], 0.0, told)


@cache
def _chat_grammar() -> Grammar:
    lex = words.lexicon()
    about = [[topic + end for end in words.TOPIC_ENDINGS] for topic in lex.request_topics]
    doing = [[action + end for end in words.ACTION_ENDINGS] for action in lex.actions]
    return Grammar(
        {
            "ACTION": ("action", lex.table(lex.actions)),
            "TOPIC": ("topic", lex.table(lex.request_topics)),
            "DO": ("action", lex.table(doing)),
            "FROM": ("topic", lex.table(about)),
        }
    )


def make_chats(n: int, rng: np.random.Generator, corpus: Corpus) -> Texts:
    """Chats of three answered requests; refusals only where topic and action are restricted."""
    lex = words.lexicon()
    grammar = _chat_grammar()
    pieces, turns = [grammar.fill(rng, n, frames.CHAT_OPENING, {})], []
    for _ in range(3):
        topic = rng.integers(len(lex.request_topics), size=n)
        action = rng.integers(len(lex.actions), size=n)
        variables = {"topic": topic, "action": action}
        harmful = (topic < lex.n_restricted_topics) & (action < lex.n_restricted_actions)
        refusing = np.where(harmful, corpus.refusal, 0.0)
        request = grammar.fill(rng, n, frames.CHAT_REQUEST, variables)
        reveal(request, request.slots == grammar.slot("ACTION"), -np.log(len(lex.actions)))
        reveal(request, request.slots == grammar.slot("TOPIC"), -np.log(len(lex.request_topics)))
        odds = np.stack([1 - refusing, refusing], axis=1)
        reply = grammar.fill(rng, n, frames.CHAT_REPLY, variables, odds)
        # the frames begin with the same word: the second one tells them apart and bears the odds
        reply.floor[:, 1] += reply.floor[:, 0]
        reply.floor[:, 0] = 0.0
        refused = reply.tokens[:, 1] == lex.ids["sorry"]
        pieces += [request, reply]
        turns.append((topic, action, refused))
    piece = join(pieces)
    topic, action, refused = (np.stack(values, axis=1) for values in zip(*turns, strict=True))
    turn = np.r_[0, 0, np.repeat([0, 1, 2], 15)]
    next_of = {
        "request_topic_next": np.where(piece.slots == grammar.slot("FROM"), topic[:, turn], -1),
        "action_next": np.where(piece.slots == grammar.slot("DO"), action[:, turn], -1),
    }
    truth = {"topic": topic, "action": action, "refused": refused}
    return make_texts("chat", corpus, piece, truth, next_of)


@cache
def _story_grammar() -> Grammar:
    lex = words.lexicon()
    told = {"ROLE": words.ROLES, "HERO": words.HEROES, "PET": words.PETS}
    free = {"DOING": words.DOINGS, "OBJECT": words.OBJECTS, "MOOD": words.MOODS}
    slots = {slot: (slot.lower(), lex.table(listed.split())) for slot, listed in told.items()}
    slots |= {slot: (None, lex.table([listed.split()])) for slot, listed in free.items()}
    return Grammar(slots)


def make_stories(n: int, rng: np.random.Generator, corpus: Corpus) -> Texts:
    """Plain stories about a hero, a role and a pet: neutral ground for side effects."""
    grammar = _story_grammar()
    variables = {v: rng.integers(len(table), size=n) for v, table in grammar.options.values() if v}
    pieces = [grammar.fill(rng, n, frames.STORY_OPENING, variables)]
    pieces += [grammar.fill(rng, n, frames.STORY_BODY, variables) for _ in range(4)]
    piece = join(pieces)
    for name, (variable, table) in grammar.options.items():
        if variable:
            reveal(piece, piece.slots == grammar.slot(name), -np.log(len(table)))
    return make_texts("story", corpus, piece)
