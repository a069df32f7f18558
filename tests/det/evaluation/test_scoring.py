"""Scores are pycocotools' and LVIS's own, to the last bit: all numbers and every array, on a sample of COCO and on
made-up detections with crowd regions, ties, images without objects or detections, and more detections than count."""

import contextlib
import copy
import functools
import io
import json
import logging
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from crossmae.errors import UserError
from det.evaluation.scoring import find_hotcoco, score_results

SAMPLE = Path(__file__).parents[4] / "shared/coco_sample"
SIDE = 160  # pixels of the made-up images
EVALUATORS = ["hotcoco", "pycocotools"]


@pytest.fixture(params=EVALUATORS)
def evaluator(request):
    """Each of them, the fast one where it is installed."""
    if request.param == "hotcoco":
        pytest.importorskip("hotcoco")
    return request.param


def ellipse(box):
    """RLE of the ellipse in a box."""
    x, y, w, h = box
    rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    inside = ((columns - x) / w * 2 - 1) ** 2 + ((rows - y) / h * 2 - 1) ** 2 <= 1
    encoded = rle.encode(np.asfortranarray(inside, np.uint8))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def polygon(box):
    x, y, w, h = box
    return [[x, y, x + w, y, x + w, y + h / 2, x + w / 2, y + h]]


@functools.cache
def made_up(seed, lvis=False):
    """A ground truth and detections of it, some good, some not."""
    rng = np.random.default_rng(seed)
    categories = [{"id": 3 * index + 1, "name": f"class {index}"} for index in range(6)]
    ids = [category["id"] for category in categories]
    truth, results = {"images": [], "annotations": [], "categories": categories[::-1]}, []
    for place, image in enumerate(rng.permutation(16) + 1):
        truth["images"].append({"id": int(image), "file_name": f"{image}.jpg", "height": SIDE, "width": SIDE})
        objects = 0 if rng.random() < 0.15 else rng.integers(1, 12)
        for _ in range(objects):
            truth["annotations"].append(made_up_object(rng, truth, int(image), ids[:-1], crowd=0.0 if lvis else 0.15))
        count = 350 * bool(objects) if place < 2 else 0 if rng.random() < 0.15 else rng.integers(1, 40)
        there = truth["annotations"][len(truth["annotations"]) - objects :]
        results += [made_up_detection(rng, int(image), there, ids) for _ in range(count)]
    if lvis:
        for index, category in enumerate(categories):
            category["frequency"] = "rcf"[index % 3]
        for image in truth["images"]:
            image["neg_category_ids"] = [number for number in ids if rng.random() < 0.4]
            image["not_exhaustive_category_ids"] = [number for number in ids if rng.random() < 0.2]
        for annotation in truth["annotations"]:
            del annotation["iscrowd"]
    return truth, [results[index] for index in rng.permutation(len(results))]


def made_up_box(rng):
    sides = rng.uniform(4, 0.9 * SIDE) * rng.uniform(0.6, 1, 2)
    return [float(value) for value in np.round([*rng.uniform(0, SIDE - sides), *sides], rng.integers(0, 4))]


def made_up_object(rng, truth, image, ids, crowd):
    box = made_up_box(rng)
    is_crowd = rng.random() < crowd
    return {
        "id": len(truth["annotations"]) + 1, "image_id": image, "category_id": int(rng.choice(ids)), "bbox": box,
        "area": 0.9 * box[2] * box[3], "iscrowd": int(is_crowd),
        "segmentation": ellipse(box) if is_crowd or rng.random() < 0.5 else polygon(box),
    }  # fmt: skip


def made_up_detection(rng, image, objects, ids):
    """An object again, moved or not, of its category or another; or anything."""
    box, category = made_up_box(rng), int(rng.choice(ids))
    if objects and rng.random() < 0.6:
        chosen = objects[rng.integers(len(objects))]
        category = chosen["category_id"] if rng.random() < 0.8 else category
        x, y, w, h = chosen["bbox"]
        moved = np.array([x, y, w, h]) + rng.integers(0, 2) * rng.normal(0, 0.08, 4) * [w, h, w, h]
        box = [*moved[:2].tolist(), *np.maximum(moved[2:], 1).tolist()]
    score = float(np.round(rng.random(), rng.choice([1, 2, 6])))  # of one decimal: ties
    shape = {"bbox": box, "segmentation": ellipse(box)}
    return {"image_id": image, "category_id": category, "score": score, **shape}


