"""Proves that the pictures are those that the model gets, padding and all, with their objects in place."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

from detectron2.data import get_detection_dataset_dicts
from detectron2.modeling import build_model

from crossmae.errors import USER_ERROR_EXIT_CODE
from det.config import load_det_config
from det.data.coco import use_own_data
from det.inference.draw import class_color
from tests.det.batches import train_batches
from tests.det.coco_files import TINY, write_coco
from tests.tools.command_line import exit_code
from tools.visualize_data import CELL, compare_with_start, draw_sample, main, padded_samples

JITTER = ["INPUT.LSJ.ENABLED=True", "INPUT.LSJ.SIZE=64", "INPUT.LSJ.MIN_SCALE=0.3", "INPUT.LSJ.MAX_SCALE=1.2"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a config and data of five images."""
    monkeypatch.chdir(tmp_path)
    write_coco(tmp_path / "data", kind="polygon")
    Path("tiny.yaml").write_text(TINY)
    return tmp_path


@pytest.mark.parametrize("pad", ["MODEL.VIT.SQUARE_PAD=64", "MODEL.VIT.SQUARE_PAD=0"])
@pytest.mark.parametrize("channels", ["RGB", "BGR"])
def test_pictures_are_what_the_model_gets(folder: Path, pad: str, channels: str) -> None:
    cfg = load_det_config("tiny.yaml", [*JITTER, pad, f"INPUT.FORMAT={channels}"])
    use_own_data(cfg, ("data/coco.json", "data/images"), None)
    records = get_detection_dataset_dicts(cfg.DATASETS.TRAIN, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
    model = build_model(cfg).train()
    pictures = iter(islice(padded_samples(cfg), 8))
    shapes = set()
    for batch in train_batches(cfg, records):
        given = model.preprocess_image(batch).tensor * model.pixel_std + model.pixel_mean
        for image, sample in zip(given, batch, strict=True):
            pixels, shown = next(pictures)
            expected = image.round().byte().permute(1, 2, 0).numpy()
            assert np.abs(pixels[..., :: 1 if channels == "RGB" else -1].astype(int) - expected).max() <= 1  # rounding
            assert shown["file_name"] == sample["file_name"]
            shapes.add(tuple(sample["image"].shape[1:]))
    assert next(pictures, None) is None
    assert len(shapes) > 3  # jittered


def test_classes_are_compared_with_a_detector_to_start_from(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for weights in (".", "missing.pth"):
        compare_with_start(weights, ("a", "b"))
    assert not caplog.records
    Path("run.json").write_text(json.dumps({"classes": ["b", "c"], "category_ids": [1, 2]}))
    compare_with_start("model_final.pth", ("a", "b"))
    assert "the head keeps the classes 'b'. New, from random weights: 'a'. Left out: 'c'" in caplog.text


@pytest.mark.parametrize("masks", ["polygon", "bitmask"])
def test_objects_are_drawn_where_the_targets_are(folder: Path, masks: str) -> None:
    cfg = load_det_config("tiny.yaml", [*JITTER, "MODEL.VIT.SQUARE_PAD=64", f"INPUT.MASK_FORMAT={masks}"])
    use_own_data(cfg, ("data/coco.json", "data/images"), None)
    for pixels, sample in islice(padded_samples(cfg), 4):
        targets, scale = sample["instances"], CELL / 64
        drawn = draw_sample(np.zeros_like(pixels), sample, ["", ""])
        assert drawn.shape == (CELL, CELL, 3)
        assert len(targets) == 2
        for box, number in zip(targets.gt_boxes.tensor.tolist(), targets.gt_classes.tolist(), strict=True):
            x0, y0, x1, y1 = (round(scale * side) for side in box)
            color = np.array(class_color(number))
            assert np.abs(drawn[(y0 + y1) // 2, (x0 + x1) // 2] - 0.35 * color).max() <= 2  # the mask
            assert (drawn[y1 - 2 : y1 + 2, (x0 + x1) // 2] == color).all(-1).any()  # the lower edge of the box


def test_the_sheet_is_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config-file", "tiny.yaml", "--train-json", "data/coco.json", "--train-images", "data/images"]
    assert exit_code(main, *words, "--num-images", "5", "--output", "new/sheet.png", *JITTER) == 0
    assert "the first 5 training images: new/sheet.png" in capsys.readouterr().out
    first = np.asarray(Image.open("new/sheet.png"))
    assert first.shape[0] > 2 * CELL
    assert first.shape[1] > 3 * CELL
    torch.manual_seed(5)
    np.random.seed(5)
    assert exit_code(main, *words, "--num-images", "5", "--output", "new/sheet.png", *JITTER) == 0
    assert np.array_equal(np.asarray(Image.open("new/sheet.png")), first)


def test_the_suffix_is_the_format(folder: Path) -> None:
    words = ["--config-file", "tiny.yaml", "--train-json", "data/coco.json", "--train-images", "data/images"]
    for name, form in (("a.png", "PNG"), ("b.jpg", "JPEG"), ("c.JPEG", "JPEG")):
        assert exit_code(main, *words, "--num-images", "1", "--output", name) == 0
        with Image.open(name) as picture:
            assert picture.format == form
    exact, lossy = (np.asarray(Image.open(name).convert("RGB")).astype(int) for name in ("a.png", "b.jpg"))
    assert np.abs(exact - lossy).mean() < 8


@pytest.mark.parametrize(
    "output", ["sheet", "sheet.txt", "folder.png", "tiny.yaml/sheet.png"], ids=["no suffix", "text", "folder", "file"]
)
def test_an_output_that_can_not_be_written_is_found_before_anything_is_loaded(
    folder: Path, capsys: pytest.CaptureFixture[str], output: str
) -> None:
    Path("folder.png").mkdir()
    before = sorted(folder.rglob("*"))
    words = ["--config-file", "none.yaml", "--train-json", "none.json", "--train-images", "none"]
    assert exit_code(main, *words, "--output", output) == USER_ERROR_EXIT_CODE
    assert "error: --output" in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-images", "0"], "--num-images 0 is too small"),
        (["--train-json", "data/coco.json"], "--train-json and --train-images belong together"),
        ([], "DATASETS.TRAIN: there is no training data. Name it with --train-json and --train-images"),
        (["--train-json", "none.json", "--train-images", "data/images"], "none.json: no such file"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    before = sorted(folder.rglob("*"))
    assert exit_code(main, "--config-file", "tiny.yaml", *words) == USER_ERROR_EXIT_CODE
    (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert message in error
    assert sorted(folder.rglob("*")) == before
