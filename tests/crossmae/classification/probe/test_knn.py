"""Proves the sweep: every cell equals the probe of pretraining, and the pair is chosen without validation images."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from crossmae.classification.probe import knn
from crossmae.classification.probe.cache import CachedFeatures
from crossmae.pretraining.neighbours import knn_accuracy, standardize

KS, TEMPERATURES = (1, 5, 20, 59), (0.02, 0.07, 1.0)


def noisy_classes() -> tuple[CachedFeatures, CachedFeatures]:
    """60 training and 100 validation images of 5 overlapping classes."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(5, 6, generator=generator)
    labels = torch.randint(5, (160,), generator=generator)
    features = centers[labels] + 2.5 * torch.randn(160, 6, generator=generator)
    return CachedFeatures(features[:60], labels[:60]), CachedFeatures(features[60:], labels[60:])


def sweep(train: CachedFeatures, val: CachedFeatures) -> dict[str, Any]:
    return knn.sweep(train, val, 5, KS, TEMPERATURES, torch.device("cpu"))


def test_cells_equal_single_probes() -> None:
    train, val = noisy_classes()
    found = sweep(train, val)
    pairs = [(cell["k"], cell["temperature"]) for cell in found["cells"]]
    assert pairs == [(k, temperature) for k in KS for temperature in TEMPERATURES]
    features, queries = standardize(train.features, val.features)
    for (k, temperature), cell in zip(pairs, found["cells"], strict=True):
        expected = knn_accuracy(features, train.labels, queries, val.labels, 5, k, temperature)
        assert cell["val"]["accuracy"] == expected
    assert len({cell["val"]["right"] for cell in found["cells"]}) > 3
    assert found["default"] == found["cells"][pairs.index((20, 0.07))]
    assert knn.sweep(train, val, 5, [1], [0.07], torch.device("cpu"))["default"] is None


def test_training_images_are_left_out_one_by_one() -> None:
    """A slow reference: each image is classified by a data set that lacks it."""
    train, val = noisy_classes()
    features, _ = standardize(train.features, val.features)
    for cell in sweep(train, val)["cells"]:
        rights = 0.0
        for index in range(60):
            others = torch.arange(60) != index
            one = features[index : index + 1], train.labels[index : index + 1]
            rights += knn_accuracy(features[others], train.labels[others], *one, 5, cell["k"], cell["temperature"])
        assert cell["train"]["right"] == rights


def test_only_some_training_images_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "LEAVE_ONE_OUT", 7)
    assert {cell["train"]["images"] for cell in sweep(*noisy_classes())["cells"]} == {7}


def test_validation_labels_have_no_part_in_the_choice() -> None:
    train, val = noisy_classes()
    found = sweep(train, val)
    other = sweep(train, CachedFeatures(val.features, (val.labels + 1) % 5))["chosen"]
    chosen = found["chosen"]
    assert (chosen["k"], chosen["temperature"]) == (other["k"], other["temperature"])
    assert chosen["val"] != other["val"]
    best = max(cell["train"]["right"] for cell in found["cells"])
    assert chosen == next(cell for cell in found["cells"] if cell["train"]["right"] == best)
