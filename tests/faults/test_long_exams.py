"""Exams at full size; `make test` takes each at a smaller one."""

import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.faults]


def test_phi_of_the_papers_sae_fits_in_4_gb():
    code = """
import resource, torch
from sae_research.studies.meta_saes import cooccurrence
wide = torch.zeros(64, 20_480, dtype=torch.bool)
wide[torch.arange(64), torch.arange(64) * 300] = True
found = cooccurrence.summarize(cooccurrence.count([(wide, wide)]))
print(found["live"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    live, gigabytes = map(float, done.stdout.split())
    assert live == pytest.approx(1 / 63)
    assert gigabytes < 4
