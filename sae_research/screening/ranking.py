"""Screen the features of any SAE of any model: a ranked table with intervals, cards of features.

ranking = screen_features(model, sae, texts, downstream=deeper_sae)
ranking.table.head(10)
ranking.card(1234).save("card.html")
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from sae_research import saes
from sae_research.errors import ResearchError
from sae_research.feature_card import FeatureCard
from sae_research.latents import find_top_contexts, make_latent_encoder
from sae_research.models import LanguageModel
from sae_research.screening import pool, ridge
from sae_research.screening.card import make_card
from sae_research.screening.labels import compute_clean_score
from sae_research.screening.screen import Fixed, Screen, check_features, check_hooks
from sae_research.screening.settings import ScreenSettings

if TYPE_CHECKING:
    from sae_lens import SAE

FORECAST_LABELS = ("S_abs", "C", "E", "C_per_E", "clean")
COVERAGE = 0.9
MIN_FEATURES = 20
"""Steered features below which nothing can be learned."""
LARGE_STEP = 0.25
"""Fraction of the residual's norm above which a step is called large."""
DEFAULTS = ScreenSettings(protocol="replication", dose_norm_fraction=0.1, tau_quantile=0.02)
"""Settings for a model of unknown scale: one dose is a tenth of the residual's norm, and a latent
counts as moved beyond the change that 2 % of the downstream latents exceed."""


@dataclass(repr=False)
class Ranking:
    """What `screen_features` found."""

    table: pd.DataFrame
    """One row per eligible latent, cleanest forecast first: rank, prediction (clean, messy or
    undecided), each label's forecast with its 90 % interval, and its value where it was steered."""
    quality: dict[str, float]
    """Out-of-fold rank correlation of each forecast: how far the ranking can be trusted."""
    notes: list[str]
    """What was done otherwise than asked for, and what to beware of."""
    screen: Screen
    """The features that were steered, with everything measured on them."""
    predictors: pd.DataFrame
    """Predictors of every eligible latent."""
    other_seeds: "Sequence[SAE]" = ()
    """The same SAE from other seeds."""

    def __repr__(self) -> str:
        trust = ", ".join(f"{name} {value:.2f}" for name, value in self.quality.items())
        head = f"Ranking of {len(self.table)} latents ({len(self.screen.features)} steered)"
        return "\n".join([f"{head}; rank correlation of forecasts: {trust}", *self.notes])

    def card(self, latent: int) -> FeatureCard:
        """Everything known about one latent; one that was not in the steered sample is steered."""
        if latent not in self.table.index:
            check_features(self.screen.sae, [latent])
            raise ResearchError(
                f"feature {latent} is not eligible: it fires too rarely or too often at the final "
                "token."
            )
        one = self.screen
        if latent not in one.frame.index:
            fixed = Fixed(one.panel, one.tau, one.dose, one.step)
            given = (one.engine.model, one.sae, one.downstream, one.tokens, one.settings)
            one = Screen(
                *given, seed=one.seed, features=[latent], fixed=fixed, clean=one.pool
            ).run()
        return make_card(self, latent, one)

    @cached_property
    def top_contexts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Activation, context and position of each latent's most active contexts, [6, latents]."""
        latents = torch.tensor(self.predictors.index.tolist())
        one = self.screen
        return find_top_contexts(one.engine, one.sae, one.tokens, latents, 6)


def screen_features(
    model: LanguageModel,
    sae: "SAE",
    texts: "Sequence[str] | torch.Tensor",
    *,
    downstream: "SAE | None" = None,
    settings: ScreenSettings | None = None,
    n_features: int | None = None,
    seed: int = 0,
    other_seeds: "Sequence[SAE]" = (),
) -> Ranking:
    """Steer a sample of features, learn what predicts their side effects, and rank all features.

    `texts` are cut into contexts of `settings.context_length` tokens; ready contexts [n, T] are
    taken too. A small corpus gives fewer contexts, and few eligible features are all steered: the
    ranking's `notes` say so. Without a `downstream` SAE side effects are counted in `sae` itself at
    its own hook, where they show crowding but not what the blocks above make of it. With the same
    SAE from `other_seeds`, a card says in how many of them its feature is found.
    """
    _check_inputs(model, sae, texts)
    downstream = sae if downstream is None else downstream
    hook, _ = check_hooks(model, sae, downstream)
    if any(saes.check_fit(model, other) != hook for other in other_seeds):
        raise ResearchError("`other_seeds` read another hook than `sae`; give SAEs of one hook.")
    settings = settings or DEFAULTS
    if n_features is not None:
        settings = replace(settings, n_features=n_features)
    if isinstance(texts, torch.Tensor):
        tokens = texts.to(model.device)
    else:
        tokens = model.packed(list(texts), settings.context_length)[: settings.n_contexts]
    notes = []
    settings = _fit_to_corpus(tokens, settings, notes)
    screen = Screen(model, sae, downstream, tokens, settings, seed=seed).run()
    _note_limits(screen, notes)
    for note in notes:
        warnings.warn(note, stacklevel=2)
    score = compute_clean_score(screen.frame, settings.clean_score)
    labelled = screen.frame.assign(clean=score)
    eligible = pool.find_eligible(screen.pool, settings.frequency_band)
    acts = make_latent_encoder(sae, eligible)(screen.pool.last)
    known = screen.make_predictors(eligible, acts)
    bounds = {"S_abs": (0, 1), "C": (0, len(screen.panel)), "E": (0, None), "C_per_E": (0, None)}
    table, quality = _forecast_all(labelled, known, settings.selector, bounds, seed)
    return Ranking(table, quality, notes, screen, known, other_seeds)


