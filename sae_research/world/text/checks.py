"""What the toy text model must show before a study may stand on it, measured on fresh text."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sae_research import models, saes
from sae_research.world.checks import Check
from sae_research.world.text import detectors
from sae_research.world.text.corpus import BODY_OF_LIFE, BOS_ID, KINDS, LENGTH, Corpus, Texts
from sae_research.world.text.documents import (
    make_documents,
    make_mixture,
    make_physics,
    make_rows,
    without_stated,
)
from sae_research.world.text.lexicon import lexicon
from sae_research.world.text.model import TextSettings
from sae_research.world.toy_saes import count_eligible, load_saes

BANDS = {
    "rank 1-5": slice(0, 5),
    "rank 6-15": slice(5, 15),
    "rank 16-30": slice(15, 30),
    "rank 31-60": slice(30, 60),
}
"""Physics concepts by frequency."""

LIVES = 8000
"""Biographies for the probes, which are trained in one pass over half of them, as is usual.

What a biased probe goes by depends on that: with twenty passes its worst group falls by half.
"""


@dataclass
class ToyText:
    """A toy text model under measurement, with fresh text for it."""

    model: models.LanguageModel
    """The language model."""
    settings: TextSettings
    """What it was made with."""
    seed: int
    """Seed of the fresh text, apart from those of training."""
    size: int = 2000
    """Documents of each kind."""

    def draw(self, kind: str, n: int | None = None, corpus: Corpus | None = None, **given) -> Texts:
        """Fresh documents of one kind."""
        seeds = [self.seed, 3, KINDS.index(kind)]
        return make_documents(kind, n or self.size, seeds, corpus or self.settings.corpus, **given)

    def map_batches(
        self, tokens: np.ndarray, read: Callable[[torch.Tensor], torch.Tensor], batch: int = 256
    ) -> torch.Tensor:
        """Whatever `read` makes of the tokens, a batch at a time."""
        with torch.no_grad():
            return torch.cat([read(part) for part in torch.from_numpy(tokens).long().split(batch)])

    def residual(self, tokens: np.ndarray, hook: str) -> torch.Tensor:
        """Residuals [rows, LENGTH, d]."""
        return self.map_batches(tokens, lambda part: self.model.residual(part, hook))

    @property
    def later(self) -> str:
        """The later hook, where the probes read."""
        return self.settings.saes.hooks[1]


def check_loss(toy: ToyText) -> list[Check]:
    """Cross-entropy minus the entropy floor, nats per token, by kind of document."""
    checks = []
    for kind in KINDS:
        texts = toy.draw(kind)
        loss = toy.map_batches(texts.tokens, toy.model.losses).mean().item()
        excess = loss + float(texts.floor[:, 1:].mean())
        name = f"loss minus floor: {kind}"
        checks.append(Check(name, excess, 0.1, 0.03, at_most=True, n=len(texts)))
    return checks


def check_facts(toy: ToyText, repeats: int = 8) -> list[Check]:
    """Whether the likeliest word is true where a physics article states founder and place."""
    lex = lexicon()
    concepts = np.repeat(lex.physics, repeats)
    texts = toy.draw("article", len(concepts), concepts=concepts)
    cue = np.isin(texts.tokens[:, :-1], [lex.ids["by"], lex.ids["in"]])
    top = toy.map_batches(texts.tokens, lambda part: toy.model.logits(part)[:, :-1].argmax(-1))
    right = (top.numpy() == texts.tokens[:, 1:])[cue].reshape(len(lex.physics), -1)
    found = {f"physics facts top-1: {band}": right[ranks] for band, ranks in BANDS.items()}
    return [Check(name, float(r.mean()), 0.95, 0.99, n=r.size) for name, r in found.items()]


def fit_probe(x: torch.Tensor, y: torch.Tensor, batch: int = 32, lr: float = 1e-2) -> Callable:
    """A logistic probe on centred residuals (one pass of AdamW), that predicts 0 or 1."""
    random = torch.Generator().manual_seed(0)
    centre = x.mean(0)
    weight, bias = torch.zeros(x.shape[1], requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], lr=lr)
    for part in torch.randperm(len(x), generator=random).split(batch):
        logits = (x[part] - centre) @ weight + bias
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, y[part].float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return lambda z: ((z - centre) @ weight.detach() + bias.detach() > 0).long()


def check_biographies(toy: ToyText) -> list[Check]:
    """Probes of gender, and of profession learned only where gender gives it away."""
    texts = toy.draw("life", LIVES, without_stated(toy.settings.corpus))
    x = toy.residual(texts.tokens[:, : BODY_OF_LIFE.stop], toy.later)[:, BODY_OF_LIFE].mean(1)
    gender = torch.from_numpy(texts.truth["gender"]).long()
    profession = torch.from_numpy(texts.truth["profession"]).long()
    train = torch.arange(len(x)) < len(x) // 2
    cells = [(gender == g) & (profession == p) & ~train for g in (0, 1) for p in (0, 1)]

    def worst(rows: torch.Tensor) -> float:
        guess = fit_probe(x[rows], profession[rows])(x)
        return min((guess[cell] == profession[cell]).float().mean().item() for cell in cells)

    right = (fit_probe(x[train], gender[train])(x) == gender)[~train].float().mean().item()
    n = int(min(cell.sum() for cell in cells))
    original = worst(train & (gender == profession))
    return [
        Check("gender probe", right, 0.98, 1.0, n=int((~train).sum())),
        Check("profession, Original probe, worst group: at most", original, 0.5, at_most=True, n=n),
        Check("profession, Original probe, worst group: at least", original, 0.05, n=n),
        Check("profession, Oracle probe, worst group", worst(train), 0.85, 0.9, n=n),
    ]


def check_senses(toy: ToyText) -> Check:
    """Whether a linear probe reads the sense of a polysemous word, at the later hook."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    texts = toy.draw("senses")
    labels = texts.token_truth["sense"]
    x = toy.residual(texts.tokens, toy.later)[torch.from_numpy(labels >= 0)].numpy()
    y = labels[labels >= 0]
    half = int((labels >= 0).sum()) // 2
    reader = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
    right = reader.fit(x[:half], y[:half]).score(x[half:], y[half:])
    return Check("sense probe", float(right), 0.98, 1.0, n=len(y) - half)


