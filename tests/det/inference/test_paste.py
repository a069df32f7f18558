"""Masks encoded inside their boxes are, byte by byte, those that detectron2 pastes and pycocotools encodes, for boxes
anywhere and masks of any shape; and instances of a model become COCO results as in detectron2's own evaluator."""

import numpy as np
import pytest
import torch
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.layers.mask_ops import _do_paste_mask, paste_masks_in_image
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as rle

from det.inference.paste import coco_results, encode_masks


def encode_whole(pasted):
    """pycocotools' encoding of whole masks (N, H, W)."""
    encoded = [rle.encode(np.array(mask[:, :, None], order="F", dtype="uint8"))[0] for mask in pasted]
    return [{"size": item["size"], "counts": item["counts"].decode()} for item in encoded]


def paste_on_whole_image(masks, boxes, height, width):
    """What detectron2 does on a GPU: sample every pixel of the image."""
    return _do_paste_mask(masks[:, None], boxes, height, width, skip_empty=False)[0] >= 0.5


# Whole, half and quarter pixels, where rounding and ties are, and anything between.
coordinate = st.integers(-160, 320).map(lambda quarters: quarters / 4) | st.floats(-40, 80, width=32)
length = st.integers(1, 480).map(lambda quarters: quarters / 4) | st.floats(2**-6, 120, width=32)
side = st.integers(1, 60)


@st.composite
def masks(draw, count):
    """Noise, a blob, all of one value, or few values, most of which are on the threshold."""
    size = draw(st.sampled_from([1, 2, 7, 28]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["noise", "blob", "constant", "few"]))
    if kind == "noise":
        values = rng.random((count, size, size))
    elif kind == "blob":
        y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
        values = np.tile(1 / (1 + np.exp(10 * (x**2 + y**2 - rng.random()))), (count, 1, 1))
    elif kind == "constant":
        values = np.full((count, size, size), draw(st.sampled_from([0.0, 0.49999997, 0.5, 0.50000006, 1.0])))
    else:
        values = rng.choice([0.0, 0.5, 0.5, 0.5, 1.0], (count, size, size))
    return torch.tensor(values, dtype=torch.float32)


@settings(max_examples=400, deadline=None)
@given(st.data(), side, side)
def test_the_same_bytes_for_boxes_anywhere(data, height, width):
    x, y = data.draw(coordinate), data.draw(coordinate)
    box = torch.tensor([[x, y, x + data.draw(length), y + data.draw(length)]], dtype=torch.float32)
    mask = data.draw(masks(1))
    assert encode_masks(mask, box, height, width) == encode_whole(paste_on_whole_image(mask, box, height, width))


@settings(max_examples=200, deadline=None)
@given(st.data(), side, side, st.integers(1, 4))
def test_the_same_bytes_as_on_the_cpu_for_boxes_in_the_image(data, height, width, count):
    corners = torch.tensor(data.draw(st.lists(st.tuples(*[coordinate] * 4), min_size=count, max_size=count)))
    boxes = Boxes(torch.cat([corners[:, :2].minimum(corners[:, 2:]), corners[:, :2].maximum(corners[:, 2:])], dim=1))
    boxes.clip((height, width))
    boxes = boxes[boxes.nonempty()]
    if not len(boxes):
        return
    mask = data.draw(masks(len(boxes)))
    expected = encode_whole(paste_masks_in_image(mask, boxes, (height, width)))
    assert encode_masks(mask, boxes.tensor, height, width) == expected


@pytest.mark.parametrize("seed", range(3))
def test_the_same_bytes_on_an_image_of_usual_size(seed):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(40, 2, generator=generator) * torch.tensor([1200.0, 700.0])
    boxes = Boxes(torch.cat([corner, corner + 8 + torch.rand(40, 2, generator=generator) ** 3 * 1300], dim=1))
    boxes.clip((800, 1333))
    mask = torch.rand(40, 28, 28, generator=generator)
    mask[0] = 0.5
    expected = encode_whole(paste_masks_in_image(mask, boxes, (800, 1333)))
    assert encode_masks(mask, boxes.tensor, 800, 1333) == expected


@pytest.mark.parametrize("size", [3, 7, 28, 56])
def test_the_same_bytes_where_pixels_are_on_the_threshold_except_for_rounding(size):
    generator = torch.Generator().manual_seed(size)
    masks = torch.randint(0, 2, (16, size, size), generator=generator).float()  # 0.5 is halfway between two values
    corner = torch.randint(0, 100, (16, 2), generator=generator) + 0.5
    boxes = torch.cat([corner, corner + size * torch.randint(2, 10, (16, 2), generator=generator)], dim=1)
    expected = encode_whole(paste_masks_in_image(masks, boxes, (640, 640)))
    assert encode_masks(masks, boxes, 640, 640) == expected


