"""Proves the few-shot probe: as many images of every class as were asked for, and nothing taken from any other."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from crossmae.classification.evaluation.metrics import mean_of
from crossmae.classification.probe.cache import CachedFeatures
from crossmae.classification.probe.logistic import check_shots, run_few_shot, sample
from crossmae.errors import UserError

LABELS = torch.tensor([0, 1, 2] * 20 + [2] * 5)


def data() -> tuple[CachedFeatures, CachedFeatures]:
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(3, 8, generator=generator)
    val_labels = torch.arange(90) % 3
    train = centers[LABELS] + torch.randn(len(LABELS), 8, generator=generator)
    val = centers[val_labels] + torch.randn(90, 8, generator=generator)
    return CachedFeatures(train, LABELS), CachedFeatures(val, val_labels)


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
    train, val = data()
    spoilt = torch.full_like(train.features, 1e4)
    kept = torch.cat([sample(LABELS, 5, seed) for seed in (0, 1)])
    spoilt[kept] = train.features[kept]
    arguments = (val, (1, 5), (0, 1), 1.0, 500)
    assert run_few_shot(CachedFeatures(spoilt, LABELS), *arguments) == run_few_shot(train, *arguments)


def test_results_by_seed_and_their_mean() -> None:
    found = run_few_shot(*data(), (5, 1), (0, 1, 2), 1.0, 500)["shots"]
    assert [one["per_class"] for one in found] == [1, 5]
    for one in found:
        values = [accuracy["accuracy"] for accuracy in one["accuracies"]]
        assert len(set(values)) > 1
        assert one["mean"] == asdict(mean_of(values))
    assert found[1]["mean"]["mean"] > found[0]["mean"]["mean"] > 1 / 3


def test_classes_with_too_few_images_are_named() -> None:
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    check_shots(labels, ["cat", "dog", "emu"], [1], "few_shot.shots")
    with pytest.raises(UserError, match=r"few_shot.shots: 3 images per class .*: dog \(1\), emu \(2\)\. Lower"):
        check_shots(labels, ["cat", "dog", "emu"], [1, 3], "few_shot.shots")
    with pytest.raises(UserError, match=r"fowl \(0\)"):
        check_shots(labels, ["cat", "dog", "emu", "fowl"], [1], "few_shot.shots")
