"""Train and validation split of annotated images that keeps groups together and the shares of the classes."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from crossmae.data.annotations.records import AnnotatedSplit
from crossmae.errors import UserError
from crossmae.files import sha256

SPLIT_SIDES = ("train", "val")
HELD_OUT_FOLDERS = "held_out_folders"  # key in the record of a split by folder
WITHOUT_OBJECTS = ""  # the class of images without objects
# Most splits that are drawn for groups of several images, and the work for them: pairs of classes and memberships.
MOST_DRAWN, MOST_WORK = 200, 1_000_000
ClassCounts = Mapping[Hashable, int]


def stratified_split(groups: Sequence[ClassCounts], sizes: Sequence[int], val: float, seed: int) -> list[bool]:
    """Choose the groups of images for validation.

    This is iterative stratification (Sechidis et al., "On the stratification of multi-label data", 2011), for groups:
    the rarest class first, each group goes to the side that lacks most of its share of the class. Unlike there, a class
    of at least two groups is on both sides wherever possible, and a class of one group is in training. Groups of
    several images are drawn in many orders, and the split that is nearest to the shares is taken.

    Args:
        groups: images by class of each group. Images without objects count as the class `WITHOUT_OBJECTS`.
        sizes: images of each group.
        val: share of the images for validation, between 0 and 1.

    Returns:
        True for each group of validation. The order of the groups matters, so sort them.
    """
    rng = np.random.default_rng(seed)
    work = len(set().union(*groups)) ** 2 + sum(map(len, groups))
    count = max(1, min(MOST_DRAWN, MOST_WORK // work)) if max(sizes) > 1 else 1
    drawn = [_draw(groups, sizes, val, rng.permutation(len(groups)).tolist()) for _ in range(count)]
    return min(drawn, key=lambda held_out: _deviation(groups, sizes, val, held_out))


def _deviation(
    groups: Sequence[ClassCounts], sizes: Sequence[int], val: float, held_out: Sequence[bool]
) -> tuple[int, float]:
    """Return how many classes a side lacks, and the error of shares.

    The shares are those of images and classes. Differences below a percent are rounded away, so that another seed can
    give another split.
    """
    totals, own, members = Counter[Hashable](), Counter[Hashable](), Counter[Hashable]()
    for group, is_held in zip(groups, held_out, strict=True):
        totals.update(group)
        members.update(group.keys())
        own.update(group if is_held else {})
    lacking = sum(
        own[one] == total or (not own[one] and members[one] > 1)
        for one, total in totals.items()
        if one != WITHOUT_OBJECTS
    )
    of_images = abs(float(np.dot(sizes, held_out)) / sum(sizes) - val)
    of_classes = sum(abs(own[one] / total - val) for one, total in totals.items()) / len(totals)
    return lacking, round(of_images + of_classes, 2)


def _draw(groups: Sequence[ClassCounts], sizes: Sequence[int], val: float, order: Sequence[int]) -> list[bool]:
    """Choose the groups for validation, those of a class in this order."""
    shares = dict(zip(SPLIT_SIDES, (1 - val, val), strict=True))
    totals: Counter[Hashable] = Counter()
    members: dict[Hashable, list[int]] = defaultdict(list)
    for index in order:
        totals.update(groups[index])
        for one in groups[index]:
            members[one].append(index)
    wanted = {side: {one: share * total for one, total in totals.items()} for side, share in shares.items()}
    space = {side: share * sum(sizes) for side, share in shares.items()}
    left = {one: len(own) for one, own in members.items()}
    held: dict[str, set[Hashable]] = {side: set() for side in SPLIT_SIDES}
    chosen: dict[int, str] = {}
    while waiting := [one for one in members if left[one]]:
        rarest = min(waiting, key=lambda one: (left[one], str(one)))
        for index in (index for index in members[rarest] if index not in chosen):
            by_need = max(SPLIT_SIDES, key=lambda side: (wanted[side][rarest], space[side]))
            side = chosen[index] = _needed_on(sorted(groups[index], key=lambda one: left[one]), left, held) or by_need
            space[side] -= sizes[index]
            held[side] |= groups[index].keys()
            for one, count in groups[index].items():
                left[one] -= 1
                wanted[side][one] -= count
    return [chosen[index] == "val" for index in range(len(groups))]


def _needed_on(classes: Sequence[Hashable], left: Mapping[Hashable, int], held: Mapping[str, set[Hashable]]) -> str:
    """Return the side that would otherwise lack a class, or ""."""
    for one in classes:
        lacking = [side for side in SPLIT_SIDES if one not in held[side]]
        if one != WITHOUT_OBJECTS and lacking and left[one] == 1:
            return lacking[0]  # of a class with a single group: training
    return ""


def split_images(
    content: Mapping[str, Any], folder: Path, val: float, seed: int, by_folder: bool
) -> dict[str, dict[str, Any]]:
    """Split a COCO content into "train" and "val".

    Files with the same bytes stay on one side, and with `by_folder` all images of a folder. The result depends on the
    seed and the file names, not on their order.

    Raises UserError if there are fewer than two groups, or annotations whose image is missing.
    """
    entries = sorted(content["images"], key=image_key)
    positions = {id_key(entry.get("id")): at for at, entry in enumerate(entries)}
    if len(positions) < len(entries) or "" in positions:
        raise UserError("images: an id is missing or given again. Number the images.")
    classes: list[set[Hashable]] = [set() for _ in entries]
    for number, annotation in enumerate(content["annotations"]):
        image, category = id_key(annotation.get("image_id")), id_key(annotation.get("category_id"))
        if image not in positions or not category:
            raise UserError(f"annotations[{number}]: has no image or no category. Correct the annotations.")
        if annotation.get("iscrowd") != 1:
            classes[positions[image]].add(category)
    numbers = _number_groups(entries, folder, by_folder)
    groups: list[Counter[Hashable]] = [Counter() for _ in set(numbers)]
    for number, own in zip(numbers, classes, strict=True):
        groups[number].update(own or {WITHOUT_OBJECTS})
    if len(groups) < 2:
        kind, advice = "image", "Add images for validation."
        if by_folder:
            kind, advice = "folder with images", "Leave out --by-folder, or name the folder above."
        raise UserError(f"there is only one {kind}, so there is nothing to split. {advice}")
    sizes = np.bincount(numbers).tolist()
    held_out = stratified_split(groups, sizes, val, seed)
    if len(set(held_out)) < 2:  # few images
        held_out[int(np.argmin(sizes))] = not held_out[0]
    ids: dict[str, list[str]] = {side: [] for side in SPLIT_SIDES}
    for entry, number in zip(entries, numbers, strict=True):
        ids["val" if held_out[number] else "train"].append(id_key(entry["id"]))
    return {side: select(content, own) for side, own in ids.items()}


def id_key(value: Any) -> str:
    """Return an id as text, "" for no id.

    7, 7.0 and "7" are equal.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, int | str) and not isinstance(value, bool) else ""


