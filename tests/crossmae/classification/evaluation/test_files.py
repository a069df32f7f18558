"""Proves that the files of an evaluation say what was predicted and counted, read back by others' readers, that an
evaluation that fails leaves the earlier one as it was, and that the hardest images are the wrong ones of highest loss.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from crossmae.classification.evaluation import files as evaluation_files
from crossmae.classification.evaluation.files import (
    CALIBRATION,
    CONFUSION_CSV,
    CONFUSION_PNG,
    EMBEDDING,
    EVALUATION,
    FEATURES,
    FILES,
    HARDEST_RECORD,
    PER_CLASS_CSV,
    PREDICTIONS_CSV,
    display_picture,
    write_evaluation,
    write_hardest,
)
from crossmae.classification.evaluation.metrics import Predictions, score
from crossmae.classification.report import Evaluation
from crossmae.errors import UserError
from tests.crossmae.classification.made_up import predictions_of, random_predictions

NAMES = ["plain", 'with "quotes", comma', "two\nlines", "犬", "жук", "seventh \\ $x$", "no sample"]
ABOUT = {"weights": "run/model.safetensors", "step": 7}


def sample_name(index: int) -> str:
    return f"folder, of\n{index}/image \udce9 {index}.png"  # the stray byte of a name that is not UTF-8


def write(folder: Path, data: Predictions, names: Sequence[str] = NAMES, **about: Any) -> None:
    write_evaluation(folder, data, score(data, len(names)), names, sample_name, ABOUT | about)


def read_csv(path: Path) -> list[list[str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_record_is_read_back_with_what_matters_first(tmp_path: Path) -> None:
    data = random_predictions(90, 7)
    found, path = score(data, 7), tmp_path / EVALUATION
    write(tmp_path, data)
    record = json.loads(path.read_text("utf-8"))
    keys = ["samples", "numbers", "top1_interval", "classes", "most_confused", "calibration", "about"]
    assert list(record) == keys
    assert record["numbers"] == pytest.approx(found.numbers(), abs=5e-7)
    assert record["top1_interval"] == pytest.approx(found.top1_interval, abs=5e-7)
    assert [row["name"] for row in record["classes"]] == NAMES
    assert [row["recall"] for row in record["classes"][:6]] == pytest.approx(
        [one.recall for one in found.classes[:6]], abs=5e-7
    )
    assert record["classes"][6]["recall"] is None
    assert record["most_confused"][0] == {
        "true": NAMES[(first := found.most_confused(1)[0])[0]],
        "predicted": NAMES[first[1]],
        "count": first[2],
        "share": round(first[2] / found.classes[first[0]].samples, 6),
    }
    assert sum(one["samples"] for one in record["calibration"]) == record["samples"] == 90
    assert record["about"] == ABOUT
    assert Evaluation.read(path).numbers == record["numbers"]


def test_a_row_per_sample(tmp_path: Path) -> None:
    data = random_predictions(90, 7)
    write(tmp_path, data)
    header, *rows = read_csv(tmp_path / PREDICTIONS_CSV)
    assert header[:6] == ["name", "label", "loss", "correct", "top1", "score1"]
    assert header[-2:] == ["top5", "score5"]
    assert len(rows) == 90
    for index, row in enumerate(rows):
        assert row[0] == sample_name(index).replace("\udce9", "\\udce9")
        assert row[1] == NAMES[data.labels[index]]
        assert float(row[2]) == pytest.approx(float(data.losses[index]), abs=1e-6)
        assert row[3] == str(int(row[1] == row[4]))
        assert row[4::2] == [NAMES[at] for at in data.top_classes[index]]
        assert [float(cell) for cell in row[5::2]] == pytest.approx(data.top_scores[index].tolist(), abs=1e-6)


def test_tables_of_classes_and_confusions(tmp_path: Path) -> None:
    data = random_predictions(90, 7)
    found = score(data, 7)
    write(tmp_path, data)
    header, *rows = read_csv(tmp_path / CONFUSION_CSV)
    assert header[1:] == [row[0] for row in rows] == NAMES
    np.testing.assert_array_equal([list(map(int, row[1:])) for row in rows], found.confusion)
    header, *rows = read_csv(tmp_path / PER_CLASS_CSV)
    assert header == ["name", "samples", "predictions", "recall", "precision", "f1"]
    assert [[int(cell) for cell in row[1:3]] for row in rows] == [[c.samples, c.predictions] for c in found.classes]
    assert rows[6][3] == "", "there is no share of no samples"
    for name in (CONFUSION_PNG, CALIBRATION, EMBEDDING):
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG"


def test_features_carry_labels_and_indices(tmp_path: Path) -> None:
    data = random_predictions(90, 7)
    write(tmp_path, data)
    tensors = load_file(tmp_path / FEATURES)
    assert torch.equal(tensors["indices"], torch.arange(1, 90, 2))
    assert torch.equal(tensors["labels"], data.labels[1::2])
    assert data.features is not None
    assert torch.equal(tensors["features"], data.features)


def test_several_labels_have_no_confusion_and_no_calibration(tmp_path: Path) -> None:
    data = random_predictions(30, 7, several=True)
    write(tmp_path, data)
    assert {path.name for path in tmp_path.iterdir()} == {
        EVALUATION,
        PER_CLASS_CSV,
        PREDICTIONS_CSV,
        FEATURES,
        EMBEDDING,
    }
    record = Evaluation.read(tmp_path / EVALUATION)
    assert record.metric == "mean_ap"
    assert record.classes[6].ap is None
    assert record.classes[0].ap == pytest.approx(score(data, 7).classes[0].ap, abs=5e-7)
    for index, row in enumerate(read_csv(tmp_path / PREDICTIONS_CSV)[1:]):
        labels = [name for name, has in zip(NAMES, data.labels[index].tolist(), strict=True) if has]
        assert row[1] == "; ".join(labels)
        assert row[3] == str(int(data.correct[index]))
    assert torch.equal(load_file(tmp_path / FEATURES)["labels"], data.labels[1::2])


def test_what_an_earlier_evaluation_left_goes(tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("not ours")
    write(tmp_path, random_predictions(90, 7))
    assert {path.name for path in tmp_path.iterdir()} == {*FILES, "other.txt"}
    data = predictions_of(torch.randn(4, 2), torch.rand(4, 2) < 0.5)
    write(tmp_path, data, ["a", "b"])
    assert {path.name for path in tmp_path.iterdir()} == {EVALUATION, PER_CLASS_CSV, PREDICTIONS_CSV, "other.txt"}
    assert len(read_csv(tmp_path / PREDICTIONS_CSV)[0]) == 4 + 2 * 2


@pytest.mark.parametrize("step", ["save_figure", "_write_features", "write_json"])
def test_a_failure_leaves_the_earlier_evaluation(tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, random_predictions(90, 7))
    before = contents(tmp_path)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(evaluation_files, step, fail)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path, random_predictions(80, 7, seed=1))
    assert contents(tmp_path) == before


def test_the_record_stands_only_while_all_files_are_of_one_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, random_predictions(90, 7))
    moved = []
    replace = evaluation_files.os.replace

    def watch(source: Path, target: Path) -> None:
        if target.parent == tmp_path:
            moved.append(target.name)
            assert not (tmp_path / EVALUATION).exists()
        replace(source, target)

    monkeypatch.setattr(evaluation_files.os, "replace", watch)
    write(tmp_path, random_predictions(80, 7, seed=1))
    assert moved[-1] == EVALUATION
    assert sorted(moved) == sorted(FILES)


def test_nothing_is_written_where_names_or_facts_are_wrong(tmp_path: Path) -> None:
    data = random_predictions(10, 7)
    with pytest.raises(ValueError, match="argument 2 is longer"):
        write_evaluation(tmp_path, data, score(data, 7), ["a", "b"], sample_name, ABOUT)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write(tmp_path, data, lr=math.nan)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"output_dir: cannot write in"):
        write(tmp_path / "file" / "evaluation", data)


SPECIES = ("cat", "dog", "rat")


def of_shares(shares: Tensor, labels: Tensor) -> Predictions:
    """Predictions by probabilities (N, C)."""
    return predictions_of(shares.log(), labels)


def grey(index: int) -> Image.Image:
    return Image.new("L", (28, 28), 5 * index)


def test_they_are_the_wrong_ones_with_the_highest_loss(tmp_path: Path) -> None:
    torch.manual_seed(0)
    scores, labels = torch.randn(40, 3).mul(2).softmax(1), torch.randint(0, 3, (40,))
    predictions = of_shares(scores, labels)
    write_hardest(tmp_path, predictions, grey, SPECIES, sample_name, most=7)
    content = json.loads((tmp_path / "hardest" / HARDEST_RECORD).read_text())
    wrong = sorted((float(scores[i, labels[i]]), i) for i in range(40) if int(scores[i].argmax()) != int(labels[i]))
    assert content["wrong"] == len(wrong) > 7
    for entry, (share, index), number in zip(content["images"], wrong[:7], range(1, 8), strict=True):
        assert (entry["index"], entry["name"], entry["picture"]) == (index, sample_name(index), f"{number:02d}.png")
        assert entry["loss"] == pytest.approx(-math.log(share), rel=1e-4)
        assert entry["true"] == [[SPECIES[labels[index]], pytest.approx(share, rel=1e-4)]]
        best = int(scores[index].argmax())
        assert entry["predicted"] == [[SPECIES[best], pytest.approx(float(scores[index, best]), rel=1e-4)]]
        with Image.open(tmp_path / "hardest" / entry["picture"]) as picture:
            assert picture.convert("L").getpixel((0, 0)) == 5 * index


def test_with_several_labels_all_that_is_missed_or_invented_counts(tmp_path: Path) -> None:
    scores = torch.tensor([[0.9, 0.2, 0.1], [0.9, 0.6, 0.1], [0.4, 0.7, 0.8], [0.1, 0.1, 0.1]])
    labels = torch.tensor([[1, 0, 0], [1, 0, 0], [1, 0, 1], [0, 0, 0]]).bool()
    best = scores.topk(3)
    losses = torch.tensor([3.0, 1.0, 2.0, 4.0])
    predictions = Predictions(torch.arange(4), labels, losses, best.indices, best.values, scores)
    write_hardest(tmp_path, predictions, lambda index: grey(1), SPECIES, sample_name)
    content = json.loads((tmp_path / "hardest" / HARDEST_RECORD).read_text())
    assert [entry["index"] for entry in content["images"]] == [2, 1]
    assert content["images"][0]["true"] == [["rat", pytest.approx(0.8)], ["cat", pytest.approx(0.4)]]
    assert content["images"][0]["predicted"] == [["rat", pytest.approx(0.8)], ["dog", pytest.approx(0.7)]]


def test_pictures_of_an_earlier_evaluation_go(tmp_path: Path) -> None:
    labels = torch.zeros(6, dtype=torch.int64)
    wrong = of_shares(torch.tensor([[0.1, 0.6, 0.3]]).repeat(6, 1), labels)
    right = of_shares(torch.tensor([[0.8, 0.1, 0.1]]).repeat(6, 1), labels)
    write_hardest(tmp_path, wrong, grey, SPECIES, sample_name)
    assert len(list((tmp_path / "hardest").iterdir())) == 7
    write_hardest(tmp_path, right, grey, SPECIES, sample_name)
    assert [path.name for path in (tmp_path / "hardest").iterdir()] == [HARDEST_RECORD]
    assert json.loads((tmp_path / "hardest" / HARDEST_RECORD).read_text()) == {"wrong": 0, "images": []}


def test_an_image_that_is_gone_is_named_and_the_others_are_there(tmp_path: Path) -> None:
    def read(index: int) -> Image.Image:
        if index == 1:
            raise UserError("1.png: can not be read: Stale file handle")
        return grey(index)

    predictions = of_shares(torch.tensor([[0.1, 0.6, 0.3]]).repeat(3, 1), torch.zeros(3, dtype=torch.int64))
    write_hardest(tmp_path, predictions, read, SPECIES, sample_name)
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
