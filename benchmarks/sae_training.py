"""Training TopK and BatchTopK SAEs: SAELens's trainer, a plain dense step and ours, in one run; and
study 4's joint training beside the solo SAE of the same class.

All start from the same weights and see the same batches; losses must agree. The last line gives
how many times faster ours is than SAELens's trainer, and how much longer joint training takes.

    python -m benchmarks.sae_training [--steps 12] [--threads 2]
"""

import argparse
import time

import torch

from sae_research import activations, fast_training, training
from sae_research.hub import quiet

D, LATENTS, K, BATCH = 768, 16_384, 32, 2_048
SETTINGS = training.SAETraining(batch_size=BATCH, warmup_steps=1)
JOINT_BATCH, JOINT_LATENTS, META_LATENTS = 4_096, 4_096, 1_800
"""Those of the paper but for the width: the penalty costs META_LATENTS / JOINT_BATCH of a step."""


def draw_activations(rows: int) -> torch.Tensor:
    """Sums of 32 of 4,096 directions with noise, so that there is something to learn."""
    random = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(4_096, D, generator=random), dim=-1)
    chosen = torch.randint(4_096, (rows, 32), generator=random)
    weights = torch.rand(rows, 32, generator=random)
    sums = torch.nn.functional.embedding_bag(
        chosen, directions, mode="sum", per_sample_weights=weights
    )
    return sums * 5 + 0.1 * torch.randn(rows, D, generator=random)


def make_config(name: str):
    """The config of a SAE of the benchmark's size."""
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAEConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAEConfig

    kind = {"topk": TopKTrainingSAEConfig, "batchtopk": BatchTopKTrainingSAEConfig}[name]
    return kind(d_in=D, d_sae=LATENTS, k=K, dtype="float32", device="cpu")


def make_step(config, way: str):
    """The function that does one training step on a batch and gives the loss."""
    from sae_lens import TrainingSAE
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(0)
    kind = TrainingSAE.get_sae_class_for_architecture(config.architecture())
    sae = (fast_training.fast_class(kind) if way == "ours" else kind)(config)
    if way == "plain":
        return make_plain_step(sae)
    if way == "ours":
        run = training.trainer(sae, SETTINGS)
    else:
        run = SAETrainer(
            SAETrainerConfig(
                total_training_samples=SETTINGS.steps * BATCH,
                train_batch_size_samples=BATCH,
                lr=SETTINGS.lr,
                lr_end=SETTINGS.lr / 100,
                lr_warm_up_steps=SETTINGS.warmup_steps,
                lr_decay_steps=int(SETTINGS.decay * SETTINGS.steps),
                dead_feature_window=SETTINGS.dead_window,
                feature_sampling_window=SETTINGS.steps + 1,
                device="cpu",
            ),
            sae,
            data_provider=iter(()),
        )

    def step(batch):
        output = run.step(batch)
        run.n_training_steps += 1
        return output.loss.item()

    return step


def make_plain_step(sae):
    """Dense products, `topk` and Adam, without any bookkeeping."""
    optimizer = torch.optim.Adam(sae.parameters(), lr=SETTINGS.lr, betas=SETTINGS.betas)
    batched = sae.cfg.architecture() == "batchtopk"

    def step(batch):
        hidden = (batch - sae.b_dec * sae.cfg.apply_b_dec_to_input) @ sae.W_enc + sae.b_enc
        scores = hidden * sae.W_dec.norm(dim=-1) if sae.cfg.rescale_acts_by_decoder_norm else hidden
        flat = scores.flatten() if batched else scores
        top = flat.topk(K * len(batch) if batched else K, sorted=False)
        acts = torch.zeros_like(flat).scatter(-1, top.indices, top.values.relu()).view_as(hidden)
        if sae.cfg.rescale_acts_by_decoder_norm:
            acts = acts / sae.W_dec.norm(dim=-1)
        loss = (acts @ sae.W_dec + sae.b_dec - batch).square().sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def measure_joint(macro_steps: int) -> dict[str, float]:
    """Seconds a step of the solo SAE, of joint training, and of joint training that rebuilds the
    decoder rows once in ten steps; each macro step is ten of the primary and five of the meta SAE.
    """
    from sae_research.studies.meta_saes import decomposable

    plan = training.SAETraining(steps=10 * macro_steps, batch_size=JOINT_BATCH, warmup_steps=0)
    runs = {}
    for name, refresh in (("solo", 0), ("joint", 1), ("lazy", 10)):
        torch.manual_seed(0)
        meta = {"d_sae": META_LATENTS, "k": 8, "refresh_every": max(refresh, 1)}
        shape = {"d_in": D, "d_sae": JOINT_LATENTS, "k": 64, "decoder_init_norm": 1.0}
        config = decomposable.DecompBatchTopKConfig(**shape, meta=meta)
        kind = [decomposable.JointTrainer] if refresh else []
        with quiet():
            runs[name] = training.trainer(decomposable.DecompBatchTopK(config), plan, *kind)
    seconds = dict.fromkeys(runs, 0.0)
    data = draw_activations(2 * JOINT_BATCH)
    for batch in activations.batches(data, JOINT_BATCH, plan.steps, 0):
        for name, run in runs.items():
            start = time.perf_counter()
            run.step(batch)
            run.n_training_steps += 1
            seconds[name] += time.perf_counter() - start
    return {name: total / plan.steps for name, total in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = draw_activations(BATCH * args.steps)
    ratios = {}
    for name in ("topk", "batchtopk"):
        with quiet():
            ways = {way: make_step(make_config(name), way) for way in ("saelens", "plain", "ours")}
        seconds, losses = {way: [] for way in ways}, {way: [] for way in ways}
        for batch in activations.batches(data, BATCH, args.steps, 0):
            for way, step in ways.items():
                start = time.perf_counter()
                losses[way].append(step(batch))
                seconds[way].append(time.perf_counter() - start)
        for way in ways:
            median = torch.tensor(seconds[way][1:]).median().item()
            print(f"{name} {way}: {median:.3f} s a step, last loss {losses[way][-1]:.3f}")
            ratios[name, way] = median
        gap = max(abs(a / b - 1) for a, b in zip(losses["ours"], losses["saelens"], strict=True))
        print(f"{name}: largest relative difference of the losses {gap:.1e}")
    joint = measure_joint(macro_steps=2)
    for name, found in joint.items():
        print(f"{name}: {found:.3f} s a step")
    print(f"lazy_overhead={joint['lazy'] / joint['solo']:.2f}")
    vs = {
        way: min(ratios[name, way] / ratios[name, "ours"] for name in ("topk", "batchtopk"))
        for way in ("plain", "saelens")
    }
    print(f"vs_plain={vs['plain']:.2f}")
    print(f"vs_saelens={vs['saelens']:.2f} joint_overhead={joint['joint'] / joint['solo']:.2f}")


if __name__ == "__main__":
    main()
