"""One dictionary through the whole study: contexts, features, labels at all doses, predictors, forecasts, one table."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from sae_research import saes, steering
from sae_research.errors import ResearchError
from sae_research.last_token import LastToken
from sae_research.studies.side_effects import forecasters, pool, predictors
from sae_research.studies.side_effects.labels import (
    Measured,
    labels,
    matched_random,
    measure,
    panel_labels,
    quantile_tau,
)
from sae_research.studies.side_effects.pool import Pool

if TYPE_CHECKING:
    import pandas as pd
    from sae_lens import SAE

    from sae_research.catalogue import ModelSpec
    from sae_research.models import LanguageModel
    from sae_research.studies.side_effects.settings import Settings

LABELS = (
    "C",
    "C_per_E",
    "E",
    "E_cv",
    "S",
    "S_abs",
    "S_loo",
    "pair",
    "pair_abs",
    "L2",
    "moved",
    "KL",
    "KL_per_E",
)
FORECASTS = (
    "C^identity",
    "C^jacobian",
    "C^mean_jacobian",
    "C^random_map",
    "E^jacobian",
    "S_abs^jacobian",
    "C_per_E^jacobian",
)
IDENTITY_CONTEXTS = 128
GATE_BAND = (0.002, 0.5)
"""Final-token frequencies of the eligible features that the catalogue counts."""
FEWER = (4, 2)
"""Reliability is also measured with these fractions of the contexts: how it grows with them."""


@dataclass
class Screened:
    """A dictionary with everything that was measured on its features."""

    frame: "pd.DataFrame"
    """One row a feature: predictors, labels, labels at other doses (`C@2`), of a matched random direction (`C@random`),
    on two disjoint pools of contexts (`C@a`, `C@b`), forecasts (`C^identity`), natural activation in its contexts."""
    facts: dict[str, float]
    """What was loaded and chosen: L0, eligible features, panel, tau, dose, contexts."""
    pool: Pool
    """The clean pass."""
    engine: LastToken
    """Edits at the primary hook, reads at the downstream one."""
    directions: torch.Tensor
    """[features, d]: c d_f, what steering adds."""
    panel: torch.Tensor
    """Downstream latents in which effects are counted."""
    measured: Measured
    """The main dose, feature by feature and context by context."""
    W: torch.Tensor
    """The unembedding of the direct logits."""


def hooks_of(lens: "LanguageModel", primary: "SAE", downstream: "SAE") -> tuple[str, str]:
    """Both hooks under the bridge's names, once both dictionaries fit the model and the second lies above the first."""
    first, second = saes.check_fit(lens, primary), saes.check_fit(lens, downstream)
    if lens.depth(second) < lens.depth(first):
        raise ResearchError(
            f"the downstream dictionary reads '{second}', below the edit at '{first}'; exchange them."
        )
    return first, second


def features_of(sae: "SAE", features: Sequence[int]) -> torch.Tensor:
    """The given feature numbers, if the dictionary has them."""
    chosen = torch.as_tensor(features, dtype=torch.long)
    wrong = chosen[(chosen < 0) | (chosen >= sae.cfg.d_sae)]
    if len(wrong):
        raise ResearchError(
            f"feature {int(wrong[0])} is out of range; this SAE has features 0 to {sae.cfg.d_sae - 1}."
        )
    return chosen


def dose(
    settings: "Settings", found: Pool, activations: torch.Tensor, directions: torch.Tensor
) -> float:
    """c: median over features of max(q95, 1), q95 over all contexts; or a share of the mean residual's length."""
    if settings.residual_share is not None:
        return settings.residual_share * float(
            found.last.norm(dim=1).mean() / directions.norm(dim=1).median()
        )
    q95 = torch.quantile(activations.float(), 0.95, dim=0).clamp(min=1.0)
    return settings.dose * float(q95.median())


