"""Figures: the same bytes on every run, and marks that stand where the numbers say."""

import ast
import hashlib
import re
import subprocess
import sys
import xml.etree.ElementTree as tree
from itertools import pairwise

import matplotlib as mpl
import pytest

mpl.use("agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgb

from sae_research import figures, paths
from sae_research.errors import ResearchError
from sae_research.stats import Interval

INTERVALS = [
    Interval(0.5, 0.4, 0.6, 10),
    Interval(0.1, -0.1, 0.2, 10),
    Interval(-0.3, -0.5, 0.0, 10),
]


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def everything(folder):
    """One figure of every kind, saved; the digests of their files."""
    rng = np.random.default_rng(0)
    for kind in ("forest", "bars", "points", "heat", "scatter", "curve"):
        figure, axes = figures.canvas(f"A {kind} with a message", "x (unit)", "y (unit)")
        if kind == "forest":
            verdicts = ["reproduced", "confounded", "not reproduced"]
            figures.forest(axes, list("abc"), INTERVALS, threshold=0.2, verdicts=verdicts)
        elif kind in ("bars", "points"):
            groups = {"one": INTERVALS, "two": INTERVALS[::-1]}
            figures.points(axes, list("abc"), groups, bars=kind == "bars", threshold=0.2)
        elif kind == "heat":
            figures.heat(axes, rng.random((3, 4)), list("abc"), list("defg"), unit="share")
        elif kind == "scatter":
            figures.scatter(axes, rng.random(50), rng.random(50), INTERVALS[0])
        else:
            figures.curve(axes, [1, 2, 3], INTERVALS, name="method", direct=True)
        figures.save(figure, folder, kind)
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_saved_bytes_are_the_same_twice_and_in_another_process(tmp_path):
    first, again = everything(tmp_path / "one"), everything(tmp_path / "two")
    assert len(first) == 12
    assert first == again
    code = "import sys, pathlib, test_figures as t; print(t.everything(pathlib.Path(sys.argv[1])))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "three")],
        cwd=__file__.rpartition("/")[0],
        capture_output=True,
        text=True,
        check=True,
    )
    assert ast.literal_eval(done.stdout) == first


def test_saved_files_carry_no_version_and_no_date_and_the_figure_stays_open(tmp_path):
    figure, axes = figures.canvas("Title", "x", "y")
    axes.plot([1, 2])
    path = figures.save(figure, tmp_path / "deep" / "folder", "name")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert b"Software" not in path.read_bytes()
    svg = path.with_suffix(".svg").read_text()
    assert "matplotlib.org" not in svg
    assert "<dc:date>" not in svg
    tree.fromstring(svg)
    assert plt.fignum_exists(figure.number)


def test_saving_twice_and_drawing_in_between_gives_the_same_file(tmp_path):
    figure, axes = figures.canvas("Title", "x", "y")
    figures.forest(axes, list("abc"), INTERVALS, verdicts=["reproduced"] * 3)
    figures.save(figure, tmp_path, "one")
    figure.canvas.draw()
    figures.save(figure, tmp_path, "two")
    for kind in ("png", "svg"):
        assert (tmp_path / f"one.{kind}").read_bytes() == (tmp_path / f"two.{kind}").read_bytes()


def test_last_digits_of_coordinates_name_nothing_in_the_svg(tmp_path):
    saved = []
    for nudge in (0.0, 1e-12):
        figure, axes = figures.canvas("Title", "x", "y")
        axes.set_position([0.2 + nudge, 0.2, 0.6, 0.6])
        axes.plot([1, 2], marker="o")
        saved.append(figures.save(figure, tmp_path, "one").with_suffix(".svg").read_text())
    assert saved[0] == saved[1]
    named = set(re.findall(r'(?<=id=")[mp]\d+(?=")', saved[0]))
    assert named
    assert set(re.findall(r"(?<=#)[mp]\d+", saved[0])) <= named


def test_the_style_does_not_leak():
    before = dict(mpl.rcParams)
    _, axes = figures.canvas("Title")
    assert dict(mpl.rcParams) == before
    assert not axes.spines["top"].get_visible()
    assert not axes.spines["right"].get_visible()


def test_forest_puts_every_interval_where_it_belongs():
    _, axes = figures.canvas()
    verdicts = ["reproduced", "confounded", "not reproduced"]
    figures.forest(axes, list("abc"), INTERVALS, threshold=0.2, verdicts=verdicts)
    drawn = [
        line for line in axes.lines if len(line.get_xdata()) == 2 and line.get_linestyle() == "-"
    ]
    for row, (line, interval, verdict) in enumerate(zip(drawn, INTERVALS, verdicts, strict=True)):
        assert list(line.get_xdata()) == [interval.low, interval.high]
        assert list(line.get_ydata()) == [row, row]
        assert line.get_color() == figures.VERDICTS[verdict][0]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first on top
    assert [t.get_text() for t in axes.get_yticklabels()] == list("abc")
    assert [t.get_text() for t in axes.get_figure().legends[0].get_texts()] == verdicts


def test_forest_draws_controls_below_and_the_papers_value_as_a_bar():
    _, axes = figures.canvas()
    control = Interval(0.05, 0.0, 0.1, 10)
    shown = {"controls": [control, None, None], "published": [0.45, None, 0.2]}
    figures.forest(axes, list("abc"), INTERVALS, **shown)
    grey = [line for line in axes.lines if line.get_color() == figures.GREY]
    assert [list(line.get_xdata()) for line in grey] == [[0.0, 0.1], [0.05]]
    papers = [list(line.get_xdata()) for line in axes.lines if line.get_marker() == "|"]
    assert papers == [[0.45], [0.2]]
    legend = [t.get_text() for t in axes.get_figure().legends[0].get_texts()]
    assert legend == ["control", "paper's value"]


