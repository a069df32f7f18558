"""Data sets in COCO format: checked before anything is trained, registered, and fitted to the config."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from crossmae.data import find_broken, refuse_broken
from crossmae.errors import UserError
from crossmae.sources.source import ImageFiles

log = logging.getLogger(__name__)

OWN_TRAIN, OWN_VAL = "own_coco_train", "own_coco_val"
MAX_NAMES = 5
IMAGE_KEYS = ("id", "file_name", "height", "width")
ANNOTATION_KEYS = ("id", "image_id", "category_id", "bbox")
EVALUATION_KEYS = ("area", "iscrowd")


@dataclass(frozen=True)
class CocoSummary:
    """What training needs to know about a checked file.

    Attributes:
        categories: names by rising category id, which is the order of the classes.
        num_images: images in all.
        num_trainable: images with at least one annotation that is no crowd region.
        mask_kinds: "polygon", "rle", "none": how the annotations that are no crowd regions give their masks.
    """

    categories: tuple[str, ...]
    num_images: int
    num_trainable: int
    mask_kinds: frozenset[str]


def register_coco(name: str, json_path: str | Path, images: str | Path, *, for_evaluation: bool = False) -> CocoSummary:
    """Check a data set in COCO format and register it with detectron2 under `name`, replacing an older one.

    Args:
        name: for `DATASETS.TRAIN` and `DATASETS.TEST`.
        json_path: COCO file.
        images: folder that its file names are relative to.
        for_evaluation: check also what AP needs.

    Raises:
        UserError: see `read_coco` and `check_coco`.
    """
    summary = check_coco(read_coco(json_path), Path(json_path), Path(images), for_evaluation)
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_coco_instances(name, {}, str(json_path), str(images))
    return summary


def read_coco(path: str | Path) -> dict[str, Any]:
    """Read a COCO file.

    Raises:
        UserError: no such file, not JSON (with line and column), or one of its three lists is missing.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not valid JSON: the file is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON: {error.msg} in line {error.lineno}, column {error.colno}") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(f"{path}: no list {key!r}; a COCO file has images, annotations and categories")
        if not content[key]:
            raise UserError(f"{path}: {key!r} is empty")
    return content


def check_coco(content: dict[str, Any], path: Path, images: Path, for_evaluation: bool = False) -> CocoSummary:
    """Light checks of a COCO file: keys, references, image paths, and whether the images are there and whole.

    Args:
        content: from `read_coco`.
        path: of the file, for errors.
        images: folder that `file_name` is relative to.
        for_evaluation: AP needs the area of every annotation, and whether it is a crowd region.

    Raises:
        UserError: names the file, the entry and the key.
    """
    _require(content["images"], IMAGE_KEYS, path, "images")
    _require(content["annotations"], ANNOTATION_KEYS + EVALUATION_KEYS * for_evaluation, path, "annotations")
    _require(content["categories"], ("id", "name"), path, "categories")
    image_ids = _unique_ids(content["images"], path, "images")
    category_ids = _unique_ids(content["categories"], path, "categories")
    _unique_ids(content["annotations"], path, "annotations")
    for index, annotation in enumerate(content["annotations"]):
        fault = _fault(annotation, image_ids, category_ids)
        if fault:
            raise UserError(f"{path}: annotations[{index}] (id {annotation['id']}): {fault}")
    _check_images([entry["file_name"] for entry in content["images"]], path, images)
    kept = [annotation for annotation in content["annotations"] if not annotation.get("iscrowd", 0)]
    return CocoSummary(
        categories=tuple(entry["name"] for entry in sorted(content["categories"], key=lambda entry: entry["id"])),
        num_images=len(image_ids),
        num_trainable=len({annotation["image_id"] for annotation in kept}),
        mask_kinds=frozenset(_mask_kind(annotation) for annotation in kept),
    )


def _require(entries: list[Any], keys: tuple[str, ...], path: Path, where: str) -> None:
    for index, entry in enumerate(entries):
        missing = [key for key in keys if key not in entry] if isinstance(entry, dict) else list(keys)
        if missing:
            raise UserError(f"{path}: {where}[{index}] has no {missing[0]!r}")


def _unique_ids(entries: list[dict[str, Any]], path: Path, where: str) -> set[Any]:
    ids: set[Any] = set()
    for index, entry in enumerate(entries):
        if not isinstance(entry["id"], int):
            raise UserError(f"{path}: {where}[{index}]: id must be a whole number, got {entry['id']!r}")
        if entry["id"] in ids:
            raise UserError(f"{path}: {where}[{index}]: id {entry['id']} is used twice")
        ids.add(entry["id"])
    return ids


def _fault(annotation: dict[str, Any], image_ids: set[int], category_ids: set[int]) -> str | None:
    """What is wrong with the values of one annotation, or None."""
    for key, known in (("image_id", image_ids), ("category_id", category_ids)):
        if not isinstance(annotation[key], int):
            return f"{key} must be a whole number, got {annotation[key]!r}"
        if annotation[key] not in known:
            return f"unknown {key} {annotation[key]!r}"
    if not isinstance(annotation["bbox"], list) or len(annotation["bbox"]) != 4:
        return "bbox must be [x, y, width, height]"
    if annotation.get("ignore", 0):
        return "'ignore' is not supported: remove the annotation, or mark a region of many objects as iscrowd"
    return _mask_fault(annotation.get("segmentation"))


