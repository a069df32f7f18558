"""Proves that the hardest images are the wrong ones with the highest loss, and that small ones stay sharp."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from crossmae.classification.evaluation.files import HARDEST_RECORD, display_picture, write_hardest
from crossmae.classification.evaluation.metrics import Predictions
from crossmae.errors import UserError

NAMES = ("cat", "dog", "rat")


def one_label(scores: Tensor, labels: Tensor) -> Predictions:
    """Predictions by probabilities (N, C)."""
    best = scores.topk(scores.shape[1])
    losses = -scores.gather(1, labels[:, None]).log()[:, 0]
    return Predictions(torch.arange(len(labels)), labels, losses, best.indices, best.values)


def grey(index: int) -> Image.Image:
    return Image.new("L", (28, 28), 5 * index)


def name(index: int) -> str:
    return f"image {index}"


def test_they_are_the_wrong_ones_with_the_highest_loss(tmp_path: Path) -> None:
    torch.manual_seed(0)
    scores, labels = torch.randn(40, 3).mul(2).softmax(1), torch.randint(0, 3, (40,))
    predictions = one_label(scores, labels)
    write_hardest(tmp_path, predictions, grey, NAMES, name, most=7)
    content = json.loads((tmp_path / "hardest" / HARDEST_RECORD).read_text())
    wrong = sorted((float(scores[i, labels[i]]), i) for i in range(40) if int(scores[i].argmax()) != int(labels[i]))
    assert content["wrong"] == len(wrong) > 7
    for entry, (share, index), number in zip(content["images"], wrong[:7], range(1, 8), strict=True):
        assert (entry["index"], entry["name"], entry["picture"]) == (index, name(index), f"{number:02d}.png")
        assert entry["loss"] == pytest.approx(-math.log(share), rel=1e-4)
        assert entry["true"] == [[NAMES[labels[index]], pytest.approx(share, rel=1e-4)]]
        best = int(scores[index].argmax())
        assert entry["predicted"] == [[NAMES[best], pytest.approx(float(scores[index, best]), rel=1e-4)]]
        with Image.open(tmp_path / "hardest" / entry["picture"]) as picture:
            assert picture.convert("L").getpixel((0, 0)) == 5 * index


def test_with_several_labels_all_that_is_missed_or_invented_counts(tmp_path: Path) -> None:
    scores = torch.tensor([[0.9, 0.2, 0.1], [0.9, 0.6, 0.1], [0.4, 0.7, 0.8], [0.1, 0.1, 0.1]])
    labels = torch.tensor([[1, 0, 0], [1, 0, 0], [1, 0, 1], [0, 0, 0]]).bool()
    best = scores.topk(3)
    losses = torch.tensor([3.0, 1.0, 2.0, 4.0])
    predictions = Predictions(torch.arange(4), labels, losses, best.indices, best.values, scores)
    write_hardest(tmp_path, predictions, lambda index: grey(1), NAMES, name)
    content = json.loads((tmp_path / "hardest" / HARDEST_RECORD).read_text())
    assert [entry["index"] for entry in content["images"]] == [2, 1]
    assert content["images"][0]["true"] == [["rat", pytest.approx(0.8)], ["cat", pytest.approx(0.4)]]
    assert content["images"][0]["predicted"] == [["rat", pytest.approx(0.8)], ["dog", pytest.approx(0.7)]]


def test_pictures_of_an_earlier_evaluation_go(tmp_path: Path) -> None:
    labels = torch.zeros(6, dtype=torch.int64)
    wrong = one_label(torch.tensor([[0.1, 0.6, 0.3]]).repeat(6, 1), labels)
    right = one_label(torch.tensor([[0.8, 0.1, 0.1]]).repeat(6, 1), labels)
    write_hardest(tmp_path, wrong, grey, NAMES, name)
    assert len(list((tmp_path / "hardest").iterdir())) == 7
    write_hardest(tmp_path, right, grey, NAMES, name)
    assert [path.name for path in (tmp_path / "hardest").iterdir()] == [HARDEST_RECORD]
    assert json.loads((tmp_path / "hardest" / HARDEST_RECORD).read_text()) == {"wrong": 0, "images": []}


def test_an_image_that_is_gone_is_named_and_the_others_are_there(tmp_path: Path) -> None:
    def read(index: int) -> Image.Image:
        if index == 1:
            raise UserError("1.png: can not be read: Stale file handle")
        return grey(index)

    predictions = one_label(torch.tensor([[0.1, 0.6, 0.3]]).repeat(3, 1), torch.zeros(3, dtype=torch.int64))
    write_hardest(tmp_path, predictions, read, NAMES, name)
    entries = json.loads((tmp_path / "hardest" / HARDEST_RECORD).read_text())["images"]
    assert [entry["picture"] for entry in entries] == ["01.png", None, "03.png"]
    assert entries[1]["fault"] == "1.png: can not be read: Stale file handle"


def test_small_images_are_enlarged_by_a_whole_number() -> None:
    pixels = np.random.default_rng(0).integers(70, 256, (28, 20), dtype=np.uint8)
    picture, enlarged = display_picture(Image.fromarray(pixels))
    shown = np.asarray(picture)
    assert enlarged
    assert shown.shape == (224, 160, 3)
    assert (shown == np.kron(pixels, np.ones((8, 8), np.uint8))[..., None]).all()


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_any_image_becomes_a_picture_of_about_the_same_size(channels: int) -> None:
    picture, enlarged = display_picture(torch.rand(channels, 500, 1000))
    assert (picture.size, picture.mode, enlarged) == ((224, 112), "RGB", False)


def test_an_image_of_the_low_part_of_its_range_is_brightened() -> None:
    picture, _ = display_picture(torch.linspace(0, 4095 / 65535, 64 * 64).view(1, 64, 64))
    assert np.asarray(picture).max() == 255
    dark, _ = display_picture(Image.new("RGB", (64, 64), (0, 40, 0)))  # a night, of 8 bits
    assert np.asarray(dark).max() == 40
