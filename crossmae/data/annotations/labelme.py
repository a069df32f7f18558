"""LabelMe: a JSON file per image with polygons, rectangles, circles and masks, in pixels.

Shapes of the same label and `group_id` are one object. A rectangle is a box without a mask. Points and lines are left
out, and counted. `imageData`, a copy of the image, is ignored. A file without shapes states that its image has no
objects. An image without a file, or with points and lines only, is unlabelled, and left out.
"""

from __future__ import annotations

import base64
import binascii
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossmae.data.annotations.records import (
    AnnotatedImage,
    AnnotatedObject,
    FormatReading,
    ImageFinder,
    group_by_split,
    remark_unlabelled,
    sizes_of,
)
from crossmae.data.annotations.run_lengths import encode_values
from crossmae.data.images import IMAGE_LIMITS, open_image
from crossmae.data.parallel import map_in_order
from crossmae.errors import UserError, counted
from crossmae.files import is_number, read_json

LABELME_FORMAT = "LabelMe"
FLAT = ("point", "points", "line", "linestrip")  # shapes without an area
CIRCLE_ERROR = 0.25  # pixels between a circle and its polygon
MOST_CORNERS = 360
_Size = tuple[int, int]


def is_labelme(content: Any) -> bool:
    """Check for the keys of a LabelMe file."""
    return isinstance(content, dict) and isinstance(content.get("shapes"), list) and "imagePath" in content


def read_labelme(folder: Path, files: Sequence[str], finder: ImageFinder) -> FormatReading:
    """Read JSON files relative to a folder. Others are left out."""
    reading = FormatReading(LABELME_FORMAT)
    flat, others, missing = Counter[str](), list[str](), 0
    images, pointed = [], list[str]()
    for name, content in zip(files, map_in_order(lambda name: _load(folder / name), files, bar="labels"), strict=True):
        if isinstance(content, UserError):
            reading.faults.append(str(content.args[0]))
            continue
        if not is_labelme(content):
            others.append(name)
            continue
        path = _find_image(folder / name, name, content, finder)
        missing += not os.path.isfile(path)
        size = _stated_size(content)
        if 0 in size:
            size = sizes_of([path])[0]
        try:
            objects = _read_shapes(content["shapes"], size, flat)
        except ValueError as error:
            reading.faults.append(f"{folder / name}: {error}")
            continue
        if content["shapes"] and not objects:
            pointed.append(path)
        else:
            images.append((name, AnnotatedImage(path, size, objects)))
    if others:
        reading.remarks.append(f"{counted(len(others), 'json')} of another kind, such as {others[0]}: left out")
    if flat:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in flat.items())
        reading.remarks.append(f"shapes without an area: {kinds}: left out")
    if pointed:
        reading.remarks.append(f"{counted(len(pointed), 'image')} with such shapes only: left out as unlabelled")
    if missing:
        reading.remarks.append(f"the images of {counted(missing, 'label file')} were not found")
    paths = [*pointed, *(image.path for _, image in images)]
    bare = finder.count_others(paths)
    remark_unlabelled(reading, [image for _, image in images], bare, "a json", "save a json without shapes")
    if twice := [path for path, count in Counter(paths).items() if count > 1]:
        reading.faults.append(f"{twice[0]}: several json files name this image")
    group_by_split(reading, images)
    return reading


def _load(path: Path) -> Any:
    try:
        return read_json(path)
    except UserError as error:
        return error


def _find_image(path: Path, name: str, content: Mapping[str, Any], finder: ImageFinder) -> str:
    """Find the image that a file names, or of its base name."""
    named = content["imagePath"] if isinstance(content["imagePath"], str) else ""
    named = named.replace("\\", "/").replace("\0", "")
    direct = os.path.normpath(os.path.join(os.path.abspath(path.parent), named))
    if named and os.path.isfile(direct):
        return direct
    found = finder.find(name, os.path.basename(named))
    return finder.path(found[0]) if len(found) == 1 else direct if named else finder.path(f"{path.stem}.jpg")


def _stated_size(content: Mapping[str, Any]) -> _Size:
    width, height = content.get("imageWidth"), content.get("imageHeight")
    sound = type(width) is int and type(height) is int and 0 < width < 1 << 20 and 0 < height < 1 << 20
    return (width, height) if sound else (0, 0)  # type: ignore[return-value]


