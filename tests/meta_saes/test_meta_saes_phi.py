"""Co-occurrence against numpy, its null, and what decoders are made of."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from sae_research.studies.meta_saes import cooccurrence, structure


@pytest.fixture(scope="module")
def active():
    random = torch.Generator().manual_seed(0)
    x = torch.rand(3000, 12, generator=random) < torch.linspace(0.01, 0.5, 12)
    x[:, 3] |= x[:, 2]
    x[:, 5] = False
    return x


def test_phi_is_the_correlation_of_binary_activations(active):
    counts = cooccurrence.count([(active, active)])
    phi = cooccurrence.phi_rows(counts)
    alive = np.array([i != 5 for i in range(12)])
    expected = np.corrcoef(active.numpy().T[alive].astype(float))
    assert np.allclose(phi.numpy()[alive][:, alive], expected, atol=1e-12)
    assert phi[5].isnan().all()
    assert torch.equal(phi.nan_to_num(9), phi.T.nan_to_num(9))
    found = cooccurrence.summarize(counts, (0.1,))
    upper = expected[np.triu_indices(11, 1)]
    assert found["live"] == pytest.approx(np.abs(upper).mean())
    assert found["all"] == pytest.approx(np.abs(upper).sum() / 66)
    assert found["beyond_0.1"] == pytest.approx((upper > 0.1).mean())


def test_chunks_and_batches_leave_no_trace(active, monkeypatch):
    whole = cooccurrence.count([(active, active)])
    expected = cooccurrence.summarize(whole)
    monkeypatch.setattr(cooccurrence, "ROWS", 5)
    parts = cooccurrence.count((part, part) for part in active.split(700))
    assert torch.equal(parts.both, whole.both)
    assert cooccurrence.summarize(parts) == pytest.approx(expected, rel=1e-12)


def test_a_quarter_of_the_papers_width_needs_so_little_that_all_of_it_fits_in_4_gb():
    """Counts grow with the square of the width and the rest with the width, so at four times this
    one: 16 * 0.1 + 4 * 0.35 GB. In one piece it would be 1 GB here; the slow tier takes the whole.
    """
    code = """
import resource, torch
from sae_research.studies.meta_saes import cooccurrence
wide = torch.zeros(64, 5120, dtype=torch.bool)
wide[torch.arange(64), torch.arange(64) * 75] = True
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = cooccurrence.summarize(cooccurrence.count([(wide, wide)]))
print(found["live"], (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024**2)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    live, gigabytes = map(float, done.stdout.split())
    assert live == pytest.approx(1 / 63)
    assert gigabytes < 0.45


def test_the_null_keeps_rates_and_lies_at_the_sampling_floor():
    random = torch.Generator().manual_seed(1)
    shared = torch.rand(20_000, 1, generator=random) < 0.2
    own = torch.rand(20_000, 40, generator=random) < 0.4
    together = shared & own
    real, null = (
        cooccurrence.summarize(cooccurrence.count([(x, x)]))
        for x in (together, cooccurrence.shifted(together, 0))
    )
    assert torch.equal(cooccurrence.shifted(together, 0).sum(0), together.sum(0))
    assert real["live"] > 0.2
    assert null["live"] == pytest.approx(null["floor"], rel=0.1)
    assert null["floor"] == math.sqrt(2 / (math.pi * 20_000))


def test_firing_rates_move_phi():
    random = torch.Generator().manual_seed(1)
    shared = torch.rand(50_000, 1, generator=random) < 0.2
    x = shared & (torch.rand(50_000, 20, generator=random) < 0.8)
    sizes = [
        cooccurrence.summarize(cooccurrence.count([(y, y)]))["live"]
        for y in (x, cooccurrence.thinned(x, 0.5, 0))
    ]
    assert sizes[1] < 0.7 * sizes[0]


def test_a_planted_split_and_a_planted_merge_are_found():
    random = torch.Generator().manual_seed(2)
    parts = torch.rand(5000, 2, generator=random) < 0.1
    parts[:, 1] &= ~parts[:, 0]
    whole = parts.any(1, keepdim=True)
    counts = cooccurrence.count([(whole, parts)])
    values, latents = cooccurrence.second_largest(counts)
    assert values[0, 1] > 0.5
    assert sorted(latents[0].tolist()) == [0, 1]
    expected = cooccurrence.phi_rows(cooccurrence.count([(parts, parts)]))[0, 1]
    found = cooccurrence.pair_phi(parts.split(1000), torch.tensor([[0, 1]]))
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)
    counts = cooccurrence.count([(torch.cat([parts, whole], 1), whole.expand(-1, 2))])
    back, _ = cooccurrence.second_largest(cooccurrence.transposed(counts))
    assert back.min() > 0.5


def test_composition_is_one_for_a_decoder_made_of_atoms():
    random = torch.Generator().manual_seed(0)
    atoms = normalize(torch.randn(16, 32, generator=random), dim=-1)
    built = atoms.repeat(4, 1) + 0.01 * torch.randn(64, 32, generator=random)
    assert structure.composition_rate(built, 600, 0) > 0.9
    scattered = torch.randn(64, 32, generator=random)
    assert structure.composition_rate(scattered, 600, 0) < 0.85


def test_recovery_of_the_truth_itself_is_perfect():
    random = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(12, 12, generator=random))[0]
    truth = torch.rand(500, 12, generator=random).relu() * (
        torch.rand(500, 12, generator=random) < 0.2
    )
    found = structure.recover(directions, truth, directions, truth)
    assert all(value == pytest.approx(1.0, abs=1e-5) for value in found.values())
    blurred = structure.recover(directions + directions.roll(1, 0), truth, directions, truth)
    assert blurred["mcc"] < 0.8
