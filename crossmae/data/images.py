"""Decode image files of any kind to a given number of channels.

All rules (`bit_depth` is 8 by default; 16 keeps the precision of files with more than 8 bits, as float32):

    | file                          | result                                                               |
    | ----------------------------- | -------------------------------------------------------------------- |
    | EXIF or TIFF orientation      | applied                                                              |
    | several frames or pages       | the first frame or page                                              |
    | palette                       | converted to colours                                                 |
    | transparency                  | laid over white; kept as the 4th channel if 4 channels are requested |
    | grayscale, 3 channels wanted  | channel repeated                                                     |
    | colour, 1 channel wanted      | luma, 0.299 R + 0.587 G + 0.114 B                                    |
    | CMYK, YCbCr, LAB, HSV         | converted to RGB by Pillow                                           |
    | 16-bit                        | scaled from 0-65535, also if only 12 bits are used: measure mean and std |
    | floating point                | read as 0-1; other values are an error                               |
    | signed, or 32-bit integers    | an error: rescale the values                                         |
    | other numbers of channels     | TIFF only, channels first or last, and exactly the requested number  |
    | anything else                 | an error that names the file and its content                         |
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from crossmae.errors import UserError, import_extra, printable
from crossmae.files import read_file

# TIFF: the files that Pillow cannot read correctly have deep colour, many channels, signed or floating-point samples.
DEEP = "an image of more than 8 bits a channel, or of other than 1 or 3 channels,"  # needs the optional extra
MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
BITS, PHOTOMETRIC, SAMPLES, SAMPLE_FORMAT = 258, 262, 277, 339  # TIFF tags
WHITE_IS_ZERO, UNSIGNED, OPACITY = 0, 1, (1, 2)  # values of TIFF tags
SAMPLES_OF_MODE = {"1": 1, "L": 1, "P": 1, "LA": 2, "PA": 2, "RGB": 3, "YCbCr": 3, "LAB": 3, "RGBA": 4, "CMYK": 4}

ANIMATIONS = ("GIF", "PNG", "WEBP", "AVIF")  # MPO and TIFF hold other pictures than frames

LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)

# Last bytes of complete JPEG and PNG files. Files of other kinds must be decoded to find out if they are complete.
LAST_BYTES = (b"\xff\xd9", b"IEND\xaeB`\x82")


def read_image(path: str | Path) -> Image.Image:
    """Read one file as 8-bit RGB, by the rules above."""
    return decode_image(read_file(path), str(path))  # type: ignore[return-value]  # three channels of 8 bits are an Image


def decode_image(data: bytes, name: str, channels: int = 3, bit_depth: int = 8) -> Image.Image | NDArray[Any]:
    """Decode a whole file to `channels` channels, by the rules above.

    Returns:
        An "L" or "RGB" image for one or three channels of 8 bits. Otherwise an array (H, W, channels), which is uint8
        for a bit depth of 8 and float32 in 0-1 for 16.

    Raises:
        UserError: If the file is empty, truncated, not an image, above Pillow's limit of pixels, or has a number of
            channels that no rule converts to `channels`. The message names the file.
    """
    name = printable(name)
    try:
        if _needs_tifffile(data, channels):
            samples = _read_tiff(data, channels)
        elif _is_deep_colour_png(data) and (bit_depth == 16 or channels not in (1, 3)):
            samples = np.asarray(import_extra("imagecodecs", DEEP).png_decode(data))
            samples = _over_white(samples) if samples.shape[-1] in (2, 4) and channels != samples.shape[-1] else samples
        else:
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                upright = ImageOps.exif_transpose(image)
            if bit_depth == 8 and channels in (1, 3) and upright.mode != "F":
                rgb = to_rgb(upright)
                return rgb if channels == 3 else rgb.convert("L")
            samples = _samples(upright, channels)
        pixels = _with_channels(_as_unit_range(samples, name), channels, name)
    except UserError:
        raise
    except Exception as error:  # the libraries raise many kinds of errors for damaged files
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "not an image of a kind that this tool reads" if unknown else " ".join(str(error).split())
        raise UserError(f"{name}: cannot be read as an image: {reason or type(error).__name__}") from error
    if bit_depth == 16:
        return pixels
    cut = np.rint(pixels * 255).astype(np.uint8)
    return Image.fromarray(cut.squeeze(-1) if channels == 1 else cut) if channels in (1, 3) else cut


def is_deep(data: bytes) -> bool:
    """Check whether a file's header declares more than 8 bits per channel."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.mode.startswith(("I", "F")) or _is_deep_colour_png(data) or _has_deep_samples(image)
    except Exception:  # unknown to Pillow, or broken: reading the file reports the error
        return False