def _read_shapes(shapes: Sequence[Any], size: _Size, flat: Counter[str]) -> list[AnnotatedObject]:
    """Convert shapes, and count those without an area in `flat`. Raises ValueError."""
    groups: dict[object, AnnotatedObject] = {}
    for number, shape in enumerate(shapes):
        kind = shape.get("shape_type") or "polygon" if isinstance(shape, dict) else None
        if not isinstance(kind, str) or not isinstance(shape.get("label"), str) or not shape["label"].strip():
            raise ValueError(f"shape {number} has no label")
        if kind in FLAT:
            flat[kind] += 1
            continue
        points = shape.get("points")
        if not _are_points(points):
            raise ValueError(f"shape {number} ({shape['label']:.40}) has no points [x, y]")
        one = _convert(kind, points, shape, size, number)
        group = shape.get("group_id")
        key: object = (one.name, group) if type(group) is int else number
        groups[key] = _joined(groups[key], one) if key in groups else one
    return list(groups.values())


def _are_points(points: Any) -> bool:
    return (
        isinstance(points, list)
        and bool(points)
        and all(isinstance(point, list) and len(point) == 2 and all(map(is_number, point)) for point in points)
    )


def _convert(
    kind: str, points: list[list[float]], shape: Mapping[str, Any], size: _Size, number: int
) -> AnnotatedObject:
    name = shape["label"].strip()
    (left, top), (right, bottom) = (tuple(bound(axis) for axis in zip(*points, strict=True)) for bound in (min, max))
    if kind == "rectangle":
        return AnnotatedObject(name, [left, top, right - left, bottom - top], None)
    if kind == "circle" and len(points) == 2:
        return AnnotatedObject(name, None, [_circle(points)])
    if kind == "mask":
        return _place_mask(name, shape.get("mask"), (round(left), round(top)), size, number)
    if kind in ("polygon", "rotation", "oriented_rectangle"):
        return AnnotatedObject(name, None, [[float(value) for point in points for value in point]])
    raise ValueError(f"shape {number} ({name:.40}) is a {kind!r:.40}, which is not read. Draw a polygon")


def _circle(points: Sequence[Sequence[float]]) -> list[float]:
    """Return a polygon of a circle, from centre and edge."""
    (x, y), edge = points
    radius = math.dist((x, y), edge)
    fewest = math.pi / math.acos(max(1 - CIRCLE_ERROR / radius, 0)) if radius > CIRCLE_ERROR else 4
    corners = min(max(math.ceil(fewest), 12), MOST_CORNERS)
    angles = [2 * math.pi * at / corners for at in range(corners)]
    return [round(value, 4) for one in angles for value in (x + radius * math.cos(one), y + radius * math.sin(one))]


def _place_mask(name: str, encoded: Any, corner: tuple[int, int], size: _Size, number: int) -> AnnotatedObject:
    """Decode a mask of a box, and place it in its image."""
    try:
        image = open_image(base64.b64decode(encoded, validate=True))
        IMAGE_LIMITS.check(f"shape {number}", *image.size)
        IMAGE_LIMITS.check(f"shape {number}", *size)
        part = np.asarray(image)
    except UserError as error:
        raise ValueError(str(error.args[0])) from None
    except (binascii.Error, TypeError, ValueError, OSError, SyntaxError) as error:
        raise ValueError(f"shape {number} ({name:.40}) has a mask that cannot be read: {error}") from None
    inked: NDArray[np.bool_] = np.any(np.atleast_3d(part), axis=-1)
    full = np.zeros(size[::-1], np.int64)
    (x, y), (height, width) = corner, inked.shape
    inside = inked[max(-y, 0) : max(size[1] - y, 0), max(-x, 0) : max(size[0] - x, 0)]
    full[max(y, 0) : max(y + height, 0), max(x, 0) : max(x + width, 0)] = inside
    runs = encode_values(full)
    if 1 not in runs:
        raise ValueError(f"shape {number} ({name:.40}) has a mask without pixels in the image")
    return AnnotatedObject(name, runs[1].box, runs[1].mask)


def _joined(one: AnnotatedObject, other: AnnotatedObject) -> AnnotatedObject:
    """Join polygons of a group. Raises ValueError for other shapes."""
    if not isinstance(one.mask, list) or not isinstance(other.mask, list):
        raise ValueError(f"a group of {one.name!r:.40} has a box or a mask. Only polygons can be grouped")
    return AnnotatedObject(one.name, None, [*one.mask, *other.mask])
