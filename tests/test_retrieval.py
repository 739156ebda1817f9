"""Selectors on text whose domain is known, and TracIn in closed form against autograd."""

import json
from pathlib import Path

import miniatures
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from sae_research.errors import ResearchError  # noqa: E402
from sae_research.retrieval import selectors  # noqa: E402
from sae_research.retrieval.chunks import (  # noqa: E402
    Chunks,
    check_seeds,
    exclude_test,
    split_documents,
)
from sae_research.retrieval.tracin import TracIn  # noqa: E402

PHYSICS = Path(__file__).resolve().parents[2] / "shared/real/physics"


def make_chunks(texts, documents):
    tokens = torch.arange(len(texts))[:, None].expand(-1, 4)
    return Chunks(tokens, list(texts), np.asarray(documents))


def test_documents_are_split_whole():
    documents = np.repeat(np.arange(50), 3)
    parts = split_documents(documents, {"seed": 0.2, "pool": 0.5, "test": 0.3}, seed=1)
    assert sum(mask.astype(int) for mask in parts.values()).tolist() == [1] * 150
    assert {name: mask.sum() // 3 for name, mask in parts.items()} == {
        "seed": 10,
        "pool": 25,
        "test": 15,
    }
    for mask in parts.values():
        assert not set(documents[mask]) & set(documents[~mask])


def test_test_chunks_can_never_be_selected():
    pool = make_chunks(["aa bb", "cc dd", "ee ff", "gg hh"], [0, 1, 2, 3])
    # a copy of chunk 1, and another chunk of document 3
    test = make_chunks(["cc dd", "xx yy"], [7, 3])
    kept = exclude_test(pool, test)
    assert kept.texts == ["aa bb", "ee ff"]
    ranking = selectors.rank(selectors.bm25_scores(kept.texts, ["cc dd gg hh xx yy aa"]))
    assert not set(kept.document[ranking]) & set(test.document)
    with pytest.raises(ResearchError, match="pool is empty"):
        exclude_test(pool[np.array([1, 3])], test)
    with pytest.raises(ResearchError, match="1 seed document"):
        check_seeds(make_chunks(["q"], [3]), test)


def test_bm25_is_okapi():
    """Two chunks against the formula of the textbook (the factor k1 + 1 is common to all)."""
    pool = ["field energy field", "soup bread salt pepper"]
    found = selectors.bm25_scores(pool, ["field"])[0]
    idf = np.log(1 + (2 - 1 + 0.5) / (1 + 0.5))
    length = 3 / 3.5
    assert found[0] == pytest.approx(idf * 2 / (2 + 1.5 * (1 - 0.75 + 0.75 * length)), rel=1e-4)
    assert found[1] == 0


def test_aggregations_and_fusion():
    scores = np.array([[3.0, 2.0, 0.0, 1.0], [0.0, 2.5, 9.0, 1.0]])
    assert selectors.rank(scores, "mean").tolist() == [2, 1, 0, 3]
    assert selectors.rank(scores, "max").tolist() == [2, 0, 1, 3]
    assert selectors.rank(scores, "round robin").tolist() == [0, 2, 1, 3]
    a, b = np.array([0, 1, 2, 3]), np.array([1, 3, 0, 2])
    assert selectors.fuse([a, b]).tolist()[0] == 1
    assert sorted(selectors.fuse([a, b])) == [0, 1, 2, 3]
    assert selectors.rerank(a, np.array([0.0, 5.0]), 2).tolist() == [1, 0, 2, 3]


def test_dense_vectors_find_synonyms_that_share_no_word_with_the_seed():
    """Words a and b keep the same company, so LSA ranks b's chunks above strangers; BM25 cannot."""
    rng = np.random.default_rng(0)
    company, others = [f"co{i}" for i in range(6)], [f"ot{i}" for i in range(30)]
    pool = [" ".join([w, *rng.choice(company, 4)]) for w in ["alpha", "beta"] * 40]
    pool += [" ".join(rng.choice(others, 5)) for _ in range(200)]
    beta = np.array([text.startswith("beta") for text in pool])
    vectors, seeds = selectors.lsa_vectors(pool, ["alpha"] * 3, 4)
    ranking = selectors.rank(seeds @ vectors.T)
    assert selectors.score_ranking(ranking, beta, 80)["recall"] > 0.9
    lexical = selectors.bm25_scores(pool, ["alpha"])[0]
    assert lexical[beta].max() == 0


