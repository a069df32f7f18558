"""How far a measured accuracy may be from the true one: 95% intervals of one run, and over several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Accuracy:
    """Rightly classified images out of all, with Wilson's 95% interval of their share.

    The interval is that of the choice of validation images; how much else moves the number, such as a seed, it does
    not know.
    """

    accuracy: float
    low: float
    high: float
    right: int
    images: int


@dataclass(frozen=True)
class Mean:
    """Mean accuracy of several runs with Student's 95% interval, cut at 0 and 1; one run alone has none."""

    mean: float
    low: float | None
    high: float | None
    runs: int


def wilson(right: int, images: int) -> tuple[float, float]:
    """95% interval of a share, for images drawn independently."""
    interval = stats.binomtest(right, images).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def accuracy_of(predicted: Tensor, labels: Tensor) -> Accuracy:
    """Accuracy of classes (M,) against the true ones (M,)."""
    right, images = int((predicted.cpu() == labels.cpu()).sum()), len(labels)
    return Accuracy(right / images, *wilson(right, images), right, images)


def mean_of(values: Sequence[float]) -> Mean:
    """Mean of at least one accuracy; where all are equal the interval has no width."""
    numbers = torch.tensor(values, dtype=torch.float64)
    mean, runs = float(numbers.mean()), len(values)
    if runs == 1:
        return Mean(mean, None, None, 1)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, runs - 1)) * float(numbers.std()) / math.sqrt(runs)
    return Mean(mean, max(mean - half, 0.0), min(mean + half, 1.0), runs)
