"""What the features of the subspace stand for, and whether an adapter works through them."""

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import LongTensor, Tensor

from sae_research import saes
from sae_research.studies.safety_subspace import adapter, methods, subspace
from sae_research.studies.safety_subspace.evaluate import refusal_probability
from sae_research.studies.safety_subspace.methods import Setup
from sae_research.studies.safety_subspace.settings import RANDOM, SAILS, Settings
from sae_research.studies.safety_subspace.subspace import Bases
from sae_research.world.text.chat import Requests

if TYPE_CHECKING:
    from sae_lens import SAE
    from transformers import PreTrainedModel

NEURONPEDIA = "https://www.neuronpedia.org/{id}/{latent}"
"""Page of a latent; `id` is in the SAE's metadata."""


def describe_features(setup: Setup, s: Settings, n_tokens: int = 4) -> Iterator[dict]:
    """A row for each selected feature: contrast, rates, tokens on which it fires most, its page."""
    for block, contrast in setup.contrasts.items():
        sae = setup.saes[block]
        found = methods.select(setup, contrast, s)
        tokens, means = top_tokens(setup, sae, found.latents, n_tokens)
        page = getattr(sae.cfg.metadata, "neuronpedia_id", None)
        for i, latent in enumerate(found.latents.tolist()):
            yield {
                "block": setup.first + block,
                "latent": latent,
                "delta": float(found.delta[i]),
                "aligned_rate": float((contrast.aligned[:, latent] > 0).float().mean()),
                "unaligned_rate": float((contrast.unaligned[:, latent] > 0).float().mean()),
                "tokens": setup.model.tokenizer.decode(tokens[i][means[i] > 0]),
                "stability": found.stability,
                "page": NEURONPEDIA.format(id=page, latent=latent) if page else "",
            }


def top_tokens(setup: Setup, sae: "SAE", latents: LongTensor, n: int) -> tuple[LongTensor, Tensor]:
    """The tokens of the replies on which each latent's mean activation is largest, and that mean,
    [latents, n] each.
    """
    model, replies = setup.model, setup.replies
    rows = torch.cat([setup.safety.aligned, setup.safety.unaligned])
    with torch.no_grad():
        acts = sae.encode(model.residual(rows, saes.hook_of(sae)))[:, replies][..., latents]
    tokens = rows[:, replies].flatten()
    total = torch.zeros(model.d_vocab, len(latents)).index_add(0, tokens, acts.flatten(0, 1).cpu())
    mean = total / tokens.bincount(minlength=model.d_vocab)[:, None].clamp(min=1)
    found = mean.T.topk(n)
    return found.indices, found.values


def feature_energy(
    base: "PreTrainedModel", tuned: "PreTrainedModel", block: int, rows: Tensor
) -> Tensor:
    """Share of the energy of what a block's attention newly writes that lies along each unit
    direction, |d^T dW|^2 / |dW|^2, [directions].
    """
    own, theirs = (m.model.layers[block].self_attn.o_proj.weight for m in (base, tuned))
    update = theirs - own
    return (rows @ update).square().sum(1) / update.square().sum()


@torch.no_grad()
def remove_directions(
    base: "PreTrainedModel", tuned: "PreTrainedModel", bases: Bases
) -> "PreTrainedModel":
    """The tuned model without the part of its update that faces some directions of each block."""
    model = copy.deepcopy(tuned)
    for n, basis in bases.items():
        block = model.model.layers[n]
        for name in adapter.ATTENTION:
            weight = getattr(block.self_attn, name).weight
            update = weight - getattr(base.model.layers[n].self_attn, name).weight
            weight -= adapter.part_in_span(block, name, update, basis)
    return model


