"""Data sets in COCO format: check and register them, and fit the config to them."""

from __future__ import annotations

import json
import logging
import shlex
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from reprlib import repr as short
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances

from crossmae.errors import UserError
from crossmae.files import read_json
from det.classes import Classes
from det.data.coco_checks import (
    Finding,
    Findings,
    check_categories,
    file_name,
    find_faults,
    is_lvis,
    paused_garbage_collection,
)
from det.data.coco_kinds import DROPPABLE, KINDS, Rank
from det.data.coco_masks import polygon_fault

log = logging.getLogger(__name__)

OWN_TRAIN, OWN_VAL = "own_coco_train", "own_coco_val"


@dataclass(frozen=True)
class CocoSummary:
    """Facts about a checked file. Categories are sorted by id, which is the order of the classes.

    Crowd regions are not counted in `num_trainable` (images) and `mask_kinds` ("polygon", "rle", "none").
    """

    categories: tuple[str, ...]
    num_images: int
    num_trainable: int
    mask_kinds: frozenset[str]


@dataclass(frozen=True)
class Dropped:
    """Entries of a file that `DATASETS.DROP` leaves out, as positions in the file's lists.

    `annotations` has dropped annotations, including all annotations of dropped `images`. `polygons` has annotations
    that are kept, but lose their degenerate polygons.
    """

    images: frozenset[int] = frozenset()
    annotations: frozenset[int] = frozenset()
    polygons: frozenset[int] = frozenset()


def register_coco(
    name: str,
    json_path: str | Path,
    images: str | Path,
    *,
    for_evaluation: bool = False,
    masks: bool = False,
    drop: Sequence[str] = (),
) -> CocoSummary:
    """Check a data set in COCO format and register it with detectron2.

    Args:
        name: name for `DATASETS.TRAIN` and `DATASETS.TEST`. An older data set of this name is replaced.
        json_path: COCO file. It is never changed.
        images: folder that contains the image files.
        for_evaluation: also check the facts that AP needs.
        masks: masks are trained or evaluated, so every annotation needs a mask.
        drop: kinds of faults from `det.data.coco_kinds.DROPPABLE`. Their entries are left out and logged.

    Raises:
        UserError: the file or the folder is missing, the file has faults outside `drop`, or no entries are left.
    """
    check_drop(drop)
    content = read_coco(json_path)
    if not Path(images).is_dir():
        raise UserError(f"{json_path}: the image folder {images} does not exist. Name the folder with its images.")
    findings = find_faults(content, Path(images), for_evaluation=for_evaluation, masks=masks)
    dropped = plan_drop(content, findings, drop)
    if faults := remaining_faults(findings, dropped):
        command = f"python tools/check_coco.py {shlex.quote(str(json_path))} {shlex.quote(str(images))}"
        command += " --evaluation" * for_evaluation
        raise UserError(f"{json_path}: {describe_faults(faults, drop)}. For the whole table: {command}")
    cleaned = clean(content, dropped)
    for key in ("images", "annotations"):
        if not cleaned[key]:
            raise UserError(f"{json_path}: DATASETS.DROP {tuple(drop)} leaves no {key}. Repair the file.")
    _log_findings(findings, dropped, json_path)
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    lvis = is_lvis(content)
    if dropped == Dropped() and not lvis and all("file_name" in image for image in content["images"]):
        register_coco_instances(name, {}, str(json_path), str(images))
    else:
        DatasetCatalog.register(name, lambda: _load_cleaned(name))
        paths = {"json_file": str(json_path), "image_root": str(images)}
        MetadataCatalog.get(name).set(evaluator_type="lvis" if lvis else "coco", dropped=dropped, **paths)
    pairs = {(annotation["category_id"], annotation["image_id"]) for annotation in cleaned["annotations"]}
    images_of = Counter(category for category, _ in pairs)
    counts = [{"id": entry["id"], "image_count": images_of[entry["id"]]} for entry in cleaned["categories"]]
    MetadataCatalog.get(name).set(class_image_count=counts)  # for detectron2's federated loss
    _name_classes(name, cleaned["categories"])
    kept = [annotation for annotation in cleaned["annotations"] if not annotation.get("iscrowd", 0)]
    return CocoSummary(
        categories=tuple(entry["name"] for entry in sorted(cleaned["categories"], key=lambda entry: entry["id"])),
        num_images=len(cleaned["images"]),
        num_trainable=len({annotation["image_id"] for annotation in kept}),
        mask_kinds=frozenset(mask_kind(annotation) for annotation in kept),
    )


