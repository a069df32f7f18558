"""Proves that two dimensions keep what is alike together, by whichever method, and repeat themselves."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from crossmae.classification.evaluation.embedding import NAMED, Embedding, class_colors, embed, embedding_figure


@pytest.fixture
def without_umap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)


def two_groups(count: int = 60, width: int = 8) -> Tensor:
    """(count, width): the first half around -3, the second around +3, in a dimension of which PCA knows nothing."""
    torch.manual_seed(0)
    features = torch.randn(count, width)
    features[:, 5] += torch.where(torch.arange(count) < count // 2, -3.0, 3.0)
    return features


@pytest.mark.usefixtures("without_umap")
def test_pca_is_the_projection_on_the_largest_variances() -> None:
    features = two_groups()
    embedding = embed(features)
    centred = features.double() - features.double().mean(0)
    variances, axes = torch.linalg.eigh(centred.T @ centred)
    wanted = (centred @ axes[:, [-1, -2]]).numpy()
    assert embedding.method == "PCA"
    assert np.abs(embedding.points) == pytest.approx(np.abs(wanted), abs=1e-4)
    assert f"{float(variances[-2:].sum() / variances.sum()):.0%} of the variance" in embedding.note
    assert (embed(features, seed=1).points == embedding.points).all()


@pytest.mark.usefixtures("without_umap")
def test_features_that_do_not_differ_are_one_point() -> None:
    embedding = embed(torch.ones(5, 4))
    assert (embedding.points == 0).all()
    assert embedding.note == "All features are equal."


@pytest.mark.parametrize("shape", [(2, 8), (8, 1), (8,)])
def test_too_little_for_two_dimensions_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \(M, E\) with M from 3 and E from 2"):
        embed(torch.zeros(shape))


def test_features_that_are_not_finite_are_counted() -> None:
    features = two_groups()
    features[3, 2], features[4, 4] = torch.nan, torch.inf
    with pytest.raises(ValueError, match="2 of 60 features are not finite"):
        embed(features)


def test_umap_is_used_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    class Reducer:
        def __init__(self, **arguments: Any) -> None:
            given.update(arguments)

        def fit_transform(self, values: Any) -> Any:
            return values[:, 3:5]

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=Reducer))
    embedding = embed(two_groups(), seed=7)
    assert embedding.method == "UMAP"
    assert (embedding.points == two_groups()[:, 3:5].numpy()).all()
    assert (given["random_state"], given["n_jobs"]) == (7, 1)  # several threads would not repeat
    assert embed(two_groups(count=10)).method == "PCA"  # fewer points than neighbours


def test_an_empty_folder_of_that_name_is_not_umap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace())
    assert embed(two_groups()).method == "PCA"


def test_umap_itself_keeps_groups_together() -> None:
    pytest.importorskip("umap", reason='umap-learn is not installed: pip install -e ".[umap]"')
    embedding = embed(two_groups(count=120), seed=3)
    first, second = embedding.points[:60], embedding.points[60:]
    apart = np.linalg.norm(first.mean(0) - second.mean(0))
    assert apart > first.std() + second.std()
    assert (embed(two_groups(count=120), seed=3).points == embedding.points).all()


def figure_of(classes: int, wrong: list[int], names: list[str] | None = None) -> Any:
    labels = np.arange(4 * classes) % classes
    points = np.random.default_rng(0).normal(size=(len(labels), 2)).astype(np.float32)
    mask = np.isin(np.arange(len(labels)), wrong)
    embedding = Embedding(points, "PCA", "A note.")
    return (
        embedding,
        mask,
        embedding_figure(embedding, labels, mask, names or [f"n{i}" for i in range(classes)], "Title"),
    )


def test_points_have_the_colour_of_their_class_and_wrong_ones_are_crosses() -> None:
    embedding, mask, figure = figure_of(3, wrong=[1, 5])
    right, crosses = figure.axes[0].collections
    assert (right.get_offsets() == embedding.points[~mask]).all()
    assert (crosses.get_offsets() == embedding.points[mask]).all()
    colors = class_colors(3)
    assert crosses.get_facecolors()[:, :3] == pytest.approx(colors[[1, 2]])
    assert right.get_facecolors()[:, :3] == pytest.approx(colors[np.arange(12)[~mask] % 3])


def test_names_are_shown_letter_by_letter() -> None:
    names = ["_private", "$x$", "x" * 200]
    *_, figure = figure_of(3, wrong=[0], names=names)
    texts = figure.axes[0].get_legend().get_texts()
    assert [text.get_text() for text in texts[:2]] == names[:2]
    assert len(texts[2].get_text()) < 60
    assert texts[3].get_text() == "wrong"
    assert not any(text.get_parse_math() for text in texts)
    figure.canvas.draw()


def test_of_many_classes_the_number_is_said_instead() -> None:
    *_, figure = figure_of(NAMED + 1, wrong=[])
    assert figure.axes[0].get_legend() is None
    assert "21 classes, too many to name" in figure.axes[0].get_xlabel()
    assert len(np.unique(class_colors(300).round(3), axis=0)) == 300
