"""What notebook 00 shows of the toy text model: what latents stand for, what steering does."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from sae_research import steering
from sae_research.world.text import detectors
from sae_research.world.text.articles import make_articles
from sae_research.world.text.checks import ToyText, label_tokens
from sae_research.world.text.corpus import BOS_ID, LENGTH, Texts
from sae_research.world.text.documents import make_mixture, make_physics, stack
from sae_research.world.text.lexicon import ENDINGS, lexicon

if TYPE_CHECKING:
    from sae_lens import SAE


def name_labels() -> dict[str, list[str]]:
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


def show_document(texts: Texts, row: int) -> str:
    """One document as words."""
    words = np.array(["<pad>", "<s>", "</s>", "<unk>", *lexicon().words])
    return " ".join(words[texts.tokens[row, 1:]])


@dataclass(frozen=True)
class Meaning:
    """What a latent turned out to stand for."""

    latent: int
    """Index in the SAE."""
    truth: str
    """The label that it detects best."""
    f1: float
    """How well it detects it, on text that it was not chosen on."""
    contexts: tuple[str, ...]
    """Where it fires most: the token in brackets, then the word that follows."""


@dataclass
class EncodedText:
    """What an SAE makes of fresh text, with the truth of every token."""

    texts: Texts
    """The text."""
    acts: detectors.SparseActivations
    """What fires on it."""
    labels: dict[str, torch.Tensor]
    """Truth of each token, by kind."""
    half: torch.Tensor
    """The tokens on which latents and thresholds are chosen; the others score them."""


def encode_text(toy: ToyText, sae: "SAE", hook: str) -> EncodedText:
    """Encode fresh mixed text and, so that rare concepts occur too, fresh physics."""
    seeds = [toy.seed, 7]
    texts = stack(
        [make_mixture(2 * toy.size, seeds, toy.settings.corpus), make_physics(toy.size, seeds)]
    )
    residuals, labels, half = label_tokens(toy, texts, hook)
    return EncodedText(texts, detectors.encode(sae, residuals), labels, half)


def find_label_detectors(encoded: EncodedText) -> dict[str, detectors.Detectors]:
    """The best latent and threshold for every label of every kind."""
    return {
        kind: detectors.find_detectors(encoded.acts, encoded.labels[kind], len(names), encoded.half)
        for kind, names in name_labels().items()
    }


def choose_concepts(encoded: EncodedText, n: int = 12) -> dict[int, int]:
    """The `n` concepts that a latent detects best (F1 at least .7), each with its latent."""
    found = find_label_detectors(encoded)["concept_next"]
    f1 = found.f1.nan_to_num(-1.0)
    best = f1.argsort(descending=True, stable=True)[:n].tolist()
    return {concept: int(found.latent[concept]) for concept in best if f1[concept] >= 0.7}


def find_best_meanings(encoded: EncodedText, n_each: int = 2) -> list[Meaning]:
    """The labels of each kind that a latent detects best."""
    names = name_labels()
    found = []
    for kind, found_for in find_label_detectors(encoded).items():
        f1 = found_for.f1.nan_to_num(-1.0)
        for label in f1.argsort(descending=True, stable=True)[:n_each].tolist():
            latent = int(found_for.latent[label])
            contexts = find_contexts(encoded, latent)
            found.append(Meaning(latent, names[kind][label], float(f1[label]), contexts))
    return found


def find_random_meanings(encoded: EncodedText, n: int, seed: int = 0) -> list[Meaning]:
    """For latents drawn at random among those that fire, the label that each detects best."""
    names = name_labels()
    alive = encoded.acts.latent.bincount(minlength=encoded.acts.n_latents)
    firing = torch.nonzero(alive >= 30)[:, 0].numpy()
    drawn = np.random.default_rng(seed).choice(firing, size=n, replace=False)
    found = []
    for latent in sorted(int(i) for i in drawn):
        entries = encoded.acts.latent == latent
        token, value = encoded.acts.token[entries], encoded.acts.value[entries]
        only = detectors.SparseActivations(
            token, torch.zeros_like(token), value, encoded.acts.n_tokens, n_latents=1
        )
        scored = []
        for kind, label in names.items():
            truth = encoded.labels[kind]
            f1 = detectors.find_detectors(only, truth, len(label), encoded.half).f1
            best = int(f1.nan_to_num(-1.0).argmax())
            scored.append((float(f1.nan_to_num(-1.0)[best]), label[best]))
        f1, label = max(scored)
        label = label if f1 >= 0.3 else "nothing that was planted"
        found.append(Meaning(latent, label, f1, find_contexts(encoded, latent)))
    return found


def find_contexts(
    encoded: EncodedText, latent: int, n: int = 2, before: int = 4
) -> tuple[str, ...]:
    """The places where a latent fires most, at most one per document."""
    words = np.array(["<pad>", "", "</s>", "<unk>", *lexicon().words])
    places = np.argwhere(encoded.texts.tokens != BOS_ID)
    entries = torch.nonzero(encoded.acts.latent == latent)[:, 0]
    strongest = entries[encoded.acts.value[entries].argsort(descending=True, stable=True)]
    shown = []
    seen = set()
    for token in encoded.acts.token[strongest].tolist():
        row, column = places[token]
        if row in seen:
            continue
        seen.add(row)
        line = words[encoded.texts.tokens[row]]
        left = " ".join(line[max(1, column - before) : column])
        right = " ".join(line[column + 1 : column + 2])
        shown.append(f"{left} [{line[column]}] {right}".strip())
        if len(shown) == n:
            break
    return tuple(shown)


@dataclass
class Dose:
    """What one dose of steering did, one number per concept."""

    dose: float
    """Length of the added direction as a share of the residual's mean norm."""
    mass: np.ndarray
    """Probability of the concept's private words where those of another concept were due."""
    control: np.ndarray
    """The same after adding a random direction of the same length."""


