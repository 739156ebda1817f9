"""Which SAEs are trained side by side, and their training on identical batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import normalize

from sae_research import conversion, training
from sae_research.errors import unknown
from sae_research.studies.meta_saes import structure
from sae_research.studies.meta_saes.grounds import Ground
from sae_research.studies.meta_saes.settings import Settings
from sae_research.training import NULLS, SAETraining

if TYPE_CHECKING:
    from sae_lens import SAE, TrainingSAE
    from sae_lens.saes.sae import TrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

SOLO, JOINT, ZERO = "solo", "joint", "penalty 0"
META: dict[str, dict] = {
    "random meta": {"kind": "random"},
    "shuffled meta": {"kind": "shuffled"},
    "lazy meta": {},
}
"""Arms whose meta SAE differs from the joint one's."""
ORT, MATRYOSHKA = "OrtSAE", "Matryoshka"
NULL = "null: "
"""What names of null dictionaries begin with: solo SAEs, parts of which are frozen."""


@dataclass
class Arm:
    """One trained SAE."""

    name: str
    sae: "SAE"
    """As JumpReLU, its mean L0 exact on calibration data."""
    k: float
    """The mean L0 asked for."""
    facts: dict[str, float]
    """What is known of its training."""


def grid(settings: Settings) -> list[str]:
    """The cells of the grid other than the one that `joint` is."""
    cells = [(weight, width) for weight in settings.grid_lambda2 for width in settings.grid_sigma2]
    own = (settings.lambda2, settings.sigma2)
    return [f"{JOINT} {weight:g}/{width:g}" for weight, width in cells if (weight, width) != own]


def expand(names: Sequence[str], settings: Settings) -> list[str]:
    """`smaller k` stands for one solo SAE for each of its shares, `nulls` for every null."""
    several = {
        "smaller k": [f"{SOLO} k {share:g}" for share in settings.smaller_k],
        "nulls": [f"{NULL}{null}" for null in training.NULLS],
    }
    return [one for name in names for one in several.get(name, [name])]


def cell(name: str, settings: Settings) -> tuple[float, float]:
    """lambda2 and sigma2 of an arm: those in its name, else the study's."""
    head, _, numbers = name.partition(f"{JOINT} ")
    if not head and numbers:
        weight, width = numbers.split("/")
        return float(weight), float(width)
    penalised = has_meta(name) and name != ZERO
    return (settings.lambda2 if penalised else 0.0), settings.sigma2


def active(name: str, settings: Settings) -> float:
    """Mean L0 of an arm."""
    _, smaller, share = name.partition(f"{SOLO} k ")
    return settings.k * float(share) if smaller else settings.k


def has_meta(name: str) -> bool:
    """Whether an arm is trained beside a meta SAE."""
    return name == ZERO or name in META or name.split(" ")[0] == JOINT


def make_config(
    name: str, settings: Settings, d_in: int, seed: int, device: str = "cpu"
) -> "TrainingSAEConfig":
    """The SAELens config of an arm."""
    from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAEConfig

    from sae_research.studies.meta_saes import decomposable

    shared = {
        "d_in": d_in,
        "d_sae": settings.d_sae,
        "k": active(name, settings),
        "decoder_init_norm": 1.0,
        "apply_b_dec_to_input": True,
        "aux_loss_coefficient": settings.aux_loss_coefficient,
        "device": device,
    }
    if name == MATRYOSHKA:
        shares = (*settings.matryoshka_shares, 1.0)
        widths = [round(share * settings.d_sae) for share in shares]
        return MatryoshkaBatchTopKTrainingSAEConfig(**shared, matryoshka_widths=widths)
    shared["encoder_bias"] = settings.encoder_bias
    if name == ORT:
        return decomposable.OrtBatchTopKConfig(**shared, gamma=settings.ortsae_gamma)
    known = name.split(" ")[0] == SOLO or has_meta(name) or name.removeprefix(NULL) in NULLS
    if not known:
        names = [SOLO, JOINT, ZERO, *META, ORT, MATRYOSHKA, "nulls"]
        raise unknown("arm", name, names, "meta_saes.arms")
    weight, width = cell(name, settings)
    return decomposable.DecompBatchTopKConfig(
        **shared,
        lambda2=weight,
        sigma2=width,
        warm_up_steps=settings.penalty_warmup_steps,
        meta=_meta(name, settings, seed),
    )


def _meta(name: str, settings: Settings, seed: int) -> dict:
    """The meta SAE of an arm and its schedule."""
    return {
        "d_sae": settings.meta_d_sae,
        "k": settings.meta_k,
        "n_primary_steps": settings.n_primary_steps,
        "n_meta_steps": settings.n_meta_steps,
        "refresh_every": settings.n_primary_steps if name == "lazy meta" else 1,
        "seed": seed + structure.META,
        **META.get(name, {}),
    }


def train(names: Sequence[str], ground: Ground, settings: Settings, seed: int) -> list[Arm]:
    """Every arm on the same batches from the same seed, its threshold set on calibration data."""
    from sae_research.studies.meta_saes import decomposable

    d_in = ground.calibration.shape[1]
    configs = {name: make_config(name, settings, d_in, seed, ground.device) for name in names}
    running: dict[str, SAETrainer] = {}

    def alternating(name: str) -> "training.MakeTrainer":
        def make(sae: "TrainingSAE", how: SAETraining) -> "SAETrainer":
            running[name] = training.trainer(sae, how, decomposable.JointTrainer)
            return running[name]

        return make

    trainers = {name: alternating(name) for name in names if has_meta(name)}
    nulls = (name for name in names if name.startswith(NULL))
    trainers |= {name: training.freeze(name.removeprefix(NULL)) for name in nulls}
    plan = settings.training.plan()
    trained = training.train(configs, ground.batches(seed), plan, seed, trainers)
    arms = []
    for name, sae in trained.items():
        k = active(name, settings)
        facts = {}
        if name in running:
            weight, width = cell(name, settings)
            error = running[name].errors().mean().item()
            facts = {"lambda2": weight, "sigma2": width, "e": error}
        arms.append(Arm(name, conversion.exact_l0(sae, ground.calibration, k), k, facts))
    return arms


def sequential_error(sae: "SAE", settings: Settings, seed: int) -> float:
    """Mean e of a meta SAE that is trained on the finished decoder for as many steps (the paper's
    sequential baseline).
    """
    rows = normalize(sae.W_dec.detach(), dim=-1)
    how = settings.training
    steps = max(1, how.steps // settings.n_primary_steps * settings.n_meta_steps)
    plan = SAETraining(steps, len(rows), how.lr, how.betas, 0, 0.0, how.dead_window, centre=False)
    meta = structure.train_meta(
        rows,
        settings.meta_d_sae,
        settings.meta_k,
        plan,
        seed + structure.META,
        settings.aux_loss_coefficient,
    )
    with torch.no_grad():
        return (rows - meta(rows)).square().sum(-1).mean().item()
