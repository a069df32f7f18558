"""Files in the folder of a detector's run, as its page reads them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from crossmae.reports.run_folder import FileContent, LoggedNumbers, read_log

TASKS = {"bbox": "box", "segm": "mask"}
HEADLINE = ("AP", "AP50", "AP75")

Percentages = dict[str, float | None]


class DetectedClass(FileContent):
    """A class: objects in the ground truth, and numbers in percent by task, None where undefined."""

    name: str
    objects: int
    bbox: Percentages | None = None
    segm: Percentages | None = None

    def ap(self, task: str) -> float | None:
        """Read the AP of a task."""
        return (getattr(self, task) or {}).get("AP")


class DetectionResults(FileContent):
    """Content of `results.json`: numbers in percent by task and metric, None where undefined, and the classes."""

    bbox: Percentages | None = None
    segm: Percentages | None = None
    classes: list[DetectedClass] = Field([])

    @model_validator(mode="after")
    def _has_headlines(self) -> DetectionResults:
        for task in self.numbers or ["bbox"]:
            if not set(HEADLINE) <= (getattr(self, task) or {}).keys():
                wanted = f"{', '.join(HEADLINE)}, as tools/train_net.py writes it"
                raise ValueError(f"{task}: expected an object with {wanted}")
            for one in self.classes:
                if "AP" not in (getattr(one, task) or {}):
                    raise ValueError(f"classes: {one.name} has no {task} AP")
        return self

    @property
    def numbers(self) -> dict[str, Percentages]:
        """The numbers of boxes, and of masks if the detector has them."""
        return {task: found for task in TASKS if (found := getattr(self, task)) is not None}


class RunRecord(FileContent):
    """Content of `run.json`, see `det.training.train.record_run`. What an older file lacks is empty."""

    classes: list[str] = Field([])
    versions: dict[str, Any] = Field({})
    data: dict[str, dict[str, Any]] = Field({})
    settings: dict[str, Any] = Field({})
    iterations: int = 0


class BestEvaluation(FileContent):
    """Content of `model_best.json`: the AP, in percent, that decides which evaluation is the best."""

    iteration: int
    bbox: float | None = Field(None, alias="bbox/AP")
    segm: float | None = Field(None, alias="segm/AP")


def read_metrics(path: Path) -> LoggedNumbers:
    """Read the `metrics.json` of detectron2, one row per iteration.

    A run that was cut off and resumed logs iterations again: the later values count. Numbers become counts of
    iterations, so that the evaluation after training, logged behind the last iteration, comes with that iteration.
    Losses of the stages of a cascade are added up.

    Raises:
        UserError: no such file.
    """
    log = read_log(path, "iteration")
    rows: dict[float, dict[str, float]] = {}
    for row in log.rows:
        rows.setdefault(row["iteration"], {}).update(_without_stages(row))
    last = max((iteration for iteration, row in rows.items() if "total_loss" in row), default=max(rows, default=0))
    merged: dict[float, dict[str, float]] = {}
    for iteration in sorted(rows):
        done = min(iteration, last) + 1
        merged.setdefault(done, {}).update({**rows[iteration], "iteration": done})
    return LoggedNumbers(list(merged.values()), log.damaged)


def _without_stages(row: Mapping[str, float]) -> dict[str, float]:
    merged: dict[str, float] = {}
    for key, value in row.items():
        name = re.sub(r"_stage\d+$", "", key) if key.startswith("loss_") else key
        merged[name] = merged.get(name, 0.0) + value
    return merged
