"""Figures: matplotlib figures as files, and curves as SVG for a page."""

from __future__ import annotations

import io
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from crossmae.errors import counted
from crossmae.files import write_atomically
from crossmae.reports.page import Missing, Plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 120
PNG_LEVEL = 3  # half the time of the default, and files that are a twentieth larger
SMOOTH_FROM = 40  # curves with fewer points are not smoothed
MOST_CURVES = 6  # largest number of curves in one plot
# Placeholder colours that no other part of a figure uses. In the SVG, each placeholder becomes a CSS variable, so that
# figures follow the light or dark mode of the browser.
_SERIES = [f"#01fe0{number}" for number in range(1, MOST_CURVES + 1)]
_TEXT, _GRID = "#01fe11", "#01fe12"
_CSS_COLORS = {color: f"var(--series-{i})" for i, color in enumerate(_SERIES, start=1)}
_CSS_COLORS |= {_TEXT: "var(--muted)", _GRID: "var(--line)"}
_SIZE_INCHES = (4.6, 2.9)  # small, so that labels stay readable on a phone
_MARKERS = "osD^vP"  # by curve, for readers who see few colours
_SIDESTEP = 0.045  # shift of curves to each other, as a share of the range of x, so that intervals do not overlap
_LEGEND_CHARACTERS = 64  # of a line of the legend; more do not fit into the width of a figure
_TICK_DISTANCE = 0.09  # smallest distance of two labels of the x axis, as a share of the range
_STYLE: Any = {
    "svg.fonttype": "none",  # keep text selectable and in the font of the page
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), _TEXT),
}

Curves = Mapping[str, Sequence[Sequence[float]]]  # x and y by label
# Key: title of a plot. Value: name of the y axis, and curve labels by log key.
PlotKeys = Mapping[str, tuple[str, Mapping[str, str]]]


@dataclass(frozen=True)
class MeanCurve:
    """Means over x, their intervals, and the single values.

    Attributes:
        intervals: (low, high) of each mean; None: no interval.
        values: (x, value) of single runs.
        dashed: draw a dashed line, as for a control.
    """

    x: Sequence[float]
    means: Sequence[float]
    intervals: Sequence[tuple[float, float] | None]
    values: Sequence[tuple[float, float]] = ()
    dashed: bool = False


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    with warnings.catch_warnings():  # names may have letters that the font lacks
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font", UserWarning)
        options: Any = {"format": "png", "dpi": DPI, "pil_kwargs": {"compress_level": PNG_LEVEL}}
        write_atomically(path, lambda temporary: figure.savefig(temporary, **options))


def line_plot(curves: Curves, *, title: str, x_label: str, y_label: str, caption: str) -> Plot:
    """Draw curves with common axes.

    A long curve is drawn faintly, with its running mean over 5 % of its points on top.

    Args:
        curves: x and y of equal length, by label; at most `MOST_CURVES`; NaN in y leaves a gap.
        title: unique on the page.
    """
    import matplotlib as mpl  # slow import
    from matplotlib.figure import Figure  # slow import

    buffer = io.StringIO()
    with mpl.rc_context(_STYLE | {"svg.hashsalt": title}):  # the SVG is reproducible
        figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
        axes = figure.add_subplot()
        axes.set(xlabel=x_label, ylabel=y_label)
        _draw_curves(axes, curves)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Plot(_themed_svg(buffer.getvalue(), title), title, caption)


def mean_plot(
    curves: Mapping[str, MeanCurve], *, title: str, x_label: str, y_label: str, caption: str, zero: bool = False
) -> Plot:
    """Draw means with intervals and single values over a logarithmic x axis.

    Curves are a little apart, so that intervals do not cover each other. The x axis has a label for each x. The single
    value of a mean of one has no dot of its own. Long labels have several lines.

    Args:
        curves: by label; at most twice `MOST_CURVES`; x is positive.
        title: unique on the page.
        zero: draw a line at 0, as for differences.
    """
    import matplotlib as mpl  # slow import
    from matplotlib.figure import Figure  # slow import

    buffer = io.StringIO()
    with mpl.rc_context(_STYLE | {"svg.hashsalt": title}):  # the SVG is reproducible
        named = {fill(label, _LEGEND_CHARACTERS): curve for label, curve in curves.items()}
        lines = sum(label.count("\n") + 1 for label in named)
        figure = Figure(figsize=(5.6, 3.4 + 0.19 * lines), layout="constrained")
        axes = figure.add_subplot()
        axes.set(xlabel=x_label, ylabel=y_label)
        if zero:
            axes.axhline(0, color=_TEXT, linewidth=1.2)
        _draw_means(axes, named)
        figure.legend(loc="outside lower left", frameon=False, fontsize=8.5, handlelength=3)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Plot(_themed_svg(buffer.getvalue(), title), title, caption)


