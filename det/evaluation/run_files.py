"""Files in the folder of a detector's run, as its report reads them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from crossmae.errors import counted
from crossmae.reports.run_folder import FileContent, LoggedNumbers, read_log

TASKS = {"bbox": "box", "segm": "mask"}
HEADLINE = ("AP", "AP50", "AP75")
AP_TEXT = (
    "AP50 counts a detection as right when its overlap with the true object (IoU) is at least 0.5. AP "
    "is the mean over ten such thresholds from 0.5 to 0.95."
)

Percentages = dict[str, float | None]


class DetectedClass(FileContent):
    """A class: number of true objects, and metrics in percent by task, None if undefined."""

    name: str
    objects: int
    bbox: Percentages | None = None
    segm: Percentages | None = None

    def ap(self, task: str) -> float | None:
        """Return the AP of a task."""
        return (getattr(self, task) or {}).get("AP")


class FalseAlarms(FileContent):
    """Detections from a score on, and images that have any, where nothing is annotated."""

    score: float
    detections: int
    images: int


class DetectionResults(FileContent):
    """Content of `results.json`: metrics in percent by task and name, None if undefined, and the classes.

    It has `false_alarms` if the validation images have no annotations.
    `left_out` has the detector's classes that the data do not list.
    """

    bbox: Percentages | None = None
    segm: Percentages | None = None
    classes: list[DetectedClass] = Field([])
    false_alarms: list[FalseAlarms] = Field([])
    left_out: list[str] = Field([])

    @model_validator(mode="after")
    def _has_headlines(self) -> DetectionResults:
        for task in self.numbers or ["bbox"]:
            if not set(HEADLINE) <= (getattr(self, task) or {}).keys():
                raise ValueError(f"{task}: has no {', '.join(HEADLINE)}. Write it with tools/train_net.py.")
            for one in self.classes:
                if "AP" not in (getattr(one, task) or {}):
                    raise ValueError(f"classes: {one.name} has no {task} AP. Write it with tools/train_net.py.")
        return self

    @property
    def numbers(self) -> dict[str, Percentages]:
        """Metrics of boxes, and of masks if the detector has masks."""
        return {task: found for task in TASKS if (found := getattr(self, task)) is not None}


class RunRecord(FileContent):
    """Content of `run.json`, see `det.training.checkpoint.record_run`. Values that older files lack are empty."""

    classes: list[str] = Field([])
    versions: dict[str, Any] = Field({})
    data: dict[str, dict[str, Any]] = Field({})
    settings: dict[str, Any] = Field({})
    iterations: int = 0
    listed_images: int = 0

    @property
    def training_images(self) -> tuple[int, int] | None:
        """Numbers of training images, used and listed."""
        used = self.settings.get("number of training images")
        return (used, max(used, self.listed_images)) if isinstance(used, int) else None


def describe_left_out(number: int) -> str:
    """Describe images that a training leaves out, "" if there are none."""
    return f"{number:,} without objects {'is' if number == 1 else 'are'} left out" if number else ""


def describe_images(used: int, listed: int, noun: str = "image") -> str:
    """Describe training images.

    Such as "79 of 89 images (10 without objects are left out)".

    Args:
        listed: number of images with those that are left out.
    """
    left_out = describe_left_out(listed - used)
    return f"{used:,} of {counted(listed, noun)} ({left_out})" if left_out else counted(used, noun)


class BestEvaluation(FileContent):
    """Content of `model_best.json`: the AP, in percent, that decides the best evaluation."""

    iteration: int
    bbox: float | None = Field(None, alias="bbox/AP")
    segm: float | None = Field(None, alias="segm/AP")


def read_training_log(path: Path) -> LoggedNumbers:
    """Read the `log.jsonl` of a detector.

    The losses of the stages of a cascade are added up.

    Raises UserError if the file does not exist.
    """
    log = read_log(path, "step")
    rows: list[dict[str, float]] = []
    for row in log.rows:
        whole: dict[str, float] = {}
        for key, value in row.items():
            name = re.sub(r"^(loss_.*)_stage\d+$", r"\1", key)
            whole[name] = whole.get(name, 0.0) + value
        rows.append(whole)
    return LoggedNumbers(rows, log.damaged)
