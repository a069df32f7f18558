"""Data sets in COCO format: checked before anything is trained, registered, and fitted to the config."""

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
from det.data.coco_checks import (
    Finding,
    file_name,
    find_category_faults,
    find_faults,
    is_lvis,
    paused_garbage_collection,
)
from det.data.coco_kinds import DROPPABLE, KINDS, Rank
from det.data.coco_masks import polygon_fault

log = logging.getLogger(__name__)

OWN_TRAIN, OWN_VAL = "own_coco_train", "own_coco_val"
MAX_NAMES = 5


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


@dataclass(frozen=True)
class Dropped:
    """What `DATASETS.DROP` leaves out of a file, by position in its lists.

    Attributes:
        images: left out with all their annotations.
        annotations: left out; those of `images` are among them.
        polygons: annotations that keep their other polygons, but not the degenerate ones.
    """

    images: frozenset[int] = frozenset()
    annotations: frozenset[int] = frozenset()
    polygons: frozenset[int] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.images or self.annotations or self.polygons)


def register_coco(
    name: str,
    json_path: str | Path,
    images: str | Path,
    *,
    for_evaluation: bool = False,
    masks: bool = False,
    drop: Sequence[str] = (),
) -> CocoSummary:
    """Check a data set in COCO format and register it with detectron2 under `name`, replacing an older one.

    Args:
        name: for `DATASETS.TRAIN` and `DATASETS.TEST`.
        json_path: COCO file; it is never changed.
        images: folder that its file names are relative to.
        for_evaluation: check also what AP needs.
        masks: masks are trained or evaluated, so that every annotation needs one.
        drop: kinds of faults whose entries may be left out, of `det.data.coco_kinds.DROPPABLE`; they are logged.

    Raises:
        UserError: see `read_coco`; no image folder; faults that are not to be dropped; an unknown kind in `drop`; or
            nothing is left.
    """
    check_drop(drop)
    content = read_coco(json_path)
    if not Path(images).is_dir():
        raise UserError(f"{json_path}: the image folder {images} does not exist")
    findings = find_faults(content, Path(images), for_evaluation=for_evaluation, masks=masks)
    dropped = plan_drop(content, findings, drop)
    faults = remaining_faults(findings, dropped)
    if faults:
        command = f"python tools/check_coco.py {shlex.quote(str(json_path))} {shlex.quote(str(images))}"
        command += " --evaluation" * for_evaluation
        raise UserError(f"{json_path}: {describe_faults(faults, drop)}; the whole table: {command}")
    cleaned = clean(content, dropped)
    for key in ("images", "annotations"):
        if not cleaned[key]:
            raise UserError(f"{json_path}: DATASETS.DROP {tuple(drop)} leaves no {key}")
    _tell(findings, dropped, drop, json_path)
    _register(name, content, dropped, json_path, images)
    MetadataCatalog.get(name).set(class_image_count=images_of_each_class(cleaned))  # for the federated loss
    return _summary(cleaned)


def _register(name: str, content: dict[str, Any], dropped: Dropped, json_path: str | Path, images: str | Path) -> None:
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    if not dropped and not is_lvis(content) and all("file_name" in image for image in content["images"]):
        register_coco_instances(name, {}, str(json_path), str(images))
        return
    DatasetCatalog.register(name, lambda: _load_cleaned(name))
    paths = {"json_file": str(json_path), "image_root": str(images)}
    MetadataCatalog.get(name).set(evaluator_type="lvis" if is_lvis(content) else "coco", dropped=dropped, **paths)


def _tell(findings: Sequence[Finding], dropped: Dropped, drop: Sequence[str], json_path: str | Path) -> None:
    """Log what is left out, and what is good to know."""
    counts = {rank: [f"{one.kind.name} {len(one.positions)}" for one in findings if one.rank is rank] for rank in Rank}
    if dropped:
        parts = f", polygons of {len(dropped.polygons)} more" if dropped.polygons else ""
        numbers = f"{len(dropped.images)} images and {len(dropped.annotations)} annotations{parts}"
        log.warning("%s: left out by DATASETS.DROP: %s: %s", json_path, numbers, ", ".join(counts[Rank.DROPPABLE]))
    if counts[Rank.INFORMATION]:
        log.info("%s: good to know: %s", json_path, ", ".join(counts[Rank.INFORMATION]))


