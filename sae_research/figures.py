"""One style for every figure, and files whose bytes are the same on every run."""

import io
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sae_research import paths, store
from sae_research.errors import ResearchError, unknown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    from sae_research.stats import Interval

# Okabe and Ito's palette, which people with any colour vision tell apart; the pale yellow is last
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
GREY = "#767676"
VERDICTS = {
    "reproduced": ("#009E73", "o"),
    "direction only": ("#0072B2", "^"),
    "confounded": ("#E69F00", "D"),
    "undecided": ("#CC79A7", "P"),
    "not reproduced": ("#D55E00", "X"),
    "not testable here": (GREY, "s"),
}
"""Colour and marker of each verdict: never colour alone."""

_COORDINATE = re.compile(rb"(?<!scale\()-?\d+\.\d{3,}")
"""A number of an svg with digits that no eye sees; glyphs are scaled by numbers that count."""
_HASHED = re.compile(rb"\b[mp][0-9a-f]{10}\b")
"""How matplotlib names markers and clips: a hash of coordinates with all their digits."""
FULL, HALF = 7.2, 3.6
"""Inches: every figure is one column or half a column wide, so that type has one size."""
STYLE = {
    "figure.dpi": 100,
    "savefig.dpi": 150,
    "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans",  # comes with matplotlib, so every machine draws the same
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#444444",
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "svg.hashsalt": "sae_research",
    "svg.fonttype": "path",
}


@contextmanager
def style() -> Iterator[None]:
    """Draw inside with this repository's style; matplotlib's own settings stay as they were."""
    import matplotlib as mpl
    import seaborn as sns

    cycle = {"axes.prop_cycle": mpl.cycler(color=COLOURS)}
    with mpl.rc_context({**sns.axes_style("whitegrid"), **STYLE, **cycle}):
        yield


@style()
def canvas(
    title: str = "",
    x: str = "",
    y: str = "",
    *,
    height: float = 3.4,
    full: bool = True,
    rows: int = 1,
    columns: int = 1,
    share: bool = False,
) -> "tuple[Figure, Axes]":
    """A figure and its axes (an array for several); the title states the finding.

    It is one column wide, or half with `full=False`; `share` gives all panels the same axes.
    """
    import matplotlib.pyplot as plt

    width = FULL if full else HALF
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), sharex=share, sharey=share)
    figure.suptitle(_wrap(title, width), x=0.01, ha="left", fontweight="bold", fontsize=10)
    if rows * columns == 1:
        label(axes, "", x, y)
    return figure, axes


@style()
def label(axes: "Axes", title: str = "", x: str = "", y: str = "") -> None:
    """Title and axis labels of one panel."""
    width = axes.get_figure().get_size_inches()[0] * axes.get_position().width
    axes.set_title(_wrap(title, 1.2 * width))
    axes.set(xlabel=x, ylabel=y)


def log_axis(axis: "Axis") -> None:
    """A logarithmic axis labelled at 1, 2 and 5 of each decade, or at decades where many fit."""
    from matplotlib import ticker

    set_scale = {"x": axis.axes.set_xscale, "y": axis.axes.set_yscale}[axis.axis_name]
    set_scale("log")
    low, high = axis.get_view_interval()
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def _wrap(text: str, inches: float) -> str:
    return "\n".join(textwrap.wrap(text, max(20, int(inches * 12))))


@style()
def save(figure: "Figure", folder: Path, name: str) -> Path:
    """Write `name`.png and `name`.svg, the same bytes for the same figure; it stays open.

    Another processor's last digits must not change the svg: coordinates are rounded to hundredths
    of a point, and names that hash them become numbers.
    """
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, metadata=metadata)
        content = buffer.getvalue()
        if kind == "svg":
            content = _without_last_digits(content)
        store.write_bytes(paths.aside(Path(folder)) / f"{name}.{kind}", content)
    return Path(folder) / f"{name}.png"


def _without_last_digits(svg: bytes) -> bytes:
    names = list(dict.fromkeys(_HASHED.findall(svg)))
    svg = _HASHED.sub(lambda found: b"%s%d" % (found[0][:1], names.index(found[0])), svg)
    return _COORDINATE.sub(lambda found: b"%.2f" % (round(float(found[0]), 2) + 0.0), svg)


