"""Masks, boxes and images of a COCO file compared, and a reading that explains why most of them do not fit.

A mask that has another place than its box is a fault. If most masks of a file have it, they were written in another
way: with x and y swapped, as shares of the image, for another size of the image. Each such way is a reading: numbers go
in, corners in pixels come out. The reading that makes masks and boxes agree is the explanation. Without masks, boxes
are compared with their images. Loose boxes, boxes of the visible part, and objects that the edge cuts off are sound.
Shapes: N annotations; sizes (N, 2) are width and height; corners (N, 4) are x1, y1, x2, y2.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from det.data.coco_masks import LARGEST_SIDE, Floats, Ints, measure_masks

Rows = NDArray[np.bool_]
Notes = dict[int, str]

_AGREE, _AGREE_SHARE = 2.0, 0.01  # tolerance of a coordinate: pixels, plus a share of the image's side
_APART, _APART_ALONE = 1.5, 4.0  # tolerances from which on mask and box contradict each other; a single pair
_VISIBLE = 0.02  # a box within its mask, or a mask within its box, is sound above this share of the area
_SAME, _ALIKE = 0.6, 0.25  # shares of their union: boxes drawn by hand and masks; a mask of a few pixels and its box
_OVERLAP = 0.1  # a mask and a box that share less of the smaller of them belong to two objects
_AGREE_SMALL = (1.0, 0.2)  # at most: pixels, plus a share of the object's side
_CLOSER = 4.0  # a reading explains a difference that becomes that many times smaller
_MOST, _EXPLAINED = 0.5, 0.8  # shares: of all annotations, and of the contradicting ones
_MERGED = 4, 0.2  # annotations, and their share, that have another reading than the rest
_SAMPLE = 10_000  # annotations on which the readings are tried
_FAR, _OFF = 1.0, 0.25  # sides of the image by which masks leave it, if their box leaves it too or stays away
# Boxes without masks: as many leave their image, by that share of its side; as many fit once they are read otherwise.
_LEAVING, _LEAVING_BY, _FITTING = 0.2, 0.05, 0.98
# Boxes over the right or lower edge: least number and share; of as many, that share may go over the left or upper one.
_ONE_SIDED = 6, 0.02, 0.05
_LARGER, _TILES = 4.0, 10  # at most, a larger version of the image; images whose boxes would fit if they were moved
_FEW = 2  # boxes that leave their image in any data set
_REMAINS = 0.3  # share of a box in its image, at least, if the edge cuts it off
_EDGE = 1.0  # pixels
_CORNER, _CORNER_BOXES, _CORNER_IMAGES = 0.6, 20, 10  # all boxes in a part of the image; different boxes and images

_UNEXPLAINED = "nothing: no order of the numbers, unit or size of the image brings the boxes into their images"
_UNITS = {
    "": 0.0,
    "as shares of the image: multiply by its size": 1.0,
    "as percents of the image: multiply by its size / 100": 100.0,
    "as thousandths of the image: multiply by its size / 1000": 1000.0,
}
_FORMS = {
    "": (0, 0, 1, 1),  # the weights of width and height in x1, y1, x2, y2
    "read as [center x, center y, width, height]": (-0.5, -0.5, 0.5, 0.5),
    "read as corners [x1, y1, x2, y2]": None,
}


@dataclass(frozen=True)
class Placed:
    """N annotations: boxes (N, 4) of x, y, width, height, extents of masks (N, 4), sizes and numbers of their images.

    `usable` is False for crowd regions, unknown images and boxes without area. Extents are NaN without a sound mask.
    """

    box: Floats
    extent: Floats
    size: Floats
    image: Ints
    usable: Rows

    @cached_property
    def agreement(self) -> tuple[Floats, Rows]:
        """Errors and contradictions (N,) of masks and boxes, see `_agree`."""
        return _agree(self.extent, corners_of(self.box), self.size)


class _Pairs(NamedTuple):
    """Masks with their boxes. Masks that can be read in several ways have corners by reading, first the usual one."""

    masks: dict[str, Floats]
    box: Floats
    size: Floats
    image: Ints

    def take(self, rows: Any) -> _Pairs:
        masks = {words: corners[rows] for words, corners in self.masks.items()}
        return _Pairs(masks, self.box[rows], self.size[rows], self.image[rows])


_Side = Literal["mask", "box"]
_Read = Callable[[_Pairs], tuple[Floats, list[str]]]  # corners of a side, and words for all rows or for each


@np.errstate(all="ignore")
def find_misfits(placed: Placed, masks: Sequence[Any], wrong_size: Collection[int] = ()) -> dict[str, Notes]:
    """Find annotations that do not fit, by kind and row.

    `wrong_size` are rows of run lengths whose size is not the image's; their extents are unknown.
    """
    if shares := _in_first_pixel(placed):
        return {"misfit-boxes": shares}
    found: dict[str, Notes] = {"misfit-masks": {}, "misfit-boxes": {}}
    for rows, pairs in _groups(placed, masks, wrong_size):
        for side, notes in _explain(pairs, placed.agreement[0][rows], placed.agreement[1][rows]).items():
            found[f"misfit-{side}"].update((int(rows[at]), note) for at, note in notes.items())
    if not found["misfit-boxes"]:
        found["misfit-boxes"] = _explain_boxes(placed)
    if not found["misfit-boxes"]:
        found |= _strays(placed, found["misfit-masks"])
        found["boxes-in-corner"] = _in_corner(placed)
    return {kind: notes for kind, notes in found.items() if notes}


def corners_of(box: Floats) -> Floats:
    """Convert boxes x, y, width, height to corners."""
    return np.concatenate([box[:, :2], box[:, :2] + box[:, 2:]], axis=1)


def _groups(placed: Placed, masks: Sequence[Any], wrong_size: Collection[int]) -> Iterator[tuple[Ints, _Pairs]]:
    """Yield polygons, run lengths, and run lengths of a wrong size."""
    is_runs = np.fromiter((isinstance(mask, dict) for mask in masks), bool, len(masks))
    known = placed.usable & np.isfinite(placed.extent).all(axis=1)
    for among in (known & ~is_runs, known & is_runs):
        if len(rows := np.flatnonzero(among)):
            pairs = _Pairs({"": placed.extent[rows]}, placed.box[rows], placed.size[rows], placed.image[rows])
            if is_runs[rows[0]] and _contradicting(pairs, placed.agreement[0][rows], placed.agreement[1][rows]).any():
                by_rows = {"when its run lengths are read by rows": _swap(_measure(masks, rows, turned=True))}
                pairs = pairs._replace(masks=pairs.masks | by_rows)
            yield rows, pairs
    possible = [row for row in sorted(wrong_size) if all(0 < side <= LARGEST_SIDE for side in masks[row]["size"])]
    if len(rows := np.array([row for row in possible if placed.usable[row]], np.int64)):
        size = placed.size[rows]
        yield rows, _Pairs(_other_sizes(masks, rows, size), placed.box[rows], size, placed.image[rows])


def _measure(masks: Sequence[Any], rows: Ints, turned: bool) -> Floats:
    """Measure extents (M, 4) of run lengths in their own size."""
    sizes = [masks[row]["size"][:: -1 if turned else 1] for row in rows]
    some = [{"size": size, "counts": masks[row]["counts"]} for row, size in zip(rows, sizes, strict=True)]
    return measure_masks(some, np.array(sizes, np.float64)[:, ::-1]).extent


def _other_sizes(masks: Sequence[Any], rows: Ints, size: Floats) -> dict[str, Floats]:
    own, extent = np.array([masks[row]["size"][::-1] for row in rows], float), _measure(masks, rows, turned=False)
    return {
        "": np.full_like(extent, np.nan),
        "when its size is read as [width, height]": _measure(masks, rows, turned=True),
        "with x and y swapped": _swap(extent),
        "once its run lengths are resized to the image": extent * np.tile(size / own, 2),
    }


def _tolerance(size: Floats) -> Floats:
    return np.tile(_AGREE + _AGREE_SHARE * size, 2)


def _error(one: Floats, other: Floats, tolerance: Floats) -> Floats:
    """Measure the largest difference (N,) of corners in tolerances. NaN becomes infinity."""
    worst = (np.abs(one - other) / tolerance).max(axis=1)
    return np.where(np.isnan(worst), np.inf, worst)


def _area(corners: Floats) -> Floats:
    return np.asarray(np.prod(np.maximum(corners[:, 2:] - corners[:, :2], 0), axis=1))


def _overlap(one: Floats, other: Floats) -> Floats:
    return _area(np.concatenate([np.fmax(one[:, :2], other[:, :2]), np.fmin(one[:, 2:], other[:, 2:])], axis=1))


def _union_share(one: Floats, other: Floats) -> Floats:
    both = _overlap(one, other)
    return both / (_area(one) + _area(other) - both)


def _agree(extent: Floats, corners: Floats, size: Floats) -> tuple[Floats, Rows]:
    """Measure errors (N,) of masks against boxes, and select contradicting rows.

    Up to 1, mask and box agree. Small objects have smaller tolerances. Loose boxes, and boxes of a part, neither agree
    nor contradict.
    """
    sides = np.fmax(extent[:, 2:] - extent[:, :2], corners[:, 2:] - corners[:, :2])
    strict = np.fmin(_tolerance(size), np.tile(_AGREE_SMALL[0] + _AGREE_SMALL[1] * sides, 2))
    error = _error(extent, corners, strict)
    rest = np.flatnonzero(error > 1)
    one, other, strict, side = extent[rest], corners[rest], strict[rest], np.tile(size[rest], 2)
    error[rest] = np.minimum(error[rest], _error(np.clip(one, 0, side), np.clip(other, 0, side), strict))
    areas = _area(one), _area(other)
    strict[:, :2] *= -1
    sound = np.minimum(*areas) >= _VISIBLE * np.maximum(*areas)
    sound &= _within(one, other + strict) | _within(other, one + strict)
    sound |= _union_share(one, other) > _SAME
    contradict = error > _APART
    contradict[rest[sound]] = False
    return error, contradict


def _within(inner: Floats, outer: Floats) -> Rows:
    return np.asarray((inner[:, :2] >= outer[:, :2]).all(axis=1) & (inner[:, 2:] <= outer[:, 2:]).all(axis=1))


def _contradicting(pairs: _Pairs, error: Floats, contradict: Rows) -> Rows:
    """Select the pairs that contradict each other, unless they are few."""
    if _different(pairs.box) < 2:
        contradict = contradict & (error > _APART_ALONE)
    few = contradict.sum() <= (error <= 1).sum() and contradict.sum() < _enough(pairs)
    return contradict & ~few


def _enough(pairs: _Pairs) -> float:
    """Count the pairs that have one reason because two files were merged."""
    return max(_MERGED[0], _MERGED[1] * len(pairs.box))


def _different(boxes: Floats) -> int:
    """Count different boxes in a sample."""
    return len(np.unique(boxes[:: len(boxes) // 1000 + 1].round(), axis=0))


def _usual(pairs: _Pairs) -> Floats:
    return next(iter(pairs.masks.values()))


def _fits(side: _Side, corners: Floats, pairs: _Pairs) -> Rows:
    """Select rows that a reading makes agree, or brings much closer."""
    other = corners_of(pairs.box) if side == "mask" else _usual(pairs)
    before, _ = _agree(_usual(pairs), corners_of(pairs.box), pairs.size)
    after, _ = _agree(corners, other, pairs.size)
    near = _error(corners, other, _tolerance(pairs.size)) <= 1
    alike = _union_share(corners, other) > _ALIKE  # very small boxes are near everything that is very small
    return (before > 1) & near & alike & (after <= np.maximum(1, before / _CLOSER))


def _explain(pairs: _Pairs, error: Floats, contradict: Rows) -> dict[str, Notes]:
    """Find the reading that makes most contradicting pairs agree.

    Returns its notes by side, masks or boxes.
    """
    some = np.flatnonzero(_contradicting(pairs, error, contradict))
    if not len(some):
        return {}
    sample = pairs.take(some[:: len(some) // _SAMPLE + 1])
    merged = len(some) < _MOST * len(pairs.box)
    best: tuple[float, _Side, _Read] | None = None
    for side, read in _readings(pairs, only_fixed=merged):
        share = float(_fits(side, read(sample)[0], sample).mean())
        if share >= _EXPLAINED and (best is None or share > best[0] + 0.02):
            best = share, side, read
    if best is None:
        return {}
    _, side, read = best
    corners, words = read(pairs)
    fits = _fits(side, corners, pairs)
    if fits.sum() < (_enough(pairs) if merged else _MOST * len(fits)):
        return {}
    other = "box" if side == "mask" else "mask"
    words = words * len(fits) if len(words) == 1 else words
    shown = _usual(pairs)
    notes = {
        int(at): f"its {side} fits its {other} {words[at]} ({_describe(shown[at], pairs.box[at])})"
        for at in np.flatnonzero(fits)
    }
    return {f"{side}s" if side == "mask" else "boxes": notes}


def _describe(extent: Floats, box: Floats) -> str:
    mask = "mask from {:g}, {:g} to {:g}, {:g}, ".format(*extent) if np.isfinite(extent).all() else ""
    return mask + "bbox [{:g}, {:g}, {:g}, {:g}]".format(*box)


def _readings(pairs: _Pairs, only_fixed: bool, most: int = 3) -> list[tuple[_Side, _Read]]:
    """List the readings of at most three changes, the simplest first.

    Of equal ones, readings of the side that leaves the images more often are first.
    """
    masks, boxes = _usual(pairs), corners_of(pairs.box)
    inside = [_inside(corners, pairs.size).mean() for corners in (masks, boxes)]
    sides: list[_Side] = ["box", "mask"] if inside[1] < inside[0] - 0.05 else ["mask", "box"]
    starts: dict[_Side, Sequence[str]] = {"mask": list(pairs.masks), "box": list(_FORMS)}
    choices = [
        (bool(start) + swapped + right + bottom + bool(unit), side, start, unit, swapped, right, bottom)
        for side in sides
        for start in starts[side]
        for unit, swapped, right, bottom in product(_UNITS, (False, True), (False, True), (False, True))
    ]
    fixed = [
        (side, _fixed(side, start, unit, swapped, right, bottom))
        for changes, side, start, unit, swapped, right, bottom in sorted(choices, key=_simplest)
        if 0 < changes <= most
    ]
    fits = _NEEDED if np.isfinite(masks).all() and not only_fixed else ()
    return fixed + [(side, _fitted(side, fit)) for fit in fits for side in sides]


def _simplest(choice: tuple[Any, ...]) -> tuple[int, bool]:
    """Sort by the number of changes, and rows before swapped coordinates."""
    changes, side, start, *_ = choice
    return changes, not (side == "mask" and start)


def _inside(corners: Floats, size: Floats) -> Rows:
    return _within(corners, np.concatenate([np.zeros_like(size) - _EDGE, size + _EDGE], axis=1))


def _swap(corners: Floats) -> Floats:
    return corners[:, [1, 0, 3, 2]]


def _start(side: _Side, start: str, pairs: _Pairs) -> Floats:
    if side == "mask":
        return pairs.masks[start]
    weights, box = _FORMS[start], pairs.box
    return box if weights is None else np.tile(box[:, :2], 2) + np.tile(box[:, 2:], 2) * weights


def _fixed(side: _Side, start: str, unit: str, swapped: bool, right: bool, bottom: bool) -> _Read:
    """Build a reading by units, swapped coordinates and other origins."""
    words = [start] * bool(start) + ["with x and y swapped"] * swapped + ["with x counted from the right"] * right
    words += ["with y counted from the bottom"] * bottom + [unit] * bool(unit)

    def read(pairs: _Pairs) -> tuple[Floats, list[str]]:
        corners = _start(side, start, pairs)
        corners = _swap(corners) if swapped else corners
        corners = corners * np.tile(pairs.size / _UNITS[unit], 2) if unit else corners
        for axis in np.flatnonzero([right, bottom]):
            corners = corners.copy()
            corners[:, [axis, axis + 2]] = pairs.size[:, [axis]] - corners[:, [axis + 2, axis]]
        return corners, [", ".join(words)]

    return read


_Fit = Callable[[Floats, Floats, _Pairs], tuple[Floats, list[str]]]


def _fitted(side: _Side, fit: _Fit) -> _Read:
    """Build a reading by fitted factors or shifts.

    More to fit needs more different boxes, because few fit by chance.
    """

    def read(pairs: _Pairs) -> tuple[Floats, list[str]]:
        masks, boxes = _usual(pairs), corners_of(pairs.box)
        if _different(boxes) < _NEEDED[fit]:
            return np.full_like(boxes, np.nan), [""]
        return fit(masks, boxes, pairs) if side == "mask" else fit(boxes, masks, pairs)

    return read


def _ratio(given: Floats, wanted: Floats) -> float:
    """Fit a factor between numbers (N, K): least squares, then the median."""
    return _middle((given * wanted).sum(axis=1) / (given**2).sum(axis=1))


def _middle(values: Floats) -> float:
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else np.nan


def _times(factors: Floats, pairs: _Pairs, words: str = "") -> list[str]:
    """Describe factors (N, 2) and the image size that they mean."""
    texts = []
    for (x, y), (width, height) in zip(factors, pairs.size, strict=True):
        in_y = "" if abs(x - y) < 0.005 * x else f" in x and {round(y, 3)} in y"
        texts.append(f"times {round(x, 3)}{in_y}{words}, as if the image were {width / x:.0f}x{height / y:.0f}")
    return texts


def _one_factor(given: Floats, wanted: Floats, pairs: _Pairs) -> tuple[Floats, list[str]]:
    """Fit one factor.

    A single box needs a factor far from 1, because a box that is drawn by hand may have another.
    """
    factors = np.full((len(given), 2), _ratio(given, wanted))
    if 0.8 < factors[0, 0] < 1.25 and _different(wanted) < 2:
        factors[:] = np.nan
    return given * np.tile(factors, 2), _times(factors, pairs)


def _two_factors(given: Floats, wanted: Floats, pairs: _Pairs) -> tuple[Floats, list[str]]:
    each = [_ratio(given[:, [axis, axis + 2]], wanted[:, [axis, axis + 2]]) for axis in (0, 1)]
    factors = np.tile(each, (len(given), 1))
    return given * np.tile(factors, 2), _times(factors, pairs)


def _factor_per_image(given: Floats, wanted: Floats, pairs: _Pairs) -> tuple[Floats, list[str]]:
    """Fit factors of x and y in each image.

    Objects that are alone and small fit by chance, so other objects have to be among them.
    """
    _, image, count = np.unique(pairs.image, return_inverse=True, return_counts=True)
    large = (given[:, 2:] - given[:, :2] > 0.3 * given[:, 2:]).all(axis=1)
    if ((count[image] > 1) | large).mean() < 0.25:
        return np.full_like(given, np.nan), [""]
    products, squares = ((given * one).reshape(-1, 2, 2).sum(axis=1) for one in (wanted, given))  # of x and of y
    sums = [[np.bincount(image, one[:, axis])[image] for axis in (0, 1)] for one in (products, squares)]
    factors = np.stack(sums[0], axis=1) / np.stack(sums[1], axis=1)
    return given * np.tile(factors, 2), _times(factors, pairs, " (another factor in each image)")


def _shift(given: Floats, wanted: Floats, pairs: _Pairs) -> tuple[Floats, list[str]]:
    x, y = np.median((wanted - given).reshape(-1, 2, 2).mean(axis=1), axis=0)
    return given + np.array([x, y, x, y]), [f"moved by {x:g} in x and {y:g} in y"]


def _shift_and_factor(given: Floats, wanted: Floats, pairs: _Pairs) -> tuple[Floats, list[str]]:
    factor = _middle(np.sqrt(_area(wanted) / _area(given)))
    moved, words = _shift(given * factor, wanted, pairs)
    return moved, [f"times {round(factor, 3)} and {words[0]}"]


_NEEDED: dict[_Fit, int] = {_one_factor: 1, _shift: 2, _two_factors: 2, _shift_and_factor: 4, _factor_per_image: 3}


def _strays(placed: Placed, explained: Collection[int]) -> dict[str, Notes]:
    """Find single masks far outside their image or away from their box."""
    free = placed.usable & np.isfinite(placed.extent).all(axis=1)
    free[list(explained)] = False
    rows = np.flatnonzero(free)
    if not len(rows):
        return {}
    error, contradict = placed.agreement[0][rows], placed.agreement[1][rows]
    # In a file of tight boxes, these are not loose.
    alone = contradict & (error > _APART_ALONE) & ((error <= 1).mean() >= _EXPLAINED)
    rows, alone = rows[error > 1], alone[error > 1]
    extent, size, corners = placed.extent[rows], placed.size[rows], corners_of(placed.box[rows])
    side = np.tile(size, 2)
    leaves = np.concatenate([-extent[:, :2], extent[:, 2:] - size], axis=1) / side
    stays = np.concatenate([corners[:, :2], size - corners[:, 2:]], axis=1) / side
    far = ((leaves > _FAR) | ((leaves > _OFF) & (stays > _OFF))).any(axis=1)
    cut = np.clip(extent, 0, side)
    outside = far | ((_area(cut) == 0) & (cut[:, :2] >= cut[:, 2:]).any(axis=1))
    wide = [one + _tolerance(size) * [-1, -1, 1, 1] for one in (extent, corners)]
    apart = ~outside & (_overlap(*wide) < _OVERLAP * np.minimum(*map(_area, wide)))
    apart |= ~outside & alone & (_union_share(extent, corners) < _SAME / 2)
    pairs = _Pairs({"": extent}, placed.box[rows], size, placed.image[rows])
    image, chosen = " in an image of {:.0f}x{:.0f}", np.flatnonzero(outside | apart)
    notes = {at: _describe(extent[at], pairs.box[at]) + image.format(*size[at]) for at in chosen}
    for at, words in _words_for_each(pairs.take(apart)).items():
        notes[np.flatnonzero(apart)[at]] += f", but it fits {words}"
    kinds = {"mask-outside": outside, "mask-off-box": apart}
    return {kind: {int(rows[at]): notes[at] for at in np.flatnonzero(chosen)} for kind, chosen in kinds.items()}


def _words_for_each(pairs: _Pairs) -> dict[int, str]:
    """Find a simple reading for single pairs."""
    found: dict[int, str] = {}
    for side, read in _readings(pairs, only_fixed=True, most=1) if len(pairs.box) else ():
        corners, words = read(pairs)
        found = dict.fromkeys(np.flatnonzero(_fits(side, corners, pairs)).tolist(), words[0]) | found
    return found


def _in_first_pixel(placed: Placed) -> Notes:
    """Find boxes in the first pixel, if most are there."""
    first = placed.usable & (np.abs(placed.box) <= 1.05).all(axis=1) & (placed.size.min(axis=1) >= 8)
    if first.sum() <= _MOST * placed.usable.sum():
        return {}
    return _box_notes(np.flatnonzero(first), placed, "as shares of the image: multiply by its size")


def _explain_boxes(placed: Placed) -> Notes:
    """Find the reading that brings boxes into their images."""
    rows = np.flatnonzero(placed.usable)
    if not len(rows):
        return {}
    box, size, corners = placed.box[rows], placed.size[rows], corners_of(placed.box[rows])
    beyond = ((corners[:, 2:] - size) / size).max(axis=1)
    alone = (placed.agreement[0][rows] <= 1).mean() < _MOST  # otherwise masks prove the form of the boxes
    forms = _forms_for_leaving(box, size, beyond) if alone else []
    sure = forms and _different(box) >= _ONE_SIDED[0]
    units = [] if sure else _units_for_leaving(corners, size, beyond, placed.image[rows])
    if reasons := [*forms, *units] if units != [_UNEXPLAINED] else forms or units:
        return _box_notes(rows[beyond > (0 if forms else _LEAVING_BY)], placed, ", or ".join(reasons))
    if words := _words_for_corner(box, corners, size):
        return _box_notes(rows, placed, words)
    return {}


def _forms_for_leaving(box: Floats, size: Floats, beyond: Floats) -> list[str]:
    """Find forms that bring all boxes into their images."""
    _, center, corner = _FORMS
    pairs, forms = _Pairs({}, box, size, np.arange(len(box))), (("", True), (center, False), (corner, True))
    read = [_fixed("box", start, "", turned, False, False)(pairs) for start, turned in forms]
    inside = [_inside(corners, size) & (_area(corners) > 0) for corners, _ in read]
    over = (corners_of(box)[:, 2:] > size + _EDGE).any(axis=1)
    few, share, others = _ONE_SIDED
    if _different(box[over]) >= few and over.mean() >= share and (~inside[1]).sum() <= others * over.sum():
        return [center]
    if (beyond > _LEAVING_BY).sum() <= max(_FEW, _LEAVING * len(box)):
        return []
    return [words[0] for (_, words), fits in zip(read, inside, strict=True) if fits.mean() >= _FITTING]


def _units_for_leaving(corners: Floats, size: Floats, beyond: Floats, image: Ints) -> list[str]:
    """Explain boxes that leave their images by far."""
    reach = np.quantile(corners[:, 2:].max(axis=1), _FITTING)
    reasons = [
        unit
        for unit, most in list(_UNITS.items())[2:]
        if corners.max() <= most * 1.005 and corners.min() >= -_EDGE and reach >= most / 2
    ]
    gone = _area(np.clip(corners, 0, np.tile(size, 2))) < _REMAINS * _area(corners)
    often = (beyond > 4 * _LEAVING_BY).sum() > max(_FEW, 2 * _LEAVING * len(size)) and bool(reasons)
    if not often and gone.sum() <= max(1, _LEAVING * len(size)):
        return []
    most = (corners[:, 2:] / size).max()
    if _fit_once_moved(corners, size, image):
        return [_UNEXPLAINED]
    if most > _LARGER:
        return reasons or [_UNEXPLAINED]
    return [*reasons, f"in a larger version of the image (they reach {most:.3g} times its sides)"]


def _fit_once_moved(corners: Floats, size: Floats, image: Ints) -> bool:
    """Check whether the boxes of each image fit into it once moved."""
    _, at, count = np.unique(image, return_inverse=True, return_counts=True)
    low, high = np.full((len(count), 2), np.inf), np.full((len(count), 2), -np.inf)
    np.minimum.at(low, at, (corners[:, :2] - _EDGE) / size)
    np.maximum.at(high, at, corners[:, 2:] / size)
    near = (high - low <= 1)[count > 1].all(axis=1)  # of images with several boxes
    return len(near) >= _TILES and bool(near.mean() >= _FITTING)


def _words_for_corner(box: Floats, corners: Floats, size: Floats) -> str:
    """Explain boxes that fill the first 100 pixels of larger images."""
    if _different(box) < _CORNER_BOXES or size.min() < 150 or not 0 <= corners.min() <= corners.max() < 100.5:
        return ""
    fills = (corners.max(axis=0)[2:] >= 90).all() and ((corners[:, :2] > 50).mean(axis=0) >= _OVERLAP).all()
    return list(_UNITS)[2] if fills else ""


def _box_notes(rows: Ints, placed: Placed, words: str) -> Notes:
    note = "bbox [{:g}, {:g}, {:g}, {:g}] in an image of {:.0f}x{:.0f} fits {}"
    return {int(row): note.format(*placed.box[row], *placed.size[row], words) for row in rows}


def _in_corner(placed: Placed) -> Notes:
    """Check whether all boxes are in the upper left part."""
    box, size, image = placed.box[placed.usable], placed.size[placed.usable], placed.image[placed.usable]
    if len(box) < _CORNER_BOXES or (corners_of(box)[:, 2:] / size).max() > _CORNER:
        return {}
    if _different(box) < _CORNER_BOXES or len(np.unique(image)) < _CORNER_IMAGES:
        return {}
    (x, y), row = (corners_of(box)[:, 2:] / size).max(axis=0), int(np.flatnonzero(placed.usable)[0])
    return {row: f"no box reaches beyond {x:.2f} of the width and {y:.2f} of the height of its image"}
