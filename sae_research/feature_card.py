"""The card of a feature: a self-contained page, its charts drawn in place, or JSON."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_research import store
from sae_research.errors import ResearchError

DOSED = ("C", "E", "C_per_E", "S_abs")
"""The labels that are charted over the doses."""
_NOT_TEXT = re.compile(r"<0x[0-9A-F]{2}>|[\[<].*(unused|reserved|extra_id|special).*[\]>]", re.I)


@dataclass(repr=False)
class FeatureCard:
    """Everything known about one feature; shows itself in a notebook."""

    content: dict[str, Any]
    """Plain numbers and texts, as `to_json` writes them."""

    def __repr__(self) -> str:
        c = self.content
        return f"FeatureCard({c['title']}: {c['prediction']}, rank {c['rank']})"

    def _repr_html_(self) -> str:
        return self.to_html(whole_page=False)

    def to_json(self) -> str:
        """The content as JSON."""
        return json.dumps(self.content, indent=1, ensure_ascii=False)

    def to_html(self, whole_page: bool = True) -> str:
        """One self-contained page: no script, no file beside it."""
        return make_page(self.content, whole_page)

    def save(self, path: str | Path) -> Path:
        """Write the card by the ending of `path`, .html or .json; returns the path."""
        path = Path(path)
        writers = {".html": self.to_html, ".json": self.to_json}
        if path.suffix not in writers:
            raise ResearchError(f"a card is saved as .html or .json, not as '{path.name}'.")
        store.write_text(path, writers[path.suffix]() + "\n")
        return path


def make_page(content: dict, whole_page: bool) -> str:
    """A card's content as HTML, of a whole page or of a part of one."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = format_number
    template = environment.from_string(_TEMPLATE)
    charts = make_charts(content["doses"])
    return template.render(**content, charts=charts, whole_page=whole_page).strip()


def format_number(x: float) -> str:
    """Three significant digits; whole and large numbers without an exponent."""
    whole = math.isfinite(x) and (x == int(x) or abs(x) >= 1000)
    return f"{x:,.0f}" if whole else f"{x:.3g}"


def make_charts(doses: list[dict], width: int = 190, height: int = 90) -> list[dict]:
    """One small chart per label over the doses, evenly spaced so that their labels never meet."""
    charts = []
    step = (width - 20) / max(len(doses) - 1, 1)
    for name in DOSED:
        values = [point[name] for point in doses]
        top = max(values, default=0) or 1
        places = [
            (10 + i * step, height - 20 - v / top * (height - 40)) for i, v in enumerate(values)
        ]
        charts.append(
            {
                "name": name,
                "line": " ".join(f"{x:.1f},{y:.1f}" for x, y in places),
                "points": [
                    {"x": round(x, 1), "y": round(y, 1), "value": v, "dose": point["dose"]}
                    for (x, y), v, point in zip(places, values, doses, strict=True)
                ],
            }
        )
    return charts


def decode(tokenizer, ids: Sequence[int]) -> str:
    """The text of some tokens, with the leading space that SentencePiece decoders drop."""
    if not len(ids):
        return ""
    text = tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    first = tokenizer.convert_ids_to_tokens(int(ids[0])) or ""
    return f" {text}" if first.startswith("▁") and not text.startswith(" ") else text


def is_text(tokenizer, token: int) -> bool:
    """Whether a token is something that a text may hold, not a control, byte or unused entry."""
    piece = tokenizer.convert_ids_to_tokens(token) or ""
    text = decode(tokenizer, [token])
    if token in tokenizer.all_special_ids or _NOT_TEXT.fullmatch(piece):
        return False
    return bool(text.strip()) and text.isprintable() and "\ufffd" not in text


