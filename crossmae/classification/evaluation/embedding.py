"""Two dimensions of many: a picture in which images that a model takes for similar lie together."""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from crossmae.classification.evaluation.figures import class_labels
from crossmae.classification.evaluation.files import EVALUATION, FEATURES, PREDICTIONS
from crossmae.classification.run_files import read_evaluation
from crossmae.data.sources.subset import evenly_spaced
from crossmae.errors import UserError, import_extra
from crossmae.pretraining.figures import SMALL, TEXT
from crossmae.reports.figures import DPI, save_figure

log = logging.getLogger(__name__)

EMBEDDING = "embedding.png"
MOST_POINTS = 2000
NEIGHBOURS = 15  # UMAP's own default; of fewer points than that it makes nothing
NAMED = 20  # classes up to which a legend names them
SIZE = (9.0, 6.0)  # inches
GOLDEN = (math.sqrt(5) - 1) / 2  # steps of the hue: of any number of classes, neighbours differ most


@dataclass(frozen=True)
class Embedding:
    """Points (M, 2) and, for a caption, how they were made."""

    points: NDArray[np.float32]
    method: str
    note: str


def embed(features: Tensor, seed: int = 0) -> Embedding:
    """Two dimensions by UMAP (arXiv 1802.03426) where umap-learn is installed, else the first two of PCA.

    The same features and seed give the same points.

    Args:
        features: (M, E) with M from 3 and E from 2.
        seed: of UMAP.

    Raises:
        ValueError: fewer points or dimensions, or a feature that is not finite.
    """
    if features.ndim != 2 or features.shape[0] < 3 or features.shape[1] < 2:
        raise ValueError(f"features: expected (M, E) with M from 3 and E from 2, received {tuple(features.shape)}")
    values = features.detach().float().cpu().numpy()
    if not np.isfinite(values).all():
        raise ValueError(f"{(~np.isfinite(values)).any(axis=1).sum():,} of {len(values):,} features are not finite")
    reducer = _find_umap() if len(values) > NEIGHBOURS else None
    return _pca(values) if reducer is None else _umap(reducer, values, seed)


def _find_umap() -> Any:
    """umap-learn's class, or None where it is not installed."""
    try:
        # Any folder of that name on the path can be imported, too, as an empty package.
        return getattr(import_extra("umap", "a UMAP picture of features", "umap"), "UMAP", None)
    except UserError as error:
        log.info("features are shown by PCA: %s", error)
        return None


def _umap(reducer: Any, values: NDArray[np.float32], seed: int) -> Embedding:
    # One thread: more of them make it depend on their timing.
    fitted = reducer(n_neighbors=NEIGHBOURS, metric="cosine", random_state=seed, n_jobs=1)
    points = np.asarray(fitted.fit_transform(values), dtype=np.float32)
    note = (
        f"UMAP, {NEIGHBOURS} neighbours by cosine: what lies together is similar; how far groups are apart says little."
    )
    return Embedding(points, "UMAP", note)


def _pca(values: NDArray[np.float32]) -> Embedding:
    from sklearn.decomposition import PCA  # half a second

    if np.ptp(values, axis=0).max() == 0:
        return Embedding(np.zeros((len(values), 2), np.float32), "PCA", "All features are equal.")
    pca = PCA(n_components=2, svd_solver="full")
    points = pca.fit_transform(values.astype(np.float64)).astype(np.float32)
    share = float(pca.explained_variance_ratio_.sum())
    return Embedding(points, "PCA", f"The first two dimensions of PCA, which hold {share:.0%} of the variance.")


def update_embedding(folder: Path) -> str | None:
    """Draw `folder`/embedding.png where it is missing or older than the features.

    Args:
        folder: of an evaluation.

    Returns:
        Why there is no picture; None where there is one.
    """
    picture, features = folder / EMBEDDING, folder / FEATURES
    if not features.is_file():
        picture.unlink(missing_ok=True)  # of an earlier evaluation
        return f"{FEATURES} does not exist"
    if picture.is_file() and picture.stat().st_mtime_ns >= features.stat().st_mtime_ns:
        return None
    try:
        save_figure(_figure_of(folder), picture)
    except (UserError, ValueError, LookupError, OSError, SafetensorError) as error:
        picture.unlink(missing_ok=True)
        return f"{FEATURES} can not be drawn: {error}"
    return None


