"""Proves the command of the study: its plan counts only rows of this folder, and a trial leaves the kept rows alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from crossmae.errors import PROGRAMS
from crossmae.experiments.cells import step_fingerprints
from crossmae.experiments.rows import append_row
from crossmae.experiments.study.grid import KEPT_ROWS, link_packages, study_cells
from tests.crossmae.experiments.study.made_rows import make_row
from tools import study


def plan(output: Path, capsys: pytest.CaptureFixture[str]) -> str:
    study.main(["--plan", "--only", "detection", "--output", str(output)])
    return capsys.readouterr().out.splitlines()[-1]


def test_the_plan_counts_only_cells_that_would_not_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "packages").mkdir()
    link_packages(tmp_path, [tmp_path / "packages"])
    cells = study_cells(tmp_path, ["detection"], packages=[tmp_path / "sources" / "packages-0"])
    assert f"{len(cells)} missing" in plan(tmp_path, capsys)
    results, data = tmp_path / "results.jsonl", cells[0]
    row = replace(make_row(data.facts, {}), cell=data.name, fingerprint="of an earlier version")
    append_row(results, row)
    assert f"{len(cells)} missing" in plan(tmp_path, capsys)
    append_row(results, replace(row, fingerprint=step_fingerprints(cells, results)[data.name][-1]))
    assert f"{len(cells) - 1} missing" in plan(tmp_path, capsys)


def test_a_trial_in_another_folder_leaves_the_kept_rows_and_the_document(tmp_path: Path) -> None:
    files = (KEPT_ROWS, PROGRAMS / "docs" / "results.md")
    before = [path.read_bytes() for path in files]
    row = replace(make_row({"part": "decoder", "kind": "decoder"}, {}), finished="2999-01-01")
    append_row(tmp_path / "results.jsonl", row)
    study.main(["--page", "--output", str(tmp_path)])
    assert [path.read_bytes() for path in files] == before
    assert (tmp_path / "study.jsonl").read_bytes() == (tmp_path / "results.jsonl").read_bytes()
    assert (tmp_path / "report.html").exists()
