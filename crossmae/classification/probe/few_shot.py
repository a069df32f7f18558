"""Logistic regression on a few training images per class, over several seeds.

Everything is taken from the few images, including the statistics that standardise the features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from crossmae.classification.evaluation.metrics import accuracy_of, mean_of
from crossmae.classification.probe.cache import CachedFeatures
from crossmae.classification.probe.logistic import fit
from crossmae.errors import UserError, shorten


def run_few_shot(
    train: CachedFeatures,
    val: CachedFeatures,
    shots: Sequence[int],
    seeds: Sequence[int],
    strength: float,
    max_iterations: int,
) -> dict[str, Any]:
    """Fit on few images per class and seed, and test.

    With one seed, fewer images per class are a part of more images.

    Returns:
        JSON: accuracies of all seeds and their mean, for each number of images per class.
    """
    rows = []
    for per_class in sorted(set(shots)):
        accuracies = []
        for seed in tqdm(seeds, f"few shots, {per_class}", leave=False, unit="seed", dynamic_ncols=True):
            chosen, name = sample(train.labels, per_class, seed), f"few shots, {per_class} per class, seed {seed}"
            fitted = fit(train.features[chosen], train.labels[chosen], strength, max_iterations, name)
            accuracies.append(asdict(accuracy_of(fitted.classify(val.features), val.labels)))
        mean = asdict(mean_of([one["accuracy"] for one in accuracies]))
        rows.append({"per_class": per_class, "accuracies": accuracies, "mean": mean})
    return {"strength": strength, "shots": rows}


def sample(labels: Tensor, per_class: int, seed: int) -> Tensor:
    """Draw the positions of `per_class` images of every class by the seed."""
    rng = np.random.default_rng(seed)
    classes = np.unique(labels.numpy())
    chosen = [rng.permutation(np.flatnonzero(labels.numpy() == label))[:per_class] for label in classes]
    return torch.from_numpy(np.concatenate(chosen))


def check_shots(labels: Tensor, classes: Sequence[str], shots: Sequence[int], key: str) -> None:
    """Refuse classes with too few images, naming `key`, the config key of `shots`."""
    counts = torch.bincount(labels, minlength=len(classes)).tolist()
    if lacking := [f"{name} ({count})" for name, count in zip(classes, counts, strict=True) if count < max(shots)]:
        raise UserError(
            f"{key}: {max(shots)} images per class were asked for, these classes of data.train have fewer: "
            f"{shorten(lacking)}. Lower {key}, or leave few_shot out of methods."
        )