def _figure_of(folder: Path) -> Figure:
    """The picture of the features in a folder; errors of all kinds where its files do not fit together."""
    tensors = load_file(folder / FEATURES)
    found = read_evaluation(folder / EVALUATION)
    shown = evenly_spaced(len(tensors["indices"]), MOST_POINTS)
    features, labels, indices = (tensors[name][shown] for name in ("features", "labels", "indices"))
    with open(folder / PREDICTIONS, encoding="utf-8", newline="") as file:
        wrong = np.array([row["correct"] != "1" for row in csv.DictReader(file)])
    title = f"Features of {len(indices):,} of {found.samples:,} images"
    names = [one.name for one in found.classes]
    of_one = labels.numpy() if labels.ndim == 1 else None
    return embedding_figure(embed(features), of_one, wrong[indices.numpy()], names, title)


def class_colors(count: int) -> NDArray[np.float64]:
    """(count, 3) colours, RGB in 0-1, in three shades."""
    hues = (0.6 + GOLDEN * np.arange(count)) % 1
    values = np.array([0.85, 0.6, 0.98])[np.arange(count) % 3]
    return hsv_to_rgb(np.stack([hues, np.full(count, 0.75), values], axis=1))


def embedding_figure(
    embedding: Embedding,
    labels: NDArray[np.int64] | None,
    wrong: NDArray[np.bool_],
    class_names: Sequence[str],
    title: str,
) -> Figure:
    """A scatter of the points, coloured by their true class; wrongly classified ones are crosses.

    Args:
        embedding: of M images.
        labels: (M,) classes; None where an image can have several, and has no colour of its own then.
        wrong: (M,).
        class_names: C names; a legend shows them where they are few.
        title: a line for above.
    """
    present = [] if labels is None else np.unique(labels).tolist()
    colors = class_colors(len(class_names)) if labels is not None else class_colors(1)
    own = colors[labels if labels is not None else np.zeros(len(wrong), np.int64)]
    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    size = 9 if len(wrong) > 500 else 20
    right = ~wrong
    x, y = embedding.points.T
    axes.scatter(x[right], y[right], s=size, c=own[right], linewidths=0, alpha=0.75)
    axes.scatter(x[wrong], y[wrong], s=2.5 * size, c=own[wrong], marker="X", linewidths=0.6, edgecolors="black")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(linewidth=0.5, color="0.6")
    axes.set_title(title, fontsize=TEXT + 1, parse_math=False)
    unnamed = "" if labels is None or len(present) <= NAMED else f" {len(present):,} classes, too many to name."
    axes.set_xlabel(f"{embedding.note}{unnamed}", fontsize=SMALL, color="0.35", parse_math=False, wrap=True)
    named = present if len(present) <= NAMED else []
    labels_of = class_labels(class_names) if named else []
    _legend(axes, [(labels_of[at], colors[at]) for at in named], bool(wrong.any()))
    return figure


def _legend(axes: Axes, classes: Sequence[tuple[str, Any]], crosses: bool) -> None:
    """Names of the classes, where there are any, and what a cross is."""
    dots: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 6, "markeredgewidth": 0}
    handles = [Line2D([], [], color=tuple(color), **dots) for _, color in classes]
    names = [name for name, _ in classes]
    if crosses:
        style: dict[str, Any] = {"linestyle": "none", "marker": "X", "markersize": 7, "markeredgewidth": 0.6}
        handles.append(Line2D([], [], color="white", markeredgecolor="black", **style))
        names.append("wrong")
    if not handles:
        return
    # Set afterwards: matplotlib leaves out names that begin with an underscore, and reads what $ encloses as maths.
    legend = axes.legend(handles, [" "] * len(handles), loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(text=name, parse_math=False, fontsize=SMALL)
