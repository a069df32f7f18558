"""Evaluation of a detector: predictions on a data set, AP and AR as a table, JSON and curves."""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation.evaluator import inference_context
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Instances
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from crossmae.data.parallel import Progress
from crossmae.errors import UserError
from crossmae.files import make_folder, write_atomically, write_json
from crossmae.reports.figures import save_figure
from crossmae.training.processes import Ranks
from crossmae.training.signals import until_stop
from det.classes import Classes, classes_of, match_categories, registered_classes, without_spare
from det.config import PICTURES, PREDICTIONS, RESULTS
from det.data.coco import read_registered
from det.data.loader import NamingMapper, build_test_loader, refuse_unreadable
from det.evaluation.curves import precision_recall_figure
from det.evaluation.pictures import save_pictures, validation_pictures
from det.evaluation.run_files import HEADLINE, TASKS
from det.evaluation.scoring import DetectionScores, count_detections, score_results
from det.inference.ordered_threads import encode_in_order, host_threads
from det.inference.paste import coco_results
from det.inference.precision import detect
from det.library_warnings import library_warnings_ignored

log = logging.getLogger(__name__)

PRINTED_CLASSES = 100  # a table with more classes would fill the screen


@library_warnings_ignored()
def evaluate(cfg: CfgNode, model: nn.Module) -> dict[str, dict[str, float]]:
    """Predict every image of `DATASETS.TEST` and score the predictions.

    Categories and classes are matched by name, see `det.classes`. `TEST.EVALUATOR` names the library. Data sets with
    `evaluator_type` "lvis" are scored by the rules of LVIS. The files in `OUTPUT_DIR` are: `results.json`; the
    predictions in `inference/coco_instances_results.json`; precision over recall in `inference/pr_curves_<task>.png`;
    and `pictures/`, some images with true and predicted objects.

    Returns:
        {"bbox": {"AP": 51.6, "AP50": ..., "AP-<class>": ...}, "segm": ...} in percent, with NaN for undefined values;
        see `DetectionScores.numbers`. Empty on all processes except the first.

    Raises:
        UserError: an image cannot be read, or the model or its classes do not fit the data set.
    """
    (name,), folder = cfg.DATASETS.TEST, Path(cfg.OUTPUT_DIR)
    model = model.module if isinstance(model, DistributedDataParallel) else model
    if not isinstance(model, GeneralizedRCNN):
        raise UserError(f"MODEL.META_ARCHITECTURE: {type(model).__name__} cannot be evaluated. Use GeneralizedRCNN.")
    loader = build_test_loader(name, NamingMapper(cfg, False), cfg.DATALOADER.NUM_WORKERS)
    truth, written = read_registered(name)
    category_ids = match_truth(model, truth, name)
    threads = host_threads(model.device)
    parts = comm.gather(predict(model, loader, category_ids, cfg.TEST.PRECISION, threads), dst=0)
    if not comm.is_main_process():
        return {}
    make_folder(folder / "inference", "OUTPUT_DIR")
    results = list(itertools.chain(*parts))
    write_predictions(folder / PREDICTIONS, with_written_ids(results, written))
    lvis = MetadataCatalog.get(name).get("evaluator_type") == "lvis"
    tasks = tuple(TASKS) if cfg.MODEL.MASK_ON else ("bbox",)
    scores = {task: score_results(truth, results, task, cfg.TEST.EVALUATOR, lvis, cfg.TEST.MAX_DETS) for task in tasks}
    drawn = validation_pictures(truth, Path(MetadataCatalog.get(name).image_root), results)
    save_pictures(drawn, folder / PICTURES)
    false_alarms = [] if truth["annotations"] else count_detections(results)
    return _write_scores(folder, name, scores, left_out(model, category_ids), false_alarms)


