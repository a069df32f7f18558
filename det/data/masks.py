"""Augmentation of object masks: all formats of data sets, and the two formats of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import detectron2.data.transforms as T
import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes, PolygonMasks, polygons_to_bitmask
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from det.data.coco_masks import Floats, Ints, decompress
from det.library_warnings import library_warnings_ignored


def decode_segmentation(segmentation: Any, height: int, width: int) -> NDArray[np.bool_]:
    """Return a COCO `segmentation`, or an array, as a mask (height, width).

    Raises ValueError if its format is unknown or its size is wrong.
    """
    if isinstance(segmentation, np.ndarray):
        if segmentation.shape != (height, width):
            raise ValueError(f"segmentation: array of {list(segmentation.shape)} on an image of {[height, width]}")
        return segmentation != 0
    if isinstance(segmentation, list) and segmentation:
        rle = coco_mask.merge(coco_mask.frPyObjects(clip_polygons(segmentation, height, width), height, width))
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
        moved = (transforms.apply_polygons([clip(_points(polygon), *size) for polygon in mask]) for mask in masks)
        return PolygonMasks([[polygon.reshape(-1) for polygon in polygons] for polygons in moved])
    bits, kept = np.zeros((len(masks), *new_size), bool), kept_pixels(transforms, *size)
    for mask, out in zip(masks, bits, strict=True):
        if isinstance(mask, list):
            rasterize([transforms.apply_coords(clip(_points(polygon), *size)) for polygon in mask], out)
        elif (
            kept and isinstance(mask, dict) and list(mask.get("size", ())) == list(size) and (part := decode_part(mask))
        ):
            _place(part, kept, out)
        else:
            out[:] = transforms.apply_segmentation(decode_segmentation(mask, *size).astype(np.uint8))
    return BitMasks(torch.from_numpy(bits))


def _points(polygon: Any) -> NDArray[np.float64]:
    return np.array(polygon, np.float64).reshape(-1, 2)


def clip(points: Floats, height: int, width: int) -> Floats:
    """Clip a polygon (P, 2) to the surroundings of its image.

    Libraries follow an edge pixel by pixel, so a vertex at 1e8 would take all memory. A polygon within one side of the
    image from its edges stays as it is. Of a polygon without a part there, a point is left.
    """
    margin = max(height, width)
    low, high = np.array([-margin, -margin]), np.array([width + margin, height + margin])
    if (points >= low).all() and (points <= high).all():
        return points
    clipped = points
    for axis in (0, 1):
        for bound, sign in ((low[axis], 1), (high[axis], -1)):
            clipped = _cut(clipped, axis, bound, sign)
    return clipped if len(clipped) else np.repeat(points[:1].clip(low, high), 3, axis=0)


def _cut(points: Floats, axis: int, bound: float, sign: int) -> Floats:
    """Cut a polygon along a line (Sutherland and Hodgman, 1974)."""
    following = np.roll(points, -1, axis=0)
    beyond, beyond_next = (sign * (bound - some[:, axis]) for some in (points, following))
    crosses = (beyond > 0) != (beyond_next > 0)
    share = np.where(crosses, beyond, 0) / np.where(crosses, beyond - beyond_next, 1)
    crossing = points + share[:, None] * (following - points)
    crossing[:, axis] = bound
    return np.stack([points, crossing], axis=1)[np.stack([beyond <= 0, crosses], axis=1)]


def clip_polygons(segmentation: Any, height: int, width: int) -> Any:
    """Clip the polygons of a COCO segmentation, and no other masks."""
    least, most = -max(height, width), height + width
    if not isinstance(segmentation, list) or all(least <= min(one) and max(one) <= most for one in segmentation if one):
        return segmentation
    return [clip(_points(polygon), height, width).reshape(-1).tolist() for polygon in segmentation]


def kept_pixels(transforms: T.TransformList, height: int, width: int) -> tuple[Ints, Ints] | None:
    """Find the source of each row and column after an augmentation.

    Returns None if a transform moves pixels in another way.
    """
    rows, columns = np.arange(height), np.arange(width)
    for transform in transforms.transforms:
        if isinstance(transform, T.HFlipTransform):
            columns = columns[::-1]
        elif isinstance(transform, T.VFlipTransform):
            rows = rows[::-1]
        elif isinstance(transform, T.CropTransform):
            rows = rows[transform.y0 : transform.y0 + transform.h]
            columns = columns[transform.x0 : transform.x0 + transform.w]
        elif isinstance(transform, T.ResizeTransform):
            rows, columns = (
                rows[_nearest(transform.h, transform.new_h)],
                columns[_nearest(transform.w, transform.new_w)],
            )
        elif not isinstance(transform, T.NoOpTransform):
            return None
    return rows, columns


def _nearest(old: int, new: int) -> Ints:
    """Let Pillow choose the pixels that are left of a row."""
    row = Image.fromarray(np.arange(old, dtype=np.int32)[None])
    return np.asarray(row.resize((new, 1), Image.Resampling.NEAREST))[0].astype(np.int64)


def decode_part(rle: dict[str, Any]) -> tuple[int, int, NDArray[np.bool_]] | None:
    """Decode the rectangle around a mask, because photographs are large.

    Returns its left column, its top row and its pixels. Returns None for an empty mask and impossible counts.
    """
    (height, width), counts = rle["size"], rle["counts"]
    text = counts.decode() if isinstance(counts, bytes) else counts
    runs = decompress([text])[0] if isinstance(text, str) else np.array(text, np.int64)
    ends, inside = runs.cumsum(), 2 * np.flatnonzero(runs[1::2]) + 1
    if not len(inside) or runs.min() < 0 or ends[-1] != height * width:
        return None
    left, right = ends[inside[0] - 1] // height, (ends[inside[-1]] - 1) // height + 1
    lengths = np.diff(np.clip(ends - left * height, 0, (right - left) * height), prepend=0)
    columns = np.repeat(np.arange(len(runs)) % 2 == 1, lengths).reshape(-1, height)
    rows = np.flatnonzero(columns.any(axis=0))
    return int(left), int(rows[0]), columns[:, rows[0] : rows[-1] + 1].T


def _place(part: tuple[int, int, NDArray[np.bool_]], kept: tuple[Ints, Ints], out: NDArray[np.bool_]) -> None:
    """Copy the pixels of a part that an augmentation keeps."""
    left, top, pixels = part
    rows, columns = kept[0] - top, kept[1] - left
    y, x = (np.flatnonzero((at >= 0) & (at < side)) for at, side in zip((rows, columns), pixels.shape, strict=True))
    out[np.ix_(y, x)] = pixels[np.ix_(rows[y], columns[x])]


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
