"""Extents, areas and faults of the masks of a COCO file, measured without decoding.

All masks are measured as a few long arrays, without an array of pixels. This handles 860,000 annotations, and masks
that claim a size of a terabyte. Shapes: N masks, P polygons, V vertices, R run lengths, C characters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, compress
from reprlib import repr as short
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossmae.errors import counted

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

NUMBERS = frozenset((int, float))
MIN_AREA = 1e-4  # square pixels; the points of a smaller polygon are on a line, except for rounding
# Coordinates, counts or characters that are measured together. Their arrays fit into the processor's cache.
NUMBERS_AT_ONCE = 1 << 18
LARGEST_SIDE = 1 << 20  # pixels of an image's side
LARGEST_RUN = LARGEST_SIDE**2
# Compressed run lengths in the format of the COCO API: characters from 48, six bits each. Bit 32 means that the number
# continues. Bit 16 of its last character means that the number is negative.
WKT_HOLE = re.compile(r"POLYGON.*[^)\s]\s*\)\s*,\s*\(\s*[^(\s]", re.IGNORECASE | re.DOTALL)
COMPRESSED = re.compile(r"(?:[P-o]{0,7}[0-O])+")


@dataclass
class Masks:
    """Measurements of N masks, and faults by kind and mask.

    The extent (N, 4) is x1, y1, x2, y2 in pixels. The area (N,) is in square pixels, and counts overlaps of polygons
    twice. Both are NaN if a mask has a fault or is absent.
    """

    extent: Floats
    area: Floats
    faults: dict[str, dict[int, str]] = field(default_factory=dict)

    def blame(self, kind: str, row: int, text: str = "") -> None:
        self.faults.setdefault(kind, {}).setdefault(row, text)


def no_masks(count: int) -> Masks:
    """Return unknown measurements of `count` masks."""
    return Masks(np.full((count, 4), np.nan), np.full(count, np.nan))


def measure_masks(masks: Sequence[Any], sizes: Floats, checked: bool = False) -> Masks:
    """Measure N masks on images of sizes (N, 2): width, height.

    If `checked`, no mask is missing or has a `mask_fault`.
    """
    result = no_masks(len(masks))
    is_runs = np.fromiter((isinstance(mask, dict) for mask in masks), bool, len(masks))
    sound = np.ones(len(masks), bool) if checked else _find_sound(result, masks)
    polygons = sound & ~is_runs
    _measure_polygons(result, np.flatnonzero(polygons), list(compress(masks, polygons)))
    runs = _with_sound_size(result, np.flatnonzero(sound & is_runs).tolist(), masks, sizes)
    lengths = np.fromiter((len(masks[row]["counts"]) for row in runs), np.int64, len(runs))
    for start, end in _chunks(lengths):
        _measure_runs(result, runs[start:end], masks)
    return result


def _find_sound(result: Masks, masks: Sequence[Any]) -> NDArray[np.bool_]:
    """Select masks (N,). Record absent masks and wrong types."""
    sound = np.ones(len(masks), bool)
    for row, mask in enumerate(masks):
        if not mask:
            result.blame("missing-mask", row)
        elif fault := mask_fault(mask):
            result.blame("bad-mask", row, fault)
        else:
            continue
        sound[row] = False
    return sound


def _chunks(lengths: Ints) -> list[tuple[int, int]]:
    """Group masks into chunks of about `NUMBERS_AT_ONCE` numbers.

    A mask with more numbers is one chunk. Returns the first mask of each chunk, and the mask after its last.
    """
    group = lengths.cumsum() // NUMBERS_AT_ONCE
    ends = [*(np.flatnonzero(np.diff(group)) + 1).tolist(), len(lengths)]
    return list(zip([0, *ends], ends, strict=False))


def mask_fault(mask: Any) -> str:
    """Describe a fault in a mask's types, or return ""."""
    if isinstance(mask, dict):
        size, counts = mask.get("size"), mask.get("counts")
        if not {"counts", "size"} <= set(mask):
            return "segmentation: run-length encoding needs counts and size"
        if not isinstance(size, list) or len(size) != 2 or any(type(side) is not int for side in size):
            return f"segmentation: size must be [height, width], got {short(size)}"
        if not isinstance(counts, str) and not (isinstance(counts, list) and {int}.issuperset(map(type, counts))):
            return f"segmentation: counts must be text or whole numbers, got {short(counts)}"
        return ""
    if not isinstance(mask, list) or not all(isinstance(polygon, list) for polygon in mask):
        wanted = "a list of polygons, [[x, y, x, y, x, y, ...], ...], or run-length encoding"
        if any(
            isinstance(text, str) and WKT_HOLE.search(text) for text in (mask if isinstance(mask, list) else [mask])
        ):
            wanted += ", which alone can have a hole"
        return f"segmentation must be {wanted}, got {short(mask)}"
    for number, polygon in enumerate(mask):
        if not NUMBERS.issuperset(map(type, polygon)):
            return f"segmentation[{number}] must be numbers, got {short(polygon)}"
    return ""


