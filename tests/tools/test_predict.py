"""Proves what the command line of prediction writes, refuses and returns."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

from crossmae.errors import SOME_FAILED_EXIT_CODE, USER_ERROR_EXIT_CODE
from det.inference.predict import Classes, Predictor, coco_annotations
from tests.det.detectors import write_run
from tests.tools.command_line import exit_code
from tools.predict import main


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a run, and two photographs in a folder."""
    monkeypatch.chdir(tmp_path)
    write_run(Path("run"))
    Path("photos").mkdir()
    for seed, name in enumerate(("a.png", "b.jpg")):
        pixels = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(Path("photos", name))
    return tmp_path


def test_the_file_says_what_the_predictor_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("names.txt").write_text("red\ngreen\nblue")
    words = ("--weights", "run", "photos", "--score-threshold", "0.01", "--classes", "names.txt")
    assert exit_code(main, *words, "TEST.DETECTIONS_PER_IMAGE=4") == 0
    content = json.loads((folder / "outputs/predictions/predictions.json").read_text())
    predictor = Predictor(None, "run")
    classes = Classes(("red", "green", "blue"), (1, 2, 3))
    expected = []
    for number, name in enumerate(("a.png", "b.jpg"), start=1):
        (raw,) = predictor.predict_raw([Path("photos", name)])
        expected += coco_annotations(raw[:4], number, 48, 64, classes)
    for found, wanted in zip(content["annotations"], expected, strict=True):
        assert found["bbox"] == pytest.approx(wanted["bbox"], abs=0.01)
        assert found["score"] == pytest.approx(wanted["score"], abs=1e-4)
        assert (found["image_id"], found["category_id"]) == (wanted["image_id"], wanted["category_id"])
    assert [category["name"] for category in content["categories"]] == ["red", "green", "blue"]
    assert content["info"] == {
        "image_folder": str(folder / "photos"),
        "weights": "run/model_final.pth",
        "score_threshold": 0.01,
    }
    assert "8 objects in 2 images: outputs/predictions/predictions.json" in capsys.readouterr().out
    assert {path.name for path in Path("outputs/predictions").iterdir()} == {"a.png", "b.png", "predictions.json"}


def test_few_objects_name_the_threshold_and_the_highest_score(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--weights", "run", "photos", "--no-pictures", "--force", "--output", "out")
    assert exit_code(main, *words, "--score-threshold", "0.99") == 0
    out = capsys.readouterr().out
    predictor = Predictor(None, "run")
    (highest,) = {max(float(predictor(path).scores.max()) for path in Path("photos").iterdir())}
    assert "0 objects in 2 images: out/predictions.json\n" in out
    (lower,) = re.findall(rf"nothing above 0.99: the best score in 2 files is {highest:.2g}. To see more: (.*)", out)
    assert exit_code(main, *words, *lower.split()) == 0
    assert not capsys.readouterr().out.startswith("0 objects")
    assert exit_code(main, *words, "--score-threshold", f"{highest * 0.9}") == 0
    assert "few objects" not in capsys.readouterr().out
    assert len(predictor(Path("photos/a.png"))) > 0
    before = [found.scores.tolist() for found in predictor.predict(sorted(Path("photos").iterdir()))]
    predictor.highest_score(sorted(Path("photos").iterdir()))
    assert [found.scores.tolist() for found in predictor.predict(sorted(Path("photos").iterdir()))] == before


def test_options_leave_out_masks_and_pictures(folder: Path) -> None:
    words = ("--weights", "run", "photos/*.png", "--no-masks", "--no-pictures", "--output", "out")
    assert exit_code(main, *words, "--score-threshold", "0.01") == 0
    content = json.loads(Path("out/predictions.json").read_text())
    assert len(content["annotations"]) == 5
    assert not any("segmentation" in annotation for annotation in content["annotations"])
    assert [path.name for path in Path("out").iterdir()] == ["predictions.json"]
    assert exit_code(main, *words, "--score-threshold", "0.99") == USER_ERROR_EXIT_CODE  # it would be overwritten
    assert exit_code(main, *words, "--score-threshold", "0.99", "--force") == 0
    assert json.loads(Path("out/predictions.json").read_text())["annotations"] == []


def test_files_that_can_not_be_read_are_named_at_the_end(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("photos/broken.jpg").write_text("no image")
    assert exit_code(main, "--weights", "run", "photos", "--output", "out") == SOME_FAILED_EXIT_CODE
    assert len(json.loads(Path("out/predictions.json").read_text())["images"]) == 2
    *_, heading, line = capsys.readouterr().err.splitlines()
    assert heading == "error: of 3 files, these could not be read or written:"
    assert line.startswith(f"{folder}/photos/broken.jpg: cannot be read as an image")


def test_a_word_that_is_a_file_is_an_input(folder: Path) -> None:
    Path("photos/a.png").rename("IMG=1.png")
    words = ("--weights", "run", "IMG=1.png", "--output", "out", "--no-pictures")
    assert exit_code(main, *words, "MODEL.DEVICE=cpu") == 0
    (image,) = json.loads(Path("out/predictions.json").read_text())["images"]
    assert image["file_name"] == "IMG=1.png"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["photos", "--score-threshold", "1.5"], "--score-threshold 1.5 is no threshold"),
        (["photos", "--batch-size", "0"], "--batch-size 0 is too small"),
        (["MODEL.DEVICE=cpu"], "nothing to predict"),
        (["nowhere.jpg"], "nowhere.jpg: no such file or folder"),
        (["photos", "--output", "photos/out"], "--output: photos/out is in photos"),
        (["photos", "--weights", "none"], "none: no such file or folder"),
        (["photos", "MODEL.DEVISE=cpu"], "unknown key MODEL.DEVISE. Did you mean MODEL.DEVICE?"),
        (["photos", "--classes", "none.txt"], "none.txt: cannot be read: No such file"),
        (["photos/**/*.jpg", "--output", "photos/out"], "--output: photos/out is in photos/**/*.jpg"),
        (["photos", "--output", "photos/a.png"], "--output: photos/a.png is in photos"),
        (
            ["photos", "--output", "run/config.yaml"],
            "run/config.yaml/predictions.json cannot be written: Not a directory",
        ),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    before = sorted(folder.rglob("*"))
    assert exit_code(main, "--weights", "run", "--output", "out", *words) == USER_ERROR_EXIT_CODE
    (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert message in error
    assert sorted(folder.rglob("*")) == before