def test_scores_of_rankings():
    in_domain = np.array([True, True, False, False])
    best = selectors.score_ranking(selectors.rank_by_label(in_domain, 0), in_domain, 2)
    assert best == {"precision": 1.0, "recall": 1.0, "ndcg": 1.0, "lift": 2.0}
    assert selectors.score_ranking(np.array([3, 2, 1, 0]), in_domain, 2)["precision"] == 0
    with pytest.raises(ResearchError, match="empty"):
        selectors.bm25_scores([], ["a"])


@pytest.mark.parametrize(("kind", "penalty"), [("relu", 0.0), ("relu", 0.7), ("topk", 0.0)])
def test_closed_form_equals_autograd(kind, penalty):
    """All four blocks of the mean gradient, and each token's inner product with it."""
    sae = miniatures.random_sae(kind, 12, 40, **({"k": 5} if kind == "topk" else {}))
    sae.requires_grad_(True)
    x = torch.randn(30, 12, generator=torch.Generator().manual_seed(1))

    def gradient(rows):
        acts = sae.encode(rows)
        loss = (rows - sae.decode(acts)).square().sum()
        loss = loss + penalty * (acts * sae.W_dec.norm(dim=1)).sum()
        return torch.autograd.grad(loss, [sae.W_dec, sae.W_enc, sae.b_enc, sae.b_dec])

    tracin = TracIn(sae, penalty)
    seeds = tracin.mean_gradient([x[:7], x[7:20]])
    for ours, theirs in zip(vars(seeds).values(), gradient(x[:20]), strict=True):
        torch.testing.assert_close(ours, theirs / 20, rtol=1e-4, atol=1e-5)
    found = tracin.scores(x[20:], seeds)
    cosine = tracin.scores(x[20:], seeds, normalise=True)
    for i, row in enumerate(x[20:]):
        blocks = gradient(row[None])
        inner = sum((a * b).sum() for a, b in zip(blocks, vars(seeds).values(), strict=True))
        norm = sum(block.square().sum() for block in blocks).sqrt()
        assert found[i].item() == pytest.approx(inner.item(), rel=1e-4, abs=1e-4)
        assert cosine[i].item() == pytest.approx((inner / norm).item(), rel=1e-4, abs=1e-4)


@pytest.mark.slow
def test_real_paragraphs_give_the_reference_precision():
    """40 seed paragraphs of five physics papers, pool of the other 44; one draw varies by .13."""
    path = PHYSICS / "unarxive_open_paragraphs.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    papers = np.array([row["paper_id"] for row in rows])
    physics = np.array([row["discipline"] == "Physics" for row in rows])
    texts = np.array([row["text"] for row in rows], dtype=object)
    found = {"bm25": [], "lsa": [], "base": []}
    for draw in range(8):
        rng = np.random.default_rng(draw)
        five = rng.choice(np.unique(papers[physics]), 5, replace=False)
        seeds = rng.choice(np.flatnonzero(np.isin(papers, five)), 40, replace=False)
        rest = np.flatnonzero(~np.isin(papers, five))
        pool, queries = list(texts[rest]), list(texts[seeds])
        vectors, centres = selectors.lsa_vectors(pool, queries, 128)
        rankings = {
            "bm25": selectors.rank(selectors.bm25_scores(pool, queries)),
            "lsa": selectors.rank(centres @ vectors.T),
        }
        for name, ranking in rankings.items():
            found[name].append(selectors.score_ranking(ranking, physics[rest], 100)["precision"])
        found["base"].append(physics[rest].mean())
    means = {name: float(np.mean(values)) for name, values in found.items()}
    assert means["base"] == pytest.approx(0.46, abs=0.05)
    assert means["bm25"] == pytest.approx(0.664, abs=0.1)
    assert means["lsa"] == pytest.approx(0.746, abs=0.1)
