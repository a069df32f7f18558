"""Pictures of an evaluation: which classes are taken for which, and whether probabilities mean what they say."""

from __future__ import annotations

import functools
import math
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from crossmae.classification.evaluation.metrics import Bin, calibration_error
from crossmae.pretraining.figures import SMALL, TEXT
from crossmae.reports.figures import DPI

VALUES_UP_TO, NAMES_UP_TO = 20, 60  # classes whose cells have room for numbers, and whose rows have for names
CELL, NAMED_CELL = 46, 18  # pixels of a cell with a number in it, and of one in a row with a name
SIDES = (260, 900)  # pixels of a matrix: at least, and about where its rows have no names
LONGEST_NAME = 180  # pixels
MARGIN, LINE, SCALE = 18, 22, 84  # pixels: around everything, a line of text, the scale of colours
TINY = 6.5  # points
SHARES = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1)  # marked on the scale of colours
GREY, LIGHT, EMPTY = "0.35", "0.9", "0.93"
BLUE, RED = "#9ecae1", "#c0392b"


def confusion_figure(confusion: NDArray[np.int64], class_names: Sequence[str]) -> Figure:
    """Heat map of a confusion matrix: the darker, the larger the share of the true class; in the cells, samples.

    Up to 20 classes have numbers in their cells, up to 60 have names. Colours follow the square root of the share, for
    else most confusions would be too pale to be seen.

    Args:
        confusion: (C, C) samples, true class by predicted class.
        class_names: C names; see `class_labels`.
    """
    C, samples = len(class_names), int(confusion.sum())
    cell = _cell(C)
    side = cell * C
    labels = class_labels(class_names) if C <= NAMES_UP_TO else []
    longest = max((_text_width(label, SMALL) for label in labels), default=0)
    upright = longest > cell - 4
    title = f"{C:,} classes, {samples:,} samples, top-1 {np.trace(confusion) / samples:.2%}"
    note = _note(class_names, labels)
    left, right = MARGIN + LINE + longest + 12, SCALE + MARGIN
    width = max(left + side + right, _text_width(title, TEXT + 1) + 2 * MARGIN, _text_width(note, SMALL) + 2 * MARGIN)
    bottom = MARGIN + (LINE if note else 0) + (longest if upright else LINE if labels else 0) + 26
    height = bottom + side + 12 + LINE + MARGIN

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    left += (width - left - side - right) // 2
    axis = figure.add_axes((left / width, bottom / height, side / width, side / height))
    scale = figure.add_axes(((left + side + 14) / width, bottom / height, 12 / width, side / height))
    _draw_matrix(figure, axis, scale, confusion)
    axis.set_xticks(range(len(labels)), labels, parse_math=False, rotation=90 if upright else 0)
    axis.set_yticks(range(len(labels)), labels, parse_math=False)
    if C <= VALUES_UP_TO:
        _write_counts(axis, confusion)
    for part in (axis, scale):
        _plain(part)
    figure.text(0.5, 1 - MARGIN / height, title, ha="center", va="top", fontsize=TEXT + 1)
    figure.text(0.5, (MARGIN - 6) / height, note, ha="center", va="bottom", fontsize=SMALL, color=GREY)
    return figure


def calibration_figure(bins: Sequence[Bin]) -> Figure:
    """Reliability diagram: accuracy by top-1 probability, and below how many samples have such a probability."""
    figure = Figure(figsize=(5.2, 5.6), dpi=DPI, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    filled = [one for one in bins if one.samples]
    middles, width = np.array([(one.low + one.high) / 2 for one in filled]), 0.94 / len(bins)
    upper.bar(middles, [one.accuracy for one in filled], width, color=BLUE, label="accuracy")
    upper.plot((0, 1), (0, 1), color=GREY, linewidth=1, linestyle="--", label="perfect calibration")
    confidences = [one.confidence for one in filled]
    upper.hlines(confidences, middles - width / 2, middles + width / 2, RED, linewidth=2, label="mean probability")
    upper.set(xlim=(0, 1), ylim=(0, 1.02), xticks=np.linspace(0, 1, 6), yticks=np.linspace(0, 1, 6))
    upper.set_ylabel("accuracy", fontsize=TEXT)

    counts = [one.samples for one in filled]
    lower.bar(middles, counts, width, color="0.7")
    for middle, count in zip(middles, counts, strict=True):
        lower.text(middle, count + 0.04 * max(counts), _short_count(count), ha="center", fontsize=TINY)
    lower.set(ylim=(0, 1.25 * max(counts)), yticks=())
    lower.set_ylabel("samples", fontsize=TEXT)
    lower.set_xlabel("probability of the best class", fontsize=TEXT)
    for axis in (upper, lower):
        axis.grid(color=LIGHT, linewidth=0.8)
        axis.set_axisbelow(True)
        _plain(axis)
    title = f"{sum(counts):,} samples, expected calibration error {calibration_error(bins):.2%}"
    figure.suptitle(title, fontsize=TEXT + 1)
    handles = upper.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, fontsize=SMALL, frameon=False)
    return figure


