"""Data sets in COCO format: light checks before anything is trained, registration, mapping, and a repeatable order.

A full validator can take the place of `check_coco`, which is the only judge of a file's contents.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import detectron2.data.transforms as T
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from torch.utils.data import DataLoader, Dataset

from crossmae.data import BatchPlan, PlannedBatches, Unreadable, find_broken, refuse_broken, usable_workers
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


def build_augmentations(cfg: CfgNode) -> list[T.Augmentation]:
    """Large-scale jitter as ViTDet trains with (`INPUT.LSJ`): flip, random scale, crop of fixed size."""
    lsj = cfg.INPUT.LSJ
    augmentations: list[T.Augmentation] = []
    if cfg.INPUT.RANDOM_FLIP != "none":
        vertical = cfg.INPUT.RANDOM_FLIP == "vertical"
        augmentations.append(T.RandomFlip(horizontal=not vertical, vertical=vertical))
    augmentations.append(T.ResizeScale(lsj.MIN_SCALE, lsj.MAX_SCALE, lsj.SIZE, lsj.SIZE))
    augmentations.append(T.FixedSizeCrop(crop_size=(lsj.SIZE, lsj.SIZE), pad=False))
    return augmentations


class NamingMapper(DatasetMapper):
    """detectron2's mapper, whose failures become `Unreadable`, naming the image, so that they cross process borders."""

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """detectron2's own reading of the config, but for large-scale jitter."""
        arguments = super().from_config(cfg, is_train)
        if is_train and cfg.INPUT.LSJ.ENABLED:
            arguments["augmentations"] = build_augmentations(cfg)
            arguments["recompute_boxes"] = cfg.MODEL.MASK_ON  # the crop may cut through objects
        return arguments

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any] | Unreadable:
        """One image with its annotations, as models of detectron2 take it."""
        try:
            return super().__call__(dataset_dict)
        except Exception as error:  # whatever is wrong with an image, the user has to hear which one
            reason = " ".join(str(error).split()) or type(error).__name__
            return Unreadable(f"{dataset_dict['file_name']}: can not be used: {reason}")


def refuse_unreadable(batch: list[Any]) -> None:
    """Raise a `UserError` with the message of the first sample that `NamingMapper` could not make."""
    for sample in batch:
        if isinstance(sample, Unreadable):
            raise UserError(sample.message)


class KeyedSamples(Dataset[Any]):
    """Training samples whose augmentation depends on seed, epoch and index alone, whichever process makes them.

    Args:
        records: images in detectron2's format.
        mapper: from a record to a sample.
        seed: of the augmentation.
    """

    def __init__(self, records: list[dict[str, Any]], mapper: NamingMapper, seed: int) -> None:
        self.records, self.mapper, self.seed = records, mapper, seed

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any] | Unreadable:
        """Sample `index` as it looks in `epoch`; key = (epoch, index)."""
        epoch, index = key
        with keyed_numpy_randomness(self.seed, epoch, index):
            return self.mapper(self.records[index])


@contextmanager
def keyed_numpy_randomness(*key: int) -> Iterator[None]:
    """Inside, numpy's global generator, which detectron2's augmentations draw from, is seeded by the key."""
    state = np.random.get_state()
    np.random.seed(np.random.SeedSequence(key).generate_state(4))
    try:
        yield
    finally:
        np.random.set_state(state)


def build_train_loader(
    cfg: CfgNode, records: list[dict[str, Any]], first: int, rank: int, world_size: int
) -> DataLoader[Any]:
    """Batches `first` .. `SOLVER.MAX_ITER` - 1 of the run, so that a resumed run goes on where it stopped.

    Raises:
        UserError: `SOLVER.IMS_PER_BATCH` is more than there are images, or can not be divided by the processes.
    """
    batch = cfg.SOLVER.IMS_PER_BATCH
    if batch % world_size:
        raise UserError(f"SOLVER.IMS_PER_BATCH {batch} can not be divided over {world_size} processes")
    if batch > len(records):
        raise UserError(
            f"SOLVER.IMS_PER_BATCH is {batch}, but the training set has only {len(records)} images with annotations"
        )
    plan = BatchPlan(len(records), batch // world_size, cfg.SEED, rank, world_size)
    return DataLoader(
        KeyedSamples(records, NamingMapper(cfg, True), cfg.SEED),
        batch_sampler=PlannedBatches(plan, first, cfg.SOLVER.MAX_ITER),
        num_workers=usable_workers(cfg.DATALOADER.NUM_WORKERS),
        collate_fn=list,
        # Without one of its own, the loader would draw from the generator that the model's randomness comes from.
        generator=torch.Generator(),
    )
