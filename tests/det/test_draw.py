"""Drawn instances are where COCO says, in the colour of their class; the rest of the image is untouched."""

from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from det.draw import Instance, class_color, decode_segmentation, draw_instances, instances_from_coco

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


def encodings() -> dict[str, object]:
    mask = rectangle()
    flat = mask.flatten(order="F")
    changes = np.flatnonzero(np.diff(flat.astype(int))) + 1
    counts = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {
        "polygon": [[30, 25, 51, 25, 51, 38, 30, 38]],
        "RLE": rle,
        "RLE as text": {"size": rle["size"], "counts": rle["counts"].decode()},
        "uncompressed RLE": {"size": [HEIGHT, WIDTH], "counts": counts},
    }


@pytest.mark.parametrize("kind", ["polygon", "RLE", "RLE as text", "uncompressed RLE"])
def test_every_coco_encoding_decodes_to_the_same_mask(kind: str):
    assert np.array_equal(decode_segmentation(encodings()[kind], HEIGHT, WIDTH), rectangle())


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [5, 5], "counts": [25]}, r"size \[5, 5\] on an image of \[60, 80\]"),
        ({"counts": [25]}, "expected polygons or an RLE, received dict"),
        ("abc", "received str"),
    ],
)
def test_wrong_segmentation(segmentation: object, message: str):
    with pytest.raises(ValueError, match=message):
        decode_segmentation(segmentation, HEIGHT, WIDTH)


def test_instances_from_coco():
    entries = [
        {"category_id": 7, "bbox": BOX, "score": 0.25},
        {"category_id": 3, "bbox": BOX, "segmentation": encodings()["RLE"]},
    ]
    dog, cat = instances_from_coco(entries, NAMES, HEIGHT, WIDTH)
    assert (dog.class_index, dog.name, dog.score, dog.mask, dog.box) == (1, "dog", 0.25, None, BOX)
    assert (cat.class_index, cat.name, cat.score) == (0, "cat", None)
    assert cat.mask is not None
    assert np.array_equal(cat.mask, rectangle())


def test_wrong_annotations_are_named():
    with pytest.raises(ValueError, match=r"category_id 5 is none of \[3, 7\]"):
        instances_from_coco([{"category_id": 5, "bbox": BOX}], NAMES, HEIGHT, WIDTH)
    with pytest.raises(ValueError, match=r"no \['bbox'\], only \['category_id'\]"):
        instances_from_coco([{"category_id": 3}], NAMES, HEIGHT, WIDTH)


def test_mask_tints_its_inside_and_nothing_outside_changes():
    image = photo()
    drawn = draw_instances(image, [Instance(BOX, 1, "", rectangle())])
    inside = (slice(29, 34), slice(40, 47))  # clear of outline, box and label
    expected = 0.65 * image[inside] + 0.35 * np.array(class_color(1))
    assert np.abs(drawn[inside] - expected).max() <= 1.5
    assert np.array_equal(drawn[:, 55:], image[:, 55:])
    assert np.array_equal(drawn[42:], image[42:])
    assert np.array_equal(drawn[:, :28], image[:, :28])


@pytest.mark.parametrize("score", [None, 0.9])
def test_box_has_the_color_of_its_class_in_truth_and_prediction(score: float | None):
    drawn = draw_instances(photo(), [Instance(BOX, 4, "x", score=score)])
    assert tuple(drawn[38, 45]) == class_color(4)  # bottom edge
    assert tuple(drawn[34, 51]) == class_color(4)  # right edge
    assert len({class_color(i) for i in range(10)}) == 10
    assert class_color(13) == class_color(3)


def test_score_is_written():
    image = photo()
    without, low, high = (draw_instances(image, [Instance(BOX, 0, "x", score=s)]) for s in (None, 0.11, 0.99))
    assert not np.array_equal(without, low)
    assert not np.array_equal(low, high)


def test_small_object_is_drawn_over_a_large_one_in_any_order():
    small = Instance((40.0, 30.0, 8.0, 6.0), 2, "s")
    large = Instance((5.0, 5.0, 70.0, 50.0), 3, "l", np.ones((HEIGHT, WIDTH), bool))
    drawn = draw_instances(photo(), [small, large])
    assert np.array_equal(drawn, draw_instances(photo(), [large, small]))
    assert tuple(drawn[36, 44]) == class_color(2)


def test_labels_stay_inside_the_picture():
    corner = Instance((76.0, 0.0, 4.0, 4.0), 0, "long name", score=1.0)
    drawn = draw_instances(np.zeros((HEIGHT, WIDTH, 3), np.uint8), [corner])
    tag = (drawn == class_color(0)).all(-1)
    assert tag[:8, 40:].sum() > 60  # the tag is there, moved left of the box's corner
    assert drawn.shape == (HEIGHT, WIDTH, 3)


def test_input_is_not_changed_and_no_instances_means_no_change():
    image = photo()
    before = image.copy()
    draw_instances(image, [Instance(BOX, 0, "x", rectangle(), 0.5)])
    assert np.array_equal(image, before)
    assert np.array_equal(draw_instances(image, []), image)


def test_enlarged_mask_keeps_its_place_and_area():
    black = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    drawn = draw_instances(black, [Instance((0.0, 0.0, 1.0, 1.0), 0, "", rectangle())], longest_side=4 * WIDTH)
    assert drawn.shape == (4 * HEIGHT, 4 * WIDTH, 3)
    below_tag = np.arange(4 * HEIGHT)[:, None] >= 60  # the tag of the tiny box
    painted = np.argwhere(drawn.any(-1) & below_tag)
    assert np.abs(painted.min(0) - [100, 120]).max() <= 2
    assert np.abs(painted.max(0) - [151, 203]).max() <= 2


def test_wrong_images_and_masks_are_refused():
    with pytest.raises(ValueError, match=r"expected \(H, W, 3\) uint8, received \(60, 80\)"):
        draw_instances(photo()[..., 0], [])
    with pytest.raises(ValueError, match="float"):
        draw_instances(photo().astype(np.float32), [])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mask of \(5, 5\) on an image of \(60, 80\)"):
        draw_instances(photo(), [Instance(BOX, 0, "x", np.ones((5, 5), bool))])
