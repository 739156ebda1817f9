"""Screen the features of any SAE of any model: a ranked table with intervals, and a card for each feature."""

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from sae_research import store
from sae_research.errors import ResearchError
from sae_research.studies.side_effects import corpus as corpora
from sae_research.studies.side_effects import models, pool, predictors, screening, study

if TYPE_CHECKING:
    import pandas as pd
    from sae_lens import SAE

    from sae_research.models import LanguageModel
    from sae_research.studies.side_effects.settings import Settings

FORECAST = ("S_abs", "C", "E", "C_per_E", "clean")
COVERAGE = 0.9


@dataclass
class Screening:
    """What `screen` found."""

    table: "pd.DataFrame"
    """Every eligible feature, cleanest forecast first: forecasts with 90 % intervals, labels where it was steered."""
    quality: dict[str, float]
    """Out-of-fold Spearman of each forecast: how far the ranking can be trusted."""
    screened: study.Screened
    """The features that were steered, with everything measured on them."""
    predictors: "pd.DataFrame"
    """Predictors of every eligible feature."""
    lens: "LanguageModel"
    """The model."""
    sae: "SAE"
    """The dictionary."""
    downstream: "SAE"
    """Where side effects were counted."""


def screen(
    model: "LanguageModel",
    sae: "SAE",
    corpus: "Sequence[str] | torch.Tensor",
    downstream: "SAE | None" = None,
    settings: "Settings | None" = None,
    *,
    seed: int = 0,
) -> Screening:
    """Steer a sample of the features of `sae`, learn what predicts its labels, and forecast every other feature.

    `corpus` is a list of texts or ready contexts [n, T]. Without a `downstream` dictionary side effects are counted in
    `sae` itself, at its own hook, where they show crowding but not what the blocks above make of it.
    """
    from sae_research.studies.side_effects.settings import Settings

    settings = settings or Settings(protocol="replication")
    downstream = downstream if downstream is not None else sae
    study.hooks_of(model, sae, downstream)
    if isinstance(corpus, torch.Tensor):
        tokens = corpus
    else:
        tokens = corpora.of_texts(model, list(corpus), settings.contexts, settings, seed)
    settings = replace(settings, contexts=len(tokens))
    found = study.screen_dictionary(model, sae, downstream, tokens, settings, seed=seed)
    labelled = found.frame.assign(clean=_clean(found.frame, settings))
    every = pool.eligible(found.pool, settings.band)
    activations = pool.reader(sae, every)(found.pool.last)
    known = predictors.table(
        sae, found.pool, every, activations, found.W, settings.protocol, settings.panel
    )
    table, quality = _forecast(labelled, known, settings.selector, seed)
    return Screening(table, quality, found, known, model, sae, downstream)


def _clean(frame: "pd.DataFrame", settings: "Settings") -> np.ndarray:
    S, C, E = (frame[name].to_numpy(float) for name in ("S_abs", "C", "E"))
    return screening.clean_score(S, C, E, settings.clean_score)


def _forecast(
    labelled: "pd.DataFrame", known: "pd.DataFrame", selector: str, seed: int
) -> tuple["pd.DataFrame", dict[str, float]]:
    """Forecasts for every feature; intervals hold the share COVERAGE of the out-of-fold errors."""
    X, Y = models.columns_of(labelled, selector), labelled[list(FORECAST)].to_numpy(float)
    truth, held_out = models.cross_predict(X, Y, models.folds(len(labelled), seed))
    width = np.quantile(np.abs(truth - held_out), COVERAGE, axis=0)
    predicted = models.Ridge(X, Y)(models.columns_of(known, selector))
    table = known[[]].copy()
    for i, name in enumerate(FORECAST):
        table[name], table[f"{name} low"], table[f"{name} high"] = (
            predicted[:, i] + w for w in (0, -width[i], width[i])
        )
        table[f"{name} measured"] = labelled[name]
    table.insert(0, "rank", table["clean"].rank(ascending=False).astype(int))
    quality = {
        n: models.rank_correlation(truth[:, i], held_out[:, i]) for i, n in enumerate(FORECAST)
    }
    return table.sort_values("rank", kind="stable"), quality


