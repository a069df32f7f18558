"""Checks of a data set in COCO format, before detectron2 reads it.

`det.data.coco_kinds` lists the kinds of faults. Keys and types are checked entry by entry. Boxes, polygons and run
lengths of all entries without such a fault are then checked as arrays.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, repeat
from pathlib import Path
from reprlib import repr as short
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossmae.data.broken import find_broken
from crossmae.data.found_names import NOTHING_LIKE
from crossmae.data.images import ImageLimits, TooManyPixels, plain_jpeg_size, read_header
from crossmae.data.parallel import READERS, map_in_order
from crossmae.data.paths import are_files, join_names
from crossmae.data.sources.source import ImageFiles
from crossmae.errors import UserError, printable
from crossmae.files import paused_garbage_collection, special_kind
from det.config import image_limits
from det.data.coco_fit import Placed, corners_of, find_misfits
from det.data.coco_kinds import EVALUATION_KINDS, FREQUENCIES, KINDS, Kind, Rank
from det.data.coco_masks import LARGEST_SIDE, NUMBERS, Floats, Masks, measure_masks, no_masks
from det.data.coco_odd_masks import find_odd_masks
from det.data.loose_forms import ROTATION_KEYS, as_whole_number
from det.data.tidy import LARGEST_AREA, LARGEST_ID, LVIS_LISTS, Columns, Tidy, image_name

EDGE = 1.0  # tolerance in pixels for boxes that leave the image, because of rounding
AREA_SLACK = (10.0, 0.3)  # allowed difference of area and mask: pixels, plus a share of the larger area
# With masks, boxes are treated as corners [x1, y1, x2, y2] if at least the share AGREEING matches only as corners.
# Without masks: if more than the share LEAVING leaves the image by LEAVING_BY of its side, but FITTING fit as corners.
AGREE = 2.0  # pixels
AGREEING, LEAVING, LEAVING_BY, FITTING = 0.5, 0.2, 0.05, 0.95
COUNTED = 100  # objects of a class and image that AP counts, unless TEST.MAX_DETS is raised
MOSTLY = 0.5  # share of crowd regions above which iscrowd may be an error
LOOKS_AT_ONCE = 64  # image files per task of a thread
FIRST = 5  # number of entries that a message describes
_Note = Callable[[int], str]

_LEAVES = re.compile(r"^[/\\]|^[A-Za-z]:|(^|[/\\])\.\.([/\\]|$)")
_SURROGATE = re.compile(r"[\ud800-\udfff]")  # half a character: JSON allows it, but results files cannot have it


@dataclass(frozen=True)
class Finding:
    """All entries with one kind of fault.

    `positions` in the list `entries` rise, and there is at least one. `note` describes the fault at a position. `rank`
    is the rank of the kind, or INFORMATION if the fault does not matter for this use of the file.
    """

    kind: Kind
    rank: Rank
    entries: list[dict[str, Any]]
    positions: Sequence[int]
    note: _Note

    def first(self, count: int = FIRST) -> list[dict[str, Any]]:
        """Describe the first entries: position, id, and note."""
        first = []
        for position in self.positions[:count]:
            identity = self.entries[position].get("id")
            shown = identity if type(identity) is int else short(identity)
            first.append({"position": int(position), "id": shown, "note": printable(self.note(position))})
        return first

    def counted(self) -> str:
        """Format the number of entries, such as "2 of 9 images"."""
        return f"{len(self.positions)} of {len(self.entries)} {self.kind.where}"

    def ids(self) -> str:
        """List the ids of the first entries."""
        return ", ".join(self._with_dots(str(entry["id"]) for entry in self.first()))

    def places(self) -> list[str]:
        """Describe place, id and fault of the first entries."""
        where = self.kind.where
        texts = (f"{where}[{entry['position']}] (id {entry['id']}): {entry['note']}" for entry in self.first())
        return self._with_dots(text.removesuffix(": ") for text in texts)

    def _with_dots(self, texts: Iterable[str]) -> list[str]:
        return [*texts, "..."] if len(self.positions) > FIRST else list(texts)


class Findings:
    """Findings of one file, with the ids of the file. Kinds in `demoted` are only information."""

    def __init__(self, tidied: Tidy, demoted: Iterable[str] = ()) -> None:
        self.content, self.shown, self.left_out = tidied.content, tidied.file, tidied.left_out
        self.reasons = {name: reason for name, reason in tidied.missing.items() if reason != NOTHING_LIKE}
        self.demoted, self.all = frozenset(demoted), dict[str, Finding]()
        for name, notes in tidied.mended.items():
            self.add(name, notes)

    def add(self, name: str, found: Iterable[int] | Mapping[int, str], note: _Note | None = None) -> None:
        """Record positions, or notes by position, unless empty."""
        kind, positions = KINDS[name], sorted(found)
        if note is None:
            note = (lambda position: found[position]) if isinstance(found, Mapping) else (lambda position: "")
        if positions:
            rank = Rank.INFORMATION if name in self.demoted else kind.rank
            self.all[name] = Finding(kind, rank, self.shown[kind.where], positions, note)

    def forget(self, name: str, explained: Container[int]) -> None:
        """Remove positions that another kind explains."""
        if name in self.all:
            one = self.all.pop(name)
            if left := [position for position in one.positions if position not in explained]:
                self.all[name] = replace(one, positions=left)


def find_faults(
    tidied: Tidy,
    images: Path | None,
    *,
    for_evaluation: bool = False,
    masks: bool = False,
    limits: ImageLimits | None = None,
) -> list[Finding]:
    """Find faults and remarkable facts, in the order of `KINDS`.

    If the image folder `images` is None, image files are not checked. Missing keys of LVIS are faults only if
    `for_evaluation`, otherwise information. Masks are looked at only if `masks`.
    """
    found = Findings(tidied, () if for_evaluation else EVALUATION_KINDS)
    with paused_garbage_collection():
        categories, known = check_categories(found), _check_images(found)
        table = _check_annotations(found, known, categories, tidied.columns)
        measured = _check_masks(found, table, for_evaluation, tidied.sound) if masks else no_masks(len(table.position))
        _check_areas(found, table, measured)
        _check_boxes(found, table, measured)
        if is_lvis(tidied.content):
            _check_lvis(found)
    if images is not None:
        _check_files(found, images, known, limits or image_limits())
    return [found.all[name] for name in KINDS if name in found.all]


def is_lvis(content: dict[str, Any]) -> bool:
    """Check whether images list absent categories, as in LVIS."""
    return any(LVIS_LISTS[0] in image for image in content["images"])


def _check_lvis(found: Findings) -> None:
    lacking = {
        position: "no list " + " and no list ".join(missing)
        for position, image in enumerate(found.content["images"])
        if (missing := [repr(key) for key in LVIS_LISTS if not isinstance(image.get(key), list)])
    }
    found.add("missing-lvis-key", lacking)
    categories = found.content["categories"]
    unknown = [at for at, entry in enumerate(categories) if entry.get("frequency") not in tuple(FREQUENCIES)]
    found.add("missing-frequency", unknown, lambda at: f"frequency {short(categories[at].get('frequency'))}")


def _repeated(values: Iterable[tuple[int, Any]]) -> list[int]:
    seen: set[Any] = set()
    repeated = []
    for position, value in values:
        if value in seen:
            repeated.append(position)
        seen.add(value)
    return repeated


def _not_whole(entry: dict[str, Any], *keys: str) -> str:
    """Describe the first key without an integer, or return ""."""
    for key in keys:
        if key not in entry:
            return f"has no {key!r}"
        if type(entry[key]) is not int:  # not isinstance, because True is not an id
            return f"{key} must be a whole number, got {short(entry[key])}"
    return ""


def _id_fault(entry: dict[str, Any]) -> str:
    if fault := _not_whole(entry, "id"):
        return fault
    return "" if 0 <= entry["id"] <= LARGEST_ID else f"id must be from 0 to 2**63 - 1, got {short(entry['id'])}"


def _with_fault(entries: list[dict[str, Any]], fault: Callable[[dict[str, Any]], str]) -> dict[int, str]:
    return {position: text for position, entry in enumerate(entries) if (text := fault(entry))}


def _positions_by_id(entries: list[dict[str, Any]]) -> dict[int, int]:
    """Map each id to its first position. Entries with faults are included."""
    positions = reversed(range(len(entries)))
    return {entries[at]["id"]: at for at in positions if type(entries[at].get("id")) is int}


def _category_fault(entry: dict[str, Any]) -> str:
    fault = _id_fault(entry)
    if fault or "name" not in entry:
        return fault or "has no 'name'"
    name = entry["name"]
    if not isinstance(name, str) or not name:
        return f"name must be text, got {short(name)}"
    return f"name must be valid Unicode, got {short(name)}" if _SURROGATE.search(name) else ""


def check_categories(found: Findings) -> dict[int, int]:
    """Check the entries of 'categories'. Return their positions by id."""
    entries = found.content["categories"]
    bad = _with_fault(entries, _category_fault)
    names = {at: entry["name"] for at, entry in enumerate(entries) if at not in bad and at not in found.left_out}
    untidy = {at: repr(name) for at, name in names.items() if name != name.strip() or not name.isprintable()}
    found.add("bad-category", bad)
    found.add("duplicate-category-id", _repeated((at, entries[at]["id"]) for at in names))
    found.add("duplicate-category-name", {at: repr(names[at]) for at in _repeated(names.items())})
    found.add("untidy-category-name", untidy)
    known = {key: at for key, at in _positions_by_id(entries).items() if at not in found.left_out}
    found.add("category-id-gaps", [known[key] for number, key in enumerate(sorted(known), 1) if key != number])
    found.add("zero-category-id", [at for at in names if entries[at]["id"] == 0])
    return known


def _image_fault(entry: dict[str, Any]) -> str:
    fault = _id_fault(entry)
    name = image_name(entry)
    if not fault and not (isinstance(name, str) and name):
        has = "file_name" in entry
        fault = f"file_name must be text, got {short(name)}" if has else "has no 'file_name'"
    fault = fault or _not_whole(entry, "height", "width")
    if not fault and not all(1 <= entry[key] <= LARGEST_SIDE for key in ("height", "width")):
        fault = f"height and width must be from 1 to {LARGEST_SIDE}, got {entry['height']} and {entry['width']}"
    return fault


def leaves_folder(name: str) -> bool:
    """Check whether a path leaves its folder on any operating system."""
    return _LEAVES.search(name) is not None


def _check_images(found: Findings) -> dict[int, int]:
    """Check the entries of 'images'. Return their positions by id."""
    entries = found.content["images"]
    bad = _with_fault(entries, _image_fault)
    names = {at: image_name(entry) for at, entry in enumerate(entries) if at not in bad}
    unsafe = [at for at, name in names.items() if leaves_folder(name)]
    found.add("bad-image", bad)
    found.add("duplicate-image-id", _repeated((at, entries[at]["id"]) for at in names))
    found.add("duplicate-file-name", {at: f"file_name {names[at]!r}" for at in _repeated(names.items())})
    found.add("unsafe-path", {at: f"file_name {names[at]!r} leads out of the image folder" for at in unsafe})
    found.add("zero-image-id", [at for at in names if entries[at]["id"] == 0])
    return _positions_by_id(entries)


def _check_files(found: Findings, folder: Path, known: dict[int, int], limits: ImageLimits) -> None:
    entries = found.content["images"]
    named = {at: name for at in sorted(known.values()) if isinstance(name := image_name(entries[at]), str) and name}
    names = {at: name for at, name in named.items() if not leaves_folder(name)}
    paths = dict(zip(names, join_names(folder, list(names.values())), strict=True))
    is_there = dict(zip(names, are_files(list(paths.values())), strict=True))
    missing = {
        position: _describe_missing(folder / name, name, found.reasons.get(name))
        for position, name in names.items()
        if not is_there[position]
    }
    there = [position for position in names if is_there[position]]
    parts = [there[at : at + LOOKS_AT_ONCE] for at in range(0, len(there), LOOKS_AT_ONCE)]

    def look(part: list[int]) -> list[tuple[int, str, str, bool]]:
        return [(position, *_file_fault(paths[position], entries[position], limits)) for position in part]

    looks = list(chain.from_iterable(map_in_order(look, parts, READERS, bar="check sizes")))
    faults = {position: (kind, text) for position, kind, text, _ in looks}
    decodable = [position for position, kind, _, sure in looks if kind != "too-large-image" and not sure]
    source = ImageFiles([paths[position] for position in decodable], "images of a COCO file")
    source.limits = limits
    broken = {decodable[one.index]: one.message for one in find_broken(source, range(len(source)))}
    kinds: dict[str, dict[int, str]] = {"missing-image": missing, "broken-image": broken}
    for position, (kind, text) in faults.items():
        is_named = kind in ("broken-image", "too-large-image")
        if kind and position not in broken and (is_named or not _image_fault(entries[position])):
            kinds.setdefault(kind, {})[position] = text if is_named else f"{names[position]}: {text}"
    for kind, noted in kinds.items():
        found.add(kind, noted)


def _describe_missing(path: Path, name: str, reason: str | None) -> str:
    if kind := special_kind(path):
        return f"{name} is {kind}, not a file"
    return f"{name}: {reason}" if reason else name


def _file_fault(path: str, entry: dict[str, Any], limits: ImageLimits) -> tuple[str, str, bool]:
    """Find a fault in an image's header.

    Returns its kind and description, and whether the file is known to be complete.
    """
    wanted = entry.get("width"), entry.get("height")
    plain = plain_jpeg_size(path)
    sure = plain is not None and 0 < plain[0] * plain[1] <= limits.pixels
    if sure and plain == wanted:
        return "", "", True
    try:
        stored, turned, orientation, is_whole = read_header(Path(path), limits)
    except TooManyPixels as error:
        return "too-large-image", str(error), sure
    except UserError as error:
        return "broken-image", str(error), sure
    except Exception as error:  # Pillow raises many types of errors for damaged headers
        return "broken-image", f"{path}: cannot be read as an image: {' '.join(str(error).split())}", sure
    sizes = "the json has {}x{} (width x height), the file {}x{}".format(*wanted, *stored)
    if turned != stored:
        sizes += " and {}x{} once turned by its EXIF orientation {}".format(*turned, orientation)
    if turned == wanted:
        kind = "exif-turned" if orientation in range(2, 9) else ""
        return kind, f"EXIF orientation {orientation}" if kind else "", sure or is_whole
    if turned != stored and stored == wanted:
        return "exif-orientation", sizes, sure or is_whole
    return ("swapped-size" if turned[::-1] == wanted else "size-mismatch"), sizes, sure or is_whole


@dataclass(frozen=True)
class _Table:
    """The N annotations whose keys and types are right, by position in the file.

    Boxes are (N, 4). `crowd` (N,) is True for crowd regions, `finite` (N,) where all four numbers of a box are finite.
    `image` (N,) is the position of the image, and -1 if it is unknown. `size` (N, 2) is its width and height, and then
    infinite.
    """

    columns: Columns
    position: NDArray[np.int64]
    box: Floats
    crowd: NDArray[np.bool_]
    image: NDArray[np.int64]
    size: Floats
    finite: NDArray[np.bool_]

    def at(self, rows: NDArray[np.bool_]) -> list[int]:
        """Return the positions in the file of the selected rows."""
        positions: list[int] = self.position[rows].tolist()
        return positions


def _annotation_fault(entry: dict[str, Any]) -> str:
    """Describe a fault in an annotation's keys. Ignore its mask."""
    if fault := _id_fault(entry) or _not_whole(entry, "image_id", "category_id"):
        return fault
    box = entry.get("bbox")
    if type(box) is not list or len(box) != 4 or not NUMBERS.issuperset(map(type, box)):
        if isinstance(box, dict) and (turn := next((key for key in box if str(key).lower() in ROTATION_KEYS), None)):
            return f"bbox must be [x, y, width, height] without {turn}, got {short(box[turn])}"
        return f"bbox must be [x, y, width, height], got {short(box)}" if "bbox" in entry else "has no 'bbox'"
    if entry.get("iscrowd", 0) not in (0, 1):
        return f"iscrowd must be 0 or 1, got {short(entry['iscrowd'])}"
    area = entry.get("area", 0)
    if type(area) not in NUMBERS:
        return f"area must be a number, got {short(area)}"
    if -np.inf < area < 0 or LARGEST_AREA < area < np.inf:
        return f"area must be from 0 to {LARGEST_AREA:.0e} pixels, got {short(area)}"
    return ""


