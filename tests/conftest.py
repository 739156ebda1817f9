"""Fixtures that several test files share, and the order of the files."""

import pytest
import replicas
import smoke
from filelock import FileLock

FIRST = (
    "test_smoke_chain.py",
    "test_opinion_qa_real.py",
    "test_smoke_nbval.py",
    "test_pipeline.py",
    "test_world.py",
)
"""They run first, so that many short files are left to keep all workers busy to the end. A worker
takes the next file as soon as two tests of its own are left: the one with the smoke chain, a single
test, takes nbval after it, which needs what the chain made.
"""


def pytest_collection_modifyitems(items):
    rank = {name: i for i, name in enumerate(FIRST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(FIRST)))


@pytest.fixture(scope="session")
def hub_cache(tmp_path_factory):
    """A hub cache with miniature replicas of every model and SAE that the real profiles name; the
    first worker that needs it makes it for all.
    """
    run = smoke.find_run(tmp_path_factory)
    cache = run / "hub"
    with FileLock(run / "hub.lock"):
        if not cache.exists():
            partial = tmp_path_factory.mktemp("hub")
            replicas.write_cache(partial)
            partial.rename(cache)
    return cache


@pytest.fixture(scope="module")
def offline_hub(hub_cache):
    """The hub client reads that cache and no network, here and in processes started from here."""
    from huggingface_hub import constants
    from sae_lens.loading import pretrained_sae_loaders
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("HF_HUB_CACHE", str(hub_cache)), ("HF_HUB_OFFLINE", True)):
            patch.setattr(constants, name, value)
            patch.setenv(name, str(value))
        for release, sizes in replicas.gemma_overrides().items():
            patch.setattr(get_pretrained_saes_directory()[release], "config_overrides", sizes)
        patch.setattr(pretrained_sae_loaders, "get_safetensors_tensor_shapes", replicas.shapes)
        yield hub_cache
