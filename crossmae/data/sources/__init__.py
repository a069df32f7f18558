"""One config value, many kinds of data: what is there decides how it is read.

| value                               | kind                                    | labels                |
| ----------------------------------- | --------------------------------------- | --------------------- |
| folder with images                  | all images in it and its subfolders     | one subfolder a class |
| folder with .tar files, or one file | tar shards in WebDataset layout         | `.cls`, or in `.json` |
| `x-*.tar`, `x-{000..012}.tar`, URLs | the same                                | the same              |
| `.txt`                              | one path a line                         | none                  |
| `.csv`, `.tsv`, `.parquet`          | column path, image, file_name, filename | column label or class |
| `.json`                             | the images of COCO annotations          | none                  |
| folder by `Dataset.save_to_disk`    | Hugging Face data set, its Image column | its ClassLabel column |
| folder of `*-images-idx3-ubyte.gz`  | MNIST and its like; or one such file    | `*-labels-idx1-*`     |
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from crossmae.data.images import IMAGE_SUFFIXES, find_image_names
from crossmae.data.sources.hugging_face import HuggingFaceImages, is_hugging_face
from crossmae.data.sources.idx import SUFFIXES as IDX_SUFFIXES
from crossmae.data.sources.idx import find_idx_files, open_idx
from crossmae.data.sources.lists import open_coco, open_csv_list, open_parquet_list, open_text_list
from crossmae.data.sources.shard_files import is_url
from crossmae.data.sources.source import ImageFiles, Source, evenly_spaced
from crossmae.data.sources.tar_index import PROGRESS_NAME
from crossmae.data.sources.tar_shards import SHARD_SUFFIXES, open_shards
from crossmae.errors import UserError

__all__ = ["Source", "evenly_spaced", "open_source"]

LISTS = {
    ".txt": open_text_list,
    ".csv": open_csv_list,
    ".tsv": open_csv_list,
    ".parquet": open_parquet_list,
    ".json": open_coco,
}
ACCEPTED = (
    "a folder of images, .tar shards (a folder, a file, x-*.tar, x-{000..012}.tar, or a URL of them), a .txt, .csv, "
    ".tsv or .parquet list, a COCO .json, a folder saved by Hugging Face datasets, or MNIST's idx files"
)

log = logging.getLogger(__name__)


def open_source(value: str | Path, key: str, root: Path | None = None) -> Source:
    """Open a data set of any kind in the table above.

    Args:
        value: path or URL; a `Path` is always on this machine. `~` is expanded.
        key: the config key or flag that named it, for errors.
        root: where the relative paths of a list or COCO file start; default: the list's own folder.

    Raises:
        UserError: nothing there, no such kind, or the data set can not be used; names key, file and what is expected.
    """
    path = Path(value).expanduser()
    opener = LISTS.get(path.suffix.lower()) if path.is_file() else None
    if opener is not None:
        return opener(path, key, root.expanduser() if root is not None else None)
    if root is not None:
        log.info("%s: %s is no list of files, so the folder %s for relative paths is not used", key, value, root)
    if path.is_dir():
        return _open_folder(path, key)
    if path.is_file() and path.name.endswith(IDX_SUFFIXES):
        return open_idx(path, key)
    if _names_shards(value):
        return open_shards(str(value), key)
    if path.is_file():
        raise UserError(f"{key}: {path}: no such kind of data is known; expected {ACCEPTED}")
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    raise UserError(f"{key}: {path} does not exist (the nearest folder that does: {parent}); expected {ACCEPTED}")


def _names_shards(value: str | Path) -> bool:
    text = str(value)
    return (isinstance(value, str) and is_url(text)) or text.endswith(SHARD_SUFFIXES) or any(c in text for c in "*{")


def _open_folder(folder: Path, key: str) -> Source:
    if is_hugging_face(folder):
        return HuggingFaceImages(folder, key)
    if find_idx_files(folder) and not _has_images(folder):
        return open_idx(folder, key)
    has_shards = any(folder.glob("*.tar")) or (folder / PROGRESS_NAME).is_file()
    if has_shards and not _has_images(folder):
        return open_shards(str(folder), key)
    paths = find_image_names(folder, key)
    labels = _classes_by_folder(folder, paths)
    if labels is None:
        return ImageFiles(paths, f"{len(paths):,} images in the folder {folder}")
    classes = sorted(set(labels))
    empty = sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.is_dir() and entry.name not in classes and entry.name[0] != "."
    )
    if empty:
        log.warning("%s: no image in the class folder %s: not counted as a class", folder, ", ".join(empty))
    return ImageFiles(paths, f"{len(paths):,} images of {len(classes):,} classes in the folder {folder}", labels)


def _has_images(folder: Path) -> bool:
    return any(
        path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
        for path in folder.rglob("*")
    )


def _classes_by_folder(folder: Path, names: list[str]) -> list[str] | None:
    """The first-level subfolder of every image, if all are in one and there are at least two."""
    start = len(os.path.join(folder, ""))
    parts = [name[start:].partition(os.sep) for name in names]
    if not all(separator for _, separator, _ in parts):
        return None
    labels = [first for first, _, _ in parts]
    return labels if len(set(labels)) > 1 else None