@functools.cache
def by_pycocotools(seed, task):
    return reference(*made_up(seed), task)


def reference(truth, results, task):
    """The reference: pycocotools, called as its own demo does."""
    if task == "segm":
        results = [{key: value for key, value in result.items() if key != "bbox"} for result in results]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(truth)
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(copy.deepcopy(results)), task)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


NAMES = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]


@pytest.mark.parametrize("task", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(3))
def test_all_numbers_and_arrays_are_those_of_pycocotools(seed, task, evaluator):
    truth, results = made_up(seed)
    given = copy.deepcopy((truth, results))
    scores = score_results(truth, results, task, evaluator)
    assert (truth, results) == given
    expected = by_pycocotools(seed, task)
    assert np.array_equal(scores.precision, expected.eval["precision"])
    assert np.array_equal(scores.recall, expected.eval["recall"])
    assert np.array_equal(scores.thresholds, expected.eval["scores"])
    assert scores.numbers() == dict(zip(NAMES, (expected.stats * 100).tolist(), strict=True))
    assert max(np.bincount([result["image_id"] for result in results])) > 100
    assert 0 < scores.numbers()["AP"] < 100


@pytest.mark.filterwarnings("ignore:The 'warn' method is deprecated")  # lvis calls it
@pytest.mark.parametrize("task", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(2))
def test_all_numbers_and_arrays_are_those_of_lvis(seed, task, evaluator, tmp_path, monkeypatch):
    reference = pytest.importorskip("lvis")
    monkeypatch.setattr(np, "float", float, raising=False)  # which it calls, and numpy has no more
    truth, results = made_up(seed, lvis=True)
    scores = score_results(truth, results, task, evaluator, lvis=True)

    (tmp_path / "truth.json").write_text(json.dumps(truth))
    content = reference.LVIS(str(tmp_path / "truth.json"))
    slim = [{k: v for k, v in result.items() if task == "bbox" or k != "bbox"} for result in results]
    expected = reference.LVISEval(content, reference.LVISResults(content, slim, max_dets=300), task)
    expected.run()
    assert np.array_equal(scores.precision[..., 0], expected.eval["precision"])
    assert np.array_equal(scores.recall[..., 0], expected.eval["recall"])
    numbers = {key.replace("s@300", "s").replace("m@300", "m").replace("l@300", "l").replace("@", ""): value
               for key, value in expected.results.items()}  # fmt: skip
    assert scores.numbers() == {key: float(value) * 100 for key, value in numbers.items()}
    assert max(np.bincount([result["image_id"] for result in results])) > 300
    assert {"APr", "APc", "APf"} <= set(numbers)


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_the_sample_of_coco(task, evaluator):
    if not SAMPLE.is_dir():
        pytest.skip("../shared/coco_sample is not there")
    expected = next(line for line in (SAMPLE / "README.md").read_text().splitlines() if line.startswith(task))
    truth = json.loads((SAMPLE / "instances_val2014_100.json").read_text())
    results = json.loads((SAMPLE / f"instances_val2014_fake{task}100_results.json").read_text())
    numbers = score_results(truth, results, task, evaluator).numbers()
    assert [f"{value / 100:.6f}" for value in numbers.values()] == expected.split()[1:]


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_ids_of_any_size_are_told_apart(task):
    """A file may have ids of 64 bits, which float64 would round to one number."""
    truth, results = made_up(0)
    expected = score_results(truth, results, task, "hotcoco")
    for key, where in (("image_id", "images"), ("category_id", "categories")):
        large = {entry["id"]: 2**60 + entry["id"] for entry in truth[where]}
        others = ("images", "categories", "annotations")
        moved = {name: [_renumbered(one, key, large, name == where) for one in truth[name]] for name in others}
        found = [_renumbered(one, key, large, False) for one in results]
        scores = score_results(moved, found, task, "hotcoco")
        assert np.array_equal(scores.precision, expected.precision)


def _renumbered(entry, key, large, is_defined):
    key = "id" if is_defined else key
    return {**entry, key: large[entry[key]]} if key in entry else entry


