"""The tier of synthetic vectors: sums of known directions, with SAELens' generators.

Every vector has the same number of directions, so that a high loss means a rare direction. The
dictionary and the SAEs draw from different seeds: with one seed the start would be the truth.
"""

from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch import Tensor

from sae_research import activations, term, training
from sae_research.studies.specialized_saes.settings import Synthetic
from sae_research.tilt import Tilt
from sae_research.training import SAETraining

if TYPE_CHECKING:
    from sae_lens import SAE

BANDS = ("head", "middle", "tail")


def make_vectors(
    settings: Synthetic, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Vectors and which directions are in them, for `general`, `domain` and `test` (domain) text,
    and the directions themselves, the domain's last and by falling frequency.
    """
    from sae_lens.synthetic import FeatureDictionary, ZipfianFiringProbabilityConfig

    n = settings.general + settings.domain
    dictionary = FeatureDictionary(n, settings.d, initializer=None, seed=10_000 + seed)
    zipf = ZipfianFiringProbabilityConfig(max_prob=0.3, min_prob=0.002)
    general, domain = zipf.generate(settings.general), zipf.generate(settings.domain)
    random = torch.Generator().manual_seed(20_000 + seed)
    vectors, on = {}, {}
    for name in ("general", "domain", "test"):
        odds = torch.zeros(settings.vectors, n)
        rare = torch.ones(settings.vectors, dtype=torch.bool)
        if name == "general":
            rare = torch.rand(settings.vectors, generator=random) < settings.domain_share
        odds[rare, settings.general :] = domain
        odds[~rare, : settings.general] = general
        chosen = torch.multinomial(odds, settings.active, generator=random)
        size = 1 + 0.3 * torch.randn(chosen.shape, generator=random)
        acts = torch.zeros_like(odds).scatter_(1, chosen, size.clamp(min=0.2))
        on[name] = acts > 0
        with torch.no_grad():
            vectors[name] = dictionary(acts)
    return vectors, on, dictionary.feature_vectors.detach()


def run_tier(settings: Synthetic, seed: int) -> pd.DataFrame:
    """Domain recall, cosine and error of fine-tunings with every tilt at one L0, and of the general
    SAE and its continuation on general vectors.
    """
    vectors, on, directions = make_vectors(settings, seed)
    plan = SAETraining(steps=settings.steps, lr=3e-3, warmup_steps=20)
    shape = ("topk", settings.d, settings.latents, settings.active)
    tune = SAETraining(steps=settings.steps, lr=1e-3, warmup_steps=0, centre=False)

    def train(text: str, plan: SAETraining, tilts: dict[str, Tilt], start=None) -> dict:
        configs = {name: term.config(*shape) for name in tilts}
        trainers = {name: term.tilted(tilt, start) for name, tilt in tilts.items()}
        batches = activations.batches(vectors[text], plan.batch_size, plan.steps, seed)
        return training.train(configs, batches, plan, seed, trainers)

    general = train("general", plan, {"general": Tilt()})
    start = general["general"].state_dict()
    unit = "effective sample size"
    tilts = {f"{share:g}": Tilt(t=share, unit=unit) for share in settings.shares}
    saes = general | train("general", tune, {"continued": Tilt()}, start)
    saes |= train("domain", tune, tilts | {"1e9": Tilt(t=1e9)}, start)
    rows = [
        {"sae": name, **row}
        for name, sae in saes.items()
        for row in grade(sae, vectors["test"], on["test"], directions, settings)
    ]
    return pd.DataFrame(rows)


@torch.no_grad()
def grade(sae: "SAE", x: Tensor, on: Tensor, directions: Tensor, settings: Synthetic) -> list[dict]:
    """For each band of the domain's directions: mean cosine to the best decoder row and recall, the
    share of their occurrences in which that latent fires.
    """
    unit = torch.nn.functional.normalize(sae.W_dec, dim=1)
    cosine, latent = (directions[settings.general :] @ unit.T).max(1)
    acts = sae.encode(x)
    error = (sae.decode(acts) - x).square().sum(1)
    fires = (acts > 0)[:, latent] & on[:, settings.general :]
    recall = fires.sum(0) / on[:, settings.general :].sum(0).clamp(min=1)
    shared = {"error": error.mean().item(), "error_max": error.max().item()}
    return [
        {"band": band, "cosine": c.mean().item(), "recall": r.mean().item(), **shared}
        for band, c, r in zip(BANDS, cosine.tensor_split(3), recall.tensor_split(3), strict=True)
    ]
