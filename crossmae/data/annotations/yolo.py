"""YOLO labels: a text file per image, with boxes or polygons as shares of the image.

    data.yaml                          classes and folders of the splits, as ultralytics and Roboflow write it
    labels/a.txt, images/a.jpg         two parallel folders, also labels/train/ and images/train/, or train/labels/
    a.txt next to a.jpg                classes in classes.txt or obj.names

A row has a class number from 0, then a box (centre x, centre y, width, height) or a polygon (x1, y1, x2, y2, ...).
A number too many at the end is a score, and ignored. With `kpt_shape` in data.yaml, keypoints are ignored.

An image with an empty label file has no objects. An image without a label file has none, either, as Ultralytics defines
the format. But an image that is not labelled yet looks the same. So an image without a file is unlabelled, and left
out, if other images have empty files, which state that there are no objects, or if most images of a split have no file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crossmae.data.annotations.records import (
    UNSPLIT,
    AnnotatedImage,
    AnnotatedObject,
    FormatReading,
    ImageFinder,
    group_by_split,
    is_image_name,
    relative_files,
    remark_unlabelled,
    sizes_of,
)
from crossmae.data.parallel import map_in_order
from crossmae.errors import UserError, counted
from crossmae.files import decode_text, load_yaml, read_file

YOLO_FORMAT = "YOLO"
CLASS_FILES = ("classes.txt", "obj.names", "_darknet.labels", "labels.txt", "predefined_classes.txt")
BLANK_BYTES = 8  # larger label files are not looked into for blanks
MOST_OUTSIDE = 0.1  # share of the image by which a coordinate may leave it
CLASS_LIMIT = 100_000
_Row = tuple[int, list[float]]


def read_text(path: str | Path) -> str:
    """Read UTF-8 text, with or without a byte-order mark."""
    return decode_text(read_file(path), Path(path))


def read_yolo_yaml(path: Path, images: Path | None) -> FormatReading:
    """Read the splits that a data.yaml names."""
    content = _read_mapping(path)
    reading = FormatReading(YOLO_FORMAT, classes=_read_classes(content.get("names"), path))
    keypoints = _count_keypoints(content.get("kpt_shape"), path)
    bases = _bases(content.get("path"), path, images)
    named: dict[str, list[str]] = {}
    for split, keys in {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}.items():
        entries: Any = next((content[key] for key in keys if content.get(key)), [])
        for entry in [entries] if isinstance(entries, str) else entries if isinstance(entries, list) else [None]:
            if not isinstance(entry, str):
                raise UserError(f"{path}: {split} is {entry!r:.50}. Name a folder or a list of images.")
            try:
                found = _images_of(entry, bases)
                named.setdefault(split, []).extend(found)
            except FileNotFoundError:
                if split == "test":  # often named and left out
                    reading.remarks.append(f"test: {entry} does not exist, and is left out")
                else:
                    reading.faults.append(f"{path}: {split}: {entry} is in none of {', '.join(map(str, bases))}")
    if not named and not reading.faults:
        raise UserError(f"{path}: has neither train nor val. Name the folders of images there.")
    if same := next((name for name in ("val", "test") if name in named and named[name] == named.get("train")), ""):
        reading.remarks.append(f"{same} is the same as train, so {path.name} has no splits")
        named = {UNSPLIT: named["train"]}
    elif len(named) == 1:
        named = {UNSPLIT: next(iter(named.values()))}
    lists = {split: list(dict.fromkeys(paths)) for split, paths in named.items()}
    files = {split: [_label_of(one) for one in paths] for split, paths in lists.items()}
    if lost := _lost_labels({label for labels in files.values() for label in labels if label}):
        reading.remarks.append(f"{counted(len(lost), 'label file')} without an image, such as {lost[0]}: left out")
    states_empty = _has_empty([label for labels in files.values() for label in labels])
    for split, unique in lists.items():
        missing = [one for one in unique if not os.path.isfile(one)]
        reading.faults += [f"{one}: the image does not exist" for one in missing]
        labels = files[split]
        if unique and not any(labels):
            where = _parallel(unique[0]) or os.path.dirname(unique[0])
            reading.faults.append(f"{where}: none of {counted(len(unique), 'image')} has a label file there")
        reading.splits[split] = _read_images(unique, labels, reading, keypoints, states_empty)
    return reading


def read_yolo_folder(folder: Path, texts: Sequence[str], finder: ImageFinder) -> FormatReading:
    """Read the label files `texts`, relative to a folder."""
    reading = FormatReading(YOLO_FORMAT)
    owned: dict[str, str] = {}
    lost = []
    for text in texts:
        found = finder.find(text)
        if len(found) > 1:
            reading.faults.append(f"{folder / text}: the images {found[0]} and {found[1]} both fit")
        elif found and found[0] in owned:
            reading.faults.append(f"{folder / text}: its image {found[0]} also has {owned[found[0]]}")
        elif found:
            owned[found[0]] = text
        else:
            lost.append(text)
    if lost:
        line = f"{counted(len(lost), 'label file')} without an image, such as {lost[0]}"
        if len(lost) > len(owned):
            raise UserError(f"{folder}: {line}, in {finder.folder}. Name the folder of the images with --images.")
        reading.remarks.append(f"{line}: left out")
    reading.classes = _find_classes(folder, Path(finder.folder), reading)
    labels = [str(folder / owned[name]) if name in owned else "" for name in finder.names]
    read = _read_images([finder.path(name) for name in finder.names], labels, reading, 0, _has_empty(labels))
    group_by_split(reading, [(Path(os.path.relpath(one.path, finder.folder)).as_posix(), one) for one in read])
    return reading


def _has_empty(labels: Sequence[str]) -> bool:
    """Check for label files without rows. "" is no file."""
    sizes = ((label, os.path.getsize(label)) for label in labels if label)
    return any(size <= BLANK_BYTES and not read_text(label).strip() for label, size in sizes)


def are_rows(text: str) -> bool:
    """Check whether the first row looks like YOLO, or there is none."""
    words = next((line.split() for line in text.splitlines() if line.strip()), None)
    return words is None or (len(words) >= 5 and _parse_row(words) is not None)


def _read_images(
    paths: Sequence[str], labels: Sequence[str], reading: FormatReading, keypoints: int, states_empty: bool
) -> list[AnnotatedImage]:
    """Read the label files of images, "" for none.

    Unlabelled images are left out.

    Args:
        states_empty: images without objects have empty files.
    """
    bare = labels.count("")
    unlabelled = bare if states_empty or bare > len(labels) / 2 else 0
    if unlabelled:
        paths = [path for path, label in zip(paths, labels, strict=True) if label]
        labels = list(filter(None, labels))
    texts = list(map_in_order(lambda label: read_text(label) if label else "", labels, bar="labels"))
    images, scores = [], 0
    named, numbers = bool(reading.classes), {number - 1 for number in reading.classes.values()}
    for path, label, text, size in zip(paths, labels, texts, sizes_of(paths), strict=True):
        rows = []
        for number, line in enumerate(text.splitlines(), start=1):
            if words := line.split():
                row = _parse_row(words)
                fault = _row_fault(row, words, keypoints)
                if row and not fault and named and row[0] not in numbers:
                    fault = f"class {row[0]} is not among the {counted(len(numbers), 'class')} of the data set"
                if fault:
                    reading.faults.append(f"{label}: line {number}: {fault}")
                elif row:
                    scores += len(row[1]) % 2 and not _has_keypoints(row[1], keypoints)
                    rows.append(row)
        if rows and 0 in size and os.path.isfile(path):
            reading.faults.append(f"{path}: cannot be read as an image")
        if not named:
            reading.classes |= {f"class {number}": number + 1 for number, _ in rows}
        names = {number: name for name, number in reading.classes.items()}
        objects = [_object(names[number + 1], values, size, keypoints) for number, values in rows]
        images.append(AnnotatedImage(path, size, objects))
    _remark_bare(reading, images, bare, unlabelled)
    if scores:
        reading.remarks.append(f"{counted(scores, 'row')} with a score, which is ignored")
    if not named:
        reading.classes = dict(sorted(reading.classes.items(), key=lambda item: item[1]))
    return images


def _remark_bare(reading: FormatReading, images: Sequence[AnnotatedImage], bare: int, unlabelled: int) -> None:
    """Count images without a label file: none or all are unlabelled."""
    remark_unlabelled(reading, images, unlabelled, "a txt", "save an empty txt")
    if bare > unlabelled:
        reading.remarks.append(
            f"{bare:,} of {counted(len(images), 'image')} have no txt: taken as without objects, as YOLO defines it. "
            "If they are not labelled yet, save an empty txt for an image that has no objects: then they are left out"
        )


def _parse_row(words: Sequence[str]) -> _Row | None:
    """Parse a class number and numbers, None for other words."""
    try:
        number, *values = map(float, words)
    except ValueError:
        return None
    if not number.is_integer() or not 0 <= number < CLASS_LIMIT or not all(map(math.isfinite, values)):
        return None
    return int(number), values


def _has_keypoints(values: Sequence[float], keypoints: int) -> bool:
    return bool(keypoints) and len(values) == 4 + keypoints


def _row_fault(row: _Row | None, words: Sequence[str], keypoints: int) -> str:
    if row is None:
        return f"{' '.join(words)!r:.60} is no class number and numbers"
    if len(row[1]) < 4:
        return f"{counted(len(row[1]), 'number')} after the class: a box has 4, a polygon 6 or more"
    values = row[1][: 4 if _has_keypoints(row[1], keypoints) else len(row[1]) // 2 * 2]
    if odd := next((value for value in values if not -MOST_OUTSIDE <= value <= 1 + MOST_OUTSIDE), None):
        return f"{odd:g} is no share of the image, from 0 to 1"
    return ""


def _object(name: str, values: Sequence[float], size: tuple[int, int], keypoints: int) -> AnnotatedObject:
    width, height = size
    if len(values) < 6 or _has_keypoints(values, keypoints):
        x, y, w, h = values[:4]
        box = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
        return AnnotatedObject(name, [round(value, 4) for value in box], None)
    numbers = values[: len(values) // 2 * 2]
    polygon = [round(value * (height if at % 2 else width), 4) for at, value in enumerate(numbers)]
    return AnnotatedObject(name, None, [polygon])


def _read_mapping(path: Path) -> dict[Any, Any]:
    try:
        content = load_yaml(read_text(path))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path}: is not valid YAML: {error}. Write it again.") from None
    if not isinstance(content, dict) or "names" not in content:
        raise UserError(f"{path}: has no names of classes. Name a data.yaml of YOLO.")
    return content


def _read_classes(names: Any, path: Path) -> dict[str, int]:
    """Return category ids, which are the class numbers plus 1."""
    pairs = (
        list(names.items()) if isinstance(names, dict) else list(enumerate(names if isinstance(names, list) else []))
    )
    classes: dict[str, int] = {}
    for key, name in pairs:
        number = int(key) if str(key).isdecimal() and len(str(key)) < 7 else None
        if number is None or isinstance(name, (dict, list)) or name is None:
            raise UserError(
                f"{path}: names: {key!r:.40}: {name!r:.40} is no class. Write a number and a name for each."
            )
        if not str(name).strip():
            continue
        if str(name) in classes:
            raise UserError(f"{path}: names: {str(name)!r} is there twice. Give each class its own name.")
        classes[str(name)] = number + 1
    if not classes:
        raise UserError(f"{path}: names: {names!r:.40} has no classes. List them.")
    return dict(sorted(classes.items(), key=lambda item: item[1]))


def _count_keypoints(shape: Any, path: Path) -> int:
    if shape is None:
        return 0
    if isinstance(shape, list) and len(shape) == 2 and all(type(one) is int and 0 < one < 10_000 for one in shape):
        return int(shape[0] * shape[1])
    raise UserError(f"{path}: kpt_shape: {shape!r:.40}. Write [number of keypoints, 2 or 3], or leave it out.")


def _bases(root: Any, path: Path, images: Path | None) -> list[Path]:
    """List the folders to which a data.yaml may be relative."""
    here = path.absolute().parent
    places = [here / root.replace("\\", "/")] if isinstance(root, str) and root else []
    places += [here, *([images.absolute(), images.absolute().parent] if images else [])]
    return [place for place in dict.fromkeys(map(Path, map(os.path.normpath, places))) if place.is_dir()]


def _images_of(entry: str, bases: Sequence[Path]) -> list[str]:
    """List the images of a folder or a text file, absolute.

    Roboflow writes `../train/images` for `train/images`. Raises FileNotFoundError if nothing is there.
    """
    text = entry.replace("\\", "/")
    for word in dict.fromkeys((text, text.removeprefix("../").removeprefix("../"))):
        for base in bases:
            place = Path(os.path.normpath(base / word))
            if place.is_dir():
                return [str(place / name) for name in relative_files(place) if is_image_name(name)]
            if place.is_file():
                lines = filter(None, map(str.strip, read_text(place).splitlines()))
                return [_listed(line.replace("\\", "/"), place.parent, bases) for line in lines]
    raise FileNotFoundError(entry)


def _listed(line: str, parent: Path, bases: Sequence[Path]) -> str:
    places = [os.path.normpath(base / line) for base in (parent, *bases)]
    return next((place for place in places if os.path.isfile(place)), places[0])


def _parallel(image: str) -> str:
    """Return the folder `labels` parallel to the last `images`, or ""."""
    before, found, after = os.path.dirname(image).rpartition(f"{os.sep}images")
    return f"{before}{os.sep}labels{after}" if found and after[:1] in ("", os.sep) else ""


def _label_of(image: str) -> str:
    """Find the label file as ultralytics does, or return ""."""
    name = os.path.splitext(os.path.basename(image))[0] + ".txt"
    places = [os.path.join(folder, name) for folder in (_parallel(image), os.path.dirname(image)) if folder]
    return next((place for place in places if os.path.isfile(place)), "")


def _lost_labels(used: set[str]) -> list[str]:
    """List unused label files next to used ones, in folders `labels`."""
    folders = sorted({os.path.dirname(path) for path in used if f"{os.sep}labels{os.sep}" in path})
    names = [(folder, name) for folder in folders for name in sorted(os.listdir(folder)) if name not in CLASS_FILES]
    return [path for path in (os.path.join(*one) for one in names) if path.endswith(".txt") and path not in used]


def _find_classes(folder: Path, images: Path, reading: FormatReading) -> dict[str, int]:
    """Read class names in or above the folders of labels and images."""
    for place in dict.fromkeys((folder, folder.absolute().parent, images, images.parent)):
        for name in CLASS_FILES:
            if (place / name).is_file():
                lines = [line.strip() for line in read_text(place / name).splitlines()]
                names = lines[: max((at for at, line in enumerate(lines, start=1) if line), default=0)]
                return _read_classes(names, place / name)
    reading.remarks.append("no classes.txt or data.yaml: classes have their numbers as names")
    return {}
