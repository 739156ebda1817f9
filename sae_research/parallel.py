"""Independent shards of work: in one process, in several, or on Ray, with the same results."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

from sae_research.errors import ResearchError


def shards(
    function: Callable,
    items: Iterable,
    n_jobs: int | str = 1,
    *,
    seed: int | None = None,
    threads: int = 1,
    desc: str = "",
) -> list:
    """`[function(item) for item in items]`, with `n_jobs` at once; a worker starts in about 2 s.

    `n_jobs` is 1 (this process), a number of local processes (-1: one a core), or "ray". With
    `seed`, every call is `function(item, seed=...)` with a seed that depends on the item's place
    alone. Every shard has `threads` threads whatever `n_jobs`, so that sums round alike.
    """
    items = list(items)
    if n_jobs != "ray" and (type(n_jobs) is not int or n_jobs == 0 or n_jobs < -1):
        raise ResearchError(
            f"n_jobs must be a number of processes, -1 for one a core, or 'ray', not {n_jobs!r}."
        )
    pairs = zip(items, _seeds(seed, len(items)), strict=True)
    calls = [(function, i, item, s, threads) for i, (item, s) in enumerate(pairs)]
    if n_jobs == 1 or len(items) < 2:
        return [_shard(*call) for call in tqdm(calls, desc=desc, leave=False)]

    from joblib import Parallel, delayed

    with _backend(n_jobs, threads) as keeps_order:
        if keeps_order:
            done = Parallel(return_as="generator")(delayed(_shard)(*call) for call in calls)
            return list(tqdm(done, total=len(calls), desc=desc, leave=False))
        return Parallel()(delayed(_shard)(*call) for call in calls)


def _seeds(seed: int | None, n: int) -> list[int | None]:
    if seed is None:
        return [None] * n
    import numpy as np

    return [int(child.generate_state(1)[0]) for child in np.random.SeedSequence(seed).spawn(n)]


def _shard(function: Callable, index: int, item: object, seed: int | None, threads: int) -> object:
    """One call under its thread limit; a failure names the shard."""
    try:
        with _limited(threads):
            return function(item) if seed is None else function(item, seed=seed)
    except Exception as error:
        name = repr(item)
        name = name if len(name) <= 120 else name[:117] + "..."
        kind = "" if isinstance(error, ResearchError) else f"{type(error).__name__}: "
        raise ResearchError(f"shard {index} ({name}) failed: {kind}{error}") from error


@contextmanager
def _limited(threads: int) -> Iterator[None]:
    import torch  # before the limit is set: a library loaded later would take every core
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    try:
        with threadpool_limits(threads):
            torch.set_num_threads(threads)
            yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _backend(n_jobs: int | str, threads: int) -> Iterator[bool]:
    """Select joblib's backend; yields whether it hands results back one by one."""
    from joblib import parallel_config

    if n_jobs != "ray":
        with parallel_config("loky", n_jobs=n_jobs, inner_max_num_threads=threads):
            yield True
        return
    try:
        from ray.util.joblib import register_ray
    except ImportError as error:
        raise ResearchError(
            "n_jobs is 'ray' but Ray is not installed; run `pip install -e '.[ray]' "
            "-c constraints.txt`, or set n_jobs to a number of local processes."
        ) from error
    register_ray()
    with parallel_config("ray", n_jobs=-1):
        yield False