def polygon_fault(polygon: list[float]) -> str:
    """Describe a fault in a polygon as `measure_masks` does.

    Returns "" if there is no fault.
    """
    if len(polygon) < 6 or len(polygon) % 2:
        return f"must be x and y of at least 3 points, got {counted(len(polygon), 'number')}"
    return "has no area" if _polygon_sizes([polygon])[2][0] < MIN_AREA else ""


def _polygon_sizes(polygons: Sequence[list[float]]) -> tuple[Floats, Floats, Floats]:
    """Measure P polygons with at least three points each.

    Returns the extent (P, 4), which is not finite if a coordinate is not finite; the area (P,) by the shoelace formula;
    and (P,) the sum of areas of the triangles with the first vertex. This sum is zero only if all points are on a line.
    """
    lengths = np.fromiter(map(len, polygons), np.int64, len(polygons)) // 2
    flat = flatten(polygons)
    x, y = flat[::2], flat[1::2]  # (V,) each
    start = np.concatenate([[0], lengths.cumsum()[:-1]])
    with np.errstate(invalid="ignore", over="ignore"):
        reduced = [reduce.reduceat(values, start) for reduce in (np.minimum, np.maximum) for values in (x, y)]
        dx, dy = x - np.repeat(x[start], lengths), y - np.repeat(y[start], lengths)
        cross = np.zeros_like(dx)  # 0 between two polygons, because first vertices are at the origin
        cross[:-1] = dx[:-1] * dy[1:] - dx[1:] * dy[:-1]
        area, covered = (np.add.reduceat(values, start) / 2 for values in (cross, np.abs(cross)))
    return np.stack(reduced, axis=1), np.abs(area), covered


def _measure_polygons(result: Masks, rows: Ints, masks: list[list[list[float]]]) -> None:
    """Measure (M,) rows with their masks, as lists of polygons."""
    if not masks:
        return
    counts = np.fromiter(map(len, masks), np.int64, len(masks))
    lengths = np.fromiter(map(len, chain.from_iterable(masks)), np.int64, counts.sum())  # (P,)
    ends = np.concatenate([[0], counts.cumsum()])
    for start, end in _chunks(np.add.reduceat(lengths, ends[:-1])):
        polygons = list(chain.from_iterable(masks[start:end]))
        owners, numbers = np.repeat(rows[start:end], counts[start:end]), _index_within(counts[start:end])
        _measure_some_polygons(result, polygons, lengths[ends[start] : ends[end]], owners, numbers)


def _measure_some_polygons(
    result: Masks, polygons: list[list[float]], lengths: Ints, owners: Ints, numbers: Ints
) -> None:
    """Measure P polygons with their lengths, rows, and numbers in their masks."""
    short = (lengths < 6) | (lengths % 2 == 1)
    for index in np.flatnonzero(short):
        text = f"segmentation[{numbers[index]}] {polygon_fault(polygons[index])}"
        result.blame("degenerate-polygon", int(owners[index]), text)
    if short.any():
        polygons = list(compress(polygons, ~short))
        owners, numbers = owners[~short], numbers[~short]
    if not polygons:
        return
    extent, area, covered = _polygon_sizes(polygons)
    finite = np.isfinite(extent).all(axis=1)
    for index in np.flatnonzero(~finite):
        result.blame("not-finite", int(owners[index]), f"segmentation[{numbers[index]}]")
    for index in np.flatnonzero(finite & (covered < MIN_AREA)):
        result.blame("degenerate-polygon", int(owners[index]), f"segmentation[{numbers[index]}] has no area")
    measurable, first = np.unique(owners, return_index=True)
    result.area[measurable] = np.add.reduceat(area, first)
    result.extent[measurable, :2] = np.minimum.reduceat(extent[:, :2], first)
    result.extent[measurable, 2:] = np.maximum.reduceat(extent[:, 2:], first)


def _with_sound_size(result: Masks, rows: list[int], masks: Sequence[Any], sizes: Floats) -> list[int]:
    """Select rows whose run lengths have the same size as the image."""
    sound = []
    for row in rows:
        height, width = masks[row]["size"]
        wanted = sizes[row, ::-1].tolist()
        known = wanted[0] != np.inf
        if (known and wanted != [height, width]) or min(height, width) < 1 or max(height, width) > LARGEST_SIDE:
            image = "{:.0f}x{:.0f}".format(*wanted) if known else "unknown"
            result.blame("rle-size", row, f"size {height}x{width}, the image {image} (height x width)")
        else:
            sound.append(row)
    return sound