def measure_removal(
    setup: Setup, tuned: "PreTrainedModel", s: Settings, tested: Requests, n_random: int
) -> Iterator[dict]:
    """How much less a tuned model refuses without single features, against random directions of
    the same subspace.

    Each is removed wherever its block's subspace is used. `energy` is its share of what those
    blocks newly write.
    """
    bases = methods.find_bases(setup, SAILS, s)
    g = torch.Generator().manual_seed(setup.seed + 400)
    before = float(refusal_probability(tuned, tested).mean())
    owners = subspace.nearest(setup.saes, setup.n_blocks)
    for block, sae in setup.saes.items():
        blocks = [n for n, owner in owners.items() if owner == block]
        top = methods.select(setup, setup.contrasts[block], s).latents
        own = bases[block]
        random = torch.randn(n_random, own.shape[1], generator=g) @ own.T
        rows = torch.cat([subspace.decoder_rows(sae, top), torch.nn.functional.normalize(random)])
        for i, row in enumerate(rows[:, None]):
            known = i < len(top)
            without = remove_directions(setup.base, tuned, dict.fromkeys(blocks, row.T))
            after = float(refusal_probability(without, tested).mean())
            energy = [float(feature_energy(setup.base, tuned, n, row)) for n in blocks]
            found = {"block": block, "kind": "top" if known else "random"}
            found |= {"latent": int(top[i]) if known else -1, "drop": before - after}
            yield found | {"energy": sum(energy) / len(energy)}


def without_direction(basis: Tensor, direction: Tensor) -> Tensor:
    """The subspace of one dimension less that is orthogonal to a direction."""
    inside = torch.nn.functional.normalize(basis.T @ direction, dim=0)
    rest = torch.linalg.qr(torch.cat([inside[:, None], torch.eye(len(inside))], 1)).Q[:, 1:]
    return basis @ rest


def reduced_subspaces(setup: Setup, s: Settings) -> Iterator[tuple[dict, Bases]]:
    """The subspace without one of the first selected features of a block, and, of equal rank,
    without a random direction of it; each with the keys of its row.
    """
    bases = methods.find_bases(setup, SAILS, s)
    owners = subspace.nearest(setup.saes, setup.n_blocks)
    g = torch.Generator().manual_seed(setup.seed + 500)
    for block, sae in setup.saes.items():
        own = bases[block]
        top = methods.select(setup, setup.contrasts[block], s).latents[: s.n_retrained]
        for latent, row in zip(top.tolist(), subspace.decoder_rows(sae, top), strict=True):
            random = own @ torch.randn(own.shape[1], generator=g)
            for kind, direction in (("top", row), ("random", random)):
                less = without_direction(own, direction)
                blocks = [n for n, owner in owners.items() if owner == block]
                keys = {"block": block, "kind": kind, "latent": latent}
                yield keys, {**bases, **dict.fromkeys(blocks, less)}


def compare_subspaces(
    setup: Setup, s: Settings, others: "dict[str, SAE]", block: int
) -> Iterator[dict]:
    """Mean squared cosine of the principal angles between the subspace that one SAE gives at a
    block and those of other SAEs, and of random features, there.
    """
    own = methods.find_bases(setup, SAILS, s)[block]
    random = methods.find_bases(setup, RANDOM, s)[block]
    yield {"other": RANDOM, "overlap": overlap(own, random)}
    for name, sae in others.items():
        contrast = methods.measure_contrasts(setup, {block: sae}, setup.safety)[block]
        found = methods.select(setup, contrast, s)
        rows = subspace.decoder_rows(sae, found.latents)
        yield {"other": name, "overlap": overlap(own, subspace.build_basis(rows, rank=s.rank))}


def overlap(first: Tensor, second: Tensor) -> float:
    """Mean squared cosine of the principal angles; rank / d for random subspaces."""
    return float(subspace.principal_angles(first, second).cos().square().mean())


def learned_overlap(
    base: "PreTrainedModel", tuned: "PreTrainedModel", bases: Bases, rank: int
) -> float:
    """Overlap of what attention newly writes, its leading directions, with a subspace: mean over
    blocks.
    """
    written = (
        tuned.model.layers[n].self_attn.o_proj.weight - base.model.layers[n].self_attn.o_proj.weight
        for n in bases
    )
    left = (torch.linalg.svd(update).U[:, :rank] for update in written)
    return sum(map(overlap, left, bases.values())) / len(bases)
