"""Proves that classes meet by name, that what training and evaluation see is timm's and published, and that augmented
images depend on (seed, epoch, index) alone.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from crossmae.classification.data import (
    CentreViews,
    TrainImages,
    Views,
    collate_labelled,
    find_classes,
    label_targets,
    read_class_names,
)
from crossmae.classification.train.augment import keyed_everywhere, train_view
from crossmae.data.batches import BatchPlan, build_loader
from crossmae.data.pixels import centre_view, published_crop_pct, to_tensor
from crossmae.data.sources import open_source
from crossmae.errors import UserError
from tests.crossmae.classification.labelled import CLASSES, write_classes

MEAN = (0.485, 0.456, 0.406)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [96, 224, 384])
def test_the_evaluation_view_is_the_published_one(size: int) -> None:
    """Method specification, 1.10: up to 224 the shorter side becomes size * 256 / 224, above it the size itself."""
    crop_pct = published_crop_pct((size, size))
    reference = create_transform(size, interpolation="bicubic", crop_pct=crop_pct, normalize=False)
    for number, (height, width) in enumerate([(60, 91), (401, 300), (256, 256), (33, 500)]):
        image = picture(height, width, number)
        assert torch.equal(centre_view(image, (size, size), crop_pct), torch.as_tensor(reference(image)))
    assert int(size / crop_pct) == (size * 256 // 224 if size <= 224 else size)


def test_labels_meet_by_name_and_not_by_position(tmp_path: Path) -> None:
    train = open_source(write_classes(tmp_path / "train"), "data.train")
    val_folder = write_classes(tmp_path / "val", per_class=2)
    (val_folder / "blue").rename(tmp_path / "blue")
    val = open_source(val_folder, "data.val")
    assert val.classes == CLASSES[1:]  # there, green has position 0
    targets = label_targets(val, "data.val", find_classes(train, "data.train"))
    assert targets.tolist() == [1, 1, 2, 2]
    (val_folder / "green").rename(val_folder / "verdant")
    with pytest.raises(
        UserError, match=r"data\.val: .* no classes of the model: verdant. Its 3 classes are blue, green, red"
    ):
        label_targets(open_source(val_folder, "data.val"), "data.val", CLASSES)


def test_several_labels_per_image(tmp_path: Path) -> None:
    for name in "abcd":
        picture(8, 8).save(tmp_path / f"{name}.png")
    rows = ["path,label", "a.png,cat; dog", "b.png,dog", "c.png,;", "d.png,bird;Cat"]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    source = open_source(tmp_path / "list.csv", "data.train")
    classes = find_classes(source, "data.train", ";")
    assert classes == ("bird", "cat", "dog")
    targets = label_targets(source, "data.train", classes, ";")
    assert targets.tolist() == [[0, 1, 1], [0, 0, 1], [0, 0, 0], [1, 1, 0]]


def test_names_to_show(tmp_path: Path) -> None:
    assert read_class_names(None, CLASSES) == CLASSES
    (tmp_path / "names.txt").write_text("bleu\nvert\nrouge\n")
    assert read_class_names(tmp_path / "names.txt", CLASSES) == ("bleu", "vert", "rouge")
    with pytest.raises(UserError, match=r"data\.class_names: 1 name for 3 classes\. Name all of blue, green, red"):
        read_class_names(("bleu",), CLASSES)


def test_a_sample_depends_on_its_key_alone(tmp_path: Path) -> None:
    source = open_source(write_classes(tmp_path), "data.train")
    view = train_view((32, 32), (0.2, 1.0), 0.5, "rand-m9-mstd0.5-inc1", 0.0, MEAN)
    targets = label_targets(source, "data.train", CLASSES)

    def sample(seed: int, epoch: int, index: int) -> torch.Tensor:
        made = TrainImages(source, targets, view, seed, 3, 8, "error")[epoch, index]
        assert isinstance(made, tuple)
        assert made[1] == targets[index]
        return made[0]

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    first = sample(0, 2, 5)
    after = random.random(), np.random.rand(), torch.rand(()).item()
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    assert torch.equal(first, sample(0, 2, 5))
    assert not torch.equal(first, sample(0, 3, 5))
    assert not torch.equal(first, sample(1, 2, 5))
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert after == (random.random(), np.random.rand(), torch.rand(()).item())  # the generators were left alone


def test_a_spawned_worker_reads_the_batches_of_a_forked_one(
    tmp_path: Path, start_method: Callable[[str], None]
) -> None:
    """As on macOS and Windows: a policy, erasing, and the views of an evaluation."""
    source = open_source(write_classes(tmp_path), "data.train")
    targets, plan = label_targets(source, "data.train", CLASSES), BatchPlan(len(source), 4, 7)
    view = train_view((32, 32), (0.2, 1.0), 0.5, "rand-m9-mstd0.5-inc1", 0.0, MEAN)
    images = TrainImages(source, targets, view, 0, 3, 8, "error")
    found = []
    for method in ("fork", "spawn"):
        start_method(method)
        loader = build_loader(images, plan, 0, 3, 1, False, collate_labelled)
        found.append([[part.numpy() for part in batch[:3]] for batch in loader])
    assert len(found[0]) == 3
    np.testing.assert_equal(found[1], found[0])
    views = CentreViews(source, targets, Views((32, 32), 0.9, MEAN, MEAN, 8))
    assert torch.equal(pickle.loads(pickle.dumps(views))[1][0], views[1][0])


def test_the_policy_is_timms_with_its_own_settings() -> None:
    """The same operations on the same image, where timm's own transform is given no crop and no flip."""
    image = picture(48, 48)
    whole = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "hflip": 0.0}
    for policy in ("rand-m9-mstd0.5-inc1", "augmix-m3-w3", "original-mstd0.5", "v0"):
        reference = create_transform(
            48, is_training=True, interpolation="bicubic", auto_augment=policy, normalize=False, mean=MEAN, **whole
        )
        ours = train_view((48, 48), (1.0, 1.0), 0.0, policy, 0.0, MEAN)
        ours.transforms, reference.transforms = ours.transforms[1:], reference.transforms[1:]  # no crop, no flip
        with keyed_everywhere(3):
            mine = ours(to_tensor(image))
        with keyed_everywhere(3):
            assert torch.equal(mine, torch.as_tensor(reference(image))), policy


