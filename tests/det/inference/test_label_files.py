"""Proves that predictions written as YOLO or LabelMe are read back as the same boxes and masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

from pycocotools import mask as coco_mask

from crossmae.data.annotations.read import read_annotations
from crossmae.data.annotations.records import UNSPLIT
from crossmae.errors import USER_ERROR_EXIT_CODE
from det.classes import Classes
from det.data.masks import decode_segmentation
from det.inference.label_files import LabelWriter, label_paths, trace_mask
from tests.crossmae.data.annotations.label_folders import write_image
from tests.det.detectors import write_run
from tests.tools.command_line import exit_code
from tools.predict import main

HEIGHT, WIDTH = 60, 80


def disc(x: float, y: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    return np.hypot(columns + 0.5 - x, rows + 0.5 - y) < radius


def prediction(mask: np.ndarray | None, category: int, box: list[float] | None = None) -> dict[str, Any]:
    rows, columns = np.nonzero(mask) if mask is not None else ((), ())
    if mask is None:
        return {"category_id": category, "bbox": box, "score": 0.5}
    box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"category_id": category, "bbox": [float(one) for one in box], "score": 0.5, "segmentation": encoded}


def test_outlines_of_boxes_and_of_lines_of_pixels_are_exact() -> None:
    for rows, columns in ((slice(2, 9), slice(3, 30)), (slice(5, 6), slice(3, 30)), (slice(5, 6), slice(7, 8))):
        mask = np.zeros((HEIGHT, WIDTH), bool)
        mask[rows, columns] = True
        assert np.array_equal(decode_segmentation(trace_mask(mask), HEIGHT, WIDTH), mask)


@pytest.mark.parametrize("form", ["yolo", "labelme"])
def test_masks_and_boxes_come_back(tmp_path: Path, form: str) -> None:
    two = disc(15, 15, 9) | disc(60, 40, 12)
    wanted = {
        "sub/a.jpg": [prediction(disc(40, 30, 20), 3), prediction(two, 7), prediction(disc(0, 0, 14), 3)],
        "b.jpg": [],
        "c.jpg": [prediction(None, 7, [3.125, 4.5, 20.25, 30])],
    }
    paths = label_paths(form, tmp_path / "out/labels", list(wanted))
    writer = LabelWriter(form, paths, tmp_path / "photos", Classes(("x y", "é"), (3, 7)))
    writer.start(tmp_path / "out/labels")
    for seed, (name, objects) in enumerate(wanted.items()):
        write_image(tmp_path / "photos" / name, seed, size=(WIDTH, HEIGHT))
        writer.write({"file_name": name, "height": HEIGHT, "width": WIDTH}, objects)
    content = read_annotations(tmp_path / "out/labels", tmp_path / "photos").splits[UNSPLIT].content
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    assert [entry["file_name"] for entry in content["images"]] == sorted(wanted)
    for entry in content["images"]:
        found = [one for one in content["annotations"] if one["image_id"] == entry["id"]]
        assert len(found) == len(wanted[entry["file_name"]])
        for one, old in zip(found, wanted[entry["file_name"]], strict=True):
            assert names[one["category_id"]] == {3: "x y", 7: "é"}[old["category_id"]]
            assert one["bbox"] == pytest.approx(old["bbox"], abs=0.5 if "segmentation" in old else 1e-3)
            if "segmentation" in old:
                before, after = (decode_segmentation(some["segmentation"], HEIGHT, WIDTH) for some in (old, one))
                assert (before & after).sum() / (before | after).sum() > 0.95


def test_images_of_the_same_base_name_have_their_own_files() -> None:
    assert label_paths("yolo", Path("o"), ["a.png", "a.jpg", "s/a.jpg"]) == {
        "a.png": Path("o/a.png.txt"),
        "a.jpg": Path("o/a.jpg.txt"),
        "s/a.jpg": Path("o/s/a.txt"),
    }


def test_the_tool_writes_what_it_predicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("run"))
    for seed, name in enumerate(("a.png", "b.png")):
        pixels = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(write_image(Path("photos", name)))
    words = ("--weights", "run", "photos", "--score-threshold", "0.01", "--output", "out", "--no-masks")
    assert exit_code(main, *words, "--save-labels", "labelme", "--no-pictures") == 0
    predicted = json.loads(Path("out/predictions.json").read_text())
    content = read_annotations(Path("out/labels"), Path("photos")).splits[UNSPLIT].content
    boxes = [[one["bbox"] for one in some["annotations"]] for some in (predicted, content)]
    assert len(boxes[0]) > 2
    assert np.allclose(*boxes, atol=1e-3)
    assert exit_code(main, *words, "--save-labels", "labelme") == USER_ERROR_EXIT_CODE
    Path("out/predictions.json").unlink()
    assert exit_code(main, *words, "--save-labels", "labelme") == USER_ERROR_EXIT_CODE
    assert "out/labels/a.json exists already" in capsys.readouterr().err