def card(found: Screening, feature: int, settings: "Settings", nearest: int = 8) -> dict:
    """Everything known about one feature: predictors, forecasts, labels at every dose, neighbours, what moves, verdict.

    A feature that was not in the steered sample is steered now.
    """
    if feature not in found.table.index:
        study.features_of(found.sae, [feature])
        raise ResearchError(
            f"feature {feature} is not eligible: it fires too rarely or too often at the final token."
        )
    if feature in found.screened.frame.index:
        one = found.screened
    else:
        fixed = replace(settings, contexts=len(found.screened.pool.tokens))
        given = {
            "panel": found.screened.panel,
            "tau": found.screened.facts["tau"],
            "c": found.screened.facts["c"],
        }
        tokens = found.screened.pool.tokens
        one = study.screen_dictionary(
            found.lens, found.sae, found.downstream, tokens, fixed, features=[feature], **given
        )
    row, place = one.frame.loc[feature], one.frame.index.get_loc(feature)
    known, forecast = found.predictors.loc[feature], found.table.loc[feature]
    percentile = (found.predictors < known).mean()
    near = predictors.neighbours(found.sae.W_dec.float(), feature, nearest)
    doses = sorted({1.0, *settings.doses})
    curve = [
        {"dose": m}
        | {
            name: float(row[name if m == 1 else f"{name}@{m:g}"])
            for name in ("C", "E", "C_per_E", "S_abs")
        }
        for m in doses
    ]
    return {
        "model": found.lens.name,
        "hook": found.sae.cfg.metadata.hook_name,
        "feature": int(feature),
        "rank": f"{int(forecast['rank'])} of {len(found.table)}",
        "verdict": _verdict(found, forecast),
        "trust": {name: round(value, 3) for name, value in found.quality.items()},
        "forecast": {
            name: {
                end: float(forecast[f"{name} {end}".removesuffix(" value")])
                for end in ("value", "low", "high")
            }
            for name in FORECAST
        },
        "linear_forecast": {name: float(row[name]) for name in study.FORECASTS},
        "measured": {name: float(row[name]) for name in study.LABELS},
        "random_direction": {
            name: float(row[f"{name}@random"]) for name in ("C", "E", "C_per_E", "S_abs")
        },
        "predictors": {
            name: {"value": float(known[name]), "percentile": float(percentile[name])}
            for name in predictors.ALL
        },
        "neighbours": [{"feature": i, "cosine": cosine} for i, cosine in near],
        "moved_latents": _moved_latents(one, place, nearest),
        "moved_tokens": _moved_tokens(found.lens, one, place, nearest),
        "dose_curve": curve,
        "facts": {name: float(value) for name, value in found.screened.facts.items()},
    }


def _verdict(found: Screening, forecast: "pd.Series") -> str:
    """Clean or messy if the whole forecast interval of the clean score lies on one side of the median feature."""
    middle = float(found.table["clean"].median())
    if forecast["clean low"] > middle:
        return "clean: the whole forecast lies above the median feature"
    if forecast["clean high"] < middle:
        return "messy: the whole forecast lies below the median feature"
    side = "clean" if forecast["clean"] > middle else "messy"
    return f"undecided: the forecast leans {side}, but its interval holds the median feature"


def _moved_latents(one: study.Screened, place: int, k: int) -> list[dict]:
    shift = one.measured.shift[place]
    top = shift.abs().topk(min(k, len(shift))).indices
    return [{"latent": int(one.panel[i]), "mean_change": float(shift[i])} for i in top]


def _moved_tokens(lens: "LanguageModel", one: study.Screened, place: int, k: int) -> list[dict]:
    """Tokens whose mean logit changes most, up and down."""
    after, m = one.measured.steered[place], one.measured
    before = m.clean[m.row_of[m.contexts[place]]]
    change = (one.engine.logits(after) - one.engine.logits(before)).mean(0)
    top = torch.cat(
        [change.topk(min(k, len(change))).indices, (-change).topk(min(k, len(change))).indices]
    )
    return [
        {"token": lens.tokenizer.decode([int(i)]), "mean_logit_change": float(change[i])}
        for i in top
    ]


def save(content: dict, folder: Path) -> tuple[Path, Path]:
    """Write a card as JSON and as one self-contained HTML page."""
    name = f"feature_{content['feature']}"
    store.write_json(folder / f"{name}.json", content)
    store.write_text(folder / f"{name}.html", page(content))
    return folder / f"{name}.json", folder / f"{name}.html"