def _check_inputs(model: object, sae: object, texts: object) -> None:
    """One sentence for what people hand over by mistake."""
    from sae_lens import SAE

    if not isinstance(model, LanguageModel):
        raise ResearchError(
            f"give the model that `sae_research.load_model` returns, not a {type(model).__name__}: "
            "load_model(name or folder)."
        )
    if not isinstance(sae, SAE):
        raise ResearchError(
            f"give the SAE that `sae_research.load_sae` returns, not a {type(sae).__name__}."
        )
    if isinstance(texts, str):
        raise ResearchError(
            "texts is one string; give a list of texts, such as text.split('\\n\\n')."
        )


def _fit_to_corpus(
    tokens: torch.Tensor, settings: ScreenSettings, notes: list[str]
) -> ScreenSettings:
    """Settings that the contexts at hand can serve; each change is noted."""
    n, length = tokens.shape
    per_bucket = min(settings.contexts_per_bucket, n // 6)  # both halves need three buckets
    if per_bucket < 2:
        raise ResearchError(
            f"the corpus gives {n} contexts of {length} tokens and screening needs 12; give more "
            "text, or shorter contexts by settings.context_length."
        )
    if n < settings.n_contexts:
        notes.append(
            f"The corpus gives {n} contexts of {length} tokens, not {settings.n_contexts}; all of "
            "them are used."
        )
    if per_bucket < settings.contexts_per_bucket:
        notes.append(
            f"Each feature is steered in {3 * per_bucket} contexts, not "
            f"{3 * settings.contexts_per_bucket}."
        )
    return replace(
        settings,
        n_contexts=n,
        context_length=length,
        contexts_per_bucket=per_bucket,
        min_eligible_features=min(
            settings.min_eligible_features or MIN_FEATURES, settings.n_features
        ),
    )


def _note_limits(screen: Screen, notes: list[str]) -> None:
    """Note what makes the labels of this screen doubtful."""
    settings = screen.settings
    if len(screen.features) < settings.n_features:
        notes.append(
            f"Only {len(screen.features)} latents are eligible, not {settings.n_features}; all of "
            "them are steered."
        )
    fraction = screen.collect_facts()["step_norm"] / screen.residual_norm
    if fraction > LARGE_STEP:
        notes.append(
            f"One dose is {100 * fraction:.0f} % of the residual's norm: effects at this size say "
            "little about natural activations; set a smaller dose_norm_fraction."
        )
    if settings.tau_quantile is not None and screen.changed_fraction < settings.tau_quantile:
        notes.append(
            f"Steering changes only {100 * screen.changed_fraction:.2g} % of the downstream "
            f"latents at all, fewer than {100 * settings.tau_quantile:g} %; tau is the median of "
            "the changes that are not zero."
        )


def _forecast_all(
    labelled: pd.DataFrame, known: pd.DataFrame, selector: str, bounds: dict, seed: int
) -> tuple[pd.DataFrame, dict[str, float]]:
    """Forecasts for every latent; intervals hold the share COVERAGE of the out-of-fold errors."""
    X = ridge.get_columns(labelled, selector)
    Y = labelled[list(FORECAST_LABELS)].to_numpy(float)
    splits = ridge.make_folds(len(labelled), seed)
    truth, held_out = ridge.cross_predict(X, Y, splits)
    width = np.quantile(np.abs(truth - held_out), COVERAGE, axis=0)
    predicted = ridge.predict_by_ridge(X, Y, ridge.get_columns(known, selector))
    table = known[[]].copy().rename_axis("latent")
    for i, name in enumerate(FORECAST_LABELS):
        low, high = bounds.get(name, (None, None))
        for suffix, half in (("", 0), (" low", -width[i]), (" high", width[i])):
            value = predicted[:, i] + half
            table[name + suffix] = value if low is None else np.clip(value, low, high)
        table[f"{name} measured"] = labelled[name]
    middle = table["clean"].median()
    side = np.select(
        [table["clean low"] > middle, table["clean high"] < middle], ["clean", "messy"], "undecided"
    )
    table.insert(0, "rank", table["clean"].rank(ascending=False, method="first").astype(int))
    table.insert(1, "prediction", side)
    quality = {
        name: ridge.rank_correlation(truth[:, i], held_out[:, i])
        for i, name in enumerate(FORECAST_LABELS)
    }
    return table.sort_values("rank", kind="stable"), quality