def _check_annotations(
    found: Findings, known: dict[int, int], categories: dict[int, int], sound: Columns | None
) -> _Table:
    """Check keys and types, unless `sound`, and references to images and categories."""
    entries, images = found.content["annotations"], found.content["images"]
    bad = {} if sound else _with_fault(entries, _annotation_fault)
    position = np.delete(np.arange(len(entries)), list(bad))
    columns = Columns([entries[at] for at in position]) if sound is None else sound
    image_ids, category_ids = columns.read("image_id"), columns.read("category_id")
    image_at, category_at = (
        np.fromiter(map(numbers.get, ids, repeat(-1)), np.int64, len(ids))
        for numbers, ids in ((known, image_ids), (categories, category_ids))
    )
    crowd = np.fromiter(map(bool, columns.read("iscrowd")), bool, len(position))

    def where(rows: NDArray[np.bool_] | list[bool]) -> list[int]:
        positions: list[int] = position[np.flatnonzero(rows)].tolist()
        return positions

    def value(key: str) -> _Note:
        return lambda position: f"{key} {short(found.shown['annotations'][position][key])}"

    found.add("bad-annotation", bad)
    found.add("unknown-image", where(image_at < 0), value("image_id"))
    unknown = where(category_at < 0)
    if step := _category_step(found, set(category_ids) & categories.keys(), unknown, categories):
        found.add(
            "shifted-category-id", position.tolist(), lambda at: f"{value('category_id')(at)}, all fit with ids {step}"
        )
    else:
        found.add("unknown-category", unknown, value("category_id"))
    ignored = [] if sound else where([flag != 0 for flag in columns.read("ignore")])
    found.add("ignore-flag", ignored, value("ignore"))
    found.add("crowd", where(crowd))
    found.add("mostly-crowd", where(crowd) if crowd.sum() > MOSTLY * len(entries) else ())
    if not is_lvis(found.content):
        found.add("many-objects", _crowded_images(image_at, category_at, crowd))
    found.add("zero-annotation-id", where([number == 0 for number in columns.read("id")]))
    found.add("image-without-annotations", [known[key] for key in known.keys() - set(image_ids)])
    unused = [categories[key] for key in categories.keys() - set(category_ids)]
    found.add("unused-category", unused, lambda position: repr(found.content["categories"][position].get("name")))
    sides = np.full((len(images) + 1, 2), np.inf)  # the last row stands for unknown images
    for at in known.values():
        if not _image_fault(images[at]):
            sides[at] = images[at]["width"], images[at]["height"]
    finite = np.asarray(np.isfinite(columns.boxes).all(axis=1))
    return _Table(columns, position, columns.boxes, crowd, image_at, sides[image_at], finite)


