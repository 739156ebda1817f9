"""One look for every figure, and files whose bytes are the same on every run."""

import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sae_research import store
from sae_research.errors import ResearchError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sae_research.stats import Interval

# Okabe and Ito's palette, which people with any colour vision tell apart; the pale yellow comes last
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
GREY = "#767676"
VERDICTS = {
    "reproduced": ("#009E73", "o"),
    "direction only": ("#0072B2", "^"),
    "confounded": ("#E69F00", "D"),
    "not reproduced": ("#D55E00", "X"),
    "not testable here": (GREY, "s"),
}
"""Colour and marker of each verdict: never colour alone."""

LOOK = {
    "figure.dpi": 100,
    "savefig.dpi": 150,
    "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans",  # comes with matplotlib, so every machine draws the same
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#444444",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "svg.hashsalt": "sae_research",
    "svg.fonttype": "path",
}


@contextmanager
def look() -> Iterator[None]:
    """Draw inside with the look of this repository, leaving matplotlib's own settings as they were."""
    import matplotlib as mpl

    settings = {**LOOK, "axes.prop_cycle": mpl.cycler(color=COLOURS)}
    with mpl.rc_context(settings):
        yield


@look()
def canvas(
    title: str = "",
    x: str = "",
    y: str = "",
    *,
    size: tuple[float, float] = (6.4, 4.0),
    rows: int = 1,
    columns: int = 1,
    share: bool = False,
) -> "tuple[Figure, Axes]":
    """A figure with its axes (an array for several): `title` says the message, `x` and `y` what and in which unit."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=size, sharex=share, sharey=share)
    figure.suptitle(
        _folded(title, size[0]),
        x=0.01,
        ha="left",
        fontweight="bold",
        fontsize=LOOK["axes.titlesize"] + 1,
    )
    if rows * columns == 1:
        label(axes, "", x, y)
    return figure, axes


@look()
def label(axes: "Axes", title: str = "", x: str = "", y: str = "") -> None:
    """Title and axis labels of one panel."""
    width = axes.get_figure().get_size_inches()[0] * axes.get_position().width
    axes.set_title(_folded(title, 1.3 * width))
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _folded(title: str, inches: float) -> str:
    return "\n".join(textwrap.wrap(title, max(20, int(inches * 10))))


@look()
def save(figure: "Figure", folder: Path, name: str) -> Path:
    """Write `name`.png and `name`.svg, the same bytes for the same figure; the figure stays open for the notebook."""
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, metadata=metadata)
        store.write_bytes(Path(folder) / f"{name}.{kind}", buffer.getvalue())
    return Path(folder) / f"{name}.png"


@look()
def forest(
    axes: "Axes",
    labels: Sequence[str],
    intervals: "Sequence[Interval]",
    *,
    threshold: float | None = None,
    threshold_label: str = "",
    verdicts: Sequence[str] | None = None,
) -> None:
    """One line per label, first on top: estimate with its interval, the bar to reach, coloured by verdict."""
    _same_length(labels=labels, intervals=intervals, verdicts=verdicts)
    for row, interval in enumerate(intervals):
        colour, marker = _verdict(verdicts[row]) if verdicts else (COLOURS[0], "o")
        axes.plot(
            [interval.low, interval.high],
            [row, row],
            color=colour,
            linewidth=2,
            solid_capstyle="butt",
        )
        axes.plot(interval.value, row, marker, color=colour, markersize=7, markeredgecolor="white")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    if threshold is not None:
        axes.axvline(
            threshold, color=GREY, linestyle="--", linewidth=1.2, label=threshold_label or None
        )
    _legend_below(
        axes.get_figure(), _verdict_keys(verdicts or ()) + axes.get_legend_handles_labels()[0]
    )


@look()
def bars(
    axes: "Axes",
    labels: Sequence[str],
    groups: "Mapping[str, Sequence[Interval]]",
    *,
    threshold: float | None = None,
    threshold_label: str = "",
) -> None:
    """Grouped bars with intervals: one place per label, one colour per group."""
    from matplotlib.transforms import blended_transform_factory

    width = 0.8 / len(groups)
    for g, (name, intervals) in enumerate(groups.items()):
        _same_length(labels=labels, **{name: intervals})
        places = [i + (g - (len(groups) - 1) / 2) * width for i in range(len(labels))]
        values = [interval.value for interval in intervals]
        errors = [
            [max(0.0, i.value - i.low) for i in intervals],
            [max(0.0, i.high - i.value) for i in intervals],
        ]
        style = {"ecolor": "#333333", "elinewidth": 1.2, "capsize": 2.5}
        axes.bar(
            places,
            values,
            0.92 * width,
            color=COLOURS[g % len(COLOURS)],
            label=name,
            yerr=errors,
            error_kw=style,
        )
    axes.set_xticks(range(len(labels)), labels)
    axes.grid(axis="x", visible=False)
    axes.axhline(0, color="#444444", linewidth=0.8)
    if threshold is not None:
        axes.axhline(threshold, color=GREY, linestyle="--", linewidth=1.2)
        place = blended_transform_factory(axes.transAxes, axes.transData)
        axes.text(
            1.01, threshold, threshold_label, transform=place, va="center", color=GREY, fontsize=9
        )
    if len(groups) > 1:
        _legend_below(axes.get_figure(), axes.get_legend_handles_labels()[0])


@look()
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
) -> None:
    """A heat map with its numbers; with `centre`, colours diverge from there. NaN is left white with a dash."""
    import numpy as np

    values = np.asarray(matrix, dtype=float)
    if values.shape != (len(rows), len(columns)):
        raise ResearchError(
            f"the heat map has shape {values.shape} but {len(rows)} rows and {len(columns)} columns."
        )
    low, high = limits or (np.nanmin(values), np.nanmax(values))
    if centre is not None:
        reach = max(abs(high - centre), abs(low - centre)) or 1.0
        low, high = centre - reach, centre + reach
    image = axes.imshow(
        values, cmap="viridis" if centre is None else "PuOr_r", vmin=low, vmax=high, aspect="auto"
    )
    for (i, j), value in np.ndenumerate(values):
        shown = format(value, form) if np.isfinite(value) else "–"
        dark = (
            np.isfinite(value) and _luminance(image.cmap(image.norm(value))) < 0.18
        )  # white has more contrast there
        axes.text(
            j, i, shown, ha="center", va="center", color="white" if dark else "black", fontsize=9
        )
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    if sum(map(len, columns)) > 60:
        axes.tick_params(axis="x", rotation=35)
        for tick in axes.get_xticklabels():
            tick.set_horizontalalignment("right")
            tick.set_rotation_mode("anchor")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.get_figure().colorbar(
        image, ax=axes, label=unit, fraction=0.046, pad=0.02
    ).outline.set_visible(False)


def _luminance(colour: Sequence[float]) -> float:
    """How bright a colour looks, 0 to 1 (relative luminance of sRGB)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@look()