_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1c1c1c}
h1{font-size:1.5rem;margin:0}h2{font-size:1.05rem;margin:1.6rem 0 .4rem}.verdict{font-size:1.1rem;margin:.3rem 0 1rem}
table{border-collapse:collapse;margin:.3rem 0}td,th{padding:.15rem .8rem .15rem 0;text-align:left;font-variant-numeric:
tabular-nums}th{font-weight:600;border-bottom:1px solid #bbb}.note{color:#666}
.two{display:flex;flex-wrap:wrap;gap:2.5rem}
"""


def page(content: dict) -> str:
    """The card as HTML with everything inside: no script, no file beside it."""
    title = f"Feature {content['feature']} of {content['model']} at {content['hook']}"
    measured, random = content["measured"], content["random_direction"]
    forecast = [
        (
            name,
            _number(f["value"]),
            f"{f['low']:.3g} to {f['high']:.3g}",
            *(_number(x.get(name)) for x in (measured, random)),
        )
        for name, f in content["forecast"].items()
    ]
    trust = ", ".join(f"{name} {value:.2f}" for name, value in content["trust"].items())
    others = [
        (k, _number(v))
        for k, v in (measured | content["linear_forecast"]).items()
        if k not in content["forecast"]
    ]
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p class=verdict>{html.escape(content['verdict'])} (rank {html.escape(content['rank'])})</p>",
        "<h2>Forecast before steering, and what steering did</h2>",
        _table(("label", "forecast", "90 % interval", "measured", "random direction"), forecast),
        f"<p class=note>C: downstream latents moved, E: change of the logits, S: its stability, clean: z(|S|) less "
        f"z(spread). Out-of-fold rank correlation of these forecasts: {html.escape(trust)}.</p>",
        "<h2>Dose</h2>",
        _chart(content["dose_curve"]),
        "<div class=two><div><h2>Nearest decoder rows</h2>",
        _table(
            ("feature", "cosine"),
            [(n["feature"], f"{n['cosine']:.3f}") for n in content["neighbours"]],
        ),
        "</div><div><h2>Downstream latents that move most</h2>",
        _table(
            ("latent", "mean change"),
            [(n["latent"], f"{n['mean_change']:+.3g}") for n in content["moved_latents"]],
        ),
        "</div><div><h2>Tokens that move most</h2>",
        _table(
            ("token", "logit"),
            [(repr(n["token"]), f"{n['mean_logit_change']:+.3g}") for n in content["moved_tokens"]],
        ),
        "</div></div><div class=two><div><h2>Predictors</h2>",
        _table(
            ("predictor", "value", "percentile"),
            [
                (name, _number(p["value"]), f"{100 * p['percentile']:.0f}")
                for name, p in content["predictors"].items()
            ],
        ),
        "</div><div><h2>Other labels and linear forecasts</h2>",
        _table(("label", "value"), others),
        "<h2>Run</h2>",
        _table(
            ("fact", "value"), [(name, _number(value)) for name, value in content["facts"].items()]
        ),
        "</div></div>",
    ]
    body = "\n".join(parts)
    data = json.dumps(content, sort_keys=True).replace("<", "\\u003c")
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style>\n"
        f"{body}\n<script type=application/json id=card>{data}</script></html>\n"
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    def line(cells: Sequence[object], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(c))}</{tag}>" for c in cells) + "</tr>"

    return "<table>" + line(head, "th") + "".join(line(row, "td") for row in rows) + "</table>"


def _chart(curve: list[dict]) -> str:
    """Count, effect and count per effect over the dose, each relative to its largest value."""
    width, height, left, top = 460, 200, 40, 12
    colours = {"C": "#0072B2", "E": "#D55E00", "C_per_E": "#009E73", "S_abs": "#CC79A7"}
    doses = np.log2([point["dose"] for point in curve])
    x = left + (doses - doses.min()) / max(float(np.ptp(doses)), 1e-9) * (width - left - 90)
    lines = []
    for name, colour in colours.items():
        values = np.array([point[name] for point in curve])
        y = top + (1 - values / max(float(values.max()), 1e-12)) * (height - top - 30)
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        lines.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        label = f"{name} (max {values.max():.3g})"
        lines.append(
            f'<text x="{x[-1] + 6:.0f}" y="{y[-1] + 4:.0f}" font-size="11" fill="{colour}">{label}</text>'
        )
    for place, point in zip(x, curve, strict=True):
        lines.append(
            f'<text x="{place:.0f}" y="{height - 8}" font-size="11" text-anchor="middle">{point["dose"]:g}x</text>'
        )
    frame = f'viewBox="0 0 {width + 60} {height}" width="{width + 60}" role="img" aria-label="labels over the dose"'
    base = height - 26
    axis = f'<line x1="{left}" y1="{base}" x2="{width - 90}" y2="{base}" stroke="#999"/>'
    return f"<svg {frame}>{axis}{''.join(lines)}</svg>"
