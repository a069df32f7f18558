"""Drawn instances are where COCO says, in the colour of their class; the rest of the image is untouched."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageFont
from pycocotools import mask as coco_mask

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks

from det.data.masks import decode_segmentation
from det.inference.draw import (
    DrawnInstance,
    _draw_mask,
    _warn_of_boxes,
    class_color,
    draw_instances,
    draw_sheet,
    instances_from_coco,
    instances_from_detectron2,
    label_font,
)

# pycocotools 2.0.11 hands numpy 2 an array type of its own that knows no `copy`.

HEIGHT, WIDTH = 60, 80
BOX = (30.0, 25.0, 21.0, 13.0)
NAMES = {3: "cat", 7: "dog"}


def rectangle() -> np.ndarray:
    """Rows 25-37, columns 30-50."""
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[25:38, 30:51] = True
    return mask


def photo() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def encoded() -> dict[str, object]:
    rle = coco_mask.encode(np.asfortranarray(rectangle().astype(np.uint8)))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def test_instances_from_coco():
    entries = [
        {"category_id": 7, "bbox": BOX, "score": 0.25},
        {"category_id": 3, "bbox": BOX, "segmentation": encoded()},
    ]
    dog, cat = instances_from_coco(entries, NAMES)
    assert (dog.class_index, dog.name, dog.score, dog.mask, dog.box) == (1, "dog", 0.25, None, BOX)
    assert (cat.class_index, cat.name, cat.score) == (0, "cat", None)
    assert cat.mask == encoded(), "masks stay encoded until they are drawn"


def test_an_encoded_mask_is_drawn_like_an_array():
    entries = [{"category_id": 3, "bbox": BOX, "segmentation": encoded()}]
    (kept,) = instances_from_coco(entries, NAMES)
    drawn = draw_instances(photo(), [kept])
    assert np.array_equal(drawn, draw_instances(photo(), [replace(kept, mask=rectangle())]))
    assert not np.array_equal(drawn, draw_instances(photo(), [replace(kept, mask=None)]))


def test_mask_tints_its_inside_and_nothing_outside_changes():
    image = photo()
    drawn = draw_instances(image, [DrawnInstance(BOX, 1, "", rectangle())])
    inside = (slice(29, 34), slice(40, 47))  # clear of outline, box and label
    expected = 0.65 * image[inside] + 0.35 * np.array(class_color(1))
    assert np.abs(drawn[inside] - expected).max() <= 1.5
    assert np.array_equal(drawn[:, 55:], image[:, 55:])
    assert np.array_equal(drawn[42:], image[42:])
    assert np.array_equal(drawn[:, :28], image[:, :28])


@pytest.mark.parametrize("score", [None, 0.9])
def test_box_has_the_color_of_its_class_in_truth_and_prediction(score: float | None):
    drawn = draw_instances(photo(), [DrawnInstance(BOX, 4, "x", score=score)])
    assert tuple(drawn[38, 45]) == class_color(4)  # bottom edge
    assert tuple(drawn[34, 51]) == class_color(4)  # right edge
    assert len({class_color(i) for i in range(10)}) == 10
    assert class_color(13) == class_color(3)


def test_score_is_written():
    image = photo()
    without, low, high = (draw_instances(image, [DrawnInstance(BOX, 0, "x", score=s)]) for s in (None, 0.11, 0.99))
    assert not np.array_equal(without, low)
    assert not np.array_equal(low, high)


def test_small_object_is_drawn_over_a_large_one_in_any_order():
    small = DrawnInstance((40.0, 30.0, 8.0, 6.0), 2, "s")
    large = DrawnInstance((5.0, 5.0, 70.0, 50.0), 3, "l", np.ones((HEIGHT, WIDTH), bool))
    drawn = draw_instances(photo(), [small, large])
    assert np.array_equal(drawn, draw_instances(photo(), [large, small]))
    assert tuple(drawn[36, 44]) == class_color(2)


def test_labels_stay_inside_the_picture():
    corner = DrawnInstance((76.0, 0.0, 4.0, 4.0), 0, "long name", score=1.0)
    drawn = draw_instances(np.zeros((HEIGHT, WIDTH, 3), np.uint8), [corner])
    tag = (drawn == class_color(0)).all(-1)
    assert tag[:8, 40:].sum() > 60  # the tag is there, moved left of the box's corner
    assert drawn.shape == (HEIGHT, WIDTH, 3)


def test_input_is_not_changed_and_no_instances_means_no_change():
    image = photo()
    before = image.copy()
    draw_instances(image, [DrawnInstance(BOX, 0, "x", rectangle(), 0.5)])
    assert np.array_equal(image, before)
    assert np.array_equal(draw_instances(image, []), image)


def test_enlarged_mask_keeps_its_place_and_area():
    black = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    drawn = draw_instances(black, [DrawnInstance((0.0, 0.0, 1.0, 1.0), 0, "", rectangle())], longest_side=4 * WIDTH)
    assert drawn.shape == (4 * HEIGHT, 4 * WIDTH, 3)
    below_tag = np.arange(4 * HEIGHT)[:, None] >= 60  # the tag of the tiny box
    painted = np.argwhere(drawn.any(-1) & below_tag)
    assert np.abs(painted.min(0) - [100, 120]).max() <= 2
    assert np.abs(painted.max(0) - [151, 203]).max() <= 2


@pytest.mark.parametrize("masks", ["polygons", "bitmasks", "none"])
def test_instances_of_detectron2_and_of_coco_are_the_same(masks: str):
    polygon = [30.0, 25.0, 51.0, 25.0, 51.0, 38.0, 30.0, 38.0]
    fields: dict[str, object] = {
        "polygons": {"gt_masks": PolygonMasks([[polygon], [polygon]])},
        "bitmasks": {"gt_masks": BitMasks(torch.from_numpy(np.stack([rectangle()] * 2)))},
        "none": {},
    }[masks]
    fields |= {"gt_boxes": Boxes(torch.tensor([[30.0, 25.0, 51.0, 38.0]] * 2)), "gt_classes": torch.tensor([1, 0])}
    objects = Instances((HEIGHT, WIDTH), **fields)  # type: ignore[arg-type]
    entries = [{"category_id": category, "bbox": BOX, "segmentation": [polygon]} for category in (7, 3)]
    expected = instances_from_coco(entries, NAMES)
    for given, wanted in zip(instances_from_detectron2(objects, ["cat", "dog"]), expected, strict=True):
        assert (given.box, given.class_index, given.name) == (wanted.box, wanted.class_index, wanted.name)
        if masks == "none":
            assert given.mask is None
        else:
            assert np.array_equal(given.mask, decode_segmentation(wanted.mask, HEIGHT, WIDTH))


def slow_mask(canvas: Image.Image, mask: np.ndarray, color: tuple[int, int, int], scale: float, unit: float) -> None:
    """Independent of where the mask is: on the whole picture, with Pillow alone."""
    soft = Image.fromarray(mask.astype(np.uint8) * 255).resize(canvas.size, Image.Resampling.BICUBIC)
    if scale > 1:
        soft = soft.filter(ImageFilter.GaussianBlur(0.5 * scale))
    inside = soft.point(lambda value: 255 if value >= 128 else 0)
    inner = inside.filter(ImageFilter.MinFilter(2 * max(1, round(1.5 * unit)) + 1))
    opacity = np.where(np.asarray(inside) > np.asarray(inner), 1.0, 0.35) * (np.asarray(inside) > 0)
    canvas.paste(Image.new("RGB", canvas.size, color), mask=Image.fromarray((opacity * 255).astype(np.uint8)))


@pytest.mark.parametrize("scale", [0.5, 1, 2.3, 8])
@pytest.mark.parametrize("place", [(25, 38, 30, 51), (0, 9, 0, 12), (48, 60, 70, 80), (0, 60, 0, 80), (9, 10, 9, 10)])
def test_a_mask_is_drawn_in_its_neighbourhood_as_on_the_whole_picture(scale: float, place: tuple[int, ...]):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[place[0] : place[1], place[2] : place[3]] = True
    mask &= np.random.default_rng(0).random(mask.shape) > 0.2
    mask[place[0], place[2]] = True
    size = (round(WIDTH * scale), round(HEIGHT * scale))
    fast, slow = (Image.fromarray(photo()).resize(size) for _ in range(2))
    _draw_mask(fast, mask, (255, 0, 0), scale, max(size) / 480)
    slow_mask(slow, mask, (255, 0, 0), scale, max(size) / 480)
    assert (np.asarray(fast) == np.asarray(slow)).all(-1).mean() > 0.999  # a soft border may round the other way
    _draw_mask(fast, np.zeros_like(mask), (255, 0, 0), scale, 1.0)


def test_labels_move_out_of_each_others_way():
    """Three objects at one place; the tag of each is seen whole, as if it were alone."""
    objects = [DrawnInstance((100.0, 100.0, 4.0, 4.0), i, "name", score=0.9 - 0.1 * i) for i in range(3)]
    blank = np.zeros((260, 300, 3), np.uint8)
    together = draw_instances(blank, objects)
    for instance in objects:
        own = class_color(instance.class_index)
        alone = (draw_instances(blank, [instance]) == own).all(-1).sum()
        assert (together == own).all(-1).sum() >= alone - 25  # the boxes, 5 x 5 pixels, lie upon each other


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("names", [["cell"], ["cell", "a long name"]], ids=["one class", "two classes"])
def test_labels_leave_small_objects_visible(names: list[str], seed: int):
    """Sixty small objects: most of each stays visible, and labels are still drawn."""
    rng = np.random.default_rng(seed)
    sides = rng.uniform(4, 12, 60)
    corners = rng.uniform(0, 1, (60, 2)) * (np.array([320, 240]) - sides[:, None])
    entries = [
        {"category_id": 3 + 4 * (i % len(names)), "bbox": [*corner, side, side], "score": 0.9}
        for i, (corner, side) in enumerate(zip(corners.tolist(), sides.tolist(), strict=True))
    ]
    objects = instances_from_coco(entries, dict(zip((3, 7), names, strict=False)))
    blank = np.zeros((240, 320, 3), np.uint8)
    boxes = draw_instances(blank, [replace(one, name="", score=None) for one in objects], 640)
    drawn = draw_instances(blank, objects, 640)
    changed = (drawn != boxes).any(-1)
    for one in objects:
        left, top, width, height = (2 * value for value in one.box)
        inside = changed[round(top) : round(top + height) + 1, round(left) : round(left + width) + 1]
        assert inside.mean() < 0.45  # two or three labels may touch it
    assert changed.sum() > 10 * 300  # more than ten labels


def test_a_label_is_outside_of_its_box_where_there_is_room():
    blank = np.zeros((200, 300, 3), np.uint8)
    for top, side in ((100.0, "above"), (0.0, "below")):
        color = class_color(0)
        tag = (draw_instances(blank, [DrawnInstance((100.0, top, 60.0, 60.0), 0, "x", score=0.9)]) == color).all(-1)
        bare = (draw_instances(blank, [DrawnInstance((100.0, top, 60.0, 60.0), 0, "")]) == color).all(-1)
        rows = np.flatnonzero((tag & ~bare).any(1))
        assert rows.max() <= top if side == "above" else rows.min() >= top + 60


def test_the_name_of_an_only_class_is_not_written():
    entries = [{"category_id": 3, "bbox": BOX, "score": 0.5}, {"category_id": 3, "bbox": BOX}]
    scored, true = instances_from_coco(entries, {3: "cat"})
    assert (scored.name, true.name) == ("", "")
    assert not np.array_equal(draw_instances(photo(), [scored]), draw_instances(photo(), [true]))  # the score is
    assert [one.name for one in instances_from_coco(entries, NAMES)] == ["cat", "cat"]


def label_of(name: str) -> np.ndarray:
    """What is drawn above a box at (10, 60)."""
    return draw_instances(
        np.zeros((120, 300, 3), np.uint8), [DrawnInstance((10.0, 60.0, 5.0, 5.0), 0, name)], letters=0.1
    )[:58]


def test_letters_beyond_ascii_are_letters_and_the_rest_is_told_once(caplog: pytest.LogCaptureFixture):
    _warn_of_boxes.cache_clear()
    for one, other in ("éè", "ёж", "ΩΨ"):
        assert not np.array_equal(label_of(one), label_of(other)), "two boxes look alike"
    assert not caplog.records
    assert np.array_equal(label_of("猫"), label_of("犬"))
    assert [record.message for record in caplog.records] == [
        "letters that DejaVu Sans lacks, as those of Chinese, Japanese and Korean, are drawn as boxes"
    ]
    font = ImageFont.load_default(20)
    assert label_font("plain", 20).getname() == font.getname()


def test_letters_have_the_size_asked_for():
    blank = np.zeros((400, 400, 3), np.uint8)
    areas = [
        int(
            (draw_instances(blank, [DrawnInstance((100.0, 200.0, 5.0, 5.0), 0, "xx")], letters=size)[:195])
            .any(-1)
            .sum()
        )
        for size in (0.05, 0.1)
    ]
    assert 3 < areas[1] / areas[0] < 5


def test_sheet_shows_every_picture_once_and_apart():
    pictures = [np.full((20 + 4 * i, 30 - 2 * i, 3), (200, 10 * i, 40), np.uint8) for i in range(5)]
    sheet = draw_sheet(pictures, [f"number {i}\nsecond line" for i in range(5)])
    for i, picture in enumerate(pictures):
        rows, columns = np.nonzero((sheet == (200, 10 * i, 40)).all(-1))
        shown = sheet[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert np.array_equal(shown, picture)
    bare = draw_sheet(pictures, [""] * 5)
    assert sheet.shape[1] == bare.shape[1]
    assert sheet.shape[0] - bare.shape[0] == 2 * 20  # a second line under both rows


@pytest.mark.parametrize(("height", "width"), [(3, 6000), (6000, 2), (1, 1)])
def test_strips_keep_a_pixel_of_both_sides(height, width):
    strip = np.full((height, width, 3), 90, np.uint8)
    drawn = draw_instances(strip, [DrawnInstance((0, 0, 1, 1), 0, "a", np.ones((height, width), bool))], 480)
    assert sorted(drawn.shape[:2])[1] == 480
    assert min(drawn.shape[:2]) >= 1