def test_whole_image_left_half_and_nothing():
    full, left = torch.ones(1, 28, 28), torch.ones(1, 28, 28)
    left[:, :, 14:] = 0
    assert encode_masks(full, torch.tensor([[0.0, 0, 6, 4]]), 4, 6) == encode_whole(torch.ones(1, 4, 6))
    half = torch.zeros(1, 4, 6)
    half[:, :, :3] = 1
    assert encode_masks(left, torch.tensor([[0.0, 0, 6, 4]]), 4, 6) == encode_whole(half)
    assert encode_masks(full * 0, torch.tensor([[0.0, 0, 6, 4]]), 4, 6) == encode_whole(torch.zeros(1, 4, 6))
    assert encode_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), 4, 6) == []


def test_masks_that_fill_the_image_do_not_run_into_each_other():
    box = torch.tensor([[0.0, 0, 6, 4]]).repeat(3, 1)
    assert encode_masks(torch.ones(3, 28, 28), box, 4, 6) == encode_whole(torch.ones(3, 4, 6))


def test_masks_that_do_not_fit_into_memory_together(monkeypatch):
    masks = torch.rand(7, 28, 28, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[3.5, 2, 40.25, 30]]).repeat(7, 1) + torch.arange(7)[:, None]
    together = encode_masks(masks, boxes, 48, 64)
    for pixels in (1, 2500):
        monkeypatch.setattr("det.inference.paste.PIXELS_AT_ONCE", pixels)
        assert encode_masks(masks, boxes, 48, 64) == together


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_mask_that_is_not_finite_is_empty_and_spoils_no_other(value):
    masks, boxes = torch.ones(3, 28, 28), torch.tensor([[0.0, 0, 6, 4]]).repeat(3, 1)
    masks[1, 5, 7] = value
    expected = torch.ones(3, 4, 6)
    expected[1] = 0
    assert encode_masks(masks, boxes, 4, 6) == encode_whole(expected)


@pytest.mark.parametrize("box", [(2, 1, 2, 3), (1, 2, 3, 2), (2, 2, 2, 2), (-9, 0, -5, 4), (0, 9, 6, 12), (7, 0, 9, 4)])
def test_a_box_without_area_or_outside_the_image_is_an_empty_mask(box):
    encoded = encode_masks(torch.ones(1, 28, 28), torch.tensor([box], dtype=torch.float32), 4, 6)
    assert encoded == encode_whole(torch.zeros(1, 4, 6))


def test_a_box_that_is_all_but_empty_overflows_without_a_word():
    mask, box = torch.ones(1, 28, 28), torch.tensor([[0.0, 0, 1e-40, 4]])
    assert encode_masks(mask, box, 4, 6) == encode_whole(paste_on_whole_image(mask, box, 4, 6))


def test_half_precision_is_computed_in_float32():
    mask = torch.rand(3, 14, 14, generator=torch.Generator().manual_seed(0)).bfloat16()
    boxes = torch.tensor([[1.2, 2.4, 30.9, 20.1]]).repeat(3, 1)
    assert encode_masks(mask, boxes, 32, 48) == encode_masks(mask.float(), boxes, 32, 48)


@pytest.mark.parametrize("with_masks", [True, False])
def test_instances_become_results_as_in_detectron2(with_masks):
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(30, 2, generator=generator) * 90 - 10
    instances = Instances((64, 96))
    instances.pred_boxes = Boxes(torch.cat([corner, corner + torch.rand(30, 2, generator=generator) * 60], dim=1))
    instances.scores = torch.rand(30, generator=generator)
    instances.pred_classes = torch.randint(0, 3, (30,), generator=generator)
    if with_masks:
        instances.pred_masks = torch.rand(30, 1, 14, 14, generator=generator)
    boxes = instances.pred_boxes.tensor.clone()
    results = coco_results(instances, 7, 150, 200, [3, 5, 90])
    assert torch.equal(instances.pred_boxes.tensor, boxes)
    assert ("pred_masks" in instances.get_fields()) == with_masks

    expected = instances_to_coco_json(detector_postprocess(instances, 150, 200), 7)
    for result in expected:
        result["category_id"] = [3, 5, 90][result["category_id"]]
    assert results == expected
    assert 0 < len(results) < 30  # some boxes lie outside
