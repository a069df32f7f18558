"""Annotated images of any format, the search for their image files, and their COCO form."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from crossmae.data.images import read_header
from crossmae.data.parallel import map_in_order
from crossmae.data.paths import COMPANIONS, IMAGE_SUFFIXES, walk_files
from crossmae.errors import UserError, counted, printable
from crossmae.files import write_text

UNSPLIT = "all"  # the split of annotations that know no splits
SPLIT_NAMES = {"train": "train", "val": "val", "dev": "val", "test": "test"}  # by the start of the word
SPLIT_WORD = re.compile(r"(train|val|dev|test)(ing|id|idation)?[_-]?(\d{4})?", re.IGNORECASE)
IMAGE_FOLDERS = ("images", "JPEGImages", "imgs", "img", "image", "pictures", "photos")
# Folders that say what a file is, not which image it belongs to.
ROLES = COMPANIONS | {name.lower() for name in IMAGE_FOLDERS} | {"xml", "xmls", "json", "txt", "ann"}
FAULTS_SHOWN = 5  # faults in an error


class AnnotatedObject(NamedTuple):
    """An object: class, box (x, y, width, height) in pixels, and a COCO segmentation or None.

    Without a box, the box of the polygons counts.
    """

    name: str
    box: Sequence[float] | None
    mask: list[list[float]] | dict[str, Any] | None


class AnnotatedImage(NamedTuple):
    """An image: path of its file, width, height (0 if unknown), and its objects."""

    path: str
    size: tuple[int, int]
    objects: list[AnnotatedObject]


@dataclass
class FormatReading:
    """Content of label files of one format.

    Attributes:
        format: name of the format.
        splits: images by split. `UNSPLIT` is the only key if the files know no splits.
        classes: category ids by class name. If empty, classes are numbered by name from 1.
        faults: lines `<file>: <what is wrong>`. Any fault is an error.
        remarks: lines for the log.
    """

    format: str
    splits: dict[str, list[AnnotatedImage]] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def raise_faults(self, labels: Path) -> None:
        """Raise a UserError with the first faults, if any."""
        if self.faults:
            first, *others = map(printable, self.faults[:FAULTS_SHOWN])
            more = len(self.faults) - FAULTS_SHOWN
            rest = [f"    {line}" for line in others] + [f"    and {more:,} more"] * (more > 0)
            count = f" ({counted(len(self.faults), 'fault')} of this kind or another)" if rest else ""
            raise UserError(f"{labels}: read as {self.format}: {first}{count}. Correct the files.", *rest)


@dataclass(frozen=True)
class AnnotatedSplit:
    """Images and annotations of one split in COCO form. File names are relative to the folder `images`.

    `json_path` is the file that already holds the content, if any.
    """

    images: Path
    content: dict[str, Any]
    json_path: Path | None = None


@dataclass(frozen=True)
class AnnotationSet:
    """Annotations of all splits, the name of their format, and remarks for the log."""

    format: str
    splits: dict[str, AnnotatedSplit]
    remarks: list[str]

    @property
    def has_splits(self) -> bool:
        """True if the annotations came with splits."""
        return UNSPLIT not in self.splits


def split_name(word: str) -> str:
    """Return "train", "val" or "test" for names such as "valid", else ""."""
    match = SPLIT_WORD.fullmatch(word)
    return SPLIT_NAMES[match[1].lower()] if match else ""


def split_of(path: str) -> str:
    """Return the split that a folder in the path names, or ""."""
    return next(filter(None, map(split_name, path.split("/")[:-1])), "")


def group_by_split(reading: FormatReading, images: Sequence[tuple[str, AnnotatedImage]]) -> None:
    """Fill `reading.splits` by folders named as splits.

    Args:
        images: path relative to the labels, with separators "/", and image.
    """
    groups: dict[str, list[AnnotatedImage]] = defaultdict(list)
    for path, image in images:
        groups[split_of(path)].append(image)
    if "" in groups or len(groups) < 2:
        named = sorted(filter(None, groups))
        if "" in groups and named:
            outside = counted(len(groups[""]), "image")
            reading.remarks.append(f"folders named {' and '.join(named)} are no splits: {outside} are outside of them")
        reading.splits = {UNSPLIT: [image for _, image in images]}
    else:
        reading.splits = {name: groups[name] for name in ("train", "val", "test") if name in groups}


def remark_unlabelled(
    reading: FormatReading, images: Sequence[AnnotatedImage], unlabelled: int, label: str, statement: str
) -> None:
    """Add a remark that counts labelled and unlabelled images, if any.

    Args:
        images: labelled images.
        unlabelled: images that are left out.
        label: what these images lack, in words.
        statement: what states that an image has no objects, as an imperative.
    """
    if unlabelled:
        empty = sum(not image.objects for image in images)
        reading.remarks.append(
            f"{len(images):,} of {counted(len(images) + unlabelled, 'image')} are labelled, {empty:,} of them without "
            f"objects. Left out as unlabelled: {unlabelled:,} without {label}. For an image that has no objects, "
            f"{statement}"
        )


def relative_files(folder: Path) -> list[str]:
    """List all files under a folder, relative, with separators "/", sorted."""
    start = len(os.path.join(folder, ""))
    return sorted(path[start:].replace(os.sep, "/") for path in walk_files(folder, []))


def is_image_name(name: str) -> bool:
    """Check the suffix of a file name, in any case."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


