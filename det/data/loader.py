"""Training and test batches of a detector: augmentation, mapping, and a repeatable order."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import detectron2.data.transforms as T
import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper, build_detection_test_loader, get_detection_dataset_dicts
from detectron2.data.build import filter_images_with_only_crowd_annotations
from detectron2.data.detection_utils import (
    annotations_to_instances,
    check_image_size,
    transform_instance_annotations,
)
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from crossmae.data.batches import BatchPlan
from crossmae.data.broken import Unreadable
from crossmae.data.images import MAX_PIXELS, read_image
from crossmae.data.workers import Loader, usable_workers
from crossmae.errors import UserError, counted, printable
from det.config import InputKeys, image_limits
from det.data.copy_paste import paste_objects
from det.data.masks import moved_masks, tight_boxes
from det.library_warnings import library_warnings_ignored

log = logging.getLogger(__name__)

# Before training: images that are mapped, bytes of the masks of an image, and the share of objects that has to be left.
CHECKED_IMAGES, CHECKED_BYTES, LEFT = 16, 1 << 28, 0.5
WORKERS_KEY = "DATALOADER.NUM_WORKERS"
MIN_SIDE = 1e-5  # pixels; objects with smaller boxes after augmentation are dropped, as in detectron2


class _AtLeastOnePixel:
    def get_transform(self, image: NDArray[np.uint8]) -> T.Transform:
        transform = super().get_transform(image)  # type: ignore[misc]
        if isinstance(transform, T.ResizeTransform):
            transform.new_h, transform.new_w = max(transform.new_h, 1), max(transform.new_w, 1)
        return transform


class ResizeScale(_AtLeastOnePixel, T.ResizeScale):
    """detectron2's resize by a random scale. Height and width stay at least one pixel."""


class ResizeShortestEdge(_AtLeastOnePixel, T.ResizeShortestEdge):
    """detectron2's resize to a shorter side within a longest side. Height and width stay at least one pixel."""


def augment(
    pixels: NDArray[np.uint8], augmentations: T.AugmentationList, image_format: str
) -> tuple[Tensor, T.TransformList]:
    """Augment (H, W, 3) uint8 RGB, and convert it for the model.

    Random numbers come from numpy's global generator. Returns (3, h, w) uint8 with channels in the order
    `image_format`, RGB or BGR, and the applied transforms.
    """
    seen = T.AugInput(pixels if image_format == "RGB" else np.ascontiguousarray(pixels[:, :, ::-1]))
    transforms = augmentations(seen)
    return torch.from_numpy(np.ascontiguousarray(seen.image.transpose(2, 0, 1))), transforms


