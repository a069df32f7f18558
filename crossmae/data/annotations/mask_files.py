"""Masks as image files: 0 is the background, and every other value is one object.

masks/a.png for images/a.jpg             all objects have the class "object"
masks/cell/a.png for images/a.jpg        the class is the folder

A mask of zeros states that its image has no objects. An image without a mask is unlabelled, and left out.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossmae.data.annotations.records import (
    ROLES,
    AnnotatedImage,
    AnnotatedObject,
    FormatReading,
    ImageFinder,
    group_by_split,
    remark_unlabelled,
    sizes_of,
    split_name,
)
from crossmae.data.annotations.run_lengths import encode_values
from crossmae.data.images import IMAGE_LIMITS, open_image
from crossmae.data.parallel import map_in_order
from crossmae.errors import UserError, counted
from crossmae.files import read_file

MASKS_FORMAT = "masks"
MASK_SUFFIXES = frozenset((".png", ".tif", ".tiff", ".bmp", ".gif"))  # formats that keep values
ONE_CLASS = "object"
MOST_VALUES = 5000  # objects in a mask; more are found in soft masks and photographs
MASK_ENDINGS = ("_mask", "-mask", "_masks", "_label", "_labels", "_seg", "_gt")


def read_values(path: Path) -> NDArray[Any]:
    """Read the values of a mask, an integer array (H, W).

    Palette images give palette numbers, and colours give a number each, 0 for black. Transparency is ignored.

    Raises UserError if the file is no image of integers.
    """
    try:
        image = open_image(read_file(path))
        IMAGE_LIMITS.check(str(path), *image.size)
        image.load()
        pixels = np.asarray(image)
    except UserError:
        raise
    except Exception as error:  # Pillow raises many types of errors for damaged files
        raise UserError(f"{path}: cannot be read as a mask: {' '.join(str(error).split())}. Write it again.") from None
    if pixels.ndim == 3 and pixels.shape[-1] in (2, 4):
        pixels = pixels[..., :-1]
    if pixels.ndim == 3:
        pixels = pixels.astype(np.int64) @ 256 ** np.arange(pixels.shape[-1])
    if pixels.dtype.kind not in "bui":
        raise UserError(f"{path}: a mask of {pixels.dtype} values. Write integers, one value per object.")
    return pixels.astype(np.int64)


def read_masks(folder: Path, files: Sequence[str], finder: ImageFinder) -> FormatReading:
    """Read the mask files `files`, relative to a folder."""
    reading = FormatReading(MASKS_FORMAT)
    owned: dict[str, list[tuple[str, str]]] = defaultdict(list)
    lost = []
    for name in files:
        found = finder.find(name) or finder.find(_without_ending(name))
        if len(found) == 1:
            owned[found[0]].append((name, _class_of(name, found[0])))
        elif found:
            reading.faults.append(f"{folder / name}: the images {found[0]} and {found[1]} both fit")
        else:
            lost.append(name)
    if lost:
        line = f"{counted(len(lost), 'mask')} without an image of the same name, such as {lost[0]}"
        if len(lost) > len(files) / 2:
            raise UserError(f"{folder}: {line}, in {finder.folder}. Name the folder of the images with --images.")
        reading.remarks.append(f"{line}: left out")
    labelled = [name for name in finder.names if name in owned]
    sizes = dict(zip(labelled, sizes_of([finder.path(name) for name in labelled]), strict=True))
    pairs = [(image, name, label) for image in labelled for name, label in owned[image]]
    objects: dict[str, list[AnnotatedObject]] = defaultdict(list)
    for (image, _, label), found_objects in zip(
        pairs, map_in_order(lambda one: _read_objects(folder / one[1], sizes[one[0]]), pairs, bar="masks"), strict=True
    ):
        if isinstance(found_objects, str):
            reading.faults.append(found_objects)
        else:
            objects[image] += [one._replace(name=label) for one in found_objects]
    images = [(name, AnnotatedImage(finder.path(name), sizes[name], objects[name])) for name in labelled]
    bare = len(finder.names) - len(labelled)
    remark_unlabelled(reading, [image for _, image in images], bare, "a mask", "save a mask of zeros")
    group_by_split(reading, images)
    return reading


def _read_objects(path: Path, size: tuple[int, int]) -> list[AnnotatedObject] | str:
    """Read the objects of a mask, or return its fault.

    Args:
        size: (width, height) of its image, 0 if unknown.
    """
    try:
        values = read_values(path)
    except UserError as error:
        return str(error.args[0])
    if 0 not in size and values.shape[::-1] != size:
        own, other = (f"{width}x{height}" for width, height in (values.shape[::-1], size))
        return f"{path}: is {own} pixels, and its image {other}"
    runs = encode_values(values)
    if len(runs) > MOST_VALUES:
        return f"{path}: has {len(runs):,} values, so it is a photograph or a soft mask"
    return [AnnotatedObject(ONE_CLASS, one.box, one.mask) for _, one in sorted(runs.items())]


def _without_ending(name: str) -> str:
    stem, suffix = os.path.splitext(name)
    ending = next((one for one in MASK_ENDINGS if stem.lower().endswith(one)), "")
    return stem[: len(stem) - len(ending)] + suffix


def _class_of(mask: str, image: str) -> str:
    """Return the folder that names the class of a mask."""
    others = {part.lower() for part in image.split("/")[:-1]}
    own = [part for part in mask.split("/")[:-1] if part.lower() not in others | ROLES and not split_name(part)]
    return own[-1] if own else ONE_CLASS
