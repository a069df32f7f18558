"""Reconstruct images: fill the masked patches, undo every normalisation, measure the error.

Shapes: B images, C channels, L patches, V visible, M masked, P values of one patch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crossmae.data.pixels import Normalize
from crossmae.models.crossmae import CrossMAE, patch_statistics, patchify, unpatchify
from crossmae.models.masking import gather_tokens


@dataclass(frozen=True)
class Panels:
    """Images and a model's reconstructions, with pixels in 0-1.

    Attributes:
        input: (B, C, H, W), the original images.
        pasted: (B, C, H, W), the model's predictions for masked patches; visible patches are identical to `input`.
        hidden: (B, 1, H, W) bool; true where patches are masked and predicted.
        norm_pix_loss: true if predicted patches were scaled by the mean and deviation of the true patch.
    """

    input: Tensor
    pasted: Tensor
    hidden: Tensor
    norm_pix_loss: bool

    def one(self, index: int) -> Panels:
        """Select a single image, B = 1."""
        at = slice(index, index + 1)
        return Panels(self.input[at], self.pasted[at], self.hidden[at], self.norm_pix_loss)

    def cpu(self) -> Panels:
        """Copy the panels to the CPU."""
        return Panels(self.input.cpu(), self.pasted.cpu(), self.hidden.cpu(), self.norm_pix_loss)


@torch.no_grad()
def reconstruct(model: CrossMAE, pixels: Tensor, mask_ratio: float, noise: Tensor, normalize: Normalize) -> Panels:
    """Predict every masked patch and undo both normalisations.

    With `norm_pix_loss`, each predicted patch is scaled back with the mean and deviation of the true patch. Brightness
    and contrast then come from the true patch, and only the structure comes from the model.

    Args:
        pixels: (B, C, H, W), uint8 or float32 in 0-1.
        mask_ratio: share of all patches to mask; all masked patches are predicted.
        noise: (B, L) values that decide the masking. With the same noise, a lower ratio adds visible patches and
            removes none.
    """
    imgs = normalize(pixels)
    out = model(imgs, mask_ratio, mask_ratio, noise)
    patches = patchify(imgs, model.patch_size).float()
    pred = out.pred.float()
    if model.norm_pix_loss:
        center, scale = patch_statistics(gather_tokens(patches, out.predict_idx))
        pred = pred * scale + center
    # Plain MAE also predicts visible patches. The true visible patches replace these predictions.
    filled = _put(_put(patches, out.predict_idx, pred), out.visible_idx, gather_tokens(patches, out.visible_idx))
    grid, side = model.grid, model.patch_size
    hidden = torch.ones_like(patches[..., : side**2])
    hidden = _put(hidden, out.visible_idx, torch.zeros_like(hidden[:, : out.visible_idx.shape[1]]))
    return Panels(
        input=_undo(normalize, unpatchify(patches, grid, side)),
        pasted=_undo(normalize, unpatchify(filled, grid, side)),
        hidden=unpatchify(hidden, grid, side).bool(),
        norm_pix_loss=model.norm_pix_loss,
    )


def psnr(panels: Panels) -> tuple[Tensor, Tensor]:
    """Measure the PSNR of reconstructions, pixels clipped to 0-1, peak 1.

    The published values (method specification, section 2.5) are for masked patches. Models with and without
    `norm_pix_loss` cannot be compared, because `norm_pix_loss` gives away the true statistics of each patch.

    Returns:
        PSNR in dB, two tensors (B,) float64, infinite for a perfect match. The first is over the pixels of masked
        patches, the second over the whole image, where visible patches have no error.
    """
    error = (panels.pasted.double() - panels.input.double()).square().mean(dim=1, keepdim=True)  # (B, 1, H, W)
    masked = (error * panels.hidden).sum(dim=(1, 2, 3)) / panels.hidden.sum(dim=(1, 2, 3))
    return -10 * masked.log10(), -10 * error.mean(dim=(1, 2, 3)).log10()


def _put(patches: Tensor, idx: Tensor, values: Tensor) -> Tensor:
    """Copy patches (B, L, P) with new values at some indices."""
    return patches.scatter(1, idx.unsqueeze(-1).expand_as(values), values)


def _undo(normalize: Normalize, imgs: Tensor) -> Tensor:
    return (imgs * normalize.std + normalize.mean).clamp(0, 1)
