"""Proves the counts of table 1.5 of the method specification; the split is a partition without bias."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crossmae.models.masking import MaskCounts, mask_counts, split_patches

# Method specification, 1.5: L, mask ratio, predict ratio -> visible, dropped, predicted.
PUBLISHED = [
    (196, 0.75, 0.75, 49, 0, 147),
    (196, 0.75, 0.25, 49, 98, 49),
    (196, 0.75, 0.15, 49, 117, 30),
    (196, 0.75, 0.50, 49, 49, 98),
    (196, 0.65, 0.65, 68, 0, 128),
    (196, 0.85, 0.85, 29, 0, 167),
    (196, 0.65, 0.25, 68, 78, 50),
    (196, 0.85, 0.25, 29, 117, 50),
    (196, 0.90, 0.30, 19, 117, 60),
    (256, 0.75, 0.25, 64, 128, 64),
    (784, 0.75, 0.25, 196, 392, 196),
]


@pytest.mark.parametrize(("L", "mask", "predict", "visible", "dropped", "predicted"), PUBLISHED)
def test_published_counts(L: int, mask: float, predict: float, visible: int, dropped: int, predicted: int) -> None:
    assert mask_counts(L, mask, predict) == MaskCounts(visible, dropped, predicted)


@given(st.integers(4, 400), st.integers(1, 99), st.integers(1, 99))
def test_counts_are_a_partition_or_an_error(L: int, mask: int, predict: int) -> None:
    exact_visible = L * (100 - mask) // 100
    try:
        counts = mask_counts(L, mask / 100, predict / 100)
    except ValueError:
        assert predict > mask or exact_visible == 0
    else:
        assert sum(counts) == L
        assert counts.visible == exact_visible
        assert counts.predicted * 100 >= predict * L  # rounding favours the predicted


@pytest.mark.parametrize(
    ("mask", "predict", "message"),
    [
        (75, 0.25, "between 0 and 1"),
        (0.75, -0.1, "between 0 and 1"),
        (0.25, 0.5, "exceeds mask_ratio 0.25"),
        (0.75, 0.0, "49 visible, 147 dropped and 0 predicted"),
        (0.0, 0.0, "0 predicted"),
        (1.0, 0.5, "0 visible"),
        (0.999, 0.5, "0 visible"),
    ],
)
def test_impossible_ratios_are_errors_with_numbers(mask: float, predict: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mask_counts(196, mask, predict)


def test_split_follows_the_noise() -> None:
    noise = torch.tensor([[0.5, 0.1, 0.9, 0.3, 0.7, 0.2]])
    visible, predicted = split_patches(noise, MaskCounts(2, 2, 2))
    assert visible.tolist() == [[1, 5]]  # lowest first
    assert predicted.tolist() == [[2, 4]]  # highest, in raster order


def test_every_patch_is_predicted_equally_often() -> None:
    noise = torch.rand(4000, 16, generator=torch.Generator().manual_seed(0))
    visible, predicted = split_patches(noise, MaskCounts(4, 8, 4))
    for idx in (visible, predicted):
        share = torch.bincount(idx.flatten(), minlength=16) / 4000
        assert (share - 0.25).abs().max() < 0.03  # more than four standard deviations
    assert not (visible.unsqueeze(2) == predicted.unsqueeze(1)).any()