def class_labels(class_names: Sequence[str]) -> list[str]:
    """Names as they fit beside a row: on one line, cut in the middle; the class's number if the font lacks letters."""
    glyphs = get_font(findfont(FontProperties())).get_charmap()
    labels = []
    for index, name in enumerate(class_names):
        line = " ".join(name.split())
        drawable = line and all(ord(letter) in glyphs for letter in line)
        labels.append(_cut(line) if drawable else _number(index))
    return labels


def _number(index: int) -> str:
    return f"class {index}"


def _cut(name: str) -> str:
    """The beginning and the end of a long name, because names of one family often begin alike."""
    if _text_width(name, SMALL) <= LONGEST_NAME:
        return name

    def around_gap(kept: int) -> str:
        return f"{name[: kept - kept // 3]}…{name[len(name) - kept // 3 :]}"

    lengths = range(min(len(name), LONGEST_NAME // 3))  # no letter is narrower than 3 pixels
    too_long = bisect_left(lengths, True, key=lambda kept: _text_width(around_gap(kept), SMALL) > LONGEST_NAME)
    return around_gap(too_long - 1)


def _text_width(text: str, points: float) -> int:
    """Pixels of a line of text."""
    measured = _renderer().get_text_width_height_descent(text, FontProperties(size=points), ismath=False)
    return math.ceil(measured[0])


@functools.cache
def _renderer() -> RendererAgg:
    return RendererAgg(1, 1, DPI)


def _cell(classes: int) -> int:
    """Pixels of a cell of the matrix; whole, so that all are of one size."""
    least, most = SIDES
    if classes > NAMES_UP_TO:
        return max(most // classes, 1)
    return max(CELL if classes <= VALUES_UP_TO else NAMED_CELL, least // classes)


def _note(class_names: Sequence[str], labels: Sequence[str]) -> str:
    """What a reader has to know about the names."""
    if not labels:
        return "Too many classes for names and numbers; confusion.csv has them all."
    numbered = any(label == _number(at) != class_names[at] for at, label in enumerate(labels))
    return "Numbers are of classes whose names the font can not write." if numbered else ""


def _draw_matrix(figure: Figure, axis: Axes, scale: Axes, confusion: NDArray[np.int64]) -> None:
    """Rows as shares; those without samples are grey."""
    totals = confusion.sum(axis=1, keepdims=True)
    shares = np.ma.masked_array(confusion / np.maximum(totals, 1), np.broadcast_to(totals == 0, confusion.shape))
    image = axis.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1), aspect="auto", interpolation="nearest")
    axis.set_facecolor(EMPTY)
    axis.set_xlabel("predicted class", fontsize=TEXT)
    axis.set_ylabel("true class", fontsize=TEXT)
    bar = figure.colorbar(image, cax=scale, format=PercentFormatter(1, decimals=0), ticks=SHARES)
    bar.set_label("share of the true class", fontsize=SMALL)


def _write_counts(axis: Axes, confusion: NDArray[np.int64]) -> None:
    totals = confusion.sum(axis=1)
    for (row, column), count in np.ndenumerate(confusion):
        if count:
            color = "white" if count > 0.4 * totals[row] else "black"
            axis.text(column, row, f"{count}", ha="center", va="center", fontsize=TINY, color=color)


def _plain(axis: Axes) -> None:
    """Small numbers, no lines around."""
    axis.tick_params(labelsize=SMALL, length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _short_count(count: int) -> str:
    return f"{count}" if count < 10_000 else f"{count / 1000:.0f}k"