def check_chats(toy: ToyText) -> list[Check]:
    """Answers that fit topic and action, and refusals where they were planted and nowhere else."""
    lex = lexicon()
    texts = toy.draw("chat")
    ids = np.array(["", "", "", "", *lex.words])
    logits = toy.map_batches(
        texts.tokens, lambda part: toy.model.logits(part).log_softmax(-1).half()
    )
    top = ids[logits.argmax(-1).numpy()]
    right = []
    for name, words in (("request_topic_next", lex.request_topics), ("action_next", lex.actions)):
        label = texts.token_truth[name]
        at = label >= 0
        said = top[at]
        stem = np.array(words)[label[at]]
        longer = np.char.str_len(said) > np.char.str_len(stem)
        right.append(np.char.startswith(said, stem) & longer)
    at = texts.tokens == lex.ids["bot"]
    p = logits[torch.from_numpy(at)][:, lex.ids["sorry"]].float().exp().numpy().reshape(-1, 3)
    harmful = (texts.truth["topic"] < lex.n_restricted_topics) & (
        texts.truth["action"] < lex.n_restricted_actions
    )
    right = np.concatenate(right)
    refused = p[harmful]
    elsewhere = p[~harmful]
    off = float(abs(refused.mean() - toy.settings.corpus.refusal))
    name = "refusal where planted: distance from the planted rate"
    others = float(elsewhere.mean())
    return [
        Check("request words right", float(right.mean()), 0.98, 1.0, n=len(right)),
        Check(name, off, 0.03, at_most=True, n=len(refused)),
        Check("refusal elsewhere", others, 0.01, at_most=True, n=len(elsewhere)),
    ]


