"""The detector's readers that are fuzzed, next to those of `targets.py`."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from crossmae.checkpoints.metadata import DETECTOR_CONFIG, recorded_config
from crossmae.data.sources import open_source
from det.classes import recorded_classes
from det.config import build_det_config, flatten, load_det_config
from det.data.coco import ground_truth, register_coco
from det.evaluation.report import build_report
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


DETECTOR_TARGETS: dict[str, Target] = {
    "coco": Target(lambda folder: write_coco(folder, 3), _read_coco, kept=(".png",)),
    "coco polygons": Target(lambda folder: write_coco(folder, 3, "polygon"), _read_coco, kept=(".png",)),
    "detector file": Target(_write_config, lambda folder, _: load_det_config(str(folder / "c.yaml"))),
    "detector words": Target(
        _write_config, lambda folder, words: load_det_config(str(folder / "c.yaml"), words), keys=_keys()
    ),
    "config in a detector's file": Target(_write_recorded, _read_recorded),
    "report of a detector": Target(_write_run, _read_run),
}
