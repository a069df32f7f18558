"""Proves what the command line that splits labels writes, prints, keeps and refuses."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from crossmae.errors import USER_ERROR_EXIT_CODE
from tests.crossmae.data.annotations.label_folders import (
    labelme,
    shape,
    voc_text,
    write,
    write_coco_json,
    write_image,
)
from tests.tools.command_line import exit_code
from tools.split_labels import main

SPLITS = ("train", "valid")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: `coco.json` for `images`, and `yolo` with splits."""
    monkeypatch.chdir(tmp_path)
    files = [f"{'ab'[at % 2]}/{at}.jpg" for at in range(10)]
    for at, name in enumerate(files):
        write_image(Path("images", name), at)
    write_coco_json(Path("coco.json"), files)
    for split, count in (("train", 6), ("valid", 2), ("test", 2)):
        for at in range(count):
            write_image(Path("yolo", split, f"images/{at}.jpg"), at + 10 * len(split))
            write(Path("yolo", split, f"labels/{at}.txt"), f"{at % 2} .5 .5 .2 .2\n" if at else "")
    write(Path("yolo/data.yaml"), "train: train/images\nval: valid/images\ntest: test/images\nnames: [a, b]\n")
    return tmp_path


def read(name: str) -> dict[str, Any]:
    return dict(json.loads(Path(name).read_text()))


def file_names(path: str) -> list[str]:
    return [entry["file_name"] for entry in read(path)["images"]]


def test_a_coco_file_is_split_for_training(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("coco.json", "--images", "images", "--output", "out", "--val", "0.2", "--seed", "0")
    assert exit_code(main, *words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == ("train 8 images (0 without objects), 8 objects, 1 of 1 class: out/train.json, images in images")
    assert lines[1].startswith("val   2 images (0 without objects), 2 objects")
    assert len(lines) == 2  # no advice: tools/run.py calls this program, too
    assert sorted(file_names("out/train.json") + file_names("out/val.json")) == sorted(file_names("coco.json"))
    counts = {"images": 8, "empty": 0, "objects": 8, "classes": 1}
    assert read("out/split.json") == {
        "format": "COCO",
        "images": {"train": str(folder / "images"), "val": str(folder / "images")},
        "counts": {"train": counts, "val": counts | {"images": 2, "objects": 2}},
        "classes": ["a"],
        "seed": 0,
    }
    before = Path("out/val.json").read_bytes()
    assert exit_code(main, *words) == 0
    assert Path("out/val.json").read_bytes() == before
    assert exit_code(main, *words, "--by-folder") == 0
    assert {name[0] for name in file_names("out/train.json")} != {name[0] for name in file_names("out/val.json")}


def test_splits_are_kept_unless_wanted_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(main, "yolo", "--output", "out", "--val", "0.3") == 0
    told = capsys.readouterr().out
    assert "YOLO: the labels have splits, which are kept, and --val 0.3 has no effect." in told
    assert [len(file_names(f"out/{split}.json")) for split in ("train", "val", "test")] == [6, 2, 2]
    images = read("out/split.json")["images"]
    assert images == {split: str(folder / "yolo" / part / "images") for split, part in
                      (("train", "train"), ("val", "valid"), ("test", "test"))}  # fmt: skip
    assert exit_code(main, "yolo", "--output", "out", "--images", "yolo", "--again", "--val", "0.5") == 0
    assert [len(file_names(f"out/{split}.json")) for split in ("train", "val", "test")] == [4, 4, 2]
    for split in ("train", "val", "test"):
        assert all(Path("yolo", name).is_file() for name in file_names(f"out/{split}.json"))
        assert [one["name"] for one in read(f"out/{split}.json")["categories"]] == ["a", "b"]
    assert exit_code(main, "coco.json", "--output", "out") == 0
    assert not Path("out/test.json").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (("coco.json", "--output", "out", "--val", "1"), "--val: 1 is no share"),
        (("coco.json", "--output", "out", "--seed", "-1"), "--seed: -1 is negative"),
        (("yolo", "--output", "yolo/out"), "--output: yolo/out is in yolo, so the next call would read it"),
        (("absent", "--output", "out"), "absent: no such file or folder"),
        (("coco.json", "--output", "out", "--images", "absent"), "absent: is no folder"),
        (("coco.json", "--output", "foreign"), "--output: foreign/train.json exists, and is of no earlier split"),
        (("yolo", "--output", "out", "--images", "images"), "is not in the image folder"),
        (("coco.json", "--output", "coco.json"), "coco.json"),
    ],
    ids=["val", "seed", "inside", "absent", "images", "foreign", "outside", "file"],
)
def test_errors_are_one_line_and_nothing_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    write(Path("foreign/train.json"), "{}")
    before = sorted(folder.rglob("*"))
    assert exit_code(main, *words) == USER_ERROR_EXIT_CODE
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert sorted(folder.rglob("*")) == before
    assert Path("foreign/train.json").read_text() == "{}"


