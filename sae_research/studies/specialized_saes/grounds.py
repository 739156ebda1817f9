"""Where the text of a run comes from: seeds, pool, general text, tests, and what is known of them.

A ground is a model with its text. Each source is one function that returns a `Ground`.
"""

from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
import torch
from torch import LongTensor, Tensor

from sae_research import activations, catalogue, prose, real_saes
from sae_research.errors import ResearchError
from sae_research.models import LanguageModel
from sae_research.retrieval.chunks import Chunks, Files, check_seeds, exclude_test
from sae_research.studies.specialized_saes.settings import Settings

DOMAIN, REGISTER, GENERAL = "domain", "second register", "general"
TESTS = (DOMAIN, REGISTER, GENERAL)


@dataclass
class Truth:
    """What a latent should be found for, on the domain's test text."""

    labels: LongTensor
    """Concept of each position, -1 for none [chunks, length]."""
    bands: dict[str, list[int]]
    """Concepts by frequency, the most frequent band first."""


@dataclass
class Ground:
    """A model with the text of one run."""

    model: LanguageModel
    hook: str
    seeds: Chunks
    pool: Chunks
    in_domain: np.ndarray
    """Whether each chunk of the pool belongs to the domain: for metrics and the oracle alone."""
    general: LongTensor
    """Rows of general text, on which the general SAE is trained."""
    tests: dict[str, Chunks]
    """Test chunks by kind (`TESTS`)."""
    truth: Truth | None = None
    """Known concepts of the domain's tests; None where nobody knows them."""

    @cached_property
    def scale(self) -> float:
        """Factor that gives residuals of general text a mean norm of sqrt(d): units of all SAEs."""
        rows = activations.collect(self.model, self.general[:256], self.hook)
        return rows.shape[-1] ** 0.5 / rows.norm(dim=-1).mean().item()

    def residuals(self, tokens: LongTensor) -> Tensor:
        """Scaled residuals of the text positions [tokens, d], in reading order."""
        return activations.collect(self.model, tokens, self.hook) * self.scale

    def content(self, chunks: Chunks) -> Tensor:
        """Mask of the positions whose residuals `residuals` returns [chunks, length]."""
        return self.model.content(chunks.tokens) & (chunks.tokens != self.model.bos)


def load(name: str, settings: Settings, device: str, seed: int) -> Ground:
    """The ground of one model; another seed draws other text."""
    spec = catalogue.get(name)
    hook = settings.hook or spec.hooks.get("train")
    if hook is None:
        raise ResearchError(f"no hook is known for {name}; set `hook` in params.yaml.")
    if name in real_saes.RECIPES and settings.domain and settings.register:
        corpus = prose.load(real_saes.RECIPES[name].text)
        return make_prose_ground(spec.load(device=device), hook, corpus, settings, seed)
    if not spec.embedded:
        raise ResearchError(
            f"no text with a labelled domain is known for {name}; name parts of its corpus as "
            "`domain` and `register`, or add a source to studies/specialized_saes/grounds.py."
        )
    return make_toy_ground(spec.load(device=device), hook, settings, seed)


def make_prose_ground(
    model: LanguageModel, hook: str, corpus: prose.Corpus, settings: Settings, seed: int
) -> Ground:
    """Real text, labelled by where it stands; no file is in two parts.

    General text and pool are files of `train`, seeds of `validation`, tests of `test` and, where it
    has too few, `fresh`. The general SAE sees no text of the domain, and nothing but the tests has
    any of the second register.
    """

    def label(paragraph: prose.Paragraph) -> str:
        named = ((REGISTER, settings.register), (DOMAIN, settings.domain))
        return next((kind for kind, part in named if paragraph.is_in(part)), GENERAL)

    files = Files(model, corpus, label, np.random.default_rng([seed, 31]))
    take = partial(files.take, length=settings.chunk_tokens, most=settings.file_chunks)
    few = settings.loss_chunks
    tests = {k: take(settings.test_chunks, (k,), ("test", "fresh"), least=few) for k in TESTS}
    general = take(settings.general_chunks, (GENERAL,), ("train",))
    pool = exclude_test(take(settings.pool_chunks, (GENERAL, DOMAIN), ("train",)), *tests.values())
    seeds = check_seeds(take(settings.seed_chunks, (DOMAIN,), ("validation",)), *tests.values())
    in_domain = files.labels[pool.document] == DOMAIN
    return Ground(model, hook, seeds, pool, in_domain, general.tokens, tests)


def make_toy_ground(model: LanguageModel, hook: str, settings: Settings, seed: int) -> Ground:
    """Generated text: physics is the rare domain, and "please explain" its second register.

    Seeds are articles of the first register that use no synonym, so that a word match misses the
    articles that do.
    """
    from sae_research.world.text import documents
    from sae_research.world.text.checks import BANDS
    from sae_research.world.text.corpus import Corpus
    from sae_research.world.text.lexicon import lexicon

    rng = np.random.default_rng([seed, 30])
    corpus = Corpus()
    lex = lexicon()
    names = np.array(model.tokenizer.convert_ids_to_tokens(list(range(model.d_vocab))))
    used = 0

    def chunk(tokens: np.ndarray) -> Chunks:
        nonlocal used
        used += len(tokens)
        texts = [" ".join(row) for row in names[tokens[:, 1:]]]
        numbers = np.arange(used - len(tokens), used)
        return Chunks(torch.from_numpy(tokens).long(), texts, numbers)

    seeds = documents.make_physics(8 * settings.seed_chunks, rng, replace(corpus, explain=0.0))
    seeds = seeds[seeds.truth["synonym"] == 0][: settings.seed_chunks]
    mixture = documents.make_mixture(settings.pool_chunks, rng, corpus)
    n = settings.test_chunks
    domain, register = (
        documents.make_physics(n, rng, replace(corpus, explain=share)) for share in (0.0, 1.0)
    )
    parts = (domain, register, documents.make_mixture(n, rng, corpus))
    tests = {kind: chunk(part.tokens) for kind, part in zip(TESTS, parts, strict=True)}
    whole = chunk(mixture.tokens)
    pool = exclude_test(whole, *tests.values())
    is_physics = np.isin(mixture.truth["concept"], lex.physics)
    labels = torch.from_numpy(domain.token_truth["concept_next"]).long()
    return Ground(
        model=model,
        hook=hook,
        seeds=check_seeds(chunk(seeds.tokens), *tests.values()),
        pool=pool,
        in_domain=is_physics[np.isin(whole.document, pool.document)],
        general=torch.from_numpy(documents.make_rows(settings.general_chunks, rng).tokens).long(),
        tests=tests,
        truth=Truth(labels, {band: list(range(60))[ranks] for band, ranks in BANDS.items()}),
    )
