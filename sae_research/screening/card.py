"""The card of one feature: what it responds to, what steering it does, and what was forecast."""

from typing import TYPE_CHECKING

import pandas as pd
import torch

from sae_research import latents, store
from sae_research.feature_card import DOSED, FeatureCard, decode, is_text
from sae_research.screening import predictors
from sae_research.screening.labels import compute_clean_score
from sae_research.screening.screen import FORECASTS, LABELS, Screen

if TYPE_CHECKING:
    from sae_research.screening.ranking import Ranking

MEANINGS = {
    "S_abs": "stability of the effect across contexts, 0 to 1",
    "C": "downstream latents that move",
    "E": "size of the change of the logits",
    "C_per_E": "moved latents per unit of effect",
    "clean": "z(stability) minus z(spread)",
}
VERDICTS = {
    "clean": "the whole forecast interval lies above the median feature",
    "messy": "the whole forecast interval lies below the median feature",
    "undecided": "the forecast interval holds the median feature",
}
N_SHOWN = 8
FOUND = 0.7
"""Decoder cosine from which on an SAE of another seed is said to have found a feature (ours)."""


def make_card(ranking: "Ranking", latent: int, one: Screen) -> FeatureCard:
    """The card of a latent that `one` has steered."""
    row = one.frame.loc[latent]
    place = one.frame.index.get_loc(latent)
    forecast = ranking.table.loc[latent]
    known = ranking.predictors.loc[latent]
    percentile = (ranking.predictors < known).mean()
    model = one.engine.model
    near = latents.find_neighbours(one.sae.W_dec.float(), latent, N_SHOWN)
    rising, falling = _find_moved_tokens(one, place)
    others = {name: row[name] for name in (*LABELS, *FORECASTS) if name not in MEANINGS}
    content = {
        "title": f"Feature {latent} of {model.name} at {one.sae.cfg.metadata.hook_name}",
        "latent": int(latent),
        "rank": f"{int(forecast['rank'])} of {len(ranking.table)}",
        "prediction": str(forecast["prediction"]),
        "reason": VERDICTS[forecast["prediction"]],
        "notes": list(ranking.notes),
        "trust": {name: round(value, 3) for name, value in ranking.quality.items()},
        "top_contexts": _show_top_contexts(ranking, latent),
        "labels": _list_labels(ranking, row, forecast),
        "doses": _list_doses(one, row, latent),
        "rising_tokens": rising,
        "falling_tokens": falling,
        "moved_latents": _find_moved_latents(one, place),
        "neighbours": [{"latent": i, "cosine": cosine} for i, cosine in near],
        "predictors": {
            name: {"value": float(known[name]), "percentile": 100 * float(percentile[name])}
            for name in predictors.ALL
        },
        "other_labels": {name: float(value) for name, value in others.items()},
        "facts": ranking.screen.collect_facts(),
    }
    if ranking.other_seeds:
        content["other_seeds"] = _look_in_other_seeds(ranking, latent)
    return FeatureCard(store.rounded(content, 6))


def _list_labels(ranking: "Ranking", row: pd.Series, forecast: pd.Series) -> list[dict]:
    """Forecast, interval, measurement and random direction of each forecast label."""
    sample = ranking.screen.frame
    names = ["S_abs", "C", "E"]
    random = {name: row[f"{name}@random"] for name in (*names, "C_per_E")}
    # standardised by the steered sample, as the forecast is
    extended = pd.concat([sample[names], pd.DataFrame([row[names], pd.Series(random)[names]])])
    seen = slice(0, len(sample))
    formula = ranking.screen.settings.clean_score
    clean, clean_random = compute_clean_score(extended, formula, seen)[-2:]
    measured = {**row, "clean": clean}
    random["clean"] = clean_random
    return [
        {
            "label": name,
            "meaning": meaning,
            "value": float(forecast[name]),
            "low": float(forecast[f"{name} low"]),
            "high": float(forecast[f"{name} high"]),
            "measured": float(measured[name]),
            "random": float(random[name]),
        }
        for name, meaning in MEANINGS.items()
    ]


