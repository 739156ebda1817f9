"""Recovery of planted safety features: analytic truths about every estimator."""

import math
from dataclasses import replace

import pandas as pd
import pytest
import torch

from sae_research.errors import ResearchError
from sae_research.studies.safety_subspace import subspace, theory

WORLD = theory.Planted(n=3000)


@pytest.mark.parametrize("r", [2, 8])
def test_floor_belongs_to_the_mean_difference(r):
    found = theory.estimate_all(replace(WORLD, r=r), seed=1)
    assert found["mean difference"][0] == pytest.approx(math.sqrt(r - 1), abs=0.05)
    assert found["covariance difference"][0] < 0.7 * math.sqrt(r - 1)


def test_errors_of_the_oracle_follow_its_angle():
    for angle in (0.0, 0.1, 0.2):
        error = theory.estimate_all(replace(WORLD, angle=angle), seed=2)["SAE oracle"][0]
        assert error == pytest.approx(angle * math.sqrt(WORLD.r), rel=0.15, abs=1e-3)


def test_truncation_and_mixing_bring_an_error_back():
    full = theory.estimate_all(WORLD, seed=3)["SAE oracle"][0]
    cut = theory.estimate_all(replace(WORLD, tau=0.8), seed=3)["SAE oracle"][0]
    mixed = theory.estimate_all(replace(WORLD, mixing=0.3), seed=3)["SAE oracle"][0]
    assert full < 0.35
    assert cut >= 1.0
    assert mixed > 2 * full


def test_pairs_that_share_their_context_are_solved_without_an_sae():
    error = theory.estimate_all(replace(WORLD, shared=True), seed=4)["paired PCA"][0]
    assert error < 0.1


def test_correlated_features_are_active_together_at_the_same_rate():
    alone, together = (theory.draw(replace(WORLD, correlation=c), 5).codes[0] > 0 for c in (0, 0.9))
    rates = [x[:, : WORLD.r].float().mean(0) for x in (alone, together)]
    assert torch.allclose(*rates, atol=0.05)
    both = [(x[:, 0] & x[:, 1]).float().mean() for x in (alone, together)]
    assert both[1] > 1.5 * both[0]


def test_a_trained_sae_recovers_the_subspace_until_it_is_truncated():
    rows = pd.DataFrame(theory.trained_sae(theory.SMALL, 0, 500, (0.8, 1.0)))
    errors = rows.set_index(["estimator", "tau"])["error"]
    assert errors["trained SAE", 1.0] < 0.3
    assert errors["trained SAE", 0.8] > 1.0
    assert errors["mean difference", 1.0] == pytest.approx(math.sqrt(7), abs=0.02)


def test_basis_of_orthogonal_rows_keeps_the_share_that_tau_asks_for():
    rows = torch.eye(10, 16)
    assert subspace.build_basis(rows, tau=0.8).shape == (16, 8)
    assert subspace.build_basis(rows, tau=1.0).shape == (16, 10)
    basis = subspace.build_basis(rows, rank=3)
    assert torch.allclose(basis.T @ basis, torch.eye(3), atol=1e-6)
    with pytest.raises(ResearchError, match="rank of 11 does not fit a subspace of dimension 10"):
        subspace.build_basis(rows, rank=11)


def test_recovery_error_and_excess_of_known_subspaces():
    axes = torch.eye(6)
    assert subspace.recovery_error(axes[:, :3], axes[:, :3]) == 0
    assert subspace.recovery_error(axes[:, :4], axes[:, :1]) == pytest.approx(math.sqrt(3))
    assert subspace.excess(axes[:, :2], axes[:, :4]) == pytest.approx(math.sqrt(2))
    angles = subspace.principal_angles(axes[:, :2], axes[:, 1:3])
    assert angles.tolist() == pytest.approx([0, math.pi / 2])


def test_selection_passes_over_dense_and_start_latents():
    generator = torch.Generator().manual_seed(0)
    unaligned = torch.rand(40, 6, generator=generator)
    aligned = unaligned + torch.tensor([3.0, 0, 5.0, -4.0, 1.0, 0])
    at_start = torch.tensor([False, False, True, False, False, False])
    density = torch.tensor([0.1, 0.1, 0.1, 0.9, 0.1, 0.1])
    contrast = subspace.Contrast(aligned, unaligned, density, at_start)
    found = subspace.select_features(contrast, 2, max_density=0.5)
    assert found.latents.tolist() == [0, 4]
    assert found.stability == 1.0
    with pytest.raises(ResearchError, match="4 latents pass"):
        subspace.select_features(contrast, 5, max_density=0.5)


def test_assignment_to_blocks():
    bases = {1: torch.eye(8)[:, :2], 3: torch.eye(8)[:, 2:4]}
    nearest = subspace.assign_bases(bases, 5)
    assert [int(nearest[n][2, 0]) for n in range(5)] == [0, 0, 0, 1, 1]
    assert set(subspace.assign_bases(bases, 5, "sae_layers_only")) == {1, 3}
    assert subspace.assign_bases(bases, 5, "pooled")[0].shape == (8, 2)
    with pytest.raises(ResearchError, match="no SAE at block 7 of a model of 5 blocks"):
        subspace.assign_bases({7: torch.eye(8)}, 5)