def test_a_grey_image_stays_grey_under_a_policy() -> None:
    view = train_view((16, 16), (0.5, 1.0), 0.5, "rand-m9-mstd0.5-inc1", 0.0, (0.5,))
    with keyed_everywhere(0):
        assert view(picture(20, 20).convert("L")).shape == (1, 16, 16)


WRITTEN = ["rand-m10-n9-inc1-p1", "rand-m0-n9-p1", "rand-m60-n9-mmax99-inc1-p1", "rand-m60-n9-mmax99-p1"]
WRITTEN += ["rand-m9-n9-mstd101-inc1-t3aw-p1", "rand-m9-n9-mstd3-inc1-tweights", "augmix-m10-w3", "augmix-m99-mstd5-b1"]
WRITTEN += ["v0-mstd9", "v0r-mstd9", "original-mstd9", "originalr-mstd9", "3a-mstd9"]


@pytest.mark.parametrize("name", WRITTEN)
def test_no_policy_leaves_the_range_of_pillow(name: str) -> None:
    """Strongest and weakest magnitudes of every operation that a config can name."""
    view, image = train_view((8, 8), (0.5, 1.0), 0.5, name, 0.0, MEAN), picture(8, 8)
    for seed in range(300):
        with keyed_everywhere(seed):
            assert view(image).shape == (3, 8, 8)


IGNORED_BY_TIMM = ["rand-m", "rand-mfoo", "rand-m9-twrong", "augmix-w", "v0-mstdinf", "rand-m9-mstdnan", "rand-"]
NOTHING_LEFT = ["rand-m9-n0", "rand-m9-p0", "augmix-m3-w0", "augmix-m3-a0", "augmix-m3-d0", "augmix-w0.0"]