def _name_classes(name: str, categories: Sequence[dict[str, Any]]) -> None:
    """Set the classes as detectron2 does when it loads the records."""
    entries = sorted(categories, key=lambda entry: entry["id"])
    numbers = {entry["id"]: index for index, entry in enumerate(entries)}
    names = [entry["name"] for entry in entries]
    MetadataCatalog.get(name).set(thing_classes=names, thing_dataset_id_to_contiguous_id=numbers)


def registered_classes(name: str) -> Classes | None:
    """Return the classes of a data set, None if unknown yet."""
    metadata = MetadataCatalog.get(name)
    names = metadata.get("thing_classes")
    if names is None:
        return None
    numbers = metadata.get("thing_dataset_id_to_contiguous_id", range(1, len(names) + 1))  # LVIS has no gaps
    return Classes(tuple(names), tuple(numbers))


def _log_findings(findings: Sequence[Finding], dropped: Dropped, json_path: str | Path) -> None:
    counts = {rank: ", ".join(f"{one.kind.name} {len(one.positions)}" for one in findings if one.rank is rank)
              for rank in Rank}  # fmt: skip
    if dropped != Dropped():
        parts = f", polygons of {len(dropped.polygons)} more" if dropped.polygons else ""
        numbers = f"{len(dropped.images)} images and {len(dropped.annotations)} annotations{parts}"
        log.warning("%s: DATASETS.DROP leaves out %s: %s", json_path, numbers, counts[Rank.DROPPABLE])
    if counts[Rank.INFORMATION]:
        log.info("%s: good to know: %s", json_path, counts[Rank.INFORMATION])


def mask_kind(annotation: dict[str, Any]) -> str:
    """Name the mask type of an annotation: "polygon", "rle" or "none"."""
    mask = annotation.get("segmentation")
    return ("rle" if isinstance(mask, dict) else "polygon") if mask else "none"


def ground_truth(name: str) -> dict[str, Any]:
    """Read the COCO file of a registered data set, without dropped entries.

    An annotation with id 0 gets another id, because pycocotools treats a match with id 0 as no match.
    """
    metadata = MetadataCatalog.get(name)
    path = metadata.get("json_file")
    if path is None:
        raise UserError(f"{name}: this data set has no file in COCO format. Set 'json_file' in its metadata.")
    content = clean(read_coco(path), metadata.get("dropped", Dropped()))
    taken = {annotation["id"] for annotation in content["annotations"]}
    free = next(number for number in count(1) if number not in taken)
    for annotation in content["annotations"]:
        if annotation["id"] == 0:
            annotation["id"] = free
    return content


