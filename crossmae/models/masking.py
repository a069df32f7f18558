"""Random masking by index (method specification, section 1.5).

The whole package uses index tensors and never binary masks, because a binary mask cannot distinguish a visible patch
from a dropped patch. Every patch is exactly one of
  visible    seen by the encoder,
  dropped    neither seen nor predicted,
  predicted  reconstructed by the decoder.
All counts are known without the data, so no function here waits for the device.

With blocks of b x b patches (Pixio, arXiv 2512.15715), whole blocks are visible or masked, and the counts are the same
as without blocks. If the visible patches do not fill whole blocks, a part of one more block is visible. The predicted
patches are chosen patch by patch among the masked patches.

Shapes: B batch, L patches, V visible, M predicted.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROUNDING = 1e-6  # tolerance: 100 * (1 - 0.9) = 9.999999999999998 counts as 10, as in decimal arithmetic


class MaskCounts(NamedTuple):
    """Numbers of visible, dropped and predicted patches of an image. The sum is the number of all patches."""

    visible: int
    dropped: int
    predicted: int


def mask_counts(num_patches: int, mask_ratio: float, predict_ratio: float) -> MaskCounts:
    """Convert the two ratios, both shares of *all* patches, to counts.

    visible = floor(L * (1 - mask_ratio)) and dropped = floor(L * (mask_ratio - predict_ratio)). All remaining patches
    are predicted, as published. A mask ratio of 0.9 keeps 10 of 100 patches. The published binary arithmetic keeps 9.

    Raises ValueError if a ratio is outside [0, 1], more patches are predicted than masked, or no patch is visible or
    predicted.
    """
    for name, value in (("mask_ratio", mask_ratio), ("predict_ratio", predict_ratio)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} {value} is not a share of all patches. Give a number between 0 and 1.")
    if predict_ratio > mask_ratio:
        raise ValueError(f"predict_ratio {predict_ratio} exceeds mask_ratio {mask_ratio}. Predict masked patches only.")
    visible = int(num_patches * (1 - mask_ratio) + ROUNDING)
    dropped = int(num_patches * (mask_ratio - predict_ratio) + ROUNDING)
    predicted = num_patches - visible - dropped
    # predict_ratio 0 predicts no patch, even if rounding would leave one.
    if visible < 1 or predicted < 1 or predict_ratio == 0:
        raise ValueError(
            f"mask_ratio {mask_ratio} and predict_ratio {predict_ratio} split {num_patches} patches into {visible} "
            f"visible, {dropped} dropped and {predicted} predicted. Leave at least one visible and one predicted patch."
        )
    return MaskCounts(visible, dropped, predicted)


def check_blocks(grid: tuple[int, int], block: int, patch_size: int) -> None:
    """Check that blocks of `block` x `block` patches divide a grid.

    Raises ValueError if the grid is not divisible or is a single block. The message names sizes that fit.
    """
    rows, columns = grid
    sides = (side for side in range(1, min(grid) + 1) if rows % side == columns % side == 0)
    fitting = [side for side in sides if side == 1 or grid != (side, side)]
    if block not in fitting:
        side = block * patch_size
        images = f", or an img_size in multiples of {side} pixels, at least {2 * side}" if block > 1 else ""
        raise ValueError(
            f"mask_block {block} does not divide the {rows} x {columns} patches into several blocks. Choose mask_block "
            f"from {', '.join(map(str, fitting))}{images}."
        )


def split_patches(
    noise: Tensor, counts: MaskCounts, grid: tuple[int, int] | None = None, block: int = 1
) -> tuple[Tensor, Tensor]:
    """Split patches by ascending noise: visible, then dropped, then predicted.

    With blocks, visible patches come block by block, see `block_order`. The rest is split by the noise of each patch.

    Args:
        noise: (B, L), one uniform value per patch.
        grid: rows and columns of patches; needed for blocks.
        block: side of a block in patches; it divides the grid.

    Returns:
        visible_idx (B, V) in the order of the noise, which is the order of the encoder's tokens, and predict_idx (B, M)
        in raster order.
    """
    if noise.ndim != 2 or noise.shape[1] != sum(counts):
        raise ValueError(
            f"noise of shape {tuple(noise.shape)} does not fit. Give (batch, {sum(counts)}), one value per patch."
        )
    order = torch.argsort(noise, dim=1, stable=True)
    if grid is not None and block > 1:
        first, rest = block_order(noise, order, grid, block).tensor_split([counts.visible], dim=1)
        order = torch.cat([first, rest.gather(1, noise.gather(1, rest).argsort(dim=1, stable=True))], dim=1)
    predict_idx = order[:, counts.visible + counts.dropped :].sort(dim=1).values
    return order[:, : counts.visible], predict_idx


def block_order(noise: Tensor, order: Tensor, grid: tuple[int, int], block: int) -> Tensor:
    """Sort patches by the noise of their block, then by their own.

    The noise of a block is the fractional part of the sum of its patches' noise. So it is uniform, independent of the
    noise of each single patch, and needs no further random numbers. In float64, the sum does not depend on the order.

    Args:
        noise: (B, L).
        order: (B, L) patches by ascending noise.
    """
    rows, columns = grid[0] // block, grid[1] // block
    wide = noise.float() if noise.device.type == "mps" else noise.double()  # MPS has no float64
    sums = wide.reshape(-1, rows, block, columns, block).sum(dim=(2, 4)).flatten(1)  # (B, blocks)
    rank = sums.frac().argsort(dim=1, stable=True).argsort(dim=1)  # blocks of equal noise have different ranks
    blocks = torch.arange(rows * columns, device=noise.device).view(rows, columns)
    of_patch = blocks.repeat_interleave(block, 0).repeat_interleave(block, 1).flatten()  # (L,)
    return order.gather(1, rank[:, of_patch].gather(1, order).argsort(dim=1, stable=True))


def gather_tokens(tokens: Tensor, idx: Tensor) -> Tensor:
    """Select tokens (B, K, E) by their indices (B, K)."""
    return tokens.gather(1, idx.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def gather_patches(imgs: Tensor, idx: Tensor, patch_size: int) -> Tensor:
    """Cut patches out of images by their indices.

    Images (B, C, H, W) and indices (B, K) give patches (B, K, C, p, p). Only these patches are copied.
    """
    B, C, H, W = imgs.shape
    p = patch_size
    cells = imgs.view(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5)  # (B, rows, columns, C, p, p)
    image = torch.arange(B, device=imgs.device)[:, None]
    return cells[image, idx // (W // p), idx % (W // p)]
