"""The bootstrap agrees with pycocotools on every resampling, pairs the detectors, and depends on its seed only."""

import numpy as np
import pytest

from det.evaluation.resampling import average_precision, bootstrap_difference, match_detections
from tests.det.evaluation.test_scoring import made_up, reference

TASKS = ["bbox", "segm"]


def matches(seed, task):
    return match_detections(*made_up(seed), task)


def repeated(truth, results, weights):
    """The data set in which image i occurs `weights[i]` times, under new ids, by ascending id of the image."""
    whole, found = {"images": [], "annotations": [], "categories": truth["categories"]}, []
    for image, weight in zip(sorted(truth["images"], key=lambda image: image["id"]), weights, strict=True):
        for _ in range(weight):
            new = len(whole["images"]) + 1
            whole["images"].append(image | {"id": new})
            for entries, copies in ((truth["annotations"], whole["annotations"]), (results, found)):
                own = [entry for entry in entries if entry["image_id"] == image["id"]]
                copies += [entry | {"image_id": new, "id": len(copies) + place} for place, entry in enumerate(own, 1)]
    return whole, found


def reference_ap(truth, results, task):
    """AP by pycocotools, in percent."""
    return 100 * reference(truth, results, task).stats[0]


@pytest.mark.parametrize("task", TASKS)
def test_ap_of_the_images_as_they_are(task):
    ones = np.ones(16, np.int64)
    assert average_precision(matches(0, task), ones) == pytest.approx(reference_ap(*made_up(0), task), abs=1e-9)


@pytest.mark.parametrize("task", TASKS)
def test_ap_of_resampled_images(task):
    for weights in np.random.default_rng(0).multinomial(16, np.full(16, 1 / 16), size=4):
        expected = reference_ap(*repeated(*made_up(1), weights), task)
        # Copies of one image have equal scores. pycocotools orders them by image, so AP moves a little.
        assert average_precision(matches(1, task), weights) == pytest.approx(expected, abs=0.3)


def test_twice_the_images_have_the_same_ap():
    found = matches(0, "bbox")
    once, twice = (average_precision(found, np.full(16, times)) for times in (1, 2))
    assert once == pytest.approx(twice, abs=1e-9)


def test_ap_without_objects_or_detections():
    truth, results = made_up(0)
    nothing = match_detections(truth, [], "bbox")
    assert average_precision(nothing, np.ones(16, np.int64)) == 0
    assert np.isnan(average_precision(nothing, np.zeros(16, np.int64)))
    unlabelled = match_detections(truth | {"annotations": []}, results, "bbox")
    assert np.isnan(average_precision(unlabelled, np.ones(16, np.int64)))


def test_difference_is_paired_and_has_a_sign():
    truth, results = made_up(0)
    good = matches(0, "bbox")
    fewer = match_detections(truth, results[::3], "bbox")
    assert bootstrap_difference(good, good, times=50) == (0, 0, 0)  # the same resampling for both
    gain, loss = bootstrap_difference(fewer, good, times=50), bootstrap_difference(good, fewer, times=50)
    assert gain.low < gain.value < gain.high
    assert gain.value > 0
    assert loss == pytest.approx((-gain.value, -gain.high, -gain.low))
    assert gain == bootstrap_difference(fewer, good, times=50)
    assert gain.value == bootstrap_difference(fewer, good, times=50, seed=1).value
    assert gain.low != bootstrap_difference(fewer, good, times=50, seed=1).low


def test_interval_covers_the_spread_of_a_simple_share():
    """With one object per image, found with certainty or not at all, AP follows the share of images with success."""
    box = {"bbox": [0, 0, 10, 10], "category_id": 1}
    truth = {
        "images": [{"id": i, "width": 20, "height": 20} for i in range(100)],
        "annotations": [{"id": i + 1, "image_id": i, "area": 100, "iscrowd": 0, **box} for i in range(100)],
        "categories": [{"id": 1, "name": "a"}],
    }
    every, half = ([{"image_id": i, "score": 0.9, **box} for i in range(count)] for count in (100, 50))
    found = bootstrap_difference(match_detections(truth, half, "bbox"), match_detections(truth, every, "bbox"))
    assert found.value == pytest.approx(50, abs=1)
    assert found.high - found.low == pytest.approx(2 * 1.96 * 5, rel=0.15)  # 100 sqrt(0.5 * 0.5 / 100) = 5
