"""Validation pictures: what is in an image beside what a detector finds in it, for TensorBoard and for pages."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from crossmae.files import printable, write_atomically
from det.data.coco_checks import file_name
from det.inference.draw import Instance, draw_instances, instances_from_coco, label_font
from det.inference.predict import read_rgb

COUNT = 4
SCORE_THRESHOLD = 0.5
SIDE = 640  # pixels of the longer side of a drawn image
_GAP, _STRIP = 8, 42  # pixels between the two images, and of the strip of text above them
_DARK, _LIGHT = (24, 27, 33), (236, 238, 242)
_WRITTEN = re.compile(r"\d+-.*\.png")
_LONGEST_STEM = 80  # characters

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """One image drawn twice.

    Attributes:
        name: the image's file name.
        truth: with its true objects, (H, W, 3) uint8 RGB.
        prediction: of the same shape, with the objects that were found.
        true_classes, found_classes: names of the classes of what is drawn, one for each object.
    """

    name: str
    truth: NDArray[np.uint8]
    prediction: NDArray[np.uint8]
    true_classes: list[str]
    found_classes: list[str]


def validation_pictures(
    ground_truth: dict[str, Any],
    images: Path,
    results: list[dict[str, Any]],
    count: int = COUNT,
    score_threshold: float = SCORE_THRESHOLD,
) -> list[tuple[str, NDArray[np.uint8]]]:
    """Images with their true objects on the left and the predicted ones on the right, under a strip that names both.

    The images are the same whenever they are drawn: `count` of those that have objects, spread evenly over their ids.

    Args:
        ground_truth: content of a COCO or LVIS file, see `det.data.coco.ground_truth`.
        images: folder that its file names are relative to.
        results: content of a COCO results file.
        count: how many; fewer where fewer have objects.
        score_threshold: predictions that score less are not drawn.

    Returns:
        File names, and pictures (H, W, 3) uint8 RGB; an image is drawn at 640 pixels on its longer side.

    Raises:
        UserError: an image can not be read; names it.
        ValueError: an annotation or a result is not one of COCO's, see `instances_from_coco`.
    """
    chosen = spread_images(ground_truth, count)
    drawn = compare_images(ground_truth, images, results, chosen, score_threshold)
    return [(one.name, _side_by_side(one, score_threshold)) for one in drawn]


def save_pictures(pictures: Sequence[tuple[str, NDArray[np.uint8]]], folder: Path) -> None:
    """Write what `validation_pictures` returns, as `folder`/1-NAME.png and so on, in place of an earlier call's."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, (name, pixels) in enumerate(pictures, start=1):
        stem = re.sub(r"[^\w.-]+", "-", Path(name).stem)[:_LONGEST_STEM]
        paths.append(folder / f"{number}-{stem}.png")
        write_atomically(paths[-1], partial(Image.fromarray(pixels).save, format="png"))
    for path in find_pictures(folder):
        if path not in paths:
            path.unlink()


def find_pictures(folder: Path) -> list[Path]:
    """The files of `save_pictures`, in their order."""
    written = [path for path in folder.glob("*.png") if _WRITTEN.fullmatch(path.name)]
    return sorted(written, key=lambda path: int(path.name.partition("-")[0]))


