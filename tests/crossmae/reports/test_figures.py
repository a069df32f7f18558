"""Proves that curves follow the theme of the page, scale, and have a running mean."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.textpath import TextPath

from crossmae.reports.figures import MOST_CURVES, MeanCurve, mean_plot, running_mean
from tests.crossmae.reports.pages import plot


def test_figures_follow_the_theme_and_scale() -> None:
    svg = str(plot())
    assert "#01fe" not in svg
    assert "var(--series-1)" in svg
    assert "var(--series-2)" in svg
    assert "<text" in svg  # letters stay letters
    head = svg[svg.index("<svg") : svg.index(">", svg.index("<svg"))]
    assert "viewBox" in head
    assert "width" not in head


def test_figure_is_reproducible() -> None:
    assert plot().svg == plot().svg


def test_long_curves_get_a_running_mean_and_short_ones_do_not() -> None:
    assert str(plot(points=200).svg).count("stroke-opacity: 0.3") == 1
    assert "stroke-opacity: 0.3" not in str(plot(points=20).svg)


def means(places: list[float], curves: int = 2, zero: bool = False) -> str:
    y = list(range(len(places)))
    intervals = [(one - 1.0, one + 1.0) if one else None for one in y]
    values = [(place, 1.5) for place in places for _ in range(3)]
    drawn = {f"<{number}>": MeanCurve(places, y, intervals, values, dashed=number == 1) for number in range(curves)}
    return str(mean_plot(drawn, title="Means", x_label="images", y_label="AP", caption="c", zero=zero).svg)


def test_means_have_intervals_dots_and_a_label_for_each_place() -> None:
    svg = means([40, 120, 400])
    assert all(f">{label}</text>" in svg for label in ("40", "120", "400", "&lt;0&gt;", "&lt;1&gt;"))
    assert "stroke-dasharray" in svg
    assert "#01fe" not in svg
    assert "10^" not in svg
    assert svg == means([40, 120, 400])
    assert svg != means([40, 120, 400], zero=True)


def test_a_single_run_has_one_mark() -> None:
    """A dot next to the mark of its own mean would look like a second run."""

    def marks(values: list[tuple[float, float]]) -> int:
        curve = MeanCurve([40, 400], [1, 2], [None, None], values)
        svg = str(mean_plot({"own": curve}, title="t", x_label="x", y_label="y", caption="c").svg)
        return svg.count("<use")

    assert marks([(40, 1), (400, 2)]) == marks([])
    assert marks([(40, 0), (40, 2), (400, 2)]) == marks([]) + 2


def test_long_labels_of_the_legend_fit() -> None:
    words = "CrossMAE on your images \N{MINUS SIGN} random weights, with the learning rates of pretrained ones"
    curve = MeanCurve([40, 400], [1, 2], [None, None])
    svg = str(mean_plot({words: curve, "b": curve}, title="t", x_label="x", y_label="y", caption="c").svg)
    lines = re.findall(r">([^<>]+)</text>", svg)
    assert " ".join(lines[lines.index("b") - 2 : lines.index("b")]) == words
    width = float(re.findall(r'viewBox="0 0 ([\d.]+)', svg)[0])
    for line in lines:
        assert TextPath((0, 0), line, size=8.5).get_extents().x1 < width - 50  # the handle takes 40


def test_labels_of_the_x_axis_do_not_cover_each_other() -> None:
    svg = means([10, 900, 1000])
    assert ">10</text>" in svg
    assert ">1,000</text>" in svg
    assert ">900</text>" not in svg


def test_one_place_and_many_curves_are_drawn() -> None:
    svg = means([400.0], curves=2 * MOST_CURVES)
    assert ">400</text>" in svg
    assert all(f"&lt;{number}&gt;</text>" in svg for number in range(2 * MOST_CURVES))


@given(st.lists(st.floats(-1e3, 1e3) | st.just(float("nan")), min_size=1, max_size=30), st.integers(1, 12))
def test_running_mean_equals_a_slow_reference(values: list[float], width: int) -> None:
    result = running_mean(np.array(values), width)
    for i, mean in enumerate(result):
        window = [values[j] for j in range(len(values)) if abs(i - j) <= width // 2 and values[j] == values[j]]
        assert mean == pytest.approx(sum(window) / len(window), abs=1e-9) if window else np.isnan(mean)
