"""Masks are measured without drawing them; the numbers are those of pycocotools and of plain loops."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

from pycocotools import mask as coco_mask

from det.data.coco_masks import LARGEST_SIDE, decompress, measure_masks, polygon_fault

RECTANGLE = [2, 3, 8, 3, 8, 5, 2, 5]


def sizes(height, width, count=1):
    return np.array([[width, height]] * count, float)


def encode(bitmap):
    encoded = coco_mask.encode(np.asfortranarray(bitmap.astype(np.uint8)))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}


def plain_counts(bitmap):
    """Lengths of runs, column by column, first of zeros."""
    flat = bitmap.T.ravel()
    edges = np.flatnonzero(np.diff(flat.astype(int))) + 1
    counts = np.diff([0, *edges, flat.size]).tolist()
    return [0, *counts] if flat[0] else counts


@st.composite
def bitmaps(draw):
    height, width = draw(st.integers(1, 60)), draw(st.integers(1, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return rng.random((height, width)) < draw(st.sampled_from([0.01, 0.3, 0.9, 1.0]))


@given(st.lists(bitmaps(), min_size=1, max_size=5))
def test_run_lengths_are_read_as_pycocotools_reads_them(maps):
    encoded = [encode(bitmap) for bitmap in maps]
    runs, lengths = decompress([mask["counts"] for mask in encoded])
    expected = [plain_counts(bitmap) for bitmap in maps]
    assert [part.tolist() for part in np.split(runs, lengths.cumsum()[:-1])] == expected

    lists = [{"size": mask["size"], "counts": counts} for mask, counts in zip(encoded, expected, strict=True)]
    for masks in (encoded, lists):
        measured = measure_masks(masks, np.array([bitmap.shape[::-1] for bitmap in maps], float))
        for row, bitmap in enumerate(maps):
            if not bitmap.any():
                assert row in measured.faults["empty-mask"]
                continue
            x, y, w, h = coco_mask.toBbox(encoded[row])
            assert measured.extent[row].tolist() == [x, y, x + w, y + h]
            assert measured.area[row] == bitmap.sum()
        assert set(measured.faults) <= {"empty-mask"}


@pytest.mark.parametrize(
    ("mask", "kind", "text"),
    [
        ({"size": [5, 4], "counts": [10, 10]}, "rle-size", r"size 5x4, the image 4x5 (height x width)"),
        ({"size": [4, 5], "counts": [10, 9]}, "rle-counts", "counts sum up to 19, the size has 20 pixels"),
        ({"size": [4, 5], "counts": [30, -10]}, "rle-counts", "counts have a negative or huge number"),
        ({"size": [4, 5], "counts": [10**30, 20]}, "rle-counts", "counts have a negative or huge number"),
        ({"size": [4, 5], "counts": [10**400, 20]}, "rle-counts", "counts have a negative or huge number"),
        ({"size": [4, 5], "counts": [20]}, "empty-mask", ""),
        ({"size": [4, 5], "counts": []}, "rle-counts", "counts sum up to 0"),
        ({"size": [4, 5], "counts": "no run lengths"}, "rle-counts", "are no compressed run lengths"),
        ({"size": [4, 5], "counts": "PPP"}, "rle-counts", "are no compressed run lengths"),  # goes on after its end
        ({"size": [4, 5], "counts": "9" * 50}, "rle-counts", "counts"),
        ({"size": [4, 5], "counts": ""}, "rle-counts", "are no compressed run lengths"),
        ({"size": [4, 5], "counts": [10, 1.5]}, "bad-mask", "counts must be text or whole numbers"),
        ({"size": [4], "counts": [20]}, "bad-mask", "size must be [height, width], got [4]"),
        ({"counts": [20]}, "bad-mask", "needs counts and size"),
        ([1, 2, 3, 4, 5, 6], "bad-mask", "must be a list of polygons"),
        ([[RECTANGLE]], "bad-mask", "segmentation[0] must be numbers"),
        ([RECTANGLE, ["1"] * 6], "bad-mask", "segmentation[1] must be numbers, got ['1'"),
        ("mask", "bad-mask", "must be a list of polygons"),
        ([[]], "degenerate-polygon", "segmentation[0] must be x and y of at least 3 points, got 0 numbers"),
        (
            [RECTANGLE, [1, 1, 2, 2]],
            "degenerate-polygon",
            "segmentation[1] must be x and y of at least 3 points, got 4",
        ),
        ([RECTANGLE, [1, 1, 2, 2, 3, 3]], "degenerate-polygon", "segmentation[1] has no area"),
        ([[5, 5] * 4], "degenerate-polygon", "segmentation[0] has no area"),
        (
            [[0.1, 0.2, 0.3, 0.6, 0.7, 1.4]],
            "degenerate-polygon",
            "segmentation[0] has no area",
        ),  # a line, but for rounding
        ([RECTANGLE, [1, 1, 9, float("nan"), 3, 3]], "not-finite", "segmentation[1]"),
        ([[1, 1, 9, float("inf"), 3, 3]], "not-finite", "segmentation[0]"),
        ([[1, 1, 9, 10**400, 3, 3]], "not-finite", "segmentation[0]"),
        (None, "missing-mask", ""),
        ([], "missing-mask", ""),
        ({}, "missing-mask", ""),
    ],
)
def test_faults_are_told_apart_and_spare_their_neighbours(mask, kind, text):
    measured = measure_masks([[RECTANGLE], mask, [RECTANGLE]], sizes(4, 5, 3))
    assert list(measured.faults) == [kind]
    ((row, told),) = measured.faults[kind].items()
    assert (row, text in told) == (1, True)
    assert measured.area[[0, 2]].tolist() == [12, 12]


def test_a_mask_of_a_terabyte_is_refused_without_being_made():
    side = LARGEST_SIDE
    measured = measure_masks(
        [{"size": [side, side], "counts": [0, side**2]}, {"size": [2 * side, 1], "counts": "0"}], sizes(4, 5, 2)
    )
    assert sorted(measured.faults["rle-size"]) == [0, 1]
    unknown = measure_masks([{"size": [side, side], "counts": [0, side**2]}], np.full((1, 2), np.inf))
    assert unknown.area.tolist() == [side**2]


def test_polygons_are_measured_as_a_plain_loop_does(monkeypatch):
    monkeypatch.setattr("det.data.coco_masks.NUMBERS_AT_ONCE", 100)  # numbers: several groups
    rng = np.random.default_rng(0)
    masks = [
        [rng.uniform(0, 90, 2 * rng.integers(3, 12)).round(2).tolist() for _ in range(rng.integers(1, 4))]
        for _ in range(200)
    ]
    measured = measure_masks(masks, sizes(100, 100, len(masks)))
    for row in range(len(masks)):
        area = 0.0
        for polygon in masks[row]:
            points = list(zip(polygon[::2], polygon[1::2], strict=True))
            area += abs(sum(x * v - u * y for (x, y), (u, v) in zip(points, [*points[1:], points[0]], strict=True))) / 2
        xs = [x for polygon in masks[row] for x in polygon[::2]]
        ys = [y for polygon in masks[row] for y in polygon[1::2]]
        assert measured.area[row] == pytest.approx(area, rel=1e-9)
        assert measured.extent[row].tolist() == [min(xs), min(ys), max(xs), max(ys)]
    assert not measured.faults


@pytest.mark.parametrize("chunk", [1, 1 << 18])
def test_the_first_fault_of_a_polygon_names_its_number(monkeypatch, chunk):
    monkeypatch.setattr("det.data.coco_masks.NUMBERS_AT_ONCE", chunk)
    line, odd, endless = [1, 1, 2, 2, 3, 3], [*RECTANGLE, 1], [1, 1, 2, 2, np.inf, 3]
    masks = [[RECTANGLE], [RECTANGLE, odd, []], [line, RECTANGLE], [[1, 2, 3, 4]], [RECTANGLE, RECTANGLE, endless]]
    measured = measure_masks(masks, sizes(40, 40, len(masks)))
    assert measured.faults == {
        "degenerate-polygon": {
            1: "segmentation[1] must be x and y of at least 3 points, got 9 numbers",
            2: "segmentation[0] has no area",
            3: "segmentation[0] must be x and y of at least 3 points, got 4 numbers",
        },
        "not-finite": {4: "segmentation[2]"},
    }
    assert np.isnan(measured.area[:4]).tolist() == [False, False, False, True]


@pytest.fixture
def mixed():
    """60 sound masks of 30 x 40 pixels: polygons and run lengths in both forms, of very different lengths."""
    rng = np.random.default_rng(0)
    masks = []
    for _ in range(20):
        bitmap = rng.random((30, 40)) < rng.choice([0.01, 0.5])
        bitmap[3, 4] = True
        encoded = encode(bitmap)
        polygon = rng.uniform(0, 30, 2 * rng.integers(3, 40)).tolist()
        masks += [encoded, {"size": encoded["size"], "counts": plain_counts(bitmap)}, [polygon, polygon[:6]]]
    return masks


@pytest.mark.parametrize("chunk", [1, 50, 1000])
def test_masks_are_the_same_however_many_are_measured_together(monkeypatch, mixed, chunk):
    mixed[20:24] = [{"size": [30, 40], "counts": [7]}, [[1, 1, 2, 2]], {"size": [30, 40], "counts": "?"}, None]
    expected = measure_masks(mixed, sizes(30, 40, len(mixed)))
    monkeypatch.setattr("det.data.coco_masks.NUMBERS_AT_ONCE", chunk)
    measured = measure_masks(mixed, sizes(30, 40, len(mixed)))
    assert np.array_equal(measured.extent, expected.extent, equal_nan=True)
    assert np.array_equal(measured.area, expected.area, equal_nan=True)
    assert measured.faults == expected.faults
    assert {kind: sorted(rows) for kind, rows in expected.faults.items()} == {
        "missing-mask": [23], "degenerate-polygon": [21], "rle-counts": [20, 22]
    }  # fmt: skip


@pytest.mark.parametrize("form", [0, 1, 2])
def test_ten_times_the_masks_do_not_take_ten_times_the_memory(monkeypatch, mixed, form):
    monkeypatch.setattr("det.data.coco_masks.NUMBERS_AT_ONCE", 3000)

    def peak(masks):
        where = sizes(30, 40, len(masks))
        tracemalloc.start()
        measure_masks(masks, where)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    masks = mixed[form::3]
    peak(masks)  # what is made once
    assert peak(masks * 50) < 2 * peak(masks * 5)


def test_a_polygon_that_crosses_itself_into_equal_halves_is_no_line():
    bow_tie = [0, 0, 8, 8, 8, 0, 0, 8]
    assert polygon_fault(bow_tie) == ""
    assert not measure_masks([[bow_tie]], sizes(9, 9)).faults


def test_masks_of_an_image_of_unknown_size_are_measured():
    measured = measure_masks([{"size": [4, 5], "counts": [4, 4, 12]}], np.full((1, 2), np.inf))
    assert measured.extent.tolist() == [[1, 0, 2, 4]]
    assert not measured.faults
