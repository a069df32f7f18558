"""Proves that a split keeps groups and the shares of the classes, and depends on the seed and the names only."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossmae.data.annotations.records import AnnotatedSplit
from crossmae.data.annotations.split import join, rebase, split_images, stratified_split
from crossmae.errors import UserError
from tests.crossmae.data.annotations.label_folders import write


def content_of(classes: list[set[int]], names: list[str] | None = None) -> dict[str, Any]:
    """A COCO content of images with these classes."""
    files = names or [f"{at:04}.jpg" for at in range(len(classes))]
    pairs = [(at, one) for at, own in enumerate(classes) for one in sorted(own)]
    return {
        "images": [{"id": at, "file_name": name} for at, name in enumerate(files)],
        "annotations": [{"id": n, "image_id": at, "category_id": one} for n, (at, one) in enumerate(pairs)],
        "categories": [{"id": one, "name": str(one)} for one in sorted(set().union(*classes))],
    }


def names(content: dict[str, Any]) -> list[str]:
    return [entry["file_name"] for entry in content["images"]]


@given(st.lists(st.integers(0, 12), min_size=2, max_size=200), st.sampled_from((0.1, 0.2, 0.5)), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_every_class_has_its_share_on_both_sides(classes: list[int], val: float, seed: int) -> None:
    held_out = stratified_split([{one: 1} for one in classes], [1] * len(classes), val, seed)
    totals = Counter(classes)
    for one, count in Counter(one for one, held in zip(classes, held_out, strict=True) if held).items():
        assert abs(count - val * totals[one]) <= 1
    both = {one for one, count in totals.items() if count > 1}
    for side in (True, False):
        assert both <= {one for one, held in zip(classes, held_out, strict=True) if held is side}
    assert not any(held for one, held in zip(classes, held_out, strict=True) if totals[one] == 1)


def test_images_of_several_classes_in_a_long_tail() -> None:
    rng = np.random.default_rng(1)
    weights = 1 / np.arange(1, 41) ** 1.3
    groups = [
        {int(one): 1 for one in set(rng.choice(40, rng.integers(0, 6), p=weights / weights.sum()).tolist())} or {"": 1}
        for _ in range(600)
    ]
    held_out = np.array(stratified_split(groups, [1] * 600, 0.2, 0))
    assert abs(held_out.mean() - 0.2) < 0.03
    for one in set().union(*groups):
        has = np.array([one in group for group in groups])
        assert has.sum() < 2 or 0 < (has & held_out).sum() < has.sum(), one
        assert abs((has & held_out).sum() - 0.2 * has.sum()) <= max(1, 0.06 * has.sum()), one


def test_the_sides_are_a_partition_that_depends_on_seed_and_names_only(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    content = content_of([set(rng.integers(0, 5, rng.integers(0, 4)).tolist()) for _ in range(60)])
    sides = split_images(content, tmp_path, 0.25, 3, False)
    assert sorted(names(sides["train"]) + names(sides["val"])) == names(content)
    for side in sides.values():
        ids = {entry["id"] for entry in side["images"]}
        assert side["annotations"] == [one for one in content["annotations"] if one["image_id"] in ids]
        assert side["categories"] == content["categories"]
    shuffled = {key: random.Random(1).sample(value, len(value)) for key, value in content.items()}
    again = split_images(shuffled, tmp_path, 0.25, 3, False)
    assert {side: sorted(names(one)) for side, one in again.items()} == {
        side: names(one) for side, one in sides.items()
    }
    assert names(split_images(content, tmp_path, 0.25, 4, False)["val"]) != names(sides["val"])


def test_folders_and_equal_files_stay_together(tmp_path: Path) -> None:
    files = [f"{folder}/{at}.jpg" for folder in "abcdefghij" for at in range(4)]
    content = content_of([{at % 3} for at in range(40)], files)
    sides = split_images(content, tmp_path, 0.3, 0, True)
    folders = [{name[0] for name in names(side)} for side in sides.values()]
    assert not folders[0] & folders[1]
    assert len(names(sides["val"])) == 12
    for at, name in enumerate(files):  # pairs of equal bytes, of one size
        write(tmp_path / name, f"{at // 2:03}")
    sides = split_images(content, tmp_path, 0.3, 0, False)
    pairs = [{files.index(name) // 2 for name in names(side)} for side in sides.values()]
    assert not pairs[0] & pairs[1]
    assert len(names(sides["val"])) in (10, 12, 14)


def test_ids_as_text_or_fractions_are_found(tmp_path: Path) -> None:
    content = content_of([{1}, {2}, {1}, {2}])
    expected = split_images(content, tmp_path, 0.5, 0, False)["val"]
    content["annotations"][0]["image_id"], content["annotations"][1]["image_id"] = "0", 1.0
    found = split_images(content, tmp_path, 0.5, 0, False)["val"]
    assert names(found) == names(expected)
    assert [one["id"] for one in found["annotations"]] == [one["id"] for one in expected["annotations"]]


def test_few_images(tmp_path: Path) -> None:
    sides = split_images(content_of([{1}, set()]), tmp_path, 0.2, 0, False)
    assert [len(side["images"]) for side in sides.values()] == [1, 1]
    with pytest.raises(UserError, match="there is only one image, so there is nothing to split"):
        split_images(content_of([{1}]), tmp_path, 0.2, 0, False)
    with pytest.raises(UserError, match=r"only one folder with images.*\. Leave out --by-folder"):
        split_images(content_of([{1}, {1}]), tmp_path, 0.2, 0, True)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda content: content["images"].append({"id": 0, "file_name": "x"}), "an id is missing or given again"),
        (lambda content: content["images"][0].pop("id"), "an id is missing or given again"),
        (lambda content: content["annotations"][1].update(image_id=[]), r"annotations\[1\]: has no image"),
        (lambda content: content["annotations"][1].update(image_id=99), r"annotations\[1\]: has no image"),
    ],
    ids=["twice", "missing", "list", "unknown"],
)
def test_unsound_content_is_an_error(tmp_path: Path, change: Any, message: str) -> None:
    content = content_of([{1}, {2}, {1}])
    change(content)
    with pytest.raises(UserError, match=message):
        split_images(content, tmp_path, 0.2, 0, False)


def test_contents_are_joined_by_the_names_of_classes(tmp_path: Path) -> None:
    first, second = content_of([{1}, {2}]), content_of([{2}, {3}], ["x.jpg", "y.jpg"])
    second["categories"][0]["name"] = "1"  # the second file calls its class 2 what the first calls 1
    joined = join([first, second])
    classes = {entry["id"]: entry["name"] for entry in joined["categories"]}
    files = {entry["id"]: entry["file_name"] for entry in joined["images"]}
    found = [(files[one["image_id"]], classes[one["category_id"]]) for one in joined["annotations"]]
    assert found == [("0000.jpg", "1"), ("0001.jpg", "2"), ("x.jpg", "1"), ("y.jpg", "3")]
    assert len({one["id"] for one in joined["annotations"]}) == 4


def test_names_are_written_relative_to_a_folder_above(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    split = AnnotatedSplit(tmp_path / "a/b", content_of([{1}]))
    assert names(rebase(split, tmp_path)) == ["a/b/0000.jpg"]
    assert rebase(split, tmp_path / "a/b") == split.content
    with pytest.raises(UserError, match=r"--images: the images are in .*/a/b, outside of .*/a/b/c"):
        rebase(split, tmp_path / "a/b/c")


def test_the_share_of_few_folders_is_as_near_as_they_allow_and_the_seed_decides_between_equals() -> None:
    sizes = [40] * 7 + [33, 27, 25]  # 365 images: 20 % are 73, which are 40 + 33
    splits = [stratified_split([{1: size} for size in sizes], sizes, 0.2, seed) for seed in range(5)]
    assert [int(np.dot(sizes, held_out)) for held_out in splits] == [73] * 5
    assert len({tuple(held_out) for held_out in splits}) > 1


def test_few_folders_keep_every_class_on_both_sides() -> None:
    sizes = [40] * 7 + [33, 27, 25]
    groups = [{"common": size} | ({"rare": 3} if size == 25 or at == 0 else {}) for at, size in enumerate(sizes)]
    groups[8]["single"] = 5
    splits = [stratified_split(groups, sizes, 0.2, seed) for seed in range(20)]
    assert splits == [stratified_split(groups, sizes, 0.2, seed) for seed in range(20)]
    for held_out in splits:
        assert held_out[0] != held_out[9]
        assert not held_out[8]
