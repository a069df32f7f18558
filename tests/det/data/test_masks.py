"""Masks become the pixels that pycocotools fills, inside the image and over its edges; what is no mask is named."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

import detectron2.data.transforms as T
import torch
from detectron2.structures import BitMasks, PolygonMasks

from det.data.masks import (
    any_along,
    clip,
    clip_polygons,
    decode_part,
    decode_segmentation,
    moved_masks,
    rasterize,
    tight_boxes,
)

HEIGHT, WIDTH, MARGIN = 30, 40, 50
SAME = T.TransformList([T.CropTransform(0, 0, WIDTH, HEIGHT)])
BOW_TIE = [[2, 2, 30, 25, 30, 2, 2, 25]]
KEYHOLE = [[2, 2, 32, 2, 32, 26, 2, 26, 2, 14, 12, 14, 12, 20, 22, 20, 22, 8, 12, 8, 12, 14, 2, 14]]  # a ring, cut open


def fill(polygons, height, width):
    flat = [np.reshape(polygon, -1).tolist() for polygon in polygons]
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(flat, height, width))).astype(bool)


coordinate = st.floats(-MARGIN + 1, MARGIN - 1, allow_nan=False)
polygon = st.lists(st.tuples(coordinate, coordinate), min_size=3, max_size=7).map(np.array)


@settings(max_examples=200, deadline=None)
@given(st.lists(polygon, min_size=1, max_size=3))
def test_filled_pixels_are_those_of_a_larger_image_cropped(polygons):
    """On any side of the image, crossing themselves or not."""
    mask = np.zeros((HEIGHT, WIDTH), bool)
    rasterize(polygons, mask)
    whole = fill([points + MARGIN for points in polygons], HEIGHT + 2 * MARGIN, WIDTH + 2 * MARGIN)
    different = mask ^ whole[MARGIN : MARGIN + HEIGHT, MARGIN : MARGIN + WIDTH]
    assert different.sum() <= 4  # pycocotools rounds where an edge is right between two rows


@pytest.mark.parametrize("polygons", [BOW_TIE, KEYHOLE])
def test_bitmasks_keep_parts_and_holes_that_polygons_lose(polygons):
    expected = fill(polygons, HEIGHT, WIDTH)
    bits = moved_masks([polygons], (HEIGHT, WIDTH), SAME, (HEIGHT, WIDTH), "bitmask")
    np.testing.assert_array_equal(bits.tensor[0].numpy(), expected)
    cut = moved_masks([polygons], (HEIGHT, WIDTH), SAME, (HEIGHT, WIDTH), "polygon")
    filled = BitMasks.from_polygon_masks(cut, HEIGHT, WIDTH).tensor[0].numpy()
    assert (filled ^ expected).sum() > 100  # what the docstring warns of


@pytest.mark.parametrize("form", ["bitmask", "polygon"])
def test_no_objects(form):
    masks = moved_masks([], (HEIGHT, WIDTH), SAME, (HEIGHT, WIDTH), form)
    assert len(masks) == 0
    assert tight_boxes(masks).tensor.shape == (0, 4)


@pytest.mark.parametrize(
    ("mask", "form", "message"),
    [
        (None, "bitmask", "object 1 has no mask"),
        ([], "polygon", "object 1 has no mask"),
        ({"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}, "polygon", "object 1 is no polygon"),
        (np.ones((HEIGHT, WIDTH)), "polygon", "object 1 is no polygon"),
        (np.ones((5, 6)), "bitmask", r"array of \[5, 6\] on an image of \[30, 40\]"),
        ({"size": [5, 6], "counts": [30]}, "bitmask", r"RLE of size \[5, 6\] on an image of \[30, 40\]"),
        ({"counts": [25]}, "bitmask", "expected polygons or an RLE, received dict"),
        ("text", "bitmask", "received str"),
    ],
)
def test_what_can_not_be_used_is_refused(mask, form, message):
    with pytest.raises(ValueError, match=message):
        moved_masks([BOW_TIE, mask], (HEIGHT, WIDTH), SAME, (HEIGHT, WIDTH), form)


def test_tight_boxes_are_detectron2s():
    masks = torch.from_numpy(np.random.default_rng(0).random((6, 20, 30)) > 0.995)
    masks[2] = False
    np.testing.assert_array_equal(tight_boxes(BitMasks(masks)).tensor, BitMasks(masks).get_bounding_boxes().tensor)
    polygons = PolygonMasks([[np.array([1.0, 2, 8, 3, 5, 9])], []])
    assert tight_boxes(polygons).nonempty().tolist() == [True, False]
    for dim in range(3):
        np.testing.assert_array_equal(any_along(masks, dim), masks.any(dim=dim))


def rectangle():
    """Rows 5-17, columns 10-30."""
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[5:18, 10:31] = True
    return mask


def encodings():
    flat = rectangle().flatten(order="F")
    changes = np.flatnonzero(np.diff(flat.astype(int))) + 1
    counts = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    rle = coco_mask.encode(np.asfortranarray(rectangle().astype(np.uint8)))
    return {
        "polygon": [[10, 5, 31, 5, 31, 18, 10, 18]],
        "RLE": rle,
        "RLE as text": {"size": rle["size"], "counts": rle["counts"].decode()},
        "uncompressed RLE": {"size": [HEIGHT, WIDTH], "counts": counts},
    }


@pytest.mark.parametrize("kind", ["polygon", "RLE", "RLE as text", "uncompressed RLE"])
def test_every_coco_encoding_decodes_to_the_same_mask(kind):
    assert np.array_equal(decode_segmentation(encodings()[kind], HEIGHT, WIDTH), rectangle())


@settings(max_examples=30, deadline=None)
@given(polygon.filter(lambda points: (points > -MARGIN + 10).all()))
def test_polygons_near_the_image_stay_the_same_array(points):
    assert clip(points, HEIGHT, WIDTH) is points
    flat = [points.reshape(-1).tolist()]
    assert clip_polygons(flat, HEIGHT, WIDTH) is flat


far = st.floats(-600, 600, allow_nan=False)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(far, far), min_size=3, max_size=7).map(np.array))
def test_far_polygons_keep_their_pixels_in_the_image(points):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    rasterize([clip(points, HEIGHT, WIDTH)], mask)
    whole = fill([points + 600], HEIGHT + 1200, WIDTH + 1200)[600 : 600 + HEIGHT, 600 : 600 + WIDTH]
    assert (mask ^ whole).sum() <= 40  # an edge across the image is rounded elsewhere
    border = clip(points, HEIGHT, WIDTH)
    assert (border >= -WIDTH).all()
    assert (border <= [2 * WIDTH, HEIGHT + WIDTH]).all()


@pytest.mark.parametrize("vertex", [(20000, 20000), (2e8, 3.5e8), (-1e300, 1e300)])
def test_a_vertex_far_away_costs_nothing(vertex):
    """Without clipping, libraries crash or take gigabytes."""
    mask = [[6, 10, *vertex, 36, 22, 6, 22]]
    decoded = decode_segmentation(mask, HEIGHT, WIDTH)
    doubled = T.TransformList([T.ResizeTransform(HEIGHT, WIDTH, 2 * HEIGHT, 2 * WIDTH)])
    bits = moved_masks([mask], (HEIGHT, WIDTH), doubled, (2 * HEIGHT, 2 * WIDTH), "bitmask").tensor
    assert decoded.any()
    assert bits.any()
    polygons = moved_masks([mask], (HEIGHT, WIDTH), doubled, (2 * HEIGHT, 2 * WIDTH), "polygon")
    assert polygons.crop_and_resize(torch.tensor([[12.0, 20.0, 72.0, 44.0]]), 28).any()


def test_a_polygon_that_is_only_far_away_becomes_a_point():
    mask = [[500, 500, 900, 500, 900, 900]]
    assert not decode_segmentation(mask, HEIGHT, WIDTH).any()
    assert not moved_masks([mask], (HEIGHT, WIDTH), SAME, (HEIGHT, WIDTH), "bitmask").tensor.any()
    assert len(moved_masks([mask], (HEIGHT, WIDTH), SAME, (HEIGHT, WIDTH), "polygon")) == 1


def augmentation(rng, height, width):
    """Some flips, crops and changes of size, and the size at the end."""
    transforms = []
    for kind in rng.integers(4, size=rng.integers(4)):
        if kind == 2:
            top, left = rng.integers(0, height // 2 + 1), rng.integers(0, width // 2 + 1)
            new = int(rng.integers(1, height - top + 1)), int(rng.integers(1, width - left + 1))
            transforms.append(T.CropTransform(left, top, new[1], new[0]))
            height, width = new
        elif kind == 3:
            new = rng.integers(1, 120, 2).tolist()
            transforms.append(T.ResizeTransform(height, width, *new))
            height, width = new
        else:
            transforms.append([T.HFlipTransform(width), T.VFlipTransform(height)][kind])
    return T.TransformList([*transforms, T.NoOpTransform()]), (height, width)


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("form", ["text", "bytes", "list"])
def test_run_lengths_are_moved_in_their_box_as_if_in_the_whole_image(form):
    for seed in range(60):
        rng = np.random.default_rng(seed)
        size = rng.integers(5, 90, 2)
        top, left = rng.integers(0, size)
        mask = np.zeros(size, bool)
        mask[top : top + 30, left : left + 40] = rng.random((min(30, size[0] - top), min(40, size[1] - left))) < 0.7
        rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        if form == "list":
            flat = mask.ravel(order="F")
            rle["counts"] = np.diff([0, *(np.flatnonzero(np.diff(flat.astype(int))) + 1), flat.size]).tolist()
            rle["counts"] = [0, *rle["counts"]] if flat[0] else rle["counts"]
        elif form == "text":
            rle["counts"] = rle["counts"].decode()
        transforms, new_size = augmentation(rng, *size.tolist())
        bits = moved_masks([rle], tuple(size), transforms, new_size, "bitmask").tensor[0].numpy()
        np.testing.assert_array_equal(bits, transforms.apply_segmentation(mask.astype(np.uint8)).astype(bool))
    assert decode_part({"size": [4, 3], "counts": [5, 2, 5]})[:2] == (1, 1)
    assert decode_part({"size": [4, 3], "counts": [12]}) is None
    assert decode_part({"size": [4, 3], "counts": [5, 2, 4]}) is None
