"""Batches for a detector: augmentation, mapping, and a repeatable order."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import detectron2.data.transforms as T
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_test_loader
from detectron2.data.detection_utils import (
    annotations_to_instances,
    build_augmentation,
    check_image_size,
    transform_instance_annotations,
)
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from crossmae.data.batches import BatchPlan, PlannedBatches
from crossmae.data.broken import Unreadable
from crossmae.data.images import read_image
from crossmae.data.workers import Loader, usable_workers
from crossmae.errors import UserError
from crossmae.files import printable
from det.data.copy_paste import CopyPaste, build_copy_paste
from det.data.masks import moved_masks, tight_boxes

log = logging.getLogger(__name__)

MIN_SIDE = 1e-5  # pixels; objects whose boxes are smaller after augmentation are dropped, as in detectron2


class ResizeScale(T.ResizeScale):
    """detectron2's random scale, which would shrink a strip of an image to nothing; this one leaves it one pixel."""

    def get_transform(self, image: NDArray[np.uint8]) -> T.Transform:
        """The resize of one (H, W, C) image."""
        transform = super().get_transform(image)
        transform.new_h, transform.new_w = max(transform.new_h, 1), max(transform.new_w, 1)
        return transform


class ResizeShortestEdge(T.ResizeShortestEdge):
    """The same for detectron2's resize to a shorter side within a longest one."""

    def get_transform(self, image: NDArray[np.uint8]) -> T.Transform:
        """The resize of one (H, W, C) image."""
        transform = super().get_transform(image)
        if isinstance(transform, T.ResizeTransform):
            transform.new_h, transform.new_w = max(transform.new_h, 1), max(transform.new_w, 1)
        return transform


def read_pixels(path: str | Path) -> NDArray[np.uint8]:
    """An image file as (H, W, 3) uint8 RGB, upright, by the rules of pretraining (`crossmae.data.images`).

    Raises:
        UserError: it can not be read; names the file.
    """
    return np.asarray(read_image(path))


def augment(
    pixels: NDArray[np.uint8], augmentations: T.AugmentationList, image_format: str
) -> tuple[Tensor, T.TransformList]:
    """What the model takes of an image, and what was done to it.

    Args:
        pixels: (H, W, 3) uint8 RGB.
        augmentations: random numbers are drawn from numpy's global generator.
        image_format: order of the channels that the model takes, RGB or BGR.

    Returns:
        (3, h, w) uint8, and the transforms that give it.
    """
    seen = T.AugInput(pixels if image_format == "RGB" else np.ascontiguousarray(pixels[:, :, ::-1]))
    transforms = augmentations(seen)
    return torch.from_numpy(np.ascontiguousarray(seen.image.transpose(2, 0, 1))), transforms


def build_test_augmentations(cfg: CfgNode) -> list[T.Augmentation]:
    """What is done to an image in evaluation and prediction: a resize to `INPUT.MIN_SIZE_TEST`, `MAX_SIZE_TEST`."""
    return [ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, "choice")]


def build_augmentations(cfg: CfgNode) -> list[T.Augmentation]:
    """What is done to an image in training: large-scale jitter, or else what detectron2 makes of `INPUT.*`."""
    if cfg.INPUT.LSJ.ENABLED:
        return large_scale_jitter(cfg)
    size = cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING
    others = [one for one in build_augmentation(cfg, True) if not isinstance(one, T.ResizeShortestEdge)]
    crop = [T.RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE)] if cfg.INPUT.CROP.ENABLED else []
    return [*crop, ResizeShortestEdge(*size), *others]


def large_scale_jitter(cfg: CfgNode) -> list[T.Augmentation]:
    """Large-scale jitter (`INPUT.LSJ`) as ViTDet trains with: flip, random scale, crop of fixed size.

    An image of H x W becomes r H x r W with r = s * SIZE / max(H, W) and s uniform in MIN_SCALE .. MAX_SCALE
    (arXiv 2012.07177, section 3: 0.1 .. 2.0 of 1024). What is longer than SIZE is cropped: u times the excess is left
    out before the crop, with one u, uniform in 0 .. 1, for both axes, as in detectron2, which the published detectors
    were trained with. What is shorter is left so, because the model pads after it has normalised.
    """
    lsj = cfg.INPUT.LSJ
    augmentations: list[T.Augmentation] = []
    if cfg.INPUT.RANDOM_FLIP != "none":
        vertical = cfg.INPUT.RANDOM_FLIP == "vertical"
        augmentations.append(T.RandomFlip(horizontal=not vertical, vertical=vertical))
    augmentations.append(ResizeScale(lsj.MIN_SCALE, lsj.MAX_SCALE, lsj.SIZE, lsj.SIZE))
    augmentations.append(T.FixedSizeCrop(crop_size=(lsj.SIZE, lsj.SIZE), pad=False))
    return augmentations


