"""Logistic regression by L-BFGS (scikit-learn) on features, its strength of regularisation found on held-out images.

Shapes: N training images, M others, E width.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from crossmae.classification.evaluation.intervals import Accuracy, accuracy_of
from crossmae.pretraining.neighbours import feature_statistics, scale

HELD_OUT = 0.1  # share of the training images of every class
ENOUGH, MOST_SPLITS = 200, 10  # images held out, over several tenths if need be

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Logistic:
    """A fitted regression and the statistics (mean, deviation) that features are standardised by."""

    regression: Any
    statistics: tuple[Tensor, Tensor]
    converged: bool

    def classify(self, features: Tensor) -> Tensor:
        """Classes (M,) of features (M, E)."""
        return torch.from_numpy(self.regression.predict(_standard(features, self.statistics))).long()


@dataclass(frozen=True)
class Choice:
    """Accuracy on held-out training images of every strength, and the strength that is the best there."""

    table: tuple[tuple[float, Accuracy], ...]
    strength: float


def fit(features: Tensor, labels: Tensor, strength: float, max_iterations: int, name: str) -> Logistic:
    """Fit on features (N, E), standardised by their own statistics, and labels (N,) of at least two classes.

    Args:
        strength: scikit-learn's C; less is more regularisation.
        name: what the log calls the fit, should it not converge.
    """
    statistics = feature_statistics(features)
    regression = LogisticRegression(C=strength, solver="lbfgs", max_iter=max_iterations)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        regression.fit(_standard(features, statistics), labels.numpy())
    converged = True
    for warning in caught:
        if not issubclass(warning.category, ConvergenceWarning):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
            continue
        converged, done = False, int(regression.n_iter_.max())
        why = f"the limit is {max_iterations}" if done >= max_iterations else "its line search found no better point"
        log.warning("%s, C=%g: not converged after %d iterations: %s", name, strength, done, why)
    return Logistic(regression, statistics, converged)


def choose_strength(
    features: Tensor, labels: Tensor, strengths: Sequence[float], max_iterations: int, seed: int
) -> Choice:
    """Find the best of some strengths on tenths of the training images, held out of the fits.

    Few images make a small tenth, which tells little: then several tenths are drawn. Of equals, the strength nearest
    to 1 is taken, scikit-learn's own.

    Raises:
        ValueError: no class has two images, so that none can be held out.
    """
    count = len(split(labels, seed)[1])
    if not count:
        raise ValueError("no image can be held out: no class has two")
    splits = [split(labels, seed + number) for number in range(min(math.ceil(ENOUGH / count), MOST_SPLITS))]
    table = []
    for strength in sorted(set(strengths)):
        found = []
        for kept, held_out in splits:
            fitted = fit(features[kept], labels[kept], strength, max_iterations, "logistic, held-out tenth")
            found.append((fitted.classify(features[held_out]), labels[held_out]))
        predicted, true = (torch.cat(parts) for parts in zip(*found, strict=True))
        table.append((strength, accuracy_of(predicted, true)))
    return Choice(tuple(table), max(table, key=lambda row: (row[1].right, -abs(math.log(row[0]))))[0])


def split(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Positions of images to keep and to hold out: of every class a tenth, at least one image, none of a single one."""
    rng = np.random.default_rng(seed)
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels.numpy()):
        members = rng.permutation(np.flatnonzero(labels.numpy() == label))
        count = min(max(round(HELD_OUT * len(members)), 1), len(members) - 1)
        held_out[members[:count]] = True
    return torch.from_numpy(np.flatnonzero(~held_out)), torch.from_numpy(np.flatnonzero(held_out))


def _standard(features: Tensor, statistics: tuple[Tensor, Tensor]) -> NDArray[np.float64]:
    return scale(features, statistics).double().numpy()
