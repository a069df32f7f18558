"""COCO files and the folders in which tools export them, with one file per split.

train/_annotations.coco.json            Roboflow: images next to the json
annotations/instances_train.json        CVAT and COCO: images in images/, images/train/ or train/
result.json                             Label Studio: images in images/
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crossmae.data.annotations.records import (
    IMAGE_FOLDERS,
    UNSPLIT,
    AnnotatedSplit,
    AnnotationSet,
    common_folder,
    split_name,
)
from crossmae.errors import UserError, counted, shorten
from crossmae.files import read_json

COCO_FORMAT = "COCO"
ROBOFLOW, INSTANCES = "_annotations.coco.json", "instances_"
SNIFFED_BYTES = 1 << 16  # bytes at the start and the end of a json


def is_coco(path: Path) -> bool:
    """Check both ends of a json for the lists of COCO."""
    try:
        with open(path, "rb") as file:
            head = file.read(SNIFFED_BYTES)
            file.seek(max(os.path.getsize(path) - SNIFFED_BYTES, 0))
            text = head + file.read(SNIFFED_BYTES)
    except OSError:
        return False
    return (
        text.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")
        and sum(word in text for word in (b'"images"', b'"annotations"', b'"categories"')) > 1
    )


def read_lists(path: Path) -> dict[str, Any]:
    """Read a COCO file with its lists of dictionaries.

    Raises UserError if images or categories are missing or empty.
    """
    content = read_json(path)
    if isinstance(content, dict) and content.get("annotations") is None:
        content["annotations"] = []
    for key in ("images", "annotations", "categories"):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f"{path}: has no list {key!r} of dictionaries. Name annotations in COCO format.")
        if not entries and key != "annotations":
            raise UserError(f"{path}: {key!r} is empty. Name annotations with entries.")
    return dict(content)


def read_coco_files(folder: Path, files: Sequence[str], images: Path | None) -> AnnotationSet:
    """Read COCO files of a folder, one per split."""
    chosen = [name for name in files if os.path.basename(name) == ROBOFLOW] or [
        name for name in files if os.path.basename(name).startswith(INSTANCES)
    ]
    groups: dict[str, list[str]] = defaultdict(list)
    for name in chosen or files:
        groups[_split_of(name)].append(name)
    if crowded := next((names for names in groups.values() if len(names) > 1), None):
        raise UserError(
            f"{folder}: has {counted(len(crowded), 'json')} in COCO format for the same images: "
            f"{shorten(sorted(crowded), 3)}. Name one of them."
        )
    if "" in groups and len(groups) > 1:
        raise UserError(f"{folder}: {groups[''][0]} belongs to no split, but others do. Name one json.")
    splits = {}
    for split, (name,) in groups.items():
        content = read_lists(folder / name)
        splits[split] = AnnotatedSplit(find_images(folder / name, content, images), content, folder / name)
    if len(splits) == 1:
        splits = {UNSPLIT: next(iter(splits.values()))}
    return AnnotationSet(COCO_FORMAT, splits, [])


def _split_of(name: str) -> str:
    """Return the split that a json or its folder names, or ""."""
    stem = os.path.splitext(os.path.basename(name))[0].removeprefix(INSTANCES)
    words = [stem, *reversed(stem.replace("-", "_").split("_")), *reversed(name.split("/")[:-1])]
    return next(filter(None, map(split_name, words)), "")


def find_images(path: Path, content: Mapping[str, Any], images: Path | None, flag: str = "--images") -> Path:
    """Find the folder of the images of a COCO file.

    It has the first image, and is near the file or in `images`.

    Raises UserError if there is none. The message names `flag`.
    """
    first = next((name for entry in content["images"] if isinstance(name := entry.get("file_name"), str)), "")
    here = path.absolute().parent
    stem = path.stem.removeprefix(INSTANCES)
    named = [top / folder for top in (here, here.parent) for folder in IMAGE_FOLDERS]
    places = [here, here / stem, here.parent / stem, *named, *(place / stem for place in named), here.parent]
    if images is not None:
        given = images.absolute()
        tops = [given, *(given / name for name in IMAGE_FOLDERS)]
        places = [*tops, *(top / part for top in tops for part in (stem, *_split_folders(top, path)))]
    found = next((place for place in places if first and (place / first).is_file()), None)
    if found is None and images is not None:
        return common_folder([str(images.absolute() / "x")])  # the checks report missing images
    if found is None:
        near = shorten(sorted({str(place) for place in places if place.is_dir()}), 3)
        raise UserError(f"{path}: its image {first} is in none of {near}. Name the folder of the images with {flag}.")
    return found


def _split_folders(folder: Path, path: Path) -> list[str]:
    """List subfolders that are named after the split of a json."""
    wanted = _split_of(f"{path.parent.name}/{path.name}")
    names = sorted(os.listdir(folder)) if folder.is_dir() and wanted else []
    return [name for name in names if split_name(name) == wanted and (folder / name).is_dir()]
