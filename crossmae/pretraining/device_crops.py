"""Crops of a whole batch, resized and flipped on the device.

The loader decodes images, chooses crops, and packs their pixels into one tensor. On the device, two batched matrix
products resize the crops, first along rows and then along columns. Like the resizing of 8-bit images on the CPU, each
product ends with whole grey levels from 0 to 255. So results differ by at most two grey levels from `RandomCrop`.

Products need crops of one size, so crops of similar size form a chunk and are padded with weights of zero. Sizes are
planned by the loader. The device never waits for the host, nor the host for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from crossmae.data.pixels import CropBox

MOST_ELEMENTS = 2**24  # of all arrays of a chunk, at up to 13 bytes an element: about 0.2 GB


class Cut(NamedTuple):
    """The pixels of one crop (height, width, C), uint8 or float32 in 0-1, and if its view is flipped."""

    pixels: Tensor
    is_flipped: bool


class Chunk(NamedTuple):
    """Rows `first` .. `last` - 1 of a table of crops, and the height and width that these crops are padded to."""

    first: int
    last: int
    height: int
    width: int


class PackedCrops(NamedTuple):
    """Crops of different sizes in one tensor, ready for one transfer to a device.

    Attributes:
        pixels: (N,) uint8, or float32 in 0-1. The crops (height, width, C) follow one another.
        table: (B, 5) int64, one row per crop: position in the batch, offset in `pixels`, height, width, and 1 for a
            flip. Rows are sorted by size.
        chunks: see `Chunk`. Pinning the memory of a batch turns tuples into lists.
        channels: number of channels.
        size: (height, width) of the views in pixels.
    """

    pixels: Tensor
    table: Tensor
    chunks: Sequence[Sequence[int]]
    channels: int
    size: Sequence[int]


def cut_out(pixels: Tensor, box: CropBox) -> Cut:
    """Copy a crop out of an image (C, H, W)."""
    part = pixels[:, box.top : box.top + box.height, box.left : box.left + box.width]
    return Cut(part.permute(1, 2, 0).contiguous(), box.is_flipped)


def pack_crops(cuts: Sequence[Cut], size: tuple[int, int], most: int = MOST_ELEMENTS) -> PackedCrops:
    """Pack the crops of a batch, and plan their chunks.

    Args:
        size: (height, width) of the views in pixels.
        most: largest number of elements in the arrays of a chunk. A single crop may exceed it.
    """
    shapes = [tuple(one.pixels.shape) for one in cuts]
    offsets = [0, *accumulate(one.pixels.numel() for one in cuts)]
    order = sorted(range(len(cuts)), key=lambda position: max(shapes[position][:2]))
    rows = [(position, offsets[position], *shapes[position][:2], cuts[position].is_flipped) for position in order]
    channels = shapes[0][2]
    return PackedCrops(
        torch.cat([one.pixels.flatten() for one in cuts]),
        torch.tensor(rows, dtype=torch.int64),
        tuple(plan_chunks([shapes[position][:2] for position in order], channels, size, most)),
        channels,
        size,
    )


def plan_chunks(shapes: Iterable[tuple[int, ...]], channels: int, size: tuple[int, int], most: int) -> Iterator[Chunk]:
    """Divide crops of rising sizes into chunks of bounded memory."""

    def elements(height: int, width: int) -> int:
        """Count the pixels, weights and results of a padded crop."""
        weights = size[0] * height + size[1] * width
        return weights + channels * (height * width + height * size[1] + size[0] * size[1])

    first = last = tallest = widest = 0
    for last, (height, width) in enumerate(shapes):
        padded = max(height, tallest), max(width, widest)
        if last > first and (last + 1 - first) * elements(*padded) > most:
            yield Chunk(first, last, tallest, widest)
            first, padded = last, (height, width)
        tallest, widest = padded
    yield Chunk(first, last + 1, tallest, widest)


def resize_crops(crops: PackedCrops, device: torch.device, most: int = MOST_ELEMENTS) -> Tensor:
    """Resize and flip the crops of a batch on a device.

    Products are in float32, also within autocast. TF32 holds 8-bit pixels exactly, and rounds the weights.

    Returns:
        (B, C, height, width), uint8, or float32 in 0-1 if the crops are.
    """
    pixels, table = (tensor.to(device, non_blocking=True) for tensor in (crops.pixels, crops.table))
    views = pixels.new_empty((len(table), crops.channels, *crops.size))
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for first, last, height, width in crops.chunks:
            position, *places = table[first:last].unbind(1)
            chunk = _resize_chunk(pixels, places, (height, width), crops.channels, crops.size, most)
            views.index_copy_(0, position, chunk)
    return views


def _resize_chunk(
    pixels: Tensor,
    places: Sequence[Tensor],
    padded: tuple[int, int],
    channels: int,
    size: Sequence[int],
    most: int,
) -> Tensor:
    """Resize crops of similar size to views (n, C, height, width).

    Args:
        places: offset, height, width and flip of each crop (n,).
        padded: (height, width) of the largest crops.
        most: see `pack_crops`. Rows of crops that are larger are resized in bands.
    """
    offset, height, width, flip = places
    along_rows = bicubic_weights(width, padded[1], size[1], flip).mT
    along_columns = bicubic_weights(height, padded[0], size[0])
    offset, height, width = (values[:, None, None, None] for values in (offset, height, width))
    # Padding repeats the last row and column, with weights of zero.
    channel, column = (torch.arange(count, device=pixels.device) for count in (channels, padded[1]))
    starts = offset + channel[:, None] + channels * torch.minimum(column, width - 1)  # (n, 1, C, padded width)
    bands, rows = [], max(1, most // starts.numel())
    for first in range(0, padded[0], rows):
        row = torch.arange(first, min(first + rows, padded[0]), device=pixels.device)[:, None, None]
        band = pixels[starts + channels * width * torch.minimum(row, height - 1)]  # (n, rows, C, padded width)
        bands.append(torch.bmm(band.float().flatten(1, 2), along_rows))
    wide = torch.cat(bands, 1) if len(bands) > 1 else bands[0]
    # From (n, padded height * C, width of the view) to (n, height of the view, C * width of the view).
    wide = _to_grey_levels(wide, pixels.dtype).view(len(offset), padded[0], channels * size[1])
    views = _to_grey_levels(torch.bmm(along_columns, wide), pixels.dtype)
    views = views.clamp_(0, 1) if pixels.is_floating_point() else views.to(pixels.dtype)
    return views.view(len(offset), size[0], channels, size[1]).transpose(1, 2)


def _to_grey_levels(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round and clip the values of 8-bit images, in place."""
    return values if dtype.is_floating_point else values.clamp_(0, 255).round_()


