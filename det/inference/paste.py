"""Masks of a detector as run-length encodings of the whole image, computed only inside their boxes.

A mask head predicts a small square of probabilities for each box. detectron2 samples it at the pixels around the box,
writes the samples into an image of zeros, and encodes that image. This module only counts the zeros outside the box.
The result is byte-identical.
"""

from __future__ import annotations

import math
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
SAMPLING_ERROR = 4e-6  # times M: limit for the float32 difference of two ways to sample M x M values in 0-1


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
    threshold 0.5, followed by pycocotools' `encode`. On a GPU, detectron2 rounds differently.
    """
    masks, corners = (tensor.detach().float().cpu().numpy() for tensor in (probabilities, boxes))
    with np.errstate(over="ignore"):  # nearly empty boxes give pixels far outside
        windows = [_window(mask, box, height, width) for mask, box in zip(masks, corners, strict=True)]
    runs = [{"size": [height, width], "counts": _run_lengths(*window, height, width)} for window in windows]
    encoded: list[dict[str, Any]] = rle.frPyObjects(runs, height, width) if runs else []
    return [{"size": item["size"], "counts": item["counts"].decode("ascii")} for item in encoded]


def _window(mask: np.ndarray, box: np.ndarray, height: int, width: int) -> tuple[np.ndarray, int, int]:
    """Paste one mask (M, M) into a window around its box.

    Returns:
        inside: (w, h + 1) bool, column by column. Each column ends with an extra pixel that is False. w is 0 outside
            the image.
        left, top: position of the window's first pixel in the image.
    """
    x0, y0, x1, y1 = box
    # detectron2's window is one pixel larger than the box on each side. It contains all pixels that can reach 0.5.
    left, top = (max(math.floor(low) - 1, 0) for low in (x0, y0))
    right, bottom = (min(math.ceil(high) + 1, side) for high, side in ((x1, width), (y1, height)))
    if left >= right or top >= bottom or x0 >= x1 or y0 >= y1:
        return np.zeros((0, 1), bool), 0, 0
    grid_x, grid_y = _grid(left, right, x0, x1), _grid(top, bottom, y0, y1)
    size = len(mask)
    # Bilinear sampling along both axes is two matrix products. It is faster than `grid_sample`, and equal except for
    # rounding. Pixels near the threshold are therefore sampled again.
    values = _weights(grid_x, size)[:-1] @ mask.T @ _weights(grid_y, size).T
    margin = np.float32(SAMPLING_ERROR * size)
    inside = values >= MASK_THRESHOLD + margin
    doubtful = np.flatnonzero(inside != (values >= MASK_THRESHOLD - margin))
    column, row = np.divmod(doubtful, len(grid_y) + 1)
    inside.reshape(-1)[doubtful] = _sample(mask, grid_x[column], grid_y[row]) >= MASK_THRESHOLD
    return inside, left, top


def _grid(first: int, last: int, low: np.float32, high: np.float32) -> np.ndarray:
    """Map pixel centres from `low`..`high` to -1..1.

    The order of operations is detectron2's, so that rounding is equal.
    """
    return (np.arange(first, last, dtype=np.float32) + np.float32(0.5) - low) / (high - low) * 2 - 1


def _weights(grid: np.ndarray, size: int) -> np.ndarray:
    """Compute bilinear weights (points + 1, size). The last row is zero."""
    places = (grid + 1) * np.float32(size / 2) - np.float32(0.5)
    weights = np.zeros((len(grid) + 1, size), np.float32)
    distance = np.abs(places[:, None] - np.arange(size, dtype=np.float32))
    np.maximum(1 - distance, 0, out=weights[:-1])
    return weights


def _sample(mask: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Sample the mask at K points exactly as detectron2 does."""
    image, grid = mask.reshape(1, 1, *mask.shape), np.stack([x, y], axis=1).reshape(1, 1, -1, 2)
    values = F.grid_sample(torch.from_numpy(image), torch.from_numpy(grid), align_corners=False)
    return np.asarray(values).reshape(-1)


def _run_lengths(inside: np.ndarray, left: int, top: int, height: int, width: int) -> np.ndarray:
    """Compute the whole image's run lengths from a window of `_window`."""
    flat = inside.ravel()
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    if flat.size and flat[0]:
        edges = np.concatenate([[0], edges])
    column, row = np.divmod(edges, inside.shape[1])
    ends = (left + column) * height + top + row
    if inside.shape[1] > height:  # a run may continue in the next column
        meet = np.flatnonzero(ends[1:] == ends[:-1])
        ends = np.delete(ends, [meet, meet + 1])
    total = height * width
    return np.diff(ends[ends < total], prepend=0, append=total).astype(np.uint32)
