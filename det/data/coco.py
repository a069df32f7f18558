"""Data sets in COCO format: check and register them, and fit the config to them."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import compress, count
from pathlib import Path
from reprlib import repr as short
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from yacs.config import CfgNode

from crossmae.data.found_names import OTHER_FOLDERS, describe_moved, find_moved
from crossmae.data.images import MAX_PIXELS, read_header
from crossmae.data.parallel import READERS, map_in_order
from crossmae.data.paths import are_files, join_names
from crossmae.errors import UserError, counted
from crossmae.files import paused_garbage_collection, read_json, stamp_file
from det.config import image_limits
from det.data.coco_checks import (
    Finding,
    Findings,
    check_categories,
    find_faults,
    is_lvis,
    leaves_folder,
)
from det.data.coco_kinds import DROPPABLE, KINDS, USELESS, WARNINGS, Rank
from det.data.coco_masks import polygon_fault
from det.data.tidy import Columns, ImageSize, Tidy, image_name, tidy

log = logging.getLogger(__name__)

# Files of other tools and tasks, by keys of the file or of its first entry.
OTHER_FORMATS = {
    "a file of labelme": {"shapes", "imagePath"},
    "a project of VIA": {"_via_img_metadata"},
    "a file of VIA": {"filename", "regions"},
    "an export of Label Studio in its own format": {"data", "annotations"},
    "a short export of Label Studio": {"image", "id", "annotator"},
    "results of a detector": {"image_id", "category_id", "score"},
    "GeoJSON": {"type", "features"},
    "a file of Supervisely": {"objects", "size"},
}

OWN_TRAIN, OWN_VAL = "own_coco_train", "own_coco_val"
# Stamp of the file and result of `read_registered`, by name of the data set, from registration on.
_PARSED: dict[str, tuple[tuple[int, ...], tuple[dict[str, Any], dict[str, dict[int, Any]]]]] = {}


@dataclass(frozen=True)
class CocoSummary:
    """Facts about a checked file. Categories are sorted by id, which is the order of the classes.

    Crowd regions are not counted in `num_trainable` (images), in `most_objects` and `most_of_class` (of an image), and
    in `mask_kinds` ("polygon", "rle", "none").
    """

    categories: tuple[str, ...]
    num_images: int
    num_trainable: int
    most_objects: int
    most_of_class: int
    mask_kinds: frozenset[str]


@dataclass(frozen=True)
class Dropped:
    """Entries of a file that `DATASETS.DROP` leaves out, as positions in the file's lists.

    `annotations` has dropped annotations, including all annotations of dropped `images`. `polygons` has annotations
    that are kept, but lose their degenerate polygons. `categories` are no classes, and left out in any case.
    """

    images: frozenset[int] = frozenset()
    annotations: frozenset[int] = frozenset()
    polygons: frozenset[int] = frozenset()
    categories: frozenset[int] = frozenset()


@paused_garbage_collection()
def register_coco(
    name: str,
    json_path: str | Path,
    images: str | Path,
    *,
    masks: bool,
    for_evaluation: bool = False,
    drop: Sequence[str] = (),
    keep: Collection[str] = (),
    max_pixels: int = MAX_PIXELS,
) -> CocoSummary:
    """Check a data set in COCO format and register it with detectron2.

    Args:
        name: name for `DATASETS.TRAIN` and `DATASETS.TEST`. An older data set of this name is replaced.
        json_path: COCO file. It is never changed.
        images: folder that contains the image files.
        masks: masks are trained or evaluated, so every annotation needs a mask. Otherwise masks are not read.
        for_evaluation: also check the facts that AP needs. A file without annotations is allowed.
        drop: kinds of faults from `det.data.coco_kinds.DROPPABLE`. Their entries are left out and logged.
        keep: names of classes that are classes even without objects, see `tidy`.
        max_pixels: width * height of the largest image that is read.

    Raises:
        UserError: the file or the folder is missing, the file has faults outside `drop`, or no entries are left.
    """
    from detectron2.data import DatasetCatalog, MetadataCatalog  # slow import

    check_drop(drop)
    stamp = stamp_file(json_path)
    file = read_coco(json_path)
    if not os.path.isdir(images):
        raise UserError(f"{json_path}: the image folder {images} does not exist. Name the folder with its images.")
    if not file["annotations"] and not for_evaluation:
        raise UserError(f"{json_path}: 'annotations' is empty. Name a file with objects to train on.")
    tidied = tidy_with_images(file, Path(images), masks, keep)
    if moved := describe_moved_images(tidied, Path(images)):
        log.log(logging.WARNING if OTHER_FOLDERS in moved else logging.INFO, "%s: %s", json_path, moved)
    limits = image_limits(max_pixels)
    findings = find_faults(tidied, Path(images), for_evaluation=for_evaluation, masks=masks, limits=limits)
    dropped = plan_drop(tidied, findings, drop)
    if faults := remaining_faults(findings, dropped):
        command = f"python tools/check_coco.py {shlex.quote(str(json_path))} {shlex.quote(str(images))}"
        command += " --evaluation" * for_evaluation + " --no-masks" * (not masks)
        advice = drop_advice(tidied, findings, drop)
        raise UserError(f"{json_path}: {describe_faults(faults)}{advice}. For the whole table: {command}")
    cleaned = clean(tidied.content, dropped)
    for key in ("images", "annotations"):
        if file[key] and not cleaned[key]:
            raise UserError(f"{json_path}: DATASETS.DROP {tuple(drop)} leaves no {key}. Repair the file.")
    _log_findings(findings, dropped, json_path)
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, lambda: _load_records(name))
    _PARSED[name] = stamp, (cleaned, tidied.written)
    columns = tidied.columns
    if columns is None or columns.entries is not cleaned["annotations"]:
        columns = Columns(cleaned["annotations"])
    images_of, counts = _count_objects(columns, [entry["id"] for entry in cleaned["categories"]])
    _metadata(name).set(
        json_file=str(json_path),
        image_root=str(images),
        evaluator_type="lvis" if is_lvis(cleaned) else "coco",
        reading=_Reading(masks, tuple(keep), dropped, for_evaluation),
        # for detectron2's federated loss
        class_image_count=[{"id": key, "image_count": number} for key, number in images_of.items()],
    )
    return CocoSummary(tuple(_name_classes(name, cleaned["categories"])), len(cleaned["images"]), **counts)


def _count_objects(annotations: Columns, categories: list[int]) -> tuple[dict[int, int], dict[str, Any]]:
    """Count the images of each category, and what `CocoSummary` has of objects."""
    (_, images), (used, classes) = (
        np.unique(np.array(annotations.read(key), np.int64), return_inverse=True) for key in ("image_id", "category_id")
    )
    pairs = images * len(used) + classes
    images_of = dict.fromkeys(categories, 0)
    images_of |= zip(used.tolist(), np.bincount(classes[np.unique(pairs, return_index=True)[1]]).tolist(), strict=True)
    single = ~np.array(annotations.read("iscrowd"), bool)
    objects, of_class = (np.unique(groups[single], return_counts=True)[1] for groups in (images, pairs))
    return images_of, {
        "num_trainable": len(objects),
        "most_objects": int(objects.max(initial=0)),
        "most_of_class": int(of_class.max(initial=0)),
        "mask_kinds": frozenset(map(mask_kind, compress(annotations.read("segmentation"), single))),
    }


@dataclass(frozen=True)
class _Reading:
    """Arguments of `register_coco` for reading a file, perhaps `again`."""

    masks: bool = True
    keep: tuple[str, ...] = ()
    dropped: Dropped = Dropped()
    again: bool = True


def tidy_with_images(content: dict[str, Any], folder: Path | None, masks: bool, keep: Collection[str] = ()) -> Tidy:
    """Repair a COCO content (`tidy`), with the files of a folder."""

    def find(names: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
        found = are_files(join_names(where, names))
        missing = [name for name, is_there in zip(names, found, strict=True) if not is_there or leaves_folder(name)]
        return find_moved(where, missing, set(names) - set(missing))

    with paused_garbage_collection():
        if folder is None:
            return tidy(content, masks=masks, keep=keep)
        where = folder
        return tidy(content, masks=masks, find_files=find, read_sizes=partial(read_sizes, where), keep=keep)


def describe_moved_images(tidied: Tidy, folder: Path) -> str:
    """Describe images that have another name in one line, or return ""."""
    return describe_moved(folder, tidied.moved, len(tidied.moved) + len(tidied.missing)) if tidied.moved else ""


def read_sizes(folder: Path, names: Sequence[str]) -> Iterable[ImageSize | None]:
    """Read sizes of image files as they are after their EXIF orientation."""

    def read(name: str) -> ImageSize | None:
        try:
            return None if leaves_folder(name) else read_header(folder / name).turned
        except Exception:  # Pillow raises many types of errors for damaged headers, which the checks report
            return None

    return map_in_order(read, names, READERS)


def _metadata(name: str) -> Any:
    from detectron2.data import MetadataCatalog  # slow import

    return MetadataCatalog.get(name)


def _name_classes(name: str, categories: Sequence[dict[str, Any]]) -> list[str]:
    """Register the names and numbers of the classes. Return the names."""
    entries = sorted(categories, key=lambda entry: entry["id"])
    numbers = {entry["id"]: index for index, entry in enumerate(entries)}
    names = [entry["name"] for entry in entries]
    _metadata(name).set(thing_classes=names, thing_dataset_id_to_contiguous_id=numbers)
    return names


def _log_findings(findings: Sequence[Finding], dropped: Dropped, json_path: str | Path) -> None:
    counts = {rank: ", ".join(f"{one.kind.name} {len(one.positions)}" for one in findings if one.rank is rank)
              for rank in Rank}  # fmt: skip
    if dropped.images or dropped.annotations or dropped.polygons:
        numbers = f"{counted(len(dropped.images), 'image')} and {counted(len(dropped.annotations), 'annotation')}"
        numbers += f", polygons of {len(dropped.polygons):,} more" if dropped.polygons else ""
        log.warning("%s: DATASETS.DROP leaves out %s: %s", json_path, numbers, counts[Rank.DROPPABLE])
    for one in findings:
        if one.kind.name in WARNINGS:
            log.warning("%s: %s in %s: %s", json_path, one.kind.name, one.counted(), one.kind.meaning)
    if counts[Rank.INFORMATION]:
        log.info("%s: good to know: %s", json_path, counts[Rank.INFORMATION])


def mask_kind(mask: Any) -> str:
    """Name the type of a segmentation: "polygon", "rle" or "none"."""
    return ("rle" if isinstance(mask, dict) else "polygon") if mask else "none"


def ground_truth(name: str) -> dict[str, Any]:
    """Read the COCO file of a registered data set, without dropped entries.

    An annotation with id 0 gets another id, because pycocotools treats a match with id 0 as no match.
    """
    return read_registered(name)[0]


def read_registered(name: str) -> tuple[dict[str, Any], dict[str, dict[int, Any]]]:
    """Read the ground truth, and the ids of the file (`Tidy.written`)."""
    metadata = _metadata(name)
    path = metadata.get("json_file")
    if path is None:
        raise UserError(f"{name}: this data set has no file in COCO format. Set 'json_file' in its metadata.")
    stamp, parsed = _PARSED.get(name, ((), None))
    if parsed is None or stamp != stamp_file(path):
        reading = metadata.get("reading", _Reading())
        tidied = tidy_with_images(read_coco(path), Path(metadata.image_root), reading.masks, reading.keep)
        parsed = clean(tidied.content, replace(reading.dropped, categories=tidied.left_out)), tidied.written
    content, written = parsed
    if zeros := [annotation for annotation in content["annotations"] if annotation["id"] == 0]:
        taken = {annotation["id"] for annotation in content["annotations"]}
        free = next(number for number in count(1) if number not in taken)
        for annotation in zeros:
            annotation["id"] = free
    return content, written


@paused_garbage_collection()
def _load_records(name: str) -> list[dict[str, Any]]:
    metadata, content = _metadata(name), ground_truth(name)
    if not metadata.get("reading", _Reading()).again:
        _PARSED.pop(name, None)  # training reads its records once
    return dataset_records(content, metadata.image_root)


def dataset_records(content: dict[str, Any], image_root: str) -> list[dict[str, Any]]:
    """Convert a COCO content to detectron2's records, sorted by image id.

    Sound files give the same records as detectron2's `load_coco_json`, which fails on keys that nobody uses.
    """
    from detectron2.structures import BoxMode  # slow import

    classes = {number: index for index, number in enumerate(sorted(entry["id"] for entry in content["categories"]))}
    objects: dict[int, list[dict[str, Any]]] = {entry["id"]: [] for entry in content["images"]}
    mode = BoxMode.XYWH_ABS
    for entry in content["annotations"]:
        record = {"iscrowd": entry["iscrowd"]} if "iscrowd" in entry else {}
        record |= {"bbox": entry["bbox"], "bbox_mode": mode, "category_id": classes[entry["category_id"]]}
        if mask := entry.get("segmentation"):
            plain = type(mask) is dict and type(mask["counts"]) is list
            record["segmentation"] = coco_mask.frPyObjects(mask, *mask["size"]) if plain else mask
        objects[entry["image_id"]].append(record)
    return [
        {
            "file_name": os.path.join(image_root, entry["file_name"]),
            "height": entry["height"],
            "width": entry["width"],
            "image_id": entry["id"],
            "annotations": objects[entry["id"]],
        }
        for entry in sorted(content["images"], key=lambda entry: entry["id"])
    ]


def plan_drop(tidied: Tidy, findings: Sequence[Finding], drop: Sequence[str]) -> Dropped:
    """Choose the entries that `DATASETS.DROP` leaves out."""
    content = tidied.content
    gone: dict[str, set[int]] = {"images": set(), "annotations": set(), "polygons": set()}
    for one in findings:
        if one.kind.name in drop and one.rank is Rank.DROPPABLE:
            polygons = one.positions if one.kind.name == "degenerate-polygon" else ()
            sound = {at for at in polygons if _sound_polygons(content["annotations"][at])}
            gone[one.kind.where] |= set(one.positions) - sound
            gone["polygons"] |= sound
    images, annotations = gone["images"], gone["annotations"]
    if ids := {content["images"][at]["id"] for at in images}:
        entries = enumerate(content["annotations"])
        annotations |= {at for at, one in entries if type(one.get("image_id")) is int and one["image_id"] in ids}
    left = frozenset(gone["polygons"] - annotations)
    return Dropped(frozenset(images), frozenset(annotations), left, tidied.left_out)


def clean(content: dict[str, Any], dropped: Dropped) -> dict[str, Any]:
    """Copy the content without dropped entries.

    LVIS images get a `file_name`.
    """
    annotations = content["annotations"]
    if dropped.annotations or dropped.polygons:
        annotations = [
            {**entry, "segmentation": _sound_polygons(entry)} if at in dropped.polygons else entry
            for at, entry in enumerate(annotations)
            if at not in dropped.annotations
        ]
    kept = (entry for at, entry in enumerate(content["images"]) if at not in dropped.images)
    return {
        **content,
        "images": [{**entry, "file_name": image_name(entry)} for entry in kept],
        "annotations": annotations,
        "categories": [entry for at, entry in enumerate(content["categories"]) if at not in dropped.categories],
    }


def _sound_polygons(annotation: dict[str, Any]) -> list[list[float]]:
    return [polygon for polygon in annotation["segmentation"] if not polygon_fault(polygon)]


def check_drop(drop: Sequence[str]) -> None:
    """Reject a `DATASETS.DROP` that is not a tuple of droppable kinds."""
    wrong = drop if isinstance(drop, str) else next((word for word in drop if word not in DROPPABLE), None)
    if wrong is not None:
        reason = "cannot be left out" if wrong in KINDS else "is no kind of fault"
        reason = "is no tuple" if wrong is drop else reason
        raise UserError(f"DATASETS.DROP: {wrong!r} {reason}. Use a tuple with some of {', '.join(DROPPABLE)}.")


def remaining_faults(findings: Sequence[Finding], dropped: Dropped) -> list[Finding]:
    """Select the errors of entries that are not dropped."""
    faults = []
    for one in findings:
        gone = {"images": dropped.images, "annotations": dropped.annotations}.get(one.kind.where, frozenset[int]())
        if one.kind.name == "degenerate-polygon":
            gone |= dropped.polygons
        positions = [at for at in one.positions if at not in gone]
        if positions and one.rank is not Rank.INFORMATION:
            faults.append(replace(one, positions=positions))
    return faults


def describe_faults(faults: Sequence[Finding]) -> str:
    """Describe faults in one line: kinds, counts, first ids and advice.

    If there is only one kind, the line has more details.
    """
    counts = [f"{one.kind.name} in {one.counted()}" for one in faults]
    if len(faults) == 1:
        return f"{counts[0]}: {'; '.join(faults[0].places())}: {faults[0].kind.meaning}"
    return "; ".join(f"{counted} (id {one.ids()})" for counted, one in zip(counts, faults, strict=True))


def drop_advice(tidied: Tidy, findings: Sequence[Finding], drop: Sequence[str] = ()) -> str:
    """Propose a `DATASETS.DROP` for useless entries, or return "".

    The proposal says how many entries are left, and includes the kinds in `drop`, which are already dropped. There is
    none if nothing would be left, or if an error has to be repaired first.
    """
    faults = remaining_faults(findings, plan_drop(tidied, findings, drop))
    if any(one.rank is Rank.ERROR for one in faults):  # its repair may give the other entries a meaning
        return ""
    kinds = [one.kind.name for one in faults if one.kind.name in USELESS]
    dropped = plan_drop(tidied, findings, (*drop, *kinds))
    left = [
        (len(tidied.content[key]) - len(gone), len(tidied.content[key]), key)
        for key, gone in (("images", dropped.images), ("annotations", dropped.annotations))
    ]
    if not kinds or any(number == 0 for number, _, _ in left):
        return ""
    remain = " and ".join(f"{number} of {total} {key}" for number, total, key in left)
    return f'. To leave useless entries out and keep {remain}: "DATASETS.DROP={(*drop, *kinds)}"'


def read_coco(path: str | Path) -> dict[str, Any]:
    """Read a COCO file with lists of dictionaries.

    'annotations' may be empty or missing: such a file is only good for evaluation.
    """
    content = _read_lists(path, "images", "categories")
    if content.get("annotations") is None:
        content["annotations"] = []
    _check_list(path, content, "annotations")
    return content


def read_categories(path: str | Path) -> list[tuple[int, str]]:
    """Read ids and names of categories from JSON, sorted by id."""
    content = {"images": [], "annotations": [], **_read_lists(path, "categories")}
    lists = {key: value if isinstance(value, list) else [] for key, value in content.items()}
    tidied = tidy(lists, masks=False)
    found = Findings(tidied)
    check_categories(found)
    if faults := [one for one in found.all.values() if one.rank is not Rank.INFORMATION]:
        raise UserError(f"{path}: {describe_faults(faults)}")
    categories = clean(tidied.content, Dropped(categories=tidied.left_out))["categories"]
    return sorted((entry["id"], entry["name"]) for entry in categories)


def _read_lists(path: str | Path, *keys: str) -> dict[str, Any]:
    """Read a JSON file and require non-empty lists of dictionaries."""
    with paused_garbage_collection():
        content: dict[str, Any] = read_json(Path(path))
    for key in keys:
        _check_list(path, content, key)
        if not content[key]:
            raise UserError(f"{path}: {key!r} is empty. Name a file with entries.")
    return content


def _has_keys(content: Any, keys: set[str]) -> bool:
    """Check for keys in the content or in its first entry."""
    values = list(content.values()) if isinstance(content, dict) else content
    first = values[0] if isinstance(values, list) and values else None
    return any(isinstance(one, dict) and keys <= one.keys() for one in (content, first))


def _check_list(path: str | Path, content: Any, key: str) -> None:
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        looks = next((name for name, fits in OTHER_FORMATS.items() if _has_keys(content, fits)), "")
        what = f"has no list {key!r}, and looks like {looks}" if looks else f"has no list {key!r}"
        raise UserError(
            f"{path}: {what}. {'Export the annotations in COCO format' if looks else 'Name a file in COCO format'}."
        )
    for index, entry in enumerate(content[key]):
        if not isinstance(entry, dict):
            raise UserError(f"{path}: {key}[{index}] is {short(entry)}. Use dictionaries.")


def use_own_data(cfg: CfgNode, train: tuple[str, str] | None, val: tuple[str, str] | None) -> None:
    """Register own data sets and fit the config to them, in place.

    Reads `DATASETS.DROP` and `MODEL.MASK_ON`. Sets and logs the data sets, the number of classes and the mask format.
    `train` and `val` are each a COCO file and an image folder, or None. If both are None, nothing changes.
    """
    summaries = []
    masks, drop, most = cfg.MODEL.MASK_ON, cfg.DATASETS.DROP, cfg.INPUT.MAX_PIXELS
    if train is not None:
        summaries.append(register_coco(OWN_TRAIN, *train, masks=masks, drop=drop, max_pixels=most))
        if not summaries[0].num_trainable:
            raise UserError(
                f"{train[0]}: all annotations are crowd regions (iscrowd 1). Set iscrowd 0 for single objects."
            )
        if masks and "rle" in summaries[0].mask_kinds and cfg.INPUT.MASK_FORMAT == "polygon":
            cfg.INPUT.MASK_FORMAT = "bitmask"
            log.info("INPUT.MASK_FORMAT is bitmask: %s has run-length encoded masks", train[0])
    if val is not None:
        known = summaries[0].categories if summaries else ()
        summaries.append(
            register_coco(OWN_VAL, *val, for_evaluation=True, masks=masks, drop=drop, keep=known, max_pixels=most)
        )
        _warn_of_crowded_images(val[0], summaries[-1], cfg.TEST.DETECTIONS_PER_IMAGE, cfg.TEST.MAX_DETS)
    if not summaries:
        return
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (OWN_TRAIN,) if train else (), (OWN_VAL,) if val else ()
    if train is None:  # the number of classes is the detector's
        return
    number = len(summaries[0].categories)
    if number != cfg.MODEL.ROI_HEADS.NUM_CLASSES:
        log.info("MODEL.ROI_HEADS.NUM_CLASSES is %d, the number of categories of the data", number)
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = number
    box_head = cfg.MODEL.ROI_BOX_HEAD
    if box_head.USE_FED_LOSS and number < box_head.FED_LOSS_NUM_CLASSES:
        log.info("MODEL.ROI_BOX_HEAD.FED_LOSS_NUM_CLASSES is %d: there are no more", number)
        box_head.FED_LOSS_NUM_CLASSES = number


def _warn_of_crowded_images(json_path: str, summary: CocoSummary, detections: int, counted: int) -> None:
    """Warn if an image has more objects than detections that count."""
    lvis = _metadata(OWN_VAL).get("evaluator_type") == "lvis"  # with a limit of its own
    text = "%s: an image has %d objects%s, and %s only %d, which lowers recall and AP. Set %s=%d or more."
    if 0 <= detections < (most := summary.most_objects):
        log.warning(text, json_path, most, "", "the detector returns", detections, "TEST.DETECTIONS_PER_IMAGE", most)
    if counted < (most := summary.most_of_class) and not lvis:
        log.warning(text, json_path, most, " of a class", "AP counts", counted, "TEST.MAX_DETS", most)


def check_classes(names: Sequence[str], num_classes: int) -> None:
    """Reject loaded data sets whose number of classes differs from the model."""
    for name in names:
        found = _metadata(name).get("thing_classes")
        if found is not None and len(found) != num_classes:
            raise UserError(
                f"MODEL.ROI_HEADS.NUM_CLASSES: {name} has {len(found)} classes, not {num_classes}. "
                f"Set MODEL.ROI_HEADS.NUM_CLASSES={len(found)}."
            )


def check_registered(names: tuple[str, ...], key: str, needed: str = "") -> None:
    """Reject unknown data sets and missing files.

    With `needed`, at least one data set is required.
    """
    from detectron2.data import DatasetCatalog  # slow import

    split = "train" if key == "DATASETS.TRAIN" else "val"
    if needed and not names:
        raise UserError(f"{key}: there is no {needed}. Name it with --{split}-json and --{split}-images.")
    for name in names:
        if name in (OWN_TRAIN, OWN_VAL) and name not in DatasetCatalog:
            raise UserError(f"{key}: {name} is your own data. Name it again with --{split}-json and --{split}-images.")
        if name not in DatasetCatalog:
            raise UserError(f"{key}: no data set {name!r} is registered. Name your own with --{split}-json.")
        path = _metadata(name).get("json_file")
        if path is not None and not Path(path).is_file():
            raise UserError(
                f"{key}: {name} needs {path}, which does not exist. Set DETECTRON2_DATASETS to the folder with coco/, "
                f"or name your own data with --{split}-json and --{split}-images."
            )