@style()
def forest(
    axes: "Axes",
    labels: Sequence[str],
    intervals: "Sequence[Interval]",
    *,
    threshold: float | None = None,
    verdicts: Sequence[str] | None = None,
    controls: "Sequence[Interval | None] | None" = None,
    published: Sequence[float | None] | None = None,
) -> None:
    """One line per label, first on top: estimate and interval, coloured by verdict.

    `controls` are drawn below each in grey, `published` values as a black bar.
    """
    _same_length(labels=labels, intervals=intervals, verdicts=verdicts, controls=controls)
    for row, interval in enumerate(intervals):
        if verdicts and verdicts[row] not in VERDICTS:
            raise unknown("verdict", verdicts[row], VERDICTS, "the figure")
        colour, marker = VERDICTS[verdicts[row]] if verdicts else (COLOURS[0], "o")
        _whisker(axes, interval, row, colour, marker)
        if controls and controls[row] is not None:
            _whisker(axes, controls[row], row + 0.28, GREY, "d", size=5)
        if published and published[row] is not None:
            axes.plot(published[row], row, "|", color="black", markersize=14, markeredgewidth=2)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    if threshold is not None:
        axes.axvline(threshold, color=GREY, linestyle="--", linewidth=1.2)
    keys = [_key(v, *look) for v, look in VERDICTS.items() if v in (verdicts or ())]
    if any(control is not None for control in controls or ()):
        keys.append(_key("control", GREY, "d"))
    if any(value is not None for value in published or ()):
        keys.append(_key("paper's value", "black", "|", linestyle="none"))
    _legend_below(axes.get_figure(), keys)


def _whisker(
    axes: "Axes", interval: "Interval", row: float, colour: str, marker: str, size: float = 7
) -> None:
    axes.plot([interval.low, interval.high], [row, row], color=colour, solid_capstyle="butt")
    axes.plot(interval.value, row, marker, color=colour, markersize=size, markeredgecolor="white")


@style()
def points(
    axes: "Axes",
    labels: Sequence[str],
    groups: "Mapping[str, Sequence[Interval]]",
    *,
    bars: bool = False,
    threshold: float | None = None,
) -> None:
    """Numbers with intervals: one place per label, and side by side one colour per group.

    They are dots, or `bars` where a number's distance from zero matters.
    """
    width = 0.8 / len(groups) if bars else 0.6 / max(len(groups), 2)
    for g, (name, intervals) in enumerate(groups.items()):
        _same_length(labels=labels, **{name: intervals})
        places = [i + (g - (len(groups) - 1) / 2) * width for i in range(len(labels))]
        values = [interval.value for interval in intervals]
        errors = [
            [max(0.0, i.value - i.low) for i in intervals],
            [max(0.0, i.high - i.value) for i in intervals],
        ]
        look = {"color": COLOURS[g % len(COLOURS)], "label": name, "yerr": errors}
        if bars:
            whiskers = {"ecolor": "#333333", "elinewidth": 1.2, "capsize": 2.5}
            axes.bar(places, values, 0.92 * width, error_kw=whiskers, **look)
        else:
            axes.errorbar(places, values, fmt="oDs^vPX*"[g % 8], elinewidth=1.4, **look)
    if bars:
        axes.axhline(0, color="#444444", linewidth=0.8)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlim(-0.6, len(labels) - 0.4)
    axes.grid(axis="x", visible=False)
    if threshold is not None:
        axes.axhline(threshold, color=GREY, linestyle="--", linewidth=1.2)
    if len(groups) > 1:
        _legend_below(axes.get_figure(), axes.get_legend_handles_labels()[0])


