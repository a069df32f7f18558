"""Inverted masks, masks of whole images, and rectangles of two points.

Shapes: N annotations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from det.data.coco_fit import Placed, corners_of
from det.data.coco_masks import NUMBERS, Floats, Ints, decompress, flatten, measure_masks

_EDGE = 1.0  # pixels
_AGREE, _AGREE_SHARE, _AGREEING = 2.0, 0.01, 0.8  # pixels, plus a share of the image's side; share of the masks
_SMALL = 0.25  # an object whose box has a smaller share of the image does not cover it
_MANY, _MOST, _SOME = 4, 0.5, 0.05  # masks that have one reason; shares of all


@np.errstate(all="ignore")
def find_odd_masks(placed: Placed, masks: Sequence[Any]) -> dict[int, str]:
    """Find inverted masks, masks of whole images, and rectangles of two points.

    A few of them are no pattern, and are left to other checks.
    """
    corners = corners_of(placed.box)
    known = placed.usable & np.isfinite(placed.extent).all(axis=1)
    full = np.concatenate([np.zeros_like(placed.size), placed.size], axis=1)
    small = placed.box[:, 2:].prod(axis=1) < _SMALL * placed.size.prod(axis=1)
    whole = np.flatnonzero(known & small & (np.abs(placed.extent - full) <= _EDGE).all(axis=1))
    notes: dict[int, str] = {}
    if len(whole) >= max(_MANY, _MOST * known.sum()):
        size = placed.size[whole]
        inverted = measure_masks(_invert(masks, whole), size).extent
        near = np.abs(inverted - corners[whole]) <= np.tile(_AGREE + _AGREE_SHARE * size, 2)
        words = "covers the whole image"
        if near.all(axis=1).mean() >= _AGREEING:
            words = "fits its box when its mask is inverted"
        notes = {int(row): f"its mask {words} ({_describe(placed.box[row], placed.size[row])})" for row in whole}
    unmeasured = np.flatnonzero(placed.usable & ~known)  # as polygons of two points, which have no area
    points = _two_corners([masks[row] for row in unmeasured.tolist()])
    two = np.zeros_like(known)
    two[unmeasured] = (np.abs(points - corners[unmeasured]) <= _EDGE).all(axis=1)
    if two.sum() >= max(_MANY, _SOME * placed.usable.sum()):
        words = "its polygon has only two corners of its box: if it is a rectangle, write all four"
        notes |= {int(row): f"{words} ({_describe(placed.box[row], placed.size[row])})" for row in np.flatnonzero(two)}
    return notes


def _describe(box: Floats, size: Floats) -> str:
    return "bbox [{:g}, {:g}, {:g}, {:g}] in an image of {:.0f}x{:.0f}".format(*box, *size)


def _invert(masks: Sequence[Any], rows: Ints) -> list[Any]:
    """Invert run lengths that have no fault. Polygons stay as they are."""
    found = []
    for mask in (masks[row] for row in rows):
        if isinstance(mask, dict):
            counts = mask["counts"]
            runs = decompress([counts])[0].tolist() if isinstance(counts, str) else counts
            mask = {**mask, "counts": [0, *runs]}
        found.append(mask)
    return found


def _two_corners(masks: Sequence[Any]) -> Floats:
    """Return corners (N, 4) of polygons of two points.

    Others are NaN.
    """
    found = np.full((len(masks), 4), np.nan)
    for row, mask in enumerate(masks):
        if not (isinstance(mask, list) and len(mask) == 1 and isinstance(mask[0], list) and len(mask[0]) == 4):
            continue
        if NUMBERS.issuperset(map(type, mask[0])):
            x, y = sorted(mask[0][::2]), sorted(mask[0][1::2])
            found[row] = flatten([[x[0], y[0], x[1], y[1]]])
    return found
