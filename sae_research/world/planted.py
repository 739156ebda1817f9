"""Planted worlds: activations in which a few features, and nothing else, tell two classes apart."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize


@dataclass(frozen=True)
class Planted:
    """Superposed features of which a few tell the two classes apart."""

    d: int = 64
    """Dimensions."""
    m: int = 256
    """Features."""
    r: int = 8
    """Safety features, the first ones."""
    n: int = 6000
    """Samples of each class."""
    density: float = 0.02
    """Probability that a feature is active, in both classes."""
    safe_density: float = 0.3
    """Probability of a safety feature in the aligned class, times a factor between .5 and 1."""
    noise: float = 0.02
    """Standard deviation of the noise on each dimension."""
    loud: float = 0.0
    """Gain of eight loud features that both classes share (0: none)."""
    shared: bool = False
    """Whether the two of a pair have all but their safety features in common."""
    correlation: float = 0.0
    """Correlation of the Gaussian copula that couples the safety features."""
    angle: float = 0.1
    """Error of the oracle's decoder rows, as the length of a random vector added to each."""
    mixing: float = 0.0
    """Share of another feature in each of the oracle's latents: 0 is monosemantic."""
    tau: float = 1.0
    """Share of the squared singular values that the oracle's basis keeps."""


@dataclass(frozen=True)
class Sample:
    """One draw of a planted world."""

    features: Tensor
    """Unit directions [m, d]."""
    codes: tuple[Tensor, Tensor]
    """Feature values of the aligned and the unaligned class, [n, m] each."""
    residuals: tuple[Tensor, Tensor]
    """Activations of both, [n, d] each."""
    truth: Tensor
    """Orthonormal basis of the safety features, [d, r]."""


def draw(world: Planted, seed: int) -> Sample:
    """Draw features and both classes."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    features = normalize(normal(world.m, world.d), dim=-1)
    gain = torch.ones(world.m)
    if world.loud:
        gain[world.r : world.r + 8] = world.loud
    safe = world.safe_density * (0.5 + 0.5 * torch.rand(world.r, generator=g))

    def draw_codes(p_safe: Tensor) -> Tensor:
        p = torch.full((world.m,), world.density)
        p[: world.r] = p_safe
        coupled = normal(world.n, world.m)
        common = math.sqrt(world.correlation) * normal(world.n, 1)
        own = math.sqrt(1 - world.correlation) * coupled[:, : world.r]
        coupled[:, : world.r] = common + own
        active = coupled < torch.special.ndtri(p)
        return active * (1 + 0.25 * normal(world.n, world.m)).clamp(min=0) * gain

    aligned = draw_codes(safe)
    unaligned = draw_codes(torch.full((world.r,), world.density))
    if world.shared:
        unaligned[:, world.r :] = aligned[:, world.r :]
    codes = (aligned, unaligned)
    residuals = [z @ features + world.noise * normal(world.n, world.d) for z in codes]
    # rows of the SVD first: the basis that `subspace.build_basis` gives, to the last bit
    truth = torch.linalg.qr(torch.linalg.svd(features[: world.r], full_matrices=False)[2].T).Q
    return Sample(features, codes, (residuals[0], residuals[1]), truth)
