"""k nearest neighbours on frozen features. Training images decide k and temperature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from typing import Any

import torch

from crossmae.classification.evaluation.metrics import accuracy_of
from crossmae.classification.probe.cache import CachedFeatures
from crossmae.data.sources.source import evenly_spaced
from crossmae.pretraining.neighbours import nearest, standardize, vote

DEFAULT_PAIR = (20, 0.07)  # k and temperature of the probe during pretraining, and of DINO (arXiv 2104.14294)
LEAVE_ONE_OUT = 10_000  # largest number of training images that are classified by the other training images


@torch.no_grad()
def sweep(
    train: CachedFeatures,
    val: CachedFeatures,
    num_classes: int,
    ks: Sequence[int],
    temperatures: Sequence[float],
    device: torch.device,
) -> dict[str, Any]:
    """Classify with every pair of k and temperature, in one search.

    The pair is chosen without validation images: up to LEAVE_ONE_OUT evenly spaced training images are each classified
    by all other training images. If pairs score equally, the smaller k is used, then the lower temperature. Each k is
    smaller than the number of training images. Features are standardised first.

    Returns:
        JSON: `cells` with the scores of all pairs, the `chosen` cell, and the `default` cell (None if its pair was not
        tried).
    """
    device = torch.device("cpu") if device.type == "mps" else device  # the statistics are float64
    features, queries = standardize(train.features.to(device), val.features.to(device))
    labels = train.labels.to(device)
    own = torch.tensor(evenly_spaced(len(features), LEAVE_ONE_OUT), device=device)
    found = {
        "val": (nearest(features, queries, max(ks)), val.labels),
        "train": (nearest(features, features[own], max(ks), own=own), labels[own]),
    }
    cells: list[dict[str, Any]] = []
    for k, temperature in product(sorted(set(ks)), sorted(set(temperatures))):
        cell: dict[str, Any] = {"k": k, "temperature": temperature}
        for name, ((similarity, positions), true) in found.items():
            predicted = vote(similarity[:, :k], labels[positions[:, :k]], num_classes, temperature)
            cell[name] = asdict(accuracy_of(predicted, true))
        cells.append(cell)
    chosen = max(cells, key=lambda cell: cell["train"]["right"])  # the first of equal cells
    default = next((cell for cell in cells if (cell["k"], cell["temperature"]) == DEFAULT_PAIR), None)
    return {"cells": cells, "chosen": chosen, "default": default}