def build_augmentations(keys: InputKeys) -> list[T.Augmentation]:
    """Build the training augmentations of the section `INPUT`.

    Large-scale jitter (arXiv 2012.07177, section 3: 0.1 .. 2.0 of 1024) works as in ViTDet. An image of H x W becomes r
    H x r W with r = s * SIZE / max(H, W) and s uniform in MIN_SCALE .. MAX_SCALE. A side longer than SIZE is cropped:
    the crop starts at u times the excess. One u, uniform in 0 .. 1, is used for both axes, as in detectron2, which
    trained the published detectors. A shorter side is not padded here, because the model pads after normalisation.
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
    """detectron2's mapper, which returns an `Unreadable` with the image's name instead of failing.

    An `Unreadable` can be sent between processes. Files are read as in pretraining, masks can have any format
    (`moved_masks`), and an image may have no objects. Crowd regions (`iscrowd`) are handled as in detectron2: in
    training they are background, and evaluation ignores detections there.
    """

    @configurable
    def __init__(self, *, max_pixels: int = MAX_PIXELS, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.limits = image_limits(max_pixels)

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Read detectron2's arguments, and add large-scale jitter and copy-paste."""
        arguments, keys = super().from_config(cfg, is_train), InputKeys.model_validate(cfg.INPUT)
        test = ResizeShortestEdge(keys.MIN_SIZE_TEST, keys.MAX_SIZE_TEST, "choice")
        arguments["max_pixels"] = keys.MAX_PIXELS
        arguments["augmentations"] = build_augmentations(keys) if is_train else [test]
        if is_train and keys.LSJ.ENABLED:
            arguments["recompute_boxes"] = cfg.MODEL.MASK_ON  # the crop may cut objects
        if is_train and keys.COPY_PASTE.ENABLED and keys.MASK_FORMAT != "bitmask":
            log.info("masks are bitmasks, not INPUT.MASK_FORMAT %s: copy-paste cuts them", keys.MASK_FORMAT)
            arguments["instance_mask_format"] = "bitmask"
        return arguments

    @library_warnings_ignored()
    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any] | Unreadable:
        """Return one image with its annotations, in detectron2's format."""
        try:
            return self._sample(copy.deepcopy(dataset_dict))
        except UserError as error:
            return Unreadable(str(error))
        except Exception as error:  # after any failure, the user must learn which image it was
            reason = " ".join(str(error).split()) or type(error).__name__
            return Unreadable(f"{printable(dataset_dict['file_name'])}: cannot be used: {reason}")

    def _sample(self, sample: dict[str, Any]) -> dict[str, Any]:
        pixels = np.asarray(read_image(sample["file_name"], self.limits))
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
            entry["bbox"] = [float(value) for value in entry["bbox"]]  # detectron2 would keep integer boxes as integers
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
    """Return a batch, or raise UserError for its first `Unreadable`."""
    for sample in batch:
        if isinstance(sample, Unreadable):
            raise UserError(sample.message)
    return batch


class SampleBatch(list[Any]):
    """The samples of a batch.

    torch's loader calls `pin_memory`. Only the ground truth is pinned: the detector copies all pixels into one pinned
    batch itself.
    """

    def pin_memory(self) -> SampleBatch:
        for sample in self:
            if not isinstance(sample, Unreadable) and "instances" in sample:
                pin_instances(sample["instances"])
        return self


def pin_instances(instances: Instances) -> None:
    """Move boxes, masks and classes to pinned memory, in place."""
    for value in instances.get_fields().values():
        if isinstance(value, Boxes | BitMasks):
            value.tensor = value.tensor.pin_memory()
    for name, value in instances.get_fields().items():
        if isinstance(value, Tensor):
            instances.set(name, value.pin_memory())


class KeyedSamples(Dataset[Any]):
    """Training samples whose augmentation depends only on seed, epoch and index.

    With probability `paste_prob` (1 in the paper), objects of a random other sample are pasted. They are a random
    subset, and all subsets are equally likely. `fill` is the value of each channel of new pixels.
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


def check_objects_left(records: list[dict[str, Any]], mapper: NamingMapper) -> None:
    """Map a sample of images without augmentation, and require most objects.

    Whatever is wrong with boxes and masks, training on few of the annotated objects is an error. `mapper` is changed.
    Raises UserError if most are gone, or an image cannot be used.
    """
    mapper.augmentations, mapper.instance_mask_format = T.AugmentationList([]), "bitmask"
    some = [record for record in records if any(not one.get("iscrowd", 0) for one in record.get("annotations", ()))]
    some = [some[at] for at in np.linspace(0, len(some) - 1, min(CHECKED_IMAGES, len(some))).astype(int)]
    total = inside = left = 0
    for record in some:
        objects = [one for one in record["annotations"] if not one.get("iscrowd", 0)]
        objects = objects[: max(1, CHECKED_BYTES // (record["height"] * record["width"]))]
        (sample,) = refuse_unreadable([mapper({**record, "annotations": objects})])
        total, left = total + len(objects), left + len(sample["instances"])
        inside += sum(_box_in_image(one, record) for one in objects)
    if left < LEFT * total:
        raise UserError(
            f"DATASETS.TRAIN: of {counted(total, 'object')} in {counted(len(some), 'image')}, only {left} are left "
            f"before any augmentation: {total - inside} boxes are empty or outside their image, and {inside - left} "
            "masks cover no pixel of it. "
            "Check that boxes and masks are in pixels of these images, with x before y."
        )


def _box_in_image(annotation: dict[str, Any], record: dict[str, Any]) -> bool:
    box = BoxMode.convert(list(map(float, annotation["bbox"])), annotation["bbox_mode"], BoxMode.XYXY_ABS)
    x0, y0, x1, y1 = np.clip(box, 0, 2 * (record["width"], record["height"]))
    return bool(x1 > x0 and y1 > y0)


@contextmanager
def keyed_numpy_randomness(*key: int) -> Iterator[None]:
    """Seed numpy's global generator, which detectron2 uses, from a key."""
    state = np.random.get_state()
    np.random.seed(np.random.SeedSequence(key).generate_state(4))
    try:
        yield
    finally:
        np.random.set_state(state)