def _load_cleaned(name: str) -> list[dict[str, Any]]:
    """Load records with detectron2's reader, from a cleaned temporary file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "cleaned.json")
        path.write_text(json.dumps(ground_truth(name)), encoding="utf-8")
        records: list[dict[str, Any]] = load_coco_json(str(path), MetadataCatalog.get(name).image_root, name)
    return records


def plan_drop(content: dict[str, Any], findings: Sequence[Finding], drop: Sequence[str]) -> Dropped:
    """Choose the entries that `DATASETS.DROP` leaves out."""
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
    return Dropped(frozenset(images), frozenset(annotations), frozenset(gone["polygons"] - annotations))


def clean(content: dict[str, Any], dropped: Dropped) -> dict[str, Any]:
    """Copy the content without dropped entries.

    LVIS images get a `file_name`.
    """
    annotations = []
    for at, entry in enumerate(content["annotations"]):
        if at in dropped.polygons:
            entry = {**entry, "segmentation": _sound_polygons(entry)}
        if at not in dropped.annotations:
            annotations.append(entry)
    kept = (entry for at, entry in enumerate(content["images"]) if at not in dropped.images)
    return {
        **content,
        "images": [{**entry, "file_name": file_name(entry)} for entry in kept],
        "annotations": annotations,
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


def describe_faults(faults: Sequence[Finding], drop: Sequence[str] = ()) -> str:
    """Describe faults in one line: kinds, counts, first ids and advice.

    If there is only one kind, the line has more details. The advice includes the kinds in `drop`, which are already
    dropped.
    """
    counts = [f"{one.kind.name} in {one.counted()}" for one in faults]
    if len(faults) == 1:
        text = f"{counts[0]}: {'; '.join(faults[0].places())}: {faults[0].kind.meaning}"
    else:
        text = "; ".join(f"{counted} (id {one.ids()})" for counted, one in zip(counts, faults, strict=True))
    some = [one for one in faults if one.rank is Rank.DROPPABLE and len(one.positions) < len(one.entries)]
    droppable = [one.kind.name for one in some]
    return text + (f'. To leave them out: "DATASETS.DROP={(*drop, *droppable)}"' if droppable else "")


def read_coco(path: str | Path) -> dict[str, Any]:
    """Read a COCO file with three non-empty lists of dictionaries."""
    return _read_lists(path, "images", "annotations", "categories")


def read_categories(path: str | Path) -> list[tuple[int, str]]:
    """Read ids and names of categories from JSON, sorted by id."""
    found = Findings(_read_lists(path, "categories"))
    check_categories(found)
    if faults := [one for one in found.all.values() if one.rank is not Rank.INFORMATION]:
        raise UserError(f"{path}: {describe_faults(faults)}")
    return sorted((entry["id"], entry["name"]) for entry in found.content["categories"])


def _read_lists(path: str | Path, *keys: str) -> dict[str, Any]:
    """Read a JSON file and require non-empty lists of dictionaries."""
    with paused_garbage_collection():
        content: dict[str, Any] = read_json(Path(path))
    for key in keys:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(f"{path}: has no list {key!r}. Name a file in COCO format.")
        if not content[key]:
            raise UserError(f"{path}: {key!r} is empty. Name a file with entries.")
        for index, entry in enumerate(content[key]):
            if not isinstance(entry, dict):
                raise UserError(f"{path}: {key}[{index}] is {short(entry)}. Use dictionaries.")
    return content


def use_own_data(cfg: CfgNode, train: tuple[str, str] | None, val: tuple[str, str] | None) -> None:
    """Register own data sets and fit the config to them, in place.

    Reads `DATASETS.DROP` and `MODEL.MASK_ON`. Sets and logs the data sets, the number of classes and the mask format.
    `train` and `val` are each a COCO file and an image folder, or None. If both are None, nothing changes.
    """
    summaries = []
    masks, drop = cfg.MODEL.MASK_ON, cfg.DATASETS.DROP
    if train is not None:
        summaries.append(register_coco(OWN_TRAIN, *train, masks=masks, drop=drop))
        if not summaries[0].num_trainable:
            raise UserError(f"{train[0]}: all annotations are crowd regions (iscrowd 1). Add objects to train on.")
        if masks and "rle" in summaries[0].mask_kinds and cfg.INPUT.MASK_FORMAT == "polygon":
            cfg.INPUT.MASK_FORMAT = "bitmask"
            log.info("INPUT.MASK_FORMAT is bitmask: %s has run-length encoded masks", train[0])
    if val is not None:
        summaries.append(register_coco(OWN_VAL, *val, for_evaluation=True, masks=masks, drop=drop))
    if not summaries:
        return
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (OWN_TRAIN,) if train else (), (OWN_VAL,) if val else ()
    if train is None:  # the number of classes is the detector's
        return
    classes = len(summaries[0].categories)
    if classes != cfg.MODEL.ROI_HEADS.NUM_CLASSES:
        log.info("MODEL.ROI_HEADS.NUM_CLASSES is %d, the number of categories of the data", classes)
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = classes
    box_head = cfg.MODEL.ROI_BOX_HEAD
    if box_head.USE_FED_LOSS and classes < box_head.FED_LOSS_NUM_CLASSES:
        log.info("MODEL.ROI_BOX_HEAD.FED_LOSS_NUM_CLASSES is %d: there are no more", classes)
        box_head.FED_LOSS_NUM_CLASSES = classes


def check_classes(names: Sequence[str], num_classes: int) -> None:
    """Reject loaded data sets whose number of classes differs from the model."""
    for name in names:
        found = MetadataCatalog.get(name).get("thing_classes")
        if found is not None and len(found) != num_classes:
            raise UserError(
                f"MODEL.ROI_HEADS.NUM_CLASSES: {name} has {len(found)} classes, not {num_classes}. "
                f"Set MODEL.ROI_HEADS.NUM_CLASSES={len(found)}."
            )


def check_registered(names: tuple[str, ...], key: str, needed: str = "") -> None:
    """Reject unknown data sets and missing files.

    With `needed`, at least one data set is required.
    """
    split = "train" if key == "DATASETS.TRAIN" else "val"
    if needed and not names:
        raise UserError(f"{key}: there is no {needed}. Name it with --{split}-json and --{split}-images.")
    for name in names:
        if name in (OWN_TRAIN, OWN_VAL) and name not in DatasetCatalog:
            raise UserError(f"{key}: {name} is your own data. Name it again with --{split}-json and --{split}-images.")
        if name not in DatasetCatalog:
            raise UserError(f"{key}: no data set {name!r} is registered. Name your own with --{split}-json.")
        path = MetadataCatalog.get(name).get("json_file")
        if path is not None and not Path(path).is_file():
            raise UserError(
                f"{key}: {name} needs {path}, which does not exist. Set DETECTRON2_DATASETS to the folder with coco/, "
                f"or name your own data with --{split}-json and --{split}-images."
            )
