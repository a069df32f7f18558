"""Small data sets in the formats of other tools, for the tests of the readers."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from crossmae.data.annotations.records import UNSPLIT, AnnotationSet

WIDTH, HEIGHT = 40, 30
BOX = "0 .5 .5 .5 .4\n"  # a row of YOLO


def write_image(path: Path, seed: int = 0, orientation: int = 1, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Path:
    """Write noise. `size` is (width, height) as stored, before the orientation."""
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[274] = orientation
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    form = {".jpg": "jpeg", ".jpeg": "jpeg"}.get(path.suffix.lower(), "png")
    Image.fromarray(pixels).save(path, form, exif=exif)
    return path


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_yolo(
    folder: Path, rows: Mapping[str, str | bytes | None], yaml: str = "names: [a, b]\ntrain: images\nval: images\n"
) -> Path:
    """Write images/NAME.jpg and labels/NAME.txt, None for no label file, and data.yaml, "" for none."""
    for seed, (name, text) in enumerate(rows.items()):
        write_image(folder / "images" / f"{name}.jpg", seed)
        if text is not None:
            write(folder / "labels" / f"{name}.txt", text)
    if yaml:
        write(folder / "data.yaml", yaml)
    return folder


def voc_text(name: str, objects: Sequence[tuple[str, Sequence[Any]]], size: tuple[int, int] = (WIDTH, HEIGHT)) -> str:
    """Return a VOC file with objects (class, corners)."""
    rows = "".join(
        f"<object><name>{label}</name><part><name>head</name><bndbox><xmin>7</xmin><ymin>7</ymin><xmax>8</xmax>"
        f"<ymax>8</ymax></bndbox></part><bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax>"
        f"<ymax>{box[3]}</ymax></bndbox></object>"
        for label, box in objects
    )
    sizes = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    return f"<annotation><folder>x</folder><filename>{name}</filename>{sizes}{rows}</annotation>"


def labelme(image: str, shapes: Sequence[Mapping[str, Any]], **others: Any) -> str:
    """Return a LabelMe file."""
    head = {"version": "5.4.1", "flags": {}, "shapes": shapes, "imagePath": image, "imageData": "AAAA"}
    return json.dumps(head | {"imageHeight": HEIGHT, "imageWidth": WIDTH} | others)


def shape(label: str, points: Sequence[Sequence[float]], kind: str = "polygon", **others: Any) -> dict[str, Any]:
    return {"label": label, "points": points, "shape_type": kind, "group_id": None, "flags": {}} | others


def mask_text(mask: np.ndarray) -> str:
    """Return a mask as LabelMe stores it."""
    buffer = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).convert("1").save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()


def write_coco_json(path: Path, names: Sequence[str], split: str = "") -> Path:
    """Write a COCO file with an object of class `a` in each image."""
    images = [{"id": n, "file_name": name, "width": WIDTH, "height": HEIGHT} for n, name in enumerate(names, start=1)]
    box = {"category_id": 1, "bbox": [1, 2, 10, 12], "area": 120, "iscrowd": 0}
    content = {
        "images": images,
        "annotations": [{"id": n, "image_id": n, **box} for n in range(1, len(names) + 1)],
        "categories": [{"id": 1, "name": "a"}],
        "info": {"split": split},
    }
    return write(path, json.dumps(content))


def objects(found: AnnotationSet, split: str = UNSPLIT) -> dict[str, list[tuple[str, list[float], Any]]]:
    """Class, box and mask of every object, by file name."""
    content = found.splits[split].content
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    files = {entry["id"]: entry["file_name"] for entry in content["images"]}
    result: dict[str, list[tuple[str, list[float], Any]]] = {name: [] for name in files.values()}
    for one in content["annotations"]:
        row = (names[one["category_id"]], one["bbox"], one.get("segmentation"))
        result[files[one["image_id"]]].append(row)
    return result
