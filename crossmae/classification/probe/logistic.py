"""Logistic regression (scikit-learn) on features. Held-out images decide the regularisation.

Shapes: N training images, M other images, E width.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from crossmae.classification.evaluation.metrics import Accuracy, accuracy_of, mean_of
from crossmae.classification.probe.cache import CachedFeatures
from crossmae.data.parallel import Progress
from crossmae.errors import UserError, shorten
from crossmae.pretraining.neighbours import feature_statistics, scale

HELD_OUT = 0.1  # share of the training images of every class that is held out
ENOUGH, MOST_SPLITS = 200, 10  # images to hold out; several smaller tenths are used, up to MOST_SPLITS

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Logistic:
    """A fitted regression, with the mean and deviation that standardise features."""

    regression: Any
    statistics: tuple[Tensor, Tensor]
    converged: bool

    def classify(self, features: Tensor) -> Tensor:
        """Predict the classes (M,) of features (M, E)."""
        return torch.from_numpy(self.regression.predict(_standard(features, self.statistics))).long()


def run_logistic(
    train: CachedFeatures, val: CachedFeatures, strengths: Sequence[float], max_iterations: int, seed: int
) -> dict[str, Any]:
    """Choose the strength, fit on all training images, and test."""
    table = try_strengths(train.features, train.labels, strengths, max_iterations, seed)
    # Of equal strengths, the one nearest to 1 is used: scikit-learn's default.
    strength = max(table, key=lambda row: (table[row].right, -abs(math.log(row))))
    fitted = fit(train.features, train.labels, strength, max_iterations, "logistic")
    return {
        "strength": strength,
        "converged": fitted.converged,
        "table": [{"strength": row, "held_out": asdict(accuracy)} for row, accuracy in table.items()],
        "val": asdict(accuracy_of(fitted.classify(val.features), val.labels)),
        "is_largest": strength == max(strengths),
    }


def fit(features: Tensor, labels: Tensor, strength: float, max_iterations: int, name: str) -> Logistic:
    """Fit on standardised features (N, E) and labels (N,). C is `strength`."""
    statistics = feature_statistics(features)
    regression = LogisticRegression(C=strength, solver="lbfgs", max_iter=max_iterations)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        regression.fit(_standard(features, statistics), labels.numpy())
    for warning in caught:
        if not issubclass(warning.category, ConvergenceWarning):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    converged = not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    if not converged:
        done = int(regression.n_iter_.max())
        why = f"the limit is {max_iterations}" if done >= max_iterations else "its line search found no better point"
        log.warning("%s, C=%g: not converged after %d iterations: %s", name, strength, done, why)
    return Logistic(regression, statistics, converged)


def try_strengths(
    features: Tensor, labels: Tensor, strengths: Sequence[float], max_iterations: int, seed: int
) -> dict[float, Accuracy]:
    """Score every strength on a held-out tenth, or several small tenths."""
    count = len(split(labels, seed)[1])
    splits = [split(labels, seed + number) for number in range(min(math.ceil(ENOUGH / count), MOST_SPLITS))]
    table = {}
    for strength in sorted(set(strengths)):
        found = []
        for kept, held_out in splits:
            fitted = fit(features[kept], labels[kept], strength, max_iterations, "logistic, held-out tenth")
            found.append((fitted.classify(features[held_out]), labels[held_out]))
        predicted, true = (torch.cat(parts) for parts in zip(*found, strict=True))
        table[strength] = accuracy_of(predicted, true)
    return table


def split(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Hold out a tenth of every class, but at least one image.

    At least one image of each class is kept.

    Returns:
        Positions of the kept images, and of the held-out images.
    """
    rng = np.random.default_rng(seed)
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels.numpy()):
        members = rng.permutation(np.flatnonzero(labels.numpy() == label))
        count = min(max(round(HELD_OUT * len(members)), 1), len(members) - 1)
        held_out[members[:count]] = True
    return torch.from_numpy(np.flatnonzero(~held_out)), torch.from_numpy(np.flatnonzero(held_out))


def _standard(features: Tensor, statistics: tuple[Tensor, Tensor]) -> NDArray[np.float64]:
    return scale(features, statistics).double().numpy()


def run_few_shot(
    train: CachedFeatures,
    val: CachedFeatures,
    shots: Sequence[int],
    seeds: Sequence[int],
    strength: float,
    max_iterations: int,
) -> dict[str, Any]:
    """Fit on few images per class, for every seed, and test.

    With the same seed, a smaller set of images is a part of a larger set.

    Returns:
        JSON: for each number of images per class, the accuracies of all seeds and their mean.
    """
    rows = []
    for per_class in sorted(set(shots)):
        accuracies = []
        for seed in Progress(seeds, f"few shots, {per_class}", leave=False, unit="seed"):
            chosen, name = sample(train.labels, per_class, seed), f"few shots, {per_class} per class, seed {seed}"
            fitted = fit(train.features[chosen], train.labels[chosen], strength, max_iterations, name)
            accuracies.append(asdict(accuracy_of(fitted.classify(val.features), val.labels)))
        mean = asdict(mean_of([one["accuracy"] for one in accuracies]))
        rows.append({"per_class": per_class, "accuracies": accuracies, "mean": mean})
    return {"strength": strength, "shots": rows}


def sample(labels: Tensor, per_class: int, seed: int) -> Tensor:
    """Draw the positions of `per_class` images of every class."""
    rng = np.random.default_rng(seed)
    classes = np.unique(labels.numpy())
    chosen = [rng.permutation(np.flatnonzero(labels.numpy() == label))[:per_class] for label in classes]
    return torch.from_numpy(np.concatenate(chosen))


def check_shots(labels: Tensor, classes: Sequence[str], shots: Sequence[int], key: str) -> None:
    """Reject classes with too few images. The error names `key`."""
    counts = torch.bincount(labels, minlength=len(classes)).tolist()
    if lacking := [f"{name} ({count})" for name, count in zip(classes, counts, strict=True) if count < max(shots)]:
        raise UserError(
            f"{key}: {max(shots)} images per class are wanted, but data.train has fewer of {shorten(lacking)}. "
            f"Lower {key}, or leave few_shot out of methods."
        )
