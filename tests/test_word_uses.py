"""Uses of one word by two libraries: which count, what stands before them, which half is whose."""

import pytest
import torch

from sae_research import catalogue, word_uses
from sae_research.prose import Corpus, Paragraph
from sae_research.studies.meta_saes import senses
from sae_research.studies.meta_saes.grounds import ModelGround, standardise
from sae_research.studies.meta_saes.settings import Settings

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def model():
    return catalogue.get("world-text").load()


def names(split, n):
    """Files that the split by name puts into `split`."""
    every = (f"{i}.py" for i in range(10_000))
    found = (name for name in every if Paragraph("", "", name).split == split)
    return [next(found) for _ in range(n)]


@pytest.fixture(scope="module")
def words(model):
    """Two words of the toy language that are one token each."""
    vocabulary = sorted(w for w in model.tokenizer.get_vocab() if w.isalpha() and len(w) > 3)
    return vocabulary[:3]


def corpus(words, counts, split="test"):
    """Paragraphs `filler word filler`: so many of each of two libraries, each in its own file."""
    word, filler, other = words
    own = names(split, sum(counts))
    return Corpus(
        tuple(
            Paragraph(f"{filler if i < counts[0] else other} {word} {filler}", library, own[i])
            for i, library in enumerate(["one"] * counts[0] + ["two"] * counts[1])
        )
    )


def test_both_senses_count_alike_and_end_at_the_word(model, words):
    uses = word_uses.find_uses(corpus(words, (20, 14)), model, {words[0]: ("one", "two")})
    assert uses.senses == [f"{words[0]}/one", f"{words[0]}/two"]
    assert uses.sense.bincount().tolist() == [14, 14]
    ids = model.tokenizer.get_vocab()
    at = uses.tokens[torch.arange(28), uses.place]
    assert at.eq(ids[words[0]]).all()
    before = uses.tokens[torch.arange(28), uses.place - 1]
    assert before.tolist() == [ids[words[1]]] * 14 + [ids[words[2]]] * 14
    assert (uses.tokens[:, 0] == model.bos).all()
    assert 0 < uses.half.sum() < 28


def test_rare_words_and_training_text_are_left_out(model, words):
    pairs = {words[0]: ("one", "two")}
    assert word_uses.find_uses(corpus(words, (20, 11)), model, pairs).senses == []
    assert word_uses.find_uses(corpus(words, (20, 20), "train"), model, pairs).senses == []


def test_residuals_are_those_of_the_word(model, words, monkeypatch):
    monkeypatch.setattr(word_uses, "WORDS", {words[0]: ("one", "two")})
    text = corpus(words, (16, 16))
    ground = ModelGround(model, HOOK, Settings(models=("world-text",)), {})
    found = senses.read_senses(ground, text)
    assert found.word.unique().tolist() == [0]
    alone = model.tokens([f"{words[1]} {words[0]}"], length=3)
    expected = standardise(model.residual(alone, HOOK)[:, -1].float())
    assert torch.allclose(found.x[found.sense == 0], expected.expand(16, -1), atol=1e-4)
    assert (found.x[found.sense == 1] - expected).abs().max() > 0.1
    monkeypatch.setattr(word_uses, "WORDS", {"nowhere": ("one", "two")})
    assert senses.read_senses(ground, text) is None
