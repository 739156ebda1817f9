"""The real chain on the smoke profile, through DVC; a file of its own runs beside others."""

import re

import pytest
import smoke

from sae_research import notebooks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A working copy after its smoke chain."""
    return smoke.make(tmp_path_factory)


def test_the_smoke_chain_runs_every_notebook(copy):
    assert re.findall(r"(?m)^\[\d+/\d+\] (\w+) ", copy.printed) == notebooks.names()
    assert "nothing ran" in copy.again
