"""Images of a data set saved to disk by the Hugging Face library `datasets`."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from crossmae.data.sources.source import Source
from crossmae.errors import UserError, counted, import_extra
from crossmae.files import read_file, read_json

SPLITS_FILE = "dataset_dict.json"
DATASET_FILES = ("state.json", "dataset_info.json")

log = logging.getLogger(__name__)


class HuggingFaceImages(Source):
    """The memory-mapped rows of a data set written by `Dataset.save_to_disk`."""

    def __init__(self, folder: Path, key: str) -> None:
        self._folder = str(folder)
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        datasets = import_extra("datasets", f"{key}: {folder}")
        datasets.disable_progress_bars()
        rows = _load(datasets, folder, key)
        self.description = f"{counted(len(rows), 'image')} in the Hugging Face data set {folder}"
        columns = _columns_of(rows, datasets.Image)
        if len(columns) != 1:
            found = f"several columns of images: {', '.join(columns)}" if columns else "no column of images"
            raise UserError(f"{key}: {folder}: {found}. Keep one of {dict(rows.features)} with select_columns.")
        self._column = columns[0]
        # Without decoding and without other columns, a row is read as the bytes of the image file.
        self._rows = rows.select_columns(columns).cast_column(self._column, datasets.Image(decode=False))
        label = _label_column(_columns_of(rows, datasets.ClassLabel))
        if label is not None:
            labels = np.asarray(rows.with_format("numpy")[label][:], dtype=np.int64)
            if (labels < 0).any():
                log.warning(
                    "%s: labels are not used, because of %s without one",
                    self.description,
                    counted(int((labels < 0).sum()), "row"),
                )
            else:
                self.classes, self._labels = tuple(rows.features[label].names), labels

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        return f"{self._folder}[{index}]"

    def read(self, index: int) -> bytes:
        cell = self._rows[index][self._column]
        if cell is None:
            raise UserError(f"{self.name(index)}: the row has no image. Remove the row.")
        if cell["bytes"] is not None:
            return bytes(cell["bytes"])
        return read_file(cell["path"], f"{self.name(index)}: {cell['path']}")


def is_hugging_face(folder: Path) -> bool:
    """Check whether a folder was written by `save_to_disk`."""
    return (folder / SPLITS_FILE).is_file() or all((folder / name).is_file() for name in DATASET_FILES)


def _load(datasets: Any, folder: Path, key: str) -> Any:
    if (folder / SPLITS_FILE).is_file():
        content = read_json(folder / SPLITS_FILE)
        splits = content.get("splits") if isinstance(content, dict) else None
        if not isinstance(splits, list) or not splits or not all(isinstance(split, str) for split in splits):
            raise UserError(f"{key}: {folder} holds no data set. Save it again.")
        raise UserError(
            f"{key}: {folder} holds several data sets: {', '.join(splits)}. Name one: {key}={folder}/{splits[0]}"
        )
    try:
        return datasets.load_from_disk(str(folder))
    except Exception as error:  # IndexError for an empty data set, any pyarrow error for a damaged one
        raise UserError(
            f"{key}: {folder}: not a whole Hugging Face data set with at least one row: {error}. Save it again."
        ) from error


def _columns_of(rows: Any, feature: type) -> list[str]:
    return [name for name, value in rows.features.items() if isinstance(value, feature)]


def _label_column(columns: list[str]) -> str | None:
    if len(columns) == 1:
        return columns[0]
    named = [name for name in columns if name in ("label", "labels")]
    if columns and not named:
        log.warning("labels are not used, there are several kinds: %s", ", ".join(columns))
    return named[0] if named else None
