"""Batches for a detector: augmentation, mapping, and a repeatable order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import detectron2.data.transforms as T
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from torch.utils.data import DataLoader, Dataset

from crossmae.data import BatchPlan, PlannedBatches, Unreadable, usable_workers
from crossmae.errors import UserError


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
