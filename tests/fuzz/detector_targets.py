"""The detector's readers that are fuzzed, next to those of `targets.py`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from crossmae.checkpoints.metadata import DETECTOR_CONFIG, recorded_config
from crossmae.data.annotations.read import read_annotations
from crossmae.data.annotations.split import split_images
from crossmae.data.sources import open_source
from det.classes import recorded_classes
from det.config import build_det_config, flatten, load_det_config
from det.data.coco import ground_truth, register_coco
from det.evaluation.report import build_report
from tests.crossmae.data.annotations.label_folders import (
    labelme,
    mask_text,
    shape,
    voc_text,
    write,
    write_image,
    write_yolo,
)
from tests.det.coco_files import TINY, write_coco
from tests.fuzz.targets import Target


def _read_coco(folder: Path, _: list[str]) -> None:
    register_coco("fuzz", folder / "coco.json", folder / "images", masks=True, max_pixels=200_000)
    register_coco("fuzz", folder / "coco.json", folder / "images", masks=False, for_evaluation=True)
    ground_truth("fuzz")
    open_source(folder / "coco.json", "data.train", folder / "images")


def _write_config(folder: Path) -> None:
    (folder / "c.yaml").write_text(TINY)


def _write_recorded(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(dict(flatten(yaml.safe_load(TINY)))))


def _read_recorded(folder: Path, _: list[str]) -> None:
    text = (folder / "config.json").read_text(errors="replace")
    build_det_config([("model.safetensors", recorded_config({DETECTOR_CONFIG: text}))])


def _write_run(folder: Path) -> None:
    _write_config(folder)
    (folder / "config.yaml").write_text(yaml.safe_dump(yaml.safe_load(TINY)))
    data = {f"own_coco_{split}": {"json": f"/far/{split}.json", "images": "/far"} for split in ("train", "val")}
    record = {"classes": ["a", "b"], "category_ids": [1, 2], "versions": {"torch": "9"}, "data": data}
    settings = {"number of training images": 4, "SHA-256 of the json of own_coco_train": "0" * 64}
    (folder / "run.json").write_text(json.dumps(record | {"settings": settings, "iterations": 40}))
    numbers = {"AP": 40.0, "AP50": 60.0, "AP75": None, "AP-a": 1.0}
    classes = [{"name": name, "objects": 10, "bbox": {"AP": 1.0}, "segm": {"AP": None}} for name in "ab"]
    (folder / "results.json").write_text(json.dumps({"bbox": numbers, "segm": numbers, "classes": classes}))
    row = {"total_loss": 4.0, "loss_mask": 1.0, "lr": 0.01, "time": 2.0, "data_time": 0.5}
    rows = [{"iteration": 19, **row}, {"iteration": 39, **row}, {"iteration": 40, "bbox/AP": 40.0, "segm/AP": 30.0}]
    (folder / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "model_best.json").write_text(json.dumps({"iteration": 20, "segm/AP": 35.67}))


def _read_run(folder: Path, _: list[str]) -> None:
    build_report(folder)
    recorded_classes(folder / "model_final.pth", {})


def _keys() -> list[str]:
    return [key for key, _ in flatten(load_det_config("demo_mask_rcnn.yaml"))]


# Labels of other tools.
def _write_yolo(folder: Path) -> None:
    write_yolo(folder, {"x": "0 .5 .5 .5 .4\n1 .1 .1 .5 .1 .5 .5\n", "y": ""}, "names: {0: a, 1: b}\ntrain: images\n")


def _write_voc(folder: Path) -> None:
    for number, name in enumerate("xy"):
        write_image(folder / f"JPEGImages/{name}.jpg", number)
        write(
            folder / f"Annotations/{name}.xml", voc_text(f"{name}.jpg", [("a", (1, 2, 9, 12.5)), ("b", (3, 4, 9, 9))])
        )


def _write_labelme(folder: Path) -> None:
    shapes = [
        shape("a", [[1, 2], [9, 2], [9, 8]], group_id=1),
        shape("b", [[20, 9], [10, 3.5]], "rectangle"),
        shape("b", [[30, 15], [30, 19]], "circle"),
        shape("a", [[6, 7], [10, 10]], "mask", mask=mask_text(np.ones((4, 5)))),
    ]
    for number, name in enumerate("xy"):
        write_image(folder / f"{name}.jpg", number)
        write(folder / f"{name}.json", labelme(f"{name}.jpg", shapes))


def _write_masks(folder: Path) -> None:
    values = np.arange(30 * 40).reshape(30, 40) // 200
    for number, kind in enumerate((np.uint8, np.uint16)):
        write_image(folder / f"images/{number}.jpg", number)
        Image.fromarray(values.astype(kind)).save(write(folder / f"masks/cell/{number}.png", b""))


def _read_labels(folder: Path, _: list[str]) -> None:
    for split in read_annotations(folder).splits.values():
        path = folder / "converted.json"
        write(path, json.dumps(split.content))
        register_coco("fuzz", path, split.images, masks=False, for_evaluation=True, max_pixels=200_000)
        path.unlink()
        if len(split.content["images"]) > 1:
            split_images(split.content, split.images, 0.5, 0, False)


DETECTOR_TARGETS: dict[str, Target] = {
    "coco": Target(lambda folder: write_coco(folder, 3), _read_coco, kept=(".png",)),
    "coco polygons": Target(lambda folder: write_coco(folder, 3, "polygon"), _read_coco, kept=(".png",)),
    "labels of YOLO": Target(_write_yolo, _read_labels, kept=(".jpg",), anywhere=True),
    "labels of VOC": Target(_write_voc, _read_labels, kept=(".jpg",)),
    "labels of LabelMe": Target(_write_labelme, _read_labels, kept=(".jpg",), anywhere=True),
    "masks": Target(_write_masks, _read_labels, kept=(".jpg",)),
    "detector file": Target(_write_config, lambda folder, _: load_det_config(str(folder / "c.yaml"))),
    "detector words": Target(
        _write_config, lambda folder, words: load_det_config(str(folder / "c.yaml"), words), keys=_keys()
    ),
    "config in a detector's file": Target(_write_recorded, _read_recorded),
    "report of a detector": Target(_write_run, _read_run),
}
