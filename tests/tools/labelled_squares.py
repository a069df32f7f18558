"""Images with a square each, with labels as COCO and as YOLO, and the words of `crossmae run` for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COUNT, SIDE, SQUARE = 40, 64, 24
LABELS = ("labels.json", "yolo")
# A model so small that a minute of training is enough to see all stages.
PRETRAIN_SET = ("model.img_size=64", "model.depth=2", "model.decoder_depth=1")
DETECT_SET = ("MODEL.VIT.PRETRAIN_IMG_SIZE=64", "MODEL.VIT.DEPTH=2")


def write_squares(folder: Path) -> None:
    """Write IMAGES, labels.json, and the same as a data set of YOLO."""
    rng = np.random.default_rng(0)
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "box"}]}
    for name in ("IMAGES", "yolo/images/train", "yolo/labels/train"):
        (folder / name).mkdir(parents=True)
    for number in range(COUNT):
        pixels = rng.integers(0, 90, (SIDE, SIDE, 3), np.uint8)
        x, y = (int(value) for value in rng.integers(0, SIDE - SQUARE, 2))
        pixels[y : y + SQUARE, x : x + SQUARE] = (250, 40, 40)
        for place in ("IMAGES", "yolo/images/train"):
            Image.fromarray(pixels).save(folder / place / f"{number}.png")
        content["images"].append({"id": number, "file_name": f"{number}.png", "width": SIDE, "height": SIDE})
        right, bottom = x + SQUARE, y + SQUARE
        corners = [x, y, right, y, right, bottom, x, bottom]
        annotation = {"id": number + 1, "image_id": number, "category_id": 1, "bbox": [x, y, SQUARE, SQUARE]}
        content["annotations"].append(annotation | {"segmentation": [corners], "area": SQUARE**2, "iscrowd": 0})
        shares = " ".join(f"{value / SIDE:.6f}" for value in corners)
        (folder / f"yolo/labels/train/{number}.txt").write_text(f"0 {shares}\n")
    (folder / "labels.json").write_text(json.dumps(content))
    (folder / "yolo/data.yaml").write_text("path: .\ntrain: images/train\nnames: [box]\n")


def run_words(labels: str) -> list[str]:
    """Return the arguments of `crossmae run` with small models, which ends within four minutes."""
    images = "IMAGES" if labels == "labels.json" else "yolo/images/train"
    words = [images, "--labels", labels, "--budget", "4m", "--output", "out", "--size", "128"]
    return [*words, "--pretrain-set", *PRETRAIN_SET, "--detect-set", *DETECT_SET]
