"""`crossmae run` refuses wrong arguments before anything is written, and goes from labels of two formats to an AP."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools.command_line import exit_code
from tests.tools.labelled_squares import DETECT_SET, LABELS, run_words, write_squares
from tools import run

DETECT = ("IMAGES", "--labels", "labels.json", "--detect-set")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_squares(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["absent"], "error: IMAGES: absent does not exist."),
        (["IMAGES", "--labels", "absent.json"], "error: --labels: absent.json does not exist."),
        (["IMAGES", "--labels", "labels.json", "--budget", "half an hour"], "error: --budget: 'half an hour' is no"),
        (["IMAGES", "--labels", "labels.json", "--val", "1.5"], "error: --val: 1.5 is out of range."),
        (["IMAGES", "--labels", "labels.json", "--size", "0"], "error: --size: 0 is out of range."),
        (["IMAGES", "--compare"], "error: --compare: only a detector uses it. Add --labels."),
        (["labels.json", "--labels", "labels.json"], "error: IMAGES: labels.json is no folder."),
        (["IMAGES", "--pretrain-set", "optim.lrr=1"], "error: --pretrain-set: unknown key 'optim.lrr' (did you mean"),
        (["IMAGES", "--pretrain-set", "optim.lr=x"], "error: --pretrain-set: optim.lr: "),
        ([*DETECT, "SOLVER.LR=0.1"], "error: --detect-set: unknown key SOLVER.LR. Did you mean SOLVER."),
        ([*DETECT, "SOLVER.BASE_LR=-1"], "error: --detect-set: SOLVER.BASE_LR"),
        ([*DETECT, "SOLVER.EPOCHS=2"], "error: --detect-set: SOLVER.MAX_ITER and SOLVER.EPOCHS contradict"),
        ([*DETECT, "SOLVER.BASE_LR"], "error: --detect-set: SOLVER.BASE_LR has no value."),
    ],
)
def test_wrong_arguments_are_one_line_and_write_nothing(
    data: Path, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(data)
    before = sorted(data.rglob("*"))
    assert exit_code(run.main, *words) == 2
    assert capsys.readouterr().err.startswith(message)
    assert sorted(data.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("labels", LABELS)
def test_from_labels_to_an_ap_and_again(data: Path, labels: str) -> None:
    command = [sys.executable, str(ROOT / "tools/run.py"), *run_words(labels)]
    first = subprocess.run(command, cwd=data, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    results = json.loads((data / "out/detect-own/results.json").read_text())
    assert results["bbox"]["AP50"] is not None
    page = (data / "out/report.html").read_text()
    assert f"{results['bbox']['AP']:.1f}" in page
    assert "features " in first.stdout
    (data / "out/report.html").unlink()  # as if the command had been stopped before
    again = subprocess.run(command, cwd=data, capture_output=True, text=True, check=True)
    assert again.stdout.count(": reused, took ") == 3
    assert (data / "out/report.html").is_file()


def test_paths_have_no_detours_and_stay_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "clone").mkdir()
    (tmp_path / "far/inner").mkdir(parents=True)
    (tmp_path / "images").mkdir()
    (tmp_path / "clone/link").symlink_to(tmp_path / "far/inner")
    monkeypatch.chdir(tmp_path / "clone")
    assert run.plain_path(Path("../images")) == tmp_path / "images"
    assert run.plain_path(Path("link")) == tmp_path / "clone/link"
    assert run.plain_path(Path("link/../x")) == (tmp_path / "far/x").resolve()


def test_settings_that_fit_are_no_error_and_import_no_detector_without_need(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data)
    requests = []
    monkeypatch.setattr("crossmae.experiments.pipeline.pipeline.run_pipeline", lambda one, **_: requests.append(one))
    run.main([*run_words("labels.json"), "--dry-run"])
    assert requests.pop().detect_settings == DETECT_SET
    monkeypatch.setitem(sys.modules, "det.config", None)  # importing it is an error
    run.main(["IMAGES", "--labels", "labels.json", "--pretrain-set", "optim.lr=1e-3", "--dry-run"])
    assert requests.pop().pretrain_settings == ("optim.lr=1e-3",)
