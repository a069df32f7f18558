"""Proves what becomes of every kind of image on its way into shards."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from crossmae.data.images import decode_image
from crossmae.data.sources.shrink import Encoded, keep, shrink
from crossmae.errors import UserError


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))


def png16(pixels: np.ndarray) -> bytes:
    """A PNG file of (H, W, 3) uint16, which Pillow cannot write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def opened(encoded: Encoded) -> Image.Image:
    return Image.open(io.BytesIO(encoded.data))


@pytest.mark.parametrize(
    ("size", "expected"), [((100, 50), (64, 32)), ((50, 100), (32, 64)), ((99, 66), (48, 32)), ((1000, 33), (970, 32))]
)
def test_the_short_side_is_as_asked_and_the_aspect_kept(size: tuple[int, int], expected: tuple[int, int]) -> None:
    result = shrink(encode(gradient(*size)), "x", 32, 90)
    assert opened(result).size == expected
    assert (result.suffix, result.size) == (".jpg", size)


def test_the_picture_is_the_same_but_smaller() -> None:
    small = np.asarray(opened(shrink(encode(gradient(256, 128)), "x", 64, 95)), dtype=float)
    assert np.abs(small - np.asarray(gradient(128, 64), dtype=float)).mean() < 2


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_small_images_stay_byte_for_byte(kind: str) -> None:
    data = encode(gradient(20, 32), kind)
    assert shrink(data, "x", 20, 50).data == data


@pytest.mark.parametrize("size", [(100, 50), (20, 10)])
def test_orientation_is_applied_and_dropped(size: tuple[int, int]) -> None:
    image = gradient(*size)
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was turned
    result = shrink(encode(image, "JPEG", exif=exif), "x", 32, 90)
    turned = opened(result)
    assert turned.size == ((32, 64) if size == (100, 50) else (10, 20))
    assert result.size == size[::-1]
    assert not turned.getexif()


def test_modes_follow_the_rules_of_reading() -> None:
    big = (64, 64)
    cases = [
        (Image.new("L", big, 77), "L", 77),
        (Image.new("RGBA", big, (10, 20, 30, 0)), "RGB", (255, 255, 255)),
        (Image.new("RGB", big, (10, 20, 30)).quantize(4), "RGB", (10, 20, 30)),
    ]
    for image, mode, value in cases:
        result = opened(shrink(encode(image), "x", 32, 100))
        assert result.mode == mode
        assert np.abs(np.subtract(result.getpixel((5, 5)), value)).max() <= 2


@pytest.mark.parametrize("image", [gradient(20, 32), gradient(20, 32).convert("L"), gradient(20, 32).quantize(8)])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_uncompressed_pixels_are_those_of_the_file(image: Image.Image, kind: str) -> None:
    """Also where the image is smaller than asked: every image of a shard is as quick to read."""
    data = encode(image, kind)
    result = shrink(data, "x", 64, None)
    assert (result.suffix, result.size) == (".ppm", (20, 32))
    assert len(result.data) < 20 * 32 * (1 if image.mode == "L" else 3) + 20
    for channels in (1, 3):
        one, two = (np.asarray(decode_image(encoded, "x", channels)) for encoded in (data, result.data))
        assert np.array_equal(one, two)


def test_uncompressed_pixels_are_shrunk_like_others() -> None:
    data = encode(gradient(99, 66))
    raw, jpeg = (np.asarray(opened(shrink(data, "x", 32, quality)), dtype=float) for quality in (None, 100))
    assert raw.shape == jpeg.shape
    assert np.abs(raw - jpeg).mean() < 1


def test_16_bit_grey_keeps_its_depth() -> None:
    pixels = np.random.default_rng(0).integers(0, 65536, (40, 40)).astype(np.uint16)
    pixels[:20] = 0xABCD
    result = shrink(encode(Image.fromarray(pixels)), "x", 20, 90)
    assert result == shrink(encode(Image.fromarray(pixels)), "x", 20, None)
    assert result.suffix == ".png"
    small = np.asarray(opened(result))
    assert small.dtype == np.uint16
    assert (small[:8] == 0xABCD).all()


def test_what_has_no_rule_is_refused_and_kept_on_request() -> None:
    deep = png16(np.zeros((4, 4, 3), np.uint16))
    with pytest.raises(UserError, match=r"deep\.png: 16-bit colour .*--keep-original"):
        shrink(deep, "deep.png", 2, 90)
    assert keep(deep, "deep.png") == Encoded(deep, ".png", None)


def test_keeping_checks_the_image_and_finds_its_suffix() -> None:
    data = encode(gradient(40, 30), "WEBP")
    assert keep(data, "rows[3]") == Encoded(data, ".webp", (40, 30))
    assert keep(data, "a.JPEG").suffix == ".jpeg"
    gif = encode(gradient(4, 4).quantize(4), "GIF")
    assert keep(gif, "rows[4]") == Encoded(gif, ".gif", (4, 4)) == shrink(gif, "x.gif", 32, 90)
    icon = encode(gradient(16, 16), "ICO")
    with pytest.raises(UserError, match=r"x\.ico: files of this kind are not packed"):
        keep(icon, "x.ico")
    assert shrink(icon, "x.ico", 32, 90).suffix == ".jpg"


@pytest.mark.parametrize("data", [b"", b"no image", encode(gradient(90, 90), "JPEG")[:900]])
def test_broken_images_are_named(data: bytes) -> None:
    with pytest.raises(UserError, match=r"x\.png: cannot be read as an image"):
        shrink(data, "x.png", 32, 90)
    with pytest.raises(UserError, match=r"x\.png: cannot be read as an image"):
        keep(data, "x.png")


def test_deep_colour_in_planes_is_refused_like_any_other_deep_colour() -> None:
    """Pillow opens such a TIFF file as if it were one of 8 bits."""
    tifffile = pytest.importorskip("tifffile")
    pixels = np.random.default_rng(0).integers(0, 65536, (3, 12, 10), np.uint16)
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, photometric="rgb", planarconfig="separate")
    with pytest.raises(UserError, match=r"x\.tif: 16-bit colour .* Use --keep-original"):
        shrink(file.getvalue(), "x.tif", 8, 90)
