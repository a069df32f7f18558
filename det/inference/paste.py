"""Masks of a detector as run-length encodings of the whole image, computed only where they cross the threshold.

A mask head predicts a small square of probabilities for each box. detectron2 samples it at the pixels around the box,
writes the samples into an image of zeros, and encodes that image. But the samples of a column are linear between the
rows of the square. This module computes where these lines cross the threshold, for all masks of an image together. It
samples only pixels that are too close to the threshold for this. The result is byte-identical.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import BoxMode, Instances
from pycocotools import mask as rle
from torch import Tensor
from torch.nn import functional as F

MASK_THRESHOLD = 0.5  # smallest probability of a pixel of an object
# Limit, times M + 1, for the float32 difference of two ways to sample M x M values in 0-1. The rounding errors of all
# operations add up to at most 0.6 of the limit.
SAMPLING_ERROR = 1e-6
PIXELS_AT_ONCE = 2**22  # pixels of boxes. This bounds the memory if all of them are close to the threshold.


def coco_results(
    instances: Instances, image_id: int, height: int, width: int, category_ids: Sequence[int | None]
) -> list[dict[str, Any]]:
    """Convert raw predictions of one image to COCO results.

    The results equal `COCOEvaluator`'s.

    The input is the raw output of `GeneralizedRCNN.inference(..., do_postprocess=False)`, in pixels of the model's
    input, and the height and width of the image file. Returns dicts with `image_id`, `category_id`, `bbox` (x, y,
    width, height), `score` and, with masks, `segmentation`. Objects with an empty box, and of classes with the category
    id None, are left out.
    """
    if None in category_ids:
        wanted = torch.tensor([number is not None for number in category_ids], device=instances.pred_classes.device)
        instances = instances[wanted[instances.pred_classes]]
    fields = dict(instances.get_fields())
    masks = fields.pop("pred_masks", None)
    fields["pred_boxes"] = fields["pred_boxes"].clone()  # scaled in place below
    if masks is not None:
        fields["probabilities"] = masks[:, 0]  # detectron2 does not paste a field of this name
    found = detector_postprocess(Instances(instances.image_size, **fields), height, width).to("cpu")
    boxes = BoxMode.convert(found.pred_boxes.tensor, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
    results: list[dict[str, Any]] = [
        {"image_id": image_id, "category_id": category_ids[index], "bbox": box, "score": score}
        for index, box, score in zip(found.pred_classes.tolist(), boxes.tolist(), found.scores.tolist(), strict=True)
    ]
    if masks is not None:
        encoded = encode_masks(found.probabilities, found.pred_boxes.tensor, height, width)
        for result, segmentation in zip(results, encoded, strict=True):
            result["segmentation"] = segmentation
    return results


def encode_masks(probabilities: Tensor, boxes: Tensor, height: int, width: int) -> list[dict[str, Any]]:
    """Paste and encode the masks of one image.

    Takes probabilities (N, M, M) and boxes (N, 4) x0, y0, x1, y1 in pixels of the image. Returns N dicts {"size":
    [height, width], "counts": compressed text}. The result equals detectron2's `paste_masks_in_image` on the CPU, with
    threshold 0.5, followed by pycocotools' `encode`. On a GPU, detectron2 rounds differently. A mask with NaN or
    infinity is empty.
    """
    if not len(boxes):
        return []
    masks, corners = (tensor.detach().float().cpu().numpy() for tensor in (probabilities, boxes))
    area = (corners[:, 2:] - corners[:, :2]).clip(0, [width, height]).prod(axis=1).cumsum()
    parts = np.split(np.arange(len(masks)), np.flatnonzero(np.diff(area // PIXELS_AT_ONCE)) + 1)
    runs = [
        {"size": [height, width], "counts": counts}
        for part in parts
        for counts in _run_lengths(masks[part], corners[part], height, width)
    ]
    encoded: list[dict[str, Any]] = rle.frPyObjects(runs, height, width)
    return [{"size": item["size"], "counts": item["counts"].decode("ascii")} for item in encoded]


def _run_lengths(masks: np.ndarray, boxes: np.ndarray, height: int, width: int) -> list[np.ndarray]:
    """Compute run lengths of the whole image for masks (N, M, M)."""
    total = height * width
    starts = np.arange(len(masks)) * (total + 1)  # all masks are one sequence of pixels, with a zero after each mask
    mask, column, grid_x = _columns(masks, boxes, width)
    line, first, last, inside = _crossings(_knots(masks, mask, grid_x), boxes[mask], height)
    # From each edge on, pixels are `inside` or not. Doubtful pixels are edges, too.
    top = (starts[mask] + column * height)[line]
    edges = top + last
    crossing, row = _ranges(first, last)
    if len(row):
        doubtful = line[crossing]
        values = _sample(masks, boxes, mask[doubtful], grid_x[doubtful], row)
        edges = np.insert(edges, crossing, top[crossing] + row)
        inside = np.insert(inside, crossing, values >= MASK_THRESHOLD)
    # The last edge at a pixel counts, if it changes anything. A run may continue in the next column.
    final = np.flatnonzero(np.diff(edges, append=-1))
    edges = edges[final][np.diff(inside[final], prepend=False)]
    edges = edges[edges % (total + 1) != total]
    bounds = np.sort(np.concatenate([edges, starts, starts + total]), kind="stable")
    return [np.diff(own).astype(np.uint32) for own in np.split(bounds, np.searchsorted(bounds, starts[1:]))]


def _columns(masks: np.ndarray, boxes: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """List the columns of the image that boxes reach.

    Returns:
        mask: (C,) index of the mask and its box, ascending.
        column: (C,) column of the image.
        grid_x: (C,) centre of the column, -1 to 1 in the box.
    """
    x0, y0, x1, y1 = boxes.T
    drawn = (x0 < x1) & (y0 < y1) & np.isfinite(masks).all(axis=(1, 2))
    # detectron2's window is one pixel larger than the box on each side. It contains all pixels that can reach 0.5.
    ends = (np.where(drawn, end.clip(0, width), 0).astype(np.int64) for end in (np.floor(x0) - 1, np.ceil(x1) + 1))
    mask, column = _ranges(*ends)
    return mask, column, _grid(column, x0[mask], x1[mask])


def _knots(masks: np.ndarray, mask: np.ndarray, grid_x: np.ndarray) -> np.ndarray:
    """Sample masks (N, M, M) along x only.

    Returns the values (C, M + 2) of each column at the centres of the M rows of its mask, between two zeros. From one
    value to the next, a column is linear.
    """
    size = masks.shape[-1]
    padded = np.zeros((len(masks), size + 2, size + 2), np.float32)
    padded[:, 1:-1, 1:-1] = masks.transpose(0, 2, 1)
    place = ((grid_x + 1) * np.float32(size / 2) - np.float32(0.5)).clip(-1, size)
    lower = np.floor(place)
    row = mask * (size + 2) + lower.astype(np.int64) + 1
    left, values = (padded.reshape(-1, size + 2).take(row + step, axis=0, mode="clip") for step in (0, 1))
    values -= left
    values *= (place - lower)[:, None]
    values += left
    return values


def _crossings(
    values: np.ndarray, boxes: np.ndarray, height: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Find where columns cross the threshold.

    Args:
        values: (C, M + 2) of `_knots`.
        boxes: (C, 4) box of each column.

    Returns:
        line: (K,) index of the column, ascending.
        first, last: (K,) rows of the image. Rows from `first` to before `last` are too close to the threshold.
        inside: (K,) bool, true if the rows from `last` on reach the threshold.
    """
    knots = values.shape[1]
    margin = SAMPLING_ERROR * (knots - 1)
    # 0 is outside, 2 is inside, and 1 is too close to the threshold.
    side = (values >= MASK_THRESHOLD - margin).view(np.int8) + (values >= MASK_THRESHOLD + margin).view(np.int8)
    line, knot = np.divmod(np.flatnonzero((side[:, 1:] != side[:, :-1]) | (side[:, 1:] == 1)), knots - 1)
    before, after = (values.take(line * knots + index).astype(np.float64) for index in (knot, knot + 1))
    slope = after - before
    slope[slope == 0] = np.finfo(np.float64).tiny
    middle, reach = (MASK_THRESHOLD - before) / slope, margin / np.abs(slope)
    low, high = boxes[:, 1].astype(np.float64), boxes[:, 3].astype(np.float64)
    step = ((high - low) / (knots - 2))[line]  # rows from one knot to the next
    top = low[line] - 0.5 + (knot - 0.5) * step
    first, last = (np.ceil(top + step * place.clip(0, 1)).clip(0, height) for place in (middle - reach, middle + reach))
    return line, first.astype(np.int64), last.astype(np.int64), after >= MASK_THRESHOLD