def _draw_means(axes: Axes, curves: Mapping[str, MeanCurve]) -> None:
    from matplotlib.ticker import NullLocator  # slow import

    places = np.unique([x for curve in curves.values() for x in curve.x])
    width = float(np.log(places[-1] / places[0])) or 1.0
    axes.set_xscale("log")
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    for number, (label, curve) in enumerate(curves.items()):
        color = _SERIES[number % MOST_CURVES]
        shift = float(np.exp(width * _SIDESTEP * (number - (len(curves) - 1) / 2)))
        style: Any = {
            "color": color,
            "linestyle": (0, (4, 2)) if curve.dashed else "-",
            "marker": _MARKERS[number % MOST_CURVES],
        }
        style["fillstyle"] = "full" if number < MOST_CURVES else "none"
        axes.plot(np.multiply(curve.x, shift), curve.means, label=label, linewidth=1.6, markersize=5.5, **style)
        for x, interval in zip(curve.x, curve.intervals, strict=True):
            if interval is not None:
                axes.plot([x * shift] * 2, interval, color=color, linewidth=1.1)
        runs = Counter(x for x, _ in curve.values)
        if several := [(x, value) for x, value in curve.values if runs[x] > 1]:  # a single one is the mean
            x_values, values = zip(*several, strict=True)
            aside = float(np.exp(width * _SIDESTEP / 3))  # next to the line of the interval
            axes.plot(np.multiply(x_values, shift * aside), values, ".", color=color, markersize=4, alpha=0.8)
    edge = float(np.exp(width * (_SIDESTEP * len(curves) / 2 + 0.03 if len(places) > 1 else 0.5)))
    axes.set_xlim(places[0] / edge, places[-1] * edge)
    shown = [places[-1]]  # from the right, because the last place is the whole data set
    for place in places[-2::-1]:
        if np.log(shown[-1] / place) >= _TICK_DISTANCE * width:
            shown.append(place)
    axes.set_xticks(shown, [f"{place:,g}" for place in shown])
    axes.xaxis.set_minor_locator(NullLocator())


def curve_plots(rows: Sequence[Mapping[str, Any]], source: Path, x: str, plots: PlotKeys) -> list[Plot | Missing]:
    """Plot logged values over `x`, or report values missing from `source`."""
    found: list[Plot | Missing] = []
    for title, (y_label, keys) in plots.items():
        points = {label: [(row[x], row[key]) for row in rows if x in row and key in row] for key, label in keys.items()}
        curves: Curves = {label: tuple(zip(*pairs, strict=True)) for label, pairs in points.items() if pairs}
        if not curves:
            why = f"no line of it has {x!r} and {', '.join(map(repr, keys))}"
            found.append(Missing(source, f"curve of the {y_label}", why))
            continue
        count = max(len(steps) for steps, _ in curves.values())
        caption = f"{y_label[0].upper()}{y_label[1:]} by {x}, {counted(count, 'logged value')}."
        if count >= SMOOTH_FROM:
            caption += " Faint: as logged; strong: running mean over 5 % of the values."
        found.append(line_plot(curves, title=title, x_label=x, y_label=y_label, caption=caption))
    return found


def _draw_curves(axes: Axes, curves: Curves) -> None:
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    for (label, (x, values)), color in zip(curves.items(), _SERIES, strict=False):
        y = np.asarray(values, dtype=np.float64)
        if len(y) >= SMOOTH_FROM:
            axes.plot(x, y, color=color, linewidth=0.8, alpha=0.3)
            y = running_mean(y, width=max(3, len(y) // 20))
        axes.plot(x, y, color=color, linewidth=1.8, label=label, marker="o" if len(y) == 1 else None)
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=8)


def running_mean(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Average values (n,) over a centred window, ignoring NaN."""
    half = width // 2
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    finite = (window[np.isfinite(window)] for window in windows)
    return np.array([window.mean() if window.size else np.nan for window in finite])


def _themed_svg(svg: str, title: str) -> Markup:
    """Give matplotlib's SVG theme colours, unique ids, fluid size and a label."""
    svg = svg[svg.index("<svg") :]
    for color, variable in _CSS_COLORS.items():
        svg = svg.replace(color, variable)
    prefix = re.sub(r"\W+", "-", title.lower())
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\g<1>#{prefix}-", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    head = f'<svg role="img" aria-label="{escape(title)}"'
    return Markup(re.sub(r'<svg[^>]*? (viewBox="[^"]*")[^>]*>', rf"{head} \1>", svg, count=1))
