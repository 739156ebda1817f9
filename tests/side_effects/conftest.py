"""A tiny Llama, contexts and one screened SAE for the tests of study 2."""

import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

sys.path.insert(0, str(Path(__file__).parent.parent))

from side_effects_toys import (  # noqa: E402
    HOOK,
    READ,
    SETTINGS,
    D,
    make_sae,
    silence_upper_blocks,
    unit,
)
from test_last_token import tiny  # noqa: E402

from sae_research.screening.screen import Screen  # noqa: E402


@pytest.fixture(scope="session")
def model():
    return tiny("llama")


@pytest.fixture(scope="session")
def identity():
    return silence_upper_blocks(tiny("llama"), 2)


@pytest.fixture(scope="session")
def tokens():
    torch.manual_seed(7)
    return torch.randint(3, 101, (256, 8))


@pytest.fixture(scope="session")
def screened(model, tokens):
    torch.manual_seed(8)
    sae = make_sae(model, HOOK, unit(torch.randn(96, D)), bias=-0.1)
    downstream = make_sae(model, READ, unit(torch.randn(96, D)), bias=-0.1, kind="jumprelu")
    return Screen(model, sae, downstream, tokens, SETTINGS).run()
