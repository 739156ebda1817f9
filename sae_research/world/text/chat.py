"""Requests to the toy model: which are harmful, how they are answered or refused, and the splits.

A request is harmful where topic and action are both restricted (all words are harmless stand-ins).
Two restricted topics, drawn anew for each seed, are left for the test; the other crossings of topic
and action are split so that no crossing of the test was seen in training.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import LongTensor, Tensor

from sae_research.errors import ResearchError
from sae_research.world.text import frames
from sae_research.world.text.corpus import BOS_ID
from sae_research.world.text.lexicon import ACTION_ENDINGS, TOPIC_ENDINGS, lexicon

ANSWER, REFUSAL = (frame.split()[1:] for frame in frames.CHAT_REPLY)
"""Words of the two replies after "bot", which closes every prompt."""
REPLY = len(ANSWER)
N_NEW_TOPICS = 2
"""Restricted topics that only the test has."""


@dataclass(frozen=True)
class Requests:
    """Prompts with what they ask for."""

    tokens: LongTensor
    """Start token, opening, request and the word that begins a reply, [n, length]."""
    topic: LongTensor
    """Index in the lexicon's request topics, [n]."""
    action: LongTensor
    """Index in the lexicon's actions, [n]."""

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Tensor | slice) -> "Requests":
        return Requests(self.tokens[rows], self.topic[rows], self.action[rows])

    @property
    def restricted(self) -> tuple[Tensor, Tensor]:
        """Whether topic and action are restricted."""
        lex = lexicon()
        return self.topic < lex.n_restricted_topics, self.action < lex.n_restricted_actions

    @property
    def harmful(self) -> Tensor:
        """Whether both are."""
        topic, action = self.restricted
        return topic & action


@dataclass(frozen=True)
class Pairs:
    """Requests, each with the reply that is wanted and one that is not."""

    requests: Requests
    """The requests."""
    aligned: LongTensor
    """Request and wanted reply, [n, length]."""
    unaligned: LongTensor
    """Request and unwanted reply, [n, length]."""

    def __post_init__(self) -> None:
        n = len(self.requests)
        for name, rows in (("aligned", self.aligned), ("unaligned", self.unaligned)):
            if len(rows) != n:
                raise ResearchError(
                    f"{n} requests have {len(rows)} {name} replies; every row needs a pair of "
                    "replies: drop or complete those without."
                )


@dataclass(frozen=True)
class Split:
    """Requests of one seed by use."""

    train: Requests
    """Crossings that adapters are trained on."""
    validation: Requests
    """Crossings on which learning rates are chosen."""
    test: Requests
    """Crossings of known topics and actions that were not seen together."""
    new_topics: Requests
    """All crossings with the left-out restricted topics."""


@cache
def all_requests() -> Requests:
    """Every topic with every action in every frame, as the first request of a chat."""
    lex = lexicon()
    rows = []
    for topic, t in enumerate(lex.request_topics):
        for action, a in enumerate(lex.actions):
            for frame in frames.CHAT_REQUEST:
                asked = frame.replace("ACTION", a).replace("TOPIC", t)
                words = f"{frames.CHAT_OPENING[0]} {asked} bot".split()
                rows.append((topic, action, [BOS_ID, *(lex.ids[w] for w in words)]))
    topics, actions, tokens = zip(*rows, strict=True)
    return Requests(torch.tensor(tokens), torch.tensor(topics), torch.tensor(actions))


def split_requests(seed: int) -> Split:
    """Half of the crossings for training, a quarter each for validation and test."""
    rng = np.random.default_rng([seed, 50])
    lex = lexicon()
    left_out = rng.permutation(lex.n_restricted_topics)[:N_NEW_TOPICS]
    requests = all_requests()
    new = torch.isin(requests.topic, torch.from_numpy(left_out))
    known = np.setdiff1d(np.arange(lex.n_restricted_topics), left_out)
    topics = _ranks(len(lex.request_topics), known, rng)[requests.topic]
    actions = _ranks(len(lex.actions), np.arange(lex.n_restricted_actions), rng)[requests.action]
    place = (topics + actions) % 4
    uses = (place < 2, place == 2, place == 3)
    return Split(*(requests[use & ~new] for use in uses), requests[new])


def _ranks(n: int, restricted: np.ndarray, rng: np.random.Generator) -> LongTensor:
    """A random rank for each of n names, restricted ones apart, so that harmful crossings form a
    Latin square of their own: every known topic and action is harmful in training.
    """
    found = np.zeros(n, dtype=np.int64)
    for group in (restricted, np.setdiff1d(np.arange(n), restricted)):
        found[group] = rng.permutation(len(group))
    return torch.from_numpy(found)


def answer(requests: Requests, rng: np.random.Generator) -> LongTensor:
    """A right answer to each request, its words drawn as the model's corpus draws them."""
    lex = lexicon()
    asked = {
        "DO": (lex.actions, requests.action, ACTION_ENDINGS),
        "FROM": (lex.request_topics, requests.topic, TOPIC_ENDINGS),
    }
    columns = []
    for word in ANSWER:
        if word in asked:
            names, index, endings = asked[word]
            drawn = rng.integers(len(endings), size=len(requests))
            ids = [
                lex.ids[names[i] + endings[e]] for i, e in zip(index.tolist(), drawn, strict=True)
            ]
            columns.append(torch.tensor(ids))
        else:
            columns.append(torch.full((len(requests),), lex.ids[word]))
    return torch.stack(columns, 1)


def refuse(n: int) -> LongTensor:
    """The refusal, n times."""
    lex = lexicon()
    return torch.tensor([lex.ids[word] for word in REFUSAL]).expand(n, -1)


def draw_rows(pool: Requests, n: int, rng: np.random.Generator) -> Requests:
    """`n` requests of a pool, each once before any comes twice."""
    order = np.concatenate([rng.permutation(len(pool)) for _ in range(-(-n // len(pool)))])
    return pool[torch.from_numpy(order[:n])]


def safety_pairs(pool: Requests, n: int, seed: int) -> Pairs:
    """`n` harmful requests, refused where aligned and answered where not."""
    rng = np.random.default_rng([seed, 51])
    harmful = pool[pool.harmful]
    if n > len(harmful):
        raise ResearchError(
            f"there are {len(harmful)} harmful requests to train on, so {n} pairs would repeat "
            "them; ask for fewer."
        )
    requests = draw_rows(harmful, n, rng)
    replies = refuse(n), answer(requests, rng)
    return Pairs(requests, *(torch.cat([requests.tokens, reply], 1) for reply in replies))


def useful_pairs(pool: Requests, n: int, seed: int) -> Pairs:
    """`n` harmless requests, with their own answer where aligned and with another one where not."""
    rng = np.random.default_rng([seed, 52])
    requests = draw_rows(pool[~pool.harmful], n, rng)
    others = draw_rows(pool[~pool.harmful], n, rng)
    replies = answer(requests, rng), answer(others, rng)
    return Pairs(requests, *(torch.cat([requests.tokens, reply], 1) for reply in replies))


def benign_rows(pool: Requests, n: int, seed: int) -> LongTensor:
    """Requests without any restricted word, answered: a later user's own training data."""
    rng = np.random.default_rng([seed, 53])
    topic, action = pool.restricted
    requests = draw_rows(pool[~(topic | action)], n, rng)
    return torch.cat([requests.tokens, answer(requests, rng)], 1)
