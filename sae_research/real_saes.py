"""The SAEs of the real model: trained on real text, two of them committed, the rest rebuilt.

`data/real_saes/<model>` holds one SAE of each hook and `quality.csv`, which says how good every SAE
that a build trains is. Those that are not committed are trained where they are first asked for.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from sae_research import activations, explain, parallel, paths, prose, saes, store, training
from sae_research.training import NULLS, SAETraining
from sae_research.world.text import detectors

if TYPE_CHECKING:
    import pandas as pd
    from sae_lens import SAE
    from torch import LongTensor, Tensor

    from sae_research.models import LanguageModel

QUALITY = "quality.csv"
TOPK, JUMPRELU, RELU, WIDE = "topk", "jumprelu", "relu", "topk_wide"
LARGEST = 5
"""Coordinates of the residual, those of the largest variance, that one explained variance omits."""


@dataclass(frozen=True)
class Group:
    """SAEs that are trained in lock-step: one hook, one seed, one order of batches."""

    block: int
    """The block whose output they read."""
    seed: int
    """Seed of weights and batches."""
    kinds: tuple[str, ...]
    """Kinds of SAE."""
    nulls: bool = False
    """Whether the null dictionaries of each kind are trained beside it."""

    @property
    def hook(self) -> str:
        """Where they read the residual stream."""
        return f"blocks.{self.block}.hook_resid_post"

    def name(self, kind: str) -> str:
        """The role of an SAE: `block10_topk`, `block10_topk_1` for seed 1."""
        return f"block{self.block}_{kind}{f'_{self.seed}' if self.seed else ''}"

    def roles(self) -> dict[str, tuple[str, str]]:
        """Kind and null of every SAE of the group by role; a trained one has the null ''."""
        found = {self.name(kind): (kind, "") for kind in self.kinds}
        if self.nulls:
            found |= {
                f"{self.name(kind)}_{null}": (kind, null) for kind in self.kinds for null in NULLS
            }
        return found


@dataclass(frozen=True)
class Recipe:
    """How the SAEs of a real model are trained."""

    model: str = "smollm2-135m-instruct"
    """The model, by its name in the catalogue."""
    text: str = prose.DOCSTRINGS
    """The text, as `prose.load` takes it."""
    rows: int = 6144
    """Rows of text to train on."""
    row_tokens: int = 128
    """Tokens of a row, BOS included; BOS is never trained on."""
    calibration_rows: int = 256
    """Rows of the validation split on which thresholds are set and L0 is stated."""
    test_rows: int = 40
    """Rows of the test split on which quality is measured."""
    latents: int = 4608
    """Latents, eight times the residual's width."""
    l0: int = 32
    """Mean number of active latents per token."""
    groups: tuple[Group, ...] = (
        Group(20, 0, (TOPK,)),
        *(Group(10, seed, (TOPK,), nulls=True) for seed in range(3)),
    )
    """What a build trains and measures."""
    others: tuple[Group, ...] = (
        *(Group(10, 0, (kind,)) for kind in (WIDE, JUMPRELU, RELU)),
        Group(20, 0, (JUMPRELU,)),
    )
    """What is trained only where it is asked for by its role."""
    committed: tuple[str, ...] = ("block10_topk", "block20_topk")
    """Roles whose weights are committed."""
    training: SAETraining = field(
        default_factory=lambda: SAETraining(steps=1600, batch_size=1024, lr=2e-3, warmup_steps=100)
    )
    """How each is trained."""

    def roles(self) -> dict[str, Group]:
        """The group of every SAE by its role."""
        return {r: group for group in (*self.groups, *self.others) for r in group.roles()}


RECIPES = {recipe.model: recipe for recipe in (Recipe(),)}


