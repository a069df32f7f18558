"""Suite of evaluation: scores of many detections, masks pasted and encoded, and a large COCO file before training."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog
from detectron2.layers.mask_ops import paste_masks_in_image
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from det.data.coco import read_coco, register_coco
from det.evaluation.evaluate import write_predictions
from det.evaluation.scoring import DetectionScores, score_results
from det.inference.paste import encode_masks
from tools.benchmarks.measuring import Comparison, Gate, Row, ScratchFolder

Build = Callable[[], Comparison | Row]
SIDE = 480  # of a synthetic image
PASTED = ((100, 640, 480, 8.0), (100, 1920, 1280, 20.0))  # masks, width and height of the image, goal


def cocoeval(
    device: torch.device,
    images: int = 5000,
    per_image: int = 100,
    objects: int = 7,
    categories: int = 80,
    pasted: tuple[tuple[int, int, int, float], ...] = PASTED,
    annotations: int = 860_000,
) -> list[Build]:
    """List scores, masks and a large file.

    On a GPU, only masks are listed.

    Args:
        per_image: detections of an image.
        objects: true objects of an image.
        annotations: objects of the large file.
    """
    masks: list[Build] = [partial(compare_pasting, *one, device) for one in pasted]
    if device.type == "cuda":
        return masks
    return [
        partial(compare_scores, images, per_image, objects, categories),
        *masks,
        partial(compare_files, annotations),
    ]


def make_truth(images: int, objects: int, categories: int, seed: int = 0) -> dict[str, Any]:
    """Draw true objects: polygons with eight corners."""
    draw = np.random.default_rng(seed)
    content: dict[str, Any] = {
        "images": [{"id": n, "file_name": f"{n}.png", "height": SIDE, "width": SIDE} for n in range(1, images + 1)],
        "categories": [{"id": n, "name": f"class {n}"} for n in range(1, categories + 1)],
        "annotations": [],
    }
    count = images * objects
    sizes = draw.integers(12, SIDE // 2, (count, 2))
    corners = (draw.random((count, 2)) * (SIDE - sizes)).round()
    chosen = draw.integers(1, categories + 1, count)
    for number in range(count):
        (x, y), (w, h) = corners[number].tolist(), sizes[number].tolist()
        content["annotations"].append(
            {
                "id": number + 1,
                "image_id": number // objects + 1,
                "category_id": int(chosen[number]),
                "bbox": [x, y, w, h],
                "area": float(w * h * 7 / 8),
                "iscrowd": 0,
                "segmentation": [octagon(x, y, w, h)],
            }
        )
    return content


def octagon(x: float, y: float, w: float, h: float) -> list[float]:
    """Return the corners of an octagon in a box."""
    a, b = w / 4, h / 4
    return [
        *(x + a, y, x + w - a, y, x + w, y + b, x + w, y + h - b),
        *(x + w - a, y + h, x + a, y + h),
        *(x, y + h - b, x, y + b),
    ]


def make_detections(truth: dict[str, Any], per_image: int, seed: int = 1) -> list[dict[str, Any]]:
    """Draw detections: true objects that moved a little, and false ones."""
    draw = np.random.default_rng(seed)
    of_image: dict[int, list[dict[str, Any]]] = {entry["id"]: [] for entry in truth["images"]}
    for annotation in truth["annotations"]:
        of_image[annotation["image_id"]].append(annotation)
    categories, found = len(truth["categories"]), []
    for image_id, objects in of_image.items():
        for place in range(per_image):
            if place < len(objects):
                x, y, w, h = (
                    value + shift for value, shift in zip(objects[place]["bbox"], draw.normal(0, 3, 4), strict=True)
                )
                category = objects[place]["category_id"]
            else:
                w, h = draw.uniform(8, SIDE / 2, 2)
                x, y = draw.uniform(0, SIDE - w), draw.uniform(0, SIDE - h)
                category = int(draw.integers(1, categories + 1))
            box = [max(float(x), 0.0), max(float(y), 0.0), max(float(w), 4.0), max(float(h), 4.0)]
            mask = rle.frPyObjects([octagon(*box)], SIDE, SIDE)[0]
            found.append(
                {
                    "image_id": image_id,
                    "category_id": category,
                    "bbox": box,
                    "score": float(draw.random()),
                    "segmentation": {"size": [SIDE, SIDE], "counts": mask["counts"].decode("ascii")},
                }
            )
    return found


def compare_scores(images: int, per_image: int, objects: int, categories: int) -> Comparison:
    """Compare predictions written and scored for boxes and masks."""
    truth = make_truth(images, objects, categories)
    detections = make_detections(truth, per_image)
    scratch = ScratchFolder()
    folder = scratch.path
    (folder / "truth.json").write_text(json.dumps(truth))

    def ours() -> list[DetectionScores]:
        """Do what the evaluation of a detector does with its predictions."""
        write_predictions(scratch.path / "ours.json", detections)
        known = read_coco(folder / "truth.json")
        return [score_results(known, detections, task) for task in ("bbox", "segm")]

    def other() -> list[Any]:
        """Do what a script with pycocotools does with them."""
        with contextlib.redirect_stdout(io.StringIO()):
            (folder / "other.json").write_text(json.dumps(detections))
            known, scored = COCO(str(folder / "truth.json")), []
            for task in ("bbox", "segm"):
                # Without boxes, so that pycocotools takes the area of the mask, as detectron2 does.
                kept = [{k: v for k, v in one.items() if k != "bbox" or task == "bbox"} for one in detections]
                evaluation = COCOeval(known, known.loadRes(kept), task)
                evaluation.evaluate()
                evaluation.accumulate()
                scored.append(evaluation.eval["precision"])
            return scored

    def gate() -> Gate:
        pairs = zip(ours(), other(), strict=True)
        return Gate(max(float(np.abs(own.precision - their).max()) for own, their in pairs), 1e-9)

    return Comparison(
        what=f"{len(detections):,} detections written and scored, boxes and masks",
        against="pycocotools",
        ours=ours,
        other=other,
        goals={"cpu": 25.0},
        memory_goals={"cpu": 1 / 3},
        gate=gate,
    )


def compare_pasting(masks: int, width: int, height: int, goal: float, device: torch.device) -> Comparison:
    """Compare masks of one image from probabilities to run lengths."""
    draw = torch.Generator().manual_seed(0)
    probabilities = torch.nn.functional.interpolate(torch.rand(masks, 1, 4, 4, generator=draw), 28, mode="bicubic")[
        :, 0
    ]
    probabilities = probabilities.clamp(0, 1)
    sizes = (0.04 + 0.3 * torch.rand(masks, 2, generator=draw)) * torch.tensor([width, height])
    corners = torch.rand(masks, 2, generator=draw) * (torch.tensor([width, height]) - sizes)
    boxes = torch.cat([corners, corners + sizes], dim=1)

    placed = (probabilities.to(device), boxes.to(device))

    def ours() -> list[dict[str, Any]]:
        return encode_masks(*placed, height, width)

    def paste(probabilities: Tensor, boxes: Tensor) -> list[dict[str, Any]]:
        whole = paste_masks_in_image(probabilities, boxes, (height, width), threshold=0.5).cpu()
        found = [rle.encode(np.array(mask[:, :, None], order="F", dtype="uint8"))[0] for mask in whole]
        return [{"size": one["size"], "counts": one["counts"].decode("utf-8")} for one in found]

    return Comparison(
        what=f"{masks} masks pasted and encoded, {width}x{height}",
        against="detectron2 and pycocotools",
        ours=ours,
        other=lambda: paste(*placed),
        goals={"cpu": goal, "cuda": 5.0},
        # On a GPU, detectron2 rounds differently than on the CPU.
        gate=lambda: Gate(sum(a != b for a, b in zip(ours(), paste(probabilities, boxes), strict=True)), 0),
        note="the gate counts masks whose bytes differ from detectron2's on the CPU",
    )


def write_dataset(folder: Path, annotations: int) -> Path:
    """Write a COCO file, with a small image for every 100 objects."""
    images = max(annotations // 100, 1)
    truth = make_truth(images, annotations // images, 80)
    (folder / "images").mkdir(parents=True)
    picture = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE)).save(picture, "PNG")
    for entry in truth["images"]:
        (folder / "images" / entry["file_name"]).write_bytes(picture.getvalue())
    path = folder / "truth.json"
    path.write_text(json.dumps(truth))
    return path


def read_dataset(path: Path) -> list[dict[str, Any]]:
    """Check, register and load a data set as training does."""
    register_coco("benchmark", path, path.parent / "images", masks=True)
    records: list[dict[str, Any]] = DatasetCatalog.get("benchmark")
    return records


def compare_files(annotations: int) -> Comparison:
    """Compare a COCO file, checked and loaded, with pycocotools' reading."""
    scratch = ScratchFolder()
    path = write_dataset(scratch.path, annotations)

    def other() -> COCO:
        with contextlib.redirect_stdout(io.StringIO()):
            return COCO(str(path))

    def gate() -> Gate:
        count = sum(len(record["annotations"]) for record in read_dataset(path))
        return Gate(abs(count - len(other().anns)), 0)

    return Comparison(
        what=f"COCO file of {annotations:,} annotations until the first step",
        against="pycocotools' COCO(), which checks nothing",
        ours=lambda: (read_dataset(path), scratch)[0],
        other=other,
        goals={"cpu": 1.0},
        gate=gate,
        note="the gate counts objects",
    )