def scatter(
    axes: "Axes",
    x: Sequence[float],
    y: Sequence[float],
    correlation: "Interval | None" = None,
    *,
    name: str = "",
    colour: str = COLOURS[0],
) -> None:
    """Points with their rank correlation and its interval written above the panel's right corner."""
    axes.scatter(
        x,
        y,
        s=16,
        color=colour,
        alpha=0.6,
        linewidths=0,
        label=name or None,
        rasterized=len(x) > 3000,
    )
    if correlation is not None:
        words = f"Spearman {correlation.value:.2f} [{correlation.low:.2f}, {correlation.high:.2f}], n {correlation.n:,}"
        frame = {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 2}
        axes.margins(y=0.12)
        axes.text(
            0.98,
            0.985,
            words,
            transform=axes.transAxes,
            ha="right",
            va="top",
            fontsize=9,
            bbox=frame,
        )


@look()
def curve(
    axes: "Axes",
    x: Sequence[float],
    intervals: "Sequence[Interval]",
    *,
    name: str = "",
    colour: str | None = None,
) -> None:
    """A line through the estimates with their intervals as a band."""
    _same_length(x=x, intervals=intervals)
    (line,) = axes.plot(
        x, [i.value for i in intervals], marker="o", label=name or None, color=colour
    )
    axes.fill_between(
        x,
        [i.low for i in intervals],
        [i.high for i in intervals],
        color=line.get_color(),
        alpha=0.18,
        linewidth=0,
    )
    if name:
        axes.legend()


def _same_length(**columns: Sequence | None) -> None:
    lengths = {name: len(column) for name, column in columns.items() if column is not None}
    if len(set(lengths.values())) > 1:
        raise ResearchError(
            "lengths differ: " + ", ".join(f"{name} {n}" for name, n in lengths.items()) + "."
        )


def _verdict(verdict: str) -> tuple[str, str]:
    from sae_research.errors import unknown

    if verdict not in VERDICTS:
        raise unknown("verdict", verdict, VERDICTS, "the figure")
    return VERDICTS[verdict]


def _verdict_keys(verdicts: Sequence[str]) -> list:
    from matplotlib.lines import Line2D

    return [
        Line2D(
            [],
            [],
            color=colour,
            marker=marker,
            markersize=7,
            linewidth=2,
            markeredgecolor="white",
            label=verdict,
        )
        for verdict, (colour, marker) in VERDICTS.items()
        if verdict in verdicts
    ]


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
