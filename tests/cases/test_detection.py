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
}


@pytest.mark.parametrize("case", CHECKED)
def test_what_the_checker_says(case: str, written: Written, tool: Tool) -> None:
    code, pattern = CHECKED[case]
    folder: Path = written("detection/generate.py", case) / case
    found, output = tool(check_coco.main, folder / "coco.json", folder / "images", "--evaluation")
    assert found == code, output
    assert re.search(pattern, output), output