def _list_doses(one: Screen, row: pd.Series, latent: int) -> list[dict]:
    """Labels at every dose, with its size in units that mean something elsewhere."""
    largest = float(one.pool.sums.largest[latent])
    coefficient = one.step / float(row["decoder_norm"])
    return [
        {
            "dose": m,
            "coefficient": m * coefficient,
            "max_activations": m * coefficient / max(largest, 1e-12),
            "percent_of_residual_norm": 100 * m * one.step / one.residual_norm,
            **{name: float(row[name if m == 1 else f"{name}@{m:g}"]) for name in DOSED},
        }
        for m in sorted({1.0, *one.settings.dose_multiples})
    ]


def _look_in_other_seeds(ranking: "Ranking", latent: int) -> dict:
    """The latent's best decoder cosine in each SAE of another seed, and how many found it."""
    row = ranking.screen.sae.W_dec.detach()[latent].float()
    cosines = [
        float(torch.cosine_similarity(other.W_dec.detach().float(), row).max())
        for other in ranking.other_seeds
    ]
    found = sum(cosine >= FOUND for cosine in cosines)
    shown = ", ".join(f"{cosine:.2f}".replace("0.", ".", 1) for cosine in cosines)
    words = f"found in {found} of {len(cosines)} other SAE seeds (cosine {shown})"
    return {"words": words, "cosines": cosines}


def _show_top_contexts(ranking: "Ranking", latent: int, before: int = 16, after: int = 6) -> list:
    """The contexts in which the latent is most active, with the token that activates it."""
    column = ranking.predictors.index.get_loc(latent)
    tokenizer = ranking.screen.engine.model.tokenizer
    shown = []
    for value, context, position in zip(
        *(x[:, column].tolist() for x in ranking.top_contexts), strict=True
    ):
        if value <= 0:
            continue
        start = max(1, position - before)  # BOS is not shown
        ids = ranking.screen.tokens[context, start : position + after + 1].tolist()
        # decoded as a whole and cut afterwards, so that no space between tokens is lost
        n = position - start
        head, through, whole = (decode(tokenizer, ids[:end]) for end in (n, n + 1, len(ids)))
        shown.append(
            {
                "activation": value,
                "before": head,
                "token": through[len(head) :],
                "after": whole[len(through) :],
            }
        )
    return shown


def _find_moved_latents(one: Screen, place: int) -> list[dict]:
    shift = one.effects.shift[place]
    top = shift.abs().topk(min(N_SHOWN, len(shift))).indices
    return [{"latent": int(one.panel[i]), "change": float(shift[i])} for i in top]


def _find_moved_tokens(one: Screen, place: int) -> tuple[list[dict], list[dict]]:
    """Tokens whose log-probability rises and falls most on average.

    Tokens that are no text are left out, and so are those that move exactly as another one does:
    a vocabulary's unused entries.
    """
    tokenizer = one.engine.model.tokenizer
    before, after = one.effects.states(place)
    change = one.engine.logits(after).log_softmax(-1) - one.engine.logits(before).log_softmax(-1)
    change = change.mean(0).double().cpu()
    _, inverse, counts = torch.unique(
        (change * 1e5).round(), return_inverse=True, return_counts=True
    )
    alone = counts[inverse] == 1
    found: tuple[list[dict], list[dict]] = ([], [])
    for sign, tokens in zip((1, -1), found, strict=True):
        for i in (sign * change).argsort(descending=True).tolist():
            if len(tokens) == N_SHOWN or sign * change[i] <= 0:
                break
            if alone[i] and is_text(tokenizer, i):
                word = decode(tokenizer, [i]).replace(" ", "␣")
                tokens.append({"token": word, "change": float(change[i])})
    return found
