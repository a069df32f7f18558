"""The figure of precision over recall shows what was scored: its bold curves have the areas that are AP, its thin ones
are the classes with objects, named with their AP."""

import numpy as np
import pytest

from det.evaluation.curves import precision_recall_figure
from det.evaluation.scoring import DetectionScores


def made_up(classes, absent=()):
    """DetectionScores of so many classes, some of which have no objects."""
    rng = np.random.default_rng(0)
    precision = np.sort(rng.random((10, 101, classes, 4, 3)), axis=1)[:, ::-1]
    precision[:, :, list(absent)] = -1
    names = tuple(f"_class $^$ {index}, with a long name" for index in range(classes))
    objects = tuple(0 if index in absent else 5 for index in range(classes))
    return DetectionScores(precision, precision[:, 0], precision, names, objects, "", (1, 10, 100))


@pytest.mark.parametrize("classes,absent,lines", [(5, (), 6), (21, (3,), 21), (25, (), 1), (2, (0, 1), 0)])
def test_each_panel_shows_the_classes_thinly_and_their_mean_boldly(classes, absent, lines):
    scores = made_up(classes, absent)
    figure = precision_recall_figure(scores, "Box predictions on cats")
    for axes, metric in zip(figure.axes, ("AP50", "AP75", "AP"), strict=True):
        assert len(axes.get_lines()) == lines
        if lines:
            bold = axes.get_lines()[-1]
            assert 100 * np.mean(bold.get_ydata()) == pytest.approx(scores.numbers()[metric])
            assert all(bold.get_linewidth() > thin.get_linewidth() for thin in axes.get_lines()[:-1])
            assert f"{scores.numbers()[metric]:.1f}" in axes.get_title(loc="left")
    assert figure.get_suptitle() == "Box predictions on cats" + (", 25 classes" if classes == 25 else "")


def test_the_legend_names_the_classes_with_objects():
    scores = made_up(3, absent=(1,))
    figure = precision_recall_figure(scores, "title")
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    by_class = scores.by_class()
    assert texts == [
        f"{by_class[0]['AP']:.1f}  _class $^$ 0, with a lo…",
        f"{by_class[2]['AP']:.1f}  _class $^$ 2, with a lo…",
        f"{scores.numbers()['AP']:.1f}  mean",
    ]
    figure.draw_without_rendering()  # $ is text, not mathematics
