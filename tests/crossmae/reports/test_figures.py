"""Proves that curves follow the theme of the page, scale, and have a running mean."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossmae.reports.figures import running_mean
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


@given(st.lists(st.floats(-1e3, 1e3) | st.just(float("nan")), min_size=1, max_size=30), st.integers(1, 12))
def test_running_mean_equals_a_slow_reference(values: list[float], width: int) -> None:
    result = running_mean(np.array(values), width)
    for i, mean in enumerate(result):
        window = [values[j] for j in range(len(values)) if abs(i - j) <= width // 2 and values[j] == values[j]]
        assert mean == pytest.approx(sum(window) / len(window), abs=1e-9) if window else np.isnan(mean)