def _category_step(found: Findings, used: set[int], unknown: list[int], known: Container[int]) -> str:
    """Find the step of one that makes all category ids known."""
    lost = {as_whole_number(found.shown["annotations"][at]["category_id"]) for at in unknown}
    ids = used | {number for number in lost if number is not None}
    if not unknown or None in lost or (len(ids) == 1 and 0 not in ids):
        return ""
    return next((f"{sign} 1" for sign in "+-" if all(number + int(f"{sign}1") in known for number in ids)), "")


def _crowded_images(image: NDArray[np.int64], category: NDArray[np.int64], crowd: NDArray[np.bool_]) -> dict[int, str]:
    """Find images with more objects of a class than AP counts."""
    counted = (image >= 0) & ~crowd
    classes = category.max(initial=0) + 2  # -1 is an unknown category
    pairs, counts = np.unique((image * classes + category + 1)[counted], return_counts=True)
    many = counts > COUNTED
    return {int(pair // classes): f"{count} objects" for pair, count in zip(pairs[many], counts[many], strict=True)}


def _check_masks(found: Findings, table: _Table, for_evaluation: bool, sound: bool) -> Masks:
    """Check segmentations, whose types are right if `sound`."""
    masks = measure_masks(table.columns.read("segmentation"), table.size, checked=sound)
    missing = masks.faults.get("missing-mask", {})
    if not for_evaluation:  # training ignores crowd regions
        for row in [row for row in missing if table.crowd[row]]:
            del missing[row]
    for kind, faults in masks.faults.items():
        if kind != "not-finite":
            found.add(kind, {int(table.position[row]): text for row, text in faults.items()})
    return masks


def _check_areas(found: Findings, table: _Table, masks: Masks) -> None:
    """Compare areas with masks, and reject NaN."""
    area = table.columns.areas
    infinite = {int(row): f"area {area[row]}" for row in np.flatnonzero(~np.isfinite(area))}
    infinite |= masks.faults.get("not-finite", {})
    infinite |= {int(row): f"bbox {table.columns.entries[row]['bbox']}" for row in np.flatnonzero(~table.finite)}
    found.add("not-finite", {int(table.position[row]): text for row, text in infinite.items()})
    slack = AREA_SLACK[0] + AREA_SLACK[1] * np.fmax(area, masks.area)
    has_area = np.array(["area" in entry for entry in table.columns.entries], bool)
    far = table.at(has_area & (np.abs(area - masks.area) > slack))
    measured = dict(zip(far, masks.area[np.isin(table.position, far)], strict=True))
    entries = found.content["annotations"]
    found.add("area-mismatch", far, lambda at: f"area {entries[at]['area']}, the mask has {measured[at]:.0f}")


def _check_boxes(found: Findings, table: _Table, masks: Masks) -> None:
    """Check boxes against their images and against the corner format."""
    entries = found.content["annotations"]
    finite = table.finite
    x, y, w, h = np.where(finite[:, None], table.box, 1.0).T
    width, height = table.size.T
    beyond = np.maximum(np.maximum(-x, x + w - width), np.maximum(-y, y + h - height))  # pixels outside the image
    empty = finite & ((w <= 0) | (h <= 0))
    placed = finite & ~empty & np.isfinite(width)
    outside = placed & ((x >= width) | (y >= height) | (x + w <= 0) | (y + h <= 0))

    def box(position: int) -> str:
        return f"bbox {entries[position]['bbox']}"

    def box_and_image(position: int) -> str:
        sides = table.size[np.searchsorted(table.position, position)]
        return "{} in an image of {:.0f}x{:.0f}".format(box(position), *sides)

    corners = _in_corner_form(table, masks, placed)
    misfits = {} if corners.any() else _find_misfits(table, masks, placed)
    for kind, notes in misfits.items():
        found.add(kind, notes)
    for kind in ("rle-size", "degenerate-polygon"):
        found.forget(kind, misfits.get("misfit-masks", {}))
    found.add("empty-box", table.at(empty), box)
    found.add("corner-boxes", table.at(corners), box_and_image)
    if not corners.any() and "misfit-boxes" not in misfits:  # such boxes leave the image for that reason
        found.add("box-outside", table.at(outside), box_and_image)
        found.forget("mask-off-box", table.at(outside))
        found.add("box-over-edge", table.at(placed & ~outside & (beyond > EDGE)), box_and_image)


def _find_misfits(table: _Table, masks: Masks, placed: NDArray[np.bool_]) -> dict[str, dict[int, str]]:
    """Find masks and boxes that do not fit, by kind and position."""
    objects = Placed(table.box, masks.extent.copy(), table.size, table.image, placed & ~table.crowd)
    segmentations = table.columns.read("segmentation")
    odd = find_odd_masks(objects, segmentations)
    objects.extent[list(odd)] = np.nan
    misfits = find_misfits(objects, segmentations, masks.faults.get("rle-size", {}))
    misfits["misfit-masks"] = odd | misfits.get("misfit-masks", {})
    return {kind: {int(table.position[row]): note for row, note in notes.items()} for kind, notes in misfits.items()}


def _in_corner_form(table: _Table, masks: Masks, usable: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Find boxes (N,) that must be in [x1, y1, x2, y2] format.

    With masks, a box is compared with the extent of its mask, as corners and as sizes. Boxes that agree in only one
    format decide. Without masks, boxes that leave the image decide: corners that are read as sizes often do.
    """
    box, size = table.box, table.size
    with np.errstate(invalid="ignore"):  # comparisons with NaN are False
        by_size = corners_of(box)
        as_size, as_corners = (np.abs(masks.extent - form).max(axis=1) <= AGREE for form in (by_size, box))
        told = usable & (as_size != as_corners)
        if told.any():
            corners = told & as_corners
            return corners if corners.sum() >= AGREEING * told.sum() else np.zeros_like(corners)
        leaving = usable & (by_size[:, 2:] > (1 + LEAVING_BY) * size).any(axis=1)
        fitting = usable & (box[:, 2:] > box[:, :2]).all(axis=1) & (box >= -EDGE).all(axis=1)
        fitting &= (box[:, 2:] <= size + EDGE).all(axis=1)
    if leaving.sum() > LEAVING * usable.sum() and fitting.sum() >= FITTING * usable.sum():
        return leaving & fitting
    return np.zeros_like(usable)
