"""Masks and boxes of another frame are explained, single strays are found, and sound data sets have no finding."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

from pycocotools import mask as coco_mask

from det.data.coco_fit import Placed, find_misfits
from det.data.coco_masks import measure_masks

SAMPLE = Path(__file__).parents[4] / "shared/coco_sample/instances_val2014_100.json"
RNG = np.random.default_rng(0)
FIXED = [(96, 64), np.array([(6, 10, 30, 12), (36, 30, 16, 26)] * 4, float)]  # two boxes on each of four images


def spread(count, *sizes):
    """Boxes anywhere in images of some sizes."""
    size = np.array(sizes, float)[np.arange(count) // 2 % len(sizes)]  # two boxes on each image
    side = np.maximum(RNG.uniform(0.03, 0.5, (count, 2)) * size, 3).round()
    return size, np.concatenate([(RNG.uniform(size=(count, 2)) * (size - side)).round(), side], axis=1)


def find(box, masks, size):
    size = np.broadcast_to(np.array(size, float), (len(box), 2))
    measured = measure_masks(masks, size)
    usable = (np.array(box)[:, 2:] > 0).all(axis=1)
    placed = Placed(np.array(box, float), measured.extent, size, np.arange(len(box)) // 2, usable)
    return find_misfits(placed, masks, measured.faults.get("rle-size", {}))


def polygons(box, change=lambda x, y, w, h: (x, y), sizes=(0, 0)):
    """Rectangles with changed corners; a function changes arrays of x and y of images w, h."""
    x, y, w, h = np.array(box, float).T[..., None]
    xs, ys = np.concatenate([x, x + w, x + w, x], 1), np.concatenate([y, y, y + h, y + h], 1)
    width, height = np.broadcast_to(np.array(sizes, float), (len(xs), 2)).T[..., None]
    xs, ys = change(xs, ys, width, height)
    points = np.stack(np.broadcast_arrays(xs, ys), axis=2).reshape(len(xs), -1)
    return [[polygon.tolist()] for polygon in points]


def boxes(box, change, sizes):
    flat = np.array([polygon[0] for polygon in polygons(box, change, sizes)])
    low, high = flat[:, [0, 1]], flat[:, [4, 5]]
    return np.concatenate([np.minimum(low, high), np.abs(high - low)], axis=1)


def bitmap(box, size):
    mask = np.zeros((int(size[1]), int(size[0])), np.uint8)
    x, y, w, h = map(int, box)
    mask[y : y + h, x : x + w] = 1
    return mask


def encode(mask, size=None, compressed=True):
    found = coco_mask.encode(np.asfortranarray(mask))
    if compressed:
        return {"size": size or list(found["size"]), "counts": found["counts"].decode()}
    flat = mask.ravel(order="F")
    runs = np.diff([0, *(np.flatnonzero(np.diff(flat.astype(int))) + 1), flat.size]).tolist()
    return {"size": size or list(mask.shape), "counts": [0, *runs] if flat[0] else runs}


FRAMES = {
    "with x and y swapped": lambda x, y, w, h: (y, x),
    "as shares of the image: multiply by its size": lambda x, y, w, h: (x / w, y / h),
    "as percents of the image": lambda x, y, w, h: (100 * x / w, 100 * y / h),
    "as thousandths of the image": lambda x, y, w, h: (1000 * x / w, 1000 * y / h),
    "with x and y swapped, as thousandths of the image": lambda x, y, w, h: (1000 * y / h, 1000 * x / w),
    "with y counted from the bottom": lambda x, y, w, h: (x, h - y),
    "with x counted from the right": lambda x, y, w, h: (w - x, y),
    "with x and y swapped, with x counted from the right": lambda x, y, w, h: (y, w - x),  # turned by 90 degrees
    "times 2.0, as if": lambda x, y, w, h: (0.5 * x, 0.5 * y),
    "times 0.5, as if": lambda x, y, w, h: (2 * x, 2 * y),
    "times 0.8, as if": lambda x, y, w, h: (1.25 * x, 1.25 * y),
    "times 0.5 in x and 2.0 in y": lambda x, y, w, h: (2 * x, 0.5 * y),
    "moved by -40 in x and 25 in y": lambda x, y, w, h: (x + 40, y - 25),
}
SETS = {"few": FIXED, "many": spread(60, (640, 480), (480, 640), (500, 375))}


@pytest.mark.parametrize("data", SETS)
@pytest.mark.parametrize("words", FRAMES)
def test_polygons_of_another_frame_are_explained(words, data):
    size, box = SETS[data]
    found = find(box, polygons(box, FRAMES[words], size), size)
    assert set(found) == {"misfit-masks"}
    assert len(found["misfit-masks"]) >= 0.9 * len(box)
    assert all(f"its mask fits its box {words}" in note for note in found["misfit-masks"].values())


BOX_FRAMES = [words for words in FRAMES if "of the image" in words]


@pytest.mark.parametrize("data", SETS)
@pytest.mark.parametrize("words", BOX_FRAMES)
def test_boxes_of_another_frame_are_explained_by_their_masks(words, data):
    size, box = SETS[data]
    found = find(boxes(box, FRAMES[words], size), polygons(box), size)
    assert set(found) == {"misfit-boxes"}
    assert len(found["misfit-boxes"]) == len(box)
    assert all(words in note for note in found["misfit-boxes"].values())


def test_boxes_with_centers_are_explained_with_and_without_masks():
    for size, box in SETS.values():
        center = np.concatenate([box[:, :2] + box[:, 2:] / 2, box[:, 2:]], axis=1)
        for masks in (polygons(box), [None] * len(box)):
            found = find(center, masks, size)["misfit-boxes"].values()
            assert all("read as [center x, center y, width, height]" in note for note in found)


def test_a_factor_of_each_image_and_a_letterbox_are_explained():
    size, box = spread(80, (640, 480), (480, 640), (500, 375))
    notes = find(box, polygons(box, lambda x, y, w, h: (320 * x / w, 320 * y / h), size), size)["misfit-masks"]
    assert len(notes) == 80
    assert all("(another factor in each image), as if the image were 3" in one for one in notes.values())
    notes = find(box, polygons(box, lambda x, y, w, h: (0.5 * x + 20, 0.5 * y + 80)), size)["misfit-masks"]
    assert len(notes) == 80
    assert all("times 2.0 and moved by -40 in x and -160 in y" in one for one in notes.values())


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("data", SETS)
def test_run_lengths_in_another_order_are_explained(data, compressed):
    size, box = FIXED if data == "few" else (SETS[data][0][:20], SETS[data][1][:20])
    maps = [bitmap(*one) for one in zip(box, np.broadcast_to(size, (len(box), 2)), strict=True)]
    by_rows = [encode(one.reshape(-1).reshape(one.shape, order="F"), compressed=compressed) for one in maps]
    turned = [encode(one.T, compressed=compressed) for one in maps]
    sides = [encode(one, list(one.shape[::-1]), compressed) for one in maps]
    larger = [encode(one.repeat(2, 0).repeat(2, 1), compressed=compressed) for one in maps]
    for masks, words in (
        (by_rows, "when its run lengths are read by rows"),
        (turned, "with x and y swapped"),
        (sides, "when its size is read as [width, height]"),
        (larger, "once its run lengths are resized to the image"),
    ):
        found = find(box, masks, size)
        assert set(found) == {"misfit-masks"}
        assert len(found["misfit-masks"]) >= 0.95 * len(box)
        assert all(words in note for note in found["misfit-masks"].values()), words


def test_one_annotation_is_enough_for_a_clear_explanation():
    box = np.array([[100, 50, 200, 90]])
    for words in ("with x and y swapped", "as shares of the image: multiply by its size", "times 0.5, as if"):
        (note,) = find(box, polygons(box, FRAMES[words], (640, 480)), (640, 480))["misfit-masks"].values()
        assert words in note


@pytest.mark.parametrize(
    "change, words",
    [
        (FRAMES["as shares of the image: multiply by its size"], "shares of the image"),
        (FRAMES["as percents of the image"], "percents of the image"),
        (FRAMES["as thousandths of the image"], "thousandths of the image"),
        (FRAMES["times 0.5, as if"], "in a larger version of the image"),
    ],
)
@pytest.mark.parametrize("masks", [True, False])
def test_boxes_that_do_not_fit_their_images_are_explained(change, words, masks):
    for size, box in ((FIXED[0], FIXED[1]), spread(60, (640, 480), (480, 640))):
        changed = boxes(box, change, size)
        found = find(changed, polygons(box, change, size) if masks else [None] * len(box), size)
        assert set(found) == {"misfit-boxes"}
        assert all(words in note for note in found["misfit-boxes"].values())


def test_a_part_of_a_file_in_another_frame_is_explained():
    for size, box in ((FIXED[0], FIXED[1]), SETS["many"]):
        masks, quarter = polygons(box), len(box) // 4
        masks[: 2 * quarter] = polygons(box, FRAMES["with x and y swapped"])[: 2 * quarter]
        assert set(find(box, masks, size)["misfit-masks"]) <= set(range(2 * quarter))
        masks[: 2 * quarter] = polygons(box)[: 2 * quarter]
        assert find(box, masks, size) == {}


def test_single_strays_are_named():
    size, box = SETS["many"]
    masks = polygons(box)
    masks[4] = [[6, 10, 2.0e8, 3.5e8, 36, 22, 6, 22]]
    masks[5] = [[-40, 10, -20, 10, -20, 30]]
    box[6] = [10, 10, 40, 40]
    masks[6] = [[200, 200, 260, 200, 260, 260]]
    found = find(box, masks, size)
    assert {kind: sorted(rows) for kind, rows in found.items()} == {"mask-outside": [4, 5], "mask-off-box": [6]}
    assert found["mask-off-box"][6] == "mask from 200, 200 to 260, 260, bbox [10, 10, 40, 40] in an image of 640x480"


def test_a_single_mask_in_another_frame_is_explained_among_tight_boxes():
    size, box = FIXED
    for words in ("with x and y swapped", "as shares of the image: multiply by its size"):
        masks = polygons(box)
        masks[2] = polygons(box, FRAMES[words], size)[2]
        found = find(box, masks, size)
        assert set(found) == {"mask-off-box"}
        assert list(found["mask-off-box"]) == [2]
        assert found["mask-off-box"][2].endswith(f", but it fits {words}")


def jittered(size, box, kind):
    """Boxes and polygons of a sound data set."""
    x, y, w, h = box.T
    if kind == "loose":
        grown = RNG.uniform(0, 0.4, box.shape) * np.tile(box[:, 2:], 2)
        return np.stack(
            [x - grown[:, 0], y - grown[:, 1], w + grown[:, [0, 2]].sum(1), h + grown[:, [1, 3]].sum(1)], 1
        ), box
    if kind == "visible part":
        share = RNG.uniform(0.2, 1, (len(box), 2)) * box[:, 2:]
        return np.concatenate([box[:, :2] + RNG.uniform(size=share.shape) * (box[:, 2:] - share), share], 1), box
    if kind == "by hand":
        moved = RNG.uniform(-0.1, 0.1, box.shape) * np.tile(box[:, 2:], 2)
        return np.concatenate([box[:, :2] + moved[:, :2], box[:, 2:] + moved[:, 2:] - moved[:, :2]], 1), box
    if kind.startswith("cut off"):  # the polygon continues beyond the edge, the box ends there or not
        moved = np.concatenate(
            [np.where(RNG.random((len(box), 1)) < 0.5, [[0, 0]], size - 0.6 * box[:, 2:]), box[:, 2:]], 1
        )
        low, high = np.maximum(moved[:, :2], 0), np.minimum(moved[:, :2] + moved[:, 2:], size)
        return (moved if "box too" in kind else np.concatenate([low, high - low], 1)), moved
    return box - [1, 1, 0, 0], box  # counted from 1


@pytest.mark.parametrize("count", [1, 2, 8, 60])
@pytest.mark.parametrize("kind", ["loose", "visible part", "by hand", "cut off", "cut off, box too", "from 1"])
def test_sound_data_sets_have_no_finding(kind, count):
    for sizes in ([(64, 64)], [(640, 480), (480, 640)], [(5000, 4000)]):
        size, box = spread(count, *sizes)
        found, true = jittered(size, box, kind)
        assert find(np.maximum(found, [-9999, -9999, 0.5, 0.5]), polygons(true), size) == {}


def test_objects_of_several_parts_and_very_small_objects_are_sound():
    size, box = spread(20, (256, 256))
    half = box * [1, 1, 0.3, 0.3]
    other = np.concatenate([box[:, :2] + 0.6 * box[:, 2:], 0.4 * box[:, 2:]], 1)
    assert find(box, [a + b for a, b in zip(polygons(half), polygons(other), strict=True)], size) == {}
    tiny = np.concatenate([RNG.uniform(0, 60, (30, 2)).round(), RNG.integers(1, 3, (30, 2))], axis=1)
    assert find(tiny, polygons(tiny), (64, 64)) == {}
    assert find([[0, 0, 1, 1]], [None], (64, 64)) != {}  # all boxes in the first pixel: shares


@pytest.mark.parametrize(
    "mask",
    [
        [[0, 0, 0, 0, 0, 0]], [[1e308, 0, -1e308, 9, 3, 4]], {"size": [10**400, 5], "counts": "0"},
        {"size": [0, 0], "counts": [0]}, {"size": [5, 7], "counts": [9, 9]}, {"size": [64, 64], "counts": [0, 4096]},
    ],
)  # fmt: skip
def test_impossible_masks_and_boxes_do_no_harm(mask):
    for box in ([5, 5, 9, 9], [1e308, 1e308, 1e308, 1e308], [0, 0, 5e-324, 5e-324]):
        find([box], [mask], (64, 64))
        find([box] * 9, [mask] * 9, (64, 64))


@pytest.mark.skipif(not SAMPLE.is_file(), reason="the sample of COCO is not there")
@pytest.mark.parametrize("together", [4, 10_000])
def test_coco_itself_has_no_finding(together):
    content = json.loads(SAMPLE.read_text())
    sizes = {entry["id"]: (entry["width"], entry["height"]) for entry in content["images"]}
    entries = [entry for entry in content["annotations"] if not entry["iscrowd"]]
    for start in range(0, len(entries), together):
        some = entries[start : start + together]
        size = [sizes[entry["image_id"]] for entry in some]
        assert find([entry["bbox"] for entry in some], [entry["segmentation"] for entry in some], size) == {}


def test_boxes_that_all_lie_in_a_corner_are_information():
    size, box = spread(60, (640, 480), (480, 640))
    assert set(find(box / 2, polygons(box / 2), size)) == {"boxes-in-corner"}


def small(count, width=640, height=480, sides=(20, 200)):
    """Small boxes anywhere in images, four on each."""
    side = RNG.integers(*sides, (count, 2)).astype(float)
    return np.concatenate([(RNG.uniform(size=(count, 2)) * ([width, height] - side)).round(), side], axis=1)


def without_masks(box, size):
    size = np.broadcast_to(np.array(size, float), (len(box), 2))
    image, extent = np.arange(len(box)) // 4, np.full((len(box), 4), np.nan)
    return find_misfits(Placed(box, extent, size, image, np.ones(len(box), bool)), [None] * len(box))


def test_small_boxes_with_centers_go_over_two_edges_only():
    box = small(240)
    center = np.concatenate([box[:, :2] + box[:, 2:] / 2, box[:, 2:]], axis=1)
    found = without_masks(center, (640, 480))
    assert len(found["misfit-boxes"]) >= 30
    assert all("read as [center x, center y, width, height]" in note for note in found["misfit-boxes"].values())


def test_boxes_over_the_edges_are_sound_without_masks():
    for _ in range(20):
        box = small(200)
        loose = box + RNG.uniform(0, 0.3, box.shape) * np.tile(box[:, 2:], 2) * [-1, -1, 1, 1]
        clipped = np.concatenate([np.maximum(loose[:, :2], 0), loose[:, 2:]], axis=1)
        assert without_masks(loose, (640, 480)) == without_masks(clipped, (640, 480)) == {}


def test_boxes_outside_their_images_get_no_wrong_explanation():
    box, at = small(48, 96, 64, (6, 30)), np.arange(48) // 4
    x1, y1, x2, y2 = box[:, 0], box[:, 1], box[:, 0] + box[:, 2], box[:, 1] + box[:, 3]
    swapped = without_masks(np.stack([y1, x1, y2, x2], axis=1), (96, 64))
    tiles = without_masks(box + np.stack([at % 4 * 96, at // 4 * 64, 0 * at, 0 * at], axis=1), (96, 64))
    far = without_masks(box * 9.7, (96, 64))
    larger = without_masks(box * 2, (96, 64))
    words = ("corners [x1, y1, x2, y2], with x and y swapped", "fits nothing: ", "", "in a larger version")
    for found, word in zip((swapped, tiles, far, larger), words, strict=True):
        assert set(found) == {"misfit-boxes"}
        assert all(word in note for note in found["misfit-boxes"].values())
        assert found is larger or not any("larger" in note for note in found["misfit-boxes"].values())
