"""Repairs of a COCO file whose oddities have one meaning, before anything judges the file.

Only keys that a run reads are looked at. Text becomes numbers, and what is missing is read off the image or the mask.
Every repair is recorded by kind and position, and reported as information. What has no single meaning is left as it
is, so that the checks reject it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, compress, count
from operator import itemgetter
from reprlib import repr as short
from typing import Any

import numpy as np

from det.data.coco_masks import COMPRESSED, LARGEST_SIDE, NUMBERS, Floats, flatten, mask_fault, measure_masks
from det.data.loose_forms import ROTATION_KEYS, as_box, as_mask, as_number, as_whole_number, by_axis, is_empty

LARGEST_AREA = 1e5**2  # square pixels; evaluators ignore larger objects
LARGEST_ID = 2**63 - 1  # of arrays; evaluators fail above it, and treat some ids below 0 as missing
READ_KEYS = {
    "images": ("id", "file_name", "coco_url", "width", "height", "neg_category_ids", "not_exhaustive_category_ids"),
    "annotations": ("id", "image_id", "category_id", "bbox", "area", "iscrowd", "ignore", "segmentation"),
    "categories": ("id", "name", "frequency", "supercategory"),
}
DEFAULTS = {"area": 0, "iscrowd": 0, "ignore": 0}
NO_ID = -1  # stands for text that is the id of no image or category
LVIS_LISTS = ("neg_category_ids", "not_exhaustive_category_ids")
FLAGS = {"0": 0, "1": 1, "false": 0, "true": 1, "no": 0, "yes": 1, "f": 0, "t": 1, "n": 0, "y": 1}

Entries = list[dict[str, Any]]
ImageSize = tuple[int, int]
RepairNotes = dict[str, dict[int, str]]
# Reads width and height of image files, named as in `file_name`; None for a file that cannot be read.
SizeReader = Callable[[Sequence[str]], Iterable[ImageSize | None]]
# Finds files for the names that do not exist as written: paths by name, and reasons by name for the others.
FileFinder = Callable[[Sequence[str]], tuple[dict[str, str], dict[str, str]]]


@dataclass(frozen=True)
class Tidy:
    """A COCO content with entries at the positions of the `file`, and a record of the repairs.

    `mended` has a note by kind and position. Categories at the positions `left_out` are no classes. `written` has the
    ids of images and categories as the file has them, by the number in `content`, where the two differ. `moved` has
    paths of image files by the name as written, and `missing` has reasons by name. `columns` has the annotations of
    `content` if keys and types of all are known to be right.
    """

    file: dict[str, Any]
    content: dict[str, Any]
    mended: RepairNotes
    left_out: frozenset[int]
    written: dict[str, dict[int, Any]]
    moved: dict[str, str]
    missing: dict[str, str]
    columns: Columns | None

    @property
    def sound(self) -> bool:
        """True if keys and types of all annotations are right."""
        return self.columns is not None


class Columns:
    """Values of N annotations by key, each read once.

    A look at one column after another is several times faster than at one annotation after another.
    """

    def __init__(self, entries: Entries) -> None:
        self.entries = entries
        self._found: dict[str, list[Any] | None] = {}
        self._read: dict[str, list[Any]] = {}

    def find(self, key: str) -> list[Any] | None:
        """Return the values of a key that all annotations have, or None."""
        if key not in self._found:
            try:
                self._found[key] = list(map(itemgetter(key), self.entries))
            except KeyError:
                self._found[key] = None
        return self._found[key]

    def read(self, key: str) -> list[Any]:
        """Return the values of a key, with `DEFAULTS` for absent ones."""
        if (found := self.find(key)) is not None:
            return found
        if key not in self._read:
            self._read[key] = [entry.get(key, DEFAULTS.get(key)) for entry in self.entries]
        return self._read[key]

    @cached_property
    def boxes(self) -> Floats:
        """Boxes (N, 4), if all are lists of four numbers."""
        return flatten(self.read("bbox")).reshape(-1, 4)

    @cached_property
    def areas(self) -> Floats:
        """Areas (N,), if all are numbers or absent."""
        return flatten([self.read("area")])


def tidy(
    content: dict[str, Any],
    *,
    masks: bool,
    find_files: FileFinder | None = None,
    read_sizes: SizeReader | None = None,
    keep: Collection[str] = (),
) -> Tidy:
    """Repair what has one meaning, and strip odd entries to known keys.

    The given content is unchanged. Lists without oddities are passed on as they are.

    Args:
        content: from `det.data.coco.read_coco`.
        masks: masks are read. Otherwise no annotation keeps its mask.
        find_files: finds image files that have another name.
        read_sizes: reads sizes that the file lacks.
        keep: names of categories that are never left out, such as the classes of the training data.
    """
    mended: RepairNotes = defaultdict(dict)
    category_ids = _Ids(content["categories"], "name")
    image_ids = _Ids(content["images"], "file_name")
    categories = _tidy_categories(content["categories"], category_ids, mended)
    images = _tidy_images(content["images"], image_ids, category_ids, mended)
    names = [name for entry in images if isinstance(name := image_name(entry), str) and name]
    moved, missing = find_files(names) if find_files else ({}, {})
    if moved:
        images = _with_paths(images, moved, mended)
    _tidy_sizes(images, read_sizes, mended)
    lvis = any(LVIS_LISTS[0] in image for image in images)
    annotations = content["annotations"]
    columns = Columns(annotations)
    odd = odd_parts(columns, lvis, masks) | ({"references"} if image_ids.written or category_ids.written else set())
    if odd:
        annotations = _Annotations(images, image_ids, category_ids, lvis, masks, mended).tidy(annotations, odd)
        columns = Columns(annotations)
        odd = odd_parts(columns, lvis, masks)
    elif not masks:
        annotations = [{key: entry[key] for key in entry if key != "segmentation"} for entry in annotations]
        columns = Columns(annotations)
    used = {number for number in columns.read("category_id") if type(number) is int}
    left_out = {} if lvis else _left_out(categories, used, keep)
    if left_out:
        mended["root-category"] = left_out
    return Tidy(
        content,
        {**content, "images": images, "annotations": annotations, "categories": categories},
        dict(mended),
        frozenset(left_out),
        {"images": image_ids.written, "categories": category_ids.written},
        moved,
        missing,
        None if odd else columns,
    )


def _stripped(entry: dict[str, Any], where: str) -> dict[str, Any]:
    return {key: entry[key] for key in READ_KEYS[where] if key in entry}


class _Ids:
    """Numbers of the ids of images or categories, which may be text, negative, too large, or floats.

    An id that is a number, as "7" and 7.0, keeps it. Others get free numbers, in the order of the texts. If two texts
    are the same number, as "7" and "007", no text counts as a number. `written` has ids that differ from their number.
    """

    def __init__(self, entries: Entries, name: str) -> None:
        self.entries, self.name = entries, name
        ids = [entry.get("id") for entry in entries]
        self.written: dict[int, Any] = {}
        if set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) <= LARGEST_ID:  # type: ignore[type-var, operator]
            self.numbers: dict[Any, int] = dict(zip(ids, ids, strict=True))  # type: ignore[arg-type]
            return
        usable = list(dict.fromkeys(value for value in ids if type(value) in (int, float, str) and value != ""))
        whole = {value: as_whole_number(value) for value in usable}
        texts = Counter(number for value, number in whole.items() if isinstance(value, str) and number is not None)
        clash = any(times > 1 for times in texts.values())
        self.numbers = {}
        for value, number in whole.items():
            if number is not None and 0 <= number <= LARGEST_ID and not (clash and isinstance(value, str)):
                self.numbers |= {value: number, number: number}
        taken = set(self.numbers.values())
        free = (number for number in count(1) if number not in taken)
        others = [value for value in usable if value not in self.numbers and not isinstance(value, float)]
        self.numbers |= zip(sorted(others, key=lambda value: (isinstance(value, str), value)), free, strict=False)
        for value in usable:
            if (number := self.numbers.get(value)) is not None and (type(value) is not int or value != number):
                self.written[number] = value

    @cached_property
    def _by_name(self) -> dict[str, int]:
        """Numbers of entries whose name no other entry has."""
        names = Counter(_text(entry.get(self.name)) for entry in self.entries)
        unique = [entry for entry in self.entries if names[name := _text(entry.get(self.name))] == 1 and name]
        return {entry[self.name]: number for entry in unique if (number := self.find_id(entry.get("id"))) is not None}

    def find_id(self, written: Any) -> int | None:
        """Find the number of an id as the file has it."""
        return self.numbers.get(written) if type(written) in (int, float, str) else None

    def find(self, reference: Any) -> int | None:
        """Find the number of an id in any spelling, or a name."""
        if type(reference) not in (int, float, str):
            return None
        for spelling in (reference, as_whole_number(reference), str(reference)):
            if spelling in self.numbers:
                return self.numbers[spelling]
        return self._by_name.get(reference)


def _tidy_categories(entries: Entries, ids: _Ids, mended: RepairNotes) -> Entries:
    tidied = []
    for at, entry in enumerate(entries):
        changed: dict[str, Any] = {}
        number, name = ids.find_id(entry.get("id")), entry.get("name")
        if number in ids.written:
            changed["id"] = number
            mended["mended-category-id"][at] = f"id {short(entry['id'])} counts as {number}"
        if type(name) in (int, float):
            changed["name"] = str(name)
            mended["mended-category-name"][at] = f"name {name} is read as text"
        tidied.append(_stripped(entry, "categories") | changed if changed else entry)
    return tidied


def _tidy_images(entries: Entries, ids: _Ids, category_ids: _Ids, mended: RepairNotes) -> Entries:
    """Replace ids by numbers, and sizes by whole numbers."""
    if not ids.written and not category_ids.written and all(_has_size(entry) for entry in entries):
        return entries
    tidied = []
    for at, entry in enumerate(entries):
        entry = _stripped(entry, "images")
        number = ids.find_id(entry.get("id"))
        if number in ids.written:
            mended["mended-image-id"][at] = f"id {short(entry['id'])} counts as {number}"
            entry["id"] = number
        for key in ("width", "height"):
            side = as_whole_number(entry.get(key))
            if side and type(entry[key]) is not int:
                mended["mended-size"][at] = f"{key} {short(entry[key])} is read as {side}"
                entry[key] = side
        for key in LVIS_LISTS:
            if isinstance(entry.get(key), list):
                entry[key] = [value if (found := category_ids.find(value)) is None else found for value in entry[key]]
        tidied.append(entry)
    return tidied


def _with_paths(images: Entries, moved: dict[str, str], mended: RepairNotes) -> Entries:
    renamed = []
    for at, entry in enumerate(images):
        name = image_name(entry)
        if isinstance(name, str) and name in moved:
            mended["moved-image"][at] = f"{name} is there as {moved[name]}"
            entry = {**entry, "file_name": moved[name]}
        renamed.append(entry)
    return renamed


def _has_size(entry: dict[str, Any]) -> bool:
    return all(type(entry.get(key)) is int and 1 <= entry[key] <= LARGEST_SIDE for key in ("width", "height"))


def _tidy_sizes(images: Entries, read_sizes: SizeReader | None, mended: RepairNotes) -> None:
    """Read sizes that are no positive numbers from the image files."""
    named = {at: image_name(entry) for at, entry in enumerate(images) if not _has_size(entry)}
    wanted = {at: name for at, name in named.items() if isinstance(name, str) and name}
    if read_sizes is None or not wanted:
        return
    for (at, _), size in zip(wanted.items(), read_sizes(list(wanted.values())), strict=True):
        if size is not None:
            old = [short(images[at].get(key)) for key in ("width", "height")]
            mended["size-from-file"][at] = f"width {old[0]} and height {old[1]}: the file has {size[0]}x{size[1]}"
            images[at] = {**images[at], "width": size[0], "height": size[1]}


def image_name(image: dict[str, Any]) -> Any:
    """Return `file_name`, or for LVIS the folder and file of `coco_url`."""
    url = image.get("coco_url")
    if image.get("file_name") is not None or not isinstance(url, str):
        return image.get("file_name")
    return "/".join(url.split("/")[-2:])


def _left_out(categories: Entries, used: set[int], keep: Collection[str]) -> dict[int, str]:
    """Find repeated categories, and among those without objects repeated names and roots."""
    names, parents = ([_text(entry.get(key)) for entry in categories] for key in ("name", "supercategory"))
    in_use = [type(entry.get("id")) is int and entry["id"] in used for entry in categories]
    named, children = set(compress(names, in_use)), Counter(parents)
    left_out, seen = {}, set[tuple[str, str]]()
    for at, (name, parent) in enumerate(zip(names, parents, strict=True)):
        entry = (name, short(categories[at].get("id")))
        if name and entry in seen:
            left_out[at] = f"{name!r} is there before, with the same id"
        seen.add(entry)
        if in_use[at] or not name:
            continue
        is_root = 0 < children[name] - (parent == name) == len(names) - 1 and (parent == name or parent not in names)
        if name in named:
            left_out[at] = f"{name!r} has no objects, and another category of this name has"
        elif is_root and (name not in keep or names.count(name) > 1):
            left_out[at] = f"{name!r} has no objects, and is the supercategory of all others"
    return left_out


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


@dataclass
class _Annotations:
    """Repair of annotations, entry by entry, on tidy images."""

    images: Entries
    image_ids: _Ids
    category_ids: _Ids
    lvis: bool
    masks: bool
    mended: RepairNotes

    def tidy(self, entries: Entries, odd: set[str]) -> Entries:
        """Repair the odd parts of copies of the entries."""
        tidied = [_stripped(entry, "annotations") for entry in entries]
        for entry, written in zip(tidied, entries, strict=True):
            if isinstance(box := entry.get("bbox"), dict):  # whose turn may be next to it
                entry["bbox"] = {key: written[key] for key in ROTATION_KEYS if key in written} | box
        for part, mend in {
            "references": self._mend_references,
            "flags": self._mend_flags,
            "boxes": self._mend_box,
            "areas": self._mend_area,
            "masks": self._mend_mask,
        }.items():
            for at, entry in enumerate(tidied) if part in odd else ():
                mend(at, entry)
        if odd & {"boxes", "areas"}:
            self._measure(tidied, entries)
        if "ids" in odd:
            self._number(tidied)
        if not self.masks:
            for entry in tidied:
                entry.pop("segmentation", None)
        return tidied

    def _mend_references(self, at: int, entry: dict[str, Any]) -> None:
        for key, ids in (("image_id", self.image_ids), ("category_id", self.category_ids)):
            written = entry.get(key)
            number = ids.find(written)
            if number is None:
                # A number that the file does not have may be the one that stands for another id.
                entry |= {key: NO_ID} if type(written) in (int, str) and (ids.written or type(written) is str) else {}
            elif type(written) is not int or written != number:
                entry[key] = number
                if ids.find_id(written) is None or (number not in ids.written and type(written) is not int):
                    self.mended["mended-reference"][at] = f"{key} {short(written)} is read as {number}"

    def _mend_flags(self, at: int, entry: dict[str, Any]) -> None:
        for key in ("iscrowd", "ignore"):
            written = entry.get(key)
            if (type(written) is int and written in (0, 1)) or (key not in entry and (self.lvis or key == "ignore")):
                continue
            flag = _flag(written)
            if flag is not None:
                was = short(written) if key in entry else "is missing, and"
                self.mended["mended-flag"][at] = f"{key} {was} counts as {flag}"
                entry[key] = flag

    def _mend_box(self, at: int, entry: dict[str, Any]) -> None:
        """Read a box, or set it to None until it is measured."""
        if "bbox" in entry:
            box = as_box(entry["bbox"])
            if box is not None and box is not entry["bbox"]:
                self.mended["mended-box"][at] = f"bbox {short(entry['bbox'])} is read as {short(box)}"
            entry["bbox"] = box

    def _mend_area(self, at: int, entry: dict[str, Any]) -> None:
        area = as_number(entry.get("area"))
        if type(area) in NUMBERS and type(entry["area"]) not in NUMBERS:
            self.mended["mended-area"][at] = f"area {short(entry['area'])} is read as {area}"
            entry["area"] = area

    def _mend_mask(self, at: int, entry: dict[str, Any]) -> None:
        polygon = by_axis(entry.get("segmentation"), entry.get("bbox"))
        if "segmentation" not in entry or (polygon is None and _are_masks([entry["segmentation"]])):
            return
        written = entry.pop("segmentation")
        mask = polygon or _read_mask(written)
        if mask is not None:
            entry["segmentation"] = mask
            if mask != written:
                self.mended["mended-mask"][at] = f"segmentation {short(written)} is read as {short(mask)}"

    def _measure(self, entries: Entries, written: Entries) -> None:
        """Read absent boxes and areas off masks, or areas off boxes."""
        rows = [at for at, entry in enumerate(entries) if _has_box(entry) is False or _lacks_area(entry)]
        sizes = {short(entry.get("id")): (entry["width"], entry["height"]) for entry in self.images if _has_size(entry)}
        masks = [_read_mask(entries[at].get("segmentation")) for at in rows]
        shapes = np.array([sizes.get(short(entries[at].get("image_id")), (np.inf, np.inf)) for at in rows], float)
        measured = measure_masks(masks, shapes.reshape(-1, 2))
        for row, at in enumerate(rows):
            entry, (left, top, right, bottom) = entries[at], measured.extent[row].tolist()
            faulty = any(row in faults for faults in measured.faults.values())
            if _has_box(entry) is False and not faulty and right > left and bottom > top:
                found = [left, top, right - left, bottom - top]
                self.mended["box-from-mask"][at] = f"bbox {short(written[at].get('bbox'))}: its mask has {short(found)}"
                entry["bbox"] = found
            elif (flipped := _flipped(entry.get("bbox"))) is not None:
                self.mended["mended-box"][at] = f"bbox {short(written[at]['bbox'])} is read as {short(flipped)}"
                entry["bbox"] = flipped
            elif entry.get("bbox", 0) is None:  # for the message of the fault
                entry["bbox"] = written[at]["bbox"]
            if _lacks_area(entry) and _has_box(entry):
                whose, area = "box", float(entry["bbox"][2] * entry["bbox"][3])
                if not faulty and measured.area[row] > 0:
                    whose, area = "mask", float(measured.area[row])
                self.mended["mended-area"][at] = f"area {short(entry.get('area'))}: its {whose} has {area:g}"
                entry["area"] = area

    def _number(self, entries: Entries) -> None:
        """Give free numbers to annotations without an id of their own."""
        seen: set[int] = set()
        again = []
        for at, entry in enumerate(entries):
            number = as_whole_number(entry.get("id"))
            if number is None or not 0 <= number <= LARGEST_ID or number in seen:
                again.append(at)
            else:
                seen.add(number)
                entry["id"] = number
        free = (number for number in count(1) if number not in seen)
        for at, number in zip(again, free, strict=False):
            self.mended["mended-annotation-id"][at] = f"id {short(entries[at].get('id'))} counts as {number}"
            entries[at]["id"] = number


def _flag(written: Any) -> int | None:
    if is_empty(written):
        return 0
    if isinstance(written, str):
        written = FLAGS.get(written.strip().lower(), as_number(written))
    return int(written) if type(written) in (bool, int, float) and written in (0, 1) else None


def _read_mask(written: Any) -> Any:
    try:
        return as_mask(written)
    except RecursionError:
        return written


def _has_box(entry: dict[str, Any]) -> bool | None:
    """Check for a box with width and height.

    Returns None for a value that is no box.
    """
    box = entry.get("bbox")
    if box is None:
        return False
    if type(box) is not list or len(box) != 4 or not NUMBERS.issuperset(map(type, box)):
        return None
    return bool(box[2] > 0 and box[3] > 0)


def _flipped(box: Any) -> list[float] | None:
    """Turn a box with a negative width or height around."""
    if type(box) is not list or len(box) != 4 or not NUMBERS.issuperset(map(type, box)):
        return None
    x, y, w, h = box
    found = [min(x, x + w), min(y, y + h), abs(w), abs(h)]
    return found if min(w, h) < 0 and min(found) >= 0 and w * h != 0 else None  # -1 often stands for nothing


def _lacks_area(entry: dict[str, Any]) -> bool:
    area = entry.get("area")
    return is_empty(area) or area == 0


def odd_parts(annotations: Columns, lvis: bool, masks: bool) -> set[str]:
    """Find the parts of annotations that are not all in COCO's form.

    Annotations without odd parts need no repair, and have none of the faults of keys and types. The parts are ids,
    references, flags, boxes, areas and masks.
    """

    def are_whole(*keys: str) -> bool:
        columns = [annotations.find(key) for key in keys]
        return all(column is not None and {int}.issuperset(map(type, column)) for column in columns)

    ids = annotations.read("id") if are_whole("id") else [-1]
    sound = {
        "ids": not ids or (min(ids) >= 0 and max(ids) <= LARGEST_ID and len(set(ids)) == len(ids)),
        "references": are_whole("image_id", "category_id"),
        "flags": (lvis or (are_whole("iscrowd") and set(annotations.read("iscrowd")) <= {0, 1}))
        and not any(entry["ignore"] != 0 for entry in annotations.entries if "ignore" in entry),
        "boxes": _are_boxes(annotations),
        "areas": _are_areas(annotations),
        "masks": not masks or (_are_masks(annotations.find("segmentation")) and not _any_by_axis(annotations)),
    }
    return {part for part, right in sound.items() if not right}


def _are_boxes(annotations: Columns) -> bool:
    boxes = annotations.find("bbox")
    if boxes is None or not {list}.issuperset(map(type, boxes)) or not {4}.issuperset(map(len, boxes)):
        return False
    return NUMBERS.issuperset(map(type, chain.from_iterable(boxes))) and bool((annotations.boxes[:, 2:] > 0).all())


def _are_areas(annotations: Columns) -> bool:
    areas = annotations.find("area")
    if areas is None or not NUMBERS.issuperset(map(type, areas)):
        return False
    return bool(((annotations.areas > 0) & (annotations.areas <= LARGEST_AREA)).all())


def _any_by_axis(annotations: Columns) -> bool:
    masks = annotations.read("segmentation")
    return any(
        by_axis(masks[row], annotations.entries[row].get("bbox")) for row, mask in enumerate(masks) if len(mask) == 2
    )


def _are_run_lengths(mask: dict[str, Any]) -> bool:
    return not mask_fault(mask) and (type(mask["counts"]) is list or COMPRESSED.fullmatch(mask["counts"]) is not None)


def _are_masks(masks: list[Any] | None) -> bool:
    """Check for lists of lists of numbers, or run lengths."""
    if masks is None or not all(masks) or not {list, dict}.issuperset(map(type, masks)):
        return False
    if not all(_are_run_lengths(mask) for mask in masks if type(mask) is dict):
        return False
    polygons = list(chain.from_iterable(mask for mask in masks if type(mask) is list))
    return (
        {list}.issuperset(map(type, polygons))
        and {0, 2}.isdisjoint(map(len, polygons))  # lists of two numbers may be points
        and NUMBERS.issuperset(map(type, chain.from_iterable(polygons)))
    )
