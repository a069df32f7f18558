"""Proves the logistic regression: scikit-learn's own pipeline, a fair split, nothing chosen on what is reported; and of
few images per class: as many as were asked for, and nothing taken from any other."""

from __future__ import annotations

import logging
import warnings
from dataclasses import asdict

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from crossmae.classification.evaluation.metrics import mean_of
from crossmae.classification.probe import logistic
from crossmae.classification.probe.cache import CachedFeatures
from crossmae.classification.probe.logistic import (
    check_shots,
    fit,
    run_few_shot,
    run_logistic,
    sample,
    split,
    try_strengths,
)
from crossmae.errors import UserError


def noisy_classes(count: int = 120) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    features = torch.randn(3, 8, generator=generator)[labels] + 1.5 * torch.randn(count, 8, generator=generator)
    return features * torch.logspace(-2, 2, 8), labels


def test_fit_equals_the_pipeline_of_scikit_learn() -> None:
    features, labels = noisy_classes()
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
    pipeline.fit(features.double().numpy(), labels.numpy())
    others = noisy_classes(300)[0]
    expected = torch.from_numpy(pipeline.predict(others.double().numpy()))
    assert torch.equal(fit(features, labels, 0.1, 500, "test").classify(others), expected)


def test_split_takes_a_tenth_of_every_class() -> None:
    labels = torch.tensor([0] * 40 + [1] * 20 + [2] * 3 + [3])
    kept, held_out = split(labels, seed=0)
    assert torch.bincount(labels[held_out], minlength=4).tolist() == [4, 2, 1, 0]
    assert sorted([*kept.tolist(), *held_out.tolist()]) == list(range(64))
    assert torch.equal(split(labels, 0)[1], held_out)
    assert not torch.equal(split(labels, 1)[1], held_out)


def test_the_best_on_held_out_images_is_chosen() -> None:
    features, labels = noisy_classes()
    strengths = (1e-6, 1e-2, 1.0)
    table = try_strengths(features, labels, strengths, 500, seed=0)
    splits = [split(labels, number) for number in range(10)]  # 12 images each, so that there are many
    for strength, accuracy in table.items():
        right = 0
        for kept, held_out in splits:
            predicted = fit(features[kept], labels[kept], strength, 500, "test").classify(features[held_out])
            right += int((predicted == labels[held_out]).sum())
        assert (accuracy.right, accuracy.images) == (right, 120)
    data = CachedFeatures(features, labels)
    chosen = run_logistic(data, data, strengths, 500, seed=0)["strength"]
    assert table[chosen].right == max(accuracy.right for accuracy in table.values())
    assert list(table) == sorted(strengths)


def test_of_equally_good_strengths_the_one_nearest_to_1_is_chosen() -> None:
    features, labels = torch.tensor([[-1.0, 0], [1, 0]]).repeat(20, 1), torch.tensor([0, 1]).repeat(20)
    data = CachedFeatures(features, labels)
    assert run_logistic(data, data, (1e-3, 1e-2, 0.5, 100.0), 500, seed=0)["strength"] == 0.5


def test_lack_of_convergence_is_a_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    features, labels = noisy_classes()
    with caplog.at_level(logging.WARNING):
        fit(features, labels, 100.0, 2, "logistic")
    assert caplog.messages == ["logistic, C=100: not converged after 2 iterations: the limit is 2"]
    caplog.clear()
    fit(features, labels, 0.1, 500, "logistic")
    assert not caplog.messages


def test_other_warnings_are_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Warning_(LogisticRegression):  # type: ignore[misc]
        def fit(self, *arguments: np.ndarray) -> None:
            warnings.warn("look here", UserWarning, stacklevel=1)
            super().fit(*arguments)

    monkeypatch.setattr(logistic, "LogisticRegression", Warning_)
    with pytest.warns(UserWarning, match="look here"):
        fit(*noisy_classes(), 0.1, 500, "logistic")


LABELS = torch.arange(65) % 3


def data() -> tuple[CachedFeatures, CachedFeatures]:
    """65 training and 90 validation images."""
    features, labels = noisy_classes(155)
    return CachedFeatures(features[:65], labels[:65]), CachedFeatures(features[65:], labels[65:])


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
    with pytest.raises(UserError, match=r"few_shot.shots: 3 images per class .* fewer of dog \(1\), emu \(2\)\. Lower"):
        check_shots(labels, ["cat", "dog", "emu"], [1, 3], "few_shot.shots")
    with pytest.raises(UserError, match=r"fowl \(0\)"):
        check_shots(labels, ["cat", "dog", "emu", "fowl"], [1], "few_shot.shots")