def test_classes_count_their_objects_and_have_an_ap_of_their_own(evaluator):
    truth, results = made_up(1)
    scores = score_results(truth, results, "bbox", evaluator)
    assert scores.names == tuple(f"class {index}" for index in range(6))
    for index, row in enumerate(scores.by_class()):
        category = 3 * index + 1
        alone = {**truth, "annotations": [a for a in truth["annotations"] if a["category_id"] == category]}
        real = [annotation for annotation in alone["annotations"] if not annotation["iscrowd"]]
        assert scores.objects[index] == len(real)
        if not real:
            assert math.isnan(row["AP"])
            assert math.isnan(row["AP50"])
            continue
        found = [result for result in results if result["category_id"] == category]
        numbers = score_results(alone, found, "bbox", evaluator).numbers()
        assert row == {"AP": pytest.approx(numbers["AP"], abs=1e-12), "AP50": pytest.approx(numbers["AP50"], abs=1e-12)}
    assert not scores.objects[-1]


@pytest.mark.parametrize("lvis", [False, True])
def test_finding_nothing_is_zero_where_there_is_something_to_find(evaluator, lvis):
    truth, _ = made_up(0, lvis)
    numbers = score_results(truth, [], "segm", evaluator, lvis).numbers()
    assert {value for value in numbers.values() if not math.isnan(value)} == {0}
    nothing = score_results({**truth, "annotations": []}, [], "bbox", evaluator, lvis)
    assert all(math.isnan(value) for value in nothing.numbers().values())
    assert nothing.objects == (0,) * 6


def test_lvis_needs_its_own_keys():
    truth, results = made_up(0)
    with pytest.raises(UserError, match=r"images\[0\] has no 'neg_category_ids'"):
        score_results(truth, results, "bbox", lvis=True)


def test_without_hotcoco_pycocotools_scores_and_says_so(monkeypatch, caplog):
    find_hotcoco.cache_clear()
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    caplog.set_level(logging.INFO)
    assert find_hotcoco("auto") is None
    assert "evaluating with pycocotools" in caplog.text
    with pytest.raises(UserError, match=r"TEST\.EVALUATOR: hotcoco is not installed. Run: pip install hotcoco"):
        find_hotcoco("hotcoco")
    truth, results = made_up(0)
    numbers = score_results(truth, results, "bbox").numbers()
    assert caplog.text.count("evaluating with pycocotools") == 1
    monkeypatch.undo()
    find_hotcoco.cache_clear()
    assert numbers == score_results(truth, results, "bbox").numbers()


@pytest.mark.parametrize("evaluator", ["hotcoco", "pycocotools"])
@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_what_is_not_compared_may_be_anything(task, evaluator):
    """Licences as text, numbers for super-categories, scores and key points of objects: hotcoco would refuse them."""
    truth, results = made_up(0)
    dirty = {
        "info": 3,
        "images": [{**one, "license": "CC-BY", "date_captured": 7} for one in truth["images"]],
        "categories": [{**one, "supercategory": 5} for one in truth["categories"]],
        "annotations": [{**one, "score": "high", "keypoints": "none"} for one in truth["annotations"]],
    }
    expected, found = (score_results(content, results, task, evaluator) for content in (truth, dirty))
    np.testing.assert_array_equal(found.precision, expected.precision)


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_more_detections_of_an_image_are_counted_on_demand(task, evaluator):
    boxes = [[8 * (n % 15), 8 * (n // 15), 6, 6] for n in range(150)]
    shapes = [{"image_id": 1, "category_id": 1, "bbox": box, "segmentation": polygon(box)} for box in boxes]
    truth = {
        "images": [{"id": 1, "width": 128, "height": 128}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [{**shape, "id": n, "area": 36, "iscrowd": 0} for n, shape in enumerate(shapes, 1)],
    }
    results = [{**shape, "score": 1 - n / 1000} for n, shape in enumerate(shapes)]
    if task == "segm":
        results = [{**one, "segmentation": encode_polygon(one["segmentation"])} for one in results]
    usual, more = (score_results(truth, results, task, evaluator, max_dets=limit).numbers() for limit in (100, 150))
    assert (usual["AR100"], more["AR150"], more["AP"]) == (pytest.approx(100 / 1.5), 100, 100)
    assert usual["AP"] < 70
    assert (more["AR1"], more["AR10"]) == (usual["AR1"], usual["AR10"])


def encode_polygon(polygons):
    encoded = rle.merge(rle.frPyObjects(polygons, 128, 128))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def test_a_true_polygon_with_a_vertex_far_away_is_scored(evaluator):
    truth, results = copy.deepcopy(made_up(0))
    polygons = [one for one in truth["annotations"] if isinstance(one["segmentation"], list)]
    polygons[0]["segmentation"][0][:2] = [2e8, 3.5e8]
    assert 0 < score_results(truth, results, "segm", evaluator).numbers()["AP"] < 100
