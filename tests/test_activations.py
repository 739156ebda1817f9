"""Residuals come in reading order, without BOS and padding, and stream in the same order for one
seed.
"""

import miniatures
import pytest

from sae_research import activations, models
from sae_research.errors import ResearchError

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return models.load_model(
        miniatures.save(tmp_path_factory.mktemp("models") / "tiny-llama", "llama")
    )


def test_collect_keeps_reading_order_whatever_the_batch(llama):
    rows = llama.tokens(["w0 w1 w2", "w3", "w4 w5"])
    direct = llama.residual(rows, HOOK)
    expected = [direct[0, 1:4], direct[1, 1:2], direct[2, 1:3]]
    for batch in (1, 2, 64):
        found = activations.collect(llama, rows, HOOK, batch=batch)
        assert found.shape == (6, llama.d_model)
        assert found.allclose(
            direct.new_tensor([row.tolist() for part in expected for row in part]), atol=1e-5
        )


def test_bos_is_kept_only_when_asked_for(llama):
    rows = llama.tokens(["w0 w1 w2", "w3"])
    found = activations.collect(llama, rows, HOOK, skip_bos=False)
    assert len(found) == 6
    assert found[0].allclose(llama.residual(rows, HOOK)[0, 0], atol=1e-5)
    assert len(activations.collect(llama, llama.tokens(["w0 w1"], prepend_bos=False), HOOK)) == 2


def test_each_pass_holds_every_row_once_and_passes_differ():
    import torch

    acts = torch.arange(12.0)[:, None]
    taken = torch.cat(list(activations.batches(acts, batch_size=5, steps=12, seed=0)))[:, 0]
    passes = taken.view(5, 12)
    assert all(one.sort().values.equal(acts[:, 0]) for one in passes)
    assert len({tuple(one.tolist()) for one in passes}) == 5


def test_batches_follow_the_seed():
    import torch

    acts = torch.arange(20.0)[:, None]
    streams = [torch.cat(list(activations.batches(acts, 8, 6, seed))) for seed in (3, 3, 4)]
    assert streams[0].equal(streams[1])
    assert not streams[0].equal(streams[2])
    assert [len(batch) for batch in activations.batches(acts, 8, 6, 3)] == [8] * 6


def test_a_batch_larger_than_the_pool_is_refused():
    import torch

    with pytest.raises(ResearchError, match="batches of 8 do not fit: there are 4 activations"):
        next(activations.batches(torch.zeros(4, 2), 8, 1, 0))
