"""The parts that pages share rank classes, compare settings and show commands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from crossmae.reports.page import Gallery, Missing, PictureRow, Section, Table
from crossmae.reports.sections import MOST_CLASSES, changed_settings, class_tables, collapse, gallery

CAPTIONS = ["All.", "First.", "Second."]


@pytest.mark.parametrize("worst_first", [True, False])
def test_of_many_classes_the_best_and_the_worst_are_shown(worst_first: bool) -> None:
    scores = np.random.default_rng(0).permutation(90).tolist()
    classes = [(score, [str(score)]) for score in scores] + [(None, ["none"])] * 10
    first, second = (
        block
        for block in class_tables(classes, ["class"], CAPTIONS, "all.csv", worst_first=worst_first)
        if isinstance(block, Table)
    )
    low, high = list(range(25)), list(range(89, 64, -1))
    shown = [[int(str(row[0])) for row in table.rows] for table in (first, second)]
    assert shown == ([low, high] if worst_first else [high, low[::-1]])
    assert second.caption == "Second. all.csv has the other 50 of 100 classes."


def test_few_classes_are_in_one_table_the_undefined_last() -> None:
    classes = [(None, ["none"]), *((score, [str(score)]) for score in range(MOST_CLASSES - 1))]
    (table,) = class_tables(classes, ["class"], CAPTIONS, "all.csv", worst_first=True)
    assert isinstance(table, Table)
    assert [table.rows[0], table.rows[-1]] == [["0"], ["none"]]


def test_settings_are_those_that_differ_or_are_unknown() -> None:
    content = {"a": {"x": 1, "y": (1, 2)}, "new": None}
    assert changed_settings(content, {"a.x": 2, "a.y": [1, 2]}) == [("a.x", 1, 2), ("new", None, None)]


def test_missing_pictures_stand_behind_the_gallery() -> None:
    row, missing = PictureRow([]), Missing(Path("a"), "b")
    assert gallery([missing, row], 9) == [Gallery([row], 9), missing]
    assert gallery([missing], 9) == [missing]


def test_sections_collapse_when_all_is_missing() -> None:
    missing, table = Missing(Path("a"), "b"), Table([], [])
    nothing = [Section("One", "", [missing]), Section("Two", "", [missing])]
    assert collapse(nothing, "All", "text") == [Section("All", "text", [missing, missing])]
    something = [*nothing, Section("Three", "", [table])]
    assert collapse(something, "All", "text") == something
