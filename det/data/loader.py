"""Batches of a detector: augmentation, mapping, and a repeatable order."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import detectron2.data.transforms as T
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_test_loader, get_detection_dataset_dicts
from detectron2.data.detection_utils import (
    annotations_to_instances,
    check_image_size,
    transform_instance_annotations,
)
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from crossmae.data.batches import BatchPlan
from crossmae.data.broken import Unreadable
from crossmae.data.images import read_image
from crossmae.data.workers import Loader, usable_workers
from crossmae.errors import UserError
from crossmae.files import printable
from det.config import InputKeys
from det.data.copy_paste import paste_objects
from det.data.masks import moved_masks, tight_boxes

log = logging.getLogger(__name__)

MIN_SIDE = 1e-5  # pixels; objects whose boxes are smaller after augmentation are dropped, as in detectron2


class _AtLeastOnePixel:
    def get_transform(self, image: NDArray[np.uint8]) -> T.Transform:
        transform = super().get_transform(image)  # type: ignore[misc]
        if isinstance(transform, T.ResizeTransform):
            transform.new_h, transform.new_w = max(transform.new_h, 1), max(transform.new_w, 1)
        return transform


class ResizeScale(_AtLeastOnePixel, T.ResizeScale):
    """detectron2's resize by a random scale, but a strip keeps one pixel of height or width."""


class ResizeShortestEdge(_AtLeastOnePixel, T.ResizeShortestEdge):
    """detectron2's resize to a shorter side within a longest one, but a strip keeps one pixel."""


def augment(
    pixels: NDArray[np.uint8], augmentations: T.AugmentationList, image_format: str
) -> tuple[Tensor, T.TransformList]:
    """Augment (H, W, 3) uint8 RGB and arrange it for the model.

    Random numbers come from numpy's global generator. Returns (3, h, w) uint8 with channels in the order of
    `image_format`, RGB or BGR, and the transforms that were applied.
    """
    seen = T.AugInput(pixels if image_format == "RGB" else np.ascontiguousarray(pixels[:, :, ::-1]))
    transforms = augmentations(seen)
    return torch.from_numpy(np.ascontiguousarray(seen.image.transpose(2, 0, 1))), transforms


def build_augmentations(keys: InputKeys) -> list[T.Augmentation]:
    """Build the augmentations of training, as `INPUT` says.

    Large-scale jitter (arXiv 2012.07177, section 3: 0.1 .. 2.0 of 1024) is that of ViTDet: an image of H x W becomes
    r H x r W with r = s * SIZE / max(H, W) and s uniform in MIN_SCALE .. MAX_SCALE. A side longer than SIZE is cropped:
    u times the excess is left out before the crop, with one u, uniform in 0 .. 1, for both axes, as in detectron2, with
    which the published detectors were trained. A shorter side stays, because the model pads after it has normalised.
    """
    flip: list[T.Augmentation] = []
    if keys.RANDOM_FLIP != "none":
        vertical = keys.RANDOM_FLIP == "vertical"
        flip.append(T.RandomFlip(horizontal=not vertical, vertical=vertical))
    if keys.LSJ.ENABLED:
        side = keys.LSJ.SIZE
        crop = T.FixedSizeCrop(crop_size=(side, side), pad=False)
        return [*flip, ResizeScale(keys.LSJ.MIN_SCALE, keys.LSJ.MAX_SCALE, side, side), crop]
    crops = [T.RandomCrop(keys.CROP.TYPE, keys.CROP.SIZE)] if keys.CROP.ENABLED else []
    resize = ResizeShortestEdge(keys.MIN_SIZE_TRAIN, keys.MAX_SIZE_TRAIN, keys.MIN_SIZE_TRAIN_SAMPLING)
    return [*crops, resize, *flip]


class NamingMapper(DatasetMapper):
    """detectron2's mapper, whose failures become an `Unreadable` with the image's name, which crosses processes.

    Files are read as in pretraining, masks come in any form (`moved_masks`), and an image may have no objects. As in
    detectron2, crowd regions (`iscrowd`) are background in training, while evaluation ignores detections there.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Read the config as detectron2 does, then add large-scale jitter and copy-paste."""
        arguments, keys = super().from_config(cfg, is_train), InputKeys.model_validate(cfg.INPUT)
        test = ResizeShortestEdge(keys.MIN_SIZE_TEST, keys.MAX_SIZE_TEST, "choice")
        arguments["augmentations"] = build_augmentations(keys) if is_train else [test]
        if is_train and keys.LSJ.ENABLED:
            arguments["recompute_boxes"] = cfg.MODEL.MASK_ON  # the crop may cut through objects
        if is_train and keys.COPY_PASTE.ENABLED and keys.MASK_FORMAT != "bitmask":
            log.info("masks are bitmasks, not INPUT.MASK_FORMAT %s: copy-paste cuts them", keys.MASK_FORMAT)
            arguments["instance_mask_format"] = "bitmask"
        return arguments

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any] | Unreadable:
        """Return one image with its annotations, as models of detectron2 take them."""
        try:
            return self._sample(copy.deepcopy(dataset_dict))
        except UserError as error:
            return Unreadable(str(error))
        except Exception as error:  # whatever is wrong, the user must learn which image it is
            reason = " ".join(str(error).split()) or type(error).__name__
            return Unreadable(f"{printable(dataset_dict['file_name'])}: cannot be used: {reason}")

    def _sample(self, sample: dict[str, Any]) -> dict[str, Any]:
        pixels = np.asarray(read_image(sample["file_name"]))
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


