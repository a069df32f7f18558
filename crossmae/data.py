"""Training images: keyed augmentation and a plan of batches that needs no state.

All randomness of a sample - crop, flip, mask noise - is drawn from a generator keyed by (seed, epoch, sample index).
Workers, prefetching and restarts can therefore not change it, and the whole position in the data is one integer: the
number of batches that the optimizer has consumed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import InterpolationMode, v2

from crossmae.errors import UserError
from crossmae.images import read_image

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """Images and mask noise of one micro-batch.

    Attributes:
        images: (B, 3, H, W) uint8; normalised on the device, so that a quarter of the bytes travel.
        noise: (B, L) float32, for `CrossMAE.forward`.
        indices: (B,) int64 positions in the list of images.
    """

    images: Tensor
    noise: Tensor
    indices: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return Batch(*(t.to(device, non_blocking=True) for t in (self.images, self.noise, self.indices)))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; the loader calls this."""
        return Batch(self.images.pin_memory(), self.noise.pin_memory(), self.indices)


@dataclass(frozen=True)
class BatchPlan:
    """Which images make up batch number i of a run, for any i, on any rank.

    Every epoch is a fresh permutation, cut into batches of equal size; the rest that does not fill a batch on every
    rank is left out of that epoch.

    Args:
        num_images: size of the data set.
        batch_size: images per rank and batch.
        seed: of the permutations.
        rank, world_size: this process among all.

    Raises:
        UserError: not even one batch per epoch.
    """

    num_images: int
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.batches_per_epoch == 0:
            raise UserError(
                f"optim.batch_size: a batch of {self.batch_size} on {self.world_size} process(es) needs "
                f"{self.batch_size * self.world_size} images, the data set has {self.num_images}; "
                "lower optim.batch_size"
            )

    @property
    def batches_per_epoch(self) -> int:
        """Batches per rank and epoch."""
        return self.num_images // (self.batch_size * self.world_size)

    def batch(self, number: int) -> list[tuple[int, int]]:
        """The (epoch, image index) pairs of batch `number`, counted over the whole run."""
        epoch, within = divmod(number, self.batches_per_epoch)
        order = _permutation(self.seed, epoch, self.num_images)
        start = (within * self.world_size + self.rank) * self.batch_size
        return [(epoch, int(index)) for index in order[start : start + self.batch_size]]


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(length)


class PlannedBatches(Sampler[list[tuple[int, int]]]):
    """Batches first .. last - 1 of a plan, without a gap between epochs, so that workers never drain."""

    def __init__(self, plan: BatchPlan, first: int, last: int) -> None:
        self.plan, self.first, self.last = plan, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return (self.plan.batch(number) for number in range(self.first, self.last))


@dataclass(frozen=True)
class Unreadable:
    """Stands in for a sample whose file is broken, so that the training process can say so in one line."""

    message: str


class PretrainImages(Dataset[Any]):
    """Randomly cropped and flipped images with mask noise (method specification, section 1.9).

    Args:
        paths: image files.
        img_size: (height, width) of the crop in pixels.
        num_patches: L, the length of the noise.
        crop_scale: smallest and largest area of the crop, as shares of the image.
        flip: probability of a horizontal flip.
        seed: of all randomness.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        img_size: tuple[int, int],
        num_patches: int,
        crop_scale: tuple[float, float],
        flip: float,
        seed: int,
    ) -> None:
        # One array of bytes: a list of Python objects would be copied into every worker by reference
        # counting.
        self.paths = np.array([os.fsencode(path) for path in paths])
        self.num_patches, self.seed = num_patches, seed
        self.augment = v2.Compose(
            [
                v2.RandomResizedCrop(
                    img_size, scale=crop_scale, interpolation=InterpolationMode.BICUBIC, antialias=True
                ),
                v2.RandomHorizontalFlip(flip),
                v2.PILToTensor(),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> Path:
        """The file of one sample."""
        return Path(os.fsdecode(self.paths[index]))

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, int] | Unreadable:
        """Sample `index` as seen in `epoch`; key = (epoch, index). (3, H, W) uint8, (L,) noise, index."""
        epoch, index = key
        try:
            image = read_image(self.path(index))
        except UserError as error:
            return Unreadable(str(error))
        with keyed_randomness(self.seed, epoch, index):
            return self.augment(image), torch.rand(self.num_patches), index


def collate(samples: list[tuple[Tensor, Tensor, int] | Unreadable]) -> Batch | Unreadable:
    """Samples to a batch; one unreadable sample makes the whole batch unreadable."""
    good: list[tuple[Tensor, Tensor, int]] = []
    for sample in samples:
        if isinstance(sample, Unreadable):
            return sample
        good.append(sample)
    images, noise, indices = zip(*good, strict=True)
    return Batch(torch.stack(images), torch.stack(noise), torch.tensor(indices))


def usable_workers(asked: int) -> int:
    """No more processes than this one has cores; says so where that is fewer than asked for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if asked > cores:
        log.info("%d processes read images, not %d: there are no more cores", cores, asked)
    return min(asked, cores)


def build_loader(
    dataset: PretrainImages, plan: BatchPlan, first: int, last: int, workers: int, pin_memory: bool
) -> DataLoader[Any]:
    """A loader of batches `first` .. `last` - 1 of the plan; each is a `Batch` or `Unreadable`."""
    return DataLoader(
        dataset,
        batch_sampler=PlannedBatches(plan, first, last),
        num_workers=usable_workers(workers),
        collate_fn=collate,
        pin_memory=pin_memory,
    )


@contextmanager
def keyed_randomness(*key: int) -> Iterator[None]:
    """Inside, torch's CPU generator is seeded by the key; after it, the generator is where it was."""
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1)))
    try:
        yield
    finally:
        generator.set_state(state)
