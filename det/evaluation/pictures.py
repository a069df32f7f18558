"""Validation pictures with true and predicted objects, for TensorBoard and reports."""

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
from det.inference.draw import DrawnInstance, draw_instances, instances_from_coco, label_font
from det.inference.predict import read_rgb

COUNT = 4
SCORE_THRESHOLD = 0.5
DRAWN_SIDE = 640  # pixels of the longer side of a drawn image
_GAP, _STRIP = 8, 42  # pixels: space between the two images, and height of the text above them
_DARK, _LIGHT = (24, 27, 33), (236, 238, 242)
_WRITTEN = re.compile(r"\d+-.*\.png")
_LONGEST_STEM = 80  # characters

Annotation = Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """One image drawn twice, with true and with predicted objects, (H, W, 3) uint8 RGB, and its class names."""

    name: str
    truth: NDArray[np.uint8]
    prediction: NDArray[np.uint8]
    true_classes: list[str]
    found_classes: list[str]


def validation_pictures(
    ground_truth: dict[str, Any], images: Path, results: list[dict[str, Any]], count: int = COUNT
) -> list[tuple[str, NDArray[np.uint8]]]:
    """Draw images with true objects (left) and predicted objects (right).

    Every call chooses the same images: `count` images with objects, evenly spaced by id. Returns file names and
    pictures (H, W, 3) uint8 RGB, with a longer side of 640 pixels.
    """
    drawn = compare_images(ground_truth, images, results, spread_images(ground_truth, count))
    return [(one.name, _side_by_side(one)) for one in drawn]


def save_pictures(pictures: Sequence[tuple[str, NDArray[np.uint8]]], folder: Path) -> None:
    """Replace the pictures of a folder by 1-NAME.png, 2-NAME.png and so on."""
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
    """List the files from `save_pictures` in order."""
    written = [path for path in folder.glob("*.png") if _WRITTEN.fullmatch(path.name)]
    return sorted(written, key=lambda path: int(path.name.partition("-")[0]))


def spread_images(ground_truth: dict[str, Any], count: int) -> list[Annotation]:
    """Choose images with objects (crowd regions excluded), evenly spaced by id."""
    with_objects = {a["image_id"] for a in ground_truth["annotations"] if not a.get("iscrowd", 0)}
    entries = sorted((e for e in ground_truth["images"] if e["id"] in with_objects), key=lambda e: e["id"])
    number = min(count, len(entries))
    return [entries[index * len(entries) // number] for index in range(number)]


def compare_images(
    ground_truth: dict[str, Any],
    images: Path,
    results: Sequence[Annotation],
    chosen: Sequence[Annotation],
) -> Iterator[Comparison]:
    """Draw images of a COCO file twice, one image at a time.

    The images of `chosen` are drawn with a longer side of DRAWN_SIDE pixels, without crowd regions.
    """
    categories = {one["id"]: str(one["name"]) for one in sorted(ground_truth["categories"], key=lambda one: one["id"])}
    ids = {entry["id"] for entry in chosen}
    true = _by_image((a for a in ground_truth["annotations"] if not a.get("iscrowd", 0)), ids)
    found = _by_image((result for result in results if result["score"] >= SCORE_THRESHOLD), ids)
    for entry in chosen:
        pixels = read_rgb(images / file_name(dict(entry)))
        of_both = true[entry["id"]], found[entry["id"]]
        truth, prediction = (_draw(pixels, objects, categories, DRAWN_SIDE) for objects in of_both)
        names = ([categories[one["category_id"]] for one in objects] for objects in of_both)
        yield Comparison(file_name(dict(entry)), truth, prediction, *names)


def _by_image(entries: Iterator[Annotation], ids: set[Any]) -> dict[Any, list[Annotation]]:
    grouped = defaultdict(list)
    for entry in entries:
        if entry["image_id"] in ids:
            grouped[entry["image_id"]].append(entry)
    return grouped


def _draw(
    pixels: NDArray[np.uint8], entries: Sequence[Annotation], categories: Mapping[int, str], side: int
) -> NDArray[np.uint8]:
    """Draw objects over their image, with a longer side of `side` pixels.

    To save memory, a larger image is reduced first, and each mask immediately after it is decoded.
    """
    instances = instances_from_coco(entries, categories)
    height, width = pixels.shape[:2]
    scale = min(1.0, side / max(height, width))
    if scale < 1:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        instances = [_reduce(instance, size, (width, height)) for instance in instances]
        pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))
    return draw_instances(pixels, instances, longest_side=side)


def _reduce(instance: DrawnInstance, size: tuple[int, int], given: tuple[int, int]) -> DrawnInstance:
    """Scale an instance from `given` to `size`, both (width, height)."""
    across, down = size[0] / given[0], size[1] / given[1]
    x, y, width, height = instance.box
    box = (x * across, y * down, width * across, height * down)
    mask = instance.decode_mask(given[1], given[0])
    if mask is None:
        return replace(instance, box=box)
    # Masks are decoded column by column. The transposed mask needs no copy, which would take most of the time.
    turned = cv2.resize(mask.T.view(np.uint8) * 255, size[::-1], interpolation=cv2.INTER_AREA)
    return replace(instance, box=box, mask=turned.T >= 128)


def _side_by_side(one: Comparison) -> NDArray[np.uint8]:
    height, width = one.truth.shape[:2]
    canvas = Image.new("RGB", (2 * width + _GAP, height + _STRIP), _DARK)
    name = printable(one.name)
    texts = (
        f"{name}, true objects: {len(one.true_classes)}",
        f"predicted, with scores >= {SCORE_THRESHOLD:g}: {len(one.found_classes)}",
    )
    font = label_font(name, 22)
    for left, drawing, text in zip((0, width + _GAP), (one.truth, one.prediction), texts, strict=True):
        strip = Image.new("RGB", (width, _STRIP), _DARK)  # the picture cuts off text that is too long
        ImageDraw.Draw(strip).text((10, _STRIP // 2), text, font=font, fill=_LIGHT, anchor="lm")
        canvas.paste(strip, (left, 0))
        canvas.paste(Image.fromarray(drawing), (left, _STRIP))
    return np.asarray(canvas)
