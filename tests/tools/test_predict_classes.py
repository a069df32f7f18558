"""Proves what the command line of classification writes, refuses and returns."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from crossmae.classification.classifier import load_classifier
from crossmae.classification.predict import predict_images
from crossmae.errors import SOME_FAILED_EXIT_CODE, USER_ERROR_EXIT_CODE
from tests.crossmae.classification.classifiers import write_classifier
from tests.crossmae.classification.labelled import CLASSES, write_classes
from tests.tools.command_line import exit_code
from tools.predict_classes import main


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: two runs, and six images in a folder."""
    monkeypatch.chdir(tmp_path)
    write_classifier(Path("run"), CLASSES)
    write_classifier(Path("several"), CLASSES, multi_label=True)
    write_classes(Path("photos"), per_class=2)
    return tmp_path


def test_without_output_the_terminal_gets_json_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(main, "--weights", "run", "photos/red", "--img-size", "16x24", "--device", "cpu") == 0
    content = json.loads(capsys.readouterr().out)
    answers = predict_images(load_classifier("run"), ["photos/red/0.png", "photos/red/1.png"])
    assert [entry["name"] for entry in content["images"]] == [answer.name for answer in answers]
    for entry, answer in zip(content["images"], answers, strict=True):
        assert [one["class"] for one in entry["classes"]] == [CLASSES[at] for at in answer.classes]


def test_img_size_and_top_k_are_used(folder: Path) -> None:
    words = ("--weights", "run", "photos", "--output", "out/found.csv")
    assert exit_code(main, *words, "--top-k", "1") == 0
    before = Path("out/found.csv").read_text()
    assert before.startswith("name,top1,score1\n")
    assert exit_code(main, *words, "--top-k", "1") == USER_ERROR_EXIT_CODE  # it would be overwritten
    assert Path("out/found.csv").read_text() == before
    assert exit_code(main, *words, "--img-size", "32", "--force") == 0
    header, *rows = csv.reader(Path("out/found.csv").read_text().splitlines())
    assert header == ["name", "top1", "score1", "top2", "score2", "top3", "score3"]  # there are three classes
    wanted = predict_images(load_classifier("run", 32), [row[0] for row in rows])
    for row, answer in zip(rows, wanted, strict=True):
        assert float(row[2]) == pytest.approx(answer.probabilities[0], abs=1e-5)


def test_images_that_can_not_be_read_are_named_at_the_end(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("photos/broken.jpg").write_text("no image")
    assert exit_code(main, "--weights", "run", "photos", "--output", "found.json") == SOME_FAILED_EXIT_CODE
    content = json.loads(Path("found.json").read_text())
    assert len(content["images"]) == 6
    captured = capsys.readouterr()
    assert captured.out == "classes of 6 images: found.json\n"
    *_, heading, line = captured.err.splitlines()
    assert heading == "error: of 7 images, these could not be read:"
    assert content["unreadable"] == [line]
    assert line.startswith("photos/broken.jpg: cannot be read as an image")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["photos", "--top-k", "0"], "--top-k 0: too small. Give a number from 1"),
        (["photos", "--batch-size", "0"], "--batch-size 0: too small"),
        (["photos", "--threshold", "2"], "--threshold 2.0: no probability. Give a number from 0 to 1"),
        (["photos", "--threshold", "0.2"], "--threshold: this classifier finds one class per image"),
        (["photos", "--weights", "several", "--top-k", "2"], "--top-k: this classifier can find several classes"),
        (["photos", "--img-size", "10 px"], "--img-size 10 px: expected pixels, such as 224, or 192x256"),
        (["photos", "--img-size", "20"], "20"),
        (["photos", "--device", "cuda:99"], "--device: 'cuda:99' cannot be used"),
        (["photos", "--weights", "none"], "none"),
        (["nowhere.jpg"], "INPUT: nowhere.jpg: no such file or folder"),
        (["photos", "--output", "found.txt"], "--output found.txt: unknown format. Name a file"),
        (["photos", "--output", "folder.csv"], "folder.csv: is a folder"),
        (["photos", "--output", "photos/red/0.png/found.csv"], "--output: cannot write in photos/red/0.png"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    Path("folder.csv").mkdir()
    before = sorted(folder.rglob("*"))
    assert exit_code(main, "--weights", "run", "--output", "found.json", *words) == USER_ERROR_EXIT_CODE
    (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert message in error
    assert sorted(folder.rglob("*")) == before
