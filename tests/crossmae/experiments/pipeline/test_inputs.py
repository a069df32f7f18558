"""Inputs of the pipeline: what is seen of the images, and crops that show objects or nothing but background."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from crossmae.data.sources import open_source
from crossmae.errors import UserError
from crossmae.experiments.pipeline.inputs import (
    BACKGROUND,
    look_at_images,
    object_share,
    open_files,
    write_list,
    write_object_crops,
)
from crossmae.files import read_json

SIDE, OBJECT = 96, 20
COLOURS = {"red one": (255, 0, 0), "blue/one": (0, 0, 255)}


@pytest.fixture
def labels(tmp_path: Path) -> tuple[Path, Path]:
    """A COCO file and its images: one square of a colour, or two, on black."""
    rng, images = np.random.default_rng(0), tmp_path / "images"
    images.mkdir()
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    for number, name in enumerate(COLOURS):
        content["categories"].append({"id": 10 * number, "name": name})
    for number in range(24):
        pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
        for index, (left, colour) in enumerate(zip((0, 50), COLOURS.values(), strict=True)):
            if index and number % 2:
                continue
            x, y = left + int(rng.integers(0, 24)), int(rng.integers(0, SIDE - OBJECT))
            pixels[y : y + OBJECT, x : x + OBJECT] = colour
            box = {"id": len(content["annotations"]), "image_id": number, "category_id": 10 * index}
            content["annotations"].append(box | {"bbox": [x, y, OBJECT, OBJECT], "iscrowd": 0})
        content["annotations"].append(
            {"id": 1000 + number, "image_id": number, "category_id": 0, "bbox": [0, 0, SIDE, SIDE], "iscrowd": 1}
        )
        Image.fromarray(pixels).save(images / f"{number}.png")
        content["images"].append({"id": number, "file_name": f"{number}.png", "width": SIDE, "height": SIDE})
    (tmp_path / "labels.json").write_text(json.dumps(content))
    return tmp_path / "labels.json", images


def test_a_crop_shows_its_object_and_background_shows_none(labels: tuple[Path, Path], tmp_path: Path):
    numbers = write_object_crops(read_json(labels[0]), labels[1], "train", tmp_path / "objects")
    assert numbers == {"red one": 24, "blue_one": 12, BACKGROUND: numbers[BACKGROUND]}
    assert numbers[BACKGROUND] >= 24
    for name, colour in {"red one": (255, 0, 0), "blue_one": (0, 0, 255), BACKGROUND: None}.items():
        crops = sorted((tmp_path / "objects" / "train" / name).iterdir())
        assert len(crops) == numbers[name]
        for path in crops:
            pixels = np.asarray(Image.open(path))
            lit = (pixels > 40).any(axis=-1)
            if colour is None:
                # A crop is somewhat larger than its box, so an object next to it may show at the edge.
                assert lit.mean() < 0.3
            else:
                share = (np.abs(pixels - np.array(colour)).max(axis=-1) < 16).mean()
                assert 0.5 < share <= 0.8  # 20 of 25 pixels a side, minus the blurred edge
    again = tmp_path / "again"
    write_object_crops(read_json(labels[0]), labels[1], "train", again)
    for path in (tmp_path / "objects" / "train").rglob("*.png"):
        assert path.read_bytes() == (again / path.relative_to(tmp_path / "objects")).read_bytes()


def test_too_few_objects_are_no_comparison(labels: tuple[Path, Path], tmp_path: Path):
    content = json.loads(labels[0].read_text())
    content["annotations"] = content["annotations"][:9]
    labels[0].write_text(json.dumps(content))
    assert write_object_crops(read_json(labels[0]), labels[1], "val", tmp_path / "objects") == {}
    assert not (tmp_path / "objects").exists()


def test_what_is_seen_of_the_images(labels: tuple[Path, Path]):
    folder = labels[1]
    Image.new("L", (300, 200)).save(folder / "grey.jpg")
    (folder / "cut.jpg").write_bytes((folder / "grey.jpg").read_bytes()[:200])
    facts = look_at_images(open_source(folder, "IMAGES"), "IMAGES")
    assert (facts.count, facts.formats, facts.modes) == (26, {"PNG": 24, "JPEG": 1}, {"RGB": 24, "L": 1})
    assert facts.long_side == (96, 96, 300)
    assert [one.message.split("/")[-1].split(":")[0] for one in facts.broken] == ["cut.jpg"]
    assert "26 images (24 PNG and 1 JPEG); modes RGB, L; longer side 96 to 300 pixels" in facts.describe()
    assert facts.describe().endswith("1 image broken")


def test_only_broken_images_are_an_error(tmp_path: Path):
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8\xff\xe0 no image")
    with pytest.raises(UserError, match=r"^IMAGES: none of 1 image can be read"):
        look_at_images(open_source(tmp_path, "IMAGES"), "IMAGES")


def test_validation_images_are_not_in_the_list_under_any_name(labels: tuple[Path, Path], tmp_path: Path):
    source = open_source(labels[1], "IMAGES")
    other_name = str(labels[1] / ".." / "images" / "3.png")
    assert write_list(source, [other_name], None, tmp_path / "out" / "list.txt") == 23
    listed = open_source(tmp_path / "out" / "list.txt", "data.train")
    names = {Path(listed.name(index)).name for index in range(len(listed))}
    assert names == {f"{number}.png" for number in range(24)} - {"3.png"}
    with pytest.raises(UserError, match="all images are validation images"):
        write_list(source, [source.name(index) for index in range(24)], None, tmp_path / "out" / "list.txt")


@pytest.mark.parametrize(
    ("low", "high", "levels"), [(33000, 34700, 8), (0, 4095, 16), (0, 65535, None), (0, 9000, None)]
)
def test_deep_images_that_a_cut_makes_flat_are_refused(tmp_path: Path, low: int, high: int, levels: int | None):
    values = np.linspace(low, high, 64 * 64).reshape(64, 64).astype(np.uint16)
    for number in range(3):
        Image.fromarray(values).save(tmp_path / f"{number}.png")
    source = open_source(tmp_path, "IMAGES")
    if levels is None:
        assert look_at_images(source, "IMAGES").count == 3
        return
    expected = rf"^IMAGES: .*0\.png and others have more than 8 bits.* leaves {levels} of 256 grey levels\. Stretch"
    with pytest.raises(UserError, match=expected):
        look_at_images(source, "IMAGES")


def test_the_share_of_objects_is_the_median_of_their_longer_sides():
    images = [{"id": 1, "width": 100, "height": 40}, {"id": 2, "width": 100, "height": 200}]
    boxes = [(1, [0, 0, 10, 8]), (2, [0, 0, 10, 40]), (2, [0, 0, 100, 10]), (2, [0, 0, 2, 2])]  # the last is too small
    annotations = [{"image_id": image, "category_id": 1, "bbox": box} for image, box in boxes]
    assert object_share({"images": images, "annotations": annotations}) == pytest.approx(0.2)


def test_labels_need_images_that_are_files(tmp_path: Path, labels: tuple[Path, Path]):
    import tarfile

    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(labels[1] / "0.png", "0.png")
    with pytest.raises(UserError, match=r"has no image files.* Unpack"):
        open_files(tmp_path / "a.tar", "IMAGES")
