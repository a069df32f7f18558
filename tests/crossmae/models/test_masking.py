"""Proves the counts of table 1.5 of the method specification; the split is a partition without bias, also by blocks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crossmae.models.masking import MaskCounts, check_blocks, gather_patches, mask_counts, split_patches

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


def draw(grid: tuple[int, int], images: int = 200) -> torch.Tensor:
    return torch.rand(images, grid[0] * grid[1], generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("grid", "block", "visible"),
    [((14, 14), 2, 49), ((14, 14), 7, 49), ((16, 16), 4, 64), ((4, 6), 2, 6), ((6, 4), 2, 3), ((4, 4), 1, 4)],
)
def test_whole_aligned_blocks_are_visible_and_at_most_one_in_part(
    grid: tuple[int, int], block: int, visible: int
) -> None:
    L = grid[0] * grid[1]
    counts = MaskCounts(visible, (L - visible) // 2, L - visible - (L - visible) // 2)
    seen, predicted = split_patches(draw(grid), counts, grid, block)
    assert (seen.shape, predicted.shape) == ((200, visible), (200, counts.predicted))
    sets = set()
    for row, masked in zip(seen.tolist(), predicted.tolist(), strict=True):
        assert len(set(row)) == visible
        assert not set(row) & set(masked)
        assert masked == sorted(set(masked))
        blocks = [(index // grid[1] // block, index % grid[1] // block) for index in row]
        sizes = [blocks.count(one) for one in dict.fromkeys(blocks)]
        assert sizes[:-1] == [block**2] * (len(sizes) - 1)  # block by block, the one in part is the last
        assert sizes[-1] == (visible % block**2 or block**2)
        sets.add(frozenset(row))
    assert len(sets) > 3


def test_blocks_are_drawn_without_bias_and_predicted_patches_one_by_one() -> None:
    grid, counts = (4, 4), MaskCounts(4, 8, 4)
    visible, predicted = split_patches(draw(grid, 8000), counts, grid, 2)
    for idx in (visible, predicted):
        share = torch.bincount(idx.flatten(), minlength=16) / 8000
        assert (share - 0.25).abs().max() < 0.02  # four standard deviations
    of_block = torch.arange(4).view(2, 2).repeat_interleave(2, 0).repeat_interleave(2, 1).flatten()
    number = torch.tensor([len(set(of_block[row].tolist())) for row in predicted])
    assert (number > 1).float().mean() > 0.95  # of 495 sets of four patches, 3 lie in one block


def test_equal_noise_still_gives_whole_blocks() -> None:
    visible, _ = split_patches(torch.full((1, 16), 0.25), MaskCounts(8, 4, 4), (4, 4), 2)
    assert visible.tolist() == [[0, 1, 4, 5, 2, 3, 6, 7]]


@given(st.integers(0, 1000), st.integers(1, 14), st.integers(1, 14))
def test_more_visible_patches_include_the_fewer(seed: int, some: int, more: int) -> None:
    noise = torch.rand(1, 16, generator=torch.Generator().manual_seed(seed))
    sets = [set(split_patches(noise, MaskCounts(n, 1, 15 - n), (4, 4), 2)[0][0].tolist()) for n in sorted((some, more))]
    assert sets[0] <= sets[1]


@pytest.mark.parametrize(
    ("grid", "block", "message"),
    [
        ((14, 14), 4, r"4 does not divide the 14 x 14 patches .* mask_block from 1, 2, 7, or an img_size in .* 64"),
        ((14, 14), 14, "into several blocks"),
        ((4, 6), 4, "from 1, 2, or"),
        ((4, 4), 0, r"from 1, 2\.$"),
    ],
)
def test_blocks_that_do_not_fit_name_those_that_do(grid: tuple[int, int], block: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_blocks(grid, block, 16)
    for fits in (1, 2):
        check_blocks(grid, fits, 16)
    check_blocks((1, 1), 1, 16)
    check_blocks((4, 8), 4, 16)


def test_patches_are_cut_out_image_by_image() -> None:
    imgs, idx = torch.randn(3, 2, 8, 12), torch.tensor([[0, 5], [3, 1], [2, 2]])  # a grid of 2 x 3
    patches = gather_patches(imgs, idx, 4)
    assert patches.shape == (3, 2, 2, 4, 4)
    for image in range(3):
        for place in range(2):
            row, column = divmod(int(idx[image, place]), 3)
            expected = imgs[image, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            assert torch.equal(patches[image, place], expected)
