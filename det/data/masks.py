"""Augmentation of object masks: all formats of data sets, and the two formats of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import detectron2.data.transforms as T
import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes, PolygonMasks, polygons_to_bitmask
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from det.library_warnings import library_warnings_ignored


def decode_segmentation(segmentation: Any, height: int, width: int) -> NDArray[np.bool_]:
    """Decode a COCO `segmentation`, or an array, to (height, width).

    Raises ValueError if its format is unknown or its size is wrong.
    """
    if isinstance(segmentation, np.ndarray):
        if segmentation.shape != (height, width):
            raise ValueError(f"segmentation: array of {list(segmentation.shape)} on an image of {[height, width]}")
        return segmentation != 0
    if isinstance(segmentation, list) and segmentation:
        rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation, dict) and {"counts", "size"} <= segmentation.keys():
        if list(segmentation["size"]) != [height, width]:
            raise ValueError(f"segmentation: RLE of size {segmentation['size']} on an image of {[height, width]}")
        uncompressed = isinstance(segmentation["counts"], list)
        rle = coco_mask.frPyObjects(segmentation, height, width) if uncompressed else segmentation
    else:
        raise ValueError(f"segmentation: expected polygons or an RLE, received {type(segmentation).__name__}")
    with library_warnings_ignored():
        return coco_mask.decode(rle).astype(bool)


def moved_masks(
    masks: Sequence[Any], size: tuple[int, int], transforms: T.TransformList, new_size: tuple[int, int], form: str
) -> BitMasks | PolygonMasks:
    """Apply the augmentation of an image to its masks.

    Args:
        masks: each mask is COCO polygons, an RLE, or an array (H, W) that is nonzero on the object.
        size: (H, W) of the image before the augmentation. `new_size` is the size after it.
        form: "bitmask"; or "polygon" if all masks are polygons. Polygons that cross or touch themselves need bitmasks:
            detectron2 crops polygons with shapely, which drops parts of them or fills holes.

    Raises:
        ValueError: an object has no mask, a mask has a wrong size, or `form` cannot represent a mask.
    """
    for number, mask in enumerate(masks):
        if mask is None or (isinstance(mask, list) and not mask):
            raise ValueError(f"object {number} has no mask. Add a mask, or set MODEL.MASK_ON False.")
        if form == "polygon" and not isinstance(mask, list):
            raise ValueError(f"the mask of object {number} is no polygon. Set INPUT.MASK_FORMAT bitmask.")
    if form == "polygon":
        moved = (transforms.apply_polygons([_points(polygon) for polygon in mask]) for mask in masks)
        return PolygonMasks([[polygon.reshape(-1) for polygon in polygons] for polygons in moved])
    bits = np.zeros((len(masks), *new_size), bool)
    for mask, out in zip(masks, bits, strict=True):
        if isinstance(mask, list):
            rasterize([transforms.apply_coords(_points(polygon)) for polygon in mask], out)
        else:
            out[:] = transforms.apply_segmentation(decode_segmentation(mask, *size).astype(np.uint8))
    return BitMasks(torch.from_numpy(bits))


def _points(polygon: Any) -> NDArray[np.float64]:
    return np.array(polygon, np.float64).reshape(-1, 2)


def rasterize(polygons: Sequence[NDArray[np.float64]], mask: NDArray[np.bool_]) -> None:
    """Set the pixels of polygons (P, 2) exactly like pycocotools."""
    corners = np.concatenate(polygons)
    left, top = np.floor(corners.min(axis=0)).astype(int)
    right, bottom = np.ceil(corners.max(axis=0)).astype(int)
    x, y, x_end, y_end = max(left, 0), max(top, 0), min(right, mask.shape[1]), min(bottom, mask.shape[0])
    if x >= x_end or y >= y_end:
        return
    # pycocotools rounds corners to fifths of a pixel. Corners are shifted below, so they must be rounded first.
    shifted = [(np.floor(5 * polygon + 0.5) / 5 - (left, top)).reshape(-1) for polygon in polygons]
    box = polygons_to_bitmask(shifted, int(bottom - top), int(right - left))
    mask[y:y_end, x:x_end] = box[y - top : y_end - top, x - left : x_end - left]


def any_along(masks: torch.Tensor, dim: int) -> NDArray[np.bool_]:
    """Reduce by `any` with numpy, which is ten times faster than torch."""
    return np.asarray(masks.numpy().any(axis=dim))


def tight_boxes(masks: BitMasks | PolygonMasks) -> Boxes:
    """Find the smallest box x0, y0, x1, y1 around each mask."""
    if isinstance(masks, PolygonMasks):
        return masks.get_bounding_boxes()
    boxes = torch.zeros(len(masks), 4)
    for box, columns, rows in zip(boxes, any_along(masks.tensor, 1), any_along(masks.tensor, 2), strict=True):
        (x,), (y,) = columns.nonzero(), rows.nonzero()
        if len(x):
            box[:] = torch.tensor([x[0], y[0], x[-1] + 1, y[-1] + 1])
    return Boxes(boxes)
