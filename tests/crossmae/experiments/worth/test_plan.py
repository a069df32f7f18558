"""The plan: arms and settings are checked, costs are split, and a small grid ends in a page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from crossmae.errors import UserError
from crossmae.experiments.cells import Cell, step_fingerprints
from crossmae.experiments.rows import Row, append_row
from crossmae.experiments.worth import plan
from crossmae.experiments.worth.grid import ARMS, build_cells, choose_budget, timing_cells
from tests.crossmae.experiments.worth.test_inputs import write_labels
from tests.crossmae.experiments.worth.tiny_question import ask, tiny_preset


def test_arms_by_default():
    usual = ("random_pretraining_init", "own", "random_same_rates", "random_detector_init")
    assert plan.choose_arms(None, False, False) == usual
    assert plan.choose_arms(None, True, True) == ARMS
    assert plan.choose_arms(["own", "random_detector_init"], False, False) == ("own", "random_detector_init")


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        (["weights"], "weights needs weights"),
        (["other"], "--arms: other is unknown"),
        (["random_equal_compute"], "takes as long as own, which is not among the arms. Add own"),
    ],
)
def test_bad_arms(arms: list[str], message: str):
    with pytest.raises(UserError, match=message):
        plan.choose_arms(arms, False, False)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("x", "--fine-tune-set: x is no setting"),
        ("SOLVER.MAX_ITER=3", "is decided by the plan. Use --steps"),
        ("schedule.epochs=3", "is decided by the plan. Use --steps"),  # epochs differ between the shares
    ],
)
def test_bad_settings(word: str, message: str):
    plan.check_settings("--fine-tune-set", ["SOLVER.BASE_LR=1"])
    plan.check_settings("--pretrain-set", ["schedule.epochs=3"])
    with pytest.raises(UserError, match=message):
        plan.check_settings("--fine-tune-set", [word])


def test_a_timing_run_has_a_start_and_steps():
    cost = {"wall_seconds": 40.0, "cpu_seconds": 60.0}
    row = Row("detect", {"kind": "detect"}, {"steps": 10, "step_seconds": 3.0}, cost)
    assert plan.seconds_of_kind(row) == pytest.approx((15.0, 4.5))


def test_the_detector_has_the_sizes_of_pretraining():
    usual = plan.PRESETS["demo"].encoder()
    smaller = plan.PRESETS["demo"].encoder(["model.depth=4"])
    plan.check_sizes(usual, usual, [])
    plan.check_sizes(usual, smaller, ["MODEL.VIT.DEPTH=4"])
    with pytest.raises(UserError, match=r"other sizes\. Add --fine-tune-set MODEL\.VIT\.DEPTH=4\."):
        plan.check_sizes(usual, smaller, [])


def test_equal_compute_is_equal_cpu_time_or_equal_time_on_a_gpu():
    pretrain = Row("a", {"kind": "pretrain"}, {"steps": 10, "step_seconds": 2.0}, wall_and_cpu(wall=24, cpu=48))
    detect = Row("b", {"kind": "detect"}, {"steps": 10, "step_seconds": 4.0}, wall_and_cpu(wall=50, cpu=25))
    assert plan.steps_of_pretraining([detect, pretrain], 100, on_gpu=False) == (8 + 4 * 100) / 2
    assert plan.steps_of_pretraining([detect, pretrain], 100, on_gpu=True) == (4 + 2 * 100) / 4


def wall_and_cpu(wall: float, cpu: float) -> dict[str, float | None]:
    return {"wall_seconds": wall, "cpu_seconds": cpu}


def test_runs_with_other_options_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    question = ask(tmp_path / "out", tmp_path / "train", write_labels(tmp_path), tiny_preset(tmp_path / "c"), ("own",))
    append_row(tmp_path / "out" / plan.RESULTS, Row("pretrain-own-seed0", {}, {}, {}, fingerprint="of other options"))
    budget = choose_budget(question, 3)
    plan.write_answer(question, plan.Plan(build_cells(question, budget), budget, load=1.0), {})
    assert "other options or another version are not on the page: pretrain-own-seed0" in caplog.text


def test_a_page_of_other_options_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Other numbers of steps need the same pretraining and the same timing runs, but have no scores."""
    question = ask(tmp_path / "out", tmp_path / "train", write_labels(tmp_path), tiny_preset(tmp_path / "c"), ("own",))
    results, page = tmp_path / "out" / plan.RESULTS, tmp_path / "out" / plan.PAGE
    cells = build_cells(question, choose_budget(question, 10))
    for cell in cells:
        append_row(results, row_of(cell, results, cells))
    timed = timing_cells(question, choose_budget(question, 10))
    (tmp_path / "out/timing").mkdir()
    for cell in timed:
        append_row(tmp_path / "out/timing" / plan.RESULTS, row_of(cell, tmp_path / "out/timing" / plan.RESULTS, timed))
    made = plan.make_plan(question, 10, [], runs=False)
    plan.write_answer(question, made, {})
    before = page.read_bytes()
    with pytest.raises(UserError, match=r"--page: .*out has no results of this command\. Give the options"):
        plan.make_plan(question, 20, [], runs=False)
    monkeypatch.setattr(plan, "run_cells", lambda *_, **__: None)  # a run with other options that is stopped at once
    other = plan.Plan(build_cells(question, choose_budget(question, 20)), choose_budget(question, 20), load=1.0)
    assert "no answer yet" in plan.answer(question, other, jobs=1, gpus=[], minutes=None, settings={})
    assert page.read_bytes() == before