def _summary(content: dict[str, Any]) -> CocoSummary:
    kept = [annotation for annotation in content["annotations"] if not annotation.get("iscrowd", 0)]
    return CocoSummary(
        categories=tuple(entry["name"] for entry in sorted(content["categories"], key=lambda entry: entry["id"])),
        num_images=len(content["images"]),
        num_trainable=len({annotation["image_id"] for annotation in kept}),
        mask_kinds=frozenset(mask_kind(annotation) for annotation in kept),
    )


def images_of_each_class(content: dict[str, Any]) -> list[dict[str, int]]:
    """In how many images each class is: `id` and `image_count`, as detectron2's federated loss reads them."""
    pairs = {(annotation["category_id"], annotation["image_id"]) for annotation in content["annotations"]}
    counts = Counter(category for category, _ in pairs)
    return [{"id": entry["id"], "image_count": counts[entry["id"]]} for entry in content["categories"]]


def mask_kind(annotation: dict[str, Any]) -> str:
    """How an annotation gives its mask: "polygon", "rle" or "none"."""
    mask = annotation.get("segmentation")
    return ("rle" if isinstance(mask, dict) else "polygon") if mask else "none"


def ground_truth(name: str) -> dict[str, Any]:
    """Content of a registered data set as evaluation has to see it: that of its COCO file, less what was dropped.

    An annotation of id 0 gets another id, because pycocotools takes a match with 0 for none.

    Args:
        name: of a data set that detectron2 knows, whoever registered it.

    Raises:
        UserError: it has no COCO file, or one that can not be read; see `read_coco`.
    """
    metadata = MetadataCatalog.get(name)
    path = metadata.get("json_file")
    if path is None:
        raise UserError(f"{name}: this data set has no file in COCO format (its metadata lack 'json_file')")
    content = clean(read_coco(path), metadata.get("dropped", Dropped()))
    taken = {annotation["id"] for annotation in content["annotations"]}
    free = next(number for number in count(1) if number not in taken)
    for annotation in content["annotations"]:
        if annotation["id"] == 0:
            annotation["id"] = free
    return content


def _load_cleaned(name: str) -> list[dict[str, Any]]:
    """Records of a data set that detectron2 can not read as it is, by its own reader, from a temporary file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "cleaned.json")
        path.write_text(json.dumps(ground_truth(name)), encoding="utf-8")
        records: list[dict[str, Any]] = load_coco_json(str(path), MetadataCatalog.get(name).image_root, name)
    return records


def plan_drop(content: dict[str, Any], findings: Sequence[Finding], drop: Sequence[str]) -> Dropped:
    """What is left out where the faults of some kinds are dropped.

    Args:
        content: from `read_coco`.
        findings: from `find_faults`.
        drop: names of kinds.
    """
    chosen = [one for one in findings if one.kind.name in drop and one.rank is Rank.DROPPABLE]
    images = {at for one in chosen if one.kind.where == "images" for at in one.positions}
    ids = {content["images"][at]["id"] for at in images}
    annotations = {
        at
        for at, entry in enumerate(content["annotations"])
        if ids and type(entry.get("image_id")) is int and entry["image_id"] in ids
    }
    polygons = set()
    for one in chosen:
        if one.kind.name == "degenerate-polygon":
            polygons |= {at for at in one.positions if _sound_polygons(content["annotations"][at])}
            annotations |= set(one.positions) - polygons
        elif one.kind.where == "annotations":
            annotations |= set(one.positions)
    return Dropped(frozenset(images), frozenset(annotations), frozenset(polygons - annotations))


def clean(content: dict[str, Any], dropped: Dropped) -> dict[str, Any]:
    """A file's content less what is dropped, and with a `file_name` for every image, which LVIS gives as `coco_url`."""
    images = [entry for at, entry in enumerate(content["images"]) if at not in dropped.images]
    annotations = []
    for at, entry in enumerate(content["annotations"]):
        if at in dropped.polygons:
            entry = {**entry, "segmentation": _sound_polygons(entry)}
        if at not in dropped.annotations:
            annotations.append(entry)
    images = [{**entry, "file_name": file_name(entry)} for entry in images]
    return {**content, "images": images, "annotations": annotations}


