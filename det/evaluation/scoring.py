"""Average precision and recall of detections, by the rules of COCO or LVIS.

hotcoco evaluates if it is installed, otherwise pycocotools, the reference. Tests check that their arrays are equal.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from crossmae.errors import UserError
from det.data.coco_kinds import FREQUENCIES
from det.data.masks import clip_polygons

log = logging.getLogger(__name__)

GEOMETRY = {"bbox": "bbox", "segm": "segmentation"}  # task: the key of a result that is compared
ALL, SMALL, MEDIUM, LARGE = range(4)  # ranges of object area
IOU_50, IOU_75 = 0, 5  # of the ten thresholds 0.5, 0.55, ..., 0.95
SCORE_LEVELS = (0.0, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9)
EXACT = 2**53  # largest number up to which float64 has all whole numbers
COCO_LIMITS, LVIS_LIMITS = (1, 10, 100), (300,)  # numbers of detections counted per image, best first


@dataclass(frozen=True, eq=False)
class DetectionScores:
    """Arrays of one evaluation, with -1 for undefined values.

    Attributes:
        precision: (10 IoU thresholds, 101 recalls, categories, 4 areas, limits), interpolated as COCO does.
        recall: (10, categories, 4, limits), the highest recall at each IoU threshold.
        thresholds: scores at which each precision is reached, in the shape of `precision`.
        names: names of the categories, sorted by id.
        objects: number of true objects per category, without crowd regions.
        frequencies: "r", "c" or "f" per category with the rules of LVIS, otherwise "".
        limits: numbers of detections counted per image, best first.
    """

    precision: np.ndarray
    recall: np.ndarray
    thresholds: np.ndarray
    names: tuple[str, ...]
    objects: tuple[int, ...]
    frequencies: str
    limits: tuple[int, ...]

    def numbers(self) -> dict[str, float]:
        """Compute COCO's 12 or LVIS's 13 metrics in percent.

        Undefined metrics are NaN.
        """
        precision = self.precision[..., -1]
        values = {
            "AP": _mean(precision[..., ALL]),
            "AP50": _mean(precision[IOU_50, ..., ALL]),
            "AP75": _mean(precision[IOU_75, ..., ALL]),
            "APs": _mean(precision[..., SMALL]),
            "APm": _mean(precision[..., MEDIUM]),
            "APl": _mean(precision[..., LARGE]),
        }
        for letter in FREQUENCIES if self.frequencies else "":
            members = [index for index, frequency in enumerate(self.frequencies) if frequency == letter]
            values[f"AP{letter}"] = _mean(precision[:, :, members, ALL])
        values |= {f"AR{limit}": _mean(self.recall[..., ALL, place]) for place, limit in enumerate(self.limits)}
        areas = {"s": SMALL, "m": MEDIUM, "l": LARGE}
        return values | {f"AR{letter}": _mean(self.recall[..., area, -1]) for letter, area in areas.items()}

    def by_class(self) -> list[dict[str, float]]:
        """Compute AP and AP50 per category in percent, NaN without objects."""
        curves = np.moveaxis(self.precision[..., ALL, -1], 2, 0)
        return [{"AP": _mean(curve), "AP50": _mean(curve[IOU_50])} for curve in curves]


def _mean(values: np.ndarray) -> float:
    """Average the defined values, in percent."""
    defined = values[values > -1]
    return float(np.mean(defined)) * 100 if defined.size else math.nan


def count_detections(results: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Count detections, and images with detections, from each of some scores on."""
    rows = []
    for score in SCORE_LEVELS:
        images = [result["image_id"] for result in results if result["score"] >= score]
        rows.append({"score": score, "detections": len(images), "images": len(set(images))})
    return rows


