"""One SAE through the whole study: features, dose, threshold, labels, predictors, forecasts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from sae_research import saes, steering
from sae_research.catalogue import ModelSpec
from sae_research.errors import ResearchError
from sae_research.jacobians import fit_random_map, measure_jacobians
from sae_research.last_token import LastToken
from sae_research.latents import fold_unembedding, make_latent_encoder
from sae_research.models import LanguageModel
from sae_research.screening import forecasters, labels, pool, predictors
from sae_research.screening.settings import ScreenSettings

if TYPE_CHECKING:
    from sae_lens import SAE

LABELS = ("C", "C_per_E", "E", "E_cv", "S", "S_abs", "S_loo", "pair", "pair_abs")
LABELS += ("L2", "moved", "KL", "KL_per_E")
FORECASTS = ("C^identity", "C^jacobian", "C^mean_jacobian", "C^random_map")
FORECASTS += ("E^jacobian", "S_abs^jacobian", "C_per_E^jacobian")
DOSED_LABELS = ("C", "C_per_E", "E", "S", "S_abs", "S_loo")
"""Labels that are measured at every dose and for random directions."""
OWN, RANDOM, OWN_RANDOM = "@own", "@random", "@own_random"
N_IDENTITY_CONTEXTS = 128
CATALOGUE_BAND = (0.002, 0.5)
"""Final-token frequencies of the eligible features that the catalogue counts."""
FRACTIONS = (4, 2)
"""Reliability is also measured with a quarter and half of the contexts: how it grows with them."""


@dataclass(frozen=True)
class Fixed:
    """Choices of an earlier screen that a later one shares."""

    panel: torch.Tensor
    """Downstream latents in which effects are counted."""
    tau: float
    """Change above which a downstream latent counts as moved."""
    dose: float | None = None
    """Coefficient of the decoder row, as published; None chooses it anew."""
    step: float | None = None
    """Length of a step; None chooses it anew."""


class Screen:
    """Features of one SAE, steered and predicted.

    All are steered by one step length in the same contexts, so that their labels differ by their
    directions alone. Column `C@2` is a label at twice the dose, `C@random` that of a random
    direction of the same norm, `C@a` and `C@b` on two disjoint halves of the contexts, `C@tau2` at
    twice the threshold, `C@activation` at the feature's own mean activation, `C^identity` a
    forecast. `C@own` and `C@own_random` are as published: in contexts that the feature's activity
    chose, by a multiple of its decoder row.
    """

    def __init__(
        self,
        model: LanguageModel,
        sae: "SAE",
        downstream: "SAE",
        tokens: torch.Tensor,
        settings: ScreenSettings,
        *,
        seed: int = 0,
        folded: bool = True,
        features: Sequence[int] | None = None,
        fixed: Fixed | None = None,
        clean: pool.Pool | None = None,
        expected: ModelSpec | None = None,
    ):
        """Run the clean pass (unless `clean` is one) and choose features, panel, dose and tau.

        `features` are steered in place of a sample; `expected` is the catalogue's entry that model
        and SAE must agree with before any feature is steered.
        """
        hook, read_hook = check_hooks(model, sae, downstream)
        self.settings = settings
        self.seed = seed
        self.sae = sae
        self.downstream = downstream
        self.tokens = tokens
        self.engine = LastToken(model, hook, (read_hook,))
        self.pool = clean or pool.run_clean_pass(self.engine, sae, downstream, tokens)
        if expected is not None:
            self._check_against(expected)
        if features is None:
            chosen = pool.sample_features(self.pool, settings, seed)
        else:
            chosen = check_features(sae, features)
        self.features = chosen.to(self.pool.last.device)
        self.acts = make_latent_encoder(sae, self.features)(self.pool.last)
        size = settings.n_downstream_latents
        self.panel = fixed.panel if fixed else pool.choose_panel(self.pool, size)
        self.encode_panel = make_latent_encoder(downstream, self.panel)
        self.rows = steering.directions(sae)[self.features].float()
        norms = self.rows.norm(dim=1, keepdim=True)
        self.dose = fixed.dose if fixed and fixed.dose else self._choose_dose(self.rows)
        self.step = fixed.step if fixed and fixed.step else self.dose * float(norms.median())
        self.directions = self.step * self.rows / norms
        self.random = labels.draw_random_directions(self.directions, seed)
        self.contexts = self._share_contexts(len(tokens), seed)
        self.changed_fraction = float("nan")
        self.tau = fixed.tau if fixed else self._choose_tau()
        self.unembedding = fold_unembedding(model, folded)
        self.effects: labels.SteeringEffects | None = None
        self.frame: pd.DataFrame | None = None

    def run(self, prompt: torch.Tensor | None = None) -> "Screen":
        """Steer every feature and fill `frame`, a row each; `prompt` [1, T]: the output score's."""
        import pandas as pd

        if prompt is None:
            prompt = self.tokens[:1, : max(2, self.settings.context_length // 8)]
        own = self.acts.T.cpu().gather(1, self.contexts)
        columns = self._label_doses()
        columns |= {"natural_mean": own.mean(1).numpy(), "natural_max": own.max(1).values.numpy()}
        columns |= self._label_halves()
        columns |= self._forecast()
        coefficients = 10 * self.acts.max(0).values / self.dose
        columns["output_score"] = forecasters.measure_output_score(
            self.engine, prompt, self.dose * self.rows, coefficients, self.unembedding
        )
        known = self.make_predictors(self.features, self.acts)
        measured = pd.DataFrame(columns, index=known.index)
        self.frame = pd.concat([known, measured], axis=1).astype(float)
        return self

    def make_predictors(self, features: torch.Tensor, acts: torch.Tensor) -> pd.DataFrame:
        """The predictor table of any features."""
        return predictors.make_predictor_table(
            self.sae, self.pool, features, acts, self.unembedding, self.settings
        )

    def label_on(
        self, tokens: torch.Tensor, rows: np.ndarray, random: bool = False
    ) -> pd.DataFrame:
        """Labels of some rows of the table, or of their random directions, on other contexts;
        panel, tau and dose stay.
        """
        import pandas as pd

        moves = self.random if random else self.directions
        chosen = torch.from_numpy(np.asarray(rows)).to(moves.device)
        contexts = torch.arange(len(tokens)).expand(len(rows), -1)
        effects = self._steer(moves[chosen], contexts, tokens=tokens)
        found = labels.compute_labels(self.engine, effects)
        return pd.DataFrame(found, index=self.frame.index[rows])

    def collect_facts(self) -> dict[str, float]:
        """What was loaded and chosen."""
        n_jacobian = min(self.settings.n_jacobian_contexts, len(self.tokens))
        return {
            "l0_primary": self.pool.l0[0],
            "l0_downstream": self.pool.l0[1],
            "latents": self.sae.cfg.d_sae,
            "eligible": len(pool.find_eligible(self.pool, self.settings.frequency_band)),
            "features": len(self.features),
            "contexts": len(self.tokens),
            "context_tokens": self.tokens.shape[1],
            "steered_edits": self.contexts.numel(),
            "jacobian_edits": 2 * self.directions.shape[1] * n_jacobian,
            "panel": len(self.panel),
            "tau": self.tau,
            "dose": self.dose,
            "residual_norm": self.residual_norm,
            "step_norm": float(self.directions.norm(dim=1).median()),
        }

    @property
    def residual_norm(self) -> float:
        """Mean norm of the final token's residual at the primary hook."""
        return float(self.pool.last.norm(dim=1).mean())

    def _check_against(self, expected: ModelSpec) -> None:
        """Stop a run on the wrong weights: compare with the catalogue's L0 and eligible features.

        The catalogue's numbers were measured on the replication's contexts: within 5 % there, while
        the author's contexts only show an SAE that was loaded as another kind. Eligible features
        are counted in the catalogue's band, whatever band the run samples from.
        """
        slack = 0.05 if self.settings.protocol == "replication" else 0.5
        found = {"l0_primary": self.pool.l0[0], "l0_downstream": self.pool.l0[1]}
        found["eligible"] = len(pool.find_eligible(self.pool, CATALOGUE_BAND))
        wanted = {f"l0_{role}": value for role, value in expected.mean_l0.items()}
        same = self.settings.protocol == "replication" and len(self.tokens) == 2048
        if expected.eligible is not None and same:
            wanted["eligible"] = expected.eligible
        for name, value in wanted.items():
            allowed = slack * value if name != "eligible" else 3 * slack * value
            if abs(found[name] - value) > allowed:
                raise ResearchError(
                    f"{expected.name} shows {name} {found[name]:.1f} where {value:g} is expected: "
                    "the model or SAE is not the intended one, or the contexts differ; check "
                    "release, hook and BOS."
                )

    def _choose_dose(self, decoder: torch.Tensor) -> float:
        """c: median over features of max(q95, 1), or the median step a fraction of the residual."""
        settings = self.settings
        if settings.dose_norm_fraction is not None:
            norm = float(self.pool.last.norm(dim=1).mean() / decoder.norm(dim=1).median())
            return settings.dose_norm_fraction * norm
        q95 = torch.quantile(self.acts.float(), 0.95, dim=0).clamp(min=1.0)
        return settings.dose * float(q95.median())

    def _choose_tau(self) -> float:
        """The threshold of the settings, or a quantile over a few features and contexts."""
        if self.settings.tau_quantile is None:
            return self.settings.tau
        some = slice(None, None, max(1, len(self.features) // 24))
        edits = (self.directions[some], self.contexts[some, ::4])
        tau, self.changed_fraction = labels.choose_tau(
            self.engine, self.encode_panel, self.tokens, *edits, self.settings.tau_quantile
        )
        return tau

    def _share_contexts(self, n: int, seed: int) -> torch.Tensor:
        size = 3 * self.settings.contexts_per_bucket
        return pool.share_contexts(n, size, len(self.features), seed)

    def _steer(self, directions, contexts, *, tokens=None, taus=(), sizes=()):
        tokens = self.tokens if tokens is None else tokens
        taus = (self.tau, *taus)
        return labels.measure_effects(
            self.engine, self.encode_panel, tokens, directions, contexts, taus, sizes
        )

    def _label_doses(self) -> dict[str, np.ndarray]:
        """All doses, the random directions and the published edits in one sweep."""
        settings = self.settings
        n = len(self.directions)
        shared = self.contexts
        own = pool.choose_contexts(self.acts, settings.contexts_per_bucket, self.seed)
        published = self.dose * self.rows
        typical = self.acts.sum(0) / (self.acts > 0).sum(0).clamp(min=1)
        edits = {"": (self.directions, shared)}
        edits |= {f"@{m:g}": (m * self.directions, shared) for m in settings.dose_multiples}
        edits |= {
            RANDOM: (self.random, shared),
            "@activation": (typical[:, None] * self.rows, shared),
            OWN: (published, own),
            OWN_RANDOM: (labels.draw_random_directions(published, self.seed), own),
        }
        moves, contexts = (torch.cat(parts) for parts in zip(*edits.values(), strict=True))
        taus = tuple(self.tau * t for t in settings.tau_multiples)
        sizes = tuple(sorted({max(1, len(self.panel) // 4), max(1, len(self.panel) // 2)}))
        every = self._steer(moves, contexts, taus=taus, sizes=sizes)
        first = self.effects = every.take(slice(0, n))
        columns = labels.compute_labels(self.engine, first)
        for i, t in enumerate(settings.tau_multiples, start=1):
            columns[f"C@tau{t:g}"] = first.counts[:, :, i].mean(1).cpu().numpy()
        for i, size in enumerate(sizes):
            columns[f"C@panel{size}"] = first.panel_counts[:, :, i].mean(1).cpu().numpy()
        for block, suffix in enumerate(edits):
            if not suffix:
                continue
            effects = every.take(slice(block * n, (block + 1) * n))
            found = labels.compute_labels(self.engine, effects, divergence=False)
            columns |= {f"{name}{suffix}": found[name] for name in DOSED_LABELS}
        return columns

    def _label_halves(self) -> dict[str, np.ndarray]:
        """Every label again in contexts of two disjoint halves of the pool."""
        columns = {}
        for side, start in (("@a", 0), ("@b", 1)):
            half = torch.arange(start, len(self.tokens), 2)
            contexts = half[self._share_contexts(len(half), self.seed + 1)]
            effects = self._steer(self.directions, contexts)
            found = labels.compute_labels(self.engine, effects)
            columns |= {name + side: values for name, values in found.items()}
            for part in FRACTIONS:
                few = effects.counts[:, ::part, 0].mean(1)
                columns[f"C/{part}{side}"] = few.double().cpu().numpy()
        return columns

    def _forecast(self) -> dict[str, np.ndarray]:
        """All that propagates the edit cheaply and reads it downstream; no feature is steered."""
        encode_panel = self.encode_panel
        clean = self.pool.downstream[:N_IDENTITY_CONTEXTS]
        some = self.tokens[: self.settings.n_jacobian_contexts]
        J = measure_jacobians(self.engine, some)
        norm = float(self.directions.norm(dim=1).median())
        n_random = 8 * self.directions.shape[1]
        W = fit_random_map(self.engine, self.tokens[:64], norm, n_random, self.seed)
        count = forecasters.count_moved
        linear = forecasters.forecast_linear_labels
        return {
            "C^identity": count(encode_panel, clean, self.directions, self.tau),
            "C^random_map": count(encode_panel, clean, self.directions @ W, self.tau),
            **linear(J, self.engine, encode_panel, self.directions, self.tau),
        }


def check_hooks(model: LanguageModel, sae: "SAE", downstream: "SAE") -> tuple[str, str]:
    """Both hooks by the model's names, if both SAEs fit it and the second lies above the first."""
    hook = saes.check_fit(model, sae)
    read_hook = saes.check_fit(model, downstream)
    if model.depth(read_hook) < model.depth(hook):
        raise ResearchError(
            f"the downstream SAE reads '{read_hook}', below the edit at '{hook}'; exchange them."
        )
    return hook, read_hook


def check_features(sae: "SAE", features: Sequence[int]) -> torch.Tensor:
    """The given feature numbers, if the SAE has them."""
    chosen = torch.as_tensor(features, dtype=torch.long)
    wrong = chosen[(chosen < 0) | (chosen >= sae.cfg.d_sae)]
    if len(wrong):
        raise ResearchError(
            f"feature {int(wrong[0])} is out of range; this SAE has features 0 to "
            f"{sae.cfg.d_sae - 1}."
        )
    return chosen