def _sound_polygons(annotation: dict[str, Any]) -> list[list[float]]:
    return [polygon for polygon in annotation["segmentation"] if not polygon_fault(polygon)]


def check_drop(drop: Sequence[str]) -> None:
    """Raise a `UserError` unless every word names a kind of fault whose entries can be left out."""
    expected = f"expected a tuple with some of: {', '.join(DROPPABLE)}"
    if isinstance(drop, str):
        raise UserError(f"DATASETS.DROP: {drop!r} is no tuple; {expected}")
    for word in drop:
        if word not in DROPPABLE:
            what = "is nothing that can be left out" if word in KINDS else "is no kind of fault"
            raise UserError(f"DATASETS.DROP: {word!r} {what}; {expected}")


def remaining_faults(findings: Sequence[Finding], dropped: Dropped) -> list[Finding]:
    """Errors in entries that are not dropped."""
    faults = []
    for one in findings:
        gone = dropped.images if one.kind.where == "images" else dropped.annotations
        if one.kind.name == "degenerate-polygon":
            gone |= dropped.polygons
        positions = [at for at in one.positions if one.kind.where == "categories" or at not in gone]
        if positions and one.rank is not Rank.INFORMATION:
            faults.append(replace(one, positions=positions))
    return faults


def describe_faults(faults: Sequence[Finding], drop: Sequence[str] = ()) -> str:
    """One line: kinds with counts and first ids, and what to do; of a single kind more than of several.

    Args:
        faults: at least one.
        drop: kinds that are dropped already.
    """
    if len(faults) == 1:
        text = f"{_count(faults[0])}: {'; '.join(describe_first(faults[0]))}: {faults[0].kind.meaning}"
    else:
        text = "; ".join(f"{_count(one)} (id {first_ids(one)})" for one in faults)
    some = [one for one in faults if one.rank is Rank.DROPPABLE and len(one.positions) < len(one.entries)]
    droppable = [one.kind.name for one in some]
    advice = f'; to leave them out: "DATASETS.DROP={(*drop, *droppable)}"' if droppable else ""
    return text + advice


def _count(fault: Finding) -> str:
    return f"{fault.kind.name} in {len(fault.positions)} of {len(fault.entries)} {fault.kind.where}"


def first_ids(finding: Finding) -> str:
    """Ids of the first few entries."""
    ids = [str(entry["id"]) for entry in finding.first(MAX_NAMES)]
    return ", ".join([*ids, "..."] if len(finding.positions) > MAX_NAMES else ids)


def describe_first(finding: Finding) -> list[str]:
    """Place, id and fault of the first few entries."""
    places = [
        f"{finding.kind.where}[{entry['position']}] (id {entry['id']}): {entry['note']}".removesuffix(": ")
        for entry in finding.first(MAX_NAMES)
    ]
    return [*places, "..."] if len(finding.positions) > MAX_NAMES else places


def read_coco(path: str | Path) -> dict[str, Any]:
    """Read a COCO file.

    Raises:
        UserError: no such file, not JSON (with line and column), or one of its three lists is missing, empty, or of
            something else than dictionaries.
    """
    return _read_lists(path, "images", "annotations", "categories")


def read_categories(path: str | Path) -> list[tuple[int, str]]:
    """Ids and names of the categories of a COCO file, or of one with nothing but `categories`, by rising id.

    Raises:
        UserError: as of `read_coco`; an id or a name is missing, of the wrong type, or there twice.
    """
    categories = _read_lists(path, "categories")["categories"]
    faults = [one for one in find_category_faults(categories) if one.rank is not Rank.INFORMATION]
    if faults:
        raise UserError(f"{path}: {describe_faults(faults)}")
    return sorted((entry["id"], entry["name"]) for entry in categories)


def _read_lists(path: str | Path, *keys: str) -> dict[str, Any]:
    """The content of a JSON file that has, under some keys, lists of dictionaries that are not empty."""
    try:
        with paused_garbage_collection():
            content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not valid JSON: the file is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON: {error.msg} in line {error.lineno}, column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or lists within lists within...
        raise UserError(f"{path}: can not be read: {error}") from None
    for key in keys:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(f"{path}: no list {key!r}; a COCO file has images, annotations and categories")
        if not content[key]:
            raise UserError(f"{path}: {key!r} is empty")
        for index, entry in enumerate(content[key]):
            if not isinstance(entry, dict):
                raise UserError(f"{path}: {key}[{index}] must be a dictionary, got {short(entry)}")
    return content