def _mask_fault(mask: Any) -> str | None:
    """What is wrong with a `segmentation`, or None; detectron2 would drop such an object, or stop."""
    if not mask:
        return None
    if isinstance(mask, dict):
        return None if {"counts", "size"} <= set(mask) else "segmentation: run-length encoding needs counts and size"
    if not isinstance(mask, list) or not all(isinstance(polygon, list) for polygon in mask):
        return "segmentation must be a list of polygons, [[x, y, x, y, x, y, ...], ...], or run-length encoding"
    for number, polygon in enumerate(mask):
        if len(polygon) < 6 or len(polygon) % 2:
            return f"segmentation[{number}] must be x and y of at least 3 points, got {len(polygon)} numbers"
    return None


def _mask_kind(annotation: dict[str, Any]) -> str:
    mask = annotation.get("segmentation")
    return ("rle" if isinstance(mask, dict) else "polygon") if mask else "none"


def _check_images(names: list[str], path: Path, folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"{path}: the image folder {folder} does not exist")
    for index, name in enumerate(names):
        if not isinstance(name, str) or not name:
            raise UserError(f"{path}: images[{index}]: file_name must be text, got {name!r}")
        parts = PurePosixPath(name)
        if parts.is_absolute() or PureWindowsPath(name).is_absolute() or ".." in parts.parts:
            raise UserError(f"{path}: images[{index}]: file_name {name!r} leads out of the image folder {folder}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        shown = ", ".join(missing[:MAX_NAMES]) + (", ..." if len(missing) > MAX_NAMES else "")
        raise UserError(f"{path}: {len(missing)} of {len(names)} images are not in {folder}: {shown}")
    source = ImageFiles([folder / name for name in names], f"the images of {path}")
    refuse_broken(find_broken(source, range(len(source))))


def use_own_data(cfg: CfgNode, train: tuple[str, str] | None, val: tuple[str, str] | None) -> None:
    """Let the config train and evaluate on data sets named by two paths each, and fit it to them; says what it changes.

    Args:
        cfg: changed in place: `DATASETS.*`, `MODEL.ROI_HEADS.NUM_CLASSES`, `INPUT.MASK_FORMAT`.
        train, val: COCO file and image folder, or None where there is none. Both None leaves the config alone.

    Raises:
        UserError: see `read_coco`, `check_coco`, `choose_mask_format`; only crowd regions to train on; or the two files
            have different categories.
    """
    if train is None and val is None:
        return
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (), ()
    summaries = []
    if train is not None:
        summaries.append(register_coco(OWN_TRAIN, *train))
        if not summaries[0].num_trainable:
            raise UserError(
                f"{train[0]}: nothing to train on: every entry of 'annotations' is a crowd region (iscrowd 1)"
            )
        choose_mask_format(cfg, summaries[0], train[0])
        cfg.DATASETS.TRAIN = (OWN_TRAIN,)
    if val is not None:
        summaries.append(register_coco(OWN_VAL, *val, for_evaluation=True))
        cfg.DATASETS.TEST = (OWN_VAL,)
    else:
        log.info("no --val-json: nothing is evaluated")
    if train is not None and val is not None:
        check_same_categories(summaries[0], summaries[1], train[0], val[0])
    classes = len(summaries[0].categories)
    if classes != cfg.MODEL.ROI_HEADS.NUM_CLASSES:
        log.info("MODEL.ROI_HEADS.NUM_CLASSES is %d: so many categories has %s", classes, (train or val or ("",))[0])
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = classes


def check_registered(names: tuple[str, ...], key: str) -> None:
    """Raise a `UserError` unless detectron2 knows the data sets and their COCO files are where it expects them."""
    for name in names:
        if name not in DatasetCatalog:
            raise UserError(f"{key}: no data set {name!r} is registered; for your own use --train-json and --val-json")
        path = MetadataCatalog.get(name).get("json_file")
        if path is not None and not Path(path).is_file():
            raise UserError(
                f"{key}: {name} needs {path}, which does not exist; set DETECTRON2_DATASETS to the folder with coco/, "
                "or name your own data with --train-json, --train-images, --val-json and --val-images"
            )


def check_same_categories(train: CocoSummary, val: CocoSummary, train_json: str, val_json: str) -> None:
    """Raise a `UserError` unless both files name the same categories in the same order of ids."""
    if train.categories == val.categories:
        return
    only_train = sorted(set(train.categories) - set(val.categories))
    only_val = sorted(set(val.categories) - set(train.categories))
    detail = f"only in the first: {only_train}, only in the second: {only_val}"
    if not only_train and not only_val:
        detail = "the same names, but in another order of ids"
    raise UserError(f"{train_json} and {val_json} have different categories; {detail}")


def choose_mask_format(cfg: CfgNode, summary: CocoSummary, path: str) -> None:
    """Check that masks are there if they are trained, and set `INPUT.MASK_FORMAT` to one that can hold them.

    Raises:
        UserError: `MODEL.MASK_ON`, and not every annotation has a mask.
    """
    if not cfg.MODEL.MASK_ON:
        return
    if "none" in summary.mask_kinds:
        some = "some annotations have" if len(summary.mask_kinds) > 1 else "no annotation has a mask: all have"
        raise UserError(f"{path}: {some} no 'segmentation'; add masks or set MODEL.MASK_ON False")
    if "rle" in summary.mask_kinds and cfg.INPUT.MASK_FORMAT == "polygon":
        cfg.INPUT.MASK_FORMAT = "bitmask"
        log.info("INPUT.MASK_FORMAT is bitmask: %s has run-length encoded masks", path)
