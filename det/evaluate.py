"""COCO evaluation of a detector: predictions, box and mask AP as a table and as JSON."""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.utils import comm
from torch import nn
from tqdm import tqdm

from crossmae.files import write_json
from det.data import NamingMapper, refuse_unreadable

log = logging.getLogger(__name__)

RESULTS = "results.json"
TASKS = {"bbox": "box", "segm": "mask"}


class _Progress:
    """A test loader under a progress bar; a broken image ends it with the image's name."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        bar = tqdm(self.loader, desc="evaluate", unit="batch", disable=not comm.is_main_process(), dynamic_ncols=True)
        for batch in bar:
            refuse_unreadable(batch)
            yield batch


def evaluate(cfg: CfgNode, model: nn.Module) -> dict[str, dict[str, float]]:
    """Predict every image of `DATASETS.TEST` and score the predictions with COCO's own code.

    Writes `OUTPUT_DIR/results.json` and `OUTPUT_DIR/inference/coco_instances_results.json`.

    Args:
        cfg: `DATASETS.TEST` names one data set.
        model: a detector with its weights.

    Returns:
        {"bbox": {"AP": 51.6, "AP50": ..., "AP-<class>": ...}, "segm": ...}, in percent; empty on all processes but the
        first.
    """
    (name,), folder = cfg.DATASETS.TEST, Path(cfg.OUTPUT_DIR)
    # Named, because detectron2 reads them off the predictions, and a detector may have found nothing.
    tasks = tuple(TASKS) if cfg.MODEL.MASK_ON else ("bbox",)
    evaluator = COCOEvaluator(name, tasks, output_dir=str(folder / "inference"), use_fast_impl=False)
    loader = build_detection_test_loader(cfg, name, mapper=NamingMapper(cfg, False))
    # pycocotools prints its summary; ours is `format_results`.
    with contextlib.redirect_stdout(io.StringIO()):
        results = inference_on_dataset(model, _Progress(loader), evaluator)
    if comm.is_main_process():
        write_json(folder / RESULTS, {task: _json_numbers(values) for task, values in results.items()})
        log.info("results in %s", folder / RESULTS)
    return results


def _json_numbers(values: Mapping[str, float]) -> dict[str, float | None]:
    return {key: None if math.isnan(value) else round(float(value), 4) for key, value in values.items()}


def format_results(results: Mapping[str, Mapping[str, float]]) -> str:
    """AP, AP50 and AP75 of boxes and masks, then AP per class, as a text table; a dash is "not defined"."""
    tasks = [task for task in TASKS if task in results]
    metrics = ["AP", "AP50", "AP75"]
    classes = [key for key in results[tasks[0]] if key.startswith("AP-")] if tasks else []
    width = max([len("class"), *(len(key) - 3 for key in classes)])
    lines = [" " * width + "".join(f"{metric:>8}" for metric in metrics)]
    lines += [f"{TASKS[task]:{width}}" + "".join(_cell(results[task][metric]) for metric in metrics) for task in tasks]
    if classes:
        lines += ["", f"{'class':{width}}" + "".join(f"{TASKS[task] + ' AP':>8}" for task in tasks)]
        lines += [
            f"{key[3:]:{width}}" + "".join(_cell(results[task].get(key, math.nan)) for task in tasks) for key in classes
        ]
    return "\n".join(lines)


def _cell(value: float) -> str:
    return f"{'-' if math.isnan(value) else format(value, '.1f'):>8}"
