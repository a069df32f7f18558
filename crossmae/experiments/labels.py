"""Subsets of labelled images: nested, stratified by category, and the same for the same seed."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from crossmae.data.sources import open_source
from crossmae.data.sources.lists import MISSING_LABELS
from crossmae.data.sources.source import ImageFiles
from crossmae.errors import UserError, printable
from crossmae.files import read_file, read_json, write_atomically, write_text

KEY = "LABELS"  # argument of the tools that names the labels
Counts = Mapping[object, int]  # annotations of an image by category


class SmallShare(UserError):
    """A share has too few images for an image of each category.

    Attributes:
        categories: their number.
        why: reason in words.
        advised: smallest share that suffices, in percent.
    """

    def __init__(self, where: str, share: float, images: int, least: int, categories: int) -> None:
        self.categories, self.advised = categories, min(math.ceil(1000 * least / max(images, 1)) / 10, 100)
        self.why = (
            f"{share:g} % of {images:,} training images are {images_of_share(images, share)}, too few for an image of "
            f"each of the {categories} categories"
        )
        super().__init__(f"{where}: {self.why}. Give --shares of {self.advised:g} % or more.")


def images_of_share(images: int, share: float) -> int:
    """Return the number of images in a share (percent) of `images`."""
    return math.floor(images * share / 100 + 0.5)


def write_coco_subsets(json_path: Path, shares: Sequence[float], seed: int, folder: Path) -> dict[float, Path]:
    """Write COCO files with a share of the images each.

    The images of a share depend on the seed and not on the other shares. A smaller share is part of every larger share.
    Every share has images of all categories, and annotations of each category in nearly the same proportions as the
    whole file. Images without annotations keep their proportion, too. Crowd regions (`iscrowd`) do not count as
    annotations here, but stay in the files. 100 % is a copy of the file.

    Args:
        json_path: COCO file with images, annotations and categories.
        shares: percentages of the images, above 0 and up to 100.
        folder: existing folder for the new files.

    Returns:
        The new file of each share.

    Raises:
        SmallShare: a share is too small to hold an image of every category. The message names the smallest share.
        UserError: the file has no COCO annotations.
    """
    content = _read_coco(json_path)
    ids = [image["id"] for image in content["images"]]
    counts: dict[Any, Counter[object]] = {one: Counter() for one in ids}
    for annotation in content["annotations"]:
        if annotation["image_id"] in counts and not annotation.get("iscrowd"):
            counts[annotation["image_id"]][annotation["category_id"]] += 1
    order = stratified_order([counts[one] for one in ids], seed)
    sizes = _check_shares(shares, [counts[ids[index]].keys() for index in order], str(json_path))
    paths = {}
    for share, size in sizes.items():
        paths[share] = path = folder / f"{json_path.stem}-share{share:g}-seed{seed}.json"
        if size == len(ids):
            data = read_file(json_path)
            write_atomically(path, lambda temporary, data=data: temporary.write_bytes(data))  # type: ignore[misc]
            continue
        chosen = {ids[index] for index in order[:size]}
        images = [image for image in content["images"] if image["id"] in chosen]
        annotations = [one for one in content["annotations"] if one["image_id"] in chosen]
        subset = content | {"images": images, "annotations": annotations}
        write_text(path, json.dumps(subset, ensure_ascii=False) + "\n")
    return paths


def list_class_subsets(folder: Path, shares: Sequence[float], seed: int, out: Path) -> dict[float, Path]:
    """Write lists of image files, `path,label`, with a share of each class.

    Seed and shares act as in `write_coco_subsets`. Every class has at least one image. All other images keep the
    proportions of the classes, up to rounding.

    Args:
        folder: folder with a subfolder per class, or a list of image files with labels.
        shares: percentages of the images, above 0 and up to 100.
        out: existing folder for the lists.

    Returns:
        The new list of each share.

    Raises:
        SmallShare: a share is too small to hold an image of every class.
        UserError: the images have no labels or are not files.
    """
    source = open_source(folder, KEY)
    if not isinstance(source, ImageFiles):
        raise UserError(f"{KEY}: {folder}: the images are not single files. Name a folder or a list of image files.")
    labels = source.labels()
    if odd := sorted(set(source.classes) & set(MISSING_LABELS)):
        raise UserError(f"{KEY}: {folder}: the class {odd[0]!r} reads as a missing label. Rename it.")
    names = [str(Path(source.name(index)).absolute()) for index in range(len(source))]
    if unwritable := [name for name in names if not _is_utf8(name)]:
        raise UserError(f"{KEY}: {printable(unwritable[0])}: the name is not UTF-8. Rename the file.")
    rng = np.random.default_rng(seed)
    places = np.empty(len(names))
    for index in range(len(source.classes)):
        own = rng.permutation(np.flatnonzero(labels == index))
        places[own] = np.arange(len(own)) / max(len(own), 1)
    order = np.lexsort((rng.permutation(len(names)), places)).tolist()
    sizes = _check_shares(shares, [{labels[index]} for index in order], f"{KEY}: {folder}")
    paths = {}
    for share, size in sizes.items():
        buffer = io.StringIO()
        rows = [(names[index], source.classes[labels[index]]) for index in sorted(order[:size])]
        csv.writer(buffer, lineterminator="\n").writerows([("path", "label"), *rows])
        paths[share] = out / f"{folder.stem}-share{share:g}-seed{seed}.csv"
        write_text(paths[share], buffer.getvalue())
    return paths


def stratified_order(counts: Sequence[Counts], seed: int) -> list[int]:
    """Order images so that every beginning of the order is stratified.

    The images are halved again and again. Each halving is iterative stratification (Sechidis et al., "On the
    stratification of multi-label data", 2011): the rarest category first, each image goes to the half that lacks its
    category more. Unlike there, the first half always receives an image of every category. So the first images hold all
    categories, if they are at least as many as the categories.

    Args:
        counts: annotations by category for each of the N images.

    Returns:
        The numbers 0 .. N - 1.
    """
    order: list[int] = []
    blocks = [np.random.default_rng(seed).permutation(len(counts)).tolist()]
    while blocks:
        block = blocks.pop()
        first, second = _halve(block, counts)
        if second:
            blocks += [second, first]
        else:
            order += first if order else _cover_first(first, counts)
    return order


def _halve(block: Sequence[int], counts: Sequence[Counts]) -> tuple[list[int], list[int]]:
    members: dict[object, list[int]] = defaultdict(list)
    for index in block:
        for category in counts[index] or (None,):
            members[category].append(index)
    halves: tuple[list[int], list[int]] = ([], [])
    left = Counter({category: len(own) for category, own in members.items()})  # images without a half yet
    surplus = Counter[object]()  # annotations of the first half, minus annotations of the second half
    assigned: set[int] = set()
    held: set[object] = set()
    for category in sorted(members, key=lambda one: len(members[one])):
        for index in members[category]:
            if index in assigned:
                continue
            assigned.add(index)
            own = counts[index] or {None: 1}
            more = surplus[category] or len(halves[0]) - len(halves[1])
            is_needed = category not in held or any(one not in held and left[one] == 1 for one in own)
            side = 0 if is_needed or more <= 0 else 1
            halves[side].append(index)
            left.subtract(own.keys())
            for one, number in own.items():
                surplus[one] += -number if side else number
            if side == 0:
                held.update(own)
    return halves


def _cover_first(block: Sequence[int], counts: Sequence[Counts]) -> list[int]:
    """Put images to the front that together hold every category."""
    rest, ordered, held = list(block), [], set[object]()
    while rest:
        best = max(rest, key=lambda index: len(counts[index].keys() - held))
        rest.remove(best)
        ordered.append(best)
        held |= counts[best].keys()
    return ordered


def _check_shares(shares: Sequence[float], categories: Sequence[Any], where: str) -> dict[float, int]:
    """Return the number of images of each share.

    Args:
        categories: set of categories of each image, in order.

    Raises SmallShare if a share is too small, and UserError if it is no percentage.
    """
    if wrong := [share for share in shares if not 0 < share <= 100]:
        raise UserError(f"--shares: {wrong[0]:g} is not a percentage of the images. Give numbers above 0, up to 100.")
    images, seen = len(categories), set[object]()
    smallest = 1
    for number, own in enumerate(categories, start=1):
        if not seen.issuperset(own):
            seen |= set(own)
            smallest = number
    sizes = {share: images_of_share(images, share) for share in shares}
    if short := [share for share, size in sizes.items() if size < smallest]:
        raise SmallShare(where, min(short), images, smallest, len(seen))
    return sizes


def _read_coco(path: Path) -> dict[str, Any]:
    """Read a COCO file, and check what the subsets need."""
    content = read_json(path)
    advice = 'Name a COCO file, with lists "images" and "annotations".'
    for name, keys in (("images", ("id",)), ("annotations", ("image_id", "category_id"))):
        entries = content.get(name) if isinstance(content, dict) else None
        if not isinstance(entries, list) or (name == "images" and not entries):
            raise UserError(f"{path}: no {name}. {advice}")
        for number, entry in enumerate(entries):
            for key in keys:
                if not isinstance(entry, dict) or not isinstance(entry.get(key), (int, str)):
                    raise UserError(f"{path}: {name}[{number}] has no {key}. {advice}")
    ids = Counter(image["id"] for image in content["images"])
    if repeated := [one for one, number in ids.items() if number > 1]:
        raise UserError(f"{path}: {ids[repeated[0]]} images have the id {repeated[0]!r}. Number the images.")
    return dict(content)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
