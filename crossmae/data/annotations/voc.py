"""Pascal VOC: an XML file per image, with boxes in pixels.

Integer coordinates from 1 count pixels, as VOC defines them, so 1 is subtracted from xmin and ymin. If a file of the
data set has a coordinate 0 or a fraction, coordinates are edges, and nothing is subtracted. Polygons as Roboflow writes
them are read. If `SegmentationObject/NAME.png` is there, its value n is the mask of the n-th object.

A file without objects states that its image has none. An image without a file is unlabelled, and left out.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree.ElementTree import Element

from crossmae.data.annotations.mask_files import read_values
from crossmae.data.annotations.records import (
    AnnotatedImage,
    AnnotatedObject,
    FormatReading,
    ImageFinder,
    group_by_split,
    remark_unlabelled,
    with_sizes,
)
from crossmae.data.annotations.run_lengths import encode_values
from crossmae.data.parallel import map_in_order
from crossmae.errors import UserError, counted
from crossmae.files import decode_text, load_xml, read_file

VOC_FORMAT = "Pascal VOC"
SPLIT_LISTS = "ImageSets/Main"
CORNERS = ("xmin", "ymin", "xmax", "ymax")


class _Object(NamedTuple):
    """Class, corners (xmin, ymin, xmax, ymax) as written, and a polygon or None."""

    name: str
    corners: list[float]
    polygon: list[float] | None


class _File(NamedTuple):
    """File name and size (width, height) of an image as written, and its objects."""

    image: str
    size: tuple[int, int]
    objects: list[_Object]


def read_voc(folder: Path, files: Sequence[str], finder: ImageFinder) -> FormatReading:
    """Read the XML files `files`, relative to a folder."""
    reading = FormatReading(VOC_FORMAT)
    read: list[tuple[str, _File]] = []
    for name, result in zip(files, map_in_order(lambda name: _read(folder / name), files, bar="labels"), strict=True):
        if isinstance(result, str):
            reading.faults.append(f"{folder / name}: {result}")
        else:
            read.append((name, result))
    reading.raise_faults(folder)
    boxes = [one.corners for _, file in read for one in file.objects]
    first = int(all(value >= 1 and value.is_integer() for corners in boxes for value in corners))
    if boxes and not first:
        reading.remarks.append("coordinates from 0 or with fractions: read as edges, without subtracting 1")
    images, missing = [], 0
    for name, file in read:
        found = finder.find(name, file.image)
        if len(found) > 1:
            reading.faults.append(f"{folder / name}: the images {found[0]} and {found[1]} both fit")
            continue
        missing += not found
        path = finder.path(found[0] if found else file.image or f"{Path(name).stem}.jpg")
        objects = [_convert(one, first) for one in file.objects]
        images.append((name, AnnotatedImage(path, file.size, _with_masks(folder / name, objects, reading))))
    if missing:
        reading.remarks.append(f"the images of {counted(missing, 'label file')} are not in {finder.folder}")
    paths = [image.path for _, image in images]
    if twice := [path for path, count in Counter(paths).items() if count > 1]:
        reading.faults.append(f"{twice[0]}: several xml files are of this image")
    sized = with_sizes([image for _, image in images])
    remark_unlabelled(reading, sized, finder.count_others(paths), "an xml", "save an xml without objects")
    group_by_split(reading, [(name, image) for (name, _), image in zip(images, sized, strict=True)])
    _use_lists(folder, reading)
    return reading


def _read(path: Path) -> _File | str:
    """Read one file, or return its fault."""
    try:
        root = load_xml(decode_text(read_file(path), path))
    except UserError as error:
        return str(error.args[0]).removeprefix(f"{path}: ")
    except ValueError as error:
        return str(error)
    if root.tag != "annotation":
        return f"its root is <{root.tag:.40}>, not <annotation>"
    size = [_number(root.findtext(f"size/{key}")) or 0 for key in ("width", "height")]
    objects: list[_Object] = []
    for number, element in enumerate(root.findall("object"), start=1):
        name, polygon = (element.findtext("name") or "").strip(), _polygon(element.find("polygon"))
        box = element.find("bndbox")  # of the object itself, not of its parts
        corners = [_number(None if box is None else box.findtext(key)) for key in CORNERS]
        if not name:
            return f"object {number} has no name"
        if None in corners:
            return f"object {number} ({name:.40}) has no bndbox of 4 numbers"
        objects.append(_Object(name, [corner for corner in corners if corner is not None], polygon))
    image = (root.findtext("filename") or "").strip().replace("\\", "/")
    return _File(os.path.basename(image), (int(size[0]), int(size[1])), objects)


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) and abs(value) < 1e9 else None


def _polygon(element: Element | None) -> list[float] | None:
    """Read x1, y1, x2, y2, ... of Roboflow."""
    values: list[float] = []
    while element is not None:
        number = len(values) // 2 + 1
        point = [_number(element.findtext(f"{axis}{number}")) for axis in "xy"]
        if point[0] is None or point[1] is None:
            break
        values += [point[0], point[1]]
    return values or None


def _convert(one: _Object, first: int) -> AnnotatedObject:
    left, top, right, bottom = one.corners
    left, top = left - first, top - first
    box = [left, top, right - left, bottom - top]
    return AnnotatedObject(one.name, [round(value, 4) for value in box], [one.polygon] if one.polygon else None)


def _with_masks(path: Path, objects: list[AnnotatedObject], reading: FormatReading) -> list[AnnotatedObject]:
    """Add the masks of `SegmentationObject`, if the image has some."""
    png = path.parent.parent / "SegmentationObject" / f"{path.stem}.png"
    if not objects or not png.is_file():
        return objects
    try:
        values = read_values(png)
    except UserError as error:
        reading.faults.append(str(error.args[0]))
        return objects
    masks = encode_values(values)
    return [
        one._replace(mask=masks[number].mask) if number in masks else one for number, one in enumerate(objects, start=1)
    ]


def _use_lists(folder: Path, reading: FormatReading) -> None:
    """Split by the lists of `ImageSets/Main`, if train and val are there."""
    tops = [place for place in (folder, folder.parent) if (place / SPLIT_LISTS / "train.txt").is_file()]
    paths = {split: tops[0] / SPLIT_LISTS / f"{split}.txt" for split in ("train", "val", "test")} if tops else {}
    stems = {
        split: {line.split()[0] for line in decode_text(read_file(path), path).splitlines() if line.strip()}
        for split, path in paths.items()
        if path.is_file()
    }
    images = [image for images in reading.splits.values() for image in images]
    parts = {split: [one for one in images if Path(one.path).stem in names] for split, names in stems.items()}
    parts = {split: part for split, part in parts.items() if part}
    if not {"train", "val"} <= parts.keys():
        return
    listed = sum(map(len, parts.values()))
    if listed < len(images):
        reading.remarks.append(f"{counted(len(images) - listed, 'image')} in no list of {SPLIT_LISTS}: left out")
    reading.splits = parts
