"""Fixtures that several test files share."""

import pytest
import replicas


@pytest.fixture(scope="session")
def hub_cache(tmp_path_factory):
    """A hub cache with miniature replicas of every model and SAE that the real profiles name."""
    cache = tmp_path_factory.mktemp("hub")
    replicas.write_cache(cache)
    return cache


@pytest.fixture(scope="module")
def offline_hub(hub_cache):
    """The hub client reads that cache and no network, here and in processes started from here."""
    from huggingface_hub import constants
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("HF_HUB_CACHE", str(hub_cache)), ("HF_HUB_OFFLINE", True)):
            patch.setattr(constants, name, value)
            patch.setenv(name, str(value))
        for release, sizes in replicas.gemma_overrides().items():
            patch.setattr(get_pretrained_saes_directory()[release], "config_overrides", sizes)
        yield hub_cache