class ImageFinder:
    """Image files of a folder, found by the names of label files.

    `train/labels/a.txt` finds `train/images/a.jpg` and `images/train/a.JPG`: folders in `ROLES` do not count. If no
    such image exists, the only image of the same base name is found, in any folder. An image is not found by a label in
    a folder of other images: `b/a.txt` is not of `a/a.jpg` if there are images in `b`.
    """

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        self.folder = os.path.abspath(folder)
        self.names = [name for name in names if is_image_name(name)]
        self._by_key: dict[tuple[str, ...], list[str]] = defaultdict(list)
        self._by_stem: dict[str, list[str]] = defaultdict(list)
        for name in self.names:
            key = _key(name)
            self._by_key[key].append(name)
            self._by_stem[key[-1]].append(name)
        self._folders = {part for key in self._by_key for part in key[:-1]}

    def path(self, name: str) -> str:
        """Return the absolute path of one of `names`."""
        return os.path.join(self.folder, name)

    def count_others(self, paths: Iterable[str]) -> int:
        """Count the images that are not among absolute paths."""
        known = set(map(os.path.normpath, paths))
        return sum(os.path.normpath(self.path(name)) not in known for name in self.names)

    def find(self, label: str, named: str = "") -> list[str]:
        """Find the images of a label file, best matches only.

        Args:
            label: path of the label file relative to the folder of labels.
            named: file name of the image in the label file, which decides between equal base names.
        """
        for stem in dict.fromkeys(filter(None, (named, label))):
            key = _key(os.path.join(os.path.dirname(label), os.path.basename(stem)))
            foreign = self._folders.intersection(key[:-1])
            near = [name for name in self._by_stem.get(key[-1], []) if foreign <= set(_key(name)[:-1])]
            found = self._by_key.get(key) or near
            exact = [name for name in found if _stem(name) == _stem(stem)]
            whole = (os.path.basename(named), os.path.splitext(os.path.basename(label))[0])  # `a.jpg.txt`
            same = [name for name in exact if os.path.basename(name) in whole]
            if found:
                return same or exact or found
        return []


def _stem(name: str) -> str:
    stem, suffix = os.path.splitext(os.path.basename(name))
    if suffix.lower() not in IMAGE_SUFFIXES and is_image_name(stem):  # `a.jpg.txt`
        stem = os.path.splitext(stem)[0]
    return stem


def _key(name: str) -> tuple[str, ...]:
    folders = (split_name(part) or part.lower() for part in name.replace("\\", "/").split("/")[:-1])
    return (*(part for part in folders if part not in ROLES), _stem(name).casefold())


