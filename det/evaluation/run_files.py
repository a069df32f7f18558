"""What the files in the folder of a run tell, also where some are missing or damaged because the run was cut off."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from crossmae.errors import UserError
from crossmae.files import read_json
from crossmae.training.config import read_yaml

# What a run writes; `model` in weights is what was evaluated.
RECORD, CONFIG, LOG, METRICS, REPORT = "run.json", "config.yaml", "log.txt", "metrics.json", "report.html"
BEST, BEST_RECORD, FINAL, LAST = "model_best.pth", "model_best.json", "model_final.pth", "last_checkpoint"
# The names of the checkpoints that training continues from; `model_best.pth` holds weights alone.
CHECKPOINT = re.compile(r"model_([0-9]{7,}|final)\.pth")
RESULTS, PREDICTIONS, PICTURES = "results.json", "inference/coco_instances_results.json", "pictures"
TASKS = {"bbox": "box", "segm": "mask"}
HEADLINE = ("AP", "AP50", "AP75")
T = TypeVar("T")


@dataclass(frozen=True)
class ClassScore:
    """A class: objects in the ground truth, and AP in percent by task, NaN where it has none."""

    name: str
    objects: int
    ap: dict[str, float]


@dataclass(frozen=True)
class Results:
    """Content of `results.json`: numbers by task and metric in percent, NaN where not defined, and the classes."""

    numbers: dict[str, dict[str, float]]
    classes: list[ClassScore]

    @property
    def tasks(self) -> list[str]:
        """Those that were evaluated: boxes, and masks if the detector has them."""
        return [task for task in TASKS if task in self.numbers]


@dataclass(frozen=True)
class Metrics:
    """Content of `metrics.json`.

    Attributes:
        rows: values by name, one row for each number of iterations done ("iteration") that something is logged for.
        damaged: lines that could not be read.
    """

    rows: list[dict[str, float]]
    damaged: int = 0

    def values(self, key: str) -> list[float]:
        """All values of one name, in order."""
        return [row[key] for row in self.rows if key in row]

    def seconds(self) -> float:
        """What the iterations took, about: each logged time stands for those since the one before."""
        total, previous = 0.0, 0.0
        for row in self.rows:
            if "time" in row:
                total += row["time"] * (row["iteration"] - previous)
                previous = row["iteration"]
        return total


@dataclass(frozen=True)
class Record:
    """Content of `run.json`, see `det.training.train.record_run`; what an older one lacks is empty."""

    classes: list[str] = field(default_factory=list)
    versions: dict[str, Any] = field(default_factory=dict)
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    iterations: int = 0


@dataclass(frozen=True)
class Best:
    """Content of `model_best.json`: the evaluation with the highest AP."""

    iteration: int
    task: str
    ap: float


@dataclass(frozen=True)
class Run:
    """What the folder of a run holds; what is not there is empty or None, and `faults` says why, by file name."""

    folder: Path
    record: Record
    config: dict[str, Any]
    metrics: Metrics
    results: Results | None
    best: Best | None
    faults: dict[str, str]

    @property
    def is_unfinished(self) -> bool:
        """Training has begun and not ended: it goes on, or was cut off."""
        return bool(self.metrics.rows) and not (self.folder / FINAL).is_file()


def read_run(folder: Path) -> Run:
    """Read what there is of a run; never an error."""
    faults: dict[str, str] = {}

    def read(name: str, reader: Callable[[Path], T], instead: T) -> T:
        path = folder / name
        try:
            if path.is_file():
                return reader(path)
            faults[name] = "the file does not exist"
        except (UserError, OSError) as error:
            faults[name] = str(error).removeprefix(str(path)).lstrip(":, ")
        return instead

    no_results: Results | None = None
    no_best: Best | None = None
    return Run(
        folder,
        read(RECORD, _read_record, Record()),
        read(CONFIG, read_yaml, {}),
        read(METRICS, read_metrics, Metrics([])),
        read(RESULTS, read_results, no_results),
        read(BEST_RECORD, _read_best, no_best),
        faults,
    )


def _read_object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, received {type(content).__name__}")
    return content


def _read_record(path: Path) -> Record:
    content, empty = _read_object(path), Record()
    known = {key: content[key] for key in vars(empty) if key in content}
    wrong = [key for key, value in known.items() if type(value) is not type(vars(empty)[key])]
    if wrong or not all(isinstance(paths, dict) for paths in known.get("data", {}).values()):
        raise UserError(f"{path}: not what training writes: {', '.join(wrong) or 'data'}")
    return Record(**known)


def _read_best(path: Path) -> Best:
    content = _read_object(path)
    iteration = content.get("iteration")
    for task in TASKS:
        found = content.get(f"{task}/AP")
        if isinstance(iteration, int) and isinstance(found, (int, float)):
            return Best(iteration, task, float(found))
    raise UserError(f"{path}: expected an iteration and an AP, received {sorted(content)}")


def read_results(path: Path) -> Results:
    """Read a `results.json`, see `det.evaluation.evaluate.evaluate`.

    Raises:
        UserError: not such a file; names it.
    """
    content = _read_object(path)
    tasks = [task for task in TASKS if task in content] or ["bbox"]
    numbers = {task: _percentages(content.get(task), f"{path}: {task}", HEADLINE) for task in tasks}
    classes = content.get("classes", [])
    if not isinstance(classes, list):
        raise UserError(f"{path}: classes: expected a list, received {type(classes).__name__}")
    return Results(numbers, [_class_score(one, tasks, f"{path}: classes[{at}]") for at, one in enumerate(classes)])


def _class_score(one: Any, tasks: Sequence[str], where: str) -> ClassScore:
    if not isinstance(one, dict) or not isinstance(one.get("objects"), int) or "name" not in one:
        raise UserError(f"{where}: expected an object with name and number of objects")
    ap = {task: _percentages(one.get(task), f"{where}: {task}", ("AP",))["AP"] for task in tasks}
    return ClassScore(str(one["name"]), one["objects"], ap)


def _percentages(values: Any, where: str, needed: Sequence[str]) -> dict[str, float]:
    if not isinstance(values, dict) or not set(needed) <= values.keys():
        raise UserError(f"{where}: expected an object with {', '.join(needed)}, as tools/train_net.py writes it")
    wrong = {key: value for key, value in values.items() if value is not None and not _is_number(value)}
    if wrong:
        raise UserError(f"{where}: expected numbers, received {wrong}")
    return {key: math.nan if value is None else float(value) for key, value in values.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isinf(value)


def read_metrics(path: Path) -> Metrics:
    """Read the `metrics.json` of detectron2: one JSON object a line, each with the number of its iteration.

    A run that was cut off and resumed logs iterations again: the later values count. A line that was cut off, or that
    another was written into, is left out and counted. Numbers become those of iterations done, so that the
    evaluation after training, which is logged behind the last iteration, comes with it.

    Raises:
        UserError: no such file.
    """
    try:
        lines = path.read_text("utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    rows: dict[int, dict[str, float]] = {}
    damaged = 0
    for line in filter(str.strip, lines):
        row = _numbers_of(line)
        if isinstance(row.get("iteration"), int):
            rows.setdefault(int(row["iteration"]), {}).update(row)
        else:
            damaged += 1
    last = max((iteration for iteration, row in rows.items() if "total_loss" in row), default=max(rows, default=0))
    merged: dict[int, dict[str, float]] = {}
    for iteration in sorted(rows):
        done = min(iteration, last) + 1
        merged.setdefault(done, {}).update({**rows[iteration], "iteration": done})
    return Metrics(list(merged.values()), damaged)


def _numbers_of(line: str) -> dict[str, float]:
    """The numbers in a line that holds a JSON object; none for any other line."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return {key: value for key, value in row.items() if _is_number(value)} if isinstance(row, dict) else {}