def select(content: Mapping[str, Any], ids: Sequence[str]) -> dict[str, Any]:
    """Copy a COCO content with some of its images, and all categories.

    `ids` are from `id_key`.
    """
    kept = set(ids)
    return {
        **content,
        "images": [entry for entry in content["images"] if id_key(entry["id"]) in kept],
        "annotations": [entry for entry in content["annotations"] if id_key(entry["image_id"]) in kept],
    }


def image_key(entry: Mapping[str, Any]) -> tuple[str, str]:
    """Return file name and id of an image, to sort by."""
    return str(entry.get("file_name") or entry.get("coco_url") or ""), str(entry.get("id"))


def folder_of(name: str) -> str:
    """Return the folder of a file name, for a split by folder."""
    return os.path.dirname(name.replace("\\", "/"))


def _number_groups(entries: Sequence[Mapping[str, Any]], folder: Path, by_folder: bool) -> list[int]:
    """Assign a group number to each image, from 0."""
    names = [image_key(entry)[0].replace("\\", "/") for entry in entries]
    parents = list(range(len(names)))

    def root(at: int) -> int:
        while parents[at] != at:
            parents[at] = at = parents[parents[at]]
        return at

    kinds: list[list[Hashable]] = [_contents([folder / name for name in names])]
    if by_folder:
        kinds.append([folder_of(name) for name in names])
    for keys in kinds:
        first: dict[Hashable, int] = {}
        for at, key in enumerate(keys):
            one, other = sorted((root(at), root(first.setdefault(key, at))))
            parents[other] = one
    order: dict[int, int] = {}
    return [order.setdefault(root(at), len(order)) for at in range(len(names))]


def _contents(paths: Sequence[Path]) -> list[Hashable]:
    """Return equal values for equal files.

    Only files of the same size are read.
    """

    def size(path: Path) -> int | None:
        try:
            return os.path.getsize(path) if path.is_file() else None
        except (OSError, ValueError):
            return None

    sizes = [size(path) for path in paths]
    counts = Counter(sizes)
    return [
        at if length is None or counts[length] < 2 else (length, sha256(path))
        for at, (path, length) in enumerate(zip(paths, sizes, strict=True))
    ]


def rebase(split: AnnotatedSplit, folder: Path) -> dict[str, Any]:
    """Return the content with file names relative to another folder.

    Raises UserError if the images are outside of it.
    """
    if split.images.resolve() == folder.resolve():
        return split.content
    if not split.images.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"--images: the images are in {split.images}, outside of {folder}. Name a folder above both.")
    start = split.images.resolve().relative_to(folder.resolve()).as_posix()
    images = [entry | {"file_name": f"{start}/{image_key(entry)[0]}"} for entry in split.content["images"]]
    return split.content | {"images": images}


def join(splits: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join COCO contents with new ids.

    Categories are matched by name.
    """
    numbers: dict[str, int] = {}
    images, annotations = list[dict[str, Any]](), list[dict[str, Any]]()
    for content in splits:
        for entry in content["categories"]:
            numbers.setdefault(str(entry.get("name")), len(numbers) + 1)
        renamed = {entry.get("id"): numbers[str(entry.get("name"))] for entry in content["categories"]}
        ids = {entry.get("id"): len(images) + at for at, entry in enumerate(content["images"], start=1)}
        images += [entry | {"id": ids[entry.get("id")]} for entry in content["images"]]
        for entry in content["annotations"]:
            if entry.get("image_id") not in ids or entry.get("category_id") not in renamed:
                raise UserError(f"annotation {entry.get('id')!r:.40}: has no image or no category. Correct it.")
            changed = {"id": len(annotations) + 1, "image_id": ids[entry["image_id"]]}
            annotations.append(entry | changed | {"category_id": renamed[entry["category_id"]]})
    categories = [{"id": number, "name": name} for name, number in numbers.items()]
    return {"images": images, "annotations": annotations, "categories": categories}
