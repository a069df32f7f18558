"""Proves that views of evaluation cover any size, undistorted and centred."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from crossmae.data.pixels import centre_view


def test_the_centre_view_covers_any_size_without_distortion() -> None:
    """A circle in the middle stays one, whatever the shapes of image and model."""
    y, x = np.mgrid[:60, :90]
    disc = (((y - 29.5) ** 2 + (x - 44.5) ** 2 < 20**2) * 255).astype(np.uint8)
    for size in ((32, 32), (48, 32), (24, 64)):
        view = centre_view(Image.fromarray(disc).convert("RGB"), size)[0] > 127
        assert view.shape == size
        rows, columns = view.any(1).sum().item(), view.any(0).sum().item()
        expected = 40 * max(size[0] / 60, size[1] / 90)
        assert abs(rows - min(expected, size[0])) <= 2
        assert abs(columns - min(expected, size[1])) <= 2


@pytest.mark.parametrize("size", [(16, 32), (17, 200), (300, 31), (5, 3), (1, 1)])
def test_images_cover_the_size_and_keep_their_centre(size: tuple[int, int]) -> None:
    fitted = centre_view(torch.full((2, *size), 0.25), (16, 32))
    assert fitted.shape == (2, 16, 32)
    torch.testing.assert_close(fitted, torch.full_like(fitted, 0.25))
    ramp = torch.linspace(0, 1, size[1]).expand(1, *size)
    inside = centre_view(ramp, (16, 32))
    torch.testing.assert_close(inside.mean(), ramp.mean(), rtol=0, atol=0.02)
    assert 0 <= inside.min() <= inside.max() <= 1
