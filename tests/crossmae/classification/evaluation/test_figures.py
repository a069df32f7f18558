"""Proves that the pictures of an evaluation show what was counted, and that names of any length and script stay on the
page and apart from each other."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from crossmae.classification.evaluation.figures import (
    MOST_NAMED,
    calibration_figure,
    class_colors,
    class_labels,
    confusion_figure,
    map_figure,
    project,
)
from crossmae.classification.evaluation.metrics import BINS, calibration_bins, calibration_error

AWKWARD = (
    "$x_1$ and _y_",
    "W" * 60,
    "犬",
    "Weißstörche, die über den Fluß ziehen, und Gänse",
    "two\nlines",
    "",
)


def check_layout(figure: Figure) -> None:
    """No text leaves the page or lies over another. A page is cut to its content when it is written."""
    FigureCanvasAgg(figure).draw()
    found = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]  # type: ignore[attr-defined]
    boxes = [(text.get_text(), text.get_window_extent()) for text in found]  # type: ignore[attr-defined]
    page = figure.bbox if figure.get_layout_engine() else None
    for index, (text, box) in enumerate(boxes):
        if page:
            assert min(box.x0, box.y0) >= 0, text
            assert box.x1 <= page.x1, text
            assert box.y1 <= page.y1, text
        for other, its_box in boxes[index + 1 :]:
            assert not box.overlaps(its_box), (text, other)


def random_confusion(classes: int) -> np.ndarray:
    confusion = np.random.default_rng(0).integers(0, 9, (classes, classes)) ** 2
    confusion[1] = 0  # a class without samples
    np.fill_diagonal(confusion, 12345)
    confusion[1, 1] = 0
    return confusion


def shown(axis: Axes) -> dict[tuple[int, int], int]:
    places = [(text.get_position(), text.get_text()) for text in axis.texts]
    return {(int(y), int(x)): int(text) for (x, y), text in places}


@pytest.mark.parametrize(
    ("classes", "awkward"),
    [(2, False), (3, True), (10, False), (20, True), (21, False), (60, True), (61, True), (300, False)],
)
def test_the_matrix(classes: int, awkward: bool) -> None:
    names = [AWKWARD[index % len(AWKWARD)] if awkward else f"c{index}" for index in range(classes)]
    confusion = random_confusion(classes)
    figure = confusion_figure(confusion, names)
    check_layout(figure)
    axis = figure.axes[0]
    shares = np.ma.asarray(axis.images[0].get_array())
    rows = confusion.sum(axis=1) > 0
    np.testing.assert_allclose(shares[rows], confusion[rows] / confusion[rows].sum(axis=1, keepdims=True))
    assert shares.mask[~rows].all()
    assert not shares.mask[rows].any()
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("predicted class", "true class")
    assert f"{confusion.sum():,} samples" in axis.get_title()
    expected = {place: count for place, count in np.ndenumerate(confusion) if count} if classes <= 20 else {}
    assert shown(axis) == expected
    labels = class_labels(names) if classes <= 60 else []
    assert [label.get_text() for label in axis.get_xticklabels()] == labels
    assert [label.get_text() for label in axis.get_yticklabels()] == labels
    assert not any(label.get_parse_math() for label in (*axis.get_xticklabels(), *axis.get_yticklabels()))
    side = axis.bbox.width / classes
    assert side == pytest.approx(round(side)), "cells of whole pixels are of one size"


def test_one_class_and_more_samples_than_there_are() -> None:
    check_layout(confusion_figure(np.array([[7]]), ["only"]))
    check_layout(confusion_figure(np.full((2, 2), 10**14), ["a", "b"]))


def test_labels() -> None:
    labels = class_labels(["cat", "жук", "犬", "犬 in part", "a  b\tc\n", "", "x" * 40 + "1", "x" * 40 + "2", "\udce9"])
    assert labels[:6] == ["cat", "жук", "class 2", "class 3", "a b c", "class 5"]
    assert labels[6] != labels[7], "what differs at the end still does"
    assert all(label.startswith("xxx") and "…" in label for label in labels[6:8])
    assert labels[8] == "class 8"


@pytest.mark.parametrize("samples", [1, 30, 200_000])
def test_calibration(samples: int) -> None:
    rng = np.random.default_rng(0)
    confidence = rng.beta(3, 1.2, samples)
    bins = calibration_bins(confidence, rng.random(samples) < confidence**2)
    figure = calibration_figure(bins)
    check_layout(figure)
    upper, lower = figure.axes
    filled = [one for one in bins if one.samples]
    assert [bar.get_height() for bar in upper.patches] == [one.accuracy for one in filled]
    assert [bar.get_height() for bar in lower.patches] == [one.samples for one in filled]
    middles = [bar.get_x() + bar.get_width() / 2 for bar in upper.patches]
    assert middles == pytest.approx([(one.low + one.high) / 2 for one in filled])
    lines = [segment[0][1] for segment in upper.collections[0].get_segments()]  # type: ignore[attr-defined]
    assert lines == pytest.approx([one.confidence for one in filled])
    counts = [text.get_text() for text in lower.texts]
    assert counts == [str(c) if (c := one.samples) < 10_000 else f"{c / 1000:.0f}k" for one in filled]
    assert len(bins) == BINS
    assert f"error {calibration_error(bins):.2%}" in figure.get_suptitle()


def test_a_map_shows_the_directions_of_largest_variance() -> None:
    features = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32) * np.arange(1, 9, dtype=np.float32)
    points, note = project(features)
    centred = features.astype(np.float64) - features.astype(np.float64).mean(axis=0)
    variances, axes = np.linalg.eigh(centred.T @ centred)
    assert np.abs(points) == pytest.approx(np.abs(centred @ axes[:, [-1, -2]]), abs=1e-4)
    assert f"{variances[-2:].sum() / variances.sum():.0%} of the variance" in note
    assert (project(features)[0] == points).all()
    assert not project(np.ones((5, 4), np.float32))[0].any()


def map_of(classes: int, wrong: list[int], names: list[str] | None = None) -> tuple[np.ndarray, np.ndarray, Figure]:
    labels = np.arange(4 * classes) % classes
    features = np.random.default_rng(0).normal(size=(len(labels), 2)).astype(np.float32)
    mask = np.isin(np.arange(len(labels)), wrong)
    figure = map_figure(features, labels, mask, names or [f"n{i}" for i in range(classes)], "Title")
    return project(features)[0], mask, figure


def test_points_have_the_colour_of_their_class_and_wrong_ones_are_crosses() -> None:
    points, mask, figure = map_of(3, wrong=[1, 5])
    right, crosses = figure.axes[0].collections
    np.testing.assert_array_equal(right.get_offsets(), points[~mask])
    np.testing.assert_array_equal(crosses.get_offsets(), points[mask])
    colors = class_colors(3)
    assert crosses.get_facecolor()[:, :3] == pytest.approx(colors[[1, 2]])  # type: ignore[call-overload, index]
    assert right.get_facecolor()[:, :3] == pytest.approx(colors[np.arange(12)[~mask] % 3])  # type: ignore[call-overload, index]


def test_the_legend_shows_names_letter_by_letter() -> None:
    names = ["_private", "$x$", "x" * 200]
    *_, figure = map_of(3, wrong=[0], names=names)
    legend = figure.axes[0].get_legend()
    assert legend is not None
    texts = legend.get_texts()
    assert [text.get_text() for text in texts[:2]] == names[:2]
    assert len(texts[2].get_text()) < 60
    assert texts[3].get_text() == "wrong"
    assert not any(text.get_parse_math() for text in texts)
    check_layout(figure)


def test_many_classes_have_no_legend() -> None:
    *_, figure = map_of(MOST_NAMED + 1, wrong=[])
    assert figure.axes[0].get_legend() is None
    assert "21 classes, too many to name" in figure.axes[0].get_xlabel()
    assert len(np.unique(class_colors(300).round(3), axis=0)) == 300
