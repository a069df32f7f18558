"""Pictures of what a pretraining model sees and makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from crossmae.masking import gather_tokens
from crossmae.model import CrossMAE, patch_statistics, patchify, unpatchify


class Panels(NamedTuple):
    """(B, C, H, W) pixels in 0-1: the input, what the encoder saw, and the reconstruction."""

    input: Tensor
    masked: Tensor
    reconstruction: Tensor


@torch.no_grad()
def reconstruct(
    model: CrossMAE,
    imgs: Tensor,
    mask_ratio: float,
    noise: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
) -> Panels:
    """Reconstruct every masked patch and undo both normalisations.

    With `norm_pix_loss` the model predicts standardised patches; they are scaled back by the true patch's mean and
    deviation, so that their contrast is given and their structure is the model's. Visible patches are pasted.

    Args:
        imgs: (B, C, H, W) pixels normalised by `mean` and `std`.
        mask_ratio: share of all patches to mask; all of them are reconstructed.
        noise: (B, L), decides the masking.
        mean, std: per channel, of pixels in 0-1.
    """
    out = model(imgs, mask_ratio, mask_ratio, noise)
    patches = patchify(imgs, model.patch_size).float()
    pred = out.pred.float()
    if model.norm_pix_loss:
        center, scale = patch_statistics(gather_tokens(patches, out.predict_idx))
        pred = pred * scale + center
    width = patches.shape[-1]
    predict_at = out.predict_idx.unsqueeze(-1).expand(-1, -1, width)
    visible_at = out.visible_idx.unsqueeze(-1).expand(-1, -1, width)
    visible = gather_tokens(patches, out.visible_idx)
    filled = patches.scatter(1, predict_at, pred).scatter(1, visible_at, visible)
    seen = torch.full_like(patches, float("nan")).scatter(1, visible_at, visible)
    panels = (_pixels(unpatchify(p, model.grid, model.patch_size), mean, std) for p in (patches, seen, filled))
    return Panels(*panels)


def reconstruction_figure(panels: Panels, title: str) -> Figure:
    """One column per image; rows: input, masked, reconstruction."""
    rows = {"input": panels.input, "masked": panels.masked, "reconstruction": panels.reconstruction}
    columns = len(panels.input)
    figure = Figure(figsize=(1.5 * columns + 0.4, 5.0), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, (label, images) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(label)
        for axis, image in zip(row, images, strict=True):
            axis.imshow(image.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
    figure.suptitle(title, fontsize=10)
    return figure


def _pixels(imgs: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Undo the normalisation; unseen pixels become grey."""
    shape = (1, -1, 1, 1)
    pixels = imgs * torch.tensor(std, device=imgs.device).view(shape) + torch.tensor(mean, device=imgs.device).view(
        shape
    )
    return pixels.nan_to_num(0.5).clamp(0, 1)