@style()
def heat(
    axes: "Axes",
    matrix: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    unit: str = "",
    form: str = "z.2f",
    centre: float | None = None,
    limits: tuple[float, float] | None = None,
    shown_from: float | None = None,
) -> None:
    """A heat map with its numbers; with `centre`, colours diverge from there.

    `shown_from` leaves out numbers nearer to the centre (or zero) than that. NaN is a white dash.
    """
    import numpy as np
    import seaborn as sns

    values = np.asarray(matrix, dtype=float)
    if values.shape != (len(rows), len(columns)):
        raise ResearchError(
            f"the heat map has shape {values.shape} but {len(rows)} rows "
            f"and {len(columns)} columns."
        )
    low, high = limits or (np.nanmin(values), np.nanmax(values))
    if centre is not None:
        reach = max(abs(high - centre), abs(low - centre)) or 1.0
        low, high = centre - reach, centre + reach
    sns.heatmap(
        values,
        ax=axes,
        cmap="viridis" if centre is None else "PuOr_r",
        vmin=low,
        vmax=high,
        xticklabels=list(columns),
        yticklabels=list(rows),
        cbar_kws={"label": unit, "fraction": 0.046, "pad": 0.02},
    )
    mesh = axes.collections[0]
    for (i, j), value in np.ndenumerate(values):
        if shown_from is not None and abs(value - (centre or 0)) < shown_from:
            continue
        shown = format(value, form) if np.isfinite(value) else "–"
        # white has more contrast on dark cells
        dark = np.isfinite(value) and _luminance(mesh.cmap(mesh.norm(value))) < 0.18
        colour = "white" if dark else "black"
        axes.text(j + 0.5, i + 0.5, shown, ha="center", va="center", color=colour, fontsize=8.5)
    crowded = sum(map(len, columns)) > 60
    axes.tick_params(axis="x", rotation=35 if crowded else 0)
    axes.tick_params(axis="y", rotation=0)
    for tick in axes.get_xticklabels() if crowded else ():
        tick.set(ha="right", rotation_mode="anchor")


def _luminance(colour: Sequence[float]) -> float:
    """How bright a colour looks, 0 to 1 (relative luminance of sRGB)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@style()
def scatter(
    axes: "Axes",
    x: Sequence[float],
    y: Sequence[float],
    correlation: "Interval | None" = None,
    *,
    name: str = "",
    colour: str = COLOURS[0],
) -> None:
    """Points with their rank correlation and its interval in the panel's upper right corner."""
    import seaborn as sns

    look = {"s": 16, "color": colour, "alpha": 0.6, "linewidth": 0, "label": name or None}
    sns.scatterplot(x=x, y=y, ax=axes, rasterized=len(x) > 3000, **look)
    if correlation is not None:
        c = correlation
        words = f"Spearman {c.value:.2f} [{c.low:.2f}, {c.high:.2f}], n {c.n:,}"
        frame = {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 2}
        place = {"transform": axes.transAxes, "ha": "right", "va": "top"}
        axes.margins(y=0.12)
        axes.text(0.98, 0.985, words, fontsize=8.5, bbox=frame, **place)


@style()
def curve(
    axes: "Axes",
    x: Sequence[float],
    intervals: "Sequence[Interval]",
    *,
    name: str = "",
    colour: str | None = None,
    direct: bool = False,
) -> None:
    """A line through the estimates with a band for their intervals.

    Its name stands in a legend or, if `direct`, at the line's right end.
    """
    _same_length(x=x, intervals=intervals)
    values = [i.value for i in intervals]
    shown = name if name and not direct else None
    (line,) = axes.plot(x, values, marker="o", color=colour, label=shown)
    band = {"color": line.get_color(), "alpha": 0.18, "linewidth": 0}
    axes.fill_between(x, [i.low for i in intervals], [i.high for i in intervals], **band)
    if name and direct:
        end = {"textcoords": "offset points", "xytext": (6, 0), "va": "center", "fontsize": 8.5}
        axes.annotate(name, (x[-1], values[-1]), color=line.get_color(), **end)
    elif name:
        axes.legend()


def _same_length(**columns: Sequence | None) -> None:
    lengths = {name: len(column) for name, column in columns.items() if column is not None}
    if len(set(lengths.values())) > 1:
        raise ResearchError(
            "lengths differ: " + ", ".join(f"{name} {n}" for name, n in lengths.items()) + "."
        )


def _key(name: str, colour: str, marker: str, linestyle: str = "-"):
    from matplotlib.lines import Line2D

    style = {"color": colour, "marker": marker, "linestyle": linestyle, "label": name}
    edge = colour if marker == "|" else "white"
    return Line2D([], [], markersize=7, markeredgecolor=edge, **style)


def _legend_below(figure: "Figure", keys: Sequence) -> None:
    """One legend under all panels; panels that say the same share their keys."""
    earlier = list(figure.legends)
    known = {
        text.get_text(): key
        for legend in earlier
        for text, key in zip(legend.get_texts(), legend.legend_handles, strict=True)
    }
    known.update({key.get_label(): key for key in keys})
    for legend in earlier:
        legend.remove()
    if known:
        columns = min(len(known), max(1, int(figure.get_size_inches()[0] / 1.7)))
        figure.legend(list(known.values()), list(known), loc="outside lower center", ncols=columns)
