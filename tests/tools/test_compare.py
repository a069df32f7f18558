"""The comparison shows what the logs say: last and best numbers, every run's curve, and only settings that differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from crossmae.reports.figures import MOST_CURVES
from crossmae.reports.page import Plot, Table
from tests.tools.command_line import exit_code
from tools import compare


def write_run(folder: Path, settings: dict[str, Any], rows: list[dict[str, float]]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """A detector, another one that was cut off, and a pretraining."""
    settings = {"SOLVER": {"BASE_LR": 0.1, "STEPS": [1, 2]}, "SEED": 0}
    first = [{"step": step, "loss": 4.0 / step, "bbox/AP": ap} for step, ap in ((1, 10.0), (2, 30.25), (4, 20.0))]
    second = [{"step": 1, "loss": 9.0}]
    pretraining = [
        {"step": step, "loss": 1.0, "val_loss": loss, "knn_accuracy": 0.5} for step, loss in ((0, 2), (8, 1))
    ]
    cut_off = write_run(tmp_path / "b/detect", settings | {"OUTPUT_DIR": "b", "SEED": 1}, second)
    with (cut_off / "log.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    return [
        write_run(tmp_path / "a/detect", settings | {"OUTPUT_DIR": "a"}, first),
        cut_off,
        write_run(tmp_path / "a/pretrain", {"output_dir": "p", "optim": {"lr": 1}}, pretraining),
    ]


def cells(runs: list[Path]) -> dict[str, list[str]]:
    (table,) = compare.number_section(compare.read_runs(runs)).blocks
    assert isinstance(table, Table)
    return {str(row[0]): [str(cell) for cell in row[1:]] for row in table.rows}


def test_numbers_are_the_last_and_the_best_of_the_logs(runs: list[Path]) -> None:
    found = cells(runs)
    assert found["steps"] == ["4", "1", "8"]
    assert found["Training loss"] == ["1.0000", "9.0000", "1.0000"]
    assert found["Box AP (%)"] == ["20.0", "-", "-"]
    assert found["Box AP (%), best"] == ["30.2", "-", "-"]
    assert found["Held-out loss, best"] == ["-", "-", "1.0000"]
    assert found["Nearest neighbours (%)"] == ["-", "-", "50.0"]
    assert "Mask AP (%)" not in found


def test_names_tell_the_runs_apart(runs: list[Path]) -> None:
    assert compare.short_names(runs) == ["a/detect", "b/detect", "a/pretrain"]
    assert compare.short_names(runs[1:]) == ["detect", "pretrain"]


def test_every_run_has_its_curve(runs: list[Path]) -> None:
    plots = {
        plot.title: plot for plot in compare.curve_section(compare.read_runs(runs)).blocks if isinstance(plot, Plot)
    }
    assert list(plots) == ["Training loss", "Held-out loss", "Nearest neighbours (%)", "Box AP (%)"]
    assert all(name in plots["Training loss"].svg for name in ("a/detect", "b/detect", "a/pretrain"))


def test_only_settings_that_differ_are_shown(runs: list[Path]) -> None:
    section = compare.settings_section(compare.read_runs(runs))
    (table,) = section.blocks
    assert isinstance(table, Table)
    assert [list(row) for row in table.rows] == [["SEED", "0", "1", ""]]
    same = compare.settings_section(compare.read_runs([runs[0], runs[0]][:1]))
    assert same.text == "All common settings are the same."


def test_a_folder_of_runs_stands_for_its_trainings(runs: list[Path], tmp_path: Path) -> None:
    assert compare.find_runs([tmp_path / "a", tmp_path / "b/detect"]) == [runs[0], runs[2], runs[1]]
    assert exit_code(compare.main, str(tmp_path / "a"), "--output", str(tmp_path / "new/page.html")) == 0
    assert "2 runs compared" in (tmp_path / "new/page.html").read_text()


def test_bad_input_is_one_line(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    many = [write_run(tmp_path / f"many/{number}", {}, [{"step": 1}]) for number in range(MOST_CURVES + 1)]
    nothing = write_run(tmp_path / "nothing", {}, [])
    for words, message in (
        ([tmp_path / "empty"], f"error: {tmp_path / 'empty'}: there is no log.jsonl in it."),
        ([runs[0], runs[0]], f"error: {runs[0]}: is the only run. Name two or more."),
        (many, f"error: RUN: {len(many)} runs are too many"),
        ([runs[0], nothing], f"error: {nothing / 'log.jsonl'}: has no step yet."),
    ):
        assert exit_code(compare.main, *map(str, words), "--output", str(tmp_path / "page.html")) == 2
        assert capsys.readouterr().err.startswith(message)
    assert not (tmp_path / "page.html").exists()
