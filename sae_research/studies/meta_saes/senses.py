"""Senses of polysemous words, planted or told apart by library: who has a latent for each?"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sae_research import word_uses
from sae_research.prose import Corpus
from sae_research.studies.meta_saes.grounds import ModelGround, standardise

if TYPE_CHECKING:
    from sae_lens import SAE

MIN_SHARE = 0.05
"""A latent speaks for a word if it is active on this share of the word's occurrences."""


@dataclass
class Senses:
    """Residuals of polysemous words, with their senses."""

    x: Tensor
    """Standardised residuals [n, d]."""
    sense: Tensor
    """Sense of each [n]."""
    word: Tensor
    """The word that each sense belongs to [n]."""
    half: Tensor
    """Whether its document is one on which latents are chosen [n]."""
    names: list[str]
    """Senses as word/sense."""


def read_senses(ground: ModelGround, corpus: Corpus) -> Senses | None:
    """Uses of words in the held-out text of a corpus; None where it has none."""
    uses = word_uses.find_uses(corpus, ground.model)
    if not uses.senses:
        return None
    parts = zip(uses.tokens.split(32), uses.place.split(32), strict=True)
    x = [ground.model.residual(t, ground.hook)[range(len(t)), at] for t, at in parts]
    x = standardise(torch.cat(x).float().cpu())
    return Senses(x, uses.sense, uses.sense // 2, uses.half, uses.senses)


def make_senses(ground: ModelGround, n: int, seed: int) -> Senses:
    """Fresh notes of the toy text model's world."""
    from sae_research.world.text.documents import make_documents
    from sae_research.world.text.lexicon import lexicon

    texts = make_documents("senses", n, [seed, 41])
    labels = torch.from_numpy(texts.token_truth["sense"]).long()
    tokens = torch.from_numpy(texts.tokens).long()
    parts = [
        ground.model.residual(rows, ground.hook)[mask].float().cpu()
        for rows, mask in zip(tokens.split(256), (labels >= 0).split(256), strict=True)
    ]
    place = (labels >= 0).nonzero()
    sense = labels[labels >= 0]
    names = lexicon().senses
    words = {w: i for i, w in enumerate(dict.fromkeys(lexicon().sense_word))}
    word_of = torch.tensor([words[w] for w in lexicon().sense_word])
    half = place[:, 0] % 2 == 0
    return Senses(standardise(torch.cat(parts)), sense, word_of[sense], half, names)


def score_senses(sae: "SAE", senses: Senses) -> pd.DataFrame:
    """Held-out F1 of each sense's best latent, and its word's purity and number of senses.

    A latent of the word as such reaches 2/3 for a word of two senses and 1/2 for one of three.
    """
    from sae_research.world.text import detectors

    acts = detectors.encode(sae, senses.x)
    found = detectors.find_detectors(acts, senses.sense, len(senses.names), senses.half)
    fires = torch.zeros(len(senses.x), sae.cfg.d_sae, dtype=torch.bool)
    fires[acts.token, acts.latent] = True
    rows = []
    for i, name in enumerate(senses.names):
        word = senses.word[senses.sense == i][0]
        mine = senses.word == word
        rows.append(
            {
                "word": name.split("/")[0],
                "sense": name,
                "latent": int(found.latent[i]),
                "f1": float(found.f1[i]),
                "purity": purity(fires[mine], senses.sense[mine]),
                "chance": purity(fires[mine], senses.sense[mine].roll(1)),
            }
        )
    return pd.DataFrame(rows)


def purity(fires: Tensor, sense: Tensor) -> float:
    """Share of the commonest sense among the occurrences on which a latent is active, mean over
    latents weighted by how often they are; latents of few occurrences do not count.
    """
    one_hot = torch.nn.functional.one_hot(sense - sense.min()).float()
    together = fires.float().T @ one_hot
    size = together.sum(1)
    counted = size >= MIN_SHARE * len(sense)
    if not counted.any():
        return float(one_hot.mean(0).max())
    return float(together[counted].max(1).values.sum() / size[counted].sum())


def compare(first: pd.DataFrame, second: pd.DataFrame, bar: float) -> dict[str, float]:
    """Share of senses that have a latent of their own in the second SAE and not in the first
    (`split`), and the reverse (`merged`).
    """
    before, after = (np.array(table.f1 >= bar) for table in (first, second))
    return {"split": float((after & ~before).mean()), "merged": float((before & ~after).mean())}