def label_tokens(
    toy: ToyText, texts: Texts, hook: str
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """Residuals of the text positions, their labels, and the mask of one half of the documents."""
    content = torch.from_numpy(texts.tokens != BOS_ID)
    labels = {k: torch.from_numpy(v).long()[content] for k, v in texts.token_truth.items()}
    half = (torch.arange(len(texts)) % 2 == 0)[:, None].expand(-1, LENGTH)[content]
    return toy.residual(texts.tokens, hook)[content], labels, half


def measure_truth(toy: ToyText, loaded: dict, hook: str) -> list[dict]:
    """The share of labels with a latent, for each SAE at a hook: by kind of label, band, text."""
    lex = lexicon()
    physics = {f"physics {band}": lex.physics[ranks] for band, ranks in BANDS.items()}
    groups = {name: ("concept_next", ids) for name, ids in physics.items()}
    general = {
        "general concepts": ("concept_next", np.flatnonzero(lex.topic_of > 0)),
        "topics": ("topic_next", np.arange(len(lex.topics))),
        "senses": ("sense", np.arange(len(lex.senses))),
        "request topics": ("request_topic_next", np.arange(len(lex.request_topics))),
        "actions": ("action_next", np.arange(len(lex.actions))),
    }
    sizes = {label: len(ids) for label, ids in general.values()}
    sizes["concept_next"] = len(lex.concepts)
    seeds = [toy.seed, 4]
    table = []
    for text, texts, sought in (
        ("physics", make_physics(toy.size, seeds, toy.settings.corpus), groups),
        ("mixed", make_mixture(3 * toy.size, seeds, toy.settings.corpus), groups | general),
    ):
        x, labels, half = label_tokens(toy, texts, hook)
        for name, sae in loaded.items():
            acts = detectors.encode(sae, x)
            found = {
                label: detectors.find_detectors(acts, labels[label], sizes[label], half)
                for label in dict.fromkeys(label for label, _ in sought.values())
            }
            for group, (label, ids) in sought.items():
                f1 = found[label].f1[torch.from_numpy(ids)]
                f1 = f1[~f1.isnan()]
                row = {"sae": name, "text": text, "group": group, "n": len(f1)}
                row["mean F1"] = f1.mean().item()
                row["F1 at least .5"] = (f1 >= 0.5).double().mean().item()
                row["F1 at least .7"] = (f1 >= 0.7).double().mean().item()
                table.append(row)
    return table


def make_contexts(toy: ToyText, n: int = 1024) -> torch.Tensor:
    """Packed rows that end within a document."""
    tokens = make_rows(n + n // 4, [toy.seed, 5], toy.settings.corpus).tokens
    return torch.from_numpy(tokens[tokens[:, -1] != BOS_ID][:n]).long()


def measure(
    model_folder: Path, saes_folder: Path, settings: TextSettings, seed: int, size: int = 2000
) -> list[Check]:
    """Every check of the toy text model.

    Truths are sought at the later hook: where the next word is about to be said, the model must
    know what it depends on, while the early hook knows it in some trainings only.
    """
    toy = ToyText(models.load_model(model_folder), settings, seed, size)
    checks = [*check_loss(toy), *check_facts(toy), check_senses(toy)]
    checks += check_chats(toy) + check_biographies(toy)
    loaded = load_saes(saes_folder)
    first = settings.saes.first
    early, late = settings.saes.hooks
    found = measure_truth(toy, {first[late]: loaded[first[late]]}, late)
    table = {(row["text"], row["group"]): row for row in found}
    head = table["physics", "physics rank 1-5"]
    general = table["mixed", "general concepts"]
    screened = count_eligible(toy.model, loaded[first[early]], make_contexts(toy))
    name = "physics rank 1-5 with a latent, domain text, F1 .7"
    other = "general concepts with a latent, F1 .5"
    return [
        *checks,
        Check(name, head["F1 at least .7"], 0.8, 1.0, n=head["n"]),
        Check(other, general["F1 at least .5"], 0.5, 0.75, n=general["n"]),
        Check("latents eligible for screening", screened, 200, 400, n=1024),
    ]


def measure_saes(
    model_folder: Path, saes_folder: Path, settings: TextSettings, seed: int, size: int = 2000
) -> list[dict]:
    """Each SAE on held-out text: explained variance, L0 and which truths it has latents for."""
    toy = ToyText(models.load_model(model_folder), settings, seed, size)
    held = make_mixture(max(64, size // 4), [seed, 6], settings.corpus)
    tokens = torch.from_numpy(held.tokens).long()
    loaded = load_saes(saes_folder)
    ends = make_contexts(toy)
    result = []
    for hook in settings.saes.hooks:
        here = {name: sae for name, sae in loaded.items() if saes.hook_of(sae) == hook}
        table = measure_truth(toy, here, hook)
        for name, sae in here.items():
            row = {"sae": name, "hook": hook, "kind": sae.cfg.architecture()}
            row |= {"width": sae.cfg.d_sae} | saes.quality(toy.model, sae, tokens)
            row["eligible"] = count_eligible(toy.model, sae, ends)
            row["truth"] = [truth for truth in table if truth["sae"] == name]
            result.append(row)
    return result
