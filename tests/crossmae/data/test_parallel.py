"""Proves that threads change neither order nor errors, that work does not run far ahead, and how progress is shown."""

from __future__ import annotations

import io
import time
from itertools import count

import pytest

from crossmae.data import parallel
from crossmae.data.parallel import AHEAD, Progress, map_in_order


def test_order_is_kept_and_memory_bounded() -> None:
    started: list[int] = []

    def slow_at_first(number: int) -> int:
        started.append(number)
        time.sleep(0.02 if number % 7 == 0 else 0)
        return number * number

    results = map_in_order(slow_at_first, count(), threads=3)
    for number in range(30):
        assert next(results) == number * number
        assert len(started) <= number + 1 + AHEAD * 3
    results.close()  # type: ignore[attr-defined]


def test_the_first_error_in_order_is_raised() -> None:
    def fail(number: int) -> int:
        if number in (5, 6):
            raise ValueError(str(number))
        return number

    results = map_in_order(fail, range(100), threads=4)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="5"):
        next(results)


def test_fewer_items_than_threads() -> None:
    assert list(map_in_order(str, [1, 2], threads=8)) == ["1", "2"]
    assert list(map_in_order(str, [], threads=8)) == []


class Clock:
    """A clock that moves when it is told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_without_a_terminal_progress_is_a_line_after_some_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """First, every 30 seconds, and last. The first item is slow, and does not count for the remaining time."""
    clock = Clock()
    monkeypatch.setattr(parallel, "clock", clock)
    with Progress(word="train", total=1000, unit="step", first=900) as progress:
        clock.now += 500
        progress.update()
        for step in range(902, 1001):
            clock.now += 2
            if step == 910:
                progress.note("loss 0.5")
            progress.update()
    lines = capsys.readouterr().err.splitlines()
    # 2 seconds a step: lines at 10, 40, 70, ... seconds after the first step.
    assert lines[0] == "train: step 906 of 1,000, about 3 min left"
    assert lines[1] == "train: step 921 of 1,000, loss 0.5, about 3 min left"
    assert lines[-2] == "train: step 996 of 1,000, loss 0.5, about 8 s left"
    assert lines[-1] == "train: step 1,000 of 1,000, loss 0.5"
    assert len(lines) == 8


def test_short_work_without_a_terminal_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(Progress([1, 2, 3], "read", leave=False)) == [1, 2, 3]
    assert list(Progress([1, 2, 3], "read", shown=False)) == [1, 2, 3]
    assert capsys.readouterr().err == ""


def test_on_a_terminal_progress_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", terminal)
    assert list(Progress(range(4), "read", unit="image")) == [0, 1, 2, 3]
    assert "read: 100%" in terminal.getvalue()
    assert "image 4 of 4" not in terminal.getvalue()


def test_work_continues_when_nobody_reads_its_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr("sys.stderr", Gone())
    assert list(Progress([1, 2])) == [1, 2]


def test_the_error_of_failed_work_is_the_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    def work(fails: bool) -> None:
        with Progress(total=5, word="work") as progress:
            progress.update(2)
            if fails:
                raise ValueError

    work(fails=False)
    assert capsys.readouterr().err == "work: item 2 of 5\n"
    with pytest.raises(ValueError):
        work(fails=True)
    assert capsys.readouterr().err == ""
