"""Predictions as label files of YOLO or LabelMe, to correct them in a labelling tool and to train again.

    OUTPUT/labels/NAME.txt, classes.txt    YOLO: a polygon per object, or a box without masks
    OUTPUT/labels/NAME.json                LabelMe: a polygon per part of an object, or a rectangle without masks

Masks become polygons within half a pixel. Holes are filled. Images without objects get an empty file.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from crossmae.errors import printable
from crossmae.files import make_folder, write_text
from det.classes import Classes
from det.data.masks import decode_segmentation
from det.inference.arguments import LABEL_FORMATS

LABEL_FOLDER = "labels"
OUTLINE_TOLERANCE = 1.0  # half pixels between a mask and its polygon
LABELME_VERSION = "5.5.0"  # the format that is written


def trace_mask(mask: NDArray[np.bool_]) -> list[list[float]]:
    """Trace the outlines of the parts of a mask (H, W).

    Returns lists of x1, y1, x2, y2, ... in pixels, the largest first. Outlines run between the pixels of the object and
    its surroundings.
    """
    double = mask.astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    contours, _ = cv2.findContours(double, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    polygons = []
    for contour in sorted(contours, key=cv2.contourArea, reverse=True):
        points = cv2.approxPolyDP(contour, OUTLINE_TOLERANCE, True)
        points = points if len(points) > 2 else contour  # a line of pixels
        polygons.append(((points.reshape(-1) + 0.5) / 2).tolist())
    return polygons


@dataclass(frozen=True)
class LabelWriter:
    """A writer of label files in one of `LABEL_FORMATS`.

    Attributes:
        paths: label file by the name of its image.
        images: folder that the names are relative to.
    """

    form: str
    paths: Mapping[str, Path]
    images: Path
    classes: Classes

    def start(self, folder: Path) -> None:
        """Write the names of the classes."""
        make_folder(folder, "--output")
        if self.form == "yolo":
            write_text(folder / "classes.txt", "".join(f"{printable(name)}\n" for name in self.classes.names))

    def write(self, entry: Mapping[str, Any], annotations: Sequence[Mapping[str, Any]]) -> None:
        """Write the label file of a COCO image entry and its annotations."""
        path, size = self.paths[entry["file_name"]], (entry["height"], entry["width"])
        outlines = [_outlines(annotation, *size) for annotation in annotations]
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.form == "yolo":
            numbers = {number: at for at, number in enumerate(self.classes.category_ids)}
            rows = [
                _yolo_row(numbers[one["category_id"]], one["bbox"], parts, *size)
                for one, parts in zip(annotations, outlines, strict=True)
            ]
            write_text(path, "".join(f"{row}\n" for row in rows))
        else:
            image = os.path.relpath(self.images / entry["file_name"], path.parent)
            content = _labelme_content(image, size, annotations, outlines, self.classes.by_id())
            write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def label_paths(form: str, folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """Return the label file of each image.

    Images of the same base name keep their suffix in it: `a.png.txt`.
    """
    stems = Counter(str(PurePosixPath(name).with_suffix("")) for name in names)
    suffix = LABEL_FORMATS[form]
    return {
        name: folder / (f"{stem}{suffix}" if stems[stem] == 1 else f"{name}{suffix}")
        for name in names
        for stem in [str(PurePosixPath(name).with_suffix(""))]
    }


def _outlines(annotation: Mapping[str, Any], height: int, width: int) -> list[list[float]]:
    mask = annotation.get("segmentation")
    return trace_mask(decode_segmentation(mask, height, width)) if mask else []


def _yolo_row(number: int, box: Sequence[float], parts: Sequence[list[float]], height: int, width: int) -> str:
    """Return a row with shares of the image.

    Parts of an object are joined by lines without width, there and back.
    """
    if parts:
        closed = [value for part in parts for value in (part if len(parts) == 1 else [*part, *part[:2]])]
        shares = [value / (height if at % 2 else width) for at, value in enumerate(closed)]
    else:
        x, y, w, h = box
        shares = [(x + w / 2) / width, (y + h / 2) / height, w / width, h / height]
    return " ".join([str(number), *(f"{min(max(share, 0), 1):.6f}" for share in shares)])


def _labelme_content(
    image: str,
    size: tuple[int, int],
    annotations: Sequence[Mapping[str, Any]],
    outlines: Sequence[Sequence[list[float]]],
    names: Mapping[int, str],
) -> dict[str, Any]:
    shapes = list[dict[str, Any]]()
    for number, (annotation, parts) in enumerate(zip(annotations, outlines, strict=True), start=1):
        x, y, w, h = annotation["bbox"]
        polygons = [[[part[at], part[at + 1]] for at in range(0, len(part), 2)] for part in parts]
        shared: dict[str, Any] = {
            "label": names[annotation["category_id"]],
            "shape_type": "polygon" if parts else "rectangle",
            "group_id": number if len(parts) > 1 else None,
            "description": f"score {annotation['score']:.3f}",
            "flags": {},
        }
        shapes += [shared | {"points": points} for points in polygons or [[[x, y], [x + w, y + h]]]]
    head = {"version": LABELME_VERSION, "flags": {}, "shapes": shapes}
    return head | {"imagePath": image, "imageData": None, "imageHeight": size[0], "imageWidth": size[1]}
