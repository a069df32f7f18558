"""Proves that subsets of labels are nested, stratified, whole and repeatable."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from crossmae.data.sources import open_source
from crossmae.errors import UserError
from crossmae.experiments.labels import (
    images_of_share,
    list_class_subsets,
    stratified_order,
    write_coco_subsets,
)

counts_of_images = st.lists(st.dictionaries(st.integers(0, 6), st.integers(1, 9), max_size=4), max_size=40)


def coco(counts: Sequence[dict[int, int]]) -> dict[str, Any]:
    annotations = [
        {"id": 1000 * image + 100 * category + number, "image_id": image, "category_id": category, "bbox": [0, 0, 1, 1]}
        for image, own in enumerate(counts)
        for category, count in own.items()
        for number in range(count)
    ]
    images = [{"id": image, "file_name": f"{image}.png", "width": 4, "height": 4} for image in range(len(counts))]
    categories = [{"id": category, "name": f"name {category}"} for category in range(9)]
    return {"info": {"by": "K\u00e4the"}, "images": images, "annotations": annotations, "categories": categories}


def write(tmp_path: Path, content: dict[str, Any]) -> Path:
    path = tmp_path / "train.json"
    path.write_text(json.dumps(content, indent=3), "utf-8")
    return path


def random_counts(images: int, seed: int = 0) -> list[dict[int, int]]:
    """Images of which a third is empty, with common and rare categories, and some crowds."""
    rng = np.random.default_rng(seed)
    rates = np.array([1.0, 0.5, 0.2, 0.1, 0.05])
    found = [
        {int(c): int(n) for c, n in enumerate(rng.poisson(rates * rng.exponential(2))) if n} for _ in range(images)
    ]
    return [{} if rng.random() < 0.3 else own for own in found]


@given(counts_of_images, st.integers(0, 3))
@example([{2: 1, 6: 1, 4: 1, 0: 1}, *[{}] * 2, {0: 1, 1: 1, 5: 1}, *[{}] * 3, {4: 1}, {2: 1, 5: 1, 1: 1}, *[{}] * 2], 0)
def test_the_order_has_every_image_once_and_all_categories_early(counts: list[dict[int, int]], seed: int) -> None:
    order = stratified_order(counts, seed)
    assert sorted(order) == list(range(len(counts)))
    assert order == stratified_order(counts, seed)
    categories = {category for own in counts for category in own}
    first = {category for index in order[: len(categories)] for category in counts[index]}
    assert first == categories


@given(counts_of_images, st.integers(0, 3), st.integers(0, 40))
def test_every_beginning_is_close_to_its_share(counts: list[dict[int, int]], seed: int, size: int) -> None:
    """One category per image: a slow count of each beginning differs by a few images from the exact share."""
    single = [{min(own): 1} if own else {} for own in counts]
    order = stratified_order(single, seed)
    beginning = order[:size]
    for category, total in Counter(min(own, default=None) for own in single).items():
        has = sum(min(single[index], default=None) == category for index in beginning)
        assert abs(has - total * len(beginning) / max(len(order), 1)) <= 5


def test_shares_are_closer_than_those_of_random_draws() -> None:
    counts = random_counts(300)
    names = [0, 1, 2, 3, 4, None]
    table = np.array([[own.get(name, 0) if own else name is None for name in names] for own in counts], float)

    def distance(chosen: Sequence[int]) -> float:
        whole, part = table.sum(axis=0), table[list(chosen)].sum(axis=0)
        return float(np.abs(part / part.sum() - whole / whole.sum()).sum())

    rng = np.random.default_rng(0)
    for size in (30, 47, 100):
        ours = np.mean([distance(stratified_order(counts, seed)[:size]) for seed in range(20)])
        drawn = np.mean([distance(rng.permutation(len(counts))[:size]) for _ in range(20)])
        assert ours < 0.6 * drawn


def test_no_kind_of_image_is_preferred() -> None:
    """Without rare categories, crowded images and empty images are chosen as often as others."""
    counts = [{one: count for one, count in own.items() if one < 2} for own in random_counts(80)]
    often = np.zeros(len(counts))
    for seed in range(200):
        often[stratified_order(counts, seed)[:40]] += 1
    objects = np.array([sum(own.values()) for own in counts])
    assert abs(np.corrcoef(objects, often)[0, 1]) < 0.2
    assert often.min() > 60
    assert often.max() < 140


def test_files_are_nested_and_whole(tmp_path: Path) -> None:
    content = coco(random_counts(200))
    path = write(tmp_path, content)
    written = write_coco_subsets(path, [100, 10, 30], 0, tmp_path)
    assert list(written) == [100, 10, 30]
    assert written[100].read_bytes() == path.read_bytes()
    found = {share: json.loads(one.read_text("utf-8")) for share, one in written.items()}
    for share, count in ((10, 20), (30, 60)):
        subset = found[share]
        chosen = {image["id"] for image in subset["images"]}
        assert len(chosen) == count == images_of_share(200, share)
        assert subset["images"] == [image for image in content["images"] if image["id"] in chosen]
        assert subset["annotations"] == [one for one in content["annotations"] if one["image_id"] in chosen]
        assert {key: subset[key] for key in ("info", "categories")} == {
            key: content[key] for key in ("info", "categories")
        }
        assert {one["category_id"] for one in subset["annotations"]} == {0, 1, 2, 3, 4}
    ids = {share: {image["id"] for image in subset["images"]} for share, subset in found.items()}
    assert ids[10] < ids[30] < ids[100]


def test_a_share_is_the_same_whatever_the_others_are(tmp_path: Path) -> None:
    path = write(tmp_path, coco(random_counts(100)))
    first = write_coco_subsets(path, [20, 50], 1, tmp_path)[20].read_bytes()
    assert write_coco_subsets(path, [20], 1, tmp_path)[20].read_bytes() == first
    assert write_coco_subsets(path, [20], 2, tmp_path)[20].read_bytes() != first


def test_too_small_a_share_names_one_that_works(tmp_path: Path) -> None:
    path = write(tmp_path, coco([{category: 1} for category in range(5)] * 5))
    with pytest.raises(UserError, match=r"10 % of 25 training images are 3, .* each of the 5 categories.*20 % or more"):
        write_coco_subsets(path, [10, 100], 0, tmp_path)
    assert write_coco_subsets(path, [20], 0, tmp_path)


def test_an_image_may_have_every_category(tmp_path: Path) -> None:
    path = write(tmp_path, coco([dict.fromkeys(range(5), 1)] * 10))
    (written,) = write_coco_subsets(path, [10], 0, tmp_path).values()
    assert len(json.loads(written.read_text())["images"]) == 1


def test_crowd_regions_are_no_examples_but_stay(tmp_path: Path) -> None:
    content = coco([{0: 1}] * 10)
    crowds = [
        {"id": 10**6 + image, "image_id": image, "category_id": 7 + image % 2, "iscrowd": 1} for image in range(10)
    ]
    content["annotations"] += crowds
    (written,) = write_coco_subsets(write(tmp_path, content), [10], 0, tmp_path).values()
    subset = json.loads(written.read_text())
    (image,) = subset["images"]  # one image cannot have an object of each of the categories 0, 7 and 8
    assert subset["annotations"] == [one for one in content["annotations"] if one["image_id"] == image["id"]]
    assert len(subset["annotations"]) == 2


@pytest.mark.parametrize(
    "content, message",
    [
        ([], "no images"),
        ({"images": []}, "no images"),
        ({"images": [{"id": 1}]}, "no annotations"),
        ({"images": [{"name": 1}], "annotations": []}, r"images\[0\] has no id"),
        ({"images": [{"id": 1}], "annotations": [{"image_id": 1}]}, r"annotations\[0\] has no category_id"),
        ({"images": [{"id": 1}, {"id": 1}], "annotations": []}, "2 images have the id 1"),
    ],
)
def test_other_files_are_named(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"train.json: {message}"):
        write_coco_subsets(write(tmp_path, content), [50], 0, tmp_path)


@pytest.mark.parametrize("share", [0, -1, 100.1, float("nan")])
def test_shares_are_percentages(tmp_path: Path, share: float) -> None:
    with pytest.raises(UserError, match=r"^--shares: "):
        write_coco_subsets(write(tmp_path, coco([{0: 1}])), [share], 0, tmp_path)


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    folder = tmp_path / "flowers"
    for name, count in (("a, b", 60), ("10", 30), ("\u00e4", 9), ("rare", 1)):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            (folder / name / f"{index}.png").touch()
    return folder


def test_lists_of_classes_are_nested_and_stratified(tmp_path: Path, classes: Path) -> None:
    written = list_class_subsets(classes, [10, 50, 100], 0, tmp_path)
    whole = open_source(classes, "data.train")
    names: dict[float, set[tuple[str, str]]] = {}
    for share, path in written.items():
        source = open_source(str(path), "data.train")
        assert source.classes == whole.classes
        names[share] = {(source.name(index), source.classes[source.label(index)]) for index in range(len(source))}
        assert len(names[share]) == len(source) == images_of_share(100, share)
        counts = Counter(label for _, label in names[share])
        assert all(abs(counts[name] - share * total / 100) <= 1 for name, total in (("a, b", 60), ("10", 30)))
        assert counts["rare"] == 1
    assert names[10] < names[50] < names[100]
    assert names[100] == {(whole.name(index), whole.classes[whole.label(index)]) for index in range(100)}
    again = list_class_subsets(classes, [50], 0, tmp_path)[50].read_bytes()
    assert again == written[50].read_bytes()
    assert list_class_subsets(classes, [50], 1, tmp_path)[50].read_bytes() != again


def test_lists_of_classes_name_what_is_wrong(tmp_path: Path, classes: Path) -> None:
    with pytest.raises(UserError, match=r"LABELS: .*flowers: 3 % of 100 .* are 3, .* 4 categories.* 4 % or more"):
        list_class_subsets(classes, [3], 0, tmp_path)
    with pytest.raises(UserError, match="have no labels"):
        list_class_subsets(classes / "10", [50], 0, tmp_path)
    (classes / "nan").mkdir()
    (classes / "nan" / "1.png").touch()
    with pytest.raises(UserError, match="the class 'nan' reads as a missing label"):
        list_class_subsets(classes, [50], 0, tmp_path)
