"""Images of a data set that Hugging Face's library `datasets` saved to disk."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from crossmae.data.sources.source import Source
from crossmae.errors import UserError, import_extra

SPLITS_FILE = "dataset_dict.json"
DATASET_FILES = ("state.json", "dataset_info.json")

log = logging.getLogger(__name__)


class HuggingFaceImages(Source):
    """The rows of a data set on disk, memory-mapped.

    Args:
        folder: what `Dataset.save_to_disk` wrote.
        key: the config key that named it, for errors.

    Raises:
        UserError: several data sets in it, no or several columns of images, or damaged.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._folder = str(folder)
        datasets = _import_datasets(f"{key}: {folder}")
        rows = _load(datasets, folder, key)
        self.description = f"{len(rows):,} images in the Hugging Face data set {folder}"
        self._column = _image_column(datasets, rows, folder, key)
        # Without decoding, and without the other columns, a row is the file's bytes.
        self._rows = rows.select_columns([self._column]).cast_column(self._column, datasets.Image(decode=False))
        label = _label_column(datasets, rows)
        if label is not None:
            labels = np.asarray(rows.with_format("numpy")[label][:], dtype=np.int64)
            if (labels < 0).any():
                log.warning("%s: labels are not used, %d rows have none", self.description, int((labels < 0).sum()))
            else:
                self.classes, self._labels = tuple(rows.features[label].names), labels

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        """Folder and row."""
        return f"{self._folder}[{index}]"

    def read(self, index: int) -> bytes:
        """See `Source.read`."""
        cell = self._rows[index][self._column]
        if cell is None:
            raise UserError(f"{self.name(index)}: the row has no image")
        if cell["bytes"] is not None:
            return bytes(cell["bytes"])
        try:
            with open(cell["path"], "rb") as file:
                return file.read()
        except OSError as error:
            raise UserError(f"{self.name(index)}: {cell['path']} can not be read: {error.strerror}") from error


def is_hugging_face(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return (folder / SPLITS_FILE).is_file() or all((folder / name).is_file() for name in DATASET_FILES)


def _import_datasets(what: str) -> Any:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    datasets = import_extra("datasets", what)
    datasets.disable_progress_bars()
    return datasets


def _load(datasets: Any, folder: Path, key: str) -> Any:
    if (folder / SPLITS_FILE).is_file():
        splits = json.loads((folder / SPLITS_FILE).read_text(encoding="utf-8")).get("splits", [])
        raise UserError(
            f"{key}: {folder} holds several data sets: {', '.join(splits)}; name one: {key}={folder}/{splits[0]}"
            if splits
            else f"{key}: {folder} holds no data set"
        )
    try:
        rows = datasets.load_from_disk(str(folder))
    except Exception as error:  # an empty one is an IndexError, a damaged one any error of pyarrow
        raise UserError(f"{key}: {folder}: not a whole Hugging Face data set with at least one row: {error}") from error
    return rows


def _image_column(datasets: Any, rows: Any, folder: Path, key: str) -> str:
    columns = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    if len(columns) != 1:
        found = f"several columns of images: {', '.join(columns)}" if columns else "no column of images"
        raise UserError(f"{key}: {folder}: {found}; columns: {dict(rows.features)}; keep one with select_columns")
    return columns[0]


def _label_column(datasets: Any, rows: Any) -> str | None:
    columns = [name for name, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
    if len(columns) == 1:
        return str(columns[0])
    named = [name for name in columns if name in ("label", "labels")]
    if columns and not named:
        log.warning("labels are not used, there are several kinds: %s", ", ".join(columns))
    return named[0] if named else None