def _measure_runs(result: Masks, rows: list[int], masks: Sequence[Any]) -> None:
    texts = [row for row in rows if isinstance(masks[row]["counts"], str)]
    for row in texts:
        if not COMPRESSED.fullmatch(masks[row]["counts"]):
            result.blame("rle-counts", row, f"counts {short(masks[row]['counts'])} are no compressed run lengths")
    texts = [row for row in texts if row not in result.faults.get("rle-counts", {})]
    lists = [row for row in rows if not isinstance(masks[row]["counts"], str)]
    plain = np.clip(flatten([masks[row]["counts"] for row in lists]), -1, LARGEST_RUN + 1).astype(np.int64)
    for some, (runs, lengths) in (
        (texts, decompress([masks[row]["counts"] for row in texts])),
        (lists, (plain, np.array([len(masks[row]["counts"]) for row in lists], np.int64))),
    ):
        _measure_decoded(result, np.array(some, np.int64), runs, lengths, masks)


def decompress(texts: Sequence[str]) -> tuple[Ints, Ints]:
    """Decompress run lengths of texts that match `COMPRESSED`, like pycocotools' `rleFrString`.

    Returns (R,) run lengths of all masks in order, and (M,) the number of run lengths of each mask.
    """
    if not texts:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    data = np.frombuffer("".join(texts).encode("ascii"), np.uint8).astype(np.int64) - 48  # (C,)
    is_last = data < 32
    last = np.flatnonzero(is_last)  # (R,)
    first = np.concatenate([[0], last[:-1] + 1])
    place = np.arange(len(data)) - np.repeat(first, last - first + 1)
    values = np.add.reduceat((data & 31) << (5 * place), first)
    values -= np.where(data[last] & 16, np.int64(1) << (5 * (place[last] + 1)), 0)
    text_start = np.concatenate([[0], np.cumsum([len(text) for text in texts])[:-1]])
    lengths = np.add.reduceat(is_last.astype(np.int64), text_start)
    return _undo_differences(values, lengths), lengths


def _undo_differences(values: Ints, lengths: Ints) -> Ints:
    """Undo differences: add the second previous number, from the fourth number on."""
    mask = np.repeat(np.arange(len(lengths)), lengths)
    index = _index_within(lengths)
    # Each mask has three series: only the first number; numbers 2, 4, ...; numbers 3, 5, ...
    series = 3 * mask + np.where(index == 0, 0, 1 + (index + 1) % 2)
    order = np.argsort(series, kind="stable")
    sums = np.cumsum(values[order])
    start = np.flatnonzero(np.diff(series[order], prepend=-1))
    before = np.concatenate([[0], sums[start[1:] - 1]])
    result = np.empty_like(values)
    result[order] = sums - np.repeat(before, np.diff(start, append=len(values)))
    return result


def _index_within(lengths: Ints) -> Ints:
    """Enumerate the members of each group from 0."""
    return np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)


def _measure_decoded(result: Masks, rows: Ints, runs: Ints, lengths: Ints, masks: Sequence[Any]) -> None:
    """Measure run lengths that fill the image. Record a fault for others."""
    height, width = np.array([masks[row]["size"] for row in rows], np.int64).reshape(-1, 2).T
    owner = np.repeat(np.arange(len(rows)), lengths)
    total = np.zeros(len(rows), np.int64)
    np.add.at(total, owner, runs)
    total[owner[(runs < 0) | (runs > LARGEST_RUN)]] = -1
    for index in np.flatnonzero(total != height * width):
        what = f"sum up to {total[index]}" if total[index] >= 0 else "have a negative or huge number"
        text = f"counts {what}, the size has {height[index] * width[index]} pixels"
        result.blame("rle-counts", int(rows[index]), text)
    covers = (_index_within(lengths) % 2 == 1) & (total == height * width)[owner] & (runs > 0)
    area = np.bincount(owner[covers], runs[covers], len(rows))
    for index in np.flatnonzero((area == 0) & (total == height * width)):
        result.blame("empty-mask", int(rows[index]))
    some = area > 0
    result.area[rows[some]] = area[some]
    starts = np.cumsum(runs) - runs - np.repeat(np.cumsum(total) - total, lengths)
    _set_extents(result, rows, owner[covers], starts[covers], runs[covers], height)


def _set_extents(result: Masks, rows: Ints, owner: Ints, start: Ints, run: Ints, height: Ints) -> None:
    """Set extents from the starts and lengths of column-wise runs."""
    if not len(owner):
        return
    end, tall = start + run - 1, height[owner]
    whole_column = start // tall != end // tall  # the run continues at the top of the next column
    low, high = np.where(whole_column, 0, start % tall), np.where(whole_column, tall - 1, end % tall)
    which, first = np.unique(owner, return_index=True)
    for side, (reduce, values) in enumerate(
        ((np.minimum, start // tall), (np.minimum, low), (np.maximum, end // tall + 1), (np.maximum, high + 1))
    ):
        result.extent[rows[which], side] = reduce.reduceat(values, first)


def flatten(lists: Sequence[list[float]]) -> Floats:
    """Join lists of numbers. Integers too large for floats become infinity."""
    try:
        return np.fromiter(chain.from_iterable(lists), np.float64, sum(map(len, lists)))
    except OverflowError:
        values = chain.from_iterable(lists)
        return np.array(
            [value if type(value) is float or abs(value) < 1e308 else np.inf for value in values], np.float64
        )
