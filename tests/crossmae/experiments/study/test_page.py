"""Proves the page and the document of the study: verdicts and every number, also of a part of the rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from crossmae.errors import PROGRAMS, UserError
from crossmae.experiments.rows import read_rows
from crossmae.experiments.study.arms import FASHION_ARMS
from crossmae.experiments.study.grid import KEPT_ROWS
from crossmae.experiments.study.page import write_study_page
from crossmae.experiments.study.predictions import TOP1, values_of
from crossmae.experiments.study.results_text import BEGIN, END, results_text, update_document
from crossmae.experiments.study.tables import (
    detection_differences,
    detection_table,
    fashion_differences,
    fashion_table,
    single_runs,
)
from tests.crossmae.experiments.study.made_rows import make_row, make_rows


def test_the_page_has_verdicts_arms_and_commands(tmp_path: Path) -> None:
    rows = make_rows(top1={"cross25_d6": 70.0})
    write_study_page(rows, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text("utf-8")
    assert all(arm.name in text for arm in FASHION_ARMS)
    assert all(row.commands[0] in text for row in rows)
    assert text.index("refuted") < text.index("confirmed")
    assert "fine-tuned top-1 over compute" in text


@pytest.mark.parametrize("count", [0, 1, 2, 5, 40])
def test_a_part_of_the_rows_makes_a_page(tmp_path: Path, count: int) -> None:
    rows = make_rows()[:count]
    write_study_page(rows, tmp_path / "report.html")
    assert results_text(rows)


def test_tables_have_the_values_of_the_rows() -> None:
    rows = make_rows()
    values = values_of(rows, TOP1, "cross25_d4")
    table = {row[0]: row[1:] for row in single_runs(rows, TOP1, ["cross25_d4"], [None]).rows}
    assert table["`cross25_d4`"] == [f"{values[seed]:.2f}" for seed in (0, 1, 2)]
    cells = next(row for row in fashion_table(rows).rows if row[0].startswith("`cross25_d4`"))
    assert cells[-1 - 2].startswith(f"{sum(values.values()) / 3:.1f} (")


def test_all_differences_in_the_tables_are_counted() -> None:
    rows = make_rows()
    shown = [row for table in (fashion_differences(rows), detection_differences(rows)) for row in table.rows]
    assert f"makes {len(shown)} comparisons" in results_text(rows)
    predicted = sorted(row[0] for row in shown if row[0] != "none")
    assert predicted == ["ii", "iii", "iii", "iv-a", "iv-b", "v"]


def test_the_preset_has_one_seed_and_a_place_on_the_page(tmp_path: Path) -> None:
    facts = {"part": "gpu15", "kind": "detect", "arm": "mae", "share": 10.0, "seed": 0}
    rows = [make_row(facts, {"mask_AP": 12.34, "box_AP": 23.45})]
    assert detection_table(rows, "gpu15").rows[0][-2:] == ["12.3", "23.4"]
    write_study_page(rows, tmp_path / "report.html")
    assert "12.3" in (tmp_path / "report.html").read_text("utf-8")


def test_unwelcome_results_come_first_in_the_document() -> None:
    lines = [line for line in results_text(make_rows(top1={"cross25_d6": 70.0})).splitlines() if line.startswith("| ")]
    assert lines[2].startswith("| refuted | ii ")


def test_the_document_is_updated_between_its_markers(tmp_path: Path) -> None:
    path = tmp_path / "results.md"
    path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    update_document(path, make_rows())
    update_document(path, make_rows())
    text = path.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    path.write_text("nothing")
    with pytest.raises(UserError, match="markers"):
        update_document(path, [])


def test_the_repository_shows_the_rows_that_it_keeps() -> None:
    text = (PROGRAMS / "docs" / "results.md").read_text("utf-8")
    assert results_text(read_rows(KEPT_ROWS)) in text
