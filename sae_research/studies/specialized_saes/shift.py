"""SHIFT (Table 1): a probe that learned gender for profession loses the latents that are about
gender. Twelve rows of the paper, with random ablation and the feature skyline beside them.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import LongTensor, Tensor

from sae_research import circuits, steering
from sae_research.circuits import ERROR, Circuit, Probe, pool
from sae_research.errors import ResearchError
from sae_research.models import Edit, LanguageModel
from sae_research.studies.specialized_saes.settings import Shift
from sae_research.studies.specialized_saes.tails import Mass, read_latents
from sae_research.world.text.bias_case import BiasData, Biographies

if TYPE_CHECKING:
    from sae_lens import SAE

Edits = dict[str, Edit]
Chosen = dict[str, list[int]]
"""Latents to ablate, by hook."""


def fit_probe(x: Tensor, y: LongTensor, settings: Shift, seed: int) -> Probe:
    """A logistic probe on centred features: one pass of AdamW."""
    random = torch.Generator().manual_seed(seed)
    probe = Probe(torch.zeros(x.shape[1]), torch.zeros(1), x.mean(0))
    parameters = [probe.weight.requires_grad_(), probe.bias.requires_grad_()]
    optimizer = torch.optim.AdamW(parameters, lr=settings.probe_lr)
    for rows in torch.randperm(len(x), generator=random).split(settings.probe_batch):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            probe.logits(x[rows]), y[rows].float()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Probe(probe.weight.detach(), probe.bias.detach(), probe.centre)


@dataclass
class Case:
    """One model with its biographies and SAEs."""

    model: LanguageModel
    data: BiasData
    settings: Shift
    seed: int = 0

    def features(self, texts: Biographies, edits: Edits | None = None, batch: int = 256) -> Tensor:
        """What the probe reads: the mean residual over text [rows, d]."""
        hook = self.settings.probe_hook
        parts = texts.tokens.split(batch)
        return torch.cat([pool(self.model.residual(p, hook, edits)).float() for p in parts])

    def grade(self, probes: list[Probe], x: Tensor) -> list[dict]:
        """Accuracy on profession, agreement with gender, and the worst of the four groups, with
        its bootstrap interval over biographies, for each probe.
        """
        test = self.data.test
        rows = []
        for seed, probe in enumerate(probes):
            said = (probe.logits(x) > 0).long()
            right = (said == test.profession).double()
            groups = [
                right[(test.gender == g) & (test.profession == p)] for g in (0, 1) for p in (0, 1)
            ]
            rows.append(
                {
                    "probe_seed": seed,
                    "profession": right.mean().item(),
                    "gender": (said == test.gender).double().mean().item(),
                    "worst": min(group.mean().item() for group in groups),
                    **_bootstrap_worst(groups, seed),
                }
            )
        return rows

    def fit(self, texts: Biographies, edits: Edits | None = None) -> list[Probe]:
        """Probes of profession, one for each seed."""
        x = self.features(texts, edits)
        seeds = range(self.settings.probe_seeds)
        return [fit_probe(x, texts.profession, self.settings, seed) for seed in seeds]

    def circuit(self, saes: "Mapping[str, SAE]", probe: Probe, by_gender: bool = False) -> Circuit:
        """Effects on a probe's decision over the ambiguous texts it learned from, which is all that
        SHIFT may see, or for the skylines on gender over balanced ones.

        All groups have as many texts: otherwise latents that are always active have an effect.
        """
        texts = self.data.balanced if by_gender else self.data.ambiguous
        groups = 2 * texts.gender + texts.profession
        present = groups.unique().tolist()
        n = max(1, self.settings.examples // len(present))
        texts = texts[torch.cat([(groups == g).nonzero()[:n, 0] for g in present])]
        labels = texts.gender if by_gender else texts.profession
        return Circuit(self.model, saes, probe, self.settings.probe_hook, texts.tokens, labels)


def _bootstrap_worst(groups: list[Tensor], seed: int, draws: int = 1000) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    drawn = [rng.binomial(len(g), g.mean().item(), draws) / len(g) for g in groups]
    low, high = np.quantile(np.min(drawn, axis=0), [0.025, 0.975])
    return {"worst_low": float(low), "worst_high": float(high)}


def ablate(saes: "Mapping[str, SAE]", chosen: Chosen) -> Edits:
    """Set latents to zero and keep each SAE's error."""
    return {
        hook: steering.edit(saes[hook], steering.clamp(latents, 0.0))
        for hook, latents in chosen.items()
        if latents
    }


