"""Validation pictures: truth left, predictions right, one colour a class; the same images whenever they are drawn."""

import random

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

from det.evaluation.pictures import (
    DRAWN_SIDE,
    drawing_threshold,
    find_pictures,
    save_pictures,
    spread_images,
    validation_pictures,
)
from det.inference.draw import class_color
from tests.det.coco_files import annotation, write_coco

BOX = (30, 20, 20, 30)  # of write_coco's objects of category 3, the second class
SCALE = DRAWN_SIDE // 64
EDGE = (35 * SCALE, 30 * SCALE)  # row and column of a pixel on the left edge of that box
GAP = 16  # pixels around the two sides


def detection(image_id, score, box=BOX):
    return {**annotation(0, image_id, 3, box), "score": score}


def enlarged(path):
    return np.asarray(Image.open(path).resize((DRAWN_SIDE, DRAWN_SIDE), Image.Resampling.BICUBIC))


def draw_sides(content, images, results):
    """Draw all images; truth and prediction of each, without the caption."""
    pictures = [picture for _, picture in validation_pictures(content, images, results, count=9)]
    starts = GAP, 2 * GAP + DRAWN_SIDE
    return [[one[GAP : GAP + DRAWN_SIDE, left : left + DRAWN_SIDE] for left in starts] for one in pictures]


def test_truth_is_left_and_predictions_are_right(tmp_path):
    _, images, content = write_coco(tmp_path, images=1)
    results = [detection(1, 0.9, (4, 40, 8, 8))]
    ((name, picture),) = validation_pictures(content, images, results)
    assert name == "1.png"
    assert picture.dtype == np.uint8
    assert picture.shape[1] == 2 * DRAWN_SIDE + 3 * GAP
    assert len(np.unique(picture[GAP + DRAWN_SIDE :])) > 2  # the caption has letters
    ((truth, prediction),) = draw_sides(content, images, results)
    ((plain, _),) = draw_sides(content, images, [])
    assert np.array_equal(truth, plain)
    assert not np.array_equal(truth, prediction)


def test_only_what_reaches_the_threshold_is_drawn_in_one_colour_a_class(tmp_path):
    """Also where the file lists the categories in another order."""
    _, images, content = write_coco(tmp_path, images=3)
    content["categories"].reverse()
    results = [detection(1, 0.49), *[detection(2, 0.5)] * 9]
    (_, below), (truth, at), (_, none) = draw_sides(content, images, results)
    assert np.array_equal(below, enlarged(images / "1.png"))
    assert np.array_equal(none, enlarged(images / "3.png"))
    assert truth[EDGE].tolist() == at[EDGE].tolist() == list(class_color(1))


def test_pictures_repeat_whatever_the_order_of_the_file(tmp_path):
    _, images, content = write_coco(tmp_path)
    results = [detection(number, 0.8) for number in range(1, 6)]
    first = validation_pictures(content, images, results, count=2)
    for key in ("images", "categories"):
        random.Random(1).shuffle(content[key])
    again = validation_pictures(content, images, results, count=2)
    assert [name for name, _ in first] == [name for name, _ in again] == ["1.png", "3.png"]
    assert all(np.array_equal(one, other) for (_, one), (_, other) in zip(first, again, strict=True))


def test_images_are_spread_over_those_with_objects():
    crowd = {"image_id": 50, "iscrowd": 1}
    truth = {
        "images": [{"id": number} for number in range(99, -1, -1)],
        "annotations": [crowd, *({"image_id": number, "iscrowd": 0} for number in range(0, 80, 2) if number != 50)],
    }
    assert [entry["id"] for entry in spread_images(truth, 4)] == [0, 18, 38, 60]
    assert len(spread_images(truth, 1000)) == 39
    assert spread_images({"images": truth["images"], "annotations": [crowd]}, 4) == []
    assert len(spread_images({"images": truth["images"], "annotations": []}, 4)) == 4  # for false alarms


def test_crowd_regions_are_not_drawn(tmp_path):
    _, images, content = write_coco(tmp_path, images=1)
    content["annotations"][1]["iscrowd"] = 1
    ((truth, _),) = draw_sides(content, images, [])
    assert truth[EDGE].tolist() != list(class_color(1))


def test_large_images_are_reduced_with_their_objects(tmp_path):
    """LVIS's files, too: in a folder by `coco_url`, without `iscrowd`, the masks as polygons."""
    (tmp_path / "val").mkdir()
    Image.new("RGB", (3000, 1500)).save(tmp_path / "val/large.png")
    left, top, right, bottom = 1500, 300, 2400, 1200
    entry = {
        "image_id": 7, "category_id": 1, "bbox": [left, top, right - left, bottom - top],
        "segmentation": [[left, top, right, top, left, bottom]],  # its upper left half
    }  # fmt: skip
    image = {"id": 7, "coco_url": "http://images/val/large.png", "width": 3000, "height": 1500}
    truth = {"images": [image], "annotations": [entry], "categories": [{"id": 1, "name": "a"}]}
    ((name, picture),) = validation_pictures(truth, tmp_path, [])
    drawn = picture[GAP : GAP + DRAWN_SIDE // 2, GAP : GAP + DRAWN_SIDE]
    assert name == "val/large.png"
    assert picture.shape[0] < 400
    # On black, what is not black is the object: its box to the pixel, and inside its mask, which is half of it.
    rows, columns = np.nonzero(drawn.any(-1)[:, int(left * DRAWN_SIDE / 3000) :])
    assert abs(rows.max() - bottom * DRAWN_SIDE / 3000) <= 1
    assert abs(columns.max() - (right - left) * DRAWN_SIDE / 3000) <= 1
    inside = drawn[
        top * DRAWN_SIDE // 3000 + 8 : bottom * DRAWN_SIDE // 3000 - 8,
        left * DRAWN_SIDE // 3000 + 8 : right * DRAWN_SIDE // 3000 - 8,
    ]
    assert inside.any(-1).mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("scores", "objects", "threshold"),
    [
        ([0.9, 0.8, 0.3], 3, 0.5),  # two of three are enough
        ([0.9, 0.3, 0.2, 0.1], 3, 0.2),  # one is not: the best three
        ([0.3, 0.2], 4, 0.2),
        ([], 4, 0.5),
        ([0.1], 0, 0.5),
        ([0.7, 0.6, 0.5], 7, 0.5),
    ],
)
def test_a_weak_detector_is_drawn_with_lower_scores(scores, objects, threshold):
    assert drawing_threshold(scores, objects) == threshold


def test_saved_pictures_replace_earlier_ones_and_nothing_else(tmp_path):
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    save_pictures([(f"folder/photo {number}.jpg", picture) for number in range(12)], tmp_path)
    assert [path.name for path in find_pictures(tmp_path)] == [f"{n + 1}-photo-{n}.png" for n in range(12)]
    Image.new("RGB", (2, 2)).save(tmp_path / "mine.png")
    save_pictures([("other.png", picture), ("x" * 300, picture)], tmp_path)
    assert [path.name for path in find_pictures(tmp_path)] == ["1-other.png", f"2-{'x' * 80}.png"]
    assert sorted(path.name[:6] for path in tmp_path.iterdir()) == ["1-othe", "2-xxxx", "mine.p"]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "1-other.png")), picture)
