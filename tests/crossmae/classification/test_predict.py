"""Proves that answers are those of the model for each image alone, in order, whatever is around it in batch or file."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as VF

from crossmae.classification.classifier import BEST, Classifier, load_classifier
from crossmae.classification.predict import (
    Selection,
    check_output,
    expand_inputs,
    open_inputs,
    predict,
    predict_images,
    write_answers,
)
from crossmae.errors import UserError
from crossmae.files import sha256
from tests.crossmae.classification.classifiers import NAMES, write_classifier
from tests.crossmae.classification.labelled import CLASSES, write_classes


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_classifier(tmp_path / "run", CLASSES, names=NAMES)


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    return sorted(write_classes(tmp_path / "images", per_class=3).rglob("*.png"))


def reference(classifier: Classifier, path: Path) -> torch.Tensor:
    """Logits (C,) of one image by itself: scaled to cover 16 x 24 pixels at a crop of 0.8, cut, normalised."""
    image = Image.open(path).convert("RGB")  # 40 x 48 pixels
    covered = VF.resize(image, [25, 30], interpolation=InterpolationMode.BICUBIC, antialias=True)
    pixels = torch.from_numpy(np.asarray(VF.center_crop(covered, [16, 24])).copy()).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (classifier.mean, classifier.std))
    with torch.no_grad():
        return classifier.model(((pixels - mean) / std)[None])[0]


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_an_answer_is_that_of_the_image_alone(run: Path, images: list[Path], batch_size: int) -> None:
    classifier = load_classifier(run)
    answers = predict_images(classifier, images, top_k=2, batch_size=batch_size)
    assert [answer.name for answer in answers] == list(map(str, images))
    assert len({answer.probabilities for answer in answers}) == len(images)
    for path, answer in zip(images, answers, strict=True):
        best = reference(classifier, path).softmax(0).topk(2)
        assert answer.classes == tuple(best.indices.tolist())
        assert answer.probabilities == pytest.approx(best.values.tolist(), abs=1e-5)


def test_of_a_multi_label_classifier_all_classes_over_the_threshold_are_told(
    tmp_path: Path, images: list[Path]
) -> None:
    classifier = load_classifier(write_classifier(tmp_path / "run", CLASSES, multi_label=True))
    found = predict_images(classifier, images, threshold=0.4)
    for path, answer in zip(images, found, strict=True):
        scores = reference(classifier, path).sigmoid()
        wanted = [at for at in scores.argsort(descending=True).tolist() if scores[at] >= 0.4]
        assert list(answer.classes) == wanted
        assert answer.probabilities == pytest.approx(scores[wanted].tolist(), abs=1e-5)
    assert {len(answer.classes) for answer in found} != {3}  # the threshold left something out


def test_what_can_not_be_read_leaves_the_others_as_they_are(run: Path, images: list[Path]) -> None:
    classifier = load_classifier(run)
    whole = predict_images(classifier, images)
    images[4].write_text("no image")
    with pytest.raises(UserError, match=f"{images[4]}: cannot be read as an image"):
        predict_images(classifier, images)
    answers = list(predict(classifier, open_inputs(list(map(str, images))), Selection(), batch_size=3))
    assert isinstance(answers.pop(4), UserError)
    for answer, before in zip(answers, [*whole[:4], *whole[5:]], strict=True):
        assert not isinstance(answer, UserError)
        assert (answer.name, answer.classes) == (before.name, before.classes)
        assert answer.probabilities == pytest.approx(before.probabilities, abs=1e-6)


def test_damaged_weights_are_named(run: Path, images: list[Path]) -> None:
    classifier = load_classifier(run)
    torch.nn.init.constant_(classifier.model.get_parameter("head.bias"), float("nan"))
    with pytest.raises(UserError, match=r"0\.png: the probabilities are not finite. Replace the weights .*model_best"):
        predict_images(classifier, images)


def test_the_files_hold_the_answers(run: Path, images: list[Path], tmp_path: Path) -> None:
    classifier = load_classifier(run)
    answers = predict_images(classifier, images, top_k=2)
    sources = open_inputs([str(tmp_path / "images")])
    for name in ("found.json", "found.csv"):
        write_answers(classifier, sources, Selection(top_k=2), str(tmp_path / "new" / name), batch_size=4)
    content = json.loads((tmp_path / "new/found.json").read_text("utf-8"))
    assert content["unreadable"] == []
    about = content["about"]
    assert (about["weights"], about["sha256"]) == (str(run / BEST), sha256(run / BEST))
    assert (about["classes"], about["class_names"], about["top_k"]) == (list(CLASSES), list(NAMES), 2)
    with open(tmp_path / "new/found.csv", encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["name", "top1", "score1", "top2", "score2"]
    for answer, entry, row in zip(answers, content["images"], rows, strict=True):
        assert entry["name"] == row[0] == answer.name
        assert [one["class"] for one in entry["classes"]] == [CLASSES[at] for at in answer.classes]
        assert [one["name"] for one in entry["classes"]] == row[1::2] == [NAMES[at] for at in answer.classes]
        assert [one["probability"] for one in entry["classes"]] == list(map(float, row[2::2]))
        assert list(map(float, row[2::2])) == pytest.approx(answer.probabilities, rel=1e-5)


def test_a_table_of_several_classes_has_a_column_for_each(tmp_path: Path, images: list[Path]) -> None:
    classifier = load_classifier(write_classifier(tmp_path / "run", CLASSES, multi_label=True, names=NAMES))
    answers = predict_images(classifier, images, threshold=0.4)
    sources = open_inputs(list(map(str, images)))
    write_answers(classifier, sources, Selection(threshold=0.4), str(tmp_path / "found.csv"))
    with open(tmp_path / "found.csv", encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["name", *NAMES]
    for answer, row in zip(answers, rows, strict=True):
        assert {at for at, cell in enumerate(row[1:]) if cell} == set(answer.classes)


def test_a_name_that_is_no_utf8_is_spelled_out(run: Path, images: list[Path], tmp_path: Path) -> None:
    odd = images[0].with_name("\udcff.png")
    images[0].rename(odd)
    write_answers(load_classifier(run), open_inputs([str(odd)]), Selection(), str(tmp_path / "found.json"))
    (entry,) = json.loads((tmp_path / "found.json").read_text("utf-8"))["images"]
    assert entry["name"] == str(odd)


def test_nothing_is_left_of_a_file_that_could_not_be_finished(run: Path, images: list[Path], tmp_path: Path) -> None:
    classifier = load_classifier(run)
    torch.nn.init.constant_(classifier.model.get_parameter("head.bias"), float("nan"))
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError):
        write_answers(classifier, open_inputs([str(images[0])]), Selection(), str(tmp_path / "out/found.json"))
    assert list((tmp_path / "out").iterdir()) == []


def test_inputs_are_files_folders_patterns_and_lists_each_image_once(
    images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("some.txt").write_text("images/red/2.png\nimages/blue/0.png\n")
    arguments = ["images/red/1.png", "images/**/2.png", "images/green", "some.txt", "images/red/1.png"]
    sources = open_inputs(expand_inputs(arguments))
    names = [source.name(index) for source in sources for index in range(len(source))]
    wanted = ["red/1", "blue/2", "green/2", "red/2", "green/0", "green/1", "blue/0"]
    assert [str(Path(name).absolute()) for name in names] == [str(tmp_path / f"images/{name}.png") for name in wanted]
    with pytest.raises(UserError, match=r"INPUT: none/\*\.jpg: no such file or folder"):
        expand_inputs(["none/*.jpg"])


def test_an_input_is_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("list.csv").write_text("path\na.png\n")
    with pytest.raises(UserError, match=r"list\.csv is an input"):
        check_output("list.csv", expand_inputs([str(tmp_path / "*.csv")]), force=True)
