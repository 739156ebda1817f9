"""Which estimators recover the subspace of safety features, and where the paper's floor comes from.

Activations are h = sum_i z_i d_i + noise with more features than dimensions; only the r safety
features change between the two classes. The paper's body could not be read: the model is
reconstructed from its abstract and its floor of sqrt(r - 1).
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sae_research import training
from sae_research.studies.safety_subspace.subspace import build_basis, excess, recovery_error
from sae_research.world.planted import Planted, Sample, draw


def _leading(symmetric: Tensor, r: int) -> Tensor:
    """Eigenvectors of the r largest eigenvalues."""
    return torch.linalg.eigh(symmetric.double()).eigenvectors[:, -r:].float()


def mean_difference(aligned: Tensor, unaligned: Tensor) -> Tensor:
    """The one direction between the class means, [d, 1]."""
    return normalize(aligned.mean(0) - unaligned.mean(0), dim=0)[:, None]


def paired_pca(aligned: Tensor, unaligned: Tensor, r: int) -> Tensor:
    """Leading principal components of the differences within pairs."""
    return _leading((aligned - unaligned).T.cov(), r)


def pooled_pca(aligned: Tensor, unaligned: Tensor, r: int) -> Tensor:
    """Leading principal components of both classes together."""
    return _leading(torch.cat([aligned, unaligned]).T.cov(), r)


def covariance_difference(aligned: Tensor, unaligned: Tensor, r: int) -> Tensor:
    """Leading eigenvectors of the difference of the classes' second moments about one mean."""
    shift = aligned.mean(0) - unaligned.mean(0)
    return _leading(aligned.T.cov() - unaligned.T.cov() + torch.outer(shift, shift), r)


def random_basis(d: int, r: int, seed: int) -> Tensor:
    """A random subspace."""
    return torch.linalg.qr(torch.randn(d, r, generator=torch.Generator().manual_seed(seed))).Q


def oracle_basis(sample: Sample, world: Planted, seed: int) -> Tensor:
    """Basis from the r most contrastive latents of an SAE that knows the features but for an error.

    With `mixing`, each latent is also active for, and points towards, one other feature.
    """
    g = torch.Generator().manual_seed(seed + 1)
    other = torch.randperm(world.m, generator=g)
    error = normalize(torch.randn(world.m, world.d, generator=g), dim=-1)
    w = world.mixing
    rows = (1 - w) * sample.features + w * sample.features[other] + world.angle * error
    aligned, unaligned = (((1 - w) * z + w * z[:, other]).mean(0) for z in sample.codes)
    top = (aligned - unaligned).abs().topk(world.r).indices
    return build_basis(normalize(rows[top], dim=-1), tau=world.tau)


def estimate_all(world: Planted, seed: int) -> dict[str, tuple[float, float]]:
    """Recovery error and excess of every estimator that trains nothing."""
    sample = draw(world, seed)
    pair = sample.residuals
    bases = {
        "mean difference": mean_difference(*pair),
        "paired PCA": paired_pca(*pair, world.r),
        "pooled PCA": pooled_pca(*pair, world.r),
        "covariance difference": covariance_difference(*pair, world.r),
        "random": random_basis(world.d, world.r, seed),
        "SAE oracle": oracle_basis(sample, world, seed),
    }
    truth = sample.truth
    return {name: (recovery_error(truth, u), excess(truth, u)) for name, u in bases.items()}


SWEEPS: dict[str, tuple] = {
    "r": (2, 4, 8, 16),
    "n": (300, 1000, 6000, 30_000),
    "angle": (0.0, 0.05, 0.1, 0.2, 0.4),
    "m": (64, 256, 1024),
    "density": (0.01, 0.02, 0.05, 0.1),
    "loud": (0.0, 3.0, 6.0),
    "shared": (False, True),
    "correlation": (0.0, 0.5, 0.9),
    "mixing": (0.0, 0.1, 0.2, 0.3, 0.4),
    "tau": (0.5, 0.7, 0.8, 0.9, 0.95, 1.0),
}
"""What is varied, one thing at a time."""
_OF_THE_ORACLE = ("angle", "mixing", "tau")


def sweep(seeds: range, most_samples: int) -> Iterator[dict]:
    """A row for each value, estimator and seed; sizes of a class end at `most_samples`."""
    base = replace(Planted(), n=min(Planted.n, most_samples))
    for axis, values in SWEEPS.items():
        for value in values:
            if axis == "n" and value > most_samples:
                continue
            for seed in seeds:
                world = replace(base, **{axis: value})
                for name, (error, outside) in estimate_all(world, seed).items():
                    if axis not in _OF_THE_ORACLE or name == "SAE oracle":
                        row = {"axis": axis, "value": float(value), "estimator": name}
                        numbers = {"error": error, "excess": outside, "r": world.r}
                        yield row | {"seed": seed} | numbers


SMALL = Planted(d=48, m=128)
"""The world in which SAEs are trained."""


def trained_sae(world: Planted, seed: int, steps: int, taus: tuple[float, ...]) -> Iterator[dict]:
    """Train a TopK SAE on unlabelled activations of a planted world; rows as in `sweep`.

    It has half as many latents again as there are features, and one active latent more than
    features are active on average.
    """
    sample = draw(world, seed)
    acts = torch.cat(sample.residuals)
    l0 = (torch.cat(sample.codes) > 0).float().sum(1).mean()
    g = torch.Generator().manual_seed(seed)
    rows = (acts[torch.randint(len(acts), (256,), generator=g)] for _ in range(steps))
    recipe = training.SAETraining(steps=steps, batch_size=256, lr=2e-3)
    config = training.topk(world.d, 3 * world.m // 2, round(float(l0)) + 1)
    sae = training.train({"sae": config}, rows, recipe, seed)["sae"]
    with torch.no_grad():
        aligned, unaligned = (sae.encode(h).mean(0) for h in sample.residuals)
    decoder = normalize(sae.W_dec.detach(), dim=-1)
    ranked = (aligned - unaligned).abs().argsort(descending=True)
    kind = "loud" if world.loud else "plain"
    for tau in taus:
        basis = build_basis(decoder[ranked[: world.r]], tau=tau)
        truth = sample.truth
        errors = {"error": recovery_error(truth, basis), "excess": excess(truth, basis)}
        found = {"world": kind, "estimator": "trained SAE", "tau": tau, "rank": basis.shape[1]}
        yield found | {"seed": seed} | errors
    for name, (error, outside) in estimate_all(world, seed).items():
        found = {"world": kind, "estimator": name, "tau": 1.0, "seed": seed}
        yield found | {"error": error, "excess": outside}
