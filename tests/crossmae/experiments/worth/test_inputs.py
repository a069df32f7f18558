"""The data of the question: subsets and held-out images share nothing, and bad input is named before anything runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from crossmae.checkpoints.weights import save_weights
from crossmae.data.sources import open_source
from crossmae.errors import UserError
from crossmae.experiments.worth.grid import PRESETS
from crossmae.experiments.worth.inputs import (
    DEFAULT_SHARES,
    LabelledPart,
    check_unchanged,
    check_weights,
    prepare_labels,
)
from crossmae.models.crossmae import create_model
from tests.crossmae.classification.labelled import write_classes
from tests.crossmae.data.annotations.label_folders import write, write_image

SHARES, SEEDS = (25.0, 100.0), (0, 1)


def write_labels(folder: Path, count: int = 40, name: str = "train", masks: bool = True) -> LabelledPart:
    """Images with one object of one of two categories each, and their json."""
    images = folder / name
    images.mkdir(parents=True)
    rng = np.random.default_rng(len(name))
    for number in range(count):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(images / f"{name}{number}.png")
    polygon = [[2, 2, 10, 2, 10, 10, 2, 10]]
    content = {
        "images": [{"id": n, "file_name": f"{name}{n}.png", "height": 16, "width": 16} for n in range(count)],
        "annotations": [
            {"id": n, "image_id": n, "category_id": 1 + n % 2, "bbox": [2, 2, 8, 8], "area": 64, "iscrowd": 0}
            | ({"segmentation": polygon} if masks else {})
            for n in range(count)
        ],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content))
    return LabelledPart(path)


def names(path: Path) -> set[str]:
    return {image["file_name"] for image in json.loads(path.read_text())["images"]}


def prepare(folder: Path, labels: LabelledPart, val: LabelledPart | None = None, **options: Any):
    values = {"shares": SHARES, "seeds": SEEDS, "unlabelled": labels.images or labels.labels.with_suffix("")} | options
    return prepare_labels(labels, val, folder=folder / "out", **values)


def test_held_out_images_are_in_no_subset(tmp_path: Path):
    found = prepare(tmp_path, write_labels(tmp_path))
    assert (found.task, found.all_images, found.val_images, found.has_masks) == ("detect", 20, 20, True)
    assert found.counts == {25.0: 5, 100.0: 20}
    held_out = names(found.val.labels)
    assert len(held_out) == 20
    for seed in SEEDS:
        small, large = (names(found.train[seed, share].labels) for share in SHARES)
        assert small < large
        assert not large & held_out
    assert found.train[0, 25.0].images == tmp_path / "train"  # next to the json
    assert "20 of the 40 labelled images are held out" in found.remarks[0][1]
    assert "Pretraining sees 20 of the 20 validation images" in found.remarks[1][1]


def test_validation_labels_of_the_user(tmp_path: Path):
    labels, val = write_labels(tmp_path), write_labels(tmp_path, 6, "val")
    found = prepare(tmp_path, labels, val)
    assert (found.all_images, found.val_images, found.remarks) == (40, 6, ())
    assert found.val == LabelledPart(val.labels, tmp_path / "val")


def test_other_labels_have_other_files(tmp_path: Path):
    first = prepare(tmp_path, write_labels(tmp_path / "a"))
    again = prepare(tmp_path, LabelledPart(tmp_path / "a/train.json"))
    other = prepare(tmp_path, write_labels(tmp_path / "b", 50))
    assert first.train == again.train
    assert first.train[0, 25.0] != other.train[0, 25.0]


def test_labels_without_masks_are_remarked(tmp_path: Path):
    found = prepare(tmp_path, write_labels(tmp_path, masks=False))
    assert not found.has_masks
    assert any("boxes only" in text for _, text in found.remarks)


def test_folders_of_classes_are_split(tmp_path: Path):
    found = prepare(tmp_path, LabelledPart(write_classes(tmp_path / "classes", per_class=20)))
    assert (found.task, found.all_images, found.val_images) == ("classify", 40, 20)
    val = open_source(found.val.labels, "val")
    held_out = {val.name(index) for index in range(len(val))}
    assert len(val.classes) == 3
    for seed in SEEDS:
        train = open_source(found.train[seed, 100.0].labels, "train")
        assert len(train) == 40
        assert not held_out & {train.name(index) for index in range(len(train))}
    assert found.counts == {25.0: 10, 100.0: 40}
    assert "Pretraining sees 20 of the 20 validation images" in found.remarks[1][1]
    own = prepare(tmp_path, LabelledPart(tmp_path / "classes"), LabelledPart(write_classes(tmp_path / "val")))
    assert own.remarks == ()


@pytest.mark.parametrize(("per_class", "held_out", "shares"), [(8, 12, (30, 100)), (3, 4, (100,)), (40, 24, None)])
def test_few_labels_hold_out_at_most_half_and_drop_usual_shares(
    tmp_path: Path, per_class: int, held_out: int, shares: tuple[float, ...] | None
):
    """Three classes need three training images. The user's own shares are never dropped."""
    labels = LabelledPart(write_classes(tmp_path / "classes", per_class=per_class))
    found = prepare(tmp_path, labels, shares=None)
    assert (found.val_images, found.all_images) == (held_out, 3 * per_class - held_out)
    assert tuple(found.counts) == (shares or DEFAULT_SHARES)
    assert set(found.train) == {(seed, share) for seed in SEEDS for share in found.counts}
    assert min(found.counts.values()) >= 3
    left_out = [text for heading, text in found.remarks if heading == "Shares left out"]
    if not shares:
        assert not left_out
        return
    assert left_out[0].startswith(
        "10 % " if len(shares) == 2 else "10 % and 30 % of the labels are left out: 10 % of 5"
    )
    with pytest.raises(
        UserError, match=f"LABELS: .*classes: {held_out} of {3 * per_class} labelled images are held out"
    ):
        prepare(tmp_path, labels, shares=DEFAULT_SHARES)


