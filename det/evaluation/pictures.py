"""Validation pictures with true and predicted objects, for TensorBoard and reports."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crossmae.errors import printable
from crossmae.files import write_atomically
from crossmae.reports.figures import PNG_LEVEL
from det.config import image_limits
from det.data.tidy import image_name
from det.inference.draw import draw_instances, draw_sheet, instances_from_coco
from det.inference.predict import read_rgb

COUNT = 4
SCORE_THRESHOLD = 0.5
DRAWN_SIDE = 640  # pixels of the longer side of a drawn image
CAPTION_SIZE = 22  # pixels
_WRITTEN = re.compile(r"\d+-.*\.png")
_LONGEST_STEM = 80  # characters


def validation_pictures(
    ground_truth: dict[str, Any], images: Path, results: list[dict[str, Any]], count: int = COUNT
) -> list[tuple[str, NDArray[np.uint8]]]:
    """Draw true objects (left) and predicted objects (right), see `compare_pictures`."""
    return compare_pictures(ground_truth, images, {"predicted": results}, count)


def compare_pictures(
    ground_truth: dict[str, Any], images: Path, results: Mapping[str, Sequence[dict[str, Any]]], count: int = COUNT
) -> list[tuple[str, NDArray[np.uint8]]]:
    """Draw images with true objects (left) and the predictions of each detector.

    Every call chooses the same images: `count` images with objects, evenly spaced by id. Crowd regions and predictions
    below a threshold are not drawn, see `drawing_threshold`. Returns file names and pictures (H, W, 3) uint8 RGB.

    Args:
        results: COCO results by the words that name the detector in the picture.
    """
    categories = {one["id"]: str(one["name"]) for one in sorted(ground_truth["categories"], key=lambda one: one["id"])}
    true = [annotation for annotation in ground_truth["annotations"] if not annotation.get("iscrowd", 0)]
    entries, pictures = spread_images(ground_truth, count), []
    shown = {entry["id"] for entry in entries}
    objects = sum(annotation["image_id"] in shown for annotation in true)
    thresholds = [
        drawing_threshold([one["score"] for one in every if one["image_id"] in shown], objects)
        for every in results.values()
    ]
    found = [
        [result for result in every if result["score"] >= threshold]
        for every, threshold in zip(results.values(), thresholds, strict=True)
    ]
    for entry in entries:
        name = image_name(entry)
        pixels = read_rgb(images / name, image_limits(sys.maxsize))  # evaluation has read it
        here = [[one for one in every if one["image_id"] == entry["id"]] for every in (true, *found)]
        panels = [draw_instances(pixels, instances_from_coco(drawn, categories), DRAWN_SIDE) for drawn in here]
        predicted = zip(results, thresholds, here[1:], strict=True)
        captions = [
            f"{printable(name)}, true objects: {len(here[0])}",
            *(f"{words}, with scores >= {threshold:.2g}: {len(drawn)}" for words, threshold, drawn in predicted),
        ]
        pictures.append((name, draw_sheet(panels, captions, CAPTION_SIZE, len(panels))))
    return pictures


def drawing_threshold(scores: Sequence[float], objects: int) -> float:
    """Choose the score from which predictions are drawn.

    It is SCORE_THRESHOLD, or less for a weak detector, because empty pictures would show nothing of it. If fewer
    predictions than half of the true objects reach SCORE_THRESHOLD, as many predictions as true objects are drawn.
    """
    confident = sum(score >= SCORE_THRESHOLD for score in scores)
    if 2 * confident >= objects or not scores:
        return SCORE_THRESHOLD
    return min(sorted(scores, reverse=True)[:objects][-1], SCORE_THRESHOLD)


def save_pictures(pictures: Sequence[tuple[str, NDArray[np.uint8]]], folder: Path) -> None:
    """Replace the pictures of a folder by 1-NAME.png, 2-NAME.png and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, (name, pixels) in enumerate(pictures, start=1):
        stem = re.sub(r"[^\w.-]+", "-", Path(name).stem)[:_LONGEST_STEM]
        paths.append(folder / f"{number}-{stem}.png")
        write_atomically(paths[-1], partial(Image.fromarray(pixels).save, format="png", compress_level=PNG_LEVEL))
    for path in find_pictures(folder):
        if path not in paths:
            path.unlink()


def find_pictures(folder: Path) -> list[Path]:
    """List the files from `save_pictures` in order."""
    written = [path for path in folder.glob("*.png") if _WRITTEN.fullmatch(path.name)]
    return sorted(written, key=lambda path: int(path.name.partition("-")[0]))


def spread_images(ground_truth: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Choose images with objects (crowd regions excluded), evenly spaced by id.

    Without annotations, all images can be chosen.
    """
    with_objects = {a["image_id"] for a in ground_truth["annotations"] if not a.get("iscrowd", 0)}
    empty = not ground_truth["annotations"]
    entries = sorted((e for e in ground_truth["images"] if empty or e["id"] in with_objects), key=lambda e: e["id"])
    number = min(count, len(entries))
    return [entries[index * len(entries) // number] for index in range(number)]