def _ranges(first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """List the numbers of all ranges with the indices of their ranges.

    Range i has the whole numbers from first[i] to before last[i]. Returns indices and numbers.
    """
    counts = np.maximum(last - first, 0)
    index = np.repeat(np.arange(len(first)), counts)
    return index, np.arange(len(index)) + (first - np.cumsum(counts) + counts)[index]


def _grid(pixel: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Map pixel centres from `low`..`high` to -1..1.

    The order of operations is detectron2's, so that rounding is equal.
    """
    with np.errstate(over="ignore"):  # nearly empty boxes give pixels far outside
        return (pixel.astype(np.float32) + np.float32(0.5) - low) / (high - low) * 2 - 1


def _sample(masks: np.ndarray, boxes: np.ndarray, mask: np.ndarray, grid_x: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Sample masks at K pixels exactly as detectron2 does. `mask` (K,) ascends."""
    grid = torch.from_numpy(np.stack([grid_x, _grid(row, boxes[mask, 1], boxes[mask, 3])], axis=1))
    used, first = np.unique(mask, return_index=True)
    images = torch.from_numpy(masks[used, None]).split(1)
    points = grid[None, None].tensor_split(first[1:].tolist(), dim=2)
    values = [F.grid_sample(*pair, align_corners=False).view(-1) for pair in zip(images, points, strict=True)]
    return np.asarray(torch.cat(values))