def gate(subject: "ModelSpec", facts: dict[str, float], slack: float = 0.05) -> list[str]:
    """Compare L0 and eligible features with what a replication measured; stop a run on the wrong weights.

    `eligible` counts features in the band of the catalogue's numbers, `GATE_BAND`, whatever band the run samples from.
    """
    expected = {f"l0_{role}": value for role, value in subject.mean_l0.items()}
    if subject.eligible is not None and facts["contexts"] == 2048:
        expected["eligible"] = subject.eligible
    for name, value in expected.items():
        allowed = slack * value if name != "eligible" else 3 * slack * value
        if abs(facts[name] - value) > allowed:
            raise ResearchError(
                f"{subject.name} shows {name} {facts[name]:.1f} where {value:g} is expected: the model or SAE is not "
                "the intended one, or the contexts differ; check release, hook and BOS."
            )
    return [f"{name}: {facts[name]:.1f} (expected {value:g})" for name, value in expected.items()]


def screen_dictionary(
    lens: "LanguageModel",
    primary: "SAE",
    downstream: "SAE",
    tokens: torch.Tensor,
    settings: "Settings",
    *,
    seed: int = 0,
    folded: bool = True,
    features: Sequence[int] | None = None,
    panel: torch.Tensor | None = None,
    tau: float | None = None,
    c: float | None = None,
    prompt: torch.Tensor | None = None,
    expected: "ModelSpec | None" = None,
) -> Screened:
    """Label, predict and forecast features of `primary`; `panel`, `tau` and `c` hold another run's choice fixed.

    `expected` is the catalogue's entry that model and dictionary must agree with before any feature is steered.
    """
    import pandas as pd

    hooks = hooks_of(lens, primary, downstream)
    engine = LastToken(lens, hooks[0], (hooks[1],))
    found = pool.read(engine, primary, downstream, tokens)
    if expected is not None:
        clean = {"l0_primary": found.l0[0], "l0_downstream": found.l0[1], "contexts": len(tokens)}
        gate(expected, clean | {"eligible": len(pool.eligible(found, GATE_BAND))})
    if features is None:
        chosen = pool.sample(
            found, settings.band, settings.features, settings.protocol, seed, settings.fewest
        )
    else:
        chosen = features_of(primary, features)
    chosen = chosen.to(found.last.device)
    activations = pool.reader(primary, chosen)(found.last)
    panel = pool.panel(found, settings.panel) if panel is None else panel
    codes = pool.reader(downstream, panel)
    decoder = steering.directions(primary)[chosen].float()
    c = dose(settings, found, activations, decoder) if c is None else c
    directions = c * decoder
    contexts = pool.mixed_contexts(activations, settings.each, seed)
    if tau is None:
        tau = settings.tau
        if settings.panel_share is not None:
            some = slice(None, None, max(1, len(chosen) // 24))
            tau = quantile_tau(
                engine, codes, tokens, directions[some], contexts[some, ::4], settings.panel_share
            )
            tau = max(tau, 1e-6)
    W = predictors.unembedding(lens, folded)
    frame = predictors.table(
        primary, found, chosen, activations, W, settings.protocol, settings.panel
    )
    own = activations.T.cpu().gather(1, contexts)

    measured, columns = _all_doses(
        engine, codes, tokens, directions, contexts, settings, tau, seed, len(panel)
    )
    columns |= {"natural_mean": own.mean(1).numpy(), "natural_max": own.max(1).values.numpy()}
    columns |= _halves(engine, codes, found, activations, directions, settings, tau, seed)
    if prompt is None:
        prompt = tokens[:1, : max(2, settings.length // 8)]
    columns |= _forecasts(engine, codes, found, directions, settings, tau, seed)
    strength = 10 * activations.max(0).values / c
    columns["output_score"] = forecasters.output_score(engine, prompt, directions, strength, W)
    frame = pd.concat([frame, pd.DataFrame(columns, index=frame.index)], axis=1).astype(float)
    facts = {
        "l0_primary": found.l0[0],
        "l0_downstream": found.l0[1],
        "latents": primary.cfg.d_sae,
        "eligible": len(pool.eligible(found, settings.band)),
        "features": len(chosen),
        "contexts": len(tokens),
        "steered_rows": contexts.numel(),
        "jacobian_rows": 2 * lens.d_model * min(settings.linear_contexts, len(tokens)),
        "panel": len(panel),
        "tau": tau,
        "c": c,
        "residual_norm": float(found.last.norm(dim=1).mean()),
        "step_norm": float(directions.norm(dim=1).median()),
    }
    return Screened(frame, facts, found, engine, directions, panel, measured, W)


def _all_doses(
    engine, codes, tokens, directions, contexts, settings, tau, seed, panel
) -> tuple[Measured, dict]:
    """All doses and the matched random directions in one sweep over the clean cache."""
    F = len(directions)
    multiples = (1.0, *settings.doses)
    moves = torch.cat([*(m * directions for m in multiples), matched_random(directions, seed)])
    taus = (tau, *(tau * t for t in settings.taus))
    sizes = tuple(sorted({max(1, panel // 4), max(1, panel // 2)}))
    every = measure(
        engine, codes, tokens, moves, contexts.repeat(len(multiples) + 1, 1), taus, sizes
    )
    blocks = {f"@{m:g}": i for i, m in enumerate(multiples) if i} | {"@random": len(multiples)}
    first = _rows(every, slice(0, F))
    columns = labels(engine, first)
    for i, t in enumerate(settings.taus, start=1):
        columns[f"C@tau{t:g}"] = first.counts[:, :, i].mean(1).cpu().numpy()
    for i, size in enumerate(sizes):
        columns[f"C@panel{size}"] = first.panels[:, :, i].mean(1).cpu().numpy()
    for suffix, block in blocks.items():
        found = labels(engine, _rows(every, slice(block * F, (block + 1) * F)), divergence=False)
        columns |= {
            f"{name}{suffix}": found[name] for name in ("C", "C_per_E", "E", "S_abs", "S_loo")
        }
    return first, columns


def _rows(m: Measured, rows: slice) -> Measured:
    per_direction = ("contexts", "counts", "panels", "l1", "l2", "moved", "steered", "shift")
    return replace(m, **{name: getattr(m, name)[rows] for name in per_direction})


def _halves(
    engine, codes, found, activations, directions, settings, tau, seed
) -> dict[str, np.ndarray]:
    """Every label again on each of two disjoint halves of the contexts, chosen the same way inside each."""
    columns, n = {}, len(found.tokens)
    for side, rows in (("@a", torch.arange(0, n, 2)), ("@b", torch.arange(1, n, 2))):
        contexts = pool.mixed_contexts(
            activations[rows.to(activations.device)], settings.each, seed + 1
        )
        half = measure(engine, codes, found.tokens, directions, rows[contexts], (tau,))
        columns |= {name + side: values for name, values in labels(engine, half).items()}
        for part in FEWER:
            columns[f"C/{part}{side}"] = panel_labels(half, slice(None, None, part))["C"]
    return columns


def _forecasts(engine, codes, found, directions, settings, tau, seed) -> dict[str, np.ndarray]:
    """Everything that propagates the edit cheaply and reads it downstream; no feature is steered."""
    below = found.below[:IDENTITY_CONTEXTS]
    J = forecasters.jacobians(engine, found.tokens[: settings.linear_contexts])
    length, d = float(directions.norm(dim=1).median()), directions.shape[1]
    W = forecasters.random_map(engine, found.tokens[:64], length, 8 * d, seed)
    columns = {
        "C^identity": forecasters.identity_count(codes, below, directions, tau),
        "C^mean_jacobian": forecasters.mean_jacobian_count(J, codes, directions, tau),
        "C^random_map": forecasters.count_moved(codes, below, directions @ W, tau),
        **forecasters.linear_labels(J, engine, codes, directions, tau),
    }
    columns["C_per_E^jacobian"] = forecasters.relative_to_effect(
        columns["C^jacobian"], columns["E^jacobian"]
    )
    return columns


def fresh_labels(
    screened: Screened, downstream: "SAE", tokens: torch.Tensor, rows: np.ndarray
) -> "pd.DataFrame":
    """Labels of some features (rows of the table) on other contexts, all of them, with panel, tau and dose frozen."""
    import pandas as pd

    codes = pool.reader(downstream, screened.panel)
    chosen = torch.from_numpy(np.asarray(rows)).to(screened.directions.device)
    contexts = torch.arange(len(tokens)).expand(len(rows), -1)
    tau = (screened.facts["tau"],)
    found = measure(screened.engine, codes, tokens, screened.directions[chosen], contexts, tau)
    return pd.DataFrame(labels(screened.engine, found), index=screened.frame.index[rows])
