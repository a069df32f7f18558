"""Pixels of images as tensors: decoding, the centre view of evaluation, normalisation."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as VF

from crossmae.data.images import IMAGE_LIMITS, LAST_BYTES, ImageLimits, decode_image, open_image, read_orientation
from crossmae.data.sources import Source
from crossmae.errors import UserError

try:
    from simplejpeg import decode_jpeg, decode_jpeg_header
except ImportError:  # an extra, which changes no pixel: Pillow decodes without it
    decode_jpeg = None


PLAIN_PPM = re.compile(rb"P6\n([0-9]{1,9}) ([0-9]{1,9})\n255\n")  # as Pillow writes it, also to shards
JPEG_SEGMENTS = {0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)}  # tables, comments and metadata before the samples
MOST_ENLARGED = 64  # pixels of an enlarged image per pixel of its view; longer strips are cropped first
MARGIN = 4  # pixels of the source; the filter for an enlargement reaches 2


def read_pixels(source: Source, index: int, channels: int = 3, bit_depth: int = 8) -> Image.Image | Tensor:
    """Read one sample as an image or a (C, H, W) tensor."""
    return decode_pixels(source.read(index), source.name(index), channels, bit_depth, source.limits)


def decode_pixels(
    data: bytes, name: str, channels: int = 3, bit_depth: int = 8, limits: ImageLimits = IMAGE_LIMITS
) -> Image.Image | Tensor:
    """Decode like `decode_image`, but return arrays as (C, H, W) tensors."""
    decoded = decode_image(data, name, channels, bit_depth, limits)
    return decoded if isinstance(decoded, Image.Image) else torch.from_numpy(decoded).permute(2, 0, 1)


def read_tensor(source: Source, index: int, channels: int = 3, bit_depth: int = 8) -> Tensor:
    """Read one sample as a tensor (C, H, W), faster if possible.

    The values, uint8 or float32 in 0-1, are those of `read_pixels`. Plain JPEG and PPM files take half the time.
    """
    data, name = source.read(index), source.name(index)
    plain = decode_plain(data, name, source.limits) if (channels, bit_depth) == (3, 8) else None
    if plain is not None:
        return torch.from_numpy(plain).permute(2, 0, 1)
    return to_tensor(decode_pixels(data, name, channels, bit_depth, source.limits))


def decode_plain(data: bytes, name: str, limits: ImageLimits = IMAGE_LIMITS) -> NDArray[np.uint8] | None:
    """Decode a plain JPEG or PPM to RGB, faster than Pillow.

    Returns:
        (H, W, 3), the pixels that `decode_image` returns; None for other files and for damaged files. JPEG needs
        simplejpeg.

    Raises:
        UserError: If the image has more pixels than the limit.
    """
    try:
        if ppm := PLAIN_PPM.match(data):
            width, height = int(ppm[1]), int(ppm[2])
            limits.check(name, width, height)
            if len(data) == ppm.end() + 3 * width * height:
                return np.frombuffer(data, np.uint8, offset=ppm.end()).reshape(height, width, 3).copy()
        elif decode_jpeg is not None and _is_plain_jpeg(data):
            height, width, colours, _ = decode_jpeg_header(data)
            if colours == "YCbCr":
                limits.check(name, width, height)
                pixels: NDArray[np.uint8] = decode_jpeg(data)  # an error for any doubt about the data
                return pixels
    except UserError:
        raise
    except Exception:  # `decode_image` decides what can be read, and describes the damage
        pass
    return None


def _is_plain_jpeg(data: bytes) -> bool:
    """Check for one upright JPEG in a single scan.

    Scans of a progressive JPEG may be missing in silence.
    """
    if not data.startswith(b"\xff\xd8") or not data.endswith(LAST_BYTES[0]):
        return False
    start = 2
    while len(data) > start + 8 and data[start] == 0xFF:
        marker, content = data[start + 1], data[start + 4 : start + 8]
        if marker in (0xC0, 0xC1):  # baseline and extended sequential
            return True
        is_exif = marker == 0xE1
        if marker not in JPEG_SEGMENTS or content == b"MPF\0" or (is_exif and read_orientation(open_image(data)) != 1):
            return False
        start += 2 + int.from_bytes(data[start + 2 : start + 4], "big")
    return False


def to_tensor(pixels: Image.Image | Tensor) -> Tensor:
    """Convert to (C, H, W): uint8, or float32 clipped to 0-1."""
    if isinstance(pixels, Image.Image):
        return VF.pil_to_tensor(pixels)
    return pixels.clamp(0, 1) if pixels.is_floating_point() else pixels


class CropBox(NamedTuple):
    """A part of an image in pixels, and if its view is flipped."""

    top: int
    left: int
    height: int
    width: int
    is_flipped: bool


class RandomCrop:
    """A random crop of an image, resized and flipped.

    torch resizes 8-bit tensors four times as fast as Pillow resizes images, and with the same mean error, about 0.3
    grey levels.

    Args:
        size: (height, width) of the view (C, height, width), uint8 or float32 in 0-1.
        scale: smallest and largest area of the crop, as shares of the image.
        flip: probability of a horizontal flip.
    """

    def __init__(self, size: tuple[int, int], scale: tuple[float, float], flip: float) -> None:
        self.size, self.flip = size, flip
        self.boxes = v2.RandomResizedCrop(size, scale=scale)

    def draw(self, pixels: Image.Image | Tensor) -> CropBox:
        """Choose a crop of an image."""
        box = self.boxes.make_params([pixels])
        return CropBox(**box, is_flipped=bool(torch.rand(1) < self.flip))

    def __call__(self, pixels: Image.Image | Tensor) -> Tensor:
        """Choose a crop of an image, and compute its view."""
        box = self.draw(pixels)
        bicubic = InterpolationMode.BICUBIC
        view = VF.resized_crop(pixels, *box[:4], size=list(self.size), interpolation=bicubic, antialias=True)
        return to_tensor(VF.horizontal_flip(view) if box.is_flipped else view)


def centre_view(pixels: Image.Image | Tensor, size: tuple[int, int], crop_pct: float = 1.0) -> Tensor:
    """Resize an image to cover `size`, then crop the centre.

    Only the neighbourhood of the centre is enlarged if the image is a long strip. No value differs by more than one
    grey level then.

    Args:
        crop_pct: share of the resized image that the crop keeps along a side. For a square crop, the shorter side of
            the image becomes int(size / crop_pct), as in timm and torchvision.
    """
    height, width = VF.get_size(pixels)
    cover = [int(side / crop_pct) for side in size]
    # The limiting side gets the exact length, the other side is rounded down to whole pixels.
    if cover[0] * width >= cover[1] * height:
        scaled = [cover[0], cover[0] * width // height]
    else:
        scaled = [cover[1] * height // width, cover[1]]
    if scaled[0] * scaled[1] > max(height * width, MOST_ENLARGED * size[0] * size[1]):
        return _enlarged_centre(pixels, size, scaled)
    resized = VF.resize(pixels, scaled, interpolation=InterpolationMode.BICUBIC, antialias=True)
    return to_tensor(VF.center_crop(resized, list(size)))


def _enlarged_centre(pixels: Image.Image | Tensor, size: tuple[int, int], scaled: list[int]) -> Tensor:
    """Enlarge only the centre of an image that would become `scaled`."""
    spans = [_source_span(*sides) for sides in zip(VF.get_size(pixels), scaled, size, strict=True)]
    (top, height, above, below), (left, width, before, behind) = spans
    part = to_tensor(VF.crop(pixels, top, left, height, width))
    top_value = 1.0 if part.is_floating_point() else 255.0
    planes = []
    for plane in part.float().numpy():  # Pillow and torchvision also resize rows first, and clip 8-bit values between
        wide = Image.fromarray(plane).resize((size[1], height), Image.Resampling.BICUBIC, (before, 0, behind, height))
        if not part.is_floating_point():
            wide = Image.fromarray(np.asarray(wide).clip(0, 255))
        planes.append(np.asarray(wide.resize(size[::-1], Image.Resampling.BICUBIC, (0, above, size[1], below))))
    view = torch.from_numpy(np.stack(planes)).clamp(0, top_value)
    return view if part.is_floating_point() else view.round().byte()


def _source_span(source: int, scaled: int, side: int) -> tuple[int, int, float, float]:
    """Locate the centre of `scaled` pixels in the source.

    Returns:
        Start and length in whole pixels, with a margin for the filter, and the exact start and end within this part.
    """
    start = round((scaled - side) / 2)  # as in center_crop
    first, last = start * source / scaled, (start + side) * source / scaled
    begin, end = max(0, math.floor(first) - MARGIN), min(source, math.ceil(last) + MARGIN)
    return begin, end - begin, first - begin, last - begin


def published_crop_pct(size: tuple[int, int]) -> float:
    """Return the published `crop_pct`: 224/256 up to 224 pixels, else 1."""
    return 224 / 256 if max(size) <= 224 else 1.0


def to_unit_range(images: Tensor) -> Tensor:
    """Convert uint8 pixels to float32 in 0-1, and keep float pixels."""
    return images if images.is_floating_point() else images.float() / 255


class Normalize:
    """Standardisation of pixels (B, C, H, W) per channel, with mean and deviation on a device."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self.mean, self.std = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (mean, std))

    def __call__(self, images: Tensor) -> Tensor:
        return (to_unit_range(images) - self.mean) / self.std
