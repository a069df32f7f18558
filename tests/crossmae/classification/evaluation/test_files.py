"""Proves that the files of an evaluation say what was predicted and counted, read back by others' readers, and that an
evaluation that fails leaves the earlier one as it was."""

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

from crossmae.classification.evaluation import files as evaluation_files
from crossmae.classification.evaluation.files import (
    CALIBRATION,
    CONFUSION_CSV,
    CONFUSION_PNG,
    EMBEDDING,
    EVALUATION,
    FEATURES,
    FILES,
    PER_CLASS_CSV,
    PREDICTIONS_CSV,
    write_evaluation,
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
