"""Open a data set of any kind by one config value. The files found there decide how the data set is read.

| value                               | kind                                    | labels                |
| ----------------------------------- | --------------------------------------- | --------------------- |
| folder with images                  | all images in it and its subfolders     | one subfolder a class |
| folder with .tar files, or one file | tar shards in WebDataset layout         | `.cls`, or in `.json` |
| `x-*.tar`, `x-{000..012}.tar`, URLs | tar shards in WebDataset layout         | `.cls`, or in `.json` |
| `.txt`                              | one path per line                       | after each path       |
| `.csv`, `.tsv`, `.parquet`          | column path, image, file_name, filename | column label or class |
| `.json`                             | the images of COCO annotations          | none                  |
| folder by `Dataset.save_to_disk`    | Hugging Face data set, its Image column | its ClassLabel column |
| folder of `*-images-idx3-ubyte.gz`  | MNIST or a similar set; or one file     | `*-labels-idx1-*`     |
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from crossmae.data.images import IMAGE_LIMITS, ImageLimits
from crossmae.data.paths import IMAGE_SUFFIXES, find_images, is_system_name, walk_files
from crossmae.data.sources.class_folders import SPLIT_NAME, doubt_classes
from crossmae.data.sources.hugging_face import HuggingFaceImages, is_hugging_face
from crossmae.data.sources.idx import IDX_SUFFIXES, find_idx_files, open_idx
from crossmae.data.sources.lists import LISTS, ROOT_KEYS
from crossmae.data.sources.shard_files import is_url
from crossmae.data.sources.source import ImageFiles, Source
from crossmae.data.sources.tar_index import PROGRESS_NAME
from crossmae.data.sources.tar_shards import SHARD_SUFFIXES, open_shards
from crossmae.errors import UserError, counted, printable, shorten
from crossmae.files import PACKED_STARTS, decode_text, expand_path, special_kind

__all__ = ["LISTS", "Source", "open_named", "open_source", "warn_of_overlap"]

ACCEPTED = (
    "a folder of images, .tar shards (a folder, a file, x-*.tar, x-{000..012}.tar, or a URL of them), a .txt, .csv, "
    ".tsv or .parquet list, a COCO .json, a folder saved by Hugging Face datasets, or MNIST's idx files"
)
WITHOUT = {"data.val": "data.val=null"} | dict.fromkeys(
    ("probe.train", "probe.val"), "probe.train=null probe.val=null"
)  # overrides that disable an optional data set
PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".zip", ".xlsx")
MOST_PREVIEWS = 10  # images next to tar shards that are taken for previews
MOST_NAMES = 2_000_000  # largest number of names that are compared; more would take minutes

log = logging.getLogger(__name__)


def open_source(value: str | Path, key: str, root: Path | None = None, limits: ImageLimits = IMAGE_LIMITS) -> Source:
    """Open a data set of any kind in the table above.

    Args:
        value: path or URL; a `Path` is always on this machine. `~` is expanded.
        root: base folder of the relative paths in a list or COCO file; default: the folder of the list.
        limits: see `Source`.

    Raises:
        UserError: If the data set does not exist, is of an unknown kind, or is damaged. The message names the key, the
            file and the expected kinds.
    """
    source = _open_any(value, key, root)
    source.limits = limits
    return source


def _open_any(value: str | Path, key: str, root: Path | None) -> Source:
    path = Path(value) if isinstance(value, str) and is_url(value) else expand_path(value, key)
    is_file = os.path.isfile(path)  # False for a name that is too long
    opener = LISTS.get(path.suffix.lower()) if is_file else None
    if opener is not None:
        return opener(path, key, expand_path(root, ROOT_KEYS.get(key, key)) if root is not None else None)
    if root is not None:
        log.info("%s: %s is no list of files, so the folder %s for relative paths is unused", key, value, root)
    if os.path.isdir(path):
        return _open_folder(path, key)
    if is_file and path.name.endswith(IDX_SUFFIXES):
        return open_idx(path, key)
    if _names_shards(value):
        return open_shards(str(value), key)
    if kind := special_kind(path):
        raise UserError(f"{key}: {path}: it is {kind}, not a file. Expected {ACCEPTED}.")
    if is_file:
        with open(path, "rb") as file:
            start = file.read(8)
        if path.suffix.lower() in PACKED_SUFFIXES and start.startswith(tuple(PACKED_STARTS)):
            decode_text(start, path, f"{key}: {path}")
        raise UserError(f"{key}: {path}: no such kind of data is known. Expected {ACCEPTED}.")
    parent = next(parent for parent in path.absolute().parents if os.path.exists(parent))
    raise UserError(f"{key}: {path} does not exist (the nearest folder that does: {parent}). Expected {ACCEPTED}.")


def open_named(
    value: str | Path | None, key: str, root: Path | None = None, limits: ImageLimits = IMAGE_LIMITS
) -> Source:
    """Open the data set of a config key and log its description."""
    if value is None:
        raise UserError(f"{key}: missing. Name a data set.")
    try:
        source = open_source(value, key, root, limits)
    except UserError as error:
        if key not in WITHOUT:
            raise
        raise UserError(f"{str(error).rstrip('.')}. To do without: {WITHOUT[key]}.") from None
    log.info("%s: %s", key, source.description)
    return source


def warn_of_overlap(train: Source, train_key: str, val: Source, val_key: str) -> None:
    """Warn about images of `val` whose names are in `train`."""
    if len(train) > MOST_NAMES:
        return
    names = {train.name(index) for index in range(len(train))}
    both = sum(val.name(index) in names for index in range(len(val)))
    if both:
        message = "%d of %d images of %s are also in %s: scores will be optimistic"
        log.warning(message, both, len(val), val_key, train_key)


def _names_shards(value: str | Path) -> bool:
    text = str(value)
    return (isinstance(value, str) and is_url(text)) or text.endswith(SHARD_SUFFIXES) or any(c in text for c in "*{")


def _open_folder(folder: Path, key: str) -> Source:
    if is_hugging_face(folder):
        return HuggingFaceImages(folder, key)
    shards = sorted(path.name for path in folder.glob("*.tar") if not is_system_name(path.name))
    packed = shards or [path.name for path in find_idx_files(folder)]
    if packed or (folder / PROGRESS_NAME).is_file():
        first = list(islice(_images(folder), MOST_PREVIEWS + 1))
        if len(first) <= MOST_PREVIEWS and all(os.path.dirname(path) == str(folder) for path in first):
            if first:
                log.warning("%s: %s are read, not the images next to them: %s", key, shorten(packed), _names(first))
            return open_shards(str(folder), key) if shards or not packed else open_idx(folder, key)
        message = "%s: the images in %s are read, not the files next to them: %s. To read these, name them"
        log.warning(message, key, folder, shorten(packed))
    if next(_images(folder), None) is None:
        tars = [path for path in walk_files(folder, []) if path.endswith(".tar")]
        if homes := sorted({os.path.dirname(path) for path in tars}):
            raise UserError(f"{key}: the .tar shards of {folder} are in {shorten(homes)}. Name one of these folders.")
    paths = find_images(folder, key)
    labels, advice = _classes_by_folder(folder, paths)
    source = ImageFiles(paths, f"{counted(len(paths), 'image')} in the folder {folder}", labels)
    if advice:
        source.leave_unlabelled(*advice)
    if labels is None or not source.classes:
        return source
    source.description = (
        f"{counted(len(paths), 'image')} of {counted(len(source.classes), 'class')} in the folder {folder}"
    )
    source.doubts = tuple(doubt_classes(folder, paths, [label or "" for label in labels]))
    folders = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not is_system_name(entry.name))
    if empty := [name for name in folders if name not in set(labels)]:
        log.warning("%s: no image in the class folder %s: not counted as a class", folder, shorten(empty))
    return source


def _names(paths: Sequence[str]) -> str:
    return shorten([printable(os.path.basename(path)) for path in paths])


def _images(folder: Path) -> Iterator[str]:
    return (path for path in walk_files(folder, []) if os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES)


Advice = tuple[str, str, bool]  # why there are no labels, what to do, and if this is worth a warning without a need


def _classes_by_folder(folder: Path, names: list[str]) -> tuple[list[str | None] | None, Advice | None]:
    """Return each image's first-level subfolder, or advice without classes."""
    start = len(os.path.join(folder, ""))
    parts = [name[start:].partition(os.sep) for name in names]
    labels = [first if separator else None for first, separator, _ in parts]
    classes, loose = sorted({label for label in labels if label}), labels.count(None)
    shown = _names(classes)
    if len(classes) > 1 and all(SPLIT_NAME.fullmatch(name.lower()) for name in classes):
        why = f"the folders {shown} are splits, not classes"
        return None, (why, f"Name one of them, such as {folder / classes[0]}", True)
    if len(classes) > 1 and loose < len(names) - loose:
        return labels, None
    if len(classes) == 1 and not loose:
        inner, advice = _classes_by_folder(folder / classes[0], names)
        if advice is None and inner is not None:
            found = _names(sorted({label for label in inner if label}))
            why = f"all are in {folder / classes[0]}"
            advice = (why, f"Name that folder if its folders {found} are the classes", False)
        return None, advice
    return None, None