@pytest.mark.parametrize("extra", [(), ("--by-folder",)], ids=["images", "folders"])
def test_unlabelled_images_are_on_no_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], extra: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    for at in range(24):  # of which 8 have a mask, 4 have a mask of zeros, and 12 have none
        write_image(Path(f"images/{'ab'[at % 2]}/{at}.jpg"), at)
        if at < 12:
            mask = np.eye(30, 40, dtype=np.uint8) * (at < 8)
            Image.fromarray(mask).save(write(Path(f"masks/{'ab'[at % 2]}/{at}.png"), b""))
    assert exit_code(main, "masks", "--images", "images", "--output", "out", "--val", "0.5", *extra) == 0
    names = file_names("out/train.json") + file_names("out/val.json")
    assert sorted(names) == sorted(f"{'ab'[at % 2]}/{at}.jpg" for at in range(12))
    counts = read("out/split.json")["counts"].values()
    assert [(own["images"], own["empty"]) for own in counts] == [(6, 2), (6, 2)]
    assert capsys.readouterr().out.startswith(
        "masks: 12 of 24 images are labelled, 4 of them without objects. Left out as unlabelled: 12 without a mask."
    )


def test_the_commands_of_the_page_work(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One command per format, word for word."""
    page = (Path(__file__).parents[2] / "docs/data.md").read_text("utf-8").partition("<!-- test: labels -->\n")[2]
    commands = [shlex.split(line, comments=True) for line in page.partition("\n\n")[0].splitlines()]
    make_every_format()
    formats = []
    for program, name, *words in commands:
        assert (program, name) == ("crossmae", "split")
        assert exit_code(main, *words) == 0, capsys.readouterr().err
        record = read("OUT/split.json")
        assert {"train", "val"} <= record["counts"].keys()
        assert sum(own["objects"] for own in record["counts"].values()) == 8
        formats.append(record["format"])
    assert formats == ["COCO", "COCO", "COCO", "YOLO", "YOLO", "Pascal VOC", "LabelMe", "masks"]


def make_every_format() -> None:
    """Write the names of the page, with eight objects each."""
    names = [f"{at}.jpg" for at in range(8)]
    for at, name in enumerate(names):
        for place in ("IMAGES", "images", "cvat/images", "voc/JPEGImages", "labelme", f"roboflow/{SPLITS[at // 4]}"):
            write_image(Path(place, name), at)
        write(Path(f"labels/{at}.txt"), "0 .5 .5 .2 .2\n")
        write(Path(f"voc/Annotations/{at}.xml"), voc_text(name, [("a", (1, 2, 9, 9))]))
        write(Path(f"labelme/{at}.json"), labelme(name, [shape("a", [[1, 2], [9, 2], [9, 8]])]))
        Image.fromarray(np.eye(30, 40, dtype=np.uint8)).save(write(Path(f"masks/{at}.png"), b""))
    write(Path("labels/classes.txt"), "a\n")
    write(Path("data.yaml"), "train: images\nval: images\nnames: [a]\n")
    write_coco_json(Path("coco.json"), names)
    write_coco_json(Path("cvat/annotations/instances_default.json"), names)
    for number, split in enumerate(SPLITS):
        write_coco_json(Path("roboflow", split, "_annotations.coco.json"), names[number * 4 :][:4])


def test_held_out_folders_are_named_and_recorded(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [f"clip_{at // 4:02}/{at}.jpg" for at in range(48)]
    for at, name in enumerate(files):
        write_image(Path("clips", name), at)
    write_coco_json(Path("clips.json"), files)
    words = ("clips.json", "--images", "clips", "--output", "out", "--val", "0.5", "--by-folder")
    assert exit_code(main, *words) == 0
    folders = sorted({name.partition("/")[0] for name in file_names("out/val.json")})
    assert len(folders) == 6
    assert read("out/split.json")["held_out_folders"] == folders
    assert capsys.readouterr().out.splitlines()[-1] == f"held out: {', '.join(folders[:5])} and 1 more"
    assert exit_code(main, *words[:-1]) == 0
    assert "held_out_folders" not in read("out/split.json")
    assert "held out" not in capsys.readouterr().out


def test_images_next_to_the_folders_have_the_folder_dot(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["top.jpg", *(f"a/{at}.jpg" for at in range(9))]
    for at, name in enumerate(files):
        write_image(Path("clips", name), at)
    write_coco_json(Path("clips.json"), files)
    assert exit_code(main, "clips.json", "--images", "clips", "--output", "out", "--by-folder") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "held out: ."