def bicubic_weights(sides: Tensor, padded: int, size: int, flip: Tensor | None = None) -> Tensor:
    """Compute the weights of an antialiased bicubic filter.

    The filter (a = -0.5) is that of Pillow and torchvision. It reaches two pixels of the source for an enlargement,
    and two pixels of the result for a reduction.

    Args:
        sides: (n,) lengths of crops in pixels.
        padded: length of the longest crop. Weights beyond the end of a crop are zero.
        size: length of the results.
        flip: (n,) 1 for crops whose results are reversed; None: no result is.

    Returns:
        (n, size, padded) float32. Each row sums to 1.
    """
    sides = sides[:, None, None]
    target, source = (torch.arange(count, device=sides.device) for count in (size, padded))
    target = target[:, None]
    if flip is not None:
        target = torch.where(flip[:, None, None] > 0, size - 1 - target, target)
    # Centres of pixels, in units of half the filter's reach.
    scale = sides / size
    unit = scale.clamp(min=1)
    centres = ((source + 0.5) / unit).masked_fill_(source >= sides, math.inf)
    distance = (centres - (target + 0.5) * scale / unit).abs_()  # (n, size, padded)
    # Twice the filter: its cubic pieces, from 0 to 1 and from 1 to 2, as sums of powers that end at 1 and at 2.
    near, far = (1 - distance).relu_(), (2 - distance).relu_()
    weights = (far - 1).mul_(far).mul_(far).addcmul_(near, torch.rsub(near, 2, alpha=4).mul_(near))
    return weights.div_(weights.sum(-1, keepdim=True))