@pytest.mark.parametrize("name", ["rand-m9-foo1", "nothing", "v0-bar2", *IGNORED_BY_TIMM, *NOTHING_LEFT])
def test_an_unknown_policy_is_named(name: str) -> None:
    with pytest.raises(UserError, match=f"data.auto_augment: '{name}' is no policy"):
        train_view((16, 16), (0.5, 1.0), 0.5, name, 0.0, MEAN)


def test_a_policy_that_fails_is_found_before_the_first_image() -> None:
    state = np.random.get_state()[1].tolist()
    with pytest.raises(UserError, match=r"data.auto_augment: 'augmix-a0.0001' fails on an image \(invalid value"):
        train_view((16, 16), (0.5, 1.0), 0.5, "augmix-a0.0001", 0.0, MEAN)
    assert np.random.get_state()[1].tolist() == state


def test_views_to_evaluate_on(tmp_path: Path) -> None:
    source = open_source(write_classes(tmp_path), "data.val")
    views = Views((24, 32), 0.875, MEAN, MEAN, 8)
    pixels, target, index, _ = CentreViews(source, label_targets(source, "data.val", CLASSES), views)[9]  # type: ignore[misc]
    assert pixels.shape == (3, 24, 32)
    assert (int(target), index) == (1, 9)


def test_a_class_that_reads_like_several_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in "abcd":
        picture(8, 8).save(tmp_path / f"{name}.png")
    rows = ["path,label", "a.png,cat", "b.png,cat|dog", "c.png,dog", 'd.png,"tench, Tinca"']
    (tmp_path / "list.csv").write_text("\n".join(rows))
    source = open_source(tmp_path / "list.csv", "data.train")
    find_classes(source, "data.train")
    assert "the class 'cat|dog' reads like several labels" in caplog.text
    assert "tench" not in caplog.text
    with pytest.raises(UserError, match=r"cat\|dog.*need 'data\.separator=\"\|\"'"):
        label_targets(source, "data.val", ("cat", "dog"))


def test_a_missing_label_is_named(tmp_path: Path) -> None:
    picture(8, 8).save(tmp_path / "a.png")
    picture(8, 8).save(tmp_path / "b.png")
    (tmp_path / "list.csv").write_text("path,label\na.png,cat\nb.png,\na.png,dog\n")
    with pytest.raises(UserError, match=r"data\.train: .*none for 1 sample, the first is .*b\.png\. Label them"):
        find_classes(open_source(tmp_path / "list.csv", "data.train"), "data.train")
    (tmp_path / "list.csv").write_text("path,species\na.png,cat\n")
    with pytest.raises(UserError, match=r"\(columns path, species\) have no labels\. .* `label` or `class`"):
        find_classes(open_source(tmp_path / "list.csv", "data.train"), "data.train")


def test_labels_match_classes_regardless_of_spaces_and_case(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in "abc":
        picture(8, 8).save(tmp_path / f"{name}.png")
    (tmp_path / "list.csv").write_text("path,label\na.png,Cat\nb.png, dog\nc.png,Cat\n")
    source = open_source(tmp_path / "list.csv", "data.val")
    assert label_targets(source, "data.val", ("cat", "dog")).tolist() == [0, 1, 0]
    assert "data.val: names differ in spaces, case or Unicode form: 'Cat' is 'cat'" in caplog.text
    assert find_classes(source, "data.val") == ("Cat", "dog")
    assert "classes of their own" not in caplog.text
    (tmp_path / "letters.csv").write_text("path,label\na.png,a\nb.png,A\n")
    assert find_classes(open_source(tmp_path / "letters.csv", "data.train"), "data.train") == ("A", "a")
    assert "data.train: A, a differ in spaces or case only, but are classes of their own" in caplog.text
    with pytest.raises(UserError, match=r"no classes of the model: Cat\."):  # which of the two is not certain
        label_targets(source, "data.val", ("cat", "CAT", "dog"))
