"""SAEs of the toy text model in three seeds, beside three kinds of null dictionary.

What a null dictionary shows too says nothing about directions that training found.
"""

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from sae_research import activations, models, saes, store, training
from sae_research.world import build, toy_saes
from sae_research.world.text.documents import make_mixture, make_rows
from sae_research.world.text.model import TextSettings

if TYPE_CHECKING:
    import pandas as pd
    from sae_lens import SAE

    from sae_research.world.text.checks import ToyText

SEEDS = (0, 1, 2)
"""Seeds of initialisation and of the order of batches; the language model is the first one."""
TRAINED = "trained"


def train(settings: TextSettings, model_folder: Path, folder: Path) -> None:
    """The TopK SAE of the later hook and its nulls in every seed, into `folder`/kind-seed."""
    recipe = settings.saes
    model = models.load_model(model_folder)
    hook = recipe.hooks[1]
    rng = np.random.default_rng([0, 2])
    acts, calibration = (
        activations.collect(
            model, torch.from_numpy(make_rows(n, rng, settings.corpus).tokens).long(), hook, batch=256
        )
        for n in (recipe.documents, recipe.calibration)
    )
    config = training.topk(
        model.d_model, recipe.latents, recipe.l0, metadata=saes.metadata(model, hook)
    )
    for seed in SEEDS:
        configs, trainers = training.with_nulls({TRAINED: config})
        batches = activations.batches(acts, recipe.training.batch_size, recipe.training.steps, seed)
        found = training.train(configs, batches, recipe.training, seed, trainers)
        for name, sae in found.items():
            saes.save(training.inference(sae, calibration), folder / f"{name}-{seed}", half=True)


def load(model_folder: Path) -> "dict[str, dict[int, SAE]]":
    """SAEs by kind and seed, trained first unless that has been done (two minutes)."""
    settings = TextSettings()
    key = build.load_recipe("text", 0)[2] | {
        "model": (model_folder / store.CHECKSUMS).read_text(),
        "seeds": SEEDS,
    }
    folder = store.resumed(
        build.SCRATCH.with_name("toy_saes") / "nulls",
        key,
        lambda part: train(settings, model_folder, part),
    )
    found: dict[str, dict[int, SAE]] = {}
    for name, sae in toy_saes.load_saes(folder).items():
        kind, _, seed = name.removeprefix(f"{TRAINED}_").rpartition("-")
        found.setdefault(kind, {})[int(seed)] = sae
    return found


def measure(toy: "ToyText", found: "Mapping[str, Mapping[int, SAE]]") -> "pd.DataFrame":
    """Each SAE and null on fresh text, a row for each kind and seed."""
    import pandas as pd

    from sae_research.world.text.checks import measure_truth

    held = make_mixture(max(64, toy.size // 4), [toy.seed, 6], toy.settings.corpus)
    tokens = torch.from_numpy(held.tokens).long()
    flat = {(kind, seed): sae for kind, seeds in found.items() for seed, sae in seeds.items()}
    truth = {
        (*row["sae"], row["text"], row["group"]): row["F1 at least .7"]
        for row in measure_truth(toy, flat, toy.later)
    }
    rows = []
    for (kind, seed), sae in flat.items():
        quality = saes.quality(toy.model, sae, tokens)
        rows.append(
            {
                "kind": kind,
                "seed": seed,
                "explained variance": quality["explained_variance"],
                "CE recovered": quality["ce_recovered"],
                "dead": quality["dead_share"],
                "head of physics": truth[kind, seed, "physics", "physics rank 1-5"],
                "general concepts": truth[kind, seed, "mixed", "general concepts"],
                "actions": truth[kind, seed, "mixed", "actions"],
            }
        )
    return pd.DataFrame(rows)


def tabulate(measured: "pd.DataFrame", found: "Mapping[str, Mapping[int, SAE]]") -> "pd.DataFrame":
    """Mean and range over the seeds of each kind, and PW-MCC over pairs of seeds."""
    table = measured.drop(columns="seed").groupby("kind", sort=False)
    shown = table.agg(lambda x: f"{x.mean():.3f} ({x.min():.3f} to {x.max():.3f})")
    for kind, seeds in found.items():
        matched = [saes.match_decoders(*pair).mean() for pair in combinations(seeds.values(), 2)]
        shown.loc[kind, "PW-MCC"] = f"{np.mean(matched):.3f}"
    return shown.rename(index=lambda kind: kind.replace("_", " "))
