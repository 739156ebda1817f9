"""Cost of a training step with TERM: `python -m benchmarks.term`.

Four trainings of the same TopK SAE on the same batches, in interleaved rounds:

  SAELens    SAELens's own class and trainer
  plain      our class without a tilt
  TERM       a tilt held at an effective sample size of half the batch
  sampled    the same, with a backward pass on a quarter of the batch drawn by weight

and the influence of tokens on a seed loss: TracIn in closed form beside a backward pass for every
token. Times are CPU seconds on one thread, so that they do not depend on what else runs.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from sae_research import term, training
from sae_research.retrieval.tracin import TracIn
from sae_research.tilt import Tilt

D, WIDTH, K, BATCH = 256, 4096, 32, 1024
HALF = {"t": 0.5, "unit": "effective sample size"}
TILTS = {"plain": Tilt(), "TERM": Tilt(**HALF), "sampled": Tilt(**HALF, sampled=0.25)}


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def make_trainers(steps: int) -> dict:
    """A trainer for each training."""
    settings = training.SAETraining(steps=steps, batch_size=BATCH, warmup_steps=1)
    own = training.topk(D, WIDTH, K)
    own.normalize_activations = "none"
    made = {"SAELens": training.trainer(_make(own), settings)}
    for name, tilt in TILTS.items():
        made[name] = term.tilted(tilt)(_make(term.config("topk", D, WIDTH, K)), settings)
    return made


def _make(config):
    from sae_lens import TrainingSAE

    torch.manual_seed(0)
    return TrainingSAE.get_sae_class_for_architecture(config.architecture())(config)


def time_steps(rounds: int, steps: int) -> dict[str, float]:
    """Median seconds of a step of each training."""
    trainers = make_trainers(rounds * steps + steps)
    data = torch.randn(steps, BATCH, D, generator=torch.Generator().manual_seed(1))
    found: dict[str, list[float]] = {name: [] for name in trainers}
    for turn in range(rounds + 1):
        for name, trainer in trainers.items():

            def run(trainer=trainer) -> None:
                for batch in data:
                    trainer.step(batch)
                    trainer.n_training_steps += 1

            spent = seconds(run) / steps
            if turn:  # the first round warms up
                found[name].append(spent)
    return {name: statistics.median(times) for name, times in found.items()}


def time_influence(tokens: int = 200) -> dict[str, float]:
    """Seconds a token of TracIn, in closed form and by a backward pass for each."""
    own = training.topk(D, WIDTH, K)
    own.normalize_activations, own.rescale_acts_by_decoder_norm = "none", False
    sae = _make(own)
    x = torch.randn(BATCH, D, generator=torch.Generator().manual_seed(2))
    tracin = TracIn(sae)
    seeds = tracin.mean_gradient([x])
    blocks = [sae.W_dec, sae.W_enc, sae.b_enc, sae.b_dec]

    def loop() -> None:
        for row in x[:tokens]:
            loss = (sae(row[None]) - row).square().sum()
            gradient = torch.autograd.grad(loss, blocks)
            sum((g * s).sum() for g, s in zip(gradient, vars(seeds).values(), strict=True))

    closed = min(seconds(lambda: tracin.scores(x, seeds)) for _ in range(3)) / len(x)
    return {"closed form": closed, "backward": seconds(loop) / tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--steps", type=int, default=4, help="steps of each training a round")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    steps = time_steps(arguments.rounds, arguments.steps)
    print(f"TopK, d {D}, {WIDTH} latents, k {K}, batch {BATCH}; CPU milliseconds a step")
    for name, spent in steps.items():
        print(f"{name:>12} {1000 * spent:8.1f}")
    influence = time_influence()
    print("TracIn, CPU microseconds a token")
    for name, spent in influence.items():
        print(f"{name:>12} {1e6 * spent:8.1f}")
    print(f"tracin_speedup={influence['backward'] / influence['closed form']:.0f}")
    print(
        f"term_overhead={steps['TERM'] / steps['plain']:.3f} "
        f"sampled_ratio={steps['sampled'] / steps['plain']:.3f} "
        f"vs_saelens={steps['TERM'] / steps['SAELens']:.3f}"
    )


if __name__ == "__main__":
    main()
