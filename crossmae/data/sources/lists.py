"""Lists of image files: text, CSV, Parquet, and COCO annotations."""

from __future__ import annotations

import csv
import io
import logging
import os
import re
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from crossmae.data.found_names import NOTHING_LIKE, describe_moved, find_moved
from crossmae.data.paths import IMAGE_SUFFIXES, are_files, join_names, refuse_unread
from crossmae.data.sources.source import ImageFiles
from crossmae.errors import UserError, counted, import_extra, printable, shorten
from crossmae.files import decode_text, parse_json, read_file, special_kind

PATH_COLUMNS = ("path", "image", "file_name", "filename")
LABEL_COLUMNS = ("label", "class")
MISSING_LABELS = ("", "nan", "NaN")  # as pandas writes them; NA and None are read as names of classes
LABELLED_LINE = re.compile(
    rf"(.+(?:{'|'.join(map(re.escape, sorted(IMAGE_SUFFIXES)))}))[\s,;]+([\w-]+)", re.IGNORECASE
)  # a path and a label
# Name of the setting for the base folder of a list, by the key of the data set.
ROOT_KEYS = {"data.train": "data.root", "data.val": "data.val_root", "SRC": "--root"}

SEVERAL_LABELS = "Keep one of these lines, or join the labels of an image, such as `cat|dog`, and set data.separator"

log = logging.getLogger(__name__)


def open_text_list(path: Path, key: str, root: Path | None) -> ImageFiles:
    """Open a text file of paths, without blank lines and # comments.

    Lines may end in a label, as in `cat/1.jpg 0`.
    """
    lines = [line.strip() for line in _read_text(path, key).split("\n")]
    lines = [line for line in lines if line and not line.startswith("#")]
    pairs = list(takewhile(bool, map(LABELLED_LINE.fullmatch, lines)))  # the first line without a label is the last
    if lines and len(pairs) == len(lines) and not os.path.isfile((root or path.parent) / lines[0]):
        log.info("%s: every line ends in a label, such as %r", path, lines[0])
        names, labels = zip(*(pair.groups() for pair in pairs if pair), strict=True)
        return _listed(names, labels, path, key, root)
    return _listed(lines, None, path, key, root)


def open_csv_list(path: Path, key: str, root: Path | None) -> ImageFiles:
    """Open a .csv or .tsv file whose first line names the columns."""
    rows = _read_rows(path, key)
    header = [name.strip() for name in rows[0]] if rows else []
    if not header:
        raise UserError(f"{key}: {path} is empty. Fill it, or name another list.")
    if any(PurePosixPath(word).suffix.lower() in IMAGE_SUFFIXES for name in header for word in re.split("[;,|]", name)):
        raise UserError(f"{key}: {path}: the first line is {header}. It must name the columns, such as path,label.")
    path_column, label_column = _columns(header, path, key)
    names, labels = [], []
    for number, row in enumerate(rows[1:], start=2):
        if not any(cell.strip() for cell in row):  # Excel writes such rows at the end
            continue
        if len(row) != len(header):
            raise UserError(
                f"{key}: {path}, line {number}: has {counted(len(row), 'value')}, the header {len(header)}: {row}. "
                "Correct it."
            )
        cells = dict(zip(header, row, strict=True))
        names.append(cells[path_column])
        labels.append(cells[label_column] if label_column else None)
    return _listed(names, labels if label_column else None, path, key, root, header)


def _read_rows(path: Path, key: str) -> list[list[str]]:
    """Read a table, if need be with another separator than its suffix's."""
    text = _read_text(path, key)
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    first, _, rest = text.partition("\n")
    if stated := re.fullmatch(r'"?sep=(.)"?', first.strip(), re.IGNORECASE):  # written by Excel
        usual, text = stated[1], rest
    for delimiter in dict.fromkeys((usual, ",", ";", "\t", "|")):
        try:
            header = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])
        except csv.Error:
            continue
        if len(header) > 1 and {_plain_column(name) for name in header} & set(map(_plain_column, PATH_COLUMNS)):
            break
    else:
        delimiter = usual
    if delimiter != usual:
        log.info("%s: columns are separated by %r", path, delimiter)
    try:
        return list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise UserError(f"{key}: {path}: not valid {path.suffix[1:].upper()}: {error}. Write it again.") from None


