"""Proves that every format is recognised by what is there, and read to the boxes and masks that were written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from crossmae.data.annotations.read import coco_file, read_annotations
from crossmae.data.annotations.records import UNSPLIT
from crossmae.errors import UserError
from tests.crossmae.data.annotations.label_folders import (
    BOX,
    HEIGHT,
    WIDTH,
    labelme,
    mask_text,
    objects,
    shape,
    voc_text,
    write,
    write_coco_json,
    write_image,
    write_yolo,
)


def decode(mask: dict[str, Any]) -> np.ndarray:
    """Decode uncompressed run lengths by their definition."""
    height, width = mask["size"]
    values = np.repeat(np.arange(len(mask["counts"])) % 2, mask["counts"])
    return values.reshape(width, height).T.astype(bool)


# YOLO.
@pytest.mark.parametrize(
    "text, expected",
    [
        (BOX, [("a", [10, 9, 20, 12], None)]),
        (b"\xef\xbb\xbf0 .5 .5 .5 .4\r\n\r\n", [("a", [10, 9, 20, 12], None)]),
        ("0 .5 .5 .5 .4 .93", [("a", [10, 9, 20, 12], None)]),  # with a score
        ("1.000e+00 .5 .5 .5 .4", [("b", [10, 9, 20, 12], None)]),  # of numpy.savetxt
        ("1 .1 .1 .5 .1 .5 .5", [("b", [4, 3, 16, 12], [[4, 3, 20, 3, 20, 15]])]),
        (f"1 .1 .1 .5 .1 .5 .5\n{BOX}", [("b", [4, 3, 16, 12], [[4, 3, 20, 3, 20, 15]]), ("a", [10, 9, 20, 12], None)]),
        ("", []),
        ("\n \n", []),
        (None, []),
    ],
    ids=["box", "bom-crlf", "score", "float-class", "polygon", "both", "empty", "blank", "no-file"],
)
def test_yolo_rows(tmp_path: Path, text: str | bytes | None, expected: list[Any]) -> None:
    write_yolo(tmp_path, {"x": text, "y": BOX})
    found = read_annotations(tmp_path)
    assert (found.format, found.has_splits) == ("YOLO", False)  # train is val
    read = objects(found)["x.jpg"]
    assert [(name, pytest.approx(box), mask and [pytest.approx(mask[0])]) for name, box, mask in read] == expected
    sizes = {(entry["width"], entry["height"]) for entry in found.splits[UNSPLIT].content["images"]}
    assert sizes == {(WIDTH, HEIGHT)}


def test_yolo_shares_are_of_the_image_after_its_exif_orientation(tmp_path: Path) -> None:
    write_yolo(tmp_path, {"x": BOX})
    write_image(tmp_path / "images/x.jpg", orientation=6)
    assert objects(read_annotations(tmp_path))["x.jpg"] == [("a", [7.5, 12, 15, 16], None)]


@pytest.mark.parametrize(
    "yaml, text, expected",
    [
        ("names: {0: a, 2: c}", "2 .5 .5 .5 .4", {"a": 1, "c": 3}),
        ("names:\n  '1': b\n  '0': a", BOX, {"a": 1, "b": 2}),
        ("names: [5, 7]", BOX, {"5": 1, "7": 2}),
    ],
    ids=["gap", "text-keys", "numbers"],
)
def test_yolo_class_names(tmp_path: Path, yaml: str, text: str, expected: dict[str, int]) -> None:
    write_yolo(tmp_path, {"x": text}, f"{yaml}\ntrain: images\n")
    content = read_annotations(tmp_path / "data.yaml").splits[UNSPLIT].content
    assert {entry["name"]: entry["id"] for entry in content["categories"]} == expected
    assert content["annotations"][0]["category_id"] == int(text[0]) + 1


@pytest.mark.parametrize(
    "text, message",
    [
        ("2 .5 .5 .5 .4", "x.txt: line 1: class 2 is not among the 2 classes"),
        (f"{BOX}-1 .5 .5 .5 .4", "line 2: '-1 .5 .5 .5 .4' is no class number"),
        ("0 nan .5 .5 .4", "is no class number and numbers"),
        ("0 .5 .5 .5", "3 numbers after the class: a box has 4"),
        ("0 320 240 100 80", "320 is no share of the image"),
        ("cat .5 .5 .5 .4", "is no class number and numbers"),
    ],
    ids=["class-out-of-range", "negative-class", "nan", "short", "pixels", "name"],
)
def test_yolo_faults_name_the_line(tmp_path: Path, text: str, message: str) -> None:
    write_yolo(tmp_path, {"x": text, "y": BOX})
    with pytest.raises(UserError, match=r"read as YOLO: .*x\.txt: line \d") as caught:
        read_annotations(tmp_path)
    assert message in str(caught.value)


def test_yolo_keypoints_are_left_out(tmp_path: Path) -> None:
    write_yolo(tmp_path, {"x": "0 .5 .5 .5 .4 .1 .2 2 .3 .4 0"}, "names: [a]\ntrain: images\nkpt_shape: [2, 3]\n")
    assert objects(read_annotations(tmp_path))["x.jpg"] == [("a", [10, 9, 20, 12], None)]


def _roboflow(folder: Path) -> Path:
    for split in ("train", "valid"):
        write_image(folder / split / "images/x.jpg", len(split))
        write(folder / split / "labels/x.txt", BOX)
    return write(
        folder / "data.yaml", "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnames: [a]\n"
    )


def _lists(folder: Path) -> Path:
    for split in ("train", "val"):
        write_image(folder / "images" / split / "x.jpg", len(split))
        write(folder / "labels" / split / "x.txt", BOX)
        write(folder / f"{split}.txt", f"./images/{split}/x.jpg\r\n")
    return write(folder / "data.yaml", "path: .\ntrain: train.txt\nval: [val.txt]\nnames: {0: a}\n")


def _folders(folder: Path) -> Path:
    for split in ("train2017", "val2017"):
        write_image(folder / "images" / split / "x.JPG", len(split))
        write(folder / "labels" / split / "x.txt", BOX)
    write(folder / "classes.txt", "a\n\n")
    return folder


@pytest.mark.parametrize("make", [_roboflow, _lists, _folders], ids=["roboflow", "lists", "folders"])
def test_yolo_splits(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    found = read_annotations(make(tmp_path))
    assert list(found.splits) == ["train", "val"]
    for split in found.splits:
        ((name, rows),) = objects(found, split).items()
        assert (name.lower(), rows) == ("x.jpg", [("a", [10, 9, 20, 12], None)])
        assert (found.splits[split].images / name).is_file()


def test_yolo_next_to_images_and_without_images(tmp_path: Path) -> None:
    for name in ("x", "y"):
        write_image(tmp_path / f"{name}.png", len(name))
        write(tmp_path / f"{name}.txt", BOX)
    write(tmp_path / "classes.txt", "a\n")
    write(tmp_path / "gone.txt", BOX)
    found = read_annotations(tmp_path)
    assert objects(found) == {name: [("a", [10, 9, 20, 12], None)] for name in ("x.png", "y.png")}
    assert found.remarks == ["1 label file without an image, such as gone.txt: left out"]
    (tmp_path / "x.png").unlink()
    with pytest.raises(UserError, match=r"2 label files without an image, such as gone\.txt.* Name the folder"):
        read_annotations(tmp_path)


def test_images_of_the_same_base_name(tmp_path: Path) -> None:
    write_yolo(tmp_path, {"x": BOX}, "")
    write_image(tmp_path / "images/x.png")
    with pytest.raises(UserError, match=r"x\.txt: the images images/x\.jpg and images/x\.png both fit"):
        read_annotations(tmp_path)
    (tmp_path / "labels/x.txt").rename(tmp_path / "labels/x.png.txt")
    assert [len(rows) for rows in objects(read_annotations(tmp_path)).values()] == [0, 1]


# Pascal VOC.
@pytest.mark.parametrize(
    "box, expected",
    [
        ((1, 1, 40, 30), [0, 0, 40, 30]),  # as VOC defines it: all pixels
        (("3.0", "4", " 7 ", "9"), [2, 3, 5, 6]),
        ((0, 3, 5, 9), [0, 3, 5, 6]),
        ((1.5, 2.25, 20, 30), [1.5, 2.25, 18.5, 27.75]),
    ],
    ids=["whole", "text", "from-zero", "fractions"],
)
def test_voc_boxes(tmp_path: Path, box: tuple[Any, ...], expected: list[float]) -> None:
    write_image(tmp_path / "JPEGImages/x.jpeg")
    write_image(tmp_path / "JPEGImages/y.jpg", 1)
    write(tmp_path / "Annotations/x.xml", "\ufeff" + voc_text("x.jpg", [("b", box), ("a", box)]))
    write(tmp_path / "Annotations/y.xml", voc_text("y.jpg", []))
    found = read_annotations(tmp_path)
    assert found.format == "Pascal VOC"
    assert objects(found) == {"x.jpeg": [("b", expected, None), ("a", expected, None)], "y.jpg": []}
    assert read_annotations(tmp_path / "Annotations").splits[UNSPLIT].content == found.splits[UNSPLIT].content


def test_voc_lists_and_masks_of_objects(tmp_path: Path) -> None:
    values = np.zeros((HEIGHT, WIDTH), np.uint8)
    values[2:9, 3:8], values[20:25, 1:4], values[0] = 1, 2, 255  # the last is the border
    for name in "xyz":
        write_image(tmp_path / f"JPEGImages/{name}.jpg", ord(name))
        write(tmp_path / f"Annotations/{name}.xml", voc_text("", [("a", (4, 3, 8, 9)), ("b", (2, 21, 4, 25))]))
    Image.fromarray(values).convert("P").save(write(tmp_path / "SegmentationObject/x.png", b""))
    write(tmp_path / "ImageSets/Main/train.txt", "x\nz 1\n")
    write(tmp_path / "ImageSets/Main/val.txt", "y\n")
    found = read_annotations(tmp_path)
    assert {name: list(objects(found, name)) for name in found.splits} == {
        "train": ["x.jpg", "z.jpg"],
        "val": ["y.jpg"],
    }
    for number, (_, box, mask) in enumerate(objects(found, "train")["x.jpg"], start=1):
        assert np.array_equal(decode(mask), values == number)
        rows, columns = np.nonzero(values == number)
        assert box == [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]


@pytest.mark.parametrize(
    "text, message",
    [
        ("<annotation><object><name>a</name></object></annotation>", "object 1 (a) has no bndbox of 4 numbers"),
        (voc_text("x.jpg", [("a", (1, 2, "nan", 4))]), "has no bndbox of 4 numbers"),
        (voc_text("x.jpg", [("", (1, 2, 3, 4))]), "object 1 has no name"),
        ("<annotation><object>", "not XML"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>', "declares entities"),
        ("<annotations><image/></annotations>", "its root is <annotations>"),
    ],
    ids=["no-box", "nan", "no-name", "cut", "entities", "root"],
)
def test_voc_faults(tmp_path: Path, text: str, message: str) -> None:
    write_image(tmp_path / "x.jpg")
    write(tmp_path / "a.xml", voc_text("x.jpg", []))
    write(tmp_path / "x.xml", text)
    with pytest.raises(UserError, match=r"x\.xml: ") as caught:
        read_annotations(tmp_path)
    assert message in str(caught.value)


# LabelMe.
def test_labelme_shapes(tmp_path: Path) -> None:
    write_image(tmp_path / "photos/x.png")
    part = np.zeros((4, 5), bool)
    part[1:, 2:] = True
    shapes = [
        shape("a", [[1, 2], [9, 2], [9, 8]]),
        shape("b", [[20, 9], [10, 3.5]], "rectangle"),
        shape("b", [[30, 15], [30, 19]], "circle"),
        shape("a", [[6, 7], [10, 10]], "mask", mask=mask_text(part)),
        shape("a", [[1, 2]], "point"),
        shape("a", [[0, 0], [3, 0], [3, 3]], group_id=4),
        shape("a", [[10, 10], [13, 10], [13, 13]], group_id=4),
        shape("c", [[5, 5], [8, 8]]),
    ]
    write(tmp_path / "labels/x.json", labelme("..\\photos\\x.png", shapes))
    found = read_annotations(tmp_path)
    assert found.format == "LabelMe"
    first, second, circle, mask, group, line = objects(found)["x.png"]
    assert first == ("a", [1, 2, 8, 6], [[1, 2, 9, 2, 9, 8]])
    assert second == ("b", [10, 3.5, 10, 5.5], None)
    points = np.array(circle[2][0]).reshape(-1, 2)
    assert np.allclose(np.hypot(*(points - [30, 15]).T), 4, atol=1e-3)
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[7:11, 6:11] = part
    assert np.array_equal(decode(mask[2]), expected)
    assert mask[1] == [8, 8, 3, 3]
    assert group == ("a", [0, 0, 13, 13], [[0, 0, 3, 0, 3, 3], [10, 10, 13, 10, 13, 13]])
    assert line == ("c", [5, 5, 3, 3], [[5, 5, 8, 8]])  # a polygon of 2 points: the check reports it
    assert found.remarks == ["shapes without an area: 1 point: left out"]


def test_labelme_images_that_are_missing_or_unlabelled(tmp_path: Path) -> None:
    write_image(tmp_path / "y.jpg")
    write(tmp_path / "x.json", labelme("x.jpg", [shape("a", [[1, 2], [9, 2], [9, 8]])], imageHeight=99))
    write(tmp_path / "other.json", "{}")
    found = read_annotations(tmp_path)
    (image,) = found.splits[UNSPLIT].content["images"]
    assert (image["file_name"], image["width"], image["height"]) == ("x.jpg", WIDTH, 99)
    assert found.remarks == [
        "1 json of another kind, such as other.json: left out",
        "the images of 1 label file were not found",
        "1 of 2 images are labelled, 0 of them without objects. Left out as unlabelled: 1 without a json. For an image "
        "that has no objects, save a json without shapes",
    ]


@pytest.mark.parametrize(
    "wrong, message",
    [
        (shape("", [[1, 2], [3, 4], [5, 6]]), "shape 0 has no label"),
        (shape("a", [[1, 2], [3, float("nan")]]), "has no points"),
        (shape("a", []), "has no points"),
        (shape("a", [[1, 2], [3, 4]], "ellipse"), "'ellipse', which is not read"),
        (shape("a", [[1, 2], [3, 4]], "mask", mask="????"), "mask that cannot be read"),
        (shape("a", [[90, 90], [95, 95]], "mask", mask=mask_text(np.ones((5, 5)))), "without pixels in the image"),
    ],
    ids=["label", "nan", "no-points", "kind", "base64", "outside"],
)
def test_labelme_faults(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    write_image(tmp_path / "x.jpg")
    write(tmp_path / "x.json", labelme("x.jpg", [wrong]))
    with pytest.raises(UserError, match=r"x\.json: ") as caught:
        read_annotations(tmp_path)
    assert message in str(caught.value)


# Masks.
@pytest.mark.parametrize("mode", ["P", "L", "I;16", "RGB", "1"])
def test_masks_of_values(tmp_path: Path, mode: str) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2 if mode == "1" else 4, (HEIGHT, WIDTH))
    stored = {
        "P": lambda: Image.fromarray(values.astype(np.uint8)).convert("P"),
        "L": lambda: Image.fromarray(values.astype(np.uint8) * 60),
        "I;16": lambda: Image.fromarray(values.astype(np.uint16) * 9999),
        "RGB": lambda: Image.fromarray(np.stack([values * 0, values == 1, values * 9], -1).astype(np.uint8)),
        "1": lambda: Image.fromarray(values.astype(bool)),
    }[mode]()
    assert stored.mode == mode
    write_image(tmp_path / "images/x.jpg")
    (tmp_path / "masks").mkdir()
    stored.save(tmp_path / "masks/x.png")
    found = read_annotations(tmp_path)
    rows = objects(found)
    assert (found.format, found.remarks) == ("masks", [])
    masks = {decode(mask).tobytes() for _, _, mask in rows["x.jpg"]}
    assert masks == {(values == value).tobytes() for value in np.unique(values) if value}
    for name, box, mask in rows["x.jpg"]:
        rows_, columns = np.nonzero(decode(mask))
        assert (name, box) == ("object", [columns.min(), rows_.min(), np.ptp(columns) + 1, np.ptp(rows_) + 1])


def test_masks_by_class_folder_and_in_two_places(tmp_path: Path) -> None:
    values = np.zeros((HEIGHT, WIDTH), np.uint8)
    values[2:5, 3:9] = 7
    for label in ("cell", "dirt"):
        Image.fromarray(values).save(write(tmp_path / f"m/train/{label}/x.png", b""))
    Image.fromarray(values).save(write(tmp_path / "m/train/dirt/y_mask.png", b""))
    write_image(tmp_path / "photos/train/x.jpg")
    write_image(tmp_path / "photos/train/y.jpg", 1)
    found = read_annotations(tmp_path / "m", tmp_path / "photos")
    box = [3, 2, 6, 3]
    assert {name: [row[:2] for row in rows] for name, rows in objects(found).items()} == {
        "train/x.jpg": [("cell", box), ("dirt", box)],
        "train/y.jpg": [("dirt", box)],
    }


def test_a_photograph_is_no_mask(tmp_path: Path) -> None:
    write_image(tmp_path / "images/x.jpg", size=(90, 90))
    write_image(tmp_path / "masks/x.png", 1, size=(90, 90))
    with pytest.raises(UserError, match=r"x\.png: has .* values, so it is a photograph"):
        read_annotations(tmp_path)


# COCO in folders.
def test_coco_of_roboflow_and_cvat(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        write_image(tmp_path / "r" / split / "x.jpg")
        write_coco_json(tmp_path / "r" / split / "_annotations.coco.json", ["x.jpg"], split)
    found = read_annotations(tmp_path / "r")
    assert {name: one.content["info"]["split"] for name, one in found.splits.items()} == {
        "train": "train", "val": "valid", "test": "test",
    }  # fmt: skip
    assert all((one.images / "x.jpg").is_file() for one in found.splits.values())
    for split in ("Train", "Validation"):
        write_image(tmp_path / "c/images" / split / "x.jpg")
        write_coco_json(tmp_path / f"c/annotations/instances_{split}.json", ["x.jpg"])
        write(tmp_path / f"c/annotations/person_keypoints_{split}.json", '{"images": [], "annotations": []}')
    found = read_annotations(tmp_path / "c")
    assert {name: one.images.name for name, one in found.splits.items()} == {"train": "Train", "val": "Validation"}
    write_image(tmp_path / "d/images/x.jpg")
    path = write_coco_json(tmp_path / "d/annotations/instances_default.json", ["x.jpg"])
    found = read_annotations(tmp_path / "d")
    assert (found.splits[UNSPLIT].json_path, found.splits[UNSPLIT].images) == (path, tmp_path / "d/images")


# What is not read, and what is ambiguous.
@pytest.mark.parametrize(
    "name, text, message",
    [
        (
            "a.xml",
            "<annotations><version>1.1</version></annotations>",
            "looks like CVAT's own XML. Export it from CVAT",
        ),
        ("a.json", '{"_via_img_metadata": {}}', "looks like a project of VIA"),
        ("a.json", '[{"id": 1, "annotations": [{"completed_by": 1}]}]', "looks like an export of Label Studio"),
        ("a.csv", "image,x,y", "looks like a table. Export the annotations as COCO or YOLO"),
        ("a.zip", "PK", "looks like an archive. Unpack it"),
        ("a.dat", "?", "no annotations of a known format: 1 .dat"),
    ],
    ids=["cvat", "via", "label-studio", "csv", "zip", "unknown"],
)
def test_other_formats_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = write(tmp_path / name, text)
    with pytest.raises(UserError) as caught:
        read_annotations(tmp_path)
    assert message in str(caught.value)
    if path.suffix != ".dat":
        with pytest.raises(UserError, match=r"looks like|is the label of"):
            read_annotations(path)


def test_two_formats_in_a_folder_are_an_error(tmp_path: Path) -> None:
    write_yolo(tmp_path, {"x": BOX})
    write(tmp_path / "voc/x.xml", voc_text("x.jpg", []))
    with pytest.raises(UserError, match=r"several formats: Pascal VOC \(voc/x.xml\) and YOLO \(data.yaml\)"):
        read_annotations(tmp_path)
    assert read_annotations(tmp_path / "voc", tmp_path / "images").format == "Pascal VOC"


@pytest.mark.parametrize("name, text", [("x.xml", voc_text("x.jpg", [])), ("x.txt", BOX), ("x.json", labelme("x", []))])
def test_the_label_of_one_image_names_its_folder(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(UserError, match=f"is the label of one image. Name the folder of such files: {tmp_path}$"):
        read_annotations(write(tmp_path / name, text))


def test_images_outside_of_their_folder_are_an_error(tmp_path: Path) -> None:
    write_yolo(tmp_path / "data", {"x": BOX})
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match=r"x\.jpg: is not in the image folder .*other"):
        read_annotations(tmp_path / "data/data.yaml", tmp_path / "other")


def test_a_split_is_written_as_coco(tmp_path: Path) -> None:
    lines: list[str] = []
    target, folder = tmp_path / "out/labels/val.json", _roboflow(tmp_path / "data")
    path, images = coco_file(folder, None, "val", target, shared=True, log=lines.append)
    assert (path, images) == (target, tmp_path / "data/valid/images")
    assert json.loads(target.read_text()) == read_annotations(folder).splits["val"].content
    assert lines[-1].endswith(f"YOLO, 1 image, 1 object, 1 class: written to {target} in COCO format")
    with pytest.raises(UserError, match=r"has no split 'test', only train and val.*split_labels.py .* --again"):
        coco_file(folder, None, "test", target, shared=True, log=lines.append)
    write_yolo(tmp_path / "one", {"x": BOX})
    with pytest.raises(UserError, match=r"has no splits, so training and validation would be the same"):
        coco_file(tmp_path / "one", None, "train", target, shared=True, log=lines.append)
