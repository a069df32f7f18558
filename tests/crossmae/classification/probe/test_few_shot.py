"""Proves the few-shot probe: as many images of every class as were asked for, and nothing taken from any other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from crossmae.classification.evaluation.metrics import mean_of
from crossmae.classification.probe.few_shot import check_shots, few_shot, sample
from crossmae.errors import UserError

LABELS = torch.tensor([0, 1, 2] * 20 + [2] * 5)


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(3, 8, generator=generator)
    val_labels = torch.arange(90) % 3
    train = centers[LABELS] + torch.randn(len(LABELS), 8, generator=generator)
    return train, LABELS, centers[val_labels] + torch.randn(90, 8, generator=generator), val_labels


def test_samples() -> None:
    chosen = {count: sample(LABELS, count, seed=3) for count in (1, 5, 20)}
    for count, positions in chosen.items():
        assert torch.bincount(LABELS[positions]).tolist() == [count] * 3
        assert len(set(positions.tolist())) == 3 * count
    assert set(chosen[1].tolist()) < set(chosen[5].tolist()) < set(chosen[20].tolist())
    assert torch.equal(sample(LABELS, 5, 3), chosen[5])
    assert not torch.equal(sample(LABELS, 5, 4), chosen[5])


def test_only_the_few_images_count() -> None:
    """All others are replaced by nonsense, which must not change a thing."""
    train, labels, val, val_labels = data()
    spoilt = torch.full_like(train, 1e4)
    kept = torch.cat([sample(labels, 5, seed) for seed in (0, 1)])
    spoilt[kept] = train[kept]
    arguments = (val, val_labels, (1, 5), (0, 1), 1.0, 500)
    assert few_shot(spoilt, labels, *arguments) == few_shot(train, labels, *arguments)


def test_results_by_seed_and_their_mean() -> None:
    found = few_shot(*data(), (5, 1), (0, 1, 2), 1.0, 500)
    assert [one.per_class for one in found] == [1, 5]
    for one in found:
        values = [accuracy.accuracy for accuracy in one.accuracies]
        assert len(set(values)) > 1
        assert one.mean == mean_of(values)
    assert found[1].mean.mean > found[0].mean.mean > 1 / 3


def test_classes_with_too_few_images_are_named() -> None:
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    check_shots(labels, ["cat", "dog", "emu"], [1], "few_shot.shots")
    with pytest.raises(UserError, match=r"few_shot.shots: 3 images per class .*: dog \(1\), emu \(2\)\. Lower"):
        check_shots(labels, ["cat", "dog", "emu"], [1, 3], "few_shot.shots")
    with pytest.raises(UserError, match=r"fowl \(0\)"):
        check_shots(labels, ["cat", "dog", "emu", "fowl"], [1], "few_shot.shots")
