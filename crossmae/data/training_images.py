"""Training images: keyed augmentation and a plan of batches that needs no state.

All randomness of a sample - crop, flip, mask noise - is drawn from a generator keyed by (seed, epoch, sample index).
Workers, prefetching and restarts can therefore not change it, and the whole position in the data is one integer: the
number of batches that the optimizer has consumed.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as VF
from tqdm import tqdm

from crossmae.data.images import MAX_NAMES, decode_image, ends_like_an_image, is_deep
from crossmae.data.parallel import map_in_order
from crossmae.data.sources import Source, evenly_spaced
from crossmae.data.workers import Loader, usable_workers
from crossmae.errors import UserError
from crossmae.files import printable

log = logging.getLogger(__name__)


# Readable images that are looked for behind a broken one before the source is given up.
MAX_SUBSTITUTES = 100
READERS = 16  # threads that look at files
LOOKS = 8  # images whose depth is looked at


@dataclass(frozen=True)
class Broken:
    """A sample that could not be read: its index in the source, and why, with its name."""

    index: int
    message: str


M = TypeVar("M", bound="MovableBatch")


class MovableBatch:
    """A batch whose tensors `moved` travel to the device."""

    moved: ClassVar[tuple[str, ...]]

    def to(self: M, device: torch.device) -> M:
        """The same batch with those on a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self: M) -> M:
        """The same batch with those in page-locked memory; the loader calls this."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self: M, change: Callable[[Tensor], Tensor]) -> M:
        return replace(self, **{name: change(getattr(self, name)) for name in self.moved})  # type: ignore[type-var]


@dataclass(frozen=True)
class Batch(MovableBatch):
    """Images and mask noise of one micro-batch.

    Attributes:
        images: (B, C, H, W), uint8 or, with a bit depth of 16, float32 in 0-1; normalised on the device, so that a
            quarter of the bytes travel.
        noise: (B, L) float32, for `CrossMAE.forward`.
        indices: (B,) int64 positions in the source.
        broken: what could not be read; other images are in its place.
    """

    images: Tensor
    noise: Tensor
    indices: Tensor
    broken: tuple[Broken, ...] = ()
    moved = ("images", "noise")


@dataclass(frozen=True)
class BatchPlan:
    """Which images make up batch number i of a run, for any i, on any rank.

    Every epoch is a fresh permutation, cut into batches of equal size; the rest that does not fill a batch on every
    rank is left out of that epoch. Ranks and, through the loader, workers share the images of each batch out among
    them, so that every image is read once per epoch, whatever the source.

    Args:
        num_images: size of the data set.
        batch_size: images per rank and batch.
        seed: of the permutations.
        rank, world_size: this process among all.
        groups: (G,) first image of each group (a tar shard) of neighbours; None: one group.
        groups_at_once: shuffle among so many groups at a time, in random order of the groups, so that reading stays
            within them; None: among all images.

    Raises:
        UserError: not even one batch per epoch.
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
    """Stands in for a batch that can not be made, so that the training process can say why in one line."""

    message: str


Sample = tuple[Tensor, Tensor, int, tuple[Broken, ...]]
B = TypeVar("B")


