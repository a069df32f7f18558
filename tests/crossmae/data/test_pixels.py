"""Proves that views are undistorted and centred, and that fast crops and fast JPEG files have Pillow's pixels."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from torchvision.transforms import InterpolationMode, v2

from crossmae.data import pixels as pixels_module
from crossmae.data.images import ImageLimits, decode_image
from crossmae.data.pixels import RandomCrop, centre_view, decode_plain, read_tensor, to_tensor
from crossmae.data.sources import open_source
from crossmae.errors import UserError


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
    ours = RandomCrop(size, (0.2, 1.0), 0.5)
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


def test_crops_are_drawn_and_computed_as_torchvision_does() -> None:
    """To the bit, for the same random numbers, which leave the generator in the same state."""
    draw, interpolation = np.random.default_rng(1), InterpolationMode.BICUBIC
    ours = RandomCrop((24, 40), (0.2, 1.0), 0.3)
    cut = v2.RandomResizedCrop((24, 40), scale=(0.2, 1.0), interpolation=interpolation, antialias=True)
    theirs = v2.Compose([cut, v2.RandomHorizontalFlip(0.3)])
    for seed in range(20):
        pixels = torch.from_numpy(draw.integers(0, 256, (3, 50, 60 + seed), np.uint8))
        results = []
        for transform in (ours, theirs):
            torch.manual_seed(seed)
            results.append((transform(pixels), torch.rand(3)))
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


# Plain JPEG and PPM files, without Pillow


def jpeg(seed: int, width: int, height: int, **options: Any) -> bytes:
    """A JPEG of smooth and noisy content."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (3, 4, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    noise = rng.integers(-20, 20, (height, width, 3))
    pixels = Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8))
    buffer = io.BytesIO()
    pixels.convert(options.pop("mode", "RGB")).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


PLAIN: list[dict[str, Any]] = [
    *({"subsampling": kind, "quality": quality} for kind in (0, 1, 2) for quality in (5, 75, 100)),
    {"optimize": True, "comment": b"A comment."},
    {"icc_profile": bytes(700), "exif": turned(1), "dpi": (72, 72)},
    {"restart_marker_blocks": 1},
    {"xmp": b"<x:xmpmeta>nothing of the orientation</x:xmpmeta>"},
]
OTHERS: list[dict[str, Any]] = [
    *({"exif": turned(orientation)} for orientation in range(2, 9)),
    {"xmp": b'<rdf:Description tiff:Orientation="6"/>'},
    {"progressive": True},
    {"mode": "L"},
    {"mode": "CMYK"},
    {"keep_rgb": True},
]


@pytest.mark.parametrize("options", PLAIN)
@pytest.mark.parametrize("size", [(1, 1), (7, 33), (64, 48)])
def test_plain_jpeg_files_are_decoded_to_the_pixels_of_pillow(options: dict[str, Any], size: tuple[int, int]) -> None:
    data = jpeg(0, *size, **options)
    plain = decode_plain(data, "x.jpg")
    assert plain is not None
    assert np.array_equal(plain, np.asarray(decode_image(data, "x.jpg")))


@pytest.mark.parametrize("options", OTHERS)
def test_other_jpeg_files_are_left_to_pillow(options: dict[str, Any], tmp_path: Path) -> None:
    """So a tensor of a file has the rules of `decode_image`."""
    data = jpeg(0, 20, 12, **options)
    assert decode_plain(data, "x.jpg") is None
    (tmp_path / "x.jpg").write_bytes(data)
    tensor = read_tensor(open_source(str(tmp_path), "data.train"), 0)
    assert torch.equal(tensor, to_tensor(decode_image(data, "x.jpg")))


@pytest.mark.parametrize("size", [(1, 1), (7, 33), (64, 48)])
def test_ppm_files_are_read_to_the_pixels_of_pillow(size: tuple[int, int]) -> None:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(jpeg(0, *size))).save(buffer, "PPM")
    data = buffer.getvalue()
    plain = decode_plain(data, "x.ppm")
    assert plain is not None
    assert plain.flags.writeable
    assert np.array_equal(plain, np.asarray(decode_image(data, "x.ppm")))
    header = b"P6\n%d %d\n255\n" % size
    pixels = data.removeprefix(header)
    for other in (data[:-1], data + b"x", b"P6 %d %d 255\n" % size + pixels, header[:-4] + b"127\n" + pixels):
        assert decode_plain(other, "x.ppm") is None


def test_files_of_two_pictures_are_left_to_pillow() -> None:
    buffer, (first, second) = io.BytesIO(), (Image.new("RGB", (9, 9), colour) for colour in ("red", "blue"))
    first.save(buffer, "MPO", save_all=True, append_images=[second])
    assert decode_plain(buffer.getvalue(), "x.jpg") is None


@given(
    kind=st.integers(0, len(PLAIN + OTHERS) - 1),
    change=st.sampled_from(["byte", "cut", "delete", "zeros", "end"]),
    places=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    value=st.integers(0, 255),
)
@settings(max_examples=300, deadline=None)
def test_whatever_is_decoded_of_a_damaged_jpeg_is_what_pillow_decodes(
    kind: int, change: str, places: tuple[float, float], value: int
) -> None:
    data = jpeg(1, 40, 24, **(PLAIN + OTHERS)[kind])
    first, last = sorted(int(place * (len(data) - 3)) for place in places)
    changed = {
        "byte": data[:first] + bytes([value]) + data[first + 1 :],
        "cut": data[:first] + b"\xff\xd9",
        "delete": data[:first] + data[last:],
        "zeros": data[:first] + bytes(last - first) + data[last:],
        "end": data[:first] + b"\xff\xd9" + data[first:],
    }[change]
    plain = decode_plain(changed, "x.jpg")
    if plain is not None:
        assert np.array_equal(plain, np.asarray(decode_image(changed, "x.jpg")))


def test_too_many_pixels_of_a_plain_jpeg_are_named() -> None:
    data, limits = jpeg(0, 40, 24), ImageLimits(959)
    told = []
    for decode in (decode_plain, partial(decode_image, limits=limits)):
        with pytest.raises(UserError, match=r"x\.jpg: has 40 x 24 = 960 pixels") as error:
            decode(data, "x.jpg", **({} if isinstance(decode, partial) else {"limits": limits}))
        told.append(str(error.value))
    assert told[0] == told[1]


def test_without_the_library_pillow_decodes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.jpg").write_bytes(jpeg(0, 40, 24))
    source = open_source(str(tmp_path), "data.train")
    fast = read_tensor(source, 0)
    monkeypatch.setattr(pixels_module, "decode_jpeg", None)
    assert torch.equal(read_tensor(source, 0), fast)
