"""Reconstructing images: fill the masked patches, undo every normalisation, measure how good it is.

Shapes: B images, C channels, L patches, V visible, M masked, P values of one patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crossmae.models.crossmae import CrossMAE, patch_statistics, patchify, unpatchify
from crossmae.models.masking import gather_tokens


@dataclass(frozen=True)
class Panels:
    """Images and what a model made of them, pixels in 0-1.

    Attributes:
        input: (B, C, H, W), the images themselves.
        pasted: (B, C, H, W), masked patches as the model predicts them; visible ones are the input's, exactly.
        hidden: (B, 1, H, W) bool; true where the encoder did not see, which is where the model predicts.
        norm_pix_loss: whether predicted patches were scaled by the true patch's mean and deviation.
    """

    input: Tensor
    pasted: Tensor
    hidden: Tensor
    norm_pix_loss: bool

    def one(self, index: int) -> Panels:
        """Those of a single image, B = 1."""
        at = slice(index, index + 1)
        return Panels(self.input[at], self.pasted[at], self.hidden[at], self.norm_pix_loss)

    def cpu(self) -> Panels:
        """The same on the CPU."""
        return Panels(self.input.cpu(), self.pasted.cpu(), self.hidden.cpu(), self.norm_pix_loss)


@dataclass(frozen=True)
class Psnr:
    """Peak signal-to-noise ratio in dB, (B,) float64; infinite where nothing differs.

    Attributes:
        masked: over the pixels of masked patches.
        pasted: over the whole image, in which visible patches are free of error.
    """

    masked: Tensor
    pasted: Tensor


@torch.no_grad()
def reconstruct(
    model: CrossMAE,
    imgs: Tensor,
    mask_ratio: float,
    noise: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
) -> Panels:
    """Predict every masked patch and undo both normalisations.

    With `norm_pix_loss` the model predicts standardised patches; they are scaled back by the true patch's mean and
    deviation, so that their brightness and contrast are given and their structure is the model's.

    Args:
        imgs: (B, C, H, W) pixels normalised by `mean` and `std`.
        mask_ratio: share of all patches to mask; all of them are predicted.
        noise: (B, L), decides the masking: the same noise at a lower ratio shows the same patches and more.
        mean, std: per channel, of pixels in 0-1.

    Raises:
        ValueError: see `CrossMAE.forward`.
    """
    out = model(imgs, mask_ratio, mask_ratio, noise)
    patches = patchify(imgs, model.patch_size).float()
    pred = out.pred.float()
    if model.norm_pix_loss:
        center, scale = patch_statistics(gather_tokens(patches, out.predict_idx))
        pred = pred * scale + center
    # Plain MAE predicts visible patches, too: the true ones are laid over them.
    filled = _put(_put(patches, out.predict_idx, pred), out.visible_idx, gather_tokens(patches, out.visible_idx))
    grid, side = model.grid, model.patch_size
    hidden = torch.ones_like(patches[..., : side**2])
    hidden = _put(hidden, out.visible_idx, torch.zeros_like(hidden[:, : out.visible_idx.shape[1]]))
    return Panels(
        input=_pixels(unpatchify(patches, grid, side), mean, std),
        pasted=_pixels(unpatchify(filled, grid, side), mean, std),
        hidden=unpatchify(hidden, grid, side).bool(),
        norm_pix_loss=model.norm_pix_loss,
    )


def psnr(panels: Panels) -> Psnr:
    """How far the reconstructions are from the input, as they are shown: pixels clipped to 0-1, peak 1.

    The published numbers (method specification, section 2.5) are of masked patches. With `norm_pix_loss` the true
    statistics of each patch are part of the reconstruction, so models with and without it can not be compared.
    """
    error = (panels.pasted.double() - panels.input.double()).square().mean(dim=1, keepdim=True)  # (B, 1, H, W)
    masked = (error * panels.hidden).sum(dim=(1, 2, 3)) / panels.hidden.sum(dim=(1, 2, 3))
    return Psnr(-10 * masked.log10(), -10 * error.mean(dim=(1, 2, 3)).log10())


def _put(patches: Tensor, idx: Tensor, values: Tensor) -> Tensor:
    """Copy of patches (B, L, P) with `values` (B, K, P) at idx (B, K)."""
    return patches.scatter(1, idx.unsqueeze(-1).expand_as(values), values)


def _pixels(imgs: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Undo the normalisation of (B, C, H, W)."""
    shape = (1, -1, 1, 1)
    mean_, std_ = (torch.tensor(values, device=imgs.device).view(shape) for values in (mean, std))
    return (imgs * std_ + mean_).clamp(0, 1)
