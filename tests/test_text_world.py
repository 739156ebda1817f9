"""The toy text model: exact floors, planted truths, and the check that looks for latents."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from sae_research.training import SAETraining  # noqa: E402
from sae_research.world.text import checks, detectors  # noqa: E402
from sae_research.world.text import model as text_model  # noqa: E402
from sae_research.world.text.articles import compute_concept_odds  # noqa: E402
from sae_research.world.text.corpus import BOS_ID, KINDS, LENGTH, Corpus  # noqa: E402
from sae_research.world.text.documents import (  # noqa: E402
    make_documents,
    make_mixture,
    make_physics,
    make_rows,
)
from sae_research.world.text.lexicon import ENDINGS, PROFESSIONS, TOPICS, lexicon  # noqa: E402

LEX = lexicon()
TINY = text_model.TextSettings(
    model=text_model.TextModel(
        width=16, blocks=4, heads=2, inner=24, steps=12, batch_size=16, warmup_steps=4
    ),
    saes=replace(
        text_model.TextSettings().saes,
        latents=32,
        l0=4,
        documents=48,
        calibration=24,
        training=SAETraining(steps=12, batch_size=128, warmup_steps=2),
    ),
)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_have_one_length_finite_floors_and_one_start_token(kind):
    texts = make_documents(kind, 200, 0)
    assert texts.tokens.shape == texts.floor.shape == (200, LENGTH)
    assert np.isfinite(texts.floor).all()
    assert (texts.floor <= 0).all()
    assert (texts.floor[:, 0] == 0).all()
    assert ((texts.tokens == BOS_ID) == (np.arange(LENGTH) == 0)).all()


def test_floor_is_the_log_probability_of_the_first_word():
    texts = make_mixture(60_000, 0)
    first = texts.tokens[:, 1]
    for word in np.unique(first):
        p = np.exp(texts.floor[first == word, 1])
        assert p.std() < 1e-6
        assert p.mean() == pytest.approx((first == word).mean(), abs=0.006)


@pytest.mark.parametrize(
    ("kind", "after", "choices"),
    [
        ("article", "now think of", 6),
        ("life", "was born in", 12),
        ("senses", "note : one", 15 * 6),
        ("chat", "user please", 8),
        ("story", "once there was a", 8),
    ],
)
def test_inverse_probabilities_average_to_the_number_of_possible_words(kind, after, choices):
    """E[1 / p(x)] counts the words that can follow, whatever their odds: a floor off by any factor
    misses it.
    """
    texts = make_documents(kind, 6000, 1)
    cue = [LEX.ids[word] for word in after.split()]
    n = LENGTH - len(cue)
    hit = np.all([texts.tokens[:, i : i + n] == word for i, word in enumerate(cue)], axis=0)
    inverse = np.exp(-texts.floor[:, len(cue) :][hit])
    assert len(inverse) > 300
    assert inverse.mean() == pytest.approx(choices, rel=0.02)


def test_floor_of_a_revealed_concept_is_its_frequency():
    corpus = Corpus(explain=0.0, synonym=0.0)
    texts = make_documents("article", 50_000, 2, corpus)
    at_name = texts.floor[:, 3]
    assert np.allclose(
        at_name, np.log(compute_concept_odds(corpus))[texts.truth["concept"]], atol=1e-5
    )
    rate = np.bincount(texts.truth["concept"], minlength=len(LEX.concepts)) / len(texts)
    assert np.abs(rate - compute_concept_odds(corpus)).max() < 0.005


def test_floor_of_a_refusal_and_of_an_answer():
    texts = make_documents("chat", 4000, 3)
    harmful, refused = _harmful(texts), texts.truth["refused"] == 1
    after_bot = np.stack([texts.floor[:, 3 + 15 * turn + 7 + 1] for turn in range(3)], 1)
    assert np.allclose(after_bot[harmful & refused], np.log(0.25), atol=1e-5)
    assert np.allclose(after_bot[harmful & ~refused], np.log(0.75), atol=1e-5)
    assert np.allclose(after_bot[~harmful], 0, atol=1e-6)


def _harmful(texts):
    return (texts.truth["topic"] < LEX.n_restricted_topics) & (
        texts.truth["action"] < LEX.n_restricted_actions
    )


def test_refusals_only_where_topic_and_action_are_restricted():
    texts = make_documents("chat", 8000, 4)
    harmful, refused = _harmful(texts), texts.truth["refused"] == 1
    assert not refused[~harmful].any()
    assert refused[harmful].mean() == pytest.approx(Corpus().refusal, abs=0.03)
    assert ((texts.tokens == LEX.ids["sorry"]).sum(1) == refused.sum(1)).all()


def test_gender_and_profession_are_independent_and_shown():
    texts = make_documents("life", 8000, 5)
    cells = np.bincount(2 * texts.truth["gender"] + texts.truth["profession"], minlength=4) / len(
        texts
    )
    assert np.abs(cells - 0.25).max() < 0.02
    nurse = LEX.ids["nurse"]
    assert ((texts.tokens[:, -2] == nurse) == (texts.truth["profession"] == 1)).all()
    named = np.isin(texts.tokens[:, 1:39], [LEX.ids["nurse"], LEX.ids["professor"]]).any(1)
    assert (named == (texts.truth["stated"] == 1)).all()
    cues = [LEX.ids[w] for w in PROFESSIONS["nurse"].split()]
    true = np.isin(texts.tokens, cues).sum(1)
    assert (
        true[texts.truth["profession"] == 1].mean()
        > 4 * true[texts.truth["profession"] == 0].mean()
    )
    plain = make_documents("life", 500, 5, Corpus(contrary=0.0))
    assert (np.isin(plain.tokens, cues).sum(1)[plain.truth["profession"] == 1] >= 2).all()


def test_floor_of_cues_follows_bayes_rule():
    """Averaged over texts, 1 / p counts what can follow: 24 cues and 12 neutral things at a free
    object.
    """
    texts = make_documents("life", 60_000, 13, Corpus(contrary=0.3, stated=0.3))
    inverse = np.exp(-texts.floor)
    some = texts.tokens[:, :-1] == LEX.ids["some"]
    assert inverse[:, 1:][some & (np.arange(1, LENGTH) < 20)].mean() == pytest.approx(24, rel=0.03)
    assert inverse[:, -2].mean() == pytest.approx(1 * 0.3 + 2 * 0.7, rel=0.03)


def test_private_words_occur_only_with_their_concept():
    texts = make_mixture(20_000, 6)
    for concept in range(0, len(LEX.concepts), 13):
        own = [LEX.ids[LEX.concepts[concept] + ending] for ending in ENDINGS]
        holds = np.isin(texts.tokens, own)
        assert (texts.truth["concept"][holds.any(1)] == concept).all()
        marked = texts.token_truth["concept_next"] == concept
        assert (holds[:, 1:] == marked[:, :-1]).all()


def test_synonyms_never_meet_the_seed_words():
    texts = make_physics(4000, 7)
    other = texts.tokens[texts.truth["synonym"] == 1]
    names, *parts = TOPICS["physics"]
    seeds = [LEX.ids[w] for part in parts for w in part.split()[: len(part.split()) // 2]]
    seeds += [LEX.ids[w] for w in names.split()]
    assert len(other) > 1000
    assert not np.isin(other, seeds).any()
    assert np.isin(texts.tokens[texts.truth["synonym"] == 0], seeds).any(1).all()


def test_facts_are_the_same_in_every_article():
    texts = make_documents("article", 5000, 8)
    row, column = np.nonzero(texts.tokens == LEX.ids["by"])
    stated = texts.tokens[row, column + 1]
    for concept in np.unique(texts.truth["concept"]):
        assert len(np.unique(stated[texts.truth["concept"][row] == concept])) == 1


def test_sense_is_marked_on_the_word_itself():
    texts = make_documents("senses", 500, 9)
    labels = texts.token_truth["sense"]
    assert ((labels >= 0).sum(1) == 5).all()
    words = np.array([LEX.ids[w] for w in LEX.sense_word])
    assert (texts.tokens[labels >= 0] == words[labels[labels >= 0]]).all()


def test_same_seed_same_rows_and_packing_keeps_the_floor():
    one, two, other = make_rows(300, 11), make_rows(300, 11), make_rows(300, 12)
    assert (one.tokens == two.tokens).all()
    assert (one.tokens != other.tokens).any()
    starts = (one.tokens == BOS_ID).sum(1)
    assert set(starts) == {1, 2}
    assert (one.floor[one.tokens == BOS_ID] == 0).all()


def _codes(latents: "torch.Tensor") -> detectors.SparseActivations:
    token, latent = latents.nonzero(as_tuple=True)
    return detectors.SparseActivations(token, latent, latents[token, latent], *latents.shape)


@pytest.fixture(scope="module")
def planted():
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(-1, 6, (6000,), generator=random)
    latents = torch.relu(torch.randn(6000, 40, generator=random) - 1.2)
    for label in range(5):
        latents[:, 7 * label] = torch.where(labels == label, 2.0, 0.1) * torch.rand(
            6000, generator=random
        )
    return latents, labels, torch.arange(6000) % 2 == 0


def test_detectors_find_planted_latents_and_only_those(planted):
    latents, labels, half = planted
    found = detectors.find_detectors(_codes(latents), labels, 6, half)
    assert found.latent[:5].tolist() == [0, 7, 14, 21, 28]
    assert (found.f1[:5] > 0.9).all()
    assert found.f1[5] < 0.4


def test_detectors_give_nothing_on_permuted_labels(planted):
    latents, labels, half = planted
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    assert (detectors.find_detectors(_codes(latents), shuffled, 6, half).f1 < 0.4).all()


def test_detectors_score_like_a_direct_count(planted):
    latents, labels, half = planted
    latent, threshold = detectors.choose_latents(_codes(latents[half]), labels[half], 6)
    f1, _ = detectors.score_latents(_codes(latents[~half]), labels[~half], latent, threshold)
    for label in range(6):
        fired, true = latents[~half][:, latent[label]] >= threshold[label], labels[~half] == label
        assert f1[label] == pytest.approx(
            (2 * (fired & true).sum() / (fired.sum() + true.sum())).item(), abs=1e-6
        )


def test_tiny_model_is_built_measured_and_rebuilt_with_the_same_bytes(tmp_path):
    text_model.train_model(TINY, 0, tmp_path / "model")
    text_model.train_model(TINY, 0, tmp_path / "again" / "model")
    weights = (tmp_path / "model" / "model.safetensors").read_bytes()
    assert weights == (tmp_path / "again" / "model" / "model.safetensors").read_bytes()
    for hook_index in (0, 1):
        text_model.train_saes(TINY, tmp_path / "model", 0, tmp_path / "saes", hook_index)
    names = {p.name for p in (tmp_path / "saes").iterdir()}
    kinds = {f"block{b}_{k}" for b in (1, 3) for k in ("topk", "jumprelu", "relu")}
    assert names == kinds | {"block1_topk_wide"}
    found = checks.measure(tmp_path / "model", tmp_path / "saes", TINY, 0, size=40)
    assert len({c.name for c in found}) == len(found) == 20
    assert not next(c for c in found if c.name == "loss minus floor: chat").passed
    qualities = checks.measure_saes(tmp_path / "model", tmp_path / "saes", TINY, 0, size=40)
    assert {q["sae"] for q in qualities} == names
    assert all(q["l0"] == pytest.approx(4, rel=0.2) for q in qualities if q["kind"] == "topk")


def test_a_loss_that_is_not_a_number_stops_the_training():
    from sae_research.errors import ResearchError

    broken = replace(TINY, model=replace(TINY.model, lr=1e30, clip=float("inf")))
    with pytest.raises(ResearchError, match="not finite at step"):
        text_model.train_transformer(broken, 0)
