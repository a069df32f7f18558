"""Proves that views of evaluation cover any size, undistorted and centred, and that random crops are Pillow's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from crossmae.data import pixels as pixels_module
from crossmae.data.pixels import centre_view, random_crop


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


def strips() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, shape, np.uint8) for shape in ((3, 900, 3), (700, 11, 3), (1, 400, 3), (2000, 4, 3))]
    return [*noise, *((one > 127).astype(np.uint8) * 255 for one in noise)]


@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
@pytest.mark.parametrize("size", [(32, 32), (24, 56), (9, 80)])
def test_strips_are_cropped_first_and_agree_within_a_grey_level(
    size: tuple[int, int], crop_pct: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for strip in strips():
        image, tensor = Image.fromarray(strip), torch.from_numpy(strip).permute(2, 0, 1)
        cases: list[tuple[Image.Image | torch.Tensor, float]] = [(image, 1), (image.convert("L"), 1), (tensor, 1)]
        for pixels, tolerance in [*cases, (tensor / 255, 1e-3)]:
            views = []
            for most in (0, 10**9):  # always, and never
                monkeypatch.setattr(pixels_module, "MOST_ENLARGED", most)
                views.append(centre_view(pixels, size, crop_pct))
            assert views[0].dtype == views[1].dtype
            torch.testing.assert_close(views[0].float(), views[1].float(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", [(4, 30_000), (60_000, 1), (1, 1), (30, 9_000), (200, 3_000), (900, 1_200)])
def test_no_intermediate_image_is_out_of_proportion(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def spy(resize: Any) -> Any:
        def resized(*arguments: Any, **named: Any) -> Any:
            result = resize(*arguments, **named)
            made.append(result.numel() if isinstance(result, torch.Tensor) else result.width * result.height)
            return result

        return resized

    monkeypatch.setattr(Image.Image, "resize", spy(Image.Image.resize))
    monkeypatch.setattr(pixels_module.VF, "resize", spy(pixels_module.VF.resize))
    view = centre_view(Image.new("RGB", shape[::-1], (1, 2, 3)), (224, 224))
    assert view.shape == (3, 224, 224)
    assert view[:, 0, 0].tolist() == [1, 2, 3]
    assert max(made) <= max(shape[0] * shape[1], 16 * 224 * 224)


def smooth_picture(draw: np.random.Generator, height: int, width: int, mode: str) -> Image.Image:
    """Draw shades, with noise like that of a camera."""
    shades = Image.fromarray(draw.integers(0, 256, (6, 8, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    noisy = np.asarray(shades) + draw.normal(0, 4, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(32, 32), (24, 56), (160, 90)])
def test_random_crops_are_as_exact_as_those_of_pillow(size: tuple[int, int], mode: str) -> None:
    """Enlarged and reduced, against bicubic sampling in double precision, in grey levels."""
    draw, interpolation = np.random.default_rng(0), InterpolationMode.BICUBIC
    ours = random_crop(size, (0.2, 1.0), 0.5)
    cut = v2.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=interpolation, antialias=True)
    theirs = v2.Compose([cut, v2.RandomHorizontalFlip(0.5), v2.PILToTensor()])
    errors = []
    for seed, shape in enumerate([(60, 90), (333, 250), (40, 300), (200, 30), (32, 32)] * 4):
        image = smooth_picture(draw, *shape, mode)
        views = []
        for transform, pixels in (
            (ours, image),
            (theirs, image),
            (theirs, v2.functional.pil_to_tensor(image).double()),
        ):
            torch.manual_seed(seed)
            views.append(transform(pixels))
        found, expected, exact = views
        assert found.dtype == torch.uint8
        errors.append([(view - exact.clamp(0, 255)).abs().mean().item() for view in (found, expected)])
        assert (found.int() - expected.int()).abs().max() <= 4
    own, of_pillow = np.mean(errors, axis=0)
    assert own < 1.05 * of_pillow < 0.4