def spread_images(ground_truth: dict[str, Any], count: int) -> list[Entry]:
    """`count` of the images that have objects other than crowd regions, spread evenly over them by rising id."""
    with_objects = {a["image_id"] for a in ground_truth["annotations"] if not a.get("iscrowd", 0)}
    entries = sorted((e for e in ground_truth["images"] if e["id"] in with_objects), key=lambda e: e["id"])
    number = min(count, len(entries))
    return [entries[index * len(entries) // number] for index in range(number)]


def compare_images(
    ground_truth: dict[str, Any],
    images: Path,
    results: Sequence[Entry],
    chosen: Sequence[Entry],
    score_threshold: float = SCORE_THRESHOLD,
    side: int = SIDE,
) -> Iterator[Comparison]:
    """Draw images of a COCO file, one at a time; a class has one colour, by its id's place among all.

    Args:
        ground_truth, images, results, score_threshold: see `validation_pictures`; crowd regions are not drawn.
        chosen: entries of `ground_truth["images"]`.
        side: pixels of the longer side of what is drawn; smaller images are enlarged.

    Raises:
        UserError, ValueError: see `validation_pictures`.
    """
    categories = {one["id"]: str(one["name"]) for one in sorted(ground_truth["categories"], key=lambda one: one["id"])}
    ids = {entry["id"] for entry in chosen}
    true = _by_image((a for a in ground_truth["annotations"] if not a.get("iscrowd", 0)), ids)
    found = _by_image((result for result in results if result["score"] >= score_threshold), ids)
    for entry in chosen:
        pixels = read_rgb(images / file_name(dict(entry)))
        of_both = true[entry["id"]], found[entry["id"]]
        drawn = [_draw(pixels, objects, categories, side) for objects in of_both]
        names = [[categories[one["category_id"]] for one in objects] for objects in of_both]
        yield Comparison(file_name(dict(entry)), drawn[0], drawn[1], names[0], names[1])


def _by_image(entries: Iterator[Entry], ids: set[Any]) -> dict[Any, list[Entry]]:
    """The entries of the images with these ids, by id."""
    grouped = defaultdict(list)
    for entry in entries:
        if entry["image_id"] in ids:
            grouped[entry["image_id"]].append(entry)
    return grouped


def _draw(
    pixels: NDArray[np.uint8], entries: Sequence[Entry], categories: Mapping[int, str], side: int
) -> NDArray[np.uint8]:
    """Objects over their image, `side` pixels long.

    A larger image is reduced first, and each mask once it is decoded: the masks of many objects in a large photograph
    would fill the memory.
    """
    height, width = pixels.shape[:2]
    scale = min(1.0, side / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    instances = (instances_from_coco([entry], categories, height, width)[0] for entry in entries)
    reduced = [_reduce(instance, size, (size[0] / width, size[1] / height)) for instance in instances]
    small = pixels if scale == 1 else np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))
    return draw_instances(small, reduced, longest_side=side)


def _reduce(instance: Instance, size: tuple[int, int], scales: tuple[float, float]) -> Instance:
    """An instance on an image of `size` (width, height); with scales of 1, as it is."""
    if scales == (1.0, 1.0):
        return instance
    x, y, width, height = instance.box
    box = (x * scales[0], y * scales[1], width * scales[0], height * scales[1])
    if instance.mask is None:
        return replace(instance, box=box)
    # Masks are decoded column by column: turned, they need not be copied, which takes most of the time.
    turned = cv2.resize(instance.mask.T.view(np.uint8) * 255, size[::-1], interpolation=cv2.INTER_AREA)
    return replace(instance, box=box, mask=turned.T >= 128)


def _side_by_side(one: Comparison, score_threshold: float) -> NDArray[np.uint8]:
    """Both drawings under a strip with their names."""
    height, width = one.truth.shape[:2]
    canvas = Image.new("RGB", (2 * width + _GAP, height + _STRIP), _DARK)
    name = printable(one.name)
    texts = (
        f"{name}, true objects: {len(one.true_classes)}",
        f"predicted, with scores >= {score_threshold:g}: {len(one.found_classes)}",
    )
    font = label_font(name, 22)
    for left, drawing, text in zip((0, width + _GAP), (one.truth, one.prediction), texts, strict=True):
        strip = Image.new("RGB", (width, _STRIP), _DARK)  # cuts off what is too long
        ImageDraw.Draw(strip).text((10, _STRIP // 2), text, font=font, fill=_LIGHT, anchor="lm")
        canvas.paste(strip, (left, 0))
        canvas.paste(Image.fromarray(drawing), (left, _STRIP))
    return np.asarray(canvas)