def sizes_of(paths: Sequence[str]) -> list[tuple[int, int]]:
    """Read (width, height) after the EXIF orientation, (0, 0) for unreadable files."""

    def read(path: str) -> tuple[int, int]:
        try:
            width, height = read_header(Path(path)).turned
        except Exception:  # Pillow raises many types of errors for damaged headers, which the checks report
            return 0, 0
        return width, height

    return list(map_in_order(read, paths, bar="image sizes"))


def with_sizes(images: Sequence[AnnotatedImage]) -> list[AnnotatedImage]:
    """Read the sizes of images whose size is unknown."""
    unknown = [image.path for image in images if 0 in image.size]
    known = dict(zip(unknown, sizes_of(unknown), strict=True)) if unknown else {}
    return [image._replace(size=known.get(image.path, image.size)) for image in images]


def build_set(reading: FormatReading, labels: Path, folder: Path | None) -> AnnotationSet:
    """Convert a reading to COCO form.

    Args:
        folder: folder that file names are relative to. None: the common folder of the images of each split.

    Raises UserError if the reading has faults, no images, or images outside of the folder.
    """
    reading.raise_faults(labels)
    everything = [image for images in reading.splits.values() for image in images]
    if not everything:
        raise UserError(f"{labels}: read as {reading.format}: there are no images. Name another folder.")
    names = sorted({one.name for image in everything for one in image.objects})
    classes = reading.classes or {name: number for number, name in enumerate(names, start=1)}
    splits = {}
    for split, images in reading.splits.items():
        parent = Path(os.path.abspath(folder)) if folder else common_folder([image.path for image in images])
        splits[split] = AnnotatedSplit(parent, build_content(images, classes, parent))
    return AnnotationSet(reading.format, splits, reading.remarks)


def common_folder(paths: Sequence[str]) -> Path:
    """Return the deepest folder with all files."""
    return Path(os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths] or [os.getcwd()]))


def build_content(images: Sequence[AnnotatedImage], classes: Mapping[str, int], folder: Path) -> dict[str, Any]:
    """Build the content of a COCO file, sorted by image name.

    Raises UserError if an image is not in the folder.
    """
    entries, annotations = [], list[dict[str, Any]]()
    named = ((Path(os.path.relpath(image.path, folder)).as_posix(), image) for image in images)
    for number, (name, image) in enumerate(sorted(named, key=lambda one: one[0]), start=1):
        if name.startswith("../"):
            raise UserError(f"{printable(image.path)}: is not in the image folder {folder}. Name a folder above both.")
        entries.append({"id": number, "file_name": name, "width": image.size[0], "height": image.size[1]})
        for one in image.objects:
            box, area = _measure(one)
            entry: dict[str, Any] = {"id": len(annotations) + 1, "image_id": number, "category_id": classes[one.name]}
            entry |= {"bbox": box, "area": area, "iscrowd": 0}
            annotations.append(entry | ({"segmentation": one.mask} if one.mask else {}))
    categories = [{"id": number, "name": name} for name, number in classes.items()]
    return {"images": entries, "annotations": annotations, "categories": categories}


def write_content(path: Path, content: Mapping[str, Any]) -> None:
    """Write the content of a COCO file, atomically."""
    write_text(path, json.dumps(content, ensure_ascii=False) + "\n")


def _measure(one: AnnotatedObject) -> tuple[list[float], float]:
    """Return the box and the area of an object, in pixels."""
    polygons = one.mask if isinstance(one.mask, list) else []
    box = list(one.box) if one.box is not None else _box_of([value for polygon in polygons for value in polygon])
    if isinstance(one.mask, dict):
        return box, float(sum(one.mask["counts"][1::2]))
    return box, sum(map(_polygon_area, polygons)) or box[2] * box[3]


def _box_of(values: Sequence[float]) -> list[float]:
    x, y = values[::2], values[1::2]
    return [min(x), min(y), max(x) - min(x), max(y) - min(y)] if x and y else [0.0, 0.0, 0.0, 0.0]


def _polygon_area(polygon: Sequence[float]) -> float:
    x, y = polygon[::2], polygon[1::2]
    return abs(sum(x[i - 1] * y[i] - x[i] * y[i - 1] for i in range(len(y)))) / 2