def refuse_unreadable(batch: list[Any]) -> list[Any]:
    """Return a batch, or raise a `UserError` with its first `Unreadable`'s message."""
    for sample in batch:
        if isinstance(sample, Unreadable):
            raise UserError(sample.message)
    return batch


class KeyedSamples(Dataset[Any]):
    """Training samples whose augmentation depends on seed, epoch and index only.

    With probability `paste_prob` (the paper's is 1), a random subset of the objects of a random other sample is pasted,
    all subsets being equally likely; `fill` is the value of each channel of new pixels.
    """

    def __init__(
        self,
        records: list[dict[str, Any]],
        mapper: Callable[[dict[str, Any]], dict[str, Any] | Unreadable],
        seed: int,
        paste_prob: float = 0.0,
        fill: tuple[int, ...] = (),
    ) -> None:
        self.records, self.mapper, self.seed, self.paste_prob, self.fill = records, mapper, seed, paste_prob, fill

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any] | Unreadable:
        epoch, index = key
        with keyed_numpy_randomness(self.seed, epoch, index):
            sample = self.mapper(self.records[index])
            if isinstance(sample, Unreadable) or np.random.uniform() >= self.paste_prob:
                return sample
            other = self.mapper(self.records[np.random.randint(len(self))])
            if isinstance(other, Unreadable):
                return other
            chosen = np.random.uniform(size=len(other["instances"])) < 0.5
            return paste_objects(sample, other, torch.from_numpy(chosen), self.fill)


@contextmanager
def keyed_numpy_randomness(*key: int) -> Iterator[None]:
    """Seed numpy's global generator, which detectron2 draws from, by a key."""
    state = np.random.get_state()
    np.random.seed(np.random.SeedSequence(key).generate_state(4))
    try:
        yield
    finally:
        np.random.set_state(state)


def training_samples(cfg: CfgNode, records: list[dict[str, Any]]) -> KeyedSamples:
    """Build the training set of some records, augmented as `INPUT` says."""
    # The model pads with zeros once the mean is subtracted.
    fill = tuple(round(mean) for mean in cfg.MODEL.PIXEL_MEAN)
    prob = cfg.INPUT.COPY_PASTE.PROB if cfg.INPUT.COPY_PASTE.ENABLED else 0.0
    return KeyedSamples(records, NamingMapper(cfg, True), cfg.SEED, prob, fill)


def build_test_loader(name: str, mapper: NamingMapper, workers: int) -> Loader:
    """Build the loader of this process's share, one image per batch."""
    records = get_detection_dataset_dicts([name], filter_empty=False)
    built = build_detection_test_loader(records, mapper=mapper, num_workers=0)
    return Loader(built.dataset, usable_workers(workers), sampler=built.sampler, collate_fn=built.collate_fn)


def build_train_loader(
    samples: KeyedSamples,
    batch: int,
    steps: range,
    *,
    parts: int = 1,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Loader:
    """Build the batches of some steps of a run.

    Args:
        batch: images per step, over all processes.
        steps: numbers of the steps; a resumed run starts at the step where the run stopped.
        parts: that a process computes its share in.
        workers: processes that read images; 0 reads in the training process.

    Raises:
        UserError: `batch` is larger than the training set, or not divisible over processes and parts.
    """
    if batch % (world_size * parts):
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {batch} cannot be divided over {world_size} processes and SOLVER.ACCUMULATE "
            f"{parts} parts"
        )
    if batch > len(samples):
        raise UserError(
            f"SOLVER.IMS_PER_BATCH is {batch}, but the training set has only {len(samples)} images (without "
            "annotations too, if DATALOADER.FILTER_EMPTY_ANNOTATIONS is False). Lower it, and SOLVER.ACCUMULATE with it"
        )
    plan = BatchPlan(len(samples), batch // world_size, samples.seed, rank, world_size)
    return Loader(
        samples,
        usable_workers(workers),
        batch_sampler=map(plan.batch, steps),
        collate_fn=list,
        # Without a generator of its own, the loader would draw from the one that the model's randomness comes from.
        generator=torch.Generator(),
    )
