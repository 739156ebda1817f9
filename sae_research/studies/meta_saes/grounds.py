"""Where activations and held-out loss come from: a model with text, or planted vectors.

Activations are standardised as in the paper: each token's mean over d is taken off and its standard
deviation divided out. `for_raw_residuals` gives an SAE this step, so that others can use it.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import cycle, islice
from typing import TYPE_CHECKING

import torch
from torch import LongTensor, Tensor

from sae_research import activations, catalogue, paths, real_saes, saes
from sae_research.config import Profile
from sae_research.errors import ResearchError
from sae_research.models import LanguageModel
from sae_research.studies.meta_saes.settings import VECTORS, Settings, for_model
from sae_research.world import hierarchy

if TYPE_CHECKING:
    from sae_lens import SAE

FINEWEB = ("HuggingFaceFW/fineweb", "sample-10BT")
EPSILON = 1e-5


def standardise(x: Tensor) -> Tensor:
    """(x - mean) / std of each token over d, as SAELens' `layer_norm` has it."""
    x = x - x.mean(-1, keepdim=True)
    return x / (x.std(-1, keepdim=True) + EPSILON)


def for_raw_residuals(sae: "SAE") -> "SAE":
    """The SAE with standardisation before its encoder and its inverse after its decoder."""
    raw = copy.deepcopy(sae)
    raw.cfg.normalize_activations = "layer_norm"
    raw._setup_activation_normalization()
    return raw


@dataclass
class VectorGround:
    """Sums of planted directions, standardised as a whole."""

    train: Tensor
    calibration: Tensor
    held_out: Tensor
    directions: Tensor
    """Planted directions [m, d]."""
    truth: Tensor
    """How strongly each is in the held-out vectors [n, m]."""
    settings: Settings
    device: str = "cpu"

    def batches(self, seed: int) -> Iterator[Tensor]:
        """Batches to train on."""
        how = self.settings.training
        return activations.batches(self.train, how.batch_size, how.steps, seed)

    def chunks(self) -> Iterator[Tensor]:
        """Held-out activations, a few thousand at a time."""
        yield from self.held_out.split(4096)

    def losses(self, sae: "SAE") -> dict[str, float]:
        """Vectors have no model whose loss could suffer."""
        return {}


