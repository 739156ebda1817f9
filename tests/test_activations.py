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


def test_two_hooks_share_one_pass_and_edits_reach_both(llama):
    rows = llama.tokens(["w0 w1 w2", "w3"])
    hooks = ["blocks.2.hook_resid_post", HOOK]
    with llama.edited({"blocks.0.hook_resid_post": lambda x: 2 * x}):
        found = llama.residuals(rows, hooks, {HOOK: lambda x: x + 1})
        alone = [llama.residual(rows, hook, {HOOK: lambda x: x + 1}) for hook in hooks]
    assert all(ours.equal(theirs) for ours, theirs in zip(found, alone, strict=True))
    assert not found[1].allclose(llama.residual(rows, HOOK))


@pytest.fixture
def stored(llama, tmp_path):
    """Residuals on disk of six rows in three parts, with how they were asked for."""
    rows = llama.tokens([f"w{i} w{i + 1} w{i + 2}" for i in range(6)])
    asked = (llama, rows, ["blocks.2.hook_resid_post", HOOK], tmp_path / "residuals")
    return asked, activations.collect_on_disk(*asked, batch=2, rows_per_part=2)


def test_residuals_on_disk_are_those_in_memory(llama, stored):
    import torch

    (_, rows, hooks, _), found = stored
    positions = torch.tensor([17, 0, 5, 5, 11])
    for hook, ours in zip(hooks, found, strict=True):
        memory = activations.collect(llama, rows, hook)
        assert ours.shape == memory.shape == (18, llama.d_model)
        assert ours[positions].equal(memory[positions].half().float())
        streams = (next(activations.batches(acts, 8, 1, seed=3)) for acts in (ours, memory.half()))
        assert next(streams).equal(next(streams).float())


def test_a_killed_collection_goes_on_and_other_text_starts_anew(llama, stored):
    import shutil

    import torch

    (model, rows, hooks, folder), found = stored
    everything = found[0][torch.arange(18)]
    kept = (folder / "part-0000" / "0.npy").stat().st_mtime_ns
    shutil.rmtree(folder / "part-0001")
    again = activations.collect_on_disk(model, rows, hooks, folder, batch=2, rows_per_part=2)
    assert again[0][torch.arange(18)].equal(everything)
    assert (folder / "part-0000" / "0.npy").stat().st_mtime_ns == kept
    other = activations.collect_on_disk(
        model, rows.flip(0), hooks, folder, batch=2, rows_per_part=2
    )
    assert not other[0][torch.arange(18)].equal(everything)


def test_what_float16_cannot_hold_is_refused(llama, tmp_path):
    rows = llama.tokens(["w0 w1 w2"])
    with (
        llama.edited({HOOK: lambda x: x * 1e6}),
        pytest.raises(ResearchError, match="do not fit into float16"),
    ):
        activations.collect_on_disk(llama, rows, [HOOK], tmp_path / "residuals")
