"""Proves the sweep: every cell equals the probe of pretraining, and the pair is chosen without validation images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from crossmae.classification.probe import knn
from crossmae.classification.probe.knn import sweep
from crossmae.pretraining.neighbours import knn_accuracy

KS, TEMPERATURES = (1, 5, 20, 59), (0.02, 0.07, 1.0)


def noisy_classes() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """60 training and 40 validation images of 5 overlapping classes."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(5, 6, generator=generator)
    labels = torch.randint(5, (100,), generator=generator)
    features = centers[labels] + 2.5 * torch.randn(100, 6, generator=generator)
    return features[:60], labels[:60], features[60:], labels[60:]


def test_cells_equal_single_probes() -> None:
    data = noisy_classes()
    found = sweep(*data, 5, KS, TEMPERATURES)
    pairs = [(cell.k, cell.temperature) for cell in found.cells]
    assert pairs == [(k, temperature) for k in KS for temperature in TEMPERATURES]
    for cell in found.cells:
        assert cell.val.accuracy == knn_accuracy(*data, 5, cell.k, cell.temperature)
    assert len({cell.val.right for cell in found.cells}) > 3
    assert found.default == next(cell for cell in found.cells if (cell.k, cell.temperature) == (20, 0.07))
    assert sweep(*data, 5, [1], [0.07]).default is None


def test_training_images_are_left_out_one_by_one() -> None:
    """A slow reference: each image is classified by a data set that lacks it."""
    train, labels, val, val_labels = noisy_classes()
    for cell in sweep(train, labels, val, val_labels, 5, KS, TEMPERATURES).cells:
        rights = 0.0
        for index in range(60):
            others = torch.arange(60) != index
            one = train[index : index + 1], labels[index : index + 1]
            rights += knn_accuracy(train[others], labels[others], *one, 5, cell.k, cell.temperature)
        assert cell.train.right == rights


def test_only_some_training_images_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    data = noisy_classes()
    monkeypatch.setattr(knn, "LEAVE_ONE_OUT", 7)
    assert {cell.train.images for cell in sweep(*data, 5, KS, TEMPERATURES).cells} == {7}


def test_validation_labels_have_no_part_in_the_choice() -> None:
    train, labels, val, val_labels = noisy_classes()
    chosen = sweep(train, labels, val, val_labels, 5, KS, TEMPERATURES).chosen
    other = sweep(train, labels, val, (val_labels + 1) % 5, 5, KS, TEMPERATURES).chosen
    assert (chosen.k, chosen.temperature) == (other.k, other.temperature)
    assert chosen.val != other.val
    cells = sweep(train, labels, val, val_labels, 5, KS, TEMPERATURES).cells
    assert chosen == next(cell for cell in cells if cell.train.right == max(c.train.right for c in cells))