class KeyedImages(Dataset[Any], ABC):
    """Training images; what is random about a sample is keyed by (seed, epoch, index), in `sample`.

    Args:
        source: where images come from.
        seed: of all randomness.
        channels, bit_depth: see `crossmae.data.images`.
        broken: "error", or "substitute": the next readable image of the source takes the place of a broken one.
    """

    def __init__(
        self, source: Source, seed: int, channels: int, bit_depth: int, broken: Literal["error", "substitute"]
    ) -> None:
        self.source, self.seed, self.channels, self.bit_depth, self.broken = source, seed, channels, bit_depth, broken

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> Sample | Unreadable:
        """Sample `index` as seen in `epoch`; key = (epoch, index)."""
        epoch, index = key
        try:
            pixels, position, broken = read_or_next(self.source, index, self.channels, self.bit_depth, self.broken)
        except UserError as error:
            return Unreadable(str(error))
        return (*self.sample(pixels, position, (self.seed, epoch, index)), position, broken)

    @abstractmethod
    def sample(self, pixels: Image.Image | Tensor, position: int, key: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """What becomes of the image at a position of the source: (C, H, W), and what goes with it."""


class PretrainImages(KeyedImages):
    """Randomly cropped and flipped images with mask noise (method specification, section 1.9).

    Args:
        source: where images come from.
        img_size: (height, width) of the crop in pixels.
        num_patches: L, the length of the noise.
        crop_scale: smallest and largest area of the crop, as shares of the image.
        flip: probability of a horizontal flip.
        seed: of all randomness.
        channels: C of the images.
        bit_depth: 8 or 16, see `crossmae.data.images`.
        broken: "error", or "substitute": the next readable image of the source takes the place of a broken one.
    """

    def __init__(
        self,
        source: Source,
        img_size: tuple[int, int],
        num_patches: int,
        crop_scale: tuple[float, float],
        flip: float,
        seed: int,
        channels: int = 3,
        bit_depth: int = 8,
        broken: Literal["error", "substitute"] = "error",
    ) -> None:
        super().__init__(source, seed, channels, bit_depth, broken)
        self.num_patches = num_patches
        crop = v2.RandomResizedCrop(img_size, scale=crop_scale, interpolation=InterpolationMode.BICUBIC, antialias=True)
        self.augment = v2.Compose([crop, v2.RandomHorizontalFlip(flip)])

    def sample(self, pixels: Image.Image | Tensor, position: int, key: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """The crop, and mask noise (L,)."""
        with keyed_randomness(*key):
            return to_tensor(self.augment(pixels)), torch.rand(self.num_patches)


def read_or_next(
    source: Source, index: int, channels: int, bit_depth: int, policy: Literal["error", "substitute"]
) -> tuple[Image.Image | Tensor, int, tuple[Broken, ...]]:
    """A sample, or with "substitute" the first readable one after it; its pixels, its index, and what was broken.

    Raises:
        UserError: it can not be read, or MAX_SUBSTITUTES in a row can not.
    """
    broken: list[Broken] = []
    for candidate in range(index, index + MAX_SUBSTITUTES):
        position = candidate % len(source)
        try:
            return read_pixels(source, position, channels, bit_depth), position, tuple(broken)
        except UserError as error:
            if policy == "error":
                raise
            broken.append(Broken(position, str(error)))
    raise UserError(f"{MAX_SUBSTITUTES} images in a row can not be read; the first: {broken[0].message}")


def read_pixels(source: Source, index: int, channels: int = 3, bit_depth: int = 8) -> Image.Image | Tensor:
    """One sample, decoded by the rules of `crossmae.data.images`: an image, or a (C, H, W) tensor.

    Raises:
        UserError: it can not be read; names it.
    """
    return decode_pixels(source.read(index), source.name(index), channels, bit_depth)


def decode_pixels(data: bytes, name: str, channels: int = 3, bit_depth: int = 8) -> Image.Image | Tensor:
    """`decode_image`, with arrays as (C, H, W) tensors, which is what transforms take."""
    decoded = decode_image(data, name, channels, bit_depth)
    return decoded if isinstance(decoded, Image.Image) else torch.from_numpy(decoded).permute(2, 0, 1)


def to_tensor(pixels: Image.Image | Tensor) -> Tensor:
    """(C, H, W), uint8 or float32 in 0-1: resampling may leave that range by a little."""
    if isinstance(pixels, Image.Image):
        return VF.pil_to_tensor(pixels)
    return pixels.clamp(0, 1) if pixels.is_floating_point() else pixels


def centre_view(pixels: Image.Image | Tensor, size: tuple[int, int], crop_pct: float = 1.0) -> Tensor:
    """The middle of an image, scaled to cover (height, width): what evaluation sees. (C, height, width).

    Args:
        pixels: of any size.
        size: height and width of the view.
        crop_pct: share of the covering image that the view shows, along a side. Of a square, the shorter side becomes
            int(size / crop_pct), as in timm and torchvision.
    """
    height, width = VF.get_size(pixels)
    cover = [int(side / crop_pct) for side in size]
    # The side that decides is met exactly, the other one cut to whole pixels.
    if cover[0] * width >= cover[1] * height:
        scaled = [cover[0], cover[0] * width // height]
    else:
        scaled = [cover[1] * height // width, cover[1]]
    resized = VF.resize(pixels, scaled, interpolation=InterpolationMode.BICUBIC, antialias=True)
    return to_tensor(VF.center_crop(resized, list(size)))


def published_crop_pct(size: tuple[int, int]) -> float:
    """`crop_pct` of published evaluations: 224/256 up to 224 pixels, 1 above (method specification, 1.10)."""
    return 224 / 256 if max(size) <= 224 else 1.0


def to_unit_range(images: Tensor) -> Tensor:
    """Pixels of a batch as float32 in 0-1, whatever they travelled as."""
    return images if images.is_floating_point() else images.float() / 255


class Normalize:
    """Pixels of a batch (B, C, H, W) minus the mean, over the deviation, per channel; both live on the device."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self.mean, self.std = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (mean, std))

    def __call__(self, images: Tensor) -> Tensor:
        """uint8, or floats in 0-1, to float32."""
        return (to_unit_range(images) - self.mean) / self.std


def collate_as(batch: Callable[[Tensor, Tensor, Tensor, tuple[Broken, ...]], B], samples: list[Any]) -> B | Unreadable:
    """Samples to a batch of the given kind; one unreadable sample makes the whole batch unreadable."""
    unreadable = next((sample for sample in samples if isinstance(sample, Unreadable)), None)
    if unreadable is not None:
        return unreadable
    images, others, indices, broken = zip(*samples, strict=True)
    return batch(
        torch.stack(images), torch.stack(others), torch.tensor(indices), tuple(b for each in broken for b in each)
    )


collate = partial(collate_as, Batch)


def find_broken(source: Source, indices: Sequence[int], channels: int = 3, bit_depth: int = 8) -> list[Broken]:
    """Those of some samples that are not whole, before hours are spent: by their last bytes, in doubt by decoding."""

    def look(index: int) -> Broken | None:
        if ends_like_an_image(source.tail(index)):
            return None
        try:
            read_pixels(source, index, channels, bit_depth)
        except UserError as error:
            return Broken(index, str(error))
        return None

    looks = map_in_order(look, indices, READERS)
    bar = tqdm(looks, "check images", len(indices), leave=False, unit="img", dynamic_ncols=True)
    return [broken for broken in bar if broken is not None]


def warn_of_depth(source: Source, bit_depth: int) -> None:
    """Say so where images have more bits than are kept; as far as a few of them tell."""
    if bit_depth == 8:
        for index in evenly_spaced(len(source), LOOKS):
            try:
                deep = is_deep(source.read(index))
            except UserError:
                continue
            if deep:
                name = printable(source.name(index))
                log.warning("%s has more than 8 bits, which are cut; data.bit_depth=16 keeps them", name)
                return


def refuse_broken(broken: Sequence[Broken], advice: str = "repair or remove what is broken") -> None:
    """Nothing where nothing is broken.

    Raises:
        UserError: names up to five of them.
    """
    if broken:
        more = f" (and {len(broken) - MAX_NAMES} more)" if len(broken) > MAX_NAMES else ""
        named = "; ".join(one.message for one in broken[:MAX_NAMES])
        raise UserError(f"{named}{more}; {advice}")


def build_loader(
    dataset: Dataset[Any],
    plan: BatchPlan,
    first: int,
    last: int,
    workers: int,
    pin_memory: bool,
    collate: Callable[[list[Any]], Any] = collate,
) -> Loader:
    """A loader of batches `first` .. `last` - 1 of the plan; each is what `collate` makes, or `Unreadable`."""
    return Loader(
        dataset,
        usable_workers(workers),
        batch_sampler=PlannedBatches(plan, first, last),
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
