"""tools/worth.py refuses bad input before anything runs, plans, runs a small grid, and writes the page."""

from __future__ import annotations

from pathlib import Path

import pytest

from crossmae.experiments.rows import read_rows
from crossmae.experiments.worth import plan
from crossmae.files.claim import claim
from tests.crossmae.experiments.worth.test_inputs import write_labels
from tests.tools.command_line import exit_code
from tools.worth import build_parser, main


@pytest.fixture(autouse=True)
def _nothing_runs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if a run starts in a test of bad input."""
    if "slow" not in request.keywords:
        monkeypatch.setattr(plan, "run_cells", lambda *_, **__: pytest.fail("a run started"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shares", "0,50"], "--shares: 0 is not a percentage"),
        (["--shares", "50,50"], "--shares: a number is there twice"),
        (["--seeds", "1,1"], "--seeds: a number is there twice"),
        (["--seeds=-1,0"], "--seeds: -1 to 0. Give numbers from 0"),
        (["--seeds", "0;1"], "'0;1' is no list of whole numbers. Write for example 0,1"),
        (["--val-images", "."], "--val-images: there are no --val-labels"),
        (
            ["--page", "--pretrain-set", "optim.batch_size=8"],
            "out has no results of this command. Give the options of the runs",
        ),
        (["--steps", "0"], "--steps: 0 is not positive"),
        (["--arms", "own,mine"], "--arms: mine is unknown"),
        (["--arms", "continued"], "continued needs weights"),
        (["--weights", "nowhere.pth"], "nowhere.pth"),
        (["--pretrain-set", "schedule.epoch=3"], "schedule.epoch"),
        (["--pretrain-set", "runtime.seed=3"], "is decided by the plan. Use --seeds"),
        (["--fine-tune-set", "SEED"], "SEED is no setting"),
        (["--pretrain-set", "optim.batch_size=41"], "40 images do not fill a step of 41"),
        (["--gpus", "99"], "there is no GPU 99"),
        (["--label-images", "nowhere"], "40 of 40 images are not in"),
    ],
)
def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str):
    labels = write_labels(tmp_path)
    given = [str(tmp_path / "train"), str(labels.labels), "--output", str(tmp_path / "out"), *words]
    assert exit_code(main, *given) == 2
    assert message in capsys.readouterr().err


def test_a_folder_of_another_kind_is_left_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    labels, lap = write_labels(tmp_path), tmp_path / "lap"
    with claim(lap, "pretraining"):
        pass
    before = sorted(lap.iterdir())
    for words in ([], ["--plan"], ["--page"]):
        assert exit_code(main, str(tmp_path / "train"), str(labels.labels), "--output", str(lap), *words) == 2
        assert f"--output: {lap} is the folder of a pretraining run, not of comparison" in capsys.readouterr().err
        assert sorted(lap.iterdir()) == before


def test_help_has_the_default_arms_and_an_example_of_settings():
    text = build_parser().format_help()
    assert ",".join(plan.choose_arms(None, False, False)) in "".join(text.split())
    assert "--plan --fine-tune-set " in text


@pytest.mark.slow
def test_small_grid_on_the_demo_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")
    from tools.make_demo_data import main as make_demo_data

    make_demo_data(["--output", str(tmp_path / "data"), "--train", "64", "--val", "16"])
    annotations = tmp_path / "data/annotations"
    given = [
        str(tmp_path / "data/pretrain"),
        str(annotations / "train.json"),
        *("--val-labels", str(annotations / "val.json"), "--output", str(tmp_path / "out")),
        *("--size", "demo", "--shares", "50,100", "--seeds", "0,1", "--steps", "6", "--equal-compute"),
        *("--pretrain-set", "schedule.epochs=2", "optim.batch_size=16"),
    ]
    assert exit_code(main, *given, "--plan") == 0
    out = capsys.readouterr().out
    assert "CPU hours" in out
    assert "--seeds 0 (no intervals)" in out
    assert not (tmp_path / "out" / plan.RESULTS).exists()
    assert exit_code(main, *given) == 0
    rows = read_rows(tmp_path / "out" / plan.RESULTS)
    assert len(rows) == 2 * 2 + 2 * 2 * 4
    scored = [row for row in rows if row.facts["kind"] == "detect"]
    assert all({"mask_AP", "box_AP"} <= row.numbers.keys() for row in scored)
    assert all((row.cost["cpu_seconds"] or 0) > 1 for row in rows)
    page = (tmp_path / "out" / plan.PAGE).read_text()
    assert "CrossMAE on your images" in page
    assert exit_code(main, *given, "--page") == 0  # nothing runs again
    assert len(read_rows(tmp_path / "out" / plan.RESULTS)) == len(rows)
