"""Proves that absence is no statement: an image without a label file is unlabelled, an empty file means no objects."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crossmae.data.annotations.read import read_annotations
from crossmae.errors import UserError
from tests.crossmae.data.annotations.label_folders import (
    BOX,
    HEIGHT,
    WIDTH,
    labelme,
    objects,
    shape,
    voc_text,
    write,
    write_coco_json,
    write_image,
    write_yolo,
)


def _square() -> Image.Image:
    values = np.zeros((HEIGHT, WIDTH), np.uint8)
    values[2:5, 3:9] = 1
    return Image.fromarray(values)


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def _write_label(kind: str, folder: Path, name: str, *, empty: bool = False) -> None:
    if kind == "masks":
        _save(Image.new("L", (WIDTH, HEIGHT)) if empty else _square(), folder / f"masks/{name}.png")
    elif kind == "LabelMe":
        shapes = [] if empty else [shape("a", [[1, 2], [9, 2], [9, 8]])]
        write(folder / f"json/{name}.json", labelme(f"../images/{name}.jpg", shapes))
    elif kind == "YOLO":
        write(folder / f"labels/{name}.txt", "" if empty else BOX)
    else:
        rows = [] if empty else [("a", (1, 2, 9, 9))]
        write(folder / f"Annotations/{name}.xml", voc_text(f"{Path(name).name}.jpg", rows))


@pytest.mark.parametrize(
    "kind, label, statement",
    [
        ("masks", "a mask", "save a mask of zeros"),
        ("LabelMe", "a json", "save a json without shapes"),
        ("Pascal VOC", "an xml", "save an xml without objects"),
        ("YOLO", "a txt", "save an empty txt"),
    ],
    ids=["masks", "labelme", "voc", "yolo"],
)
@pytest.mark.parametrize("sides", ["", "train/ val/"], ids=["whole", "split"])
def test_unlabelled_images_are_left_out(tmp_path: Path, kind: str, label: str, statement: str, sides: str) -> None:
    expected = {}
    for side in sides.split() or [""]:
        for at, name in enumerate(("full", "empty", "bare", "blank")):
            write_image(tmp_path / f"images/{side}{side[:1]}{name}.jpg", 4 * len(side) + at)
        for name in ("full", "empty"):
            _write_label(kind, tmp_path, f"{side}{side[:1]}{name}", empty=name == "empty")
        expected |= {f"{side[:1]}full.jpg": 1, f"{side[:1]}empty.jpg": 0}
    found = read_annotations(tmp_path)
    rows = {name: len(own) for split in found.splits for name, own in objects(found, split).items()}
    assert (found.format, rows) == (kind, expected)
    assert found.has_splits == bool(sides)
    total = len(expected)
    assert found.remarks[-1] == (
        f"{total} of {2 * total} images are labelled, {total // 2} of them without objects. Left out as unlabelled: "
        f"{total} without {label}. For an image that has no objects, {statement}"
    )
    for side in sides.split() or [""]:
        for name in ("bare", "blank"):
            _write_label(kind, tmp_path, f"{side}{side[:1]}{name}", empty=True)
    assert not any("unlabelled" in remark for remark in read_annotations(tmp_path).remarks)


@pytest.mark.parametrize("yaml", [True, False], ids=["data-yaml", "folder"])
@pytest.mark.parametrize("bare, empty, kept", [(2, 0, 4), (3, 0, 2), (1, 1, 3)], ids=["few", "most", "stated"])
def test_a_missing_txt_is_background_without_signs_to_the_contrary(
    tmp_path: Path, yaml: bool, bare: int, empty: int, kept: int
) -> None:
    rows = {"x": BOX, "y": BOX} | {f"e{at}": " \n" for at in range(empty)} | {f"b{at}": None for at in range(bare)}
    write_yolo(tmp_path, rows) if yaml else write_yolo(tmp_path, rows, "")
    found = read_annotations(tmp_path)
    assert len(objects(found)) == kept
    remark = found.remarks[-1]
    if kept == len(rows):
        assert remark.startswith("2 of 4 images have no txt: taken as without objects, as YOLO defines it. If they are")
    else:
        assert remark.startswith(
            f"{kept} of {len(rows)} images are labelled, {empty} of them without objects. Left out"
        )


def test_a_split_of_yolo_is_judged_by_itself_and_by_the_empty_files_of_others(tmp_path: Path) -> None:
    for at, name in enumerate(("train/a", "train/b", "train/c", "train/d", "val/e", "val/f", "val/g")):
        write_image(tmp_path / f"images/{name}.jpg", at)
        if name[-1] in "abce":
            write(tmp_path / f"labels/{name}.txt", BOX)
    write(tmp_path / "data.yaml", "names: [a]\ntrain: images/train\nval: images/val\n")
    found = read_annotations(tmp_path / "data.yaml")
    assert [len(objects(found, split)) for split in ("train", "val")] == [4, 1]
    write(tmp_path / "labels/val/f.txt", "")
    found = read_annotations(tmp_path / "data.yaml")
    assert [len(objects(found, split)) for split in ("train", "val")] == [3, 2]


def test_a_label_file_without_an_image_is_counted_with_a_data_yaml(tmp_path: Path) -> None:
    write_yolo(tmp_path, {"x": BOX, "y": BOX})
    write(tmp_path / "labels/classes.txt", "a\nb\n")
    gone = write(tmp_path / "labels/gone.txt", BOX)
    found = read_annotations(tmp_path / "data.yaml")
    assert found.remarks[-1] == f"1 label file without an image, such as {gone}: left out"
    assert list(objects(found)) == ["x.jpg", "y.jpg"]


def test_coco_images_without_annotations_have_no_objects_and_others_are_no_images(tmp_path: Path) -> None:
    for at, name in enumerate("xyz"):
        write_image(tmp_path / f"{name}.jpg", at)
    path = write_coco_json(tmp_path / "coco.json", ["x.jpg", "y.jpg"])
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"annotations": content["annotations"][:1]}))
    for labels in (path, tmp_path):
        assert {name: len(rows) for name, rows in objects(read_annotations(labels)).items()} == {"x.jpg": 1, "y.jpg": 0}


def test_an_image_of_points_only_is_not_without_objects(tmp_path: Path) -> None:
    for at, name in enumerate("xy"):
        write_image(tmp_path / f"{name}.jpg", at)
    points = [shape("a", [[1, 2]], "point")]
    write(tmp_path / "x.json", labelme("x.jpg", points))
    write(tmp_path / "y.json", labelme("y.jpg", [*points, shape("a", [[1, 2], [9, 2], [9, 8]])]))
    found = read_annotations(tmp_path)
    assert list(objects(found)) == ["y.jpg"]
    assert found.remarks == [
        "shapes without an area: 2 point: left out",
        "1 image with such shapes only: left out as unlabelled",
    ]


@pytest.mark.parametrize("kind", ["masks", "YOLO", "Pascal VOC", "LabelMe"])
def test_a_label_of_a_lost_image_goes_to_no_image_of_another_folder(tmp_path: Path, kind: str) -> None:
    for at, name in enumerate(("p/x", "q/y", "q/z", "q/v")):
        write_image(tmp_path / f"images/{name}.jpg", at)
        if at:
            _write_label(kind, tmp_path, name)
    _write_label(kind, tmp_path, "q/x")  # of an image that is gone, and not of p/x
    found = read_annotations(tmp_path)
    assert [name for name, rows in objects(found).items() if name.endswith("p/x.jpg") and rows] == []
    assert re.search(r"1 (mask|label file) without an image|the images of 1 label file", " ".join(found.remarks))


def test_a_class_folder_is_read_with_equal_names_in_the_folders_of_the_images(tmp_path: Path) -> None:
    for at, side in enumerate("pq"):
        write_image(tmp_path / f"images/{side}/x.jpg", at)
        _save(_square(), tmp_path / f"masks/{side}/cell/x.png")
    found = read_annotations(tmp_path)
    assert {name: [row[0] for row in rows] for name, rows in objects(found).items()} == {
        "p/x.jpg": ["cell"],
        "q/x.jpg": ["cell"],
    }


def test_two_xml_files_of_one_image_are_an_error(tmp_path: Path) -> None:
    for at, name in enumerate("xy"):
        write_image(tmp_path / f"{name}.jpg", at)
        write(tmp_path / f"{name}.xml", voc_text("x.jpg", [("a", (1, 2, 9, 9))]))  # y.xml is a copy
    with pytest.raises(UserError, match=r"x\.jpg: several xml files are of this image"):
        read_annotations(tmp_path)


@pytest.mark.parametrize(
    "content, message",
    [(b"", r"x\.png: cannot be read as a mask"), (None, r"x\.png: is 30x40 pixels, and its image 40x30")],
    ids=["empty", "size"],
)
def test_a_mask_that_is_empty_or_of_another_size_is_an_error(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    write_image(tmp_path / "images/x.jpg")
    _save(_square().transpose(Image.Transpose.TRANSPOSE), tmp_path / "masks/x.png")
    if content is not None:
        write(tmp_path / "masks/x.png", content)
    with pytest.raises(UserError, match=message):
        read_annotations(tmp_path)
