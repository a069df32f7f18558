"""A run folder is read whatever state it is in: what is missing or damaged is noted, not raised."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from PIL import Image

from crossmae.errors import UserError
from crossmae.files import read_json
from crossmae.reports.page import Missing, PictureRow
from crossmae.reports.run_folder import FileContent, LoggedNumbers, RunFolder, read_log


class Numbers(FileContent):
    count: int
    share: float | None = None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "expected a JSON object, received list"),
        ({}, "unexpected content: count: Field required"),
        ({"count": 1, "share": "high"}, "unexpected content: share: Input should be a valid number"),
        ({"count": 1, "share": math.nan}, "unexpected content: share: Input should be a finite number"),
    ],
)
def test_wrong_content_is_named(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "numbers.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"numbers.json: {message}"):
        Numbers.read(path)


def test_other_keys_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "numbers.json").write_text('{"count": 3, "new": 1}')
    assert RunFolder(tmp_path).read("numbers.json", Numbers.read, None) == Numbers(count=3)


def test_faults_are_noted_by_file_without_the_path(tmp_path: Path) -> None:
    (tmp_path / "damaged.json").write_bytes(b"\xff{")
    run = RunFolder(tmp_path)
    assert [run.read(name, read_json, 7) for name in ("damaged.json", "absent")] == [7, 7]
    assert run.faults["absent"] == "the file does not exist"
    assert run.faults["damaged.json"].startswith("line 1 is not UTF-8")
    assert run.missing("absent", "x", "no such key").why == "the file does not exist"
    assert run.missing("other", "x", "no such key").why == "no such key"
    assert str(tmp_path) not in str(run.faults)


def test_pictures_are_embedded_or_named(tmp_path: Path) -> None:
    Image.new("RGB", (8, 4)).save(tmp_path / "a.png")
    run = RunFolder(tmp_path)
    row = run.picture("a.png", Image.open, "figure", caption="c", density=2)
    assert isinstance(row, PictureRow)
    assert (row.pictures[0].width, row.pictures[0].alt, row.caption) == (4, "figure", "c")
    assert run.picture("b.png", Image.open, "figure") == Missing(Path("b.png"), "figure")


def test_damaged_lines_of_a_log_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    lines = [
        '{"step": 1, "x": NaN, "name": "a", "yes": true}',
        "",
        "[1]",
        '{"x": 1}',
        '{"step": 2, "x": 1e999}',
        '{"st',
    ]
    path.write_text("\n".join([*lines, '{"step": 1' + "0" * 400 + "}"]))
    log = read_log(path, "step")
    assert [sorted(row) for row in log.rows] == [["step", "x"], ["step"]]
    assert log.damaged == 4
    assert math.isnan(log.values("x")[0])
    with pytest.raises(UserError, match="absent: no such file"):
        read_log(tmp_path / "absent", "step")


def test_spans_cover_the_steps_since_the_value_before() -> None:
    rows = [{"step": 10, "speed": 5.0}, {"step": 15}, {"step": 20, "speed": 0.0}, {"step": 30, "speed": 40.0}]
    assert list(LoggedNumbers(rows).spans("step", "speed")) == [(10, 5.0), (20, 40.0)]
