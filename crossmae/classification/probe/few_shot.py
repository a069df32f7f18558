"""Logistic regression on a few images per class, many times over: how good features are where labels are rare.

Everything is taken from the few images, the statistics that features are standardised by, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from crossmae.classification.evaluation.intervals import Accuracy, Mean, accuracy_of, mean_of
from crossmae.classification.probe.logistic import fit
from crossmae.errors import UserError

MAX_NAMES = 5


@dataclass(frozen=True)
class Shots:
    """Accuracy with so many images per class: of every seed, and the mean with Student's 95% interval."""

    per_class: int
    accuracies: tuple[Accuracy, ...]
    mean: Mean


def few_shot(
    train: Tensor,
    train_labels: Tensor,
    val: Tensor,
    val_labels: Tensor,
    shots: Sequence[int],
    seeds: Sequence[int],
    strength: float,
    max_iterations: int,
) -> list[Shots]:
    """Fit on `shots` images per class, once for every seed, and classify all validation images.

    Args:
        train, val: features (N, E) and (M, E).
        train_labels, val_labels: (N,) and (M,).
        shots: images per class; with one seed, the fewer are among the more.
        strength, max_iterations: of the logistic regression.
    """
    results = []
    for per_class in sorted(set(shots)):
        accuracies = []
        for seed in tqdm(seeds, f"few shots, {per_class}", leave=False, unit="seed", dynamic_ncols=True):
            chosen = sample(train_labels, per_class, seed)
            name = f"few shots, {per_class} per class, seed {seed}"
            fitted = fit(train[chosen], train_labels[chosen], strength, max_iterations, name)
            accuracies.append(accuracy_of(fitted.classify(val), val_labels))
        results.append(Shots(per_class, tuple(accuracies), mean_of([one.accuracy for one in accuracies])))
    return results


def sample(labels: Tensor, per_class: int, seed: int) -> Tensor:
    """Positions of the first `per_class` images of every class, in a random order that the seed decides."""
    rng = np.random.default_rng(seed)
    classes = np.unique(labels.numpy())
    chosen = [rng.permutation(np.flatnonzero(labels.numpy() == label))[:per_class] for label in classes]
    return torch.from_numpy(np.concatenate(chosen))


def check_shots(labels: Tensor, classes: Sequence[str], shots: Sequence[int], key: str) -> None:
    """Make sure that every class has enough images.

    Raises:
        UserError: names the classes that have not, and `key`, the config key that asked for so many.
    """
    counts = torch.bincount(labels, minlength=len(classes)).tolist()
    lacking = [f"{name} ({count})" for name, count in zip(classes, counts, strict=True) if count < max(shots)]
    if lacking:
        more = f" and {len(lacking) - MAX_NAMES} more" if len(lacking) > MAX_NAMES else ""
        raise UserError(
            f"{key}: {max(shots)} images per class were asked for, these classes of data.train have fewer: "
            f"{', '.join(lacking[:MAX_NAMES])}{more}; lower {key}, or leave few_shot out of methods"
        )
