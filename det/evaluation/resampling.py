"""Bootstrap over images: how much a difference of two APs depends on the choice of the validation images.

The detectors stay as they are. The intervals say nothing about another training of the same detector.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from det.evaluation.scoring import COCO_LIMITS, evaluate_by_pycocotools, select_results, select_truth

AREA = [0, 1e10]  # objects of all sizes
RECALLS = np.linspace(0, 1, 101)
LEVEL = 95  # percent of the resamplings inside the interval


class Matches(NamedTuple):
    """Detections of a category, matched with objects by the rules of COCO.

    N is the number of detections, I the number of images.

    Attributes:
        image: (N,) position of each detection's image. Detections are sorted by score, highest first.
        hit: (10, N) bool: the detection has found an object, at each IoU threshold.
        wrong: (10, N) bool: it has found nothing. A detection that is neither is ignored.
        objects: (I,) number of objects in each image.
    """

    image: NDArray[np.int64]
    hit: NDArray[np.bool_]
    wrong: NDArray[np.bool_]
    objects: NDArray[np.int64]


class ApDifference(NamedTuple):
    """Difference of two APs in percent, with the ends of its interval."""

    value: float
    low: float
    high: float


def match_detections(ground_truth: dict[str, Any], results: Sequence[dict[str, Any]], task: str) -> list[Matches]:
    """Match the detections of each category with its true objects.

    Args:
        ground_truth: content of a COCO file.
        results: content of a COCO results file.
        task: "bbox" or "segm".
    """
    truth, slim = select_truth(ground_truth, task), select_results(results, task)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        evaluation = evaluate_by_pycocotools(truth, slim, task, lvis=False)
        params = evaluation.params
        params.areaRng, params.areaRngLbl, params.maxDets = [AREA], ["all"], [COCO_LIMITS[-1]]
        evaluation.evaluate()
    images = len(params.imgIds)
    return [
        _collect(evaluation.evalImgs[start : start + images]) for start in range(0, len(evaluation.evalImgs), images)
    ]


def _collect(found: Sequence[dict[str, Any] | None]) -> Matches:
    """Put what pycocotools found for a category, image by image, into arrays."""
    whole = [(place, one) for place, one in enumerate(found) if one is not None]
    objects = np.zeros(len(found), np.int64)
    for place, one in whole:
        objects[place] = np.count_nonzero(np.logical_not(one["gtIgnore"]))
    scores = np.concatenate([[], *(one["dtScores"] for _, one in whole)])
    order = np.argsort(-scores, kind="mergesort")  # as COCO does, for detections with equal scores
    image = np.concatenate([np.zeros(0, np.int64), *(np.full(len(one["dtScores"]), place) for place, one in whole)])
    matched = np.concatenate([np.zeros((10, 0)), *(one["dtMatches"] for _, one in whole)], axis=1) != 0
    counted = np.concatenate([np.zeros((10, 0)), *(one["dtIgnore"] for _, one in whole)], axis=1) == 0
    return Matches(image[order], (matched & counted)[:, order], (~matched & counted)[:, order], objects)


def average_precision(categories: Sequence[Matches], weights: NDArray[np.int64]) -> float:
    """Compute AP in percent as if image i occurred `weights[i]` times.

    Returns NaN without objects.

    Args:
        weights: (I,) number of times that each image counts.
    """
    found = []
    for one in categories:
        objects = int(weights @ one.objects)
        if objects == 0:
            continue
        times = weights[one.image]
        hits, errors = np.cumsum(one.hit * times, axis=1), np.cumsum(one.wrong * times, axis=1)
        precision = hits / np.maximum(hits + errors, 1)
        best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]  # at this recall or a higher one
        best = np.concatenate([best, np.zeros((len(best), 1))], axis=1)  # a recall that is not reached
        places = [np.searchsorted(recall, RECALLS) for recall in hits / objects]
        found.append(np.take_along_axis(best, np.stack(places), axis=1).mean())
    return 100 * float(np.mean(found)) if found else float("nan")


def bootstrap_difference(
    first: Sequence[Matches], second: Sequence[Matches], times: int = 1000, seed: int = 0
) -> ApDifference:
    """Compute the second AP minus the first, with a bootstrap interval.

    Each of `times` resamplings draws as many images as there are, with replacement, for both detectors. The interval
    holds the middle `LEVEL` percent of the differences.
    """
    images = len(first[0].objects)
    draws = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=times)

    def difference(weights: NDArray[np.int64]) -> float:
        return average_precision(second, weights) - average_precision(first, weights)

    low, high = np.percentile([difference(weights) for weights in draws], [50 - LEVEL / 2, 50 + LEVEL / 2])
    return ApDifference(difference(np.ones(images, np.int64)), float(low), float(high))