def build(recipe: Recipe, n_jobs: int = 2) -> Path:
    """Train every SAE, measure each, and put the committed ones in place; resumable.

    Each group has one thread whatever `n_jobs`, so that its weights depend on the seed alone.
    """
    import pandas as pd

    Material(recipe).residuals()  # once, with every core
    folders = parallel.shards(partial(train_group, recipe), recipe.groups, n_jobs, desc="SAEs")
    measured = parallel.shards(partial(measure_group, recipe), recipe.groups, n_jobs, desc="SAEs")
    where = dict(zip(recipe.groups, folders, strict=True))
    quality = pd.concat(measured, ignore_index=True)
    target = paths.REAL_SAES / recipe.model
    with store.writing(target) as part:
        for role in recipe.committed:
            shutil.copytree(where[recipe.roles()[role]] / role, part / role)
        table = match_seeds(recipe, quality, where)
        store.write_text(part / QUALITY, table.to_csv(index=False, float_format="%.6g"))
    return target


def read_quality(model: str) -> "pd.DataFrame":
    """Quality of every SAE of a real model, as measured when it was trained."""
    import pandas as pd

    return pd.read_csv(store.verified(paths.REAL_SAES / model) / QUALITY, keep_default_na=False)


def folders(model: str) -> dict[str, Path | None]:
    """The folder of each SAE of a model by role; None for one that `train_role` has to train."""
    root = paths.REAL_SAES / model
    found: dict[str, Path | None] = {
        p.parent.name: p.parent for p in sorted(root.glob("*/cfg.json"))
    }
    if found and model in RECIPES:
        found |= {role: None for role in RECIPES[model].roles() if role not in found}
    return found


def train_role(model: str, role: str) -> Path:
    """The folder of an SAE that is not committed; its group is trained unless that was done."""
    recipe = RECIPES[model]
    return train_group(recipe, recipe.roles()[role]) / role


class Material:
    """The model, rows of text and residuals that everything of a recipe shares."""

    def __init__(self, recipe: Recipe, device: str = "cpu"):
        from sae_research import catalogue

        self.recipe = recipe
        self.model = catalogue.get(recipe.model).load(device=device)
        self.corpus = prose.load(recipe.text)

    def rows(self, split: str, n: int | None = None) -> "LongTensor":
        """The first rows of a split, by default as many as the recipe asks for."""
        recipe = self.recipe
        sizes = {"train": recipe.rows, "validation": recipe.calibration_rows}
        n = n or sizes.get(split, recipe.test_rows)
        return prose.make_rows(self.model, self.corpus.documents(split), n, recipe.row_tokens)

    @property
    def key(self) -> dict:
        """What every trained SAE depends on."""
        unlike = dict.fromkeys(("groups", "others", "committed", "test_rows"))
        shared = {**vars(self.recipe), **unlike}
        return {
            "recipe": store.fingerprint(shared),
            "model": self.model.fingerprint,
            "text": self.corpus.fingerprint,
        }

    def residuals(self) -> "dict[str, activations.StoredResiduals]":
        """Residuals of the training text by hook, computed once and kept in the cache."""
        hooks = sorted({group.hook for group in self.recipe.groups})
        folder = paths.CACHE / "residuals" / self.recipe.model
        found = activations.collect_on_disk(self.model, self.rows("train"), hooks, folder)
        return dict(zip(hooks, found, strict=True))


def train_group(recipe: Recipe, group: Group) -> Path:
    """The folder with the SAEs of a group, trained unless that was done."""
    material = Material(recipe)
    key = {**material.key, "group": store.fingerprint(group)}
    label = f"block{group.block}-{group.seed}-{'-'.join(group.kinds)}"
    folder = paths.CACHE / "real_saes" / recipe.model / label
    return store.resumed(folder, key, partial(_train_group, material, group))


def _train_group(material: Material, group: Group, folder: Path) -> None:
    recipe = material.recipe
    configs, trainers = make_configs(recipe, group, material.model.d_model)
    for config in configs.values():
        config.metadata = saes.metadata(material.model, group.hook)
    how = recipe.training
    acts = material.residuals()[group.hook]
    stream = activations.batches(acts, how.batch_size, how.steps, group.seed)
    trained = training.train(configs, stream, how, group.seed, trainers)
    calibration = activations.collect(material.model, material.rows("validation"), group.hook)
    for role, sae in trained.items():
        saes.save(training.inference(sae, calibration, recipe.l0), folder / role, half=True)


