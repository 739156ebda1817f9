"""Speed of the last-token engine beside the loops it replaces: `python -m benchmarks.steering`.

Three ways to get the last-token logits and one downstream residual of 200 features, each
steered in 48 contexts from a pool of 512, on random models of four architectures:

  bridge loop   a full forward of the TransformerLens bridge under a hook, once per feature
  HF loop       the cheapest plain loop: the Hugging Face model, a forward hook, unembedding of
                the last position only
  engine        sae_research.last_token: `upper` is its marginal cost, `prefix` its one clean pass
                over the pool

The loops are timed on a few features and extrapolated; rounds interleave all three. Times are
CPU seconds on one thread, so that they do not depend on what else the machine does.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from sae_research.last_token import LastToken, Record, run_naive
from sae_research.models import LanguageModel

D, LAYERS, HEADS, VOCAB, T = 256, 6, 8, 4096, 48
POOL, FEATURES, CONTEXTS, PANEL = 512, 200, 48, 2048
HOOK, READ, LAYER = "blocks.2.hook_out", "blocks.4.hook_out", 2
ARCHITECTURES = {
    "GPT-2": "gpt2",
    "GPT-NeoX": "EleutherAI/pythia-70m",
    "Llama": "meta-llama/Llama-3.1-8B",
    "Gemma-2": "google/gemma-2-2b",
}


def random_model(architecture: str) -> torch.nn.Module:
    """A Hugging Face model with random weights, scaled up so that attention is not uniform."""
    from transformers import (
        AutoModelForCausalLM,
        Gemma2Config,
        GPT2Config,
        GPTNeoXConfig,
        LlamaConfig,
    )

    wide = {
        "vocab_size": VOCAB,
        "hidden_size": D,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
    }
    grouped = wide | {
        "intermediate_size": 2 * D + D // 2,
        "num_key_value_heads": HEADS // 2,
        "head_dim": D // HEADS,
    }
    config = {
        "GPT-2": lambda: GPT2Config(
            vocab_size=VOCAB, n_embd=D, n_layer=LAYERS, n_head=HEADS, n_positions=128
        ),
        "GPT-NeoX": lambda: GPTNeoXConfig(intermediate_size=4 * D, **wide),
        "Llama": lambda: LlamaConfig(**grouped),
        "Gemma-2": lambda: Gemma2Config(query_pre_attn_scalar=D // HEADS, **grouped),
    }[architecture]()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(3)
    return model


def bridged(architecture: str):
    """The same model behind the TransformerLens bridge (which rewires the modules it is given)."""
    from tokenizers import Tokenizer, models
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w1")
    return LanguageModel(
        TransformerBridge.boot_transformers(
            ARCHITECTURES[architecture],
            hf_model=random_model(architecture),
            tokenizer=tokenizer,
            device="cpu",
        ),
        architecture,
    )


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A pool of contexts, the contexts of each feature, and the features' directions."""
    torch.manual_seed(1)
    chosen = torch.stack([torch.randperm(POOL)[:CONTEXTS] for _ in range(FEATURES)])
    return torch.randint(2, VOCAB, (POOL, T)), chosen, torch.randn(FEATURES, D)