def open_parquet_list(path: Path, key: str, root: Path | None) -> ImageFiles:
    """Open a .parquet file with the same columns as a CSV list."""
    parquet = import_extra("pyarrow.parquet", f"{key}: {path}")
    try:
        schema = parquet.read_schema(path)
        path_column, label_column = _columns(schema.names, path, key)
        table = parquet.read_table(path, columns=[path_column] + ([label_column] if label_column else []))
        names = table[path_column].to_pylist()
        texts = table[label_column].to_pylist() if label_column else []
    except UserError:
        raise
    except Exception as error:  # pyarrow raises many kinds of errors for damaged files
        raise UserError(
            f"{key}: {path}: not a whole Parquet file, or it cannot be read: {error}. Write it again."
        ) from error
    if any(name is not None and not isinstance(name, str) for name in names):
        kind = str(schema.field(path_column).type)
        raise UserError(
            f"{key}: {path}: column {path_column!r} holds {kind}, expected paths. Images inside Parquet files are read "
            "once the library datasets has saved them: load_dataset('parquet', data_files=...).save_to_disk(...)."
        )
    labels = [None if label is None or label != label else str(label) for label in texts] if label_column else None
    return _listed(names, labels, path, key, root, schema.names)


def open_coco(path: Path, key: str, root: Path | None) -> ImageFiles:
    """Open the images of a COCO file, without labels."""
    content = parse_json(_read_text(path, key), f"{key}: {path}")
    entries = content.get("images") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise UserError(f'{key}: {path}: no COCO annotations. Give a mapping with a list "images".')
    names = [_coco_name(entry, f"{key}: {path}: images[{index}]") for index, entry in enumerate(entries)]
    unique = list(dict.fromkeys(names))
    if len(unique) < len(names):
        log.info(
            "%s: %s, each image counts once",
            path,
            counted(len(names) - len(unique), "repeated entry", "repeated entries"),
        )
    return _listed(unique, None, path, key, root, outside=False)


LISTS: dict[str, Callable[[Path, str, Path | None], ImageFiles]] = {
    ".txt": open_text_list,
    ".csv": open_csv_list,
    ".tsv": open_csv_list,
    ".parquet": open_parquet_list,
    ".json": open_coco,
}


def _read_text(path: Path, key: str) -> str:
    shown = f"{key}: {path}"
    return decode_text(read_file(path, shown), path, shown)


def _plain_column(name: str) -> str:
    return re.sub(r"[\s_-]", "", name.casefold())


def _columns(names: Sequence[str], path: Path, key: str) -> tuple[str, str | None]:
    """Find the columns of paths and labels."""
    label = _column(LABEL_COLUMNS, names)
    others = [name for name in names if name != label]
    chosen = _column(PATH_COLUMNS, names) or (others[0] if len(others) == 1 else None)
    if chosen is None:
        raise UserError(
            f"{key}: {path}: the columns are {', '.join(names) or 'none'}. Name one of them "
            f"{', '.join(PATH_COLUMNS[:-1])} or {PATH_COLUMNS[-1]}."
        )
    return chosen, label


def _column(wanted: Sequence[str], names: Sequence[str]) -> str | None:
    plain = {_plain_column(name): name for name in reversed(names)}
    return next((name for name in wanted if name in names), None) or next(
        (plain[one] for one in map(_plain_column, wanted) if one in plain), None
    )


def _coco_name(entry: Any, where: str) -> str:
    name = entry.get("file_name") if isinstance(entry, dict) else None
    if not isinstance(name, str) or not name:
        raise UserError(f"{where}: file_name is {name!r}. It must be text.")
    return name


