"""Numbers, boxes and masks of COCO files in the forms that exporters write instead of COCO's.

Each function returns COCO's form if the value has one meaning, and otherwise the value itself, which the checks then
reject.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from crossmae.files import load_json, load_literal
from det.data.coco_masks import COMPRESSED, NUMBERS, WKT_HOLE, mask_fault, measure_masks

_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_CALL = re.compile(r"[A-Za-z_][\w.]*\(")  # array( of numpy's and torch's printed values
_DTYPE = re.compile(r",\s*(?:dtype|device|size)\s*=[^)]*")
_SEPARATORS = re.compile(r"[\s,;\[\]()]+")
_WKT = re.compile(r"(?:SRID=\d+;)?\s*(?:MULTI)?POLYGON\s*(?=\()", re.IGNORECASE)
_RING_ENDS = re.compile(r"[;\[\]()]")
ROTATION_KEYS = ("rotation", "angle")
_CORNERS = (("xmin", "ymin", "xmax", "ymax"), ("x1", "y1", "x2", "y2"), ("left", "top", "right", "bottom"))
_SIZES = (("x", "y", "width", "height"), ("x", "y", "w", "h"), ("left", "top", "width", "height"))
NEAR = 2.0  # pixels between the box and the extent of its mask
POINT_KEYS = (("x", "y"), ("X", "Y"))


def as_number(value: Any) -> Any:
    """Return the number that a text holds."""
    if isinstance(value, str):
        text = _CALL.sub("", value).strip().rstrip(")")
        if _NUMBER.fullmatch(text):
            return int(text) if re.fullmatch(r"[+-]?\d{1,300}", text) else float(text)
    return value


def as_whole_number(value: Any) -> int | None:
    """Return the whole number that a value stands for, or None."""
    number = as_number(value)
    if type(number) is float and number.is_integer():
        return int(number)
    return number if type(number) is int else None


def as_numbers(value: Any) -> list[float] | None:
    """Return a flat list of numbers, which may be text, or None."""
    if type(value) is not list or not value:
        return None
    if NUMBERS.issuperset(map(type, value)):
        return value
    numbers = [as_number(number) for number in value]
    return numbers if NUMBERS.issuperset(map(type, numbers)) else None


def parsed(value: Any) -> Any:
    """Return the list or dict that a text holds.

    The text is JSON, Python, a printed array, or numbers between separators.
    """
    if not isinstance(value, str):
        return value
    plain = _plain(value)
    found = _literal(plain)
    return (_numbers_of(plain) or value) if found is None else found


def _plain(text: str) -> str:
    return _CALL.sub("(", _DTYPE.sub("", text.strip()))


def _literal(plain: str) -> list[Any] | dict[str, Any] | None:
    for read in (load_json, load_literal):
        try:
            found = _without_tuples(read(plain))
        except ValueError:
            continue
        if isinstance(found, list | dict):
            return found
    return None


def _numbers_of(plain: str) -> list[float] | None:
    return as_numbers([word for word in _SEPARATORS.split(plain) if word])


def _without_tuples(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_without_tuples(entry) for entry in value]
    if isinstance(value, bytes):
        return value.decode("latin-1")
    return {key: _without_tuples(entry) for key, entry in value.items()} if isinstance(value, dict) else value


def is_empty(value: Any) -> bool:
    """Check for null, NaN, empty values, and lists of such."""
    if isinstance(value, str):
        return value.strip().lower() in ("", "[]", "[[]]", "{}", "null", "none", "nan")
    if isinstance(value, list):
        left = list(value)  # not by recursion, because lists may be nested deeply
        while left:
            part = left.pop()
            if isinstance(part, list):
                left += part
            elif not is_empty(part):
                return False
        return True
    return value is None or value == {} or (isinstance(value, float) and value != value)


def as_box(value: Any) -> Any:
    """Return a box as [x, y, width, height], or None."""
    box = parsed(value)
    if is_empty(box):
        return None
    if isinstance(box, dict):
        box = _box_of_keys({str(key).lower(): as_number(number) for key, number in box.items()})
    while isinstance(box, list) and len(box) == 1:
        box = box[0]
    numbers = as_numbers(box)
    if numbers is None or len(numbers) != 4:
        return value
    return numbers if any(numbers) else None


def _box_of_keys(box: Mapping[str, Any]) -> list[Any] | None:
    if any(not is_empty(box.get(key)) and box[key] != 0 for key in ROTATION_KEYS):
        return None
    for keys in _SIZES:
        if box.keys() >= set(keys) and not any(box.keys() >= set(corners) for corners in _CORNERS):
            return [box[key] for key in keys]
    for keys in _CORNERS:
        if box.keys() >= set(keys) and NUMBERS.issuperset(type(box[key]) for key in keys):
            left, top, right, bottom = (box[key] for key in keys)
            return [left, top, right - left, bottom - top]
    return None


def as_mask(value: Any) -> Any:
    """Return a mask as polygons or run lengths, or None."""
    mask = _parsed_mask(value)
    if is_empty(mask):
        return None
    if isinstance(mask, dict):
        return _as_run_lengths(mask) or value
    if not isinstance(mask, list):
        return value
    parts = [part for part in map(_parsed_mask, mask) if not is_empty(part)]
    if parts and all(isinstance(part, dict) and "counts" in part for part in parts):
        return _united(parts) or value
    return _as_polygons(parts) or value


def _parsed_mask(value: Any) -> Any:
    """Return the lists or dict that a text holds.

    The text may be WKT, or have brackets or semicolons between points or polygons. Holes are left.
    """
    if not isinstance(value, str) or WKT_HOLE.search(value):
        return value
    is_wkt = _WKT.match(value.strip())
    plain = value.strip()[is_wkt.end() :] if is_wkt else _plain(value)
    if not is_wkt and (found := _literal(plain)) is not None:
        return found
    rings = [_numbers_of(ring) for ring in _RING_ENDS.split(plain) if _SEPARATORS.sub("", ring)]
    if None in rings or not rings:
        return value
    lengths = {len(ring) for ring in rings if ring}
    if len(rings) == 1 or max(lengths) == 1:
        return _numbers_of(plain)
    return rings if lengths == {2} or min(lengths) >= 6 else value


def by_axis(mask: Any, box: Any) -> list[list[float]] | None:
    """Return the polygon of a mask of all x and all y.

    VIA has such lists. They have to fit the box in this way, and not as two polygons. Otherwise returns None.
    """
    if type(mask) is not list or len(mask) != 2 or not all(type(part) is list and len(part) > 2 for part in mask):
        return None
    x, y = mask
    if len(x) != len(y) or not NUMBERS.issuperset(map(type, (*x, *y))):
        return None
    found = as_numbers(as_box(box))
    if found is None or len(found) != 4:
        fits = len(x) % 2 == 1
    else:
        wanted = (found[0], found[1], found[0] + found[2], found[1] + found[3])
        flat = [*x, *y]

        def off(xs: list[float], ys: list[float]) -> float:
            extent = (min(xs), min(ys), max(xs), max(ys))
            return max(abs(one - other) for one, other in zip(extent, wanted, strict=True))

        fits = off(x, y) <= NEAR and (len(x) % 2 == 1 or off(flat[::2], flat[1::2]) > NEAR)
    return [[number for pair in zip(x, y, strict=True) for number in pair]] if fits else None


def _as_run_lengths(mask: Mapping[str, Any]) -> dict[str, Any] | None:
    size, counts = as_numbers(parsed(mask.get("size"))), mask.get("counts")
    if isinstance(counts, str) and not COMPRESSED.fullmatch(counts):
        counts = _text_of_bytes(counts.strip())
    if not isinstance(counts, str):
        counts = _whole(counts)
    found = {"size": _whole(size), "counts": counts}
    return None if mask_fault(found) else found


def _text_of_bytes(text: str) -> Any:
    """Read `counts` from a printed `b'...'` or a printed list."""
    if not re.fullmatch(r"""b(['"]).*\1""", text, re.DOTALL):
        return parsed(text)
    try:
        data: bytes = load_literal(text)
        return data.decode("ascii")
    except ValueError:
        return text


def _whole(values: Any) -> list[int] | None:
    numbers = as_numbers(values)
    whole = [number for value in numbers or () if (number := as_whole_number(value)) is not None]
    return whole if numbers and len(whole) == len(numbers) else None


def _united(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Join run-length encodings of parts of one object."""
    masks = [_as_run_lengths(part) for part in parts]
    if len(masks) == 1 or None in masks:
        return masks[0]
    sound = [mask for mask in masks if mask is not None]
    sizes = np.array([mask["size"][::-1] for mask in sound[:1] * len(sound)], float)
    if measure_masks(sound, sizes).faults:
        return None
    encoded = [
        mask if isinstance(mask["counts"], str) else coco_mask.frPyObjects(mask, *mask["size"]) for mask in sound
    ]
    merged = coco_mask.merge(encoded)
    return {"size": list(merged["size"]), "counts": merged["counts"].decode("ascii")}


def _as_polygons(parts: Sequence[Any]) -> list[list[float]] | None:
    """Return a flat list of numbers for each polygon."""
    if (flat := as_numbers(list(parts))) is not None:
        return [flat]
    if (flat := _flat_points(parts)) is not None:
        return [flat]
    polygons: list[list[float]] = []
    for part in parts:
        if not isinstance(part, list) or (found := _as_polygons([one for one in part if not is_empty(one)])) is None:
            return None
        polygons += found
    return polygons


def _flat_points(points: Iterable[Any]) -> list[float] | None:
    flat: list[float] = []
    for point in points:
        pair = _point(point)
        if pair is None:
            return None
        flat += pair
    return flat


def _point(value: Any) -> list[float] | None:
    """Return x and y of a point.

    A point is a pair, a dict, or a list of one point, as in OpenCV's contours.
    """
    if isinstance(value, str):
        value = parsed(value)
    if isinstance(value, dict):
        pair = next(([value[key] for key in keys] for keys in POINT_KEYS if set(keys) <= value.keys()), None)
        return as_numbers(pair)
    if not isinstance(value, list) or not value:
        return None
    if len(value) == 1:
        return _point(value[0])
    return as_numbers(value) if len(value) == 2 else None
