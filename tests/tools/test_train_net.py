"""Proves that the detector's command line trains on labels of any format, converted once and checked like COCO."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

from crossmae.errors import USER_ERROR_EXIT_CODE
from det.data.coco import read_registered
from tests.crossmae.data.annotations.label_folders import labelme, shape, write, write_image
from tests.det.coco_files import TINY
from tests.tools.command_line import exit_code
from tools.check_coco import FAULTY_EXIT_CODE
from tools.check_coco import main as check
from tools.train_net import main

POLYGON = "1 .1 .1 .5 .1 .5 .5\n"


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Configs that training would use. The working directory has `yolo` with splits and `labelme` without."""
    monkeypatch.chdir(tmp_path)
    write(Path("tiny.yaml"), TINY)
    for split in ("train", "valid"):
        for at in range(3):
            write_image(Path("yolo", split, f"images/{at}.jpg"), at + 10 * len(split))
            write(Path("yolo", split, f"labels/{at}.txt"), POLYGON * at)
    write(Path("yolo/data.yaml"), "train: train/images\nval: valid/images\nnames: [a, b]\n")
    for at in range(3):
        write_image(Path(f"labelme/{at}.jpg"), at)
        write(Path(f"labelme/{at}.json"), labelme(f"{at}.jpg", [shape("a", [[1, 2], [9, 2], [9, 8]])]))
    configs: list[Any] = []
    monkeypatch.setattr("det.training.train.train", lambda cfg, resume: configs.append(cfg))
    return configs


def run(*words: str) -> int:
    return exit_code(main, "--config-file", "tiny.yaml", "OUTPUT_DIR=out", *words)


def test_both_splits_of_a_data_yaml_are_converted_and_registered(
    trained: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        assert run("--train-json", "yolo/data.yaml", "--val-json", "yolo") == 0
    assert "yolo/data.yaml: YOLO, 3 images, 3 objects, 2 classes: written to out/labels/train.json" in caplog.text
    (cfg,) = trained
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2
    for name, split in ((cfg.DATASETS.TRAIN[0], "train"), (cfg.DATASETS.TEST[0], "val")):
        content, _ = read_registered(name)
        written = json.loads(Path(f"out/labels/{split}.json").read_text())
        assert [one["segmentation"] for one in content["annotations"]] == [[[4, 3, 20, 3, 20, 15]]] * 3
        assert [one["file_name"] for one in content["images"]] == [one["file_name"] for one in written["images"]]


def test_unlabelled_images_are_left_out_with_a_line(
    trained: list[Any], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    write_image(Path("labelme/bare.jpg"), 99)
    line = "labelme: 3 of 4 images are labelled, 0 of them without objects. Left out as unlabelled: 1 without a json."
    with caplog.at_level("INFO"):
        assert run("--train-json", "labelme", "--val-json", "yolo") == 0
    assert line in caplog.text
    written = json.loads(Path("out/labels/train.json").read_text())
    assert [entry["file_name"] for entry in written["images"]] == [f"{at}.jpg" for at in range(3)]
    exit_code(check, "labelme", "--no-masks")
    assert f"\n{line.removeprefix('labelme: ')}" in capsys.readouterr().out


def test_labels_of_two_formats_and_a_folder_of_images(trained: list[Any]) -> None:
    assert run("--train-json", "labelme", "--train-images", ".", "--val-json", "yolo", "--val-images", ".") == 0
    names = [[one["file_name"] for one in read_registered(name)[0]["images"]]
             for name in (*trained[0].DATASETS.TRAIN, *trained[0].DATASETS.TEST)]  # fmt: skip
    assert names == [[f"labelme/{at}.jpg" for at in range(3)], [f"yolo/valid/images/{at}.jpg" for at in range(3)]]


@pytest.mark.parametrize(
    "words, message",
    [
        (("--train-json", "labelme", "--val-json", "labelme"), "--val-json: labelme: has no splits"),
        (("--train-json", "yolo/train/images"), "--train-json: yolo/train/images: no annotations of a known format"),
        (("--train-json", "coco.json"), "--train-json and --train-images belong together"),
        (("--train-images", "yolo"), "--train-json and --train-images belong together"),
        (("--train-json", "absent.yaml"), "--train-json: absent.yaml: no such file or folder"),
    ],
    ids=["no-splits", "unknown", "coco-alone", "images-alone", "absent"],
)
def test_errors_name_the_option(
    trained: list[Any], capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert run(*words) == USER_ERROR_EXIT_CODE
    assert message.replace("--val-json: labelme", "labelme") in capsys.readouterr().err
    assert not trained


def test_the_check_looks_at_every_split(trained: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(check, "yolo", "--json", "report.json") == 0
    told = capsys.readouterr().out
    assert "read as YOLO" in told
    assert "train: 3 images, 3 annotations" in told
    assert "val: 3 images, 3 annotations" in told
    report = json.loads(Path("report.json").read_text())
    assert {split: one["counts"]["polygon masks"] for split, one in report.items()} == {"train": 3, "val": 3}
    write(Path("labelme/0.json"), labelme("0.jpg", [shape("a", [[1, 2], [9, 2]])]))
    write(Path("labelme/1.json"), labelme("1.jpg", [shape("a", [[1, 2], [9, 2], [9, 8]])], imageWidth=80))
    Path("labelme/2.jpg").unlink()
    assert exit_code(check, "labelme") == FAULTY_EXIT_CODE
    told = capsys.readouterr().out
    assert [kind for kind in ("degenerate-polygon", "size-mismatch", "missing-image") if kind in told] == [
        "degenerate-polygon", "size-mismatch", "missing-image",
    ]  # fmt: skip