def training_records(cfg: CfgNode) -> tuple[list[dict[str, Any]], int]:
    """Load the records of the training images.

    Images without objects are left out, unless `DATALOADER.FILTER_EMPTY_ANNOTATIONS` is False.

    Returns the records, and the number of images with those that are left out. Raises UserError if no image is left.
    """
    every = get_detection_dataset_dicts(cfg.DATASETS.TRAIN, filter_empty=False)
    if not cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS or "annotations" not in every[0]:
        return every, len(every)
    kept = filter_images_with_only_crowd_annotations(every)
    if not kept:
        raise UserError(f"DATASETS.TRAIN: none of {counted(len(every), 'image')} has an object. Label some images.")
    return kept, len(every)


def training_samples(cfg: CfgNode, records: list[dict[str, Any]]) -> KeyedSamples:
    """Build the training set of the records, with the augmentation of `INPUT`."""
    # The model pads with zeros after it subtracts the mean.
    fill = tuple(round(mean) for mean in cfg.MODEL.PIXEL_MEAN)
    prob = cfg.INPUT.COPY_PASTE.PROB if cfg.INPUT.COPY_PASTE.ENABLED else 0.0
    return KeyedSamples(records, NamingMapper(cfg, True), cfg.SEED, prob, fill)


def build_test_loader(name: str, mapper: NamingMapper, workers: int) -> Loader:
    """Build a loader of this process's share, one image per batch."""
    records = get_detection_dataset_dicts([name], filter_empty=False)
    built = build_detection_test_loader(records, mapper=mapper, num_workers=0)
    how = {"sampler": built.sampler, "collate_fn": built.collate_fn}
    return Loader(built.dataset, usable_workers(workers), WORKERS_KEY, **how)


def build_train_loader(
    samples: KeyedSamples,
    batch: int,
    steps: range,
    *,
    parts: int = 1,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> Loader:
    """Build a loader of batches for the given steps of a run.

    `batch` is the number of images per step, over all processes. `steps` are the numbers of the steps: a resumed run
    starts where it stopped. A process computes its share of a batch in `parts` parts. `workers` is the number of
    processes that read images; 0 reads in the training process. `pin_memory` is for fast copies to a GPU. Raises
    UserError if `batch` is larger than the training set, or is not divisible by processes and parts.
    """
    if batch % (world_size * parts):
        raise UserError(
            f"SOLVER.IMS_PER_BATCH: {counted(batch, 'image')} cannot be divided over "
            f"{counted(world_size, 'process')} and SOLVER.ACCUMULATE {parts} parts. Use a multiple of "
            f"{world_size * parts}."
        )
    if batch > len(samples):
        raise UserError(
            f"SOLVER.IMS_PER_BATCH: {batch} is more than the {len(samples)} training images. Lower it and "
            "SOLVER.ACCUMULATE, or use images without annotations with DATALOADER.FILTER_EMPTY_ANNOTATIONS=False."
        )
    plan = BatchPlan(len(samples), batch // world_size, samples.seed, rank, world_size)
    return Loader(
        samples,
        usable_workers(workers),
        WORKERS_KEY,
        batch_sampler=map(plan.batch, steps),
        collate_fn=SampleBatch,
        pin_memory=pin_memory,
        # Without its own generator, the loader would change the random numbers of the model.
        generator=torch.Generator(),
    )
