"""Proves that curves follow the theme of the page, scale, and have a running mean."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

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
