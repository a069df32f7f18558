"""Proves that every detection case of ../shared/cases ends as the table says: a right result, or one clear line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cases.conftest import Tool, Written
from tools import check_coco

# The case, check_coco's exit code, and a pattern that its output contains.
CHECKED: dict[str, tuple[int, str]] = {
    "sound": (0, "no faults"),
    "iscrowd_float": (0, "no faults"),
    "chinese_names": (0, "no faults"),
    "odd_file_names": (0, "no faults"),
    "jfif_names": (0, "no faults"),
    "polygon_rows_first": (
        1,
        r"misfit-masks +error +8 of 8 annotations[^$]*its mask fits its box with x and y swapped",
    ),
    "polygon_far_away": (1, "mask-outside +droppable error +1 of 8 annotations, id 3\n"),
    "polygon_far_20k": (1, "mask-outside +droppable error +1 of 8 annotations, id 3\n"),
    "nearly_all_crowd": (0, "mostly-crowd .* 7 of 8 annotations.*\n.* set iscrowd 0 for single objects"),
    "crowded_image": (0, "many-objects .*\n.*raise TEST.MAX_DETS and TEST.DETECTIONS_PER_IMAGE\n.*150 objects"),
}


@pytest.mark.parametrize("case", CHECKED)
def test_what_the_checker_says(case: str, written: Written, tool: Tool) -> None:
    code, pattern = CHECKED[case]
    folder: Path = written("detection/generate.py", case) / case
    found, output = tool(check_coco.main, folder / "coco.json", folder / "images", "--evaluation")
    assert found == code, output
    assert re.search(pattern, output), output