def judge_latents(
    case: Case, name: str, saes: "Mapping[str, SAE]", most: int = 1000
) -> pd.DataFrame:
    """For every live latent whether it is about gender, by the rule and its overrides.

    The rule: its mean activation tells the gender within each profession (AUROC), or its strongest
    token types are all words of gender.
    """
    settings, texts = case.settings, case.data.balanced[:most]
    tables = []
    for hook, sae in saes.items():
        x = case.model.residual(texts.tokens, hook)[:, 1:]
        acts, _ = read_latents(sae, x.flatten(0, 1))
        size = x.shape[1]
        mean = torch.zeros(len(texts), acts.n_latents)
        mean.index_put_((acts.token // size, acts.latent), acts.value, accumulate=True)
        auroc = _auroc_within(mean, texts.gender, texts.profession)
        tokens = texts.tokens[:, 1:].flatten()
        lexical = _only_gender_words(Mass.of(acts, tokens, int(tokens.max()) + 1), case)
        live = torch.bincount(acts.latent, minlength=acts.n_latents) > 0
        table = pd.DataFrame({"auroc": auroc.numpy(), "lexical": lexical.numpy()})
        table["gender"] = (table.auroc >= settings.auroc) | table.lexical
        table = table.rename_axis("latent").reset_index()[live.numpy()]
        tables.append(table.assign(sae=name, hook=hook))
    return _override(pd.concat(tables, ignore_index=True), settings.overrides)


def _auroc_within(values: Tensor, gender: LongTensor, profession: LongTensor) -> Tensor:
    """How well each column tells the gender, the lower of both professions, whichever sign."""
    from scipy.stats import rankdata

    found = []
    for p in (0, 1):
        rows = profession == p
        ranks = torch.from_numpy(rankdata(values[rows].numpy(), axis=0))
        women = gender[rows] == 1
        n, m = int(women.sum()), int((~women).sum())
        found.append((ranks[women].sum(0) - n * (n + 1) / 2) / (n * m))
    same = (found[0] - 0.5) * (found[1] - 0.5) > 0
    sizes = torch.stack([(f - 0.5).abs() for f in found]).min(0).values
    return torch.where(same, 0.5 + sizes, 0.5)


def _only_gender_words(mass: Mass, case: Case) -> Tensor:
    """Whether all of a latent's strongest token types (with 5 % of its mass) are gender words."""
    words = torch.tensor(sorted(case.data.gender_words))
    strong = mass.value >= 0.05 * mass.total[mass.latent]
    about = torch.isin(mass.type, words)
    other = torch.zeros(len(mass.total), dtype=torch.bool)
    other[mass.latent[strong & ~about]] = True
    some = torch.zeros_like(other)
    some[mass.latent[strong & about]] = True
    return some & ~other


def _override(table: pd.DataFrame, path: str | None) -> pd.DataFrame:
    """The table with what a person decided: rows `{sae, hook, latent, gender}` of a YAML file."""
    if path is None:
        return table
    import yaml

    try:
        decided = yaml.safe_load(Path(path).read_text()) or []
        for row in decided:
            here = (table.sae == row["sae"]) & (table.hook == row["hook"])
            table.loc[here & (table.latent == row["latent"]), "gender"] = bool(row["gender"])
    except (OSError, KeyError, TypeError, yaml.YAMLError) as error:
        raise ResearchError(
            f"the overrides in {path} cannot be read ({error}); give a list of rows with sae, "
            "hook, latent and gender."
        ) from error
    return table


def choose_gender_latents(nodes: pd.DataFrame, judged: pd.DataFrame) -> pd.DataFrame:
    """The latents of the circuit that are about gender, strongest first."""
    about = judged[judged.gender][["hook", "latent"]]
    return nodes.merge(about, on=["hook", "latent"])


def first(nodes: pd.DataFrame, n: int) -> Chosen:
    """The n strongest nodes by hook, errors left out."""
    rows = nodes[nodes.latent != ERROR].head(n)
    return {hook: rows[rows.hook == hook].latent.tolist() for hook in rows.hook.unique()}


def compress(sae: "SAE", acts_of: Tensor, share: float) -> "SAE":
    """A dictionary of the latents that fire most often on residuals `acts_of` [tokens, d]."""
    fires = (sae.encode(acts_of) > 0).sum(0)
    kept = fires.argsort(descending=True, stable=True)[: max(1, round(share * len(fires)))]
    cfg = copy.copy(sae.cfg)
    cfg.d_sae = len(kept)
    if hasattr(cfg, "k"):
        cfg.k = min(cfg.k, len(kept))
    own = type(sae)(cfg)
    state = sae.state_dict()
    cut = {
        "W_enc": state["W_enc"][:, kept],
        "W_dec": state["W_dec"][kept],
        "b_enc": state["b_enc"][kept],
    }
    own.load_state_dict({**state, **cut})
    return own.eval().requires_grad_(False)


def run_table(
    case: Case, general: "Mapping[str, SAE]", special: "Mapping[str, SAE]"
) -> dict[str, pd.DataFrame]:
    """Table 1, with the latents judged and the circuits behind it."""
    data, settings = case.data, case.settings
    plain = case.fit(data.ambiguous)
    x = case.features(data.test)
    rows = {"Original": case.grade(plain, x), "Oracle": case.grade(case.fit(data.balanced), x)}
    rows["CBP"] = _run_bottleneck(case)
    rows["Neuron skyline"] = _run_neurons(case, general, plain)
    small = {
        kind: {
            hook: compress(
                sae,
                case.model.residual(data.ambiguous.tokens[:200], hook).flatten(0, 1),
                settings.compressed,
            )
            for hook, sae in saes.items()
        }
        for kind, saes in (("Comp. GSAE", general), ("Comp. SSAE", special))
    }
    sets = {"GSAE": general, "SSAE": special, **small}
    found = {name: _find_gender(case, name, saes, plain[0]) for name, saes in sets.items()}
    counts = {name: len(f["gender"]) for name, f in found.items()}
    tables = []
    for pair in (("GSAE", "SSAE"), ("Comp. GSAE", "Comp. SSAE")):
        n = settings.n_ablated or min(counts[name] for name in pair)
        for name in pair:
            rows |= _run_shift(case, name, sets[name], first(found[name]["gender"], n), plain)
    for name in ("GSAE", "SSAE"):
        every = first(found[name]["gender"], counts[name])
        edited = case.features(data.test, ablate(sets[name], every))
        rows[f"{name} SHIFT, all it finds"] = case.grade(plain, edited)
        by_gender = circuits.find_nodes(
            case.circuit(sets[name], plain[0], True), settings.steps, 0.0
        )
        chosen = first(by_gender, min(settings.skyline, len(by_gender)))
        rows[f"Feature skyline ({name})"] = case.grade(
            plain, case.features(data.test, ablate(sets[name], chosen))
        )
    n = settings.n_ablated or min(counts["GSAE"], counts["SSAE"])
    rows["Random ablation"] = _run_random(case, special, n, plain)
    tables = [pd.DataFrame(graded).assign(method=name) for name, graded in rows.items()]
    return {
        "shift": pd.concat(tables, ignore_index=True),
        **{
            kind: pd.concat(
                [f[kind].assign(sae=name) for name, f in found.items()], ignore_index=True
            )
            for kind in ("nodes", "edges", "judged", "circuit")
        },
    }


def _find_gender(case: Case, name: str, saes: "Mapping[str, SAE]", probe: Probe) -> dict:
    """The circuit of a probe and which of its latents are about gender."""
    settings = case.settings
    circuit = case.circuit(saes, probe)
    nodes = circuits.find_nodes(circuit, settings.steps, settings.node_threshold)
    judged = judge_latents(case, name, saes)
    gender = choose_gender_latents(nodes, judged)
    facts = {"n_nodes": len(nodes), "n_gender": len(gender), **circuit.faithfulness(nodes)}
    return {
        "nodes": nodes.assign(gender=_is_in(nodes, gender)),
        "edges": circuits.find_edges(circuit, nodes, settings.edge_threshold),
        "judged": judged[judged.gender],
        "gender": gender,
        "circuit": pd.DataFrame([facts]),
    }


def _is_in(nodes: pd.DataFrame, chosen: pd.DataFrame) -> list[bool]:
    wanted = set(zip(chosen.hook, chosen.latent, strict=True))
    return [pair in wanted for pair in zip(nodes.hook, nodes.latent, strict=True)]


def _run_shift(
    case: Case, name: str, saes: "Mapping[str, SAE]", chosen: Chosen, plain: list[Probe]
) -> dict:
    edits = ablate(saes, chosen)
    x = case.features(case.data.test, edits)
    n = sum(map(len, chosen.values()))
    graded = {f"{name} SHIFT": case.grade(plain, x)}
    graded[f"{name} SHIFT+retrain"] = case.grade(case.fit(case.data.ambiguous, edits), x)
    return {method: [{**row, "n_ablated": n} for row in rows] for method, rows in graded.items()}


def _run_random(case: Case, saes: "Mapping[str, SAE]", n: int, plain: list[Probe]) -> list[dict]:
    """As many random live latents of the same SAEs, drawn twice for every probe seed."""
    rows = []
    texts = case.data.balanced[: case.settings.examples]
    live = [
        (hook, latent)
        for hook, sae in saes.items()
        for latent in (sae.encode(case.model.residual(texts.tokens, hook)[:, 1:]) > 0)
        .any(0)
        .any(0)
        .nonzero()[:, 0]
        .tolist()
    ]
    for i in range(2 * len(plain)):
        seed = i % len(plain)
        rng = np.random.default_rng([case.seed, i])
        drawn = [live[i] for i in rng.choice(len(live), min(n, len(live)), replace=False)]
        chosen = {hook: [i for h, i in drawn if h == hook] for hook in saes}
        x = case.features(case.data.test, ablate(saes, chosen))
        rows.append({**case.grade([plain[seed]], x)[0], "probe_seed": seed, "n_ablated": n})
    return rows


def _run_bottleneck(case: Case) -> list[dict]:
    """Concept bottleneck: the probe reads cosines with the vectors of keywords."""
    data, model = case.data, case.model
    starts = torch.full_like(data.keywords, model.bos)
    words = model.residual(torch.stack([starts, data.keywords], 1), case.settings.probe_hook)[:, -1]
    words = torch.nn.functional.normalize(words - words.mean(0), dim=1)

    def cosines(texts: Biographies) -> Tensor:
        x = case.features(texts)
        return torch.nn.functional.normalize(x - centre, dim=1) @ words.T

    centre = case.features(data.ambiguous).mean(0)
    z = cosines(data.ambiguous)
    seeds = range(case.settings.probe_seeds)
    probes = [fit_probe(z, data.ambiguous.profession, case.settings, seed) for seed in seeds]
    return case.grade(probes, cosines(data.test))


def _run_neurons(case: Case, hooks: Mapping[str, object], plain: list[Probe]) -> list[dict]:
    """Coordinates of the residual with the largest effect on gender, set to their mean."""
    circuit = case.circuit(hooks, plain[0], by_gender=True)
    effects, means = [], {}
    for hook in hooks:
        x = circuit.residuals[hook].detach().clone().requires_grad_()
        m = circuit.metric(circuit._above(hook, x, circuit.depth)).sum()
        (slope,) = torch.autograd.grad(m, x)
        means[hook] = x.detach()[:, 1:].mean((0, 1))
        effect = (slope * (means[hook] - x.detach()))[:, 1:].sum(1).mean(0)
        effects += [(abs(e), hook, i) for i, e in enumerate(effect.tolist())]
    chosen = sorted(effects, reverse=True)[: case.settings.skyline]

    def mean_ablation(hook: str) -> Edit:
        at = torch.tensor([i for _, h, i in chosen if h == hook], dtype=torch.long)

        def edit(residual: Tensor) -> Tensor:
            edited = residual.clone()
            edited[:, 1:, at] = means[hook][at]
            return edited

        return edit

    return case.grade(plain, case.features(case.data.test, {h: mean_ablation(h) for h in hooks}))
