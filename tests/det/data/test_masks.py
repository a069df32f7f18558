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

from det.data.masks import any_along, decode_segmentation, moved_masks, rasterize, tight_boxes

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
