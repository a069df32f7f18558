"""Logistic regression on a few training images per class, over several seeds.

Everything is taken from the few images, including the statistics that standardise the features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from crossmae.classification.evaluation.metrics import Accuracy, Mean, accuracy_of, mean_of
from crossmae.classification.probe.cache import CachedFeatures
from crossmae.classification.probe.logistic import fit
from crossmae.errors import UserError, shorten


@dataclass(frozen=True)
class Shots:
    """Accuracies of every seed with `per_class` images per class, and their mean."""

    per_class: int
    accuracies: tuple[Accuracy, ...]
    mean: Mean


def run_few_shot(
    train: CachedFeatures,
    val: CachedFeatures,
    shots: Sequence[int],
    seeds: Sequence[int],
    strength: float,
    max_iterations: int,
) -> dict[str, Any]:
    """Run `few_shot` on cached features; returns JSON."""
    sets = (train.features, train.labels, val.features, val.labels)
    found = few_shot(*sets, shots, seeds, strength, max_iterations)
    return {"strength": strength, "shots": [asdict(one) for one in found]}


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
    """Fit on `shots` images per class and seed, and classify all validation images.

    Args:
        train, val: features (N, E) and (M, E).
        train_labels, val_labels: (N,) and (M,).
        shots: images per class; with one seed, fewer images are a part of more images.
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
    """Draw the positions of `per_class` images of every class by the seed."""
    rng = np.random.default_rng(seed)
    classes = np.unique(labels.numpy())
    chosen = [rng.permutation(np.flatnonzero(labels.numpy() == label))[:per_class] for label in classes]
    return torch.from_numpy(np.concatenate(chosen))


def check_shots(labels: Tensor, classes: Sequence[str], shots: Sequence[int], key: str) -> None:
    """Check that every class has enough images.

    Raises:
        UserError: a class has too few; names it and `key`, the config key of `shots`.
    """
    counts = torch.bincount(labels, minlength=len(classes)).tolist()
    lacking = [f"{name} ({count})" for name, count in zip(classes, counts, strict=True) if count < max(shots)]
    if lacking:
        raise UserError(
            f"{key}: {max(shots)} images per class were asked for, these classes of data.train have fewer: "
            f"{shorten(lacking)}. Lower {key}, or leave few_shot out of methods."
        )
