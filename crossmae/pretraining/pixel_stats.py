"""Mean and standard deviation of the pixels of a data set, computed image by image."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crossmae.data.images import decode_image
from crossmae.data.parallel import map_in_order
from crossmae.data.sources.source import Source
from crossmae.errors import UserError

LOW_RANGE = 1 / 8  # share of the 16-bit range; 12-bit data use 1/16
# Mean and mean square per channel, largest value, and sides of one image.
ImageMoments = tuple[NDArray[np.float64], NDArray[np.float64], float, tuple[int, int]]


@dataclass(frozen=True)
class PixelStats:
    """Pixel statistics over images. Every image has the same weight, because training crops have the same size.

    Attributes:
        mean, std: per channel, of pixels scaled to 0-1.
        largest: largest pixel value of all images, scaled to 0-1.
        short_side, long_side: smallest, median and largest side over all images, in pixels.
    """

    images: int
    mean: list[float]
    std: list[float]
    largest: float
    short_side: tuple[int, float, int]
    long_side: tuple[int, float, int]

    @property
    def overrides(self) -> str:
        """Arguments for the command line of `tools/pretrain.py`."""
        mean, std = (", ".join(f"{value:.4f}" for value in values) for values in (self.mean, self.std))
        return f"'data.mean=[{mean}]' 'data.std=[{std}]'"


def measure(source: Source, indices: Sequence[int], channels: int, bit_depth: int, threads: int) -> PixelStats:
    """Measure the pixels of the images `indices`, at least one image."""

    def look(index: int) -> ImageMoments:
        return _measure_image(decode_image(source.read(index), source.name(index), channels, bit_depth, source.limits))

    sums, square_sums = np.zeros(channels), np.zeros(channels)
    largest, sides = 0.0, array("I")  # two numbers per image
    for image_mean, image_square, image_largest, image_sides in map_in_order(look, indices, threads, bar="measure"):
        sums += image_mean
        square_sums += image_square
        largest = max(largest, image_largest)
        sides.extend(image_sides)
    count = len(indices)
    mean = sums / count
    both = np.array(sides).reshape(-1, 2)
    return PixelStats(
        images=count,
        mean=mean.tolist(),
        std=np.sqrt((square_sums / count - mean**2).clip(0)).tolist(),
        largest=largest,
        short_side=_spread(both.min(axis=1)),
        long_side=_spread(both.max(axis=1)),
    )


def _measure_image(image: Image.Image | NDArray[Any]) -> ImageMoments:
    if isinstance(image, Image.Image):
        # A histogram is exact, and several times faster than computing with every pixel.
        counts = np.array(image.histogram(), dtype=np.float64).reshape(-1, 256)
        values, shares = np.arange(256) / 255, counts / (image.width * image.height)
        largest = float(values[np.flatnonzero(counts.any(axis=0))[-1]])
        return shares @ values, shares @ values**2, largest, image.size
    pixels = image.reshape(-1, image.shape[-1]) / (255 if image.dtype == np.uint8 else 1.0)  # (H * W, C)
    pixels = pixels.astype(np.float64)
    return pixels.mean(axis=0), (pixels**2).mean(axis=0), float(pixels.max()), (image.shape[1], image.shape[0])


def _spread(sides: NDArray[Any]) -> tuple[int, float, int]:
    return int(sides.min()), float(np.median(sides)), int(sides.max())


def check_usable(stats: PixelStats) -> None:
    """Raise a UserError if a channel is constant."""
    constant = [channel for channel, value in enumerate(stats.std) if value < 5e-5]  # printed as 0.0000
    if constant:
        raise UserError(
            f"channel {', '.join(map(str, constant))} has the same value everywhere (std 0). Look at the images and at "
            "model.in_chans."
        )