def _leads_out(name: str) -> bool:
    parts = PurePosixPath(name)
    return parts.is_absolute() or PureWindowsPath(name).is_absolute() or ".." in parts.parts


def _listed(
    names: Sequence[str | None],
    labels: Sequence[str | None] | None,
    path: Path,
    key: str,
    root: Path | None,
    columns: Sequence[str] = (),
    outside: bool = True,
) -> ImageFiles:
    folder = root or path.parent
    if root is not None and not root.is_dir():
        raise UserError(f"{ROOT_KEYS.get(key, key)}: {root} is not a folder. Name one.")
    if not names:
        raise UserError(f"{key}: {path} names no image. Fill it, or name another list.")
    given = [name for name in names if name and name.strip()]
    if len(given) < len(names):
        number = next(number for number, name in enumerate(names, start=1) if not name or not name.strip())
        raise UserError(f"{key}: {path}: image {number} of {len(names)} has an empty path. Fill it in.")
    paths = _find_files(given, folder, path, key, outside)
    refuse_unread(paths, f"{key}: {path}")
    shown = f" (columns {', '.join(columns)})" if columns else ""
    if labels is not None:
        labels = [None if label in MISSING_LABELS else label for label in labels]
    source = ImageFiles(paths, f"{counted(len(paths), 'image')} in the list {path}{shown}", labels)
    if source.classes:
        _check_repeated(source, paths)
    elif labels is not None and not any(labels):
        source.leave_unlabelled("the column of labels is empty", "Fill it in")
    return source


def _find_files(names: Sequence[str], folder: Path, path: Path, key: str, outside: bool) -> list[str]:
    """Return the file of each name, which may be written differently.

    Without `outside`, only files in the folder are used.
    """
    paths = join_names(folder, names)
    found = are_files(paths)
    if not outside:
        found = [is_there and not _leads_out(name) for name, is_there in zip(names, found, strict=True)]
    missing = list(dict.fromkeys(name for name, is_there in zip(names, found, strict=True) if not is_there))
    if not missing:
        return paths
    present = [name for name, is_there in zip(names, found, strict=True) if is_there]
    moved, reasons = find_moved(folder, missing, present)
    reasons |= {name: f"{kind}, not a file" for name in reasons if (kind := special_kind(folder / name))}
    if reasons:
        advice = f"set {ROOT_KEYS[key]}=FOLDER" if key in ROOT_KEYS else "write absolute paths"
        if not outside:
            reasons = {name: "leads out of the folder" if _leads_out(name) else why for name, why in reasons.items()}
        lost = [printable(name) + (f" ({why})" if why != NOTHING_LIKE else "") for name, why in reasons.items()]
        raise UserError(
            f"{key}: {path}: {len(lost):,} of {len(names):,} images are not there: {shorten(lost)}. Relative "
            f"paths start at {folder}: if that is the wrong folder, {advice}."
        )
    log.warning("%s: %s", path, describe_moved(folder, moved, len(missing)))
    return [
        one if is_there else str(folder / moved[name]) for name, one, is_there in zip(names, paths, found, strict=True)
    ]


def _check_repeated(source: ImageFiles, paths: Sequence[str]) -> None:
    """Use no labels if an image is listed again with another label."""
    names = list(map(os.path.normpath, paths))
    if len(set(names)) == len(names):
        return
    first: dict[str, int] = {}
    labels, repeated = source.labels(), 0
    for index, name in enumerate(names):
        other = first.setdefault(name, index)
        repeated += other != index
        if labels[other] != labels[index]:
            both = " and ".join(repr(source.classes[labels[one]]) for one in (other, index))
            source.leave_unlabelled(f"{printable(name)} is listed as {both}", SEVERAL_LABELS)
            return
    if repeated:
        log.info("%s: %s", source.description, counted(repeated, "repeated entry", "repeated entries"))
