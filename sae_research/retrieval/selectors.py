"""Rankings of a pool by seed documents: BM25, dense vectors, controls, and how good they are.

A ranking is an array of pool indices, best first.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sae_research.errors import ResearchError
from sae_research.models import LanguageModel
from sae_research.retrieval.chunks import Chunks

Aggregation = Literal["mean", "max", "round robin"]


def bm25_scores(
    pool: Sequence[str], queries: Sequence[str], k1: float = 1.5, b: float = 0.75
) -> np.ndarray:
    """Okapi BM25 of every chunk of the pool for every query [queries, pool]."""
    import bm25s

    _check_pool(pool)
    index = bm25s.BM25(k1=k1, b=b, method="lucene")
    index.index(_words(pool), show_progress=False)
    found = [index.get_scores(words) for words in _words(queries) if words]
    return np.stack(found)


def _words(texts: Sequence[str]) -> list[list[str]]:
    import re

    return [re.findall(r"\b\w\w+\b", text.lower()) for text in texts]


def lsa_vectors(
    pool: Sequence[str], queries: Sequence[str], dimensions: int = 128, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of pool and queries: TF-IDF of the pool, then a truncated SVD."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize

    _check_pool(pool)
    tf_idf = TfidfVectorizer(sublinear_tf=True, stop_words="english")
    weights = tf_idf.fit_transform(pool)
    dimensions = min(dimensions, min(weights.shape) - 1)
    svd = TruncatedSVD(dimensions, random_state=seed)
    vectors = svd.fit_transform(weights)
    return normalize(vectors), normalize(svd.transform(tf_idf.transform(queries)))


def residual_vectors(
    model: LanguageModel, hook: str, pool: Chunks, queries: Chunks, batch: int = 256
) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of pool and queries: the model's mean residual over text, less the pool's."""
    _check_pool(pool.texts)

    def embed(chunks: Chunks) -> Tensor:
        found = []
        for rows in chunks.tokens.split(batch):
            content = model.content(rows).to(model.device)[..., None]
            total = (model.residual(rows, hook) * content).sum(1).float()
            found.append((total / content.sum(1)).cpu())
        return torch.cat(found)

    vectors, seeds = embed(pool), embed(queries)
    centre = vectors.mean(0)
    unit = torch.nn.functional.normalize
    return unit(vectors - centre, dim=1).numpy(), unit(seeds - centre, dim=1).numpy()


def sentence_vectors(texts: Sequence[str], embedder: str, batch: int = 64) -> np.ndarray:
    """Mean-pooled token states of a sentence embedder by hub name or folder (Contriever)."""
    from transformers import AutoModel, AutoTokenizer

    from sae_research.hub import download

    folder = str(download(embedder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, trust_remote_code=False).eval()
    found = []
    for start in range(0, len(texts), batch):
        inputs = tokenizer(
            list(texts[start : start + batch]), padding=True, truncation=True, return_tensors="pt"
        )
        with torch.no_grad():
            states = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None]
        found.append((states * mask).sum(1) / mask.sum(1))
    return torch.cat(found).numpy()


def rank(scores: np.ndarray, aggregation: Aggregation = "mean") -> np.ndarray:
    """The pool ranked by scores [queries, pool], aggregated over queries."""
    if aggregation in ("mean", "max"):
        total = scores.mean(0) if aggregation == "mean" else scores.max(0)
        return np.argsort(-total, kind="stable")
    if aggregation != "round robin":
        raise ResearchError(f"aggregation must be mean, max or round robin, not '{aggregation}'.")
    # each query in turn gives its best chunk that is not yet taken
    turns = np.argsort(-scores, axis=1, kind="stable").T.ravel()
    _, first = np.unique(turns, return_index=True)
    return turns[np.sort(first)]


def fuse(rankings: Sequence[np.ndarray], constant: int = 60) -> np.ndarray:
    """Reciprocal-rank fusion: the sum over rankings of 1 / (constant + rank)."""
    total = sum(1 / (constant + 1 + np.argsort(ranking)) for ranking in rankings)
    return np.argsort(-np.asarray(total), kind="stable")


def rank_randomly(n: int, seed: int) -> np.ndarray:
    """Control: the pool in random order."""
    return np.random.default_rng(seed).permutation(n)


def rank_by_label(in_domain: np.ndarray, seed: int) -> np.ndarray:
    """Oracle: the chunks of the domain first, in random order."""
    order = rank_randomly(len(in_domain), seed)
    return order[np.argsort(~in_domain[order], kind="stable")]


def rerank(ranking: np.ndarray, scores: np.ndarray, candidates: int) -> np.ndarray:
    """The first `candidates` of a ranking in the order of their own scores, the rest after them."""
    head, tail = ranking[:candidates], ranking[candidates:]
    return np.concatenate([head[np.argsort(-scores[:candidates], kind="stable")], tail])


def score_ranking(ranking: np.ndarray, in_domain: np.ndarray, k: int) -> dict[str, float]:
    """Precision, recall and nDCG of the first k, and precision over the base rate."""
    hits = in_domain[ranking[:k]].astype(float)
    discount = 1 / np.log2(np.arange(2, len(hits) + 2))
    best = discount[: min(len(hits), int(in_domain.sum()))].sum()
    precision = hits.mean()
    return {
        "precision": float(precision),
        "recall": float(hits.sum() / max(1, in_domain.sum())),
        "ndcg": float((hits * discount).sum() / best) if best else float("nan"),
        "lift": float(precision / in_domain.mean()) if in_domain.any() else float("nan"),
    }


def _check_pool(pool: Sequence[str]) -> None:
    if not len(pool):
        raise ResearchError("the retrieval pool is empty; give it some text.")
