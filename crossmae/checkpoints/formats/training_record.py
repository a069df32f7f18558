"""Record of the run that trained a model: data, recipe and figures, in the metadata of its weight file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from crossmae.checkpoints.metadata import TRAINING, recorded_value
from crossmae.errors import UserError
from crossmae.files import is_number, leaves, load_yaml, read_json_lines

LOG, CONFIG = "log.jsonl", "config.yaml"
# Keys of a log that describe the machine or the position of a step. Names with a slash are detectron2's own numbers,
# except the metrics of boxes and masks. The metrics of single classes are left out.
_NO_FIGURE = re.compile(
    r"step|epoch|lr|images_per_second|data_wait_share|memory_gb|loss_.*|(?!(bbox|segm)/).*/.*|.*/AP-.*", re.DOTALL
)
_RECIPE_SECTIONS = ("model", "optim", "schedule")
_RECIPE_KEYS = ("data.crop_scale", "data.flip", "data.auto_augment", "data.erase", "runtime.precision", "runtime.seed")
_PATHS = ("model.init",)

Setting = str | int | float | bool | list[Any] | None
Name = Annotated[str, Field(max_length=1000)]


class DataRecord(BaseModel):
    """Name of a data set, and its number of images if known."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    name: Name
    images: int | None = None


class TrainingRecord(BaseModel):
    """Data, recipe and figures of a run.

    Attributes:
        data: data sets by split, "train" and "val".
        recipe: settings by their keys in the config.
        figures: metrics by their names in the run's log, measured after `step` steps.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    data: dict[Name, DataRecord] = Field({})
    recipe: dict[Name, Setting] = Field({})
    figures: dict[Name, float] = Field({})
    step: int | None = None

    def metadata(self) -> dict[str, str]:
        """Return the record as metadata of a weight file."""
        return {TRAINING: json.dumps(self.model_dump(), ensure_ascii=False)}


def recorded_training(metadata: Mapping[str, str]) -> TrainingRecord:
    """Read the record in the metadata of a file, empty without one.

    Raises UserError if the record has another structure.
    """
    try:
        return TrainingRecord.model_validate(recorded_value(metadata, TRAINING, dict))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"metadata {TRAINING!r} of a weight file: {where}: {first['msg']}. Copy the file again."
        ) from None


def read_run(folder: Path, step: int | None) -> TrainingRecord:
    """Collect the record of a run from its folder.

    The run is one of pretraining or classification.

    Args:
        step: steps after which the weights were written; None: unknown, so there are no figures.

    Files of the run that are missing or damaged are left out.
    """
    config: Any = {}
    with suppress(OSError, ValueError):
        config = load_yaml((folder / CONFIG).read_text(encoding="utf-8"))
    settings = leaves(config) if isinstance(config, dict) else {}
    names = {split: _name(settings.get(f"data.{split}")) for split in ("train", "val")}
    images = {"train": _planned_images(folder)}
    data = {split: {"name": name, "images": images.get(split)} for split, name in names.items() if name}
    recipe = {key: value for key, value in settings.items() if value is not None and _is_recipe(key)}
    figures = {} if step is None else logged_figures(folder, step)
    record = {"data": data, "recipe": recipe, "figures": figures, "step": step if figures else None}
    try:
        return TrainingRecord.model_validate(record)
    except ValidationError:  # a config that no run has written
        return TrainingRecord()


def _is_recipe(key: str) -> bool:
    return key not in _PATHS and (key.partition(".")[0] in _RECIPE_SECTIONS or key in _RECIPE_KEYS)


def logged_figures(folder: Path, step: int) -> dict[str, float]:
    """Read the metrics that a run logged at a step."""
    rows = [row for row in read_json_lines(folder / LOG, step=float) if row["step"] == step]
    found = {key: value for row in rows for key, value in row.items()}
    return {key: value for key, value in found.items() if is_number(value) and not _NO_FIGURE.fullmatch(key)}


def _planned_images(folder: Path) -> int | None:
    """Read the number of training images from the newest checkpoint."""
    from crossmae.checkpoints.run_checkpoint import FOLDER, checkpoint_names, read_record  # slow import

    for name in reversed(checkpoint_names(folder)):
        with suppress(UserError):
            plan = read_record(folder / FOLDER / name).get("plan")
            if isinstance(plan, dict) and type(images := plan.get("images")) is int:
                return images
    return None


def _name(value: Any) -> str:
    """Shorten paths to their last parts, because folders are private."""
    values = value if isinstance(value, list) else [value]
    names = [one if "://" in one else Path(one).name for one in values if isinstance(one, str)]
    return ", ".join(filter(None, names))[:1000]
