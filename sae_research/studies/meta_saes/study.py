"""Study 4 for the runner: a task per model and seed trains all arms and measures them, and one per
model and seed trains the grid.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import normalize

from sae_research import catalogue, explain, paths, prose, real_saes
from sae_research.config import Profile
from sae_research.studies.meta_saes import arms, cooccurrence, grounds, interpret, senses, structure
from sae_research.studies.meta_saes.arms import JOINT, SOLO, ZERO, Arm
from sae_research.studies.meta_saes.grounds import Ground, ModelGround, VectorGround
from sae_research.studies.meta_saes.settings import VECTORS, Settings
from sae_research.studies.runner import Result, Task

if TYPE_CHECKING:
    from sae_lens import SAE

GRID = "grid"
THINNED = 0.5
"""Share of activations kept where only firing rates change."""
N_NEIGHBOURS = 5
LATENTS = 64
"""Latents whose activations are held at once."""


def tasks(profile: Profile) -> list[Task]:
    """Every model with every seed, with all arms and with the grid.

    Seeds take turns with the toy models of the profile's `world.seeds`.
    """
    found = []
    settings = profile.meta_saes
    for name in settings.models:
        for seed in range(settings.seeds):
            model = _of_seed(name, seed, profile.world.seeds)
            task = {"model": model, "ground": name, "seed": seed}
            found.append(task)
            if name in settings.grid_models and seed < settings.grid_seeds:
                found.append({**task, "output": GRID})
    return found


def _of_seed(name: str, seed: int, toy_seeds: tuple[int, ...]) -> str:
    """The toy model of a seed; other models have one."""
    from sae_research.world import build

    if name == VECTORS or not catalogue.get(name).embedded:
        return name
    kind = name.removeprefix("world-")
    return f"world-{build.folder_name(kind, toy_seeds[seed % len(toy_seeds)])}"


def run(task: Task, profile: Profile) -> Result:
    """Train the arms of a task on identical batches and measure each."""
    seed = task["seed"]
    ground = grounds.load(task["model"], profile, seed)
    settings = ground.settings
    in_grid = task.get("output") == GRID
    others = [ZERO, "lazy meta", *arms.grid(settings)] if in_grid else settings.arms
    trained = arms.train([SOLO, JOINT, *arms.expand(others, settings)], ground, settings, seed)
    solo = trained[0].sae
    facts = []
    for arm in trained:
        found = {
            "arm": arm.name,
            "k": arm.k,
            **arm.facts,
            **measure(arm.sae, ground, settings, seed),
        }
        found["l0_calibration"] = arm.sae.cfg.metadata.calibrated_l0
        if arm.name == ZERO:
            found["same_as_solo"] = float(_same(arm.sae, solo))
        if not in_grid:
            found |= measure_structure(arm.sae, solo, ground, settings, seed)
        facts.append(found)
    tables = {"arms": pd.DataFrame(facts)}
    if not in_grid:
        tables |= make_tables(trained, ground, settings, seed)
    return Result({f"{GRID}_{n}" if in_grid else n: table for n, table in tables.items()})


def _same(first: "SAE", second: "SAE") -> bool:
    """Whether two SAEs are equal bit for bit."""
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@torch.no_grad()
def active(sae: "SAE", ground: Ground) -> Iterator[Tensor]:
    """Which latents are active on held-out activations, chunk by chunk."""
    for x in ground.chunks():
        yield sae.encode(x.to(sae.device)) > 0


@torch.no_grad()
def measure(sae: "SAE", ground: Ground, settings: Settings, seed: int) -> dict[str, float]:
    """Reconstruction, L0, co-occurrence with its null, neighbours and held-out loss."""
    from sae_research.studies.meta_saes import decomposable

    error = active_latents = tokens = square = 0.0
    total = torch.zeros(sae.cfg.d_in, dtype=torch.double)
    for x in ground.chunks():
        acts = sae.encode(x.to(sae.device))
        error += (sae.decode(acts).cpu() - x).double().square().sum().item()
        active_latents += (acts > 0).sum().item()
        tokens += len(x)
        square += x.double().square().sum().item()
        total += x.double().sum(0)
    counts = cooccurrence.count((a, a) for a in active(sae, ground))
    moved = (cooccurrence.shifted(a, seed) for a in active(sae, ground))
    null = cooccurrence.summarize(cooccurrence.count((a, a) for a in moved))
    phi = cooccurrence.summarize(counts, settings.tail)
    live = (counts.first > 0).cpu()
    rows = normalize(sae.W_dec.detach().cpu(), dim=-1)[live]
    return {
        "l0": active_latents / tokens,
        "fvu": error / (square - (total.square().sum() / tokens).item()),
        **{f"phi_{name}": value for name, value in phi.items()},
        "phi_null": null["live"],
        "phi_corrected": phi["live"] - null["live"],
        "dead": int((~live).sum()),
        "neighbour_cosine": decomposable.largest_cosine(rows).mean().item(),
        **ground.losses(sae),
    }


def measure_structure(
    sae: "SAE", solo: "SAE", ground: Ground, settings: Settings, seed: int
) -> dict[str, float]:
    """Composition rate, splits of the solo SAE's latents, merges into this one's; of the solo SAE
    phi where latents, or where tokens, are thinned.
    """
    both = zip(active(solo, ground), active(sae, ground), strict=True)
    counts = cooccurrence.count(both)
    live = (counts.second > 0).cpu()
    rows = sae.W_dec.detach().cpu()[live]
    splits, merges = split_scores(counts, solo, sae, ground, settings.split_phi)
    found = {
        "composition": structure.composition_rate(rows, settings.composition_steps, seed),
        "split": (splits > 0).double().mean().item(),
        "merged": (merges > 0).double().mean().item(),
    }
    if sae is solo:
        for name, whole in (("phi_thinned", False), ("phi_fewer_tokens", True)):
            thin = (cooccurrence.thinned(a, THINNED, seed, whole) for a in active(sae, ground))
            found[name] = cooccurrence.summarize(cooccurrence.count((a, a) for a in thin))["live"]
        found["sequential_e"] = arms.sequential_error(sae, settings, seed)
    if isinstance(ground, VectorGround):
        codes = sae.encode(ground.held_out)[:, live]
        found |= structure.recover(rows, codes, ground.directions, ground.truth)
    return found


@torch.no_grad()
def split_scores(
    counts: cooccurrence.Counts, first: "SAE", second: "SAE", ground: Ground, bar: float
) -> tuple[Tensor, Tensor]:
    """How clearly each latent of the first SAE splits in the second, and the reverse, 0 for not.

    The score is the second largest phi, the paper's. It counts where it reaches the bar and the two
    latents do not co-occur so much themselves: otherwise the second is company and no part.
    """
    found = []
    for seen, other in ((counts, second), (cooccurrence.transposed(counts), first)):
        phi, pairs = cooccurrence.second_largest(seen)
        together = cooccurrence.pair_phi(active(other, ground), pairs)
        found.append(torch.where((phi[:, 1] >= bar) & (together < bar), phi[:, 1], 0.0))
    return found[0], found[1]


def make_tables(
    trained: list[Arm], ground: Ground, settings: Settings, seed: int
) -> dict[str, pd.DataFrame]:
    """Scores of explained latents, senses of words and candidates of splits, by arm."""
    if not isinstance(ground, ModelGround):
        return {}
    tables = {"latents": [], "senses": []}
    judge = _choose_judge(ground, settings)
    found = None
    if catalogue.get(ground.model.name).embedded:
        found = senses.make_senses(ground, settings.sense_documents, seed)
    elif ground.model.name in real_saes.RECIPES:
        text = prose.load(real_saes.RECIPES[ground.model.name].text)
        found = senses.read_senses(ground, text)
    for arm in trained:
        tables["latents"].append(
            _interpret(arm.sae, ground, settings, seed, judge).assign(arm=arm.name)
        )
        if found is not None:
            tables["senses"].append(senses.score_senses(arm.sae, found).assign(arm=arm.name))
    joined = {name: pd.concat(parts) for name, parts in tables.items() if parts}
    joint = next(arm.sae for arm in trained if arm.name == JOINT)
    candidates = list_candidates(trained[0].sae, joint, ground, settings.split_phi)
    return {**joined, "candidates": candidates}


def _choose_judge(ground: ModelGround, settings: Settings) -> interpret.Judge:
    """The token rule, or a language model whose answers are recorded."""
    if settings.explainer is None:
        return interpret.TokenRule()
    answers = paths.DATA / "private" / "explanations" / f"{ground.model.name}-meta_saes.json"
    ask = explain.ask_model(catalogue.load_model(settings.explainer))
    words = ground.model.tokenizer.convert_ids_to_tokens
    return interpret.LanguageJudge(explain.recorded(ask, answers), lambda ids: words(ids.tolist()))


@torch.no_grad()
def _interpret(
    sae: "SAE", ground: ModelGround, settings: Settings, seed: int, judge: interpret.Judge
) -> pd.DataFrame:
    """Detection, fuzzing and strength ranking of a random sample of the live latents."""
    tokens, x = ground.text(settings.interpretation_tokens, settings.context_length)
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(sae.cfg.d_sae, generator=draw)
    fired = torch.cat(
        [(sae.encode(part.to(sae.device)) > 0).any(0)[None] for part in x.split(4096)]
    )
    live = fired.any(0).cpu()
    latents = order[live[order]][: settings.n_interpreted]
    rows = normalize(sae.W_dec.detach().cpu(), dim=-1)
    neighbours = interpret.nearest_neighbours(rows, live, N_NEIGHBOURS)
    reader = interpret.Interpreter(
        tokens, judge, settings.n_examples, settings.n_test_examples, seed
    )
    found = []
    for chunk in latents.split(LATENTS):
        wanted, place = torch.cat([chunk[:, None], neighbours[chunk]], 1).unique(
            return_inverse=True
        )
        parts = [sae.encode(part.to(sae.device))[:, wanted].cpu() for part in x.split(4096)]
        acts = torch.cat(parts).view(*tokens.shape, len(wanted))
        for latent, (own, *others) in zip(chunk.tolist(), place.tolist(), strict=True):
            near = (acts[:, :, others] > 0).flatten(1).any(1)
            scores = reader.score(acts[:, :, own], near, latent)
            if scores is not None:
                found.append({"latent": latent, **scores})
    return pd.DataFrame(found, columns=["latent", "detection", "fuzzing", "strength"])


@torch.no_grad()
def list_candidates(
    solo: "SAE", joint: "SAE", ground: ModelGround, bar: float, n: int = 6
) -> pd.DataFrame:
    """The solo latents that split most clearly, and the joint ones that merge so, with the tokens
    on which each is strongest (the paper's tables of cases show splits only).
    """
    counts = cooccurrence.count(zip(active(solo, ground), active(joint, ground), strict=True))
    splits, merges = split_scores(counts, solo, joint, ground, bar)
    back = cooccurrence.transposed(counts)
    rows = []
    for kind, scores, whole, parts, seen in (
        ("split", splits, solo, joint, counts),
        ("merge", merges, joint, solo, back),
    ):
        phi, others = cooccurrence.second_largest(seen)
        best = scores.topk(min(n, int((scores > 0).sum()))).indices
        for latent, word in zip(best.tolist(), ground.strongest_words(whole, best), strict=True):
            sizes = " | ".join(f"{value:.2f}" for value in phi[latent].tolist())
            pair = " | ".join(ground.strongest_words(parts, others[latent]))
            rows.append({"kind": kind, "latent": latent, "words": word, "into": pair, "phi": sizes})
    return pd.DataFrame(rows, columns=["kind", "latent", "words", "into", "phi"])