def make_configs(recipe: Recipe, group: Group, d_in: int) -> "tuple[Mapping, Mapping]":
    """Configs of a group's SAEs and the trainers of those that need their own, by role."""
    n, l0 = recipe.latents, recipe.l0
    made = {
        TOPK: lambda: (training.topk(d_in, n, l0), None),
        WIDE: lambda: (training.topk(d_in, 4 * n, l0), None),
        JUMPRELU: lambda: (training.jumprelu(d_in, n, l0), training.held_at(l0)),
        RELU: lambda: (training.relu(d_in, n), training.aimed_at(l0)),
    }
    configs, trainers = {}, {}
    for kind in group.kinds:
        configs[group.name(kind)], own = made[kind]()
        if own is not None:
            trainers[group.name(kind)] = own
    return training.with_nulls(configs, trainers) if group.nulls else (configs, trainers)


# quality


def measure_group(recipe: Recipe, group: Group) -> "pd.DataFrame":
    """Quality of every SAE of a group on test text, measured unless that was done."""
    import pandas as pd

    folder = train_group(recipe, group)
    key = {"saes": (folder / store.CHECKSUMS).read_text(), "rows": recipe.test_rows}
    key["code"] = store.sha256(Path(__file__))

    def build(part: Path) -> None:
        material = Material(recipe)
        rows = []
        for role, (kind, null) in group.roles().items():
            sae = saes.load_sae(folder / role)
            about = {"role": role, "hook": group.hook, "kind": kind, "null": null}
            about |= {"seed": group.seed, "latents": sae.cfg.d_sae}
            rows.append(about | measure(material.model, sae, material.rows("test")))
        table = pd.DataFrame(rows)
        store.write_text(part / QUALITY, table.to_csv(index=False, float_format="%.6g"))

    place = folder.with_name(f"{folder.name}-quality")
    return pd.read_csv(store.resumed(place, key, build) / QUALITY, keep_default_na=False)


def measure(model: "LanguageModel", sae: "SAE", tokens: "LongTensor") -> dict[str, float]:
    """`saes.quality`, explained variance without the residual's largest coordinates, and the mean
    F1 of the best rule on tokens for each latent.
    """
    kept = model.content(tokens) & (tokens != model.bos)
    half = (torch.arange(len(tokens)) % 2 == 0)[:, None].expand_as(kept)[kept.cpu()]
    x = activations.collect(model, tokens, saes.hook_of(sae))
    spread = x.var(0)
    others = spread.argsort()[:-LARGEST]
    rules = explain.score_token_rules(
        detectors.encode(sae, x), tokens[kept].cpu(), tokens.roll(1, 1)[kept].cpu(), half
    )
    return {
        **saes.quality(model, sae, tokens),
        "ev_without_largest": explained_variance(sae, x, others),
        "share_of_largest": 1 - (spread[others].sum() / spread.sum()).item(),
        "token_rule_f1": rules.mean().item(),
    }


@torch.no_grad()
def explained_variance(sae: "SAE", x: "Tensor", coordinates: "LongTensor") -> float:
    """Explained variance about the mean over some coordinates of the residual."""
    error = sum(
        (sae(part) - part)[:, coordinates].double().square().sum().item() for part in x.split(4096)
    )
    kept = x[:, coordinates]
    return 1 - error / (kept - kept.mean(0)).double().square().sum().item()


def match_seeds(
    recipe: Recipe, table: "pd.DataFrame", where: Mapping[Group, Path]
) -> "pd.DataFrame":
    """The table with `pw_mcc`: mean over the other seeds of an SAE's mean matched cosine."""
    own = recipe.roles()
    alike = {row.role: (row.hook, row.kind, row.null) for row in table.itertuples()}
    found: dict[str, list[float]] = {role: [] for role in alike}
    for one, other in combinations(alike, 2):
        if alike[one] == alike[other]:
            pair = [saes.load_sae(where[own[role]] / role) for role in (one, other)]
            mean = float(np.mean(saes.match_decoders(*pair)))
            found[one].append(mean)
            found[other].append(mean)
    return table.assign(pw_mcc=[float(np.mean(v)) if v else "" for v in found.values()])
