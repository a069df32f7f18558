"""Lists of image files: text, CSV, Parquet, and COCO annotations."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from crossmae.data.parallel import map_in_order
from crossmae.data.paths import IMAGE_SUFFIXES
from crossmae.data.sources.source import ImageFiles
from crossmae.errors import UserError, import_extra, shorten
from crossmae.files import printable, read_file, special_kind

PATH_COLUMNS = ("path", "image", "file_name", "filename")
LABEL_COLUMNS = ("label", "class")
# Name of the setting for the base folder of a list, by the key of the data set.
ROOT_KEYS = {"data.train": "data.root", "data.val": "data.val_root", "SRC": "--root"}

log = logging.getLogger(__name__)


def open_text_list(path: Path, key: str, root: Path | None) -> ImageFiles:
    """Open a text file of paths, without blank lines and # comments."""
    lines = [line.strip() for line in _read_text(path, key).split("\n")]
    return _listed([line for line in lines if line and not line.startswith("#")], None, path, key, root)


def open_csv_list(path: Path, key: str, root: Path | None) -> ImageFiles:
    """Open a .csv or .tsv file whose first line names the columns."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        rows = list(csv.reader(io.StringIO(_read_text(path, key), newline=""), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise UserError(f"{key}: {path}: not valid {path.suffix[1:].upper()}: {error}. Write it again.") from None
    header = [name.strip() for name in rows[0]] if rows else []
    if any(PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES for name in header):
        raise UserError(f"{key}: {path}: the first line is {header}. It must name the columns, such as path,label.")
    path_column, label_column = _columns(header, path, key)
    names, labels = [], []
    for number, row in enumerate(rows[1:], start=2):
        if row and len(row) != len(header):
            raise UserError(
                f"{key}: {path}, line {number}: has {len(row)} values, the header {len(header)}: {row}. Correct it."
            )
        if row:
            cells = dict(zip(header, row, strict=True))
            names.append(cells[path_column])
            labels.append(cells[label_column] if label_column else None)
    return _listed(names, labels if label_column else None, path, key, root, header)


def open_parquet_list(path: Path, key: str, root: Path | None) -> ImageFiles:
    """Open a .parquet file with the same columns as a CSV list."""
    parquet = import_extra("pyarrow.parquet", f"{key}: {path}")
    try:
        schema = parquet.read_schema(path)
        path_column, label_column = _columns(schema.names, path, key)
        table = parquet.read_table(path, columns=[path_column] + ([label_column] if label_column else []))
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise UserError(
            f"{key}: {path}: not a whole Parquet file, or it cannot be read: {error}. Write it again."
        ) from error
    names = table[path_column].to_pylist()
    if any(name is not None and not isinstance(name, str) for name in names):
        kind = str(schema.field(path_column).type)
        raise UserError(
            f"{key}: {path}: column {path_column!r} holds {kind}, expected paths. Images inside Parquet files are read "
            "once the library datasets has saved them: load_dataset('parquet', data_files=...).save_to_disk(...)."
        )
    texts = table[label_column].to_pylist() if label_column else []
    labels = [None if label is None else str(label) for label in texts] if label_column else None
    return _listed(names, labels, path, key, root, schema.names)


def open_coco(path: Path, key: str, root: Path | None) -> ImageFiles:
    """Open the images of a COCO file, without labels."""
    try:
        content = json.loads(_read_text(path, key))
    except json.JSONDecodeError as error:
        raise UserError(f"{key}: {path}: not valid JSON: {error}. Write it again.") from None
    entries = content.get("images") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise UserError(f'{key}: {path}: no COCO annotations. Give a mapping with a list "images".')
    names = [_coco_name(entry, f"{key}: {path}: images[{index}]") for index, entry in enumerate(entries)]
    unique = list(dict.fromkeys(names))
    if len(unique) < len(names):
        log.info("%s: %s entries name an image again; each image counts once", path, f"{len(names) - len(unique):,}")
    return _listed(unique, None, path, key, root)


LISTS: dict[str, Callable[[Path, str, Path | None], ImageFiles]] = {
    ".txt": open_text_list,
    ".csv": open_csv_list,
    ".tsv": open_csv_list,
    ".parquet": open_parquet_list,
    ".json": open_coco,
}


def _read_text(path: Path, key: str) -> str:
    try:
        return read_file(path, f"{key}: {path}").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{key}: {path}: not a text file in UTF-8: {error}. Write it again.") from error


def _columns(names: Sequence[str], path: Path, key: str) -> tuple[str, str | None]:
    label = next((name for name in LABEL_COLUMNS if name in names), None)
    others = [name for name in names if name != label]
    chosen = next((name for name in PATH_COLUMNS if name in names), others[0] if len(others) == 1 else None)
    if chosen is None:
        raise UserError(
            f"{key}: {path}: the columns are {', '.join(names) or 'none'}. Name one of them "
            f"{', '.join(PATH_COLUMNS[:-1])} or {PATH_COLUMNS[-1]}."
        )
    return chosen, label


def _coco_name(entry: Any, where: str) -> str:
    name = entry.get("file_name") if isinstance(entry, dict) else None
    if not isinstance(name, str) or not name:
        raise UserError(f"{where}: file_name is {name!r}. It must be text.")
    parts = PurePosixPath(name)
    if parts.is_absolute() or PureWindowsPath(name).is_absolute() or ".." in parts.parts:
        raise UserError(f"{where}: file_name {name!r} leads out of the image folder. Give a path inside it.")
    return name


def _describe_missing(path: Path) -> str:
    kind = special_kind(path)
    return f"{printable(path)} ({kind}, not a file)" if kind else printable(path)


def _listed(
    names: Sequence[str | None],
    labels: Sequence[str | None] | None,
    path: Path,
    key: str,
    root: Path | None,
    columns: Sequence[str] = (),
) -> ImageFiles:
    folder = root or path.parent
    if root is not None and not root.is_dir():
        raise UserError(f"{ROOT_KEYS.get(key, key)}: {root} is not a folder. Name one.")
    if not names:
        raise UserError(f"{key}: {path} names no image. Fill it, or name another list.")
    paths = [folder / name for name in names if name]
    if len(paths) < len(names):
        number = next(number for number, name in enumerate(names, start=1) if not name)
        raise UserError(f"{key}: {path}: image {number} of {len(names)} has an empty path. Fill it in.")
    found = map_in_order(os.path.isfile, paths, bar="find images")
    if missing := [_describe_missing(path) for path, is_there in zip(paths, found, strict=True) if not is_there]:
        advice = f"set {ROOT_KEYS[key]}=FOLDER" if key in ROOT_KEYS else "write absolute paths"
        raise UserError(
            f"{key}: {path}: {len(missing):,} of {len(paths):,} images are not there: {shorten(missing)}. Relative "
            f"paths start at {folder}: if that is the wrong folder, {advice}."
        )
    shown = f" (columns {', '.join(columns)})" if columns else ""
    return ImageFiles(paths, f"{len(paths):,} images in the list {path}{shown}", labels)