def test_labels_of_another_tool_and_their_splits(tmp_path: Path):
    for split, count in (("train", 40), ("valid", 20)):
        for at in range(count):
            write_image(tmp_path / f"yolo/{split}/images/{split}{at}.jpg", at + 100 * len(split))
            write(tmp_path / f"yolo/{split}/labels/{split}{at}.txt", f"{at % 2} .5 .5 .4 .4\n")
    write(tmp_path / "yolo/data.yaml", "train: train/images\nval: valid/images\nnames: [a, b]\n")
    images = tmp_path / "yolo/train/images"
    found = prepare(tmp_path, LabelledPart(tmp_path / "yolo/data.yaml"), unlabelled=images)
    assert (found.task, found.all_images, found.val_images, found.has_masks) == ("detect", 40, 20, False)
    assert found.train[0, 25.0].images == images
    assert names(found.val.labels) == {f"valid{at}.jpg" for at in range(20)}


def test_a_folder_of_images_without_a_json(tmp_path: Path):
    with pytest.raises(UserError, match="--label-images: only a COCO json needs it"):
        prepare(tmp_path, LabelledPart(write_classes(tmp_path / "classes"), tmp_path))


def without(part: LabelledPart, key: str, value: object) -> LabelledPart:
    content = json.loads(part.labels.read_text())
    part.labels.write_text(json.dumps(content | {key: value}))
    return part


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", "LABELS: .*nowhere.json does not exist"),
        ("no annotations", "LABELS: .*: has no annotations"),
        ("no json", "not valid JSON"),
        ("no image", "LABELS: 1 of 40 images are not in .*, such as train3.png"),
        ("no folder", "its image train0.png is in none of .*--label-images"),
        ("few", "LABELS: .*train.json: 2 labelled images are too few to hold some out. Label at least 3"),
        (
            "share",
            "LABELS: .*train.json: 20 of 40 labelled images are held out for validation, and 4 % of 20 training images "
            "are 1, .* each of the 2 categories. Give --shares of 10 % or more, or name .* with --val-labels",
        ),
        ("val is train", "--val-labels: 40 of 40 validation images are labelled training images"),
        ("one class", "LABELS: .*: has fewer than two classes"),
        ("no val", "--val-labels: .*nowhere.json does not exist"),
        ("other classes", "--val-labels: LABELS has no class blue"),
    ],
)
def test_bad_input_is_named(tmp_path: Path, case: str, message: str):
    labels = write_labels(tmp_path, 2 if case == "few" else 40)
    val, options = None, {}
    if case == "missing":
        labels = LabelledPart(tmp_path / "nowhere.json")
    elif case == "no annotations":
        without(labels, "annotations", [])
    elif case == "no json":
        labels.labels.write_text("{")
    elif case == "no image":
        (tmp_path / "train/train3.png").unlink()
    elif case == "no folder":
        (tmp_path / "train").rename(tmp_path / "moved")
        options = {"unlabelled": tmp_path / "nowhere"}
    elif case == "share":
        options = {"shares": (4.0,)}
    elif case == "val is train":
        val = labels
    elif case == "one class":
        labels = LabelledPart(tmp_path / "train")
    elif case == "no val":
        val = LabelledPart(tmp_path / "nowhere.json")
    elif case == "other classes":
        labels = LabelledPart(write_classes(tmp_path / "classes"))
        val = LabelledPart(write_classes(tmp_path / "val"))
        for path in (tmp_path / "classes/blue").iterdir():
            path.unlink()
    with pytest.raises(UserError, match=message):
        prepare(tmp_path, labels, val, **options)