def steer(
    toy: ToyText, sae: "SAE", hook: str, latents: dict[int, int], doses: list[float]
) -> list[Dose]:
    """Add a concept's latent (`latents` maps one to the other) to articles about other concepts.

    The control is the mean over three random directions for each concept.
    """
    contexts, controls = 64, 3
    lex = lexicon()
    rng = np.random.default_rng([toy.seed, 8])
    others = np.setdiff1d(np.flatnonzero(lex.topic_of > 0), list(latents))
    texts = make_articles(contexts, rng, toy.settings.corpus, rng.choice(others, size=contexts))
    tokens = torch.from_numpy(texts.tokens).long()
    due = torch.from_numpy(texts.token_truth["concept_next"] >= 0)
    residual = toy.residual(texts.tokens, hook)
    norm = residual[due].norm(dim=-1).mean()
    rows = steering.directions(sae)
    random = torch.from_numpy(rng.standard_normal((len(latents), controls, rows.shape[1]))).to(rows)

    def measure_mass(direction: torch.Tensor, dose: float, words: list[int]) -> float:
        unit = torch.nn.functional.normalize(direction, dim=0)
        edit = steering.add_direction(unit, float(dose * norm), due)
        with torch.no_grad():
            p = toy.model.logits(tokens, {hook: edit})[due].softmax(-1)
        return p[:, words].sum(-1).mean().item()

    own = [[lex.ids[lex.concepts[concept] + ending] for ending in ENDINGS] for concept in latents]
    found = []
    for dose in doses:
        steered, control = [], []
        for latent, drawn, words in zip(latents.values(), random, own, strict=True):
            steered.append(measure_mass(rows[latent], dose, words))
            control.append(np.mean([measure_mass(d, dose, words) for d in drawn]))
        found.append(Dose(dose, np.array(steered), np.array(control)))
    return found


def continue_text(
    toy: ToyText, sae: "SAE", hook: str, latent: int, dose: float, opening: str, n: int = 24
) -> str:
    """A greedy continuation of `opening` with a latent's direction added (dose 0: unsteered)."""
    tokens = toy.model.tokens([opening])
    norm = toy.model.residual(tokens, hook)[:, 1:].norm(dim=-1).mean()
    unit = torch.nn.functional.normalize(steering.directions(sae)[latent], dim=0)
    edits = {hook: steering.add_direction(unit, float(dose * norm))} if dose else {}
    made = toy.model.generate(tokens, min(n, LENGTH - tokens.shape[1]), edits)
    return toy.model.tokenizer.decode(made[0, tokens.shape[1] :])
