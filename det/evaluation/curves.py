"""Precision-recall figures."""

from __future__ import annotations

import math

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from crossmae.errors import counted
from crossmae.reports.figures import DPI
from det.evaluation.scoring import ALL, IOU_50, IOU_75, DetectionScores

CLASSES_UP_TO = 20  # largest number of classes with a curve of their own
LEGEND_LETTERS = 24  # longest class name, in letters
_GREY, _LIGHT = "0.35", "0.9"


def precision_recall_figure(scores: DetectionScores, title: str) -> Figure:
    """Draw precision over recall at IoU 0.5, 0.75 and the mean threshold.

    The mean over the classes is bold. Up to 20 classes are thin lines. A class without objects has no curve.
    """
    curves = scores.precision[..., ALL, -1]  # (10, 101, categories)
    drawn = [index for index, count in enumerate(scores.objects) if count]
    few, colors = len(drawn) <= CLASSES_UP_TO, colormaps["tab10" if len(drawn) <= 10 else "tab20"]
    figure = Figure(figsize=(11.5 if few else 9.5, 3.9), dpi=DPI, layout="constrained")
    heading = title if few else f"{title}, {counted(len(drawn), 'class')}"
    figure.suptitle(heading, fontsize=12, x=0.01, ha="left", fontweight="bold", parse_math=False)
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    numbers = scores.numbers()
    contents = (
        (f"IoU 0.5: AP50 {_percent(numbers['AP50'])}", curves[IOU_50]),
        (f"IoU 0.75: AP75 {_percent(numbers['AP75'])}", curves[IOU_75]),
        (f"mean of IoU 0.5 to 0.95: AP {_percent(numbers['AP'])}", curves.mean(axis=0)),
    )
    for axes, (name, values) in zip(panels, contents, strict=True):
        axes.set_title(name, fontsize=9.5, loc="left", color="0.15")
        axes.set_xlabel("recall", color=_GREY)
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xticks=np.linspace(0, 1, 6), yticks=np.linspace(0, 1, 6))
        axes.tick_params(length=0, labelsize=8, labelcolor=_GREY)
        axes.grid(color=_LIGHT, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[:].set_visible(False)
        recall, shown = np.linspace(0, 1, len(values)), values[:, drawn]
        for place, curve in enumerate(shown.T if few else ()):
            axes.plot(recall, curve, color=colors(place), linewidth=1.0, alpha=0.9)
        if shown.size:
            axes.plot(recall, shown.mean(axis=1), color="black", linewidth=2.4)
    panels[0].set_ylabel("precision", color=_GREY)
    if few and drawn:
        by_class = scores.by_class()
        names = [name if len(name) <= LEGEND_LETTERS else f"{name[: LEGEND_LETTERS - 1]}…" for name in scores.names]
        labels = [f"{_percent(by_class[index]['AP']):>4}  {names[index]}" for index in drawn]
        legend = figure.legend(
            panels[0].get_lines(), [*labels, f"{_percent(numbers['AP']):>4}  mean"], loc="outside right center",
            title="AP", title_fontsize=8, fontsize=8, frameon=False, alignment="left",
        )  # fmt: skip
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}"