def hf_loop(model: torch.nn.Module, tokens: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """Last-token logits of the plain Hugging Face model with `direction` added after block
    LAYER.
    """
    base = model.base_model
    blocks = base.h if hasattr(base, "h") else base.layers

    def add(module, args, output):
        first = output[0] if isinstance(output, tuple) else output
        first[:, -1] += direction
        return output

    handle = blocks[LAYER].register_forward_hook(add)
    try:
        return model(tokens, use_cache=False, logits_to_keep=1).logits[:, -1]
    finally:
        handle.remove()


class Timed(LastToken):
    """The engine with a stopwatch on its clean passes."""

    prefix = 0.0

    def record(self, tokens: torch.Tensor) -> Record:
        start = time.process_time()
        try:
            return super().record(tokens)
        finally:
            self.prefix += time.process_time() - start


def engine_pass(
    engine: Timed, pool, chosen, directions
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Every (row numbers, logits, read) of the problem."""
    for rows, _, edited in engine.sweep(pool, chosen, directions):
        yield rows, engine.logits(edited.final), edited.reads[0]


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of `work`."""
    start = time.process_time()
    work()
    return time.process_time() - start


@torch.no_grad()
def compare(architecture: str, rounds: int, few: int) -> dict[str, float]:
    """Median times over interleaved rounds, and the largest error of the engine's logits and
    reads.
    """
    model, plain = bridged(architecture), random_model(architecture)
    pool, chosen, directions = problem()
    engine = Timed(model, HOOK, (READ,))

    def loop(run: Callable[[torch.Tensor, torch.Tensor], object]) -> Callable[[], None]:
        return lambda: [run(pool[chosen[f]], directions[f]) for f in range(few)]

    loops = {
        "bridge loop": loop(
            lambda tokens, direction: run_naive(model, HOOK, (READ,), tokens, direction)
        ),
        "HF loop": loop(lambda tokens, direction: hf_loop(plain, tokens, direction)),
    }
    times: dict[str, list[float]] = {name: [] for name in (*loops, "prefix", "upper")}
    for i in range(rounds + 1):
        engine.prefix = 0.0
        spent = {name: seconds(work) * FEATURES / few for name, work in loops.items()}
        whole = seconds(lambda: [None for _ in engine_pass(engine, pool, chosen, directions)])
        spent |= {"prefix": engine.prefix, "upper": whole - engine.prefix}
        if i:  # the first round warms up
            for name, s in spent.items():
                times[name].append(s)
    truth = [run_naive(model, HOOK, (READ,), pool[chosen[f]], directions[f]) for f in range(few)]
    logits, reads = torch.cat([t[0] for t in truth]), torch.cat([t[1][0] for t in truth])
    error = 0.0
    for rows, got, read in engine_pass(engine, pool, chosen[:few], directions[:few]):
        error = max(
            error, float((got - logits[rows]).abs().max()), float((read - reads[rows]).abs().max())
        )
    plain_error = float(
        (hf_loop(plain, pool[chosen[0]], directions[0]) - logits[:CONTEXTS]).abs().max()
    )
    return {name: statistics.median(s) for name, s in times.items()} | {
        "error": error,
        "loops differ by": plain_error,
    }


def peak(architecture: str) -> float:
    """Peak memory in GB of a fresh process that labels 300 features x 48 contexts with a panel of
    2,048 latents.
    """
    code = f"from benchmarks.steering import label_alone; label_alone({architecture!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def label_alone(architecture: str, features: int = 300) -> None:
    """Body of the process that `peak` watches: every label of the study, libraries and model
    included.
    """
    from sae_lens import StandardSAE, StandardSAEConfig

    from sae_research import latents
    from sae_research.screening import labels

    torch.set_num_threads(1)
    torch.manual_seed(2)
    with quiet(), torch.no_grad():
        engine = LastToken(bridged(architecture), HOOK, (READ,))
        downstream = StandardSAE(StandardSAEConfig(d_in=D, d_sae=4 * PANEL)).requires_grad_(False)
        codes = latents.make_latent_encoder(downstream, torch.arange(PANEL))
        tokens = torch.randint(2, VOCAB, (POOL, T))
        contexts = torch.stack([torch.randperm(POOL)[:CONTEXTS] for _ in range(features)])
        found = labels.measure_effects(
            engine, codes, tokens, torch.randn(features, D), contexts, (0.01, 0.05, 0.1)
        )
        labels.compute_labels(engine, found)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2)


@contextmanager
def quiet() -> Iterator[None]:
    """The bridge warns about its own deprecations; a table should not drown in them."""
    import logging

    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rounds", type=int, default=3, help="interleaved rounds; medians are shown"
    )
    parser.add_argument(
        "--few",
        type=int,
        default=3,
        help="features on which the loops are timed before extrapolation",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{FEATURES} features x {CONTEXTS} contexts from a pool of {POOL}, T {T}, d {D}, "
        f"{LAYERS} layers, V {VOCAB}"
    )
    print(
        f"CPU seconds on one thread, median of {arguments.rounds} interleaved rounds; loops "
        f"timed on {arguments.few}"
    )
    print(
        f"features and extrapolated; load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} "
        "cores\n"
    )
    heads = (
        "",
        "bridge loop",
        "HF loop",
        "prefix",
        "upper",
        "vs bridge",
        "vs bridge-p",
        "vs HF",
        "vs HF-p",
        "max error",
        "peak GB",
    )
    print(" ".join(f"{h:>11}" for h in heads))
    worst, worst_amortised = float("inf"), float("inf")
    with quiet():
        for architecture in ARCHITECTURES:
            t = compare(architecture, arguments.rounds, arguments.few)
            whole, upper = t["prefix"] + t["upper"], t["upper"]
            ratios = [
                t["bridge loop"] / whole,
                t["bridge loop"] / upper,
                t["HF loop"] / whole,
                t["HF loop"] / upper,
            ]
            worst, worst_amortised = min(worst, ratios[0]), min(worst_amortised, ratios[3])
            cells = [f"{t[k]:.2f}" for k in ("bridge loop", "HF loop", "prefix", "upper")] + [
                f"{r:.1f}" for r in ratios
            ]
            cells += [f"{t['error']:.1e}", f"{peak(architecture):.2f}"]
            print(" ".join(f"{c:>11}" for c in (architecture, *cells)), flush=True)
    print("\n-p: without the prefix pass, which the study needs anyway for its activations")
    print(
        "max error: logits and downstream residual against the bridge loop; peak: 300 x 48 with "
        "a panel of 2,048"
    )
    print(f"steering_ratio={worst:.1f} steering_ratio_amortised={worst_amortised:.1f}")


if __name__ == "__main__":
    main()