def score_results(
    ground_truth: dict[str, Any],
    results: Sequence[dict[str, Any]],
    task: str,
    evaluator: str = "auto",
    lvis: bool = False,
    max_dets: int = COCO_LIMITS[-1],
) -> DetectionScores:
    """Score COCO results for a task, "bbox" or "segm".

    Args:
        ground_truth: content of a COCO or LVIS file.
        results: content of a COCO results file. The area of a mask is its number of pixels, as in detectron2.
        evaluator: "hotcoco", "pycocotools", or "auto": hotcoco if it is installed.
        lvis: use the rules of LVIS (arXiv 1908.03195, section 3): a category is scored only in images that were
            searched for it, and the best 300 detections of an image are counted.
        max_dets: detections that AP counts per image and category by the rules of COCO, best first.

    Raises:
        UserError: hotcoco is requested but not installed, or the ground truth has no keys of LVIS.
    """
    if lvis:
        _check_lvis_keys(ground_truth)
    limits = LVIS_LIMITS if lvis else (*COCO_LIMITS[:-1], max_dets)
    truth = select_truth(ground_truth, task)
    if lvis:
        results = _best_of_each_image(results, LVIS_LIMITS[-1])
    hotcoco = find_hotcoco(evaluator)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        evaluation = (
            _by_hotcoco(hotcoco, truth, results, task, lvis)
            if hotcoco
            else evaluate_by_pycocotools(truth, select_results(results, task), task, lvis)
        )
        evaluation.params.maxDets = list(limits)
        evaluation.evaluate()
        evaluation.accumulate()
    arrays = evaluation.eval
    categories = sorted(ground_truth["categories"], key=lambda category: category["id"])
    objects = Counter(a["category_id"] for a in ground_truth["annotations"] if not a.get("iscrowd", 0))
    return DetectionScores(
        precision=np.asarray(arrays["precision"]),
        recall=np.asarray(arrays["recall"]),
        thresholds=np.asarray(arrays["scores"]),
        names=tuple(category["name"] for category in categories),
        objects=tuple(objects[category["id"]] for category in categories),
        frequencies="".join(category["frequency"] for category in categories) if lvis else "",
        limits=limits,
    )


def select_results(results: Sequence[dict[str, Any]], task: str) -> list[dict[str, Any]]:
    """Select the keys of results that a task needs.

    If a result has a box, COCO would use the area of the box for a mask.
    """
    keys = ("image_id", "category_id", "score", GEOMETRY[task])
    return [{key: result[key] for key in keys} for result in results]


def select_truth(ground_truth: dict[str, Any], task: str) -> dict[str, Any]:
    """Select the keys of the ground truth that a task needs.

    hotcoco checks all keys that it gets.
    """
    mask = ("segmentation",) if task == "segm" else ()
    needed = {
        "images": ("id", "width", "height", "neg_category_ids", "not_exhaustive_category_ids"),
        "categories": ("id", "name", "frequency"),
        "annotations": ("id", "image_id", "category_id", "bbox", "area", "iscrowd", *mask),
    }
    slim = {
        where: [{key: entry[key] for key in keys if key in entry} for entry in ground_truth[where]]
        for where, keys in needed.items()
    }
    sizes = {image["id"]: (image["height"], image["width"]) for image in slim["images"]} if mask else {}
    for annotation in slim["annotations"] if mask else ():
        if annotation.get("segmentation"):
            size = sizes[annotation["image_id"]]
            annotation["segmentation"] = clip_polygons(annotation["segmentation"], *size)
    return slim


@functools.cache  # so that it logs only once
def find_hotcoco(evaluator: str) -> ModuleType | None:
    """Import hotcoco, or return None for pycocotools."""
    if evaluator == "pycocotools":
        return None
    try:
        import hotcoco
    except ImportError:
        if evaluator == "hotcoco":
            raise UserError("TEST.EVALUATOR: hotcoco is not installed. Run: pip install hotcoco") from None
        log.info(
            "evaluating with pycocotools. hotcoco is many times faster, with the same numbers: pip install hotcoco"
        )
        return None
    return hotcoco


