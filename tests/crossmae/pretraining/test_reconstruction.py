"""Proves that reconstructions show pixels as they are: visible ones untouched, all normalisation undone, PSNR true.

For every decoder, 1 to 5 channels and images that are not square.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from crossmae.data.pixels import Normalize
from crossmae.models.crossmae import MAE, CrossMAE, CrossMAEOutput, patchify
from crossmae.pretraining.reconstruction import Panels, psnr, reconstruct


class Oracle(CrossMAE):
    """A model that predicts the targets exactly."""

    def forward(self, imgs, mask_ratio=0.75, predict_ratio=0.25, noise=None):  # type: ignore[no-untyped-def, override]
        out = super().forward(imgs, mask_ratio, predict_ratio, noise)
        pred = self.targets(imgs, out.predict_idx)
        return CrossMAEOutput(out.loss, pred, out.visible_idx, out.predict_idx)


class PlainOracle(Oracle, MAE):
    """The same over plain MAE."""


def run(kind: type[CrossMAE], channels: int, decoder: str, norm_pix_loss: bool, ratio: float = 0.75) -> Panels:
    """Panels of two 16 x 24 images of 24 patches."""
    torch.manual_seed(0)
    model = kind((16, 24), 4, channels, 16, 1, 2, 16, 1, 2, decoder=decoder, norm_pix_loss=norm_pix_loss)  # type: ignore[arg-type]
    pixels = torch.rand(2, channels, 16, 24)
    mean, std = [0.4 + 0.1 * c for c in range(channels)], [0.2 + 0.05 * c for c in range(channels)]
    normalize = Normalize(mean, std, torch.device("cpu"))
    panels = reconstruct(model, pixels, ratio, torch.rand(2, 24), normalize)
    torch.testing.assert_close(panels.input, pixels)
    return panels


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("decoder", ["cross", "cross_self", "self"])
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_perfect_predictions_give_the_input_back(channels: int, decoder: str, norm_pix_loss: bool) -> None:
    panels = run(PlainOracle if decoder == "self" else Oracle, channels, decoder, norm_pix_loss)
    torch.testing.assert_close(panels.pasted, panels.input)
    assert panels.norm_pix_loss is norm_pix_loss
    assert psnr(panels)[0].min() > 100


@pytest.mark.parametrize("decoder", ["cross", "cross_self", "self"])
def test_visible_pixels_are_the_inputs_and_others_are_predicted(decoder: str) -> None:
    panels = run(CrossMAE, 3, decoder, norm_pix_loss=False)
    hidden = panels.hidden.expand_as(panels.input)
    assert torch.equal(panels.pasted[~hidden], panels.input[~hidden])
    assert (panels.pasted[hidden] != panels.input[hidden]).float().mean() > 0.99
    by_patch = patchify(panels.hidden.float(), 4).mean(-1)  # 0 or 1: patches are hidden as a whole
    assert set(by_patch.unique().tolist()) == {0.0, 1.0}
    assert by_patch.sum(1).tolist() == [18, 18]


def test_what_is_visible_shrinks_with_the_ratio() -> None:
    hidden = [run(CrossMAE, 1, "cross", True, ratio).hidden for ratio in (0.25, 0.5, 0.75, 0.9)]
    for less, more in pairwise(hidden):
        assert bool((more | ~less).all())  # hidden stays hidden
        assert more.sum() > less.sum()


def numpy_psnr(true: Tensor, shown: Tensor, where: Tensor) -> float:
    error = (true.numpy().astype(np.float64) - shown.numpy())[where.expand_as(true).numpy()]
    return float(10 * np.log10(1 / np.mean(error**2)))


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_psnr_equals_numpy(channels: int) -> None:
    panels = run(CrossMAE, channels, "cross", norm_pix_loss=True)
    on_masked, on_pasted = psnr(panels)
    for index in range(2):
        one = panels.one(index)
        masked = numpy_psnr(one.input, one.pasted, one.hidden)
        pasted = numpy_psnr(one.input, one.pasted, torch.ones_like(one.hidden))
        assert on_masked[index].item() == pytest.approx(masked)
        assert on_pasted[index].item() == pytest.approx(pasted)
        # Three quarters of the patches carry all of the error.
        assert pasted - masked == pytest.approx(10 * math.log10(4 / 3))


def test_psnr_of_known_errors() -> None:
    true = torch.zeros(2, 3, 4, 4)
    hidden = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    hidden[..., 2:] = True
    shown = torch.stack([torch.zeros(3, 4, 4), 0.1 * hidden[1].expand(3, 4, 4)])
    masked, pasted = psnr(Panels(true, shown, hidden, False))
    assert masked.tolist() == [math.inf, pytest.approx(20.0)]
    assert pasted.tolist() == [math.inf, pytest.approx(20 + 10 * math.log10(2))]