def test_points_of_two_groups_stand_beside_each_other():
    _, axes = figures.canvas()
    figures.points(axes, list("abc"), {"one": INTERVALS, "two": INTERVALS})
    places = [list(line.get_xdata()) for line in axes.lines if line.get_marker() in "oD"]
    assert np.allclose(places, [[-0.15, 0.85, 1.85], [0.15, 1.15, 2.15]])


def test_panels_share_one_legend():
    figure, axes = figures.canvas("Title", columns=2)
    for panel, verdict in zip(axes, ("reproduced", "confounded"), strict=True):
        figures.forest(panel, ["a"], INTERVALS[:1], threshold=0, verdicts=[verdict])
    (legend,) = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == ["reproduced", "confounded"]


def test_bars_have_their_heights_and_errors():
    _, axes = figures.canvas()
    figures.points(axes, list("abc"), {"one": INTERVALS, "two": INTERVALS}, bars=True)
    assert [bar.get_height() for bar in axes.patches] == [0.5, 0.1, -0.3] * 2
    left, right = axes.patches[0], axes.patches[3]
    assert left.get_x() + left.get_width() <= right.get_x()


def test_heat_writes_readable_numbers():
    _, axes = figures.canvas()
    figures.heat(axes, [[0.0, 1.0], [float("nan"), -0.001]], list("ab"), list("cd"), unit="share")
    assert [t.get_text() for t in axes.texts] == ["0.00", "1.00", "–", "0.00"]
    _, axes = figures.canvas()
    figures.heat(axes, [[0.0, 1.0], [-1.0, 0.1]], list("ab"), list("cd"), centre=0, shown_from=0.5)
    assert [t.get_text() for t in axes.texts] == ["1.00", "-1.00"]
    with pytest.raises(ResearchError, match="shape"):
        figures.heat(axes, [[1.0]], ["a", "b"], ["c"])


@pytest.mark.parametrize("centre", [None, 0.4])
def test_heat_numbers_are_readable_on_every_colour(centre):
    _, axes = figures.canvas()
    values = np.linspace(0, 1, 40).reshape(5, 8)
    figures.heat(axes, values, list("abcde"), list("abcdefgh"), centre=centre)
    image = axes.collections[0]
    for text, value in zip(axes.texts, values.ravel(), strict=True):
        assert contrast(text.get_color(), image.cmap(image.norm(value))[:3]) > 4.5  # WCAG AA


def contrast(one, other) -> float:
    """Contrast ratio of two colours as the web accessibility guidelines define it."""

    def luminance(colour):
        rgb = np.array(to_rgb(colour))
        return np.where(rgb <= 0.03928, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ [
            0.2126,
            0.7152,
            0.0722,
        ]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_every_verdict_of_the_ledger_has_its_own_colour_and_marker():
    from sae_research import claims

    assert set(figures.VERDICTS) == set(claims.VERDICTS)
    assert len({colour for colour, _ in figures.VERDICTS.values()}) == len(figures.VERDICTS)
    assert len({marker for _, marker in figures.VERDICTS.values()}) == len(figures.VERDICTS)


def test_scatter_and_curve_show_the_numbers_given():
    _, axes = figures.canvas()
    figures.scatter(axes, [1, 2], [3, 4], Interval(0.691, 0.62, 0.75, 1234))
    assert axes.texts[0].get_text() == "Spearman 0.69 [0.62, 0.75], n 1,234"
    _, axes = figures.canvas()
    figures.curve(axes, [1, 2, 3], INTERVALS)
    assert list(axes.lines[0].get_ydata()) == [0.5, 0.1, -0.3]
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == -0.5
    assert band[:, 1].max() == 0.6
    figures.curve(axes, [1, 2, 3], INTERVALS, name="method", direct=True)
    assert axes.texts[0].xy == (3, -0.3)


def test_mistakes_are_one_sentence():
    _, axes = figures.canvas()
    with pytest.raises(ResearchError, match="labels 2, intervals 3"):
        figures.forest(axes, ["a", "b"], INTERVALS)
    with pytest.raises(ResearchError, match="did you mean 'reproduced'"):
        figures.forest(axes, list("abc"), INTERVALS, verdicts=["reprodced"] * 3)
    with pytest.raises(ResearchError, match="lengths differ"):
        figures.curve(axes, [1], INTERVALS)


@pytest.mark.parametrize(
    ("values", "expected"), [((3, 40), ["5", "10", "20"]), ((1, 10_000), ["1", "100", "10000"])]
)
def test_a_logarithmic_axis_has_labels_that_do_not_overlap(values, expected):
    figure, axes = figures.canvas("Few decades or many", full=False)
    axes.plot(values, values)
    figures.log_axis(axes.xaxis)
    figure.canvas.draw()
    marks = [m for m in axes.get_xticklabels(which="both") if m.get_text()]
    low, high = axes.get_xlim()
    inside = [m for m in marks if low <= m.get_position()[0] <= high]
    assert set(expected) <= {m.get_text() for m in inside}
    boxes = sorted((m.get_window_extent() for m in inside), key=lambda box: box.x0)
    assert all(a.x1 < b.x0 for a, b in pairwise(boxes))


def test_a_figure_of_a_stage_that_runs_is_named_by_where_it_will_be(tmp_path, monkeypatch):
    monkeypatch.setenv(paths.ASIDE, str(tmp_path / "aside"))
    figure, axes = figures.canvas("A figure")
    axes.plot([0, 1])
    folder = paths.figures("smoke", "tiny")
    assert figures.save(figure, folder, "line") == folder / "line.png"
    assert not folder.exists()
    assert (tmp_path / "aside" / "figures" / "smoke" / "tiny" / "line.png").is_file()
