"""Smaller copies of encoded images, for shards that are quick to read.

| file                                                  | result                                                     |
| ----------------------------------------------------- | ---------------------------------------------------------- |
| short side within the limit, and upright              | unchanged, if shards are compressed                        |
| 8 bits                                                | JPEG or PPM, grayscale or RGB; palette, transparency and   |
|                                                       | CMYK: see crossmae/data/images.py                          |
| grayscale, 16-bit or floating point                   | PNG, 16-bit                                                |
| 16-bit colour, other numbers of channels              | an error: pack the originals                               |

Images are never enlarged. Orientation is applied. EXIF data and colour profiles are dropped, because training does not
use them.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crossmae.data.images import IMAGE_LIMITS, ImageLimits, decode_image, is_deep, open_image, read_orientation
from crossmae.data.paths import IMAGE_FORMATS, IMAGE_SUFFIXES
from crossmae.errors import UserError

SUFFIX_OF = {name: suffixes[0] for name, suffixes in IMAGE_FORMATS.items()} | {"MPO": ".jpg"}
TIFF = (b"II", b"MM")


@dataclass(frozen=True)
class Encoded:
    """An encoded image.

    Attributes:
        size: (width, height) of the original, upright; None if only the reader in training can determine the size.
    """

    data: bytes
    suffix: str
    size: tuple[int, int] | None


def shrink(data: bytes, name: str, short_side: int, quality: int | None, limits: ImageLimits = IMAGE_LIMITS) -> Encoded:
    """Shrink an image to a short side of at most `short_side` pixels.

    Args:
        quality: quality of JPEG files; None: PPM, which needs no decoding.

    Raises:
        UserError: If the file is not a readable image, or no rule exists for its kind. The message names the file.
    """
    header = _read_header(data, name, limits)
    if header is None or _is_deep_colour(header, data):
        raise UserError(f"{name}: 16-bit colour and many channels cannot be resized. Use --keep-original.")
    is_deep_grey = header.mode.startswith(("I", "F"))
    channels = 1 if is_deep_grey or header.mode in ("1", "L") else 3
    pixels = decode_image(data, name, channels, 16 if is_deep_grey else 8, limits)
    width, height = _size(pixels)
    is_upright = read_orientation(header) == 1
    is_small_enough = min(width, height) <= short_side and is_upright
    if is_small_enough and header.format in SUFFIX_OF and (quality is not None or is_deep_grey):
        return Encoded(data, SUFFIX_OF[header.format], (width, height))
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels[..., 0])
    scale = short_side / min(width, height)
    if scale < 1:
        image = image.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BICUBIC)
    encoded = io.BytesIO()
    if is_deep_grey:
        deep = np.rint(np.asarray(image).clip(0, 1) * 65535).astype(np.uint16)  # bicubic values may leave 0-1
        Image.fromarray(deep).save(encoded, "PNG")
        return Encoded(encoded.getvalue(), ".png", (width, height))
    if quality is None:
        image.save(encoded, "PPM")
        return Encoded(encoded.getvalue(), ".ppm", (width, height))
    image.save(encoded, "JPEG", quality=quality)
    return Encoded(encoded.getvalue(), ".jpg", (width, height))


def keep(data: bytes, name: str, limits: ImageLimits = IMAGE_LIMITS) -> Encoded:
    """Check that an image is not damaged, and keep its bytes.

    Raises UserError if the file is not a readable image, or training cannot read its kind. The message names the file.
    """
    header, size = _read_header(data, name, limits), None
    if header is not None and not _is_deep_colour(header, data):
        size = _size(decode_image(data, name, limits=limits))
    suffix = PurePosixPath(name).suffix.lower()
    if suffix not in IMAGE_SUFFIXES:
        suffix = SUFFIX_OF.get(header.format or "", "") if header is not None else ".tif"
    if not suffix:
        raise UserError(f"{name}: files of this kind are not packed unchanged. Expected {', '.join(SUFFIX_OF)}.")
    return Encoded(data, suffix, size)


def _size(pixels: Image.Image | NDArray[Any]) -> tuple[int, int]:
    return pixels.size if isinstance(pixels, Image.Image) else (pixels.shape[1], pixels.shape[0])


def _read_header(data: bytes, name: str, limits: ImageLimits) -> Image.Image | None:
    """Read the header, or return None for a TIFF unknown to Pillow."""
    try:
        return open_image(data)
    except Exception:  # of many kinds
        if data[:2] not in TIFF:
            decode_image(data, name, limits=limits)  # raises an error for a damaged file
        return None


def _is_deep_colour(header: Image.Image, data: bytes) -> bool:
    # Pillow would cut it to 8 bits.
    return not header.mode.startswith(("I", "F")) and is_deep(data)
