"""Inverted masks, masks of whole images, and rectangles of two points are named."""

import numpy as np
import pytest

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

from pycocotools import mask as coco_mask

from det.data.coco_checks import find_faults
from det.data.tidy import Tidy

BOXES = [(4, 6, 20, 12), (50, 10, 24, 30), (8, 40, 16, 16), (70, 44, 20, 10)]


def bitmap(x, y, w, h):
    found = np.zeros((64, 96), np.uint8)
    found[y : y + h, x : x + w] = 1
    return found


def encode(mask, compressed):
    if compressed:
        return {"size": [64, 96], "counts": coco_mask.encode(np.asfortranarray(mask))["counts"].decode()}
    flat = mask.ravel(order="F").astype(int)
    ends = [0, *(np.flatnonzero(np.diff(flat)) + 1).tolist(), flat.size]
    return {"size": [64, 96], "counts": [0] * int(flat[0]) + np.diff(ends).tolist()}


def find(change, chosen=lambda at: True):
    """Faults of twelve images with four rectangles each, whose masks are changed."""
    images = [{"id": at + 1, "file_name": f"{at}.png", "width": 96, "height": 64} for at in range(12)]
    annotations = []
    for at in range(48):
        x, y, w, h = BOXES[at % 4]
        sound = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        entry = {"id": at + 1, "image_id": at // 4 + 1, "category_id": 1, "bbox": [x, y, w, h], "area": w * h}
        mask = change(x, y, w, h) if chosen(at) else sound
        annotations.append({**entry, "iscrowd": 0, "segmentation": mask})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}
    tidied = Tidy(content, content, {}, frozenset(), {}, {}, {}, columns=None)
    findings = find_faults(tidied, None, for_evaluation=True, masks=True)
    return {
        one.kind.name: (len(one.positions), one.places()[0]) for one in findings if one.kind.name != "area-mismatch"
    }


@pytest.mark.parametrize("compressed", [True, False])
def test_inverted_run_lengths_are_named(compressed):
    count, note = find(lambda *box: encode(1 - bitmap(*box), compressed))["misfit-masks"]
    assert count == 48
    assert "its mask fits its box when its mask is inverted" in note
    assert find(lambda *box: encode(bitmap(*box), compressed)) == {}


def test_masks_of_whole_images_are_named():
    count, note = find(lambda *box: encode(np.ones((64, 96), np.uint8), True))["misfit-masks"]
    assert count == 48
    assert "its mask covers the whole image" in note
    assert "misfit-masks" not in find(lambda *box: encode(np.ones((64, 96), np.uint8), True), lambda at: at < 3)


def test_rectangles_of_two_points_are_named():
    found = find(lambda x, y, w, h: [[x + w, y, x, y + h]])
    assert set(found) == {"misfit-masks"}
    assert "only two corners of its box" in found["misfit-masks"][1]
    assert set(find(lambda x, y, w, h: [[x, y, x + w, y + h]], lambda at: at < 2)) == {"degenerate-polygon"}
