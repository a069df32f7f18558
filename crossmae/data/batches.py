"""Training batches: reproducible augmentation, and a plan of batches without state.

All random values of a sample (crop, flip, mask noise) come from a generator seeded from (seed, epoch, sample index).
Workers, prefetching and restarts therefore cannot change the values. The position in the data is one integer: the
number of batches that the optimizer has consumed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from crossmae.data.broken import Broken, Unreadable, read_or_next
from crossmae.data.pixels import read_tensor
from crossmae.data.sources import Source
from crossmae.data.workers import Loader, usable_workers
from crossmae.errors import UserError, counted

KeyedSample = tuple[Any, Tensor, int, tuple[Broken, ...]]
B = TypeVar("B")


@dataclass(frozen=True)
class BatchPlan:
    """The images of any batch of a run, on any rank.

    Every epoch is a new permutation of the images, cut into batches of equal size. Images that do not fill a batch on
    every rank are left out of the epoch. The images of each batch are divided among the ranks, and the loader divides
    them among its workers. Every image is therefore read at most once per epoch, for any kind of source.

    Args:
        batch_size: images per rank and batch.
        rank, world_size: number of this process, and number of processes.
        groups: (G,) index of the first image of each group, such as a tar shard; None: one group.
        groups_at_once: number of groups that are shuffled together. Groups come in random order, and reading stays
            within these groups. None: all images are shuffled together.
    """

    num_images: int
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    groups: NDArray[np.int64] | None = None
    groups_at_once: int | None = None

    def __post_init__(self) -> None:
        if self.batches_per_epoch == 0:
            raise UserError(
                f"optim.batch_size: a batch of {self.batch_size} on {counted(self.world_size, 'process')} needs "
                f"{self.batch_size * self.world_size} images, the data set has {self.num_images}. "
                "Lower optim.batch_size."
            )

    @property
    def batches_per_epoch(self) -> int:
        """Batches per rank and epoch."""
        return self.num_images // (self.batch_size * self.world_size)

    def batch(self, number: int) -> list[tuple[int, int]]:
        """List the (epoch, image index) pairs of batch `number`."""
        epoch, within = divmod(number, self.batches_per_epoch)
        groups = () if self.groups is None or not self.groups_at_once else tuple(self.groups.tolist())
        order = _permutation(self.seed, epoch, self.num_images, groups, self.groups_at_once or 1)
        start = (within * self.world_size + self.rank) * self.batch_size
        return [(epoch, int(index)) for index in order[start : start + self.batch_size]]


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, length: int, groups: tuple[int, ...], at_once: int) -> NDArray[np.int64]:
    rng = np.random.default_rng([seed, epoch])
    if not groups:
        return rng.permutation(length)
    parts = np.split(np.arange(length), groups[1:])
    shuffled = [parts[index] for index in rng.permutation(len(parts))]
    pools = [np.concatenate(shuffled[first : first + at_once]) for first in range(0, len(shuffled), at_once)]
    return np.concatenate([rng.permutation(pool) for pool in pools])


class KeyedImages(Dataset[Any], ABC):
    """Training images whose random values are seeded from (seed, epoch, index).

    Args:
        channels, bit_depth: see `crossmae.data.images`.
        broken: "error" raises for a broken image; "substitute" takes the next readable image of the source.
    """

    def __init__(
        self, source: Source, seed: int, channels: int, bit_depth: int, broken: Literal["error", "substitute"]
    ) -> None:
        self.source, self.seed, self.channels, self.bit_depth, self.broken = source, seed, channels, bit_depth, broken

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> KeyedSample | Unreadable:
        epoch, index = key
        try:
            kind = (self.channels, self.bit_depth, self.broken)
            pixels, position, broken = read_or_next(self.source, index, *kind, read_tensor)
        except UserError as error:
            return Unreadable(str(error))
        return (*self.sample(pixels, position, (self.seed, epoch, index)), position, broken)

    @abstractmethod
    def sample(self, pixels: Tensor, position: int, key: tuple[int, int, int]) -> tuple[Any, Tensor]:
        """Return the image, and its noise or target.

        The image is augmented (C, H, W), or whatever `stack` of `collate_as` combines.
        """


def collate_as(
    batch: Callable[[Any, Tensor, Tensor, tuple[Broken, ...]], B],
    samples: list[Any],
    stack: Callable[[Any], Any] = torch.stack,
) -> B | Unreadable:
    """Combine samples to a `batch`, or return the first `Unreadable`.

    `stack` combines the tuple of images.
    """
    unreadable = next((sample for sample in samples if isinstance(sample, Unreadable)), None)
    if unreadable is not None:
        return unreadable
    images, others, indices, broken = zip(*samples, strict=True)
    return batch(stack(images), torch.stack(others), torch.tensor(indices), tuple(chain(*broken)))


def build_loader(
    dataset: Dataset[Any],
    plan: BatchPlan,
    first: int,
    last: int,
    workers: int,
    pin_memory: bool,
    collate: Callable[[list[Any]], Any],
) -> Loader:
    """Build a loader that reads the batches `first` .. `last` - 1."""
    return Loader(
        dataset,
        usable_workers(workers),
        # One sampler for all epochs, so that workers do not wait between epochs.
        batch_sampler=map(plan.batch, range(first, last)),
        collate_fn=collate,
        pin_memory=pin_memory,
    )


@contextmanager
def keyed_randomness(*key: int) -> Iterator[None]:
    """Seed torch's CPU generator from a key, and restore it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1)
        yield
