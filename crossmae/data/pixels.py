"""Pixels of images as tensors: decoding, the centre view of evaluation, normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as VF

from crossmae.data.images import IMAGE_LIMITS, ImageLimits, decode_image
from crossmae.data.sources import Source


def read_pixels(source: Source, index: int, channels: int = 3, bit_depth: int = 8) -> Image.Image | Tensor:
    """Read one sample as an image or a (C, H, W) tensor."""
    return decode_pixels(source.read(index), source.name(index), channels, bit_depth, source.limits)


def decode_pixels(
    data: bytes, name: str, channels: int = 3, bit_depth: int = 8, limits: ImageLimits = IMAGE_LIMITS
) -> Image.Image | Tensor:
    """Decode like `decode_image`, but return arrays as (C, H, W) tensors."""
    decoded = decode_image(data, name, channels, bit_depth, limits)
    return decoded if isinstance(decoded, Image.Image) else torch.from_numpy(decoded).permute(2, 0, 1)


def to_tensor(pixels: Image.Image | Tensor) -> Tensor:
    """Convert to (C, H, W): uint8, or float32 clipped to 0-1."""
    if isinstance(pixels, Image.Image):
        return VF.pil_to_tensor(pixels)
    return pixels.clamp(0, 1) if pixels.is_floating_point() else pixels


def centre_view(pixels: Image.Image | Tensor, size: tuple[int, int], crop_pct: float = 1.0) -> Tensor:
    """Resize an image to cover `size`, then crop the centre.

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
    resized = VF.resize(pixels, scaled, interpolation=InterpolationMode.BICUBIC, antialias=True)
    return to_tensor(VF.center_crop(resized, list(size)))


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
