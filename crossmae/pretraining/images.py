"""Training images of pretraining: random crops with mask noise."""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from crossmae.data.batches import KeyedImages, collate_as, keyed_randomness
from crossmae.data.broken import Broken
from crossmae.data.pixels import random_crop
from crossmae.data.sources import Source


class Batch(NamedTuple):
    """Images and mask noise of one micro-batch.

    Attributes:
        images: (B, C, H, W), uint8, or float32 in 0-1 for a bit depth of 16. Images are transferred as uint8, which
            needs a quarter of the bytes of float32, and normalised on the device.
        noise: (B, L) float32, for `CrossMAE.forward`.
        indices: (B,) int64 positions in the source.
        broken: samples that could not be read and were replaced by other images.
    """

    images: Tensor
    noise: Tensor
    indices: Tensor
    broken: tuple[Broken, ...] = ()


class PretrainImages(KeyedImages):
    """Randomly cropped and flipped images with mask noise (method specification, section 1.9).

    Args:
        img_size: (height, width) of the crop in pixels.
        crop_scale: smallest and largest area of the crop, as shares of the image.
        source, seed, channels, bit_depth, broken: see `KeyedImages`.
    """

    def __init__(
        self,
        source: Source,
        img_size: tuple[int, int],
        num_patches: int,
        crop_scale: tuple[float, float],
        flip: float,
        seed: int,
        channels: int = 3,
        bit_depth: int = 8,
        broken: Literal["error", "substitute"] = "error",
    ) -> None:
        super().__init__(source, seed, channels, bit_depth, broken)
        self.num_patches = num_patches
        self.crop = random_crop(img_size, crop_scale, flip)

    def sample(self, pixels: Tensor, position: int, key: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """Crop an image, and draw mask noise (L,)."""
        with keyed_randomness(*key):
            return self.crop(pixels), torch.rand(self.num_patches)


collate_pretraining = partial(collate_as, Batch)
