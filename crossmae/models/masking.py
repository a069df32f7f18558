"""Random masking by index (method specification, section 1.5).

The whole package uses index tensors and never binary masks, because a binary mask cannot distinguish a visible patch
from a dropped patch. Every patch is exactly one of
  visible    seen by the encoder,
  dropped    neither seen nor predicted,
  predicted  reconstructed by the decoder.
All counts are known without the data, so no function here waits for the device.

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


def split_patches(noise: Tensor, counts: MaskCounts) -> tuple[Tensor, Tensor]:
    """Split patches by ascending noise: visible, then dropped, then predicted.

    Args:
        noise: (B, L), one uniform value per patch.

    Returns:
        visible_idx (B, V) in the order of the noise, which is the order of the encoder's tokens, and predict_idx (B, M)
        in raster order.
    """
    if noise.ndim != 2 or noise.shape[1] != sum(counts):
        raise ValueError(
            f"noise of shape {tuple(noise.shape)} does not fit. Give (batch, {sum(counts)}), one value per patch."
        )
    order = torch.argsort(noise, dim=1, stable=True)
    predict_idx = order[:, counts.visible + counts.dropped :].sort(dim=1).values
    return order[:, : counts.visible], predict_idx


def gather_tokens(tokens: Tensor, idx: Tensor) -> Tensor:
    """Select tokens (B, K, E) by their indices (B, K)."""
    return tokens.gather(1, idx.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