def test_too_few_labels_name_what_the_user_gave(tmp_path: Path):
    labels, val = write_labels(tmp_path), write_labels(tmp_path, 6, "val")
    with pytest.raises(UserError, match=r"LABELS: .*train.json: 2 % of 40 training .* Give --shares of 5 % or more\.$"):
        prepare(tmp_path, labels, val, shares=(2.0,))
    few = write_labels(tmp_path, 4, "few")
    annotations = json.loads(few.labels.read_text())["annotations"]
    without(few, "annotations", [one | {"category_id": number % 3} for number, one in enumerate(annotations)])
    with pytest.raises(UserError, match=r"few.json: 2 of 4 .* held out .* the other 2 are too few .* --val-labels"):
        prepare(tmp_path, few)


def test_changed_inputs_are_refused_once_there_are_results(tmp_path: Path):
    weights, results = tmp_path / "weights.pth", tmp_path / "results.jsonl"
    for content in (b"first", b"second"):
        weights.write_bytes(content)
        check_unchanged(tmp_path, results, {"--weights: a": weights, "IMAGES: b": 3})
    results.touch()
    check_unchanged(tmp_path, results, {"IMAGES: c": 4})
    check_unchanged(tmp_path, results, {"--weights: a": weights, "IMAGES: b": 3})
    with pytest.raises(UserError, match="IMAGES: b: has changed since the runs in "):
        check_unchanged(tmp_path, results, {"--weights: a": weights, "IMAGES: b": 4})
    weights.write_bytes(b"third")
    with pytest.raises(UserError, match=r"--weights: a: has changed .* Name another --output"):
        check_unchanged(tmp_path, results, {"--weights: a": weights})


def test_weights_must_fit(tmp_path: Path):
    presets = {name: preset.encoder() for name, preset in PRESETS.items()}
    model = create_model("crossmae_vit_small_patch16", img_size=32, decoder_depth=1)
    path = tmp_path / "weights.safetensors"
    save_weights(path, model.state_dict(), {})
    check_weights(path, presets["small"], presets)
    with pytest.raises(UserError, match=r"--weights: .* has embed_dim 384, not 192.*Use --size small"):
        check_weights(path, presets["demo"], presets)
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"weights.safetensors"):
        check_weights(path, presets["small"], presets)
