"""Shards: the same results in item order, however many run at once; a failure names its shard."""

import os
import subprocess
import sys

import numpy as np
import pytest

from sae_research.errors import ResearchError
from sae_research.parallel import shards


def draw(item, seed):
    """A sum whose rounding depends on the thread count, and a draw that depends on the seed."""
    import torch

    matrix = torch.full((500, 500), 0.1 + item)
    noise = np.random.default_rng(seed).normal()
    return item, noise, float((matrix @ matrix).cumsum(0).sum()), torch.get_num_threads()


def test_results_are_the_same_and_in_order_whatever_runs_at_once():
    alone = shards(draw, range(5), seed=7)
    assert [result[0] for result in alone] == list(range(5))
    assert len({result[1] for result in alone}) == 5
    assert {result[3] for result in alone} == {1}
    assert shards(draw, range(5), 2, seed=7) == alone
    assert shards(draw, range(5), -1, seed=7) == alone
    assert [r[1] for r in shards(draw, range(5), seed=8)] != [r[1] for r in alone]
    assert shards(draw, range(3), seed=7) == alone[:3]  # a shard's seed depends on its place alone


def test_the_threads_of_this_process_come_back():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert shards(lambda item: torch.get_num_threads(), [1]) == [1]
        assert shards(lambda item: torch.get_num_threads(), [1], threads=2) == [2]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_local_processes_are_used_only_when_asked():
    here = os.getpid()
    assert set(shards(lambda item: os.getpid(), range(4))) == {here}
    assert here not in shards(lambda item: os.getpid(), range(4), 2)
    assert shards(lambda item: item, [], 2) == []


def fail(item):
    if item == "bad":
        raise ValueError("no such thing")
    return item


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_a_failure_names_its_shard(n_jobs):
    with pytest.raises(ResearchError, match=r"shard 1 \('bad'\) failed: ValueError: no such thing"):
        shards(fail, ["good", "bad", "good"], n_jobs)


@pytest.mark.parametrize("n_jobs", [0, -2, "many", True, 1.5, None])
def test_a_wrong_number_of_jobs_is_one_sentence(n_jobs):
    with pytest.raises(ResearchError, match="n_jobs must be"):
        shards(fail, ["good"], n_jobs)


def test_without_ray_the_sentence_says_how_to_get_it():
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "from sae_research.parallel import shards\nshards(str, [1, 2], 'ray')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode
    assert "Ray is not installed; run `pip install -e '.[ray]'" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_ray_gives_the_same_results():
    ray = pytest.importorskip("ray", reason="Ray is an optional extra: pip install -e '.[ray]'")
    here = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    workers_find_this_file = {"env_vars": {"PYTHONPATH": here}}
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=workers_find_this_file
    )
    try:
        assert shards(draw, range(5), "ray", seed=7) == shards(draw, range(5), seed=7)
        with pytest.raises(ResearchError, match=r"shard 1 \('bad'\) failed: ValueError"):
            shards(fail, ["good", "bad", "good"], "ray")
    finally:
        ray.shutdown()