@dataclass
class ModelGround:
    """A model's residuals at one hook, with rows of text for each use."""

    model: LanguageModel
    hook: str
    settings: Settings
    rows: dict[str, LongTensor]
    """Rows by use: `train`, `calibration`, `phi`, `loss`."""
    stored: activations.StoredResiduals | None = None
    """Raw residuals of the training rows, where they are kept on disk."""
    _kept: dict[str, Tensor] = field(default_factory=dict)

    @property
    def device(self) -> str:
        return self.model.device

    def residuals(self, rows: LongTensor) -> Tensor:
        """Standardised residuals of the text positions, BOS left out, in reading order."""
        return standardise(activations.collect(self.model, rows, self.hook))

    def _whole(self, use: str) -> Tensor | None:
        """All residuals of a use where they fit in the buffer, computed once."""
        if len(self.rows[use]) > self.settings.buffer_rows:
            return None
        if use not in self._kept:
            self._kept[use] = self.residuals(self.rows[use])
        return self._kept[use]

    def batches(self, seed: int) -> Iterator[Tensor]:
        """Batches to train on: a buffer of rows after the other, each shuffled."""
        how = self.settings.training
        if self.stored is not None:
            found = activations.batches(self.stored, how.batch_size, how.steps, seed)
            yield from map(standardise, found)
            return
        whole = self._whole("train")
        if whole is not None:
            yield from activations.batches(whole, how.batch_size, how.steps, seed)
            return
        parts = cycle(self.rows["train"].split(self.settings.buffer_rows))
        yield from islice(self._buffers(parts, how.batch_size, seed), how.steps)

    def _buffers(self, parts: Iterator, size: int, seed: int) -> Iterator[Tensor]:
        for i, part in enumerate(parts):
            found = self.residuals(part)
            yield from activations.batches(found, size, len(found) // size, seed + i)

    @cached_property
    def calibration(self) -> Tensor:
        """Residuals on which thresholds are set."""
        return self.residuals(self.rows["calibration"])

    def chunks(self) -> Iterator[Tensor]:
        """Held-out residuals, some thousand at a time."""
        whole = self._whole("phi")
        if whole is not None:
            yield from whole.split(4096)
            return
        for part in self.rows["phi"].split(max(1, 4096 // self.settings.row_tokens)):
            yield self.residuals(part)

    def text(self, n: int, length: int) -> tuple[LongTensor, Tensor]:
        """About `n` held-out tokens in contexts [m, length], with residuals [m * length, d]."""
        rows = self.rows["phi"][: -(-n // (self.settings.row_tokens - 1))]
        kept = self.model.content(rows) & (rows != self.model.bos)
        whole = int(kept.sum()) // length * length
        found = self._whole("phi")
        found = self.residuals(rows) if found is None else found
        return rows[kept][:whole].view(-1, length), found[:whole]

    @torch.no_grad()
    def strongest_words(self, sae: "SAE", latents: LongTensor, n: int = 4) -> list[str]:
        """For each latent, the tokens with the largest mean activation among those it is active on
        at least twice.
        """
        tokens, x = self.text(50_000, 1)
        acts = torch.cat([sae.encode(part.to(sae.device))[:, latents] for part in x.split(4096)])
        seen, place = tokens.flatten().unique(return_inverse=True)
        total = acts.new_zeros(len(seen), len(latents)).index_add_(0, place, acts)
        times = acts.new_zeros(len(seen), len(latents)).index_add_(0, place, (acts > 0).to(acts))
        mean = (total / torch.bincount(place)[:, None]).masked_fill(times < 2, 0.0)
        best = mean.topk(min(n, len(seen)), dim=0)
        names = self.model.tokenizer.convert_ids_to_tokens(seen.tolist())
        return [
            " ".join(names[i] for i, value in zip(column, values, strict=True) if value > 0)
            for column, values in zip(best.indices.T.tolist(), best.values.T.tolist(), strict=True)
        ]

    def losses(self, sae: "SAE") -> dict[str, float]:
        """Cross-entropy on held-out text with and without the SAE in the residual's place.

        `ce_overhead` is relative to the clean loss, `ce_destroyed` to that of a zeroed residual.
        """
        clean, zeroed = self._bounds
        raw = for_raw_residuals(sae)
        more = self._loss(lambda x: raw(x.to(raw.device, raw.dtype))) - clean
        return {
            "ce_clean": clean,
            "ce_overhead": more / clean,
            "ce_destroyed": more / (zeroed - clean),
        }

    @cached_property
    def _bounds(self) -> tuple[float, float]:
        return self._loss(lambda x: x), self._loss(torch.zeros_like)

    def _loss(self, edit: Callable[[Tensor], Tensor]) -> float:
        return saes.mean_loss(self.model, self.rows["loss"], self.hook, edit)


Ground = VectorGround | ModelGround


def load(name: str, profile: Profile, seed: int) -> Ground:
    """The ground of a model's name; another seed draws other text or plants other directions."""
    settings = for_model(profile.meta_saes, name)
    if name == VECTORS:
        return make_vectors(settings, seed)
    spec = catalogue.get(name)
    hook = settings.hook or spec.hooks.get("train")
    if hook is None:
        raise ResearchError(f"no hook is known for {name}; set `hook` in params.yaml.")
    per_row = settings.row_tokens - 1
    counts = {
        "train": settings.train_rows,
        "calibration": -(-settings.calibration_tokens // per_row),
        "phi": -(-settings.phi_tokens // per_row),
        "loss": settings.loss_rows,
    }
    if name in real_saes.RECIPES:
        return _make_real(name, hook, settings, counts, profile.runtime.device)
    model = spec.load(device=profile.runtime.device, dtype=profile.runtime.dtype)
    rows = _toy_rows if spec.embedded else _web_rows
    tokens = rows(model, sum(counts.values()), settings.row_tokens, seed)
    parts = tokens.split(list(counts.values()))
    return ModelGround(model, hook, settings, dict(zip(counts, parts, strict=True)))


def _make_real(
    name: str, hook: str, settings: Settings, counts: dict[str, int], device: str
) -> ModelGround:
    """The real model with the text of its own SAEs; seeds share the text and its residuals."""
    from filelock import FileLock

    material = real_saes.Material(real_saes.RECIPES[name], device)
    folder = paths.CACHE / "residuals" / f"{name}-meta_saes"
    train = material.rows("train", counts["train"])
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # seeds that run at once collect them once
        (stored,) = activations.collect_on_disk(material.model, train, [hook], folder)
    held_out = material.rows("test", counts["phi"] + counts["loss"])
    rows = {
        "calibration": material.rows("validation", counts["calibration"]),
        "phi": held_out[: counts["phi"]],
        "loss": held_out[counts["phi"] :],
    }
    return ModelGround(material.model, hook, settings, rows, stored)


def _toy_rows(model: LanguageModel, n: int, length: int, seed: int) -> LongTensor:
    """Rows of the toy text model's corpus."""
    from sae_research.world.text.documents import make_rows

    return torch.from_numpy(make_rows(n, [seed, 40]).tokens[:, :length]).long()


def _web_rows(model: LanguageModel, n: int, length: int, seed: int) -> LongTensor:
    """Rows of FineWeb, BOS first in each (the paper's have BOS only where a document begins)."""
    import datasets

    try:
        stream = datasets.load_dataset(*FINEWEB, split="train", streaming=True).shuffle(seed=seed)
        documents = iter(stream)
        parts: list[LongTensor] = []
        while sum(map(len, parts)) < n:
            texts = [document["text"] for document in islice(documents, 1000)]
            if not texts:
                raise ResearchError(f"{FINEWEB[0]} ends before {n} rows; ask for fewer tokens.")
            parts.append(model.packed(texts, length).cpu())
    except (OSError, ConnectionError, ValueError) as error:
        raise ResearchError(
            f"{FINEWEB[0]} cannot be read; connect and run again, or use the cpu profile, which "
            "needs no network."
        ) from error
    return torch.cat(parts)[:n]


def make_vectors(settings: Settings, seed: int) -> VectorGround:
    """Vectors of SAELens' synthetic model with `settings.vectors`' hierarchy."""
    v = settings.vectors
    sizes = (v.rows, v.held_out, v.held_out)
    tree = hierarchy.Tree(v.n_features, v.n_parents, v.n_children, v.probabilities)
    parts, directions = hierarchy.draw(tree, v.d_in, sizes, seed)
    train, calibration, held_out = (part @ directions for part in parts)
    centre, scale = train.mean(0), (train - train.mean(0)).square().mean().sqrt()
    vectors = [(x - centre) / scale for x in (train, calibration, held_out)]
    return VectorGround(*vectors, directions, parts[2], settings)