_TEMPLATE = """
{% macro column(title, head, items, keys) %}
<div><h3>{{ title }}</h3><table><tr>{% for cell in head %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for item in items %}<tr><td>{{ item[keys[0]] }}</td>
<td>{{ "%+.3g" | format(item[keys[1]]) }}</td></tr>
{% endfor %}</table></div>
{% endmacro %}
{% if whole_page %}<!doctype html><html lang="en"><meta charset="utf-8">
<title>{{ title }}</title>{% endif %}
<div class="sae-card"><style>
.sae-card{font:15px/1.45 system-ui,sans-serif;max-width:60rem;margin:1rem auto;color:#1c1c1c}
.sae-card h2{font-size:1.3rem;margin:0}.sae-card h3{font-size:1.05rem;margin:1.4rem 0 .3rem}
.sae-card table{border-collapse:collapse}.sae-card th{border-bottom:1px solid #bbb}
.sae-card td,.sae-card th{padding:.12rem .8rem .12rem 0;text-align:left}
.sae-card .side{display:flex;flex-wrap:wrap;gap:0 2.2rem}.sae-card .note{color:#8a4b00}
.sae-card mark{background:#ffd87a}.sae-card p{margin:.3rem 0}.sae-card svg{overflow:visible}
.sae-card .text{white-space:pre-wrap}
</style>
<h2>{{ title }}</h2>
<p><b>{{ prediction }}</b>: {{ reason }} (rank {{ rank }}).</p>
{% if other_seeds %}<p>{{ other_seeds.words }}</p>
{% endif %}
{% for note in notes %}<p class="note">{{ note }}</p>
{% endfor %}
<h3>Most active in</h3>
{% for c in top_contexts %}
<p class="text">{{ c.activation | number }} &ensp; …{{ c.before }}<mark>{{ c.token }}</mark>{{
c.after }}…</p>
{% endfor %}
<h3>Forecast before steering, and what steering did</h3>
<table><tr><th>label</th><th>meaning</th><th>forecast</th><th>90 % interval</th><th>measured</th>
<th>random direction</th></tr>
{% for r in labels %}
<tr><td>{{ r.label }}</td><td>{{ r.meaning }}</td><td>{{ r.value | number }}</td>
<td>{{ r.low | number }} to {{ r.high | number }}</td><td>{{ r.measured | number }}</td>
<td>{{ r.random | number }}</td></tr>
{% endfor %}</table>
<p>Out-of-fold rank correlation of these forecasts:
{% for name, value in trust.items() %}{{ name }} {{ "%.2f" | format(value) }}{{
", " if not loop.last else "." }} {% endfor %}</p>
<h3>Dose</h3>
<table><tr><th>dose</th><th>coefficient</th><th>in units of the feature's largest activation</th>
<th>% of the residual's norm</th></tr>
{% for d in doses %}
<tr><td>{{ d.dose | number }}</td><td>{{ d.coefficient | number }}</td>
<td>{{ d.max_activations | number }}</td><td>{{ d.percent_of_residual_norm | number }}</td></tr>
{% endfor %}</table>
<div class="side">
{% for chart in charts %}
<svg viewBox="0 0 190 112" width="190" height="112" role="img" aria-label="{{ chart.name }}">
<text x="0" y="10" font-size="12" font-weight="bold">{{ chart.name }}</text>
<polyline points="{{ chart.line }}" transform="translate(0,14)" fill="none" stroke="#0072B2"
stroke-width="2"/>
{% for p in chart.points %}
<circle cx="{{ p.x }}" cy="{{ p.y + 14 }}" r="3" fill="#0072B2"/>
<text x="{{ p.x }}" y="{{ p.y + 7 }}" font-size="10" text-anchor="middle">{{ p.value | number }}
</text>
<text x="{{ p.x }}" y="104" font-size="10" text-anchor="middle" fill="#555">{{ p.dose | number }}x
</text>
{% endfor %}</svg>
{% endfor %}</div>
<div class="side">
{{ column("Tokens that rise", ("token", "log-probability"), rising_tokens, ("token", "change")) }}
{{ column("Tokens that fall", ("token", "log-probability"), falling_tokens, ("token", "change")) }}
{{ column("Downstream latents that move", ("latent", "mean change"), moved_latents,
("latent", "change")) }}
{{ column("Nearest decoder rows", ("latent", "cosine"), neighbours, ("latent", "cosine")) }}
</div>
<details><summary>Predictors, further labels and forecasts, facts of the run</summary>
<div class="side"><div><table><tr><th>predictor</th><th>value</th><th>percentile</th></tr>
{% for name, p in predictors.items() %}
<tr><td>{{ name }}</td><td>{{ p.value | number }}</td><td>{{ "%.0f" | format(p.percentile) }}</td>
</tr>
{% endfor %}</table></div>
{% for head, items in (("label or forecast", other_labels), ("fact", facts)) %}
<div><table><tr><th>{{ head }}</th><th>value</th></tr>
{% for name, value in items.items() %}<tr><td>{{ name }}</td><td>{{ value | number }}</td></tr>
{% endfor %}</table></div>
{% endfor %}</div></details></div>{% if whole_page %}</html>{% endif %}
"""
