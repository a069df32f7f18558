"""What the files in the folder of a run tell, also where some are missing or damaged because the run was cut off."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from crossmae.checkpoints.run_checkpoint import FOLDER as CHECKPOINTS
from crossmae.checkpoints.run_checkpoint import RECORD as RUN_RECORD
from crossmae.classification.classifier import BEST
from crossmae.classification.evaluation.files import EVALUATION
from crossmae.classification.evaluation.hardest import HARDEST
from crossmae.classification.evaluation.hardest import RECORD as HARDEST_RECORD
from crossmae.errors import UserError
from crossmae.files import read_json
from crossmae.training.config import read_yaml
from crossmae.training.log import LOG
from crossmae.training.start import WEIGHTS

CONFIG, REPORT, FOLDER = "config.yaml", "report.html", "evaluation"
T = TypeVar("T")
Content = TypeVar("Content", bound="FileContent")


class FileContent(BaseModel):
    """Base of what is read from JSON: what a page does not need is passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class ClassRow(FileContent):
    """A class of an evaluation; shares of 1, None where not defined for lack of images."""

    name: str
    samples: int
    recall: float | None
    precision: float | None
    ap: float | None = None


class ConfusedPair(FileContent):
    """So many images of one class were taken for another; `share` of the true one's."""

    true: str
    predicted: str
    count: int
    share: float


class Evaluation(FileContent):
    """Content of `evaluation.json`: numbers of the whole data set by name, and what they are of."""

    samples: int
    numbers: dict[str, float | None]
    top1_interval: tuple[float, float] | None = None
    classes: list[ClassRow]
    most_confused: list[ConfusedPair] = []
    about: dict[str, Any]

    @model_validator(mode="after")
    def _has_what_counts(self) -> Evaluation:
        if self.metric not in self.numbers:
            raise ValueError("numbers have neither top1 nor mean_ap")
        return self

    @property
    def multi_label(self) -> bool:
        """Whether an image can have several classes."""
        return self.metric == "mean_ap"

    @property
    def metric(self) -> str:
        """The name of the number that counts."""
        return "mean_ap" if "mean_ap" in self.numbers else "top1"


class HardImage(FileContent):
    """A wrongly classified image: its picture, or why there is none; its classes with their probabilities."""

    name: str
    picture: str | None
    fault: str = ""
    true: list[tuple[str, float]]
    predicted: list[tuple[str, float]]


class Hardest(FileContent):
    """Content of `hardest.json`: how many images are wrong, and the worst of them."""

    wrong: int
    images: list[HardImage]


@dataclass(frozen=True)
class Log:
    """Numbers by name, one row a line of `log.jsonl`, and how many lines could not be read."""

    rows: list[dict[str, float]] = field(default_factory=list)
    damaged: int = 0

    def values(self, key: str) -> list[float]:
        """All values of one name, in order."""
        return [row[key] for row in self.rows if key in row]

    def seconds(self, images_per_step: int) -> float:
        """What the steps took, about: each logged speed is that of the steps since the one before."""
        total, previous = 0.0, 0.0
        for row in self.rows:
            if row.get("images_per_second", 0) > 0 and "step" in row:
                total += (row["step"] - previous) * images_per_step / row["images_per_second"]
                previous = row["step"]
        return total


@dataclass(frozen=True)
class Run:
    """What the folder of a run holds; what is not there is empty or None, and `faults` says why, by file name.

    Attributes:
        config: as in the file, sections by name.
        plan: of the last checkpoint, see `crossmae.training.schedule.Plan`.
    """

    folder: Path
    config: dict[str, dict[str, Any]]
    log: Log
    plan: dict[str, Any]
    versions: dict[str, str]
    evaluation: Evaluation | None
    hardest: Hardest | None
    faults: dict[str, str]

    @property
    def is_evaluation(self) -> bool:
        """Nothing was trained here."""
        return self.evaluation is not None and not self.log.rows and not (self.folder / CONFIG).exists()

    @property
    def is_unfinished(self) -> bool:
        """Training has begun and not ended: it goes on, or was cut off."""
        return bool(self.log.rows) and not (self.folder / WEIGHTS).is_file()

    @property
    def has_weights(self) -> bool:
        """Whether there are weights that `load_classifier` finds by the folder."""
        return (self.folder / BEST).is_file() or (self.folder / WEIGHTS).is_file()


def read_run(folder: Path, faults: Mapping[str, str]) -> Run:
    """Read what there is of a run; never an error.

    Args:
        folder: of the run.
        faults: what is known already, by file name.
    """
    known = dict(faults)

    def read(name: str, reader: Callable[[Path], T], instead: T) -> T:
        path = folder / name
        try:
            if path.is_file():
                return reader(path)
            known.setdefault(name, "the file does not exist")
        except (UserError, OSError) as error:
            known[name] = str(error).removeprefix(str(path)).lstrip(":, ")
        return instead

    nothing: dict[str, Any] = {}
    no_evaluation: Evaluation | None = None
    no_images: Hardest | None = None
    checkpoint = max((folder / CHECKPOINTS).glob(f"step-*/{RUN_RECORD}"), default=folder / CHECKPOINTS / RUN_RECORD)
    record = read(str(checkpoint.relative_to(folder)), _read_object, nothing)
    evaluation = read(f"{FOLDER}/{EVALUATION}", read_evaluation, no_evaluation)
    about = evaluation.about if evaluation is not None else nothing
    return Run(
        folder,
        {name: section for name, section in read(CONFIG, read_yaml, nothing).items() if isinstance(section, dict)},
        read(LOG, read_log, Log()),
        _object(record.get("plan")),
        {name: str(version) for name, version in _object(record.get("versions", about.get("versions"))).items()},
        evaluation,
        read(f"{FOLDER}/{HARDEST}/{HARDEST_RECORD}", lambda path: _read(Hardest, path), no_images),
        known,
    )


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _read_object(path: Path) -> dict[str, Any]:
    return _object(read_json(path))


def _read(schema: type[Content], path: Path) -> Content:
    """Read a JSON file.

    Raises:
        UserError: not such a file; names it and the first key that is wrong.
    """
    try:
        return schema.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{path}: not what an evaluation writes: {where + ': ' if where else ''}{first['msg']}"
        ) from None


def read_evaluation(path: Path) -> Evaluation:
    """Read an `evaluation.json`, see `crossmae.classification.evaluation.files`.

    Raises:
        UserError: not such a file; names it.
    """
    return _read(Evaluation, path)


def read_log(path: Path) -> Log:
    """Read a `log.jsonl`; a line that was cut off is left out and counted.

    Raises:
        OSError: it can not be read.
    """
    rows, damaged = [], 0
    for line in filter(str.strip, path.read_text("utf-8", errors="replace").splitlines()):
        row = _numbers_of(line)
        if "epoch" in row:
            rows.append(row)
        else:
            damaged += 1
    return Log(rows, damaged)


def _numbers_of(line: str) -> dict[str, float]:
    """The finite numbers in a line that holds a JSON object; none for any other line."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    numbers = {key: value for key, value in row.items() if type(value) in (int, float)} if isinstance(row, dict) else {}
    return {key: value for key, value in numbers.items() if math.isfinite(value)}
