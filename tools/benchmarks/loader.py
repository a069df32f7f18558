"""Suite of reading: images per core against torchvision's usual recipe, and lists against folders of files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from PIL import ImageOps
from torch import Tensor
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode

from crossmae.data.pixels import read_tensor
from crossmae.data.sources import Source, open_named, open_source
from crossmae.data.sources.shard_writer import ShardSettings, make_shards
from crossmae.pretraining.images import PretrainImages, collate_pretraining
from tools.benchmarks.measuring import Comparison, Gate, Row, ScratchFolder
from tools.benchmarks.pretraining import MEAN, STD
from tools.make_demo_data import PHOTOGRAPHS, load_photograph

Build = Callable[[], Comparison | Row]
QUALITY = 92
CROP_SCALE = (0.2, 1.0)
GREY_LEVELS = 6.0  # of 255, at edges: both sides round between two passes, and torch may swap the passes


def loader(
    images: int = 64, side: int = 375, crop: int = 224, files: int = 100_000, shard_side: int = 256
) -> list[Build]:
    """List reading of JPEGs, of shards, and of a list.

    Args:
        images: JPEGs of a batch, with the shorter side `side` in pixels.
        crop: side of the crops.
        files: length of the list.
        shard_side: shorter side of the images in shards.
    """
    return [
        partial(compare_originals, images, side, crop),
        *(partial(compare_shards, images, side, crop, shard_side, quality) for quality in (90, None)),
        partial(compare_lists, files),
    ]


def write_jpegs(folder: Path, images: int, side: int) -> None:
    """Write cuts of real photographs in a class folder, 4:3, all different."""
    names = [name for split in PHOTOGRAPHS.values() for name in split]
    place = folder / "class"
    place.mkdir(parents=True)
    width = side * 4 // 3
    cover = (width * 5 // 4, side * 5 // 4)
    photographs = [ImageOps.fit(load_photograph(name, 2 * width), cover) for name in names]
    draw = torch.Generator().manual_seed(0)
    for number in range(images):
        photograph = photographs[number % len(photographs)]
        left, top = (
            int(torch.randint(0, room + 1, (), generator=draw))
            for room in (photograph.width - width, photograph.height - side)
        )
        cut = photograph.crop((left, top, left + width, top + side))
        cut.save(place / f"{number:05d}.jpg", quality=QUALITY)


def our_images(source: Source, crop: int) -> PretrainImages:
    """Build the training images as pretraining does."""
    return PretrainImages(source, (crop, crop), (crop // 16) ** 2, CROP_SCALE, 0.5, seed=0)


def usual_recipe(crop: int, normalise: bool = True) -> Any:
    """Build torchvision's usual transforms of pretraining."""
    cut = transforms.RandomResizedCrop(crop, scale=CROP_SCALE, interpolation=InterpolationMode.BICUBIC)
    steps = [cut, transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    return transforms.Compose([*steps, transforms.Normalize(MEAN, STD)] if normalise else steps)


def read_ours(images: PretrainImages, epochs: Iterator[int]) -> object:
    """Read a batch of all images, uint8 with mask noise."""
    epoch = next(epochs)
    return collate_pretraining([images[epoch, index] for index in range(len(images))])


def read_usual(images: ImageFolder) -> Tensor:
    """Read a batch of all images, normalised float32."""
    return torch.stack([images[index][0] for index in range(len(images))])


def compare_originals(images: int, side: int, crop: int) -> Comparison:
    """Compare batches from JPEG files in one process."""
    folder = ScratchFolder()
    write_jpegs(folder.path, images, side)
    own, usual = our_images(open_source(folder.path, "data"), crop), ImageFolder(folder.path, usual_recipe(crop))
    epochs = count()  # every batch has other crops

    def gate() -> Gate:
        """Compare pixels in grey levels where both draw the same crops."""
        plain = ImageFolder(folder.path, usual_recipe(crop, normalise=False))
        worst = 0.0
        for index in range(min(images, 8)):
            with same_draws():
                theirs = plain[index][0]
            with same_draws():
                ours = own.crop(read_tensor(own.source, index))
            worst = max(worst, float((theirs * 255 - ours.float()).abs().max()))
        return Gate(worst, GREY_LEVELS)

    return Comparison(
        what=f"{images} original JPEGs, {side * 4 // 3}x{side}, to crops of {crop}",
        against="torchvision's ImageFolder and transforms",
        ours=lambda: read_ours(own, epochs),
        other=lambda: (read_usual(usual), folder)[0],
        goals={"cpu": 2.2},
        gate=gate,
    )


@contextmanager
def same_draws() -> Iterator[None]:
    """Seed torch's generator, and restore it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        yield


def compare_shards(images: int, side: int, crop: int, shard_side: int, quality: int | None) -> Comparison:
    """Compare batches from shards of small images with the original files.

    `quality` is that of JPEG files; None: the pixels are not compressed.
    """
    folder = ScratchFolder()
    originals, shards = folder.path / "originals", folder.path / "shards"
    write_jpegs(originals, images, side)
    make_shards(open_source(originals, "SRC"), shards, ShardSettings(shard_side, quality), 1)
    own, usual = our_images(open_source(shards, "data"), crop), ImageFolder(originals, usual_recipe(crop))
    epochs, how = count(), "" if quality else ", uncompressed"  # every batch has other crops
    return Comparison(
        what=f"{images} images in shards of {shard_side} pixels{how}, to crops of {crop}",
        against="torchvision's recipe on the original files",
        ours=lambda: read_ours(own, epochs),
        other=lambda: (read_usual(usual), folder)[0],
        goals={"cpu": 4.0},
        gate=lambda: Gate(abs(len(own) - len(usual)), 0),
        note="other pixels: the images were made smaller once",
    )


def compare_lists(files: int) -> Comparison:
    """Compare a list of files with a folder of the same files."""
    folder = ScratchFolder()
    place = folder.path / "images"
    place.mkdir()
    names = [f"{number:07d}.jpg" for number in range(files)]
    for name in names:
        (place / name).touch()
    listed = folder.path / "list.txt"
    listed.write_text("\n".join(f"images/{name}" for name in names) + "\n")

    def gate() -> Gate:
        one, two = (open_named(str(path), "data.train") for path in (listed, place))
        same = len(one) == len(two) and [one.name(n)[-11:] for n in range(0, files, 97)] == [
            two.name(n)[-11:] for n in range(0, files, 97)
        ]
        return Gate(0.0 if same else 1.0, 0.0)

    return Comparison(
        what=f"a list of {files:,} files, opened",
        against="our source for a folder of the same files",
        ours=lambda: open_source(listed, "data.train"),
        other=lambda: (open_source(place, "data.train"), folder)[0],
        goals={"cpu": 1.0},
        memory_goals={"cpu": 1.0},
        gate=gate,
    )