def _by_hotcoco(
    hotcoco: ModuleType, ground_truth: dict[str, Any], results: Sequence[dict[str, Any]], task: str, lvis: bool
) -> Any:
    """Prepare an evaluation by hotcoco, with results as columns.

    They are faster and smaller than dictionaries.
    """
    truth, count = hotcoco.COCO(ground_truth), len(results)
    ids = [np.fromiter((result[key] for result in results), np.int64, count) for key in ("image_id", "category_id")]
    if any(column.max(initial=0) > EXACT for column in ids):
        return hotcoco.COCOeval(truth, truth.load_res(select_results(results, task)), task, lvis_style=lvis)
    masks = [result["segmentation"] for result in results] if task == "segm" else None
    if masks is None:
        boxes = np.fromiter((side for result in results for side in result["bbox"]), np.float64, 4 * count)
    else:
        boxes = np.asarray(hotcoco.mask.to_bbox(masks), dtype=np.float64)
    scores = np.fromiter((result["score"] for result in results), np.float64, count)
    found = truth.load_res(np.column_stack([ids[0], boxes.reshape(count, 4), scores, ids[1]]), segmentation=masks)
    if masks:  # hotcoco takes the areas of the boxes
        areas = np.asarray(hotcoco.mask.area(masks), dtype=np.float64)
        found.update_anns(ids=np.arange(1, count + 1), area=areas)
    return hotcoco.COCOeval(truth, found, task, lvis_style=lvis)


def evaluate_by_pycocotools(ground_truth: dict[str, Any], results: list[Any], task: str, lvis: bool) -> COCOeval:
    """Prepare an evaluation by pycocotools, which has not run yet."""
    # pycocotools changes annotations and results, so it gets copies. LVIS has no crowd regions and no `iscrowd`.
    annotations = [{"iscrowd": 0, **annotation} for annotation in ground_truth["annotations"]]
    truth, found = COCO(), COCO()
    truth.dataset = {**ground_truth, "annotations": annotations}
    truth.createIndex()
    if results:
        found = truth.loadRes([dict(result) for result in results])
    else:  # pycocotools cannot load an empty list
        found.dataset = {**ground_truth, "annotations": []}
        found.createIndex()
    return (_LvisEval if lvis else COCOeval)(truth, found, task)


class _LvisEval(COCOeval):
    """COCO evaluation by the federated protocol of LVIS."""

    def _prepare(self) -> None:
        super()._prepare()
        for image, category in list(self._dts):
            known_absent = category in self.cocoGt.imgs[image]["neg_category_ids"]
            if not known_absent and not self._gts.get((image, category)):
                del self._dts[image, category]

    def evaluateImg(self, imgId: int, catId: int, aRng: list[float], maxDet: int) -> dict[str, Any] | None:
        """Ignore unmatched detections in images not searched exhaustively."""
        found: dict[str, Any] | None = super().evaluateImg(imgId, catId, aRng, maxDet)
        if found is not None and catId in self.cocoGt.imgs[imgId]["not_exhaustive_category_ids"]:
            found["dtIgnore"] = np.logical_or(found["dtIgnore"], found["dtMatches"] == 0)
        return found


def _best_of_each_image(results: Sequence[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """Keep the `limit` highest scores of each image, over all categories."""
    images = defaultdict(list)
    for result in results:
        images[result["image_id"]].append(result)
    ranked = (sorted(image, key=lambda result: -result["score"])[:limit] for image in images.values())
    return [result for image in ranked for result in image]


def _check_lvis_keys(ground_truth: dict[str, Any]) -> None:
    needed = {"images": ("neg_category_ids", "not_exhaustive_category_ids"), "categories": ("frequency",)}
    for where, keys in needed.items():
        for index, entry in enumerate(ground_truth[where]):
            if absent := [key for key in keys if key not in entry]:
                raise UserError(
                    f"ground truth: {where}[{index}] has no {absent[0]!r}, which LVIS evaluation needs. "
                    "Use a complete LVIS file."
                )
