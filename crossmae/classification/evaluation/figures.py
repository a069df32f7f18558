"""Figures of an evaluation: confusion matrix, calibration diagram and feature map.

scikit-learn's displays do not fit many classes: they write a number into every cell, let long names overlap, colour by
counts instead of shares, and do not show the number of samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm, hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from crossmae.classification.evaluation.metrics import Bin, calibration_error
from crossmae.errors import counted
from crossmae.pretraining.figures import SMALL, TEXT
from crossmae.reports.figures import DPI

VALUES_UP_TO, NAMES_UP_TO = 20, 60  # largest numbers of classes with numbers in the cells, and with names at the rows
CELL, NAMED_CELL = 46, 18  # pixels: a cell with a number, and a cell in a row with a name
SIDES = (260, 900)  # pixels: smallest side of a matrix, and approximate side of a matrix without names
LETTER = 8  # pixels: approximate width
LONGEST_NAME = 24  # letters
TINY = 6.5  # points
SHARES = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1)  # marks on the colour scale
GREY, LIGHT, EMPTY = "0.35", "0.9", "0.93"
BLUE, RED = "#9ecae1", "#c0392b"
MOST_NAMED = 20  # largest number of classes in the legend of a feature map
MAP_SIZE = (9.0, 6.0)  # inches
GOLDEN = (math.sqrt(5) - 1) / 2  # step of the hue: neighbouring colours differ most for any number of classes


def confusion_figure(confusion: NDArray[np.int64], class_names: Sequence[str]) -> Figure:
    """Draw a confusion matrix (C, C), true class by predicted class.

    A darker cell has a larger share of its true class. The colour follows the square root of the share. Otherwise most
    confusions would be too pale to see. The matrix has the size of the figure, so that each cell has whole pixels, and
    the texts are outside the figure: write the file with `bbox_inches="tight"`.
    """
    C, samples = len(class_names), int(confusion.sum())
    cell = _cell(C)
    labels = class_labels(class_names) if C <= NAMES_UP_TO else []
    upright = max(map(len, labels), default=0) * LETTER > cell
    figure = Figure(figsize=(cell * C / DPI, cell * C / DPI), dpi=DPI)
    axis = figure.add_axes((0, 0, 1, 1))
    scale = figure.add_axes((1 + 14 / (cell * C), 0, 12 / (cell * C), 1))
    _draw_matrix(figure, axis, scale, confusion)
    axis.set_xticks(range(len(labels)), labels, parse_math=False, rotation=90 if upright else 0)
    axis.set_yticks(range(len(labels)), labels, parse_math=False)
    for part in (axis, scale):
        _plain(part)
    title = f"{counted(C, 'class')}, {counted(samples, 'sample')}, top-1 {np.trace(confusion) / samples:.2%}"
    note = _note(class_names, labels)
    axis.set_title(title, fontsize=TEXT + 1, pad=24 if note else 8)
    figure.text(0.5, 1 + 8 / (cell * C), note, ha="center", fontsize=SMALL, color=GREY)
    return figure


def _cell(classes: int) -> int:
    """Choose the side of a cell in whole pixels."""
    least, most = SIDES
    room = CELL if classes <= VALUES_UP_TO else NAMED_CELL
    return max(room, least // classes) if classes <= NAMES_UP_TO else max(most // classes, 1)


def _note(class_names: Sequence[str], labels: Sequence[str]) -> str:
    if not labels:
        return "Too many classes for names and numbers; confusion.csv has them all."
    numbered = any(label == f"class {at}" != class_names[at] for at, label in enumerate(labels))
    return "Numbers are of classes whose names the font cannot write." if numbered else ""


def _draw_matrix(figure: Figure, axis: Axes, scale: Axes, confusion: NDArray[np.int64]) -> None:
    totals = confusion.sum(axis=1, keepdims=True)
    shares = np.ma.masked_array(confusion / np.maximum(totals, 1), np.broadcast_to(totals == 0, confusion.shape))
    image = axis.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1), aspect="auto", interpolation="nearest")
    axis.set_facecolor(EMPTY)
    axis.set_xlabel("predicted class", fontsize=TEXT)
    axis.set_ylabel("true class", fontsize=TEXT)
    bar = figure.colorbar(image, cax=scale, format=PercentFormatter(1, decimals=0), ticks=SHARES)
    bar.set_label("share of the true class", fontsize=SMALL)
    if len(confusion) > VALUES_UP_TO:
        return
    for row, column in np.argwhere(confusion):
        color = "white" if shares[row, column] > 0.4 else "black"
        count = f"{confusion[row, column]}"
        axis.text(column, row, count, ha="center", va="center", fontsize=TINY, color=color)


def class_labels(class_names: Sequence[str]) -> list[str]:
    """Shorten names to one line. Number names that cannot be drawn."""
    glyphs = get_font(findfont(FontProperties())).get_charmap()
    lines = [" ".join(name.split()) for name in class_names]
    drawable = [bool(line) and all(ord(letter) in glyphs for letter in line) for line in lines]
    return [_cut(line) if drawable[index] else f"class {index}" for index, line in enumerate(lines)]


def _cut(name: str) -> str:
    """Cut a long name in the middle. Related names often begin alike."""
    half = LONGEST_NAME // 2
    return name if len(name) <= LONGEST_NAME else f"{name[:half]}…{name[-half:]}"


def _plain(axis: Axes) -> None:
    axis.tick_params(labelsize=SMALL, length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)


def calibration_figure(bins: Sequence[Bin]) -> Figure:
    """Draw accuracy and number of samples against top-1 probability."""
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
        shown = f"{count}" if count < 10_000 else f"{count / 1000:.0f}k"
        lower.text(middle, count + 0.04 * max(counts), shown, ha="center", fontsize=TINY)
    lower.set(ylim=(0, 1.25 * max(counts)), yticks=())
    lower.set_ylabel("samples", fontsize=TEXT)
    lower.set_xlabel("probability of the best class", fontsize=TEXT)
    for axis in (upper, lower):
        axis.grid(color=LIGHT, linewidth=0.8)
        axis.set_axisbelow(True)
        _plain(axis)
    title = f"{counted(sum(counts), 'sample')}, expected calibration error {calibration_error(bins):.2%}"
    figure.suptitle(title, fontsize=TEXT + 1)
    handles = upper.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, fontsize=SMALL, frameon=False)
    return figure


def map_figure(
    features: NDArray[np.float32],
    labels: NDArray[np.int64] | None,
    wrong: NDArray[np.bool_],
    class_names: Sequence[str],
    title: str,
) -> Figure:
    """Draw features on their first two principal components, coloured by class.

    Crosses mark wrongly classified images. A legend names the classes if there are few.

    Args:
        features: (M, E), finite, with M >= 3 and E >= 2.
        labels: (M,) true classes, or None for one colour, if an image can have several labels.
        wrong: (M,), True for wrongly classified images.
    """
    points, note = project(features)
    present = [] if labels is None else np.unique(labels).tolist()
    if len(present) > MOST_NAMED:
        note += f" {len(present):,} classes, too many to name."
    own = class_colors(len(class_names))[np.zeros(len(wrong), int) if labels is None else labels]
    figure = Figure(figsize=MAP_SIZE, dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    size = 9 if len(wrong) > 500 else 20
    x, y = points.T
    axes.scatter(x[~wrong], y[~wrong], s=size, c=own[~wrong], linewidths=0, alpha=0.75)
    axes.scatter(x[wrong], y[wrong], s=2.5 * size, c=own[wrong], marker="X", linewidths=0.6, edgecolors="black")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(linewidth=0.5, color="0.6")
    axes.set_title(title, fontsize=TEXT + 1, parse_math=False)
    axes.set_xlabel(note, fontsize=SMALL, color=GREY, parse_math=False, wrap=True)
    _draw_legend(axes, class_names, present if len(present) <= MOST_NAMED else [], bool(wrong.any()))
    return figure


def project(features: NDArray[np.float32]) -> tuple[NDArray[np.float64], str]:
    """Project features (M, E) on two principal components, and describe them."""
    if np.ptp(features, axis=0).max() == 0:
        return np.zeros((len(features), 2)), "All features are equal."
    pca = PCA(n_components=2, svd_solver="full")
    points = pca.fit_transform(features.astype(np.float64))
    return points, f"First two principal components: {pca.explained_variance_ratio_.sum():.0%} of the variance."


def class_colors(count: int) -> NDArray[np.float64]:
    """Choose (count, 3) different colours, RGB in 0-1, in three shades."""
    hues = (0.6 + GOLDEN * np.arange(count)) % 1
    values = np.array([0.85, 0.6, 0.98])[np.arange(count) % 3]
    return hsv_to_rgb(np.stack([hues, np.full(count, 0.75), values], axis=1))


def _draw_legend(axes: Axes, class_names: Sequence[str], shown: Sequence[int], crosses: bool) -> None:
    """Draw a legend for the shown classes and, if present, the crosses."""
    colors, labels = class_colors(len(class_names)), class_labels(class_names) if shown else []
    handles = [Line2D([], [], linestyle="none", marker="o", markeredgewidth=0, color=colors[at]) for at in shown]
    names = [labels[at] for at in shown]
    if crosses:
        handles.append(Line2D([], [], linestyle="none", marker="X", color="white", markeredgecolor="black"))
        names.append("wrong")
    if handles:
        # Names are set later: matplotlib drops names that begin with an underscore, and reads $...$ as formulas.
        place: Any = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5), "frameon": False}
        legend = axes.legend(handles, [" "] * len(handles), **place)
        for text, name in zip(legend.get_texts(), names, strict=True):
            text.set(text=name, parse_math=False, fontsize=SMALL)
