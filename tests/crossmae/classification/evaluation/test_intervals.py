"""Proves that intervals are those of the textbooks: Wilson's by its formula, Student's by its table."""

from __future__ import annotations

import math

import pytest
import torch

from crossmae.classification.evaluation.intervals import accuracy_of, mean_of

Z = 1.959963984540054  # of the normal distribution, two-sided, 95%


@pytest.mark.parametrize(("right", "images"), [(0, 7), (7, 7), (1, 2), (90, 100), (7248, 10000)])
def test_wilson(right: int, images: int) -> None:
    labels = torch.zeros(images, dtype=torch.long)
    predicted = (torch.arange(images) >= right).long()
    found = accuracy_of(predicted, labels)
    share = right / images
    centre = (share + Z**2 / (2 * images)) / (1 + Z**2 / images)
    half = Z / (1 + Z**2 / images) * math.sqrt(share * (1 - share) / images + Z**2 / (4 * images**2))
    assert (found.right, found.images, found.accuracy) == (right, images, share)
    assert found.low == pytest.approx(centre - half, abs=1e-9)
    assert found.high == pytest.approx(centre + half, abs=1e-9)


def test_student() -> None:
    found = mean_of([0.5, 0.6, 0.7])
    half = 4.302652729911275 * 0.1 / math.sqrt(3)  # t of two degrees of freedom
    assert (found.mean, found.runs) == (pytest.approx(0.6), 3)
    assert (found.low, found.high) == (pytest.approx(0.6 - half), pytest.approx(0.6 + half))


def test_interval_of_accuracies_stays_between_0_and_1() -> None:
    found = mean_of([0.0, 0.9])
    assert (found.low, found.high) == (0.0, 1.0)


def test_one_run_has_no_interval() -> None:
    found = mean_of([0.25])
    assert (found.mean, found.low, found.high, found.runs) == (0.25, None, None, 1)
