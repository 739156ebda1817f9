"""What notebook 00 shows of the text specimen: what its latents stand for, and what steering one of them does."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from sae_research import steering
from sae_research.world.text import detectors
from sae_research.world.text.checks import Subject, tokens_of
from sae_research.world.text.documents import (
    BOS_ID,
    LENGTH,
    Texts,
    articles,
    mixture,
    physics,
    stacked,
)
from sae_research.world.text.lexicon import ENDINGS, lexicon

if TYPE_CHECKING:
    from sae_lens import SAE


def families() -> dict[str, list[str]]:
    """The kinds of truth that a token can have, with a readable name for each of their labels."""
    lex = lexicon()
    return {
        "concept_next": [f"the next word belongs to {concept}" for concept in lex.concepts],
        "topic_next": [f"the next word is about {topic}" for topic in lex.topics],
        "sense": [
            f"{word} in the sense of {sense}"
            for word, sense in zip(lex.sense_word, lex.senses, strict=True)
        ],
        "request_topic_next": [f"the answer is about {topic}" for topic in lex.request_topics],
        "action_next": [f"the answer says how to {action}" for action in lex.actions],
    }


def example(texts: Texts, row: int) -> str:
    """One document as words."""
    words = np.array(["<pad>", "<s>", "</s>", "<unk>", *lexicon().words])
    return " ".join(words[texts.tokens[row, 1:]])


@dataclass(frozen=True)
class Meaning:
    """What a latent turned out to stand for."""

    latent: int
    """Index in the SAE."""
    truth: str
    """The label that it tells best."""
    f1: float
    """How well it tells it, on text that it was not chosen on."""
    contexts: tuple[str, ...]
    """Where it fires most: the token in brackets, then the word that follows."""


@dataclass
class Reading:
    """An SAE's codes of fresh text, with the truth of every token."""

    texts: Texts
    """The text."""
    codes: detectors.Codes
    """What fires on it."""
    labels: dict[str, torch.Tensor]
    """Truth of each token, by kind."""
    half: torch.Tensor
    """The tokens on which latents and thresholds are chosen; the others score them."""


def read(subject: Subject, sae: "SAE", hook: str) -> Reading:
    """Read fresh mixed text and, so that rare concepts have examples too, fresh physics."""
    seeds = [subject.seed, 7]
    texts = stacked(
        [mixture(2 * subject.size, seeds, subject.settings.corpus), physics(subject.size, seeds)]
    )
    residuals, labels, half = tokens_of(subject, texts, hook)
    return Reading(texts, detectors.encode(sae, residuals), labels, half)


def label_detectors(reading: Reading) -> dict[str, detectors.Detectors]:
    """The best latent and threshold for every label of every kind of detectors."""
    return {
        kind: detectors.detectors(reading.codes, reading.labels[kind], len(names), reading.half)
        for kind, names in families().items()
    }


def best_meanings(reading: Reading, each: int = 2) -> list[Meaning]:
    """The labels of each kind that a latent tells best."""
    names, found = families(), []
    for kind, found_for in label_detectors(reading).items():
        f1 = found_for.f1.nan_to_num(-1.0)
        for label in f1.argsort(descending=True, stable=True)[:each].tolist():
            latent = int(found_for.latent[label])
            found.append(
                Meaning(latent, names[kind][label], float(f1[label]), contexts(reading, latent))
            )
    return found


def random_meanings(reading: Reading, n: int, seed: int = 0) -> list[Meaning]:
    """For latents drawn at random among those that fire, the label that each tells best."""
    names = families()
    alive = reading.codes.latent.bincount(minlength=reading.codes.n_latents)
    drawn = np.random.default_rng(seed).choice(
        torch.nonzero(alive >= 30)[:, 0].numpy(), size=n, replace=False
    )
    found = []
    for latent in sorted(int(i) for i in drawn):
        entries = reading.codes.latent == latent
        only = detectors.Codes(
            reading.codes.token[entries],
            torch.zeros(int(entries.sum()), dtype=torch.long),
            reading.codes.value[entries],
            reading.codes.n_tokens,
            1,
        )
        scored = []
        for kind, labels in names.items():
            told = detectors.detectors(only, reading.labels[kind], len(labels), reading.half)
            f1 = told.f1.nan_to_num(-1.0)
            scored.append((float(f1.max()), labels[int(f1.argmax())]))
        f1, label = max(scored)
        found.append(
            Meaning(
                latent,
                label if f1 >= 0.3 else "nothing that was planted",
                f1,
                contexts(reading, latent),
            )
        )
    return found


