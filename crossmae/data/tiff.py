"""TIFF files that Pillow cannot read correctly: deep colour, many channels, signed, floating point."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from crossmae.errors import import_extra

DEEP = "an image of more than 8 bits a channel, or of other than 1 or 3 channels,"  # needs the optional extra
MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
BITS, PHOTOMETRIC, SAMPLES, SAMPLE_FORMAT = 258, 262, 277, 339  # TIFF tags
WHITE_IS_ZERO, UNSIGNED, OPACITY = 0, 1, (1, 2)  # values of TIFF tags
SAMPLES_OF_MODE = {"1": 1, "L": 1, "P": 1, "LA": 2, "PA": 2, "RGB": 3, "YCbCr": 3, "LAB": 3, "RGBA": 4, "CMYK": 4}


def needs_tifffile(data: bytes, channels: int) -> bool:
    """Check whether a file is a TIFF for `read_tiff`, not for Pillow."""
    if not data.startswith(MAGIC):
        return False
    if channels not in (1, 3):
        return True
    try:
        with Image.open(io.BytesIO(data)) as image:
            assert isinstance(image, TiffImagePlugin.TiffImageFile)
            mode, tags = image.mode, image.tag_v2
            bits, formats, samples = (_values(tags.get(tag, 1)) for tag in (BITS, SAMPLE_FORMAT, SAMPLES))
            inverted = tags.get(PHOTOMETRIC) == WHITE_IS_ZERO
    except Exception:  # Pillow raises many kinds of errors; tifffile reports the problem
        return True
    if set(formats) != {UNSIGNED}:
        return True
    if max(bits) > 8:
        return samples[0] > 1 or inverted or not mode.startswith("I;16")
    return SAMPLES_OF_MODE.get(mode) != samples[0]


def has_deep_samples(image: Image.Image) -> bool:
    """Check whether an image is a TIFF with over 8 bits/channel."""
    return isinstance(image, TiffImagePlugin.TiffImageFile) and max(_values(image.tag_v2.get(BITS, 1))) > 8


def read_tiff(data: bytes, channels: int) -> NDArray[Any]:
    """Read the first image, upright (H, W, C), over white.

    Args:
        channels: requested number of channels. If a file has exactly this number of pages of one size, the pages are
            channels. Otherwise pages are frames.

    Raises:
        ValueError: If the file has CMYK, YCbCr, LAB or palette colours of more than 8 bits.
    """
    tifffile = import_extra("tifffile", DEEP)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        series, page = file.series[0], file.pages[0]
        kind = tifffile.PHOTOMETRIC(page.photometric).name
        pixels, axes = series.asarray(), series.axes
        orientation = int(page.tags["Orientation"].value) if "Orientation" in page.tags else 1
        has_opacity = bool(page.extrasamples) and int(page.extrasamples[-1]) in OPACITY
    if kind not in ("MINISBLACK", "MINISWHITE", "RGB"):
        raise ValueError(f"a TIFF file of {kind} colours with {pixels.dtype} samples has no rule. Convert it to RGB.")
    if pixels.ndim == 3 and axes[-1] != "S":
        pixels = np.moveaxis(pixels, 0, -1) if pixels.shape[0] == channels or axes[0] in "SC" else pixels[0]
    while pixels.ndim > 3:
        pixels = pixels[0]
    pixels = upright(np.atleast_3d(pixels), orientation)
    if kind == "MINISWHITE":
        pixels = _top(pixels) - pixels
    return over_white(pixels) if has_opacity and pixels.shape[-1] != channels else pixels


def upright(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Undo an EXIF orientation 1 .. 8 of pixels (H, W, C)."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels


def over_white(pixels: NDArray[Any]) -> NDArray[Any]:
    """Blend samples with white. The last channel is the opacity."""
    top = _top(pixels)
    opacity = pixels[..., -1:] / top
    return np.asarray(pixels[..., :-1] * opacity + top * (1 - opacity)).astype(pixels.dtype)


def _top(pixels: NDArray[Any]) -> Any:
    return 1.0 if np.issubdtype(pixels.dtype, np.floating) else np.iinfo(pixels.dtype).max


def _values(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple) else (value,)
