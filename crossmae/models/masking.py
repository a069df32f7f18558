"""Random masking by index (method specification, section 1.5).

One convention in the whole package: index tensors, never binary masks, because a binary mask cannot tell a
visible patch from a dropped one. Every patch is exactly one of
  visible    seen by the encoder,
  dropped    neither seen nor predicted,
  predicted  reconstructed by the decoder.
All counts are static, so nothing here waits for the device.

Shapes: B batch, L patches, V visible, M predicted.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# A product such as 100 * (1 - 0.9) = 9.999999999999998 means 10: ratios are read as the decimal numbers they are.
ROUNDING = 1e-6


class MaskCounts(NamedTuple):
    """Numbers of visible, dropped and predicted patches of an image, which add up to all patches."""

    visible: int
    dropped: int
    predicted: int


def mask_counts(num_patches: int, mask_ratio: float, predict_ratio: float) -> MaskCounts:
    """Turn the two ratios, both shares of *all* patches, into counts.

    visible = floor(L * (1 - mask_ratio)), dropped = floor(L * (mask_ratio - predict_ratio)), predicted = the
    rest, so that rounding favours the predicted ones, as published. The ratios are read as the decimal
    numbers that were written: the published code's binary arithmetic keeps 9 of 100 patches at a mask ratio
    of 0.9, this keeps 10.

    Raises:
        ValueError: a ratio outside [0, 1], more predicted than masked, or no patch visible or predicted.
    """
    for name, value in (("mask_ratio", mask_ratio), ("predict_ratio", predict_ratio)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must be between 0 and 1 (a share of all patches), got {value}")
    if predict_ratio > mask_ratio:
        raise ValueError(
            f"predict_ratio {predict_ratio} exceeds mask_ratio {mask_ratio}: only masked patches can be "
            "predicted, and both are shares of all patches"
        )
    visible = int(num_patches * (1 - mask_ratio) + ROUNDING)
    dropped = int(num_patches * (mask_ratio - predict_ratio) + ROUNDING)
    counts = MaskCounts(visible, dropped, num_patches - visible - dropped)
    # predict_ratio 0 is empty by request even where the rounding leaves a patch over.
    if counts.visible < 1 or counts.predicted < 1 or predict_ratio == 0:
        raise ValueError(
            f"mask_ratio {mask_ratio} and predict_ratio {predict_ratio} split {num_patches} patches into "
            f"{counts.visible} visible, {counts.dropped} dropped and {counts.predicted} predicted; "
            "at least one visible and one predicted patch are needed"
        )
    return counts


def split_patches(noise: Tensor, counts: MaskCounts) -> tuple[Tensor, Tensor]:
    """Split patches by noise: visible, then dropped, then predicted, rising.

    Args:
        noise: (B, L), one uniform value per patch.

    Returns:
        visible_idx (B, V), in the order of the noise, as the encoder sees them, and predict_idx (B, M) in raster order.
    """
    if noise.ndim != 2 or noise.shape[1] != sum(counts):
        raise ValueError(f"noise must have shape (batch, {sum(counts)}), got {tuple(noise.shape)}")
    order = torch.argsort(noise, dim=1, stable=True)
    predict_idx = order[:, counts.visible + counts.dropped :].sort(dim=1).values
    return order[:, : counts.visible], predict_idx


def gather_tokens(tokens: Tensor, idx: Tensor) -> Tensor:
    """Pick tokens (B, K, E) by their indices (B, K)."""
    return tokens.gather(1, idx.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
