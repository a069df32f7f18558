"""`crossmae run` refuses wrong arguments before anything is written, and goes from labels of two formats to an AP."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.tools.command_line import exit_code
from tools import run

ROOT = Path(__file__).parents[2]
COUNT, SIDE = 40, 64
# A model so small that a minute of training is enough to see all stages.
PRETRAIN_SET = ("model.img_size=64", "model.depth=2", "model.decoder_depth=1")
DETECT_SET = ("MODEL.VIT.PRETRAIN_IMG_SIZE=64", "MODEL.VIT.DEPTH=2")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Images with a square each, with labels as COCO and as YOLO."""
    rng, content = np.random.default_rng(0), {"images": [], "annotations": [], "categories": [{"id": 1, "name": "box"}]}
    for name in ("IMAGES", "yolo/images/train", "yolo/labels/train"):
        (tmp_path / name).mkdir(parents=True)
    for number in range(COUNT):
        pixels = rng.integers(0, 90, (SIDE, SIDE, 3), np.uint8)
        x, y = (int(value) for value in rng.integers(0, SIDE - 24, 2))
        pixels[y : y + 24, x : x + 24] = (250, 40, 40)
        for folder in ("IMAGES", "yolo/images/train"):
            Image.fromarray(pixels).save(tmp_path / folder / f"{number}.png")
        content["images"].append({"id": number, "file_name": f"{number}.png", "width": SIDE, "height": SIDE})
        corners = [x, y, x + 24, y, x + 24, y + 24, x, y + 24]
        annotation = {"id": number + 1, "image_id": number, "category_id": 1, "bbox": [x, y, 24, 24], "area": 576}
        content["annotations"].append(annotation | {"segmentation": [corners], "iscrowd": 0})
        shares = " ".join(f"{value / SIDE:.6f}" for value in corners)
        (tmp_path / f"yolo/labels/train/{number}.txt").write_text(f"0 {shares}\n")
    (tmp_path / "labels.json").write_text(json.dumps(content))
    (tmp_path / "yolo/data.yaml").write_text("path: .\ntrain: images/train\nnames: [box]\n")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["absent"], "error: IMAGES: absent does not exist."),
        (["IMAGES", "--labels", "absent.json"], "error: --labels: absent.json does not exist."),
        (["IMAGES", "--labels", "labels.json", "--budget", "half an hour"], "error: --budget: 'half an hour' is no"),
        (["IMAGES", "--labels", "labels.json", "--val", "1.5"], "error: --val: 1.5 is out of range."),
        (["IMAGES", "--labels", "labels.json", "--size", "0"], "error: --size: 0 is out of range."),
        (["IMAGES", "--compare"], "error: --compare: only a detector uses it. Add --labels."),
        (["labels.json", "--labels", "labels.json"], "error: IMAGES: labels.json is no folder."),
    ],
)
def test_wrong_arguments_are_one_line_and_write_nothing(
    data: Path, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(data)
    before = sorted(data.rglob("*"))
    assert exit_code(run.main, *words) == 2
    assert capsys.readouterr().err.startswith(message)
    assert sorted(data.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("labels", ["labels.json", "yolo"])
def test_from_labels_to_an_ap_and_again(data: Path, labels: str) -> None:
    images = "IMAGES" if labels.endswith("json") else "yolo/images/train"
    words = [images, "--labels", labels, "--budget", "4m", "--output", "out", "--size", "128"]
    words += ["--pretrain-set", *PRETRAIN_SET, "--detect-set", *DETECT_SET]
    command = [sys.executable, ROOT / "tools/run.py", *words]
    first = subprocess.run(command, cwd=data, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    results = json.loads((data / "out/detect-own/results.json").read_text())
    assert results["bbox"]["AP50"] is not None
    page = (data / "out/report.html").read_text()
    assert f"{results['bbox']['AP']:.1f}" in page
    assert "features " in first.stdout
    (data / "out/report.html").unlink()  # as if the command had been stopped before
    again = subprocess.run(command, cwd=data, capture_output=True, text=True, check=True)
    assert again.stdout.count(": reused, took ") == 3
    assert (data / "out/report.html").is_file()
    shutil.rmtree(data / "out")
