"""Proves that the pictures show pixels as they are: both normalisations undone, visible patches untouched."""

from __future__ import annotations

import pytest
import torch

from crossmae.figures import reconstruct, reconstruction_figure
from crossmae.model import CrossMAE, CrossMAEOutput

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


class Oracle(CrossMAE):
    """Predicts the targets exactly."""

    def forward(self, imgs, mask_ratio=0.75, predict_ratio=0.25, noise=None):  # type: ignore[no-untyped-def, override]
        out = super().forward(imgs, mask_ratio, predict_ratio, noise)
        pred = self.targets(imgs, out.predict_idx)
        return CrossMAEOutput(out.loss, pred, out.visible_idx, out.predict_idx)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("decoder", ["cross", "self"])
def test_perfect_predictions_give_the_input_back(norm_pix_loss: bool, decoder: str) -> None:
    model = Oracle(16, 4, 3, 16, 1, 2, 16, 1, 2, decoder=decoder, norm_pix_loss=norm_pix_loss)  # type: ignore[arg-type]
    pixels = torch.rand(2, 3, 16, 16)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    panels = reconstruct(model, (pixels - mean) / std, 0.75, torch.rand(2, 16), MEAN, STD)
    torch.testing.assert_close(panels.input, pixels)
    torch.testing.assert_close(panels.reconstruction, pixels)
    grey = (panels.masked == 0.5).all(1)
    assert grey.float().mean() == 0.75
    shown = ~grey.unsqueeze(1).expand_as(pixels)
    torch.testing.assert_close(panels.masked[shown], pixels[shown])
    figure = reconstruction_figure(panels, "title")
    assert [axis.get_ylabel() for axis in figure.axes[::2]] == ["input", "masked", "reconstruction"]
