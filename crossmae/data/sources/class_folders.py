"""Doubts about folders that are read as classes: pictures of another kind, a level too many, one folder twice."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from crossmae.data.paths import COMPANIONS, SPLIT_WORDS
from crossmae.errors import printable, shorten

PICTURES = {"image", "images", "img", "imgs", "jpegimages", "photo", "photos", "picture", "pictures", "rgb"}
SPLIT_NAME = re.compile(rf"({SPLIT_WORDS}|evaluation|holdout|unlabell?ed)[-_ ]?\d*")
# Sub-folders that many sound classes have in common: splits, numbers, views.
NO_CLASS = re.compile(
    rf"{SPLIT_NAME.pattern}|.*\d.*|left|right|front|back|side|rear|top|bottom|day|night|before|after|raw|processed"
    "|original|augmented|small|medium|large|good|bad|other|misc|[a-z]"
)


def doubt_classes(folder: Path, paths: Sequence[str], labels: Sequence[str]) -> list[str]:
    """List reasons why the first-level subfolders may not be the classes.

    Args:
        paths: images in `folder`.
        labels: the first-level subfolder of each image.
    """
    classes = sorted(set(labels))
    notes = []
    lower = {name.casefold() for name in classes}
    if lower & PICTURES and lower & COMPANIONS and lower <= PICTURES | COMPANIONS:
        home = next(name for name in classes if name.casefold() in PICTURES)
        shown = shorten([printable(name) for name in classes])
        notes.append(f"the folders {shown} read like images and pictures about them, not classes. Name {folder / home}")
    homes: dict[str, list[str]] = defaultdict(list)
    for name in classes:
        homes[os.path.realpath(folder / name)].append(printable(name))
    for same in homes.values():
        if len(same) > 1:
            notes.append(f"{shorten(same)} are one folder, so its images are in {len(same)} classes. Remove the links")
    start = len(os.path.join(folder, ""))
    inner: dict[str, set[str]] = defaultdict(set)
    for path, label in zip(paths, labels, strict=True):
        below, separator, _ = path[start + len(label) + 1 :].partition(os.sep)
        if separator:
            inner[label].add(below)
    counts = Counter(name for names in inner.values() for name in names)
    shared = sorted(name for name, count in counts.items() if count > 1 and 2 * count > len(classes))
    shared = [name for name in shared if not (_is_picture_folder(name) or NO_CLASS.fullmatch(name.casefold()))]
    if len(shared) > 1:
        shown, several = (shorten([printable(name) for name in names]) for names in (shared, classes))
        notes.append(
            f"most of the classes {several} have the same subfolders {shown}. If these are the classes, name one "
            f"of the folders, such as {folder / classes[0]}, or put equal names of all of them in one folder"
        )
    return notes


def _is_picture_folder(name: str) -> bool:
    return name.casefold() in PICTURES | COMPANIONS