def count_frames(file: Path | io.BytesIO) -> int:
    """Count the frames of an animation, 1 for other files."""
    try:
        with Image.open(file) as image:
            return getattr(image, "n_frames", 1) if image.format in ANIMATIONS else 1
    except Exception:  # reading the file reports the error
        return 1


def _is_deep_colour_png(data: bytes) -> bool:
    # Pillow would cut 16-bit PNG files to 8 bits, except grayscale without transparency.
    return data.startswith(b"\x89PNG") and data[24:25] == b"\x10" and data[25:26] != b"\0"


def _samples(image: Image.Image, channels: int) -> NDArray[Any]:
    if image.mode.startswith("I"):
        return _deep_grey(image)[..., None]
    if image.mode in ("F", "L") and "transparency" not in image.info:
        return np.asarray(image)[..., None]
    has_opacity = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    return np.asarray(image.convert("RGBA") if channels == 4 and has_opacity else to_rgb(image))


def _deep_grey(image: Image.Image) -> NDArray[np.uint16]:
    """Read grayscale pixels (H, W), with the transparent value as white."""
    pixels = np.asarray(image).clip(0, 65535).astype(np.uint16)
    transparent = image.info.get("transparency")
    return np.where(pixels == transparent, 65535, pixels).astype(np.uint16) if transparent is not None else pixels


def _as_unit_range(pixels: NDArray[Any], name: str) -> NDArray[np.float32]:
    if pixels.dtype == bool or pixels.dtype in (np.uint8, np.uint16):
        top = 1 if pixels.dtype == bool else np.iinfo(pixels.dtype).max
        return pixels.astype(np.float32) / np.float32(top)
    if not np.issubdtype(pixels.dtype, np.floating):
        raise UserError(
            f"{name}: holds {pixels.dtype} samples. Convert it to 8 or 16 bits without sign, or to floats in 0-1."
        )
    if not (np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1):
        raise UserError(
            f"{name}: floating-point samples from {pixels.min():g} to {pixels.max():g}. Rescale them to 0-1."
        )
    return pixels.astype(np.float32)


def _with_channels(pixels: NDArray[np.float32], channels: int, name: str) -> NDArray[np.float32]:
    held = pixels.shape[-1]
    if held == channels:
        return np.ascontiguousarray(pixels)
    if held == 1 and channels == 3:
        return np.repeat(pixels, 3, axis=-1)
    if held == 3 and channels == 1:
        return (pixels @ LUMA)[..., None]
    raise UserError(f"{name}: has {held} channels, model.in_chans is {channels}. Convert it, or change model.in_chans.")


def is_whole(tail: bytes) -> bool:
    """Check whether the last bytes end a complete JPEG or PNG."""
    return tail.endswith(LAST_BYTES)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow mode to 8-bit RGB, by the rules above."""
    if image.mode.startswith("I"):  # I;16, I;16B and I: modes of 16-bit PNG and TIFF files
        return Image.fromarray((_deep_grey(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def parse_size(text: str, key: str) -> tuple[int, int]:
    """Parse pixels such as "224" or "192x256" into (height, width)."""
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if match is None:
        raise UserError(f"{key} {text}: expected pixels, such as 224, or 192x256 for height and width")
    return int(match[1]), int(match[2] or match[1])


def _needs_tifffile(data: bytes, channels: int) -> bool:
    """Check whether a file is a TIFF for `_read_tiff`, not for Pillow."""
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


def _has_deep_samples(image: Image.Image) -> bool:
    """Check whether an image is a TIFF with over 8 bits/channel."""
    return isinstance(image, TiffImagePlugin.TiffImageFile) and max(_values(image.tag_v2.get(BITS, 1))) > 8


def _read_tiff(data: bytes, channels: int) -> NDArray[Any]:
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
    pixels = _upright(np.atleast_3d(pixels), orientation)
    if kind == "MINISWHITE":
        pixels = _top(pixels) - pixels
    return _over_white(pixels) if has_opacity and pixels.shape[-1] != channels else pixels


def _upright(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Undo an EXIF orientation 1 .. 8 of pixels (H, W, C)."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels


def _over_white(pixels: NDArray[Any]) -> NDArray[Any]:
    """Blend samples with white. The last channel is the opacity."""
    top = _top(pixels)
    opacity = pixels[..., -1:] / top
    return np.asarray(pixels[..., :-1] * opacity + top * (1 - opacity)).astype(pixels.dtype)


def _top(pixels: NDArray[Any]) -> Any:
    return 1.0 if np.issubdtype(pixels.dtype, np.floating) else np.iinfo(pixels.dtype).max


def _values(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple) else (value,)
