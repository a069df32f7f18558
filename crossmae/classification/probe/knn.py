"""k nearest neighbours on frozen features, with k and temperature chosen on training images.

Shapes: N training images, M validation images, E width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from crossmae.classification.evaluation.metrics import Accuracy, accuracy_of
from crossmae.classification.probe.cache import CachedFeatures
from crossmae.data.sources import evenly_spaced
from crossmae.pretraining.neighbours import nearest, standardize, vote

DEFAULT_K, DEFAULT_TEMPERATURE = 20, 0.07  # of the probe while pretraining, and of DINO (arXiv 2104.14294)
LEAVE_ONE_OUT = 10_000  # training images at most that are classified by the others


@dataclass(frozen=True)
class Cell:
    """Accuracy of one pair on validation images, and on training images that are not their own neighbours."""

    k: int
    temperature: float
    val: Accuracy
    train: Accuracy


@dataclass(frozen=True)
class Sweep:
    """All pairs; `chosen` is the best on training images, `default` the pair of the constants if it was tried."""

    cells: tuple[Cell, ...]
    chosen: Cell
    default: Cell | None


def run_knn(
    train: CachedFeatures,
    val: CachedFeatures,
    num_classes: int,
    ks: Sequence[int],
    temperatures: Sequence[float],
    device: torch.device,
) -> dict[str, Any]:
    """Run `sweep` on standardised features, as JSON."""
    features = standardize(train.features.to(device), val.features.to(device))
    labels = train.labels.to(device), val.labels.to(device)
    return asdict(sweep(features[0], labels[0], features[1], labels[1], num_classes, ks, temperatures))


@torch.no_grad()
def sweep(
    train: Tensor,
    train_labels: Tensor,
    val: Tensor,
    val_labels: Tensor,
    num_classes: int,
    ks: Sequence[int],
    temperatures: Sequence[float],
) -> Sweep:
    """Classify by every pair of k and temperature, with one search for the largest k.

    The pair is chosen without validation images: by up to LEAVE_ONE_OUT evenly spaced training images, each classified
    by all others. Of equal pairs the smaller k, then the lower temperature is taken.

    Args:
        train, val: standardised features (N, E) and (M, E), on the device that computes.
        train_labels, val_labels: (N,) and (M,) on the same device.
        ks: numbers of neighbours; at most N - 1.
        temperatures: see `crossmae.pretraining.neighbours.vote`.
    """
    own = torch.tensor(evenly_spaced(len(train), LEAVE_ONE_OUT), device=train.device)
    found = {
        "val": (nearest(train, val, max(ks)), val_labels),
        "train": (nearest(train, train[own], max(ks), own=own), train_labels[own]),
    }

    def accuracy(name: str, k: int, temperature: float) -> Accuracy:
        (similarity, positions), labels = found[name]
        predicted = vote(similarity[:, :k], train_labels[positions[:, :k]], num_classes, temperature)
        return accuracy_of(predicted, labels)

    cells = tuple(
        Cell(k, temperature, accuracy("val", k, temperature), accuracy("train", k, temperature))
        for k in sorted(set(ks))
        for temperature in sorted(set(temperatures))
    )
    chosen = max(cells, key=lambda cell: cell.train.right)  # the first of equals
    defaults = (cell for cell in cells if (cell.k, cell.temperature) == (DEFAULT_K, DEFAULT_TEMPERATURE))
    return Sweep(cells, chosen, next(defaults, None))
