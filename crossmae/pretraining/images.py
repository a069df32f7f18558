"""Training images of pretraining: random crops with mask noise."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from crossmae.data.batches import KeyedImages, collate_as, keyed_randomness
from crossmae.data.broken import Broken, Unreadable
from crossmae.data.pixels import RandomCrop
from crossmae.data.sources import Source
from crossmae.pretraining.device_crops import Cut, PackedCrops, cut_out, pack_crops, resize_crops


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


class PackedBatch(NamedTuple):
    """Decoded crops and mask noise of one micro-batch: `Batch`, before the crops are resized."""

    images: PackedCrops
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
        self.crop = RandomCrop(img_size, crop_scale, flip)

    def sample(self, pixels: Tensor, position: int, key: tuple[int, int, int]) -> tuple[Any, Tensor]:
        """Crop an image, and draw mask noise (L,)."""
        with keyed_randomness(*key):
            return self.view(pixels), torch.rand(self.num_patches)

    def view(self, pixels: Tensor) -> Any:
        """Choose a crop, and compute its view (C, H, W)."""
        return self.crop(pixels)


class DecodedCrops(PretrainImages):
    """The crops and the mask noise of `PretrainImages`, to be resized on the device."""

    def view(self, pixels: Tensor) -> Cut:
        """Choose a crop, and cut out its pixels."""
        return cut_out(pixels, self.crop.draw(pixels))


collate_pretraining = partial(collate_as, Batch)


def collate_decoded(size: tuple[int, int], samples: list[Any]) -> PackedBatch | Unreadable:
    """Pack samples of `DecodedCrops` for views of `size` (height, width)."""
    return collate_as(PackedBatch, samples, partial(pack_crops, size=size))


def images_on(device: torch.device, images: Tensor | PackedCrops) -> Tensor:
    """Transfer images to a device, or resize packed crops there."""
    if isinstance(images, PackedCrops):
        return resize_crops(images, device)
    return images.to(device, non_blocking=True)
