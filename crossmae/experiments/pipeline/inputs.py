"""Inputs of the pipeline: a look at the images, lists of files, and crops of labelled objects."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from crossmae.data.annotations.split import HELD_OUT_FOLDERS, folder_of
from crossmae.data.broken import Broken, find_broken
from crossmae.data.images import is_deep, open_image, read_image
from crossmae.data.pixels import read_pixels
from crossmae.data.sources import Source, open_source
from crossmae.data.sources.source import evenly_spaced
from crossmae.errors import UserError, counted, printable, shorten
from crossmae.experiments.pipeline.trainings import Trainings
from crossmae.files import make_folder, put_in_place, temporary_folder, write_text

LOOKED_AT = 2000  # images whose headers are read
DEEP_LOOKED_AT = 16  # images of more than 8 bits whose pixels are read
LEAST_LEVELS = 32  # grey levels of 256 that such an image uses after the cut to 8 bits, without an error
BACKGROUND = "_background"  # class of the crops without an object
SMALLEST_OBJECT = 8  # pixels; smaller objects have too little to recognise
CROP_MARGIN = 1.25  # side of a crop for each pixel of the object's longer side
CROP_SIDE = 128  # pixels, at most
MOST_CROPS = {"train": 600, "val": 200}  # half of them background; more would cost minutes on a processor
FEWEST_CROPS = {"train": 20, "val": 10}  # for a comparison of features


@dataclass(frozen=True)
class ImageFacts:
    """Properties of the images.

    Attributes:
        count: all images.
        looked_at: images whose headers were read, evenly spaced.
        formats, modes: numbers of images by file format, and by Pillow's mode.
        long_side: smallest, median and largest longer side, in pixels.
        broken: broken images among all images.
    """

    count: int
    looked_at: int
    formats: Mapping[str, int]
    modes: Mapping[str, int]
    long_side: tuple[int, int, int]
    broken: Sequence[Broken]

    def describe(self) -> str:
        """Describe the images in one line."""
        low, middle, high = self.long_side
        sides = f"{low} pixels" if low == high else f"{low} to {high} pixels, half of them up to {middle}"
        broken = f"{counted(len(self.broken), 'image')} broken" if self.broken else "none broken"
        kinds = " and ".join(f"{number:,} {name}" for name, number in self.formats.items())
        seen = "" if self.looked_at == self.count else f" among {self.looked_at:,} looked at"
        head = f"{counted(self.count, 'image')} ({kinds}{seen})"
        return f"{head}; modes {', '.join(self.modes)}; longer side {sides}; {broken}"


def look_at_images(source: Source, key: str) -> ImageFacts:
    """Read the headers of some images, and find broken images among all.

    Args:
        key: name of the argument, for the errors.

    Raises UserError if no image can be read, or if a cut to 8 bits leaves too little of them.
    """
    broken = find_broken(source, range(len(source)))
    if len(broken) == len(source):
        raise UserError(f"{key}: none of {counted(len(source), 'image')} can be read. The first: {broken[0].message}")
    bad = {one.index for one in broken}
    formats, modes, sides, deep = Counter[str](), Counter[str](), [], []
    chosen = evenly_spaced(len(source), min(LOOKED_AT, len(source)))
    for index in chosen:
        if index in bad:
            continue
        content = source.read(index)
        if is_deep(content):
            deep.append(index)
        with open_image(content) as image:
            formats[image.format or "unknown"] += 1
            modes[image.mode] += 1
            sides.append(max(image.size))
    if deep:
        refuse_flat_images(source, [deep[one] for one in evenly_spaced(len(deep), min(DEEP_LOOKED_AT, len(deep)))], key)
    spread = (min(sides), int(np.median(sides)), max(sides))
    return ImageFacts(len(source), len(chosen), dict(formats.most_common()), dict(modes.most_common()), spread, broken)


def refuse_flat_images(source: Source, indices: Sequence[int], key: str) -> None:
    """Raise UserError if a cut to 8 bits leaves little contrast.

    Files of more than 8 bits often use a small part of their range of values. The trainings of the pipeline see 8 bits.
    """
    levels = []
    for index in indices:
        pixels = read_pixels(source, index)
        low, high = np.percentile(np.asarray(pixels), (0.5, 99.5))
        levels.append(int(high - low) + 1)
    if np.median(levels) < LEAST_LEVELS:
        raise UserError(
            f"{key}: {source.name(indices[0])} and others have more than 8 bits. They are cut to 8 bits, which leaves "
            f"{int(np.median(levels))} of 256 grey levels. Stretch the values to the full range, or save 8-bit copies."
        )


def write_list(source: Source, without: Iterable[str], most: int | None, path: Path) -> int:
    """Write a list of image files, and return their number.

    Args:
        source: images in a folder or a list.
        without: paths of images to leave out, such as validation images.
        most: largest number of images, evenly spaced; None: all.
    """
    left_out = {str(Path(name).resolve()) for name in without}
    names = [str(Path(source.name(index)).resolve()) for index in range(len(source))]
    names = [name for name in names if name not in left_out]
    if not names:
        raise UserError("IMAGES: all images are validation images. Add images, or hold out fewer of them.")
    if most is not None and most < len(names):
        names = [names[index] for index in evenly_spaced(len(names), most)]
    make_folder(path.parent, "--output")
    write_text(path, "\n".join(names) + "\n")
    return len(names)


def open_files(images: Path, key: str) -> Source:
    """Open images that are files.

    Raises UserError for shards and data sets, whose images no list of files can name.
    """
    source = open_source(images, key)
    if not Path(source.name(0)).is_file():
        raise UserError(
            f"{key}: {images}: has no image files, which this command needs. Unpack the images, or pretrain on "
            "the shards with tools/pretrain.py, and start the detector from there."
        )
    return source


def object_share(content: Mapping[str, Any]) -> float:
    """Return the median length of objects as a share of their image.

    Lengths are longer sides. `content` is that of a COCO file. 0 without objects.
    """
    sides = {image["id"]: max(image["width"], image["height"]) for image in content["images"]}
    boxes = _boxes_by_image(content)
    shares = [max(box[2:]) / sides[image] for image, own in boxes.items() for _, box in own]
    return float(np.median(shares)) if shares else 0.0


def labelled_paths(content: Mapping[str, Any], images: Path) -> list[str]:
    """List the paths of the images of a COCO file."""
    return [str(images / image["file_name"]) for image in content["images"]]


def images_next_to(source: Source, held_out: Sequence[str], train: Iterable[str]) -> list[str]:
    """List other images in the folders of held-out images, without training images.

    With a split by folder, these are unlabelled images, such as other frames of a held-out video.
    """
    folders = {Path(folder).resolve() for folder in map(folder_of, held_out)}
    known = {Path(name).resolve() for name in (*held_out, *train)}
    names = [source.name(index) for index in range(len(source))]
    parents = {folder: Path(folder).resolve() for folder in map(folder_of, names)}
    return [name for name in names if parents[folder_of(name)] in folders and Path(name).resolve() not in known]


def count_unlabelled(pretrain_list: Path, folders: Mapping[str, str], contents: Mapping[str, Any]) -> int:
    """Count images for pretraining that have no labels.

    Args:
        pretrain_list: list of image files.
        folders, contents: of the COCO files of a split, by its sides.
    """
    labelled = {
        str(Path(path).resolve())
        for name, folder in folders.items()
        for path in labelled_paths(contents[name], Path(folder))
    }
    return sum(name not in labelled for name in pretrain_list.read_text("utf-8").splitlines())


def describe_labels(
    trainings: Trainings, about: Mapping[str, Any], contents: Mapping[str, Any], next_to: int
) -> dict[str, str]:
    """Describe labels and object crops in words, by heading, and print them.

    Args:
        about: record of the split. contents: of its COCO files.
        next_to: number of unlabelled images of held-out folders, which are left out.
    """
    assert trainings.train is not None
    assert trainings.val is not None
    objects = sum(about["counts"][name]["objects"] for name in ("train", "val"))
    empty = about["counts"]["train"]["empty"]
    left_out = f" ({empty:,} more have no objects, and the detector leaves them out)" if empty else ""
    folders = [printable(name) for name in about.get(HELD_OUT_FOLDERS, [])]
    held_out = f" (held out: {shorten(folders)})" if folders else ""
    bare = count_unlabelled(trainings.pretrain_list, about["images"], contents)
    unlabelled = f", {bare:,} unlabelled, for pretraining only" if bare else ""
    if next_to:
        unlabelled += (
            f"; {counted(next_to, 'unlabelled image')} of held-out folders {'is' if next_to == 1 else 'are'} left out"
        )
    facts = {
        "Labels": f"{about['format']}, {counted(objects, 'object')} of {counted(len(about['classes']), 'class')} "
        f"{'with masks' if trainings.has_masks else 'without masks (boxes only)'}; {trainings.train.count:,} images "
        f"for training{left_out}, {trainings.val.count:,} for validation{held_out}{unlabelled}",
    }
    if trainings.objects:
        numbers = {one.name: len(list(one.iterdir())) for one in sorted((trainings.objects / "train").iterdir())}
        facts["Check of features"] = f"nearest neighbours among crops of {describe_crops(numbers)}"
    for key, text in facts.items():
        print(f"{key.lower()}: {text}", flush=True)
    return facts


def write_object_crops(content: Mapping[str, Any], images: Path, split: str, folder: Path) -> dict[str, int]:
    """Cut labelled objects and background out of their images.

    The crops measure features: their class is known, and no detector is needed. Each class has a folder. A crop is a
    square around the object. Crops of the background have the sizes of objects, and touch none. The result depends on
    the content only.

    Args:
        content: of a COCO file. Crowd regions and objects below `SMALLEST_OBJECT` pixels are left out.
        split: "train" or "val".
        folder: the crops are written to a new folder here, named as the split.

    Returns:
        Number of crops by class. Empty if there are too few for a comparison; then nothing is written.
    """
    names = {one["id"]: printable(one["name"]).replace("/", "_") for one in content["categories"]}
    boxes = _boxes_by_image(content)
    total = sum(map(len, boxes.values()))
    if total < FEWEST_CROPS[split]:
        return {}
    kept = set(evenly_spaced(total, min(total, MOST_CROPS[split] // 2)))
    numbers, count = Counter[str](), 0
    make_folder(folder, "--output")
    with temporary_folder(folder / split) as new:
        for image in content["images"]:
            own = boxes.get(image["id"], [])
            chosen = [one for number, one in enumerate(own, start=count) if number in kept]
            count += len(own)
            if not chosen:
                continue
            pixels = read_image(images / image["file_name"])
            rng = np.random.default_rng(count)
            for class_id, box in chosen:
                for name, place in ((names[class_id], box), (BACKGROUND, _free_place(box, own, pixels.size, rng))):
                    if place is not None:
                        numbers[name] += 1
                        (new / name).mkdir(exist_ok=True)
                        _crop(pixels, place).save(new / name / f"{numbers[name]:05}.png")
        put_in_place(new, folder / split)
    return dict(numbers)


Box = Sequence[float]  # left, top, width, height in pixels


def _boxes_by_image(content: Mapping[str, Any]) -> dict[Any, list[tuple[Any, Box]]]:
    found: dict[Any, list[tuple[Any, Box]]] = defaultdict(list)
    for one in content["annotations"]:
        box = one.get("bbox")
        if not one.get("iscrowd") and box and min(box[2:]) > 0 and max(box[2:]) >= SMALLEST_OBJECT:
            found[one["image_id"]].append((one["category_id"], box))
    return found


def _free_place(
    box: Box, others: Sequence[tuple[Any, Box]], size: tuple[int, int], rng: np.random.Generator
) -> Box | None:
    """Find a place for a box that touches no object.

    Returns None if 20 tries find none.
    """
    width, height = box[2:]
    if width >= size[0] or height >= size[1]:
        return None
    for left, top in (rng.uniform(0, 1, (20, 2)) * (size[0] - width, size[1] - height)).tolist():
        if all(_apart((left, top, width, height), other) for _, other in others):
            return (left, top, width, height)
    return None


def _apart(one: Box, other: Box) -> bool:
    return any(
        one[axis] + one[axis + 2] <= other[axis] or other[axis] + other[axis + 2] <= one[axis] for axis in (0, 1)
    )


def _crop(image: Image.Image, box: Box) -> Image.Image:
    """Cut a square around a box.

    The square is moved into the image, and is not larger than the image.
    """
    side = min(CROP_MARGIN * max(box[2:]), *image.size)
    left, top = (min(max(box[axis] + box[axis + 2] / 2 - side / 2, 0), image.size[axis] - side) for axis in (0, 1))
    pixels = min(CROP_SIDE, max(1, round(side)))
    return image.resize((pixels, pixels), Image.Resampling.BICUBIC, (left, top, left + side, top + side))


def describe_crops(numbers: Mapping[str, int]) -> str:
    """Count the crops by class in words."""
    return shorten([f"{number:,} of {name}" for name, number in sorted(numbers.items())], 10)