def row_of(cell: Cell, results: Path, cells: list[Cell]) -> Row:
    """Make the row of a finished cell."""
    fingerprint = step_fingerprints(cells, results)[cell.name][-1]
    numbers = {"mask_AP": 30.0, "steps": 10.0, "step_seconds": 0.5}
    return Row(cell.name, cell.facts, numbers, wall_and_cpu(wall=9, cpu=9), fingerprint=fingerprint)


def test_failed_runs_are_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    question = ask(tmp_path / "out", tmp_path / "train", write_labels(tmp_path), tiny_preset(tmp_path / "c"), ("own",))
    made = plan.Plan(build_cells(question, choose_budget(question, 3)), choose_budget(question, 3), load=1.0)

    def fail(*_: object, **__: object) -> None:
        raise plan.FailedCells("1 of 3 cells failed", [], {"pretrain-own-seed0": "exit code 7"})

    monkeypatch.setattr(plan, "run_cells", fail)
    with pytest.raises(UserError, match="1 of 3 cells failed"):
        plan.answer(question, made, jobs=1, gpus=[], minutes=None, settings={})
    page = (tmp_path / "out" / plan.PAGE).read_text()
    assert "pretrain-own-seed0" in page
    assert "exit code 7" in page


@pytest.mark.usefixtures("in_process")
def test_plan_and_page_of_a_grid_of_two_cells(tmp_path: Path):
    """Real tools: pretraining, and a detector that starts from it."""
    pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")
    from tests.det.coco_files import TINY

    labels = write_labels(tmp_path, 24)
    preset = tiny_preset(tmp_path / "configs", TINY)
    question = ask(tmp_path / "out", tmp_path / "train", labels, preset, ("own",), shares=(100.0,))
    budget = choose_budget(question, None)
    cells = [replace(cell, estimate=60.0) for cell in build_cells(question, budget)]
    two = plan.Plan(cells, budget, load=3.0)
    text = plan.describe_plan(question, two, 2, [])
    assert f"{'pretrain':<10} {1:>5} {0:>5} {1.0:>17.1f} {1.0:>12.1f}" in text
    assert "All runs: 0.03 CPU hours, of which 0.03 are left: about 3 min 00 s, with 2 at once" in text
    limits = {"jobs": 1, "gpus": [], "minutes": None}
    verdict = plan.answer(question, two, settings={"Size": "tiny"}, **limits)
    page = (tmp_path / "out" / plan.PAGE).read_text()
    assert "is pretraining worth it?" in page.lower()
    assert "held out" in page
    assert verdict
    assert f"{'detect':<10} {1:>5} {1:>5}" in plan.describe_plan(question, two, 2, [])
    run = tmp_path / "out/runs/detect-own-share100-seed0"
    assert not list(run.glob("model_*.safetensors"))
    (row,) = [row for row in plan.finished_rows(cells, tmp_path / "out/results.jsonl").values() if row.cell == run.name]
    assert {"mask_AP", "box_AP"} <= row.numbers.keys()