class NamingMapper(DatasetMapper):
    """detectron2's mapper, whose failures become `Unreadable`, naming the image, so that they cross process borders.

    Three things differ. Files are read as in pretraining, see `read_pixels`; masks come in any form, see `moved_masks`;
    and an image may have no objects. As in detectron2, crowd regions (`iscrowd`) are no targets; nor are they spared as
    background, while evaluation ignores what is found there.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """detectron2's own reading of the config, but for large-scale jitter and copy-paste, which cuts bitmasks."""
        arguments = super().from_config(cfg, is_train)
        arguments["augmentations"] = build_augmentations(cfg) if is_train else build_test_augmentations(cfg)
        if is_train and cfg.INPUT.LSJ.ENABLED:
            arguments["recompute_boxes"] = cfg.MODEL.MASK_ON  # the crop may cut through objects
        if is_train and cfg.INPUT.COPY_PASTE.ENABLED and cfg.INPUT.MASK_FORMAT != "bitmask":
            log.info("masks are bitmasks, not INPUT.MASK_FORMAT %s: copy-paste cuts them", cfg.INPUT.MASK_FORMAT)
            arguments["instance_mask_format"] = "bitmask"
        return arguments

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any] | Unreadable:
        """One image with its annotations, as models of detectron2 take it."""
        try:
            return self._sample(copy.deepcopy(dataset_dict))
        except UserError as error:
            return Unreadable(str(error))
        except Exception as error:  # whatever is wrong with an image, the user has to hear which one
            reason = " ".join(str(error).split()) or type(error).__name__
            return Unreadable(f"{printable(dataset_dict['file_name'])}: can not be used: {reason}")

    def _sample(self, sample: dict[str, Any]) -> dict[str, Any]:
        pixels = read_pixels(sample["file_name"])
        check_image_size(sample, pixels)
        sample["image"], transforms = augment(pixels, self.augmentations, self.image_format)
        if not self.is_train:
            sample.pop("annotations", None)
        elif "annotations" in sample:
            self._transform_annotations(sample, transforms, tuple(sample["image"].shape[1:]))
        return sample

    def _transform_annotations(
        self, dataset_dict: dict[str, Any], transforms: T.TransformList, image_shape: tuple[int, int]
    ) -> None:
        """Put `instances` in the place of `annotations`."""
        kept = [entry for entry in dataset_dict.pop("annotations") if not entry.get("iscrowd", 0)]
        masks = [entry.pop("segmentation", None) for entry in kept]
        for entry in kept:
            entry["bbox"] = [float(value) for value in entry["bbox"]]  # detectron2 would keep those of integers integer
            if not self.use_keypoint:
                entry.pop("keypoints", None)
            transform_instance_annotations(
                entry, transforms, image_shape, keypoint_hflip_indices=self.keypoint_hflip_indices
            )
        instances = annotations_to_instances(kept, image_shape)
        has_mask: Any = True
        if self.use_instance_mask:
            size = (dataset_dict["height"], dataset_dict["width"])
            instances.gt_masks = moved_masks(masks, size, transforms, image_shape, self.instance_mask_format)
            tight = tight_boxes(instances.gt_masks)
            has_mask = tight.nonempty()
            if self.recompute_boxes:
                instances.gt_boxes = tight
        dataset_dict["instances"] = instances[instances.gt_boxes.nonempty(MIN_SIDE) & has_mask]


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
        copy_paste: pastes objects of other samples, see `det.data.copy_paste`; None: none are.
    """

    def __init__(
        self, records: list[dict[str, Any]], mapper: NamingMapper, seed: int, copy_paste: CopyPaste | None = None
    ) -> None:
        self.records, self.mapper, self.seed, self.copy_paste = records, mapper, seed, copy_paste

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any] | Unreadable:
        """Sample `index` as it looks in `epoch`; key = (epoch, index)."""
        epoch, index = key
        with keyed_numpy_randomness(self.seed, epoch, index):
            sample = self.mapper(self.records[index])
            if self.copy_paste is None or isinstance(sample, Unreadable):
                return sample
            return self.copy_paste(sample, self._any_sample)

    def _any_sample(self) -> dict[str, Any] | Unreadable:
        return self.mapper(self.records[np.random.randint(len(self.records))])


@contextmanager
def keyed_numpy_randomness(*key: int) -> Iterator[None]:
    """Inside, numpy's global generator, which detectron2's augmentations draw from, is seeded by the key."""
    state = np.random.get_state()
    np.random.seed(np.random.SeedSequence(key).generate_state(4))
    try:
        yield
    finally:
        np.random.set_state(state)


def build_samples(cfg: CfgNode, records: list[dict[str, Any]]) -> KeyedSamples:
    """What the trainer sees of the records, augmented as the config says."""
    return KeyedSamples(records, NamingMapper(cfg, True), cfg.SEED, build_copy_paste(cfg))


def build_test_loader(cfg: CfgNode, name: str) -> Loader:
    """Build detectron2's loader of this process's share of a data set, one image per batch."""
    built = build_detection_test_loader(cfg, name, mapper=NamingMapper(cfg, False), num_workers=0)
    workers = usable_workers(cfg.DATALOADER.NUM_WORKERS)
    return Loader(built.dataset, workers, sampler=built.sampler, collate_fn=built.collate_fn)


def build_train_loader(cfg: CfgNode, records: list[dict[str, Any]], first: int, rank: int, world_size: int) -> Loader:
    """Batches `first` .. `SOLVER.MAX_ITER` - 1 of the run, so that a resumed run goes on where it stopped.

    Raises:
        UserError: `SOLVER.IMS_PER_BATCH` is more than there are images, or can not be divided by the processes.
    """
    batch, parts = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATE
    if batch % (world_size * parts):
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {batch} can not be divided over {world_size} processes and SOLVER.ACCUMULATE "
            f"{parts} parts"
        )
    if batch > len(records):
        kind = "images with annotations" if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS else "images"
        raise UserError(
            f"SOLVER.IMS_PER_BATCH is {batch}, but the training set has only {len(records)} {kind}; lower it, and "
            "SOLVER.ACCUMULATE with it"
        )
    plan = BatchPlan(len(records), batch // world_size, cfg.SEED, rank, world_size)
    return Loader(
        build_samples(cfg, records),
        usable_workers(cfg.DATALOADER.NUM_WORKERS),
        batch_sampler=PlannedBatches(plan, first, cfg.SOLVER.MAX_ITER),
        collate_fn=list,
        # Without one of its own, the loader would draw from the generator that the model's randomness comes from.
        generator=torch.Generator(),
    )