def write_predictions(path: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Write COCO results as JSON, atomically."""
    try:
        content = orjson.dumps(results)
    except TypeError:  # an id above 64 bits, or with half of a character
        content = json.dumps(results).encode()
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def with_written_ids(results: list[dict[str, Any]], written: Mapping[str, Mapping[int, Any]]) -> list[dict[str, Any]]:
    """Replace numbers of images and categories by the ids of the file."""
    if not any(written.values()):
        return results
    keys = {"image_id": written["images"], "category_id": written["categories"]}
    return [result | {key: ids.get(result[key], result[key]) for key, ids in keys.items()} for result in results]


def match_truth(detector: GeneralizedRCNN, truth: Mapping[str, Any], name: str) -> tuple[int | None, ...]:
    """Find the category id of each class, None for unlisted classes."""
    entries = sorted(truth["categories"], key=lambda category: category["id"])
    registered = registered_classes(name)  # of LVIS, detectron2 has other names than the file
    known = registered is not None and len(registered.names) == len(entries)
    names = registered.names if registered and known else [entry["name"] for entry in entries]
    where = str(MetadataCatalog.get(name).get("json_file", name))
    own, ids = classes_of(detector), [entry["id"] for entry in entries]
    empty = set(ids) - {annotation["category_id"] for annotation in truth["annotations"]}
    found = without_spare(Classes(tuple(names), tuple(ids)), own, empty, where)
    return match_categories(own, detector.roi_heads.num_classes, found.category_ids, found.names, where)


def predict(
    model: GeneralizedRCNN,
    loader: Any,
    category_ids: Sequence[int | None],
    precision: str = "fp32",
    threads: int = 0,
) -> list[dict[str, Any]]:
    """Predict this process's images in evaluation mode. Return COCO results.

    `threads` threads encode masks while the device predicts the next images; with 0, the device waits.
    """
    bar = Progress(loader, "evaluate", unit="batch", leave=False, shown=comm.is_main_process())
    ranks = Ranks(comm.get_rank(), 0, comm.get_world_size())

    def found() -> Iterator[tuple[dict[str, Any], Instances]]:
        for batch in until_stop(bar, ranks, len(loader)):
            refuse_unreadable(batch)
            # The pixels are not needed any more.
            samples = [{key: value for key, value in sample.items() if key != "image"} for sample in batch]
            yield from zip(samples, detect(model, batch, precision), strict=True)

    def encode(prediction: tuple[dict[str, Any], Instances]) -> list[dict[str, Any]]:
        sample, instances = prediction
        return coco_results(instances, sample["image_id"], sample["height"], sample["width"], category_ids)

    with inference_context(model), torch.no_grad():
        encoded = encode_in_order(encode, found(), threads, lambda prediction: prediction[0]["file_name"])
        return list(itertools.chain.from_iterable(encoded))


def left_out(detector: nn.Module, category_ids: Sequence[int | None]) -> list[str]:
    """Name the classes that the data set does not list."""
    classes = classes_of(detector)
    pairs = zip(classes.names, category_ids, strict=True) if classes else ()
    return [name for name, number in pairs if number is None]


def _write_scores(
    folder: Path,
    name: str,
    scores: Mapping[str, DetectionScores],
    absent: Sequence[str],
    false_alarms: list[dict[str, float]],
) -> dict[str, dict[str, float]]:
    """Write `results.json` and the curves. Return the results of `evaluate`."""
    results, by_class = {}, {task: of_task.by_class() for task, of_task in scores.items()}
    for task, of_task in scores.items():
        each = {f"AP-{label}": row["AP"] for label, row in zip(of_task.names, by_class[task], strict=True)}
        results[task] = of_task.numbers() | each
        title = f"{TASKS[task].capitalize()} predictions on {name}"
        save_figure(precision_recall_figure(of_task, title), folder / "inference" / f"pr_curves_{task}.png")
    first = next(iter(scores.values()))
    classes = [
        {"name": label, "objects": count, **{task: _json_numbers(by_class[task][index]) for task in scores}}
        for index, (label, count) in enumerate(zip(first.names, first.objects, strict=True))
    ]
    written = {task: _json_numbers(values) for task, values in results.items()}
    alarms = {"false_alarms": false_alarms} if false_alarms else {}
    absences = {"left_out": list(absent)} if absent else {}
    write_json(folder / RESULTS, {**written, "classes": classes, **absences, **alarms})
    if false_alarms:
        counts = ", ".join(f"{row['detections']} with scores from {row['score']:g}" for row in false_alarms)
        log.info("%s has no annotations, so AP is undefined and every detection is a false alarm: %s", name, counts)
    log.info("results in %s, curves and predictions in %s", folder / RESULTS, folder / "inference")
    return results


def _json_numbers(values: Mapping[str, float]) -> dict[str, float | None]:
    return {key: None if math.isnan(value) else round(float(value), 4) for key, value in values.items()}


def format_results(results: Mapping[str, Mapping[str, float]]) -> str:
    """Format results as a text table with dashes for undefined values."""
    tasks = [task for task in TASKS if task in results]
    keys = list(results[tasks[0]]) if tasks else []
    classes = [key for key in keys if key.startswith("AP-")]
    others = [key for key in keys if key not in (*HEADLINE, *classes)]
    shown = classes if len(classes) <= PRINTED_CLASSES else []
    width = max([len("class"), *(len(key) - 3 for key in shown)])
    blocks = [
        _table("", metrics, [(TASKS[task], [results[task][key] for key in metrics]) for task in tasks], width)
        for metrics in (HEADLINE, others)
        if metrics
    ]
    if shown:  # a line break in a class name would break the table
        rows = [(" ".join(key[3:].split()), [results[task].get(key, math.nan) for task in tasks]) for key in shown]
        blocks.append(_table("class", [f"{TASKS[task]} AP" for task in tasks], rows, width))
    elif classes:
        blocks.append(f"AP of each of the {len(classes)} classes: see {RESULTS}")
    return "\n\n".join(blocks)


def _table(corner: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[float]]], width: int) -> str:
    cells = [(name, ["-" if math.isnan(value) else f"{value:.1f}" for value in row]) for name, row in rows]
    return "\n".join(
        f"{name:{width}}" + "".join(f"{cell:>8}" for cell in row) for name, row in [(corner, columns), *cells]
    )