def contexts(reading: Reading, latent: int, n: int = 2, before: int = 4) -> tuple[str, ...]:
    """The places where a latent fires most, at most one a document."""
    words = np.array(["<pad>", "", "</s>", "<unk>", *lexicon().words])
    places = np.argwhere(reading.texts.tokens != BOS_ID)
    entries = torch.nonzero(reading.codes.latent == latent)[:, 0]
    strongest = entries[reading.codes.value[entries].argsort(descending=True, stable=True)]
    shown, seen = [], set()
    for token in reading.codes.token[strongest].tolist():
        row, column = places[token]
        if row in seen:
            continue
        seen.add(row)
        line = words[reading.texts.tokens[row]]
        left, right = (
            " ".join(line[max(1, column - before) : column]),
            line[column + 1 : column + 2],
        )
        shown.append(f"{left} [{line[column]}] {' '.join(right)}".strip())
        if len(shown) == n:
            break
    return tuple(shown)


@dataclass
class Dose:
    """What one strength of steering did, one number a concept."""

    dose: float
    """Length of the added direction as a share of the residual's mean norm."""
    mass: np.ndarray
    """Probability of the concept's private words where a private word of another concept was due."""
    control: np.ndarray
    """The same after adding a random direction of the same length."""


def steer(
    subject: Subject,
    sae: "SAE",
    hook: str,
    latents: dict[int, int],
    doses: list[float],
    contexts: int = 64,
    controls: int = 3,
) -> list[Dose]:
    """Add a concept's latent (`latents`: concept to latent) to articles about other concepts, at every dose.

    The control is the mean over `controls` random directions for each concept.
    """
    lex = lexicon()
    rng = np.random.default_rng([subject.seed, 8])
    others = np.setdiff1d(np.flatnonzero(lex.topic_of > 0), list(latents))
    texts = articles(contexts, rng, subject.settings.corpus, rng.choice(others, size=contexts))
    tokens = torch.from_numpy(texts.tokens).long()
    due = torch.from_numpy(texts.token_truth["concept_next"] >= 0)
    residual = subject.residual(texts.tokens, hook)
    norm = residual[due].norm(dim=-1).mean()
    rows = steering.directions(sae)
    random = torch.from_numpy(rng.standard_normal((len(latents), controls, rows.shape[1]))).to(rows)

    def mass(direction: torch.Tensor, dose: float, words: list[int]) -> float:
        unit = torch.nn.functional.normalize(direction, dim=0)
        edit = steering.add_direction(unit, float(dose * norm), due)
        with torch.no_grad():
            p = subject.lens.logits(tokens, {hook: edit})[due].softmax(-1)
        return p[:, words].sum(-1).mean().item()

    own = [[lex.ids[lex.concepts[concept] + ending] for ending in ENDINGS] for concept in latents]
    return [
        Dose(
            dose,
            np.array(
                [
                    mass(rows[latent], dose, words)
                    for latent, words in zip(latents.values(), own, strict=True)
                ]
            ),
            np.array(
                [
                    np.mean([mass(d, dose, words) for d in drawn])
                    for drawn, words in zip(random, own, strict=True)
                ]
            ),
        )
        for dose in doses
    ]


def continued(
    subject: Subject, sae: "SAE", hook: str, latent: int, dose: float, opening: str, n: int = 24
) -> str:
    """A greedy continuation of `opening` with a latent's direction added at every position (dose 0: unsteered)."""
    tokens = subject.lens.tokens([opening])
    norm = subject.lens.residual(tokens, hook)[:, 1:].norm(dim=-1).mean()
    unit = torch.nn.functional.normalize(steering.directions(sae)[latent], dim=0)
    edits = {hook: steering.add_direction(unit, float(dose * norm))} if dose else {}
    made = subject.lens.generate(tokens, min(n, LENGTH - tokens.shape[1]), edits)
    return subject.lens.tokenizer.decode(made[0, tokens.shape[1] :])