def use_own_data(cfg: CfgNode, train: tuple[str, str] | None, val: tuple[str, str] | None) -> None:
    """Let the config train and evaluate on data sets named by two paths each, and fit it to them; says what it changes.

    Args:
        cfg: changed in place: `DATASETS.*`, `MODEL.ROI_HEADS.NUM_CLASSES`, `INPUT.MASK_FORMAT`; `DATASETS.DROP` and
            `MODEL.MASK_ON` are read.
        train, val: COCO file and image folder, or None where there is none. Both None leaves the config alone.

    Raises:
        UserError: see `register_coco`; only crowd regions to train on; or the two files have different categories.
    """
    if train is None and val is None:
        return
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (), ()
    summaries = []
    masks, drop = cfg.MODEL.MASK_ON, cfg.DATASETS.DROP
    if train is not None:
        summaries.append(register_coco(OWN_TRAIN, *train, masks=masks, drop=drop))
        if not summaries[0].num_trainable:
            raise UserError(
                f"{train[0]}: nothing to train on: every entry of 'annotations' is a crowd region (iscrowd 1)"
            )
        choose_mask_format(cfg, summaries[0], train[0])
        cfg.DATASETS.TRAIN = (OWN_TRAIN,)
    if val is not None:
        summaries.append(register_coco(OWN_VAL, *val, for_evaluation=True, masks=masks, drop=drop))
        cfg.DATASETS.TEST = (OWN_VAL,)
    if train is not None and val is not None:
        check_same_categories(summaries[0], summaries[1], train[0], val[0])
    classes = len(summaries[0].categories)
    if classes != cfg.MODEL.ROI_HEADS.NUM_CLASSES:
        log.info("MODEL.ROI_HEADS.NUM_CLASSES is %d: so many categories has %s", classes, (train or val or ("",))[0])
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = classes
    box_head = cfg.MODEL.ROI_BOX_HEAD
    if box_head.USE_FED_LOSS and classes < box_head.FED_LOSS_NUM_CLASSES:
        log.info("MODEL.ROI_BOX_HEAD.FED_LOSS_NUM_CLASSES is %d: there are no more", classes)
        box_head.FED_LOSS_NUM_CLASSES = classes


def check_classes(cfg: CfgNode) -> None:
    """Raise a `UserError` unless `MODEL.ROI_HEADS.NUM_CLASSES` is that of every data set; they have to be loaded."""
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        found = MetadataCatalog.get(name).get("thing_classes")
        if found is not None and len(found) != cfg.MODEL.ROI_HEADS.NUM_CLASSES:
            raise UserError(
                f"MODEL.ROI_HEADS.NUM_CLASSES is {cfg.MODEL.ROI_HEADS.NUM_CLASSES}, but {name} has {len(found)} classes"
            )


def check_registered(names: tuple[str, ...], key: str) -> None:
    """Raise a `UserError` unless detectron2 knows the data sets and their COCO files are where it expects them."""
    for name in names:
        if name in (OWN_TRAIN, OWN_VAL) and name not in DatasetCatalog:
            split = "train" if name == OWN_TRAIN else "val"
            raise UserError(f"{key} is data of your own: name it again with --{split}-json and --{split}-images")
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
    raise UserError(
        f"{train_json} and {val_json} have different categories; {detail}; copy the list 'categories' of one "
        "file into the other, if its ids mean the same"
    )


def choose_mask_format(cfg: CfgNode, summary: CocoSummary, path: str) -> None:
    """Set `INPUT.MASK_FORMAT` to one that can hold the masks, if masks are trained."""
    if cfg.MODEL.MASK_ON and "rle" in summary.mask_kinds and cfg.INPUT.MASK_FORMAT == "polygon":
        cfg.INPUT.MASK_FORMAT = "bitmask"
        log.info("INPUT.MASK_FORMAT is bitmask: %s has run-length encoded masks", path)
