"""A grid runs every step once, in order, and continues after failures, signals, and the death of the program."""

from __future__ import annotations

import json
import logging
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from crossmae.errors import PROGRAMS, UserError
from crossmae.experiments import cells as engine
from crossmae.experiments.cells import Cell, read_rows, run_cells
from tests.crossmae.experiments.tiny_grid import WORK, python_step, twelve_cells, working_cell

SECONDS = 60  # for a start on a busy machine


def journal(folder: Path) -> list[str]:
    """The files that were written, in order."""
    path = folder / "journal"
    return path.read_text().split() if path.exists() else []


def test_needs_come_first_and_the_second_call_runs_nothing(tmp_path: Path):
    results = tmp_path / "results.jsonl"
    cells = [
        working_cell(tmp_path, "b", needs=("a",)),
        working_cell(tmp_path, "a", steps=2),
        working_cell(tmp_path, "c"),
    ]
    rows = run_cells(cells, results)
    assert [row.cell for row in rows] == ["b", "a", "c"]
    assert journal(tmp_path) == ["a-0", "a-1", "b-0", "c-0"]
    assert [row.numbers for row in rows] == [{"files": 1.0}, {"files": 2.0}, {"files": 1.0}]
    assert rows[0].facts == {"kind": "work", "arm": "b"}
    assert len(rows[1].commands) == 2
    assert rows[0].machine["cores"] >= 1
    assert run_cells(cells, results) == rows
    assert len(journal(tmp_path)) == 4


def test_cost_counts_the_work_of_all_steps(tmp_path: Path):
    code = (
        "import sys, time; hold = bytearray(64 << 20); time.sleep(0.4)\n"
        "while time.process_time() < 0.3: pass\n"
        "open(sys.argv[1], 'w').close()"
    )
    steps = tuple(python_step(tmp_path / str(number), code) for number in range(2))
    (row,) = run_cells([Cell("a", {}, steps, dict)], tmp_path / "results.jsonl")
    cost = {key: value or 0.0 for key, value in row.cost.items()}
    assert 0.6 <= cost["cpu_seconds"] < cost["wall_seconds"] < SECONDS
    assert cost["wall_seconds"] >= 1.4
    assert 64 << 20 < cost["peak_memory_bytes"] < 2 * 64 << 20


def test_a_changed_command_runs_again_with_what_needs_it(tmp_path: Path):
    results = tmp_path / "results.jsonl"
    cells = [
        working_cell(tmp_path, "a", steps=2),
        working_cell(tmp_path, "b", needs=("a",)),
        working_cell(tmp_path, "c"),
    ]
    run_cells(cells, results)
    changed = replace(cells[0], steps=(cells[0].steps[0], python_step(tmp_path / "a-1", WORK, "0", "changed")))
    rows = run_cells([changed, *cells[1:]], results)
    assert journal(tmp_path)[4:] == ["a-1", "b-0"]  # not the unchanged first step, not c
    assert rows[0].cost["wall_seconds"] > 0  # type: ignore[operator]
    assert len(results.read_text().splitlines()) == 5
    assert {row.cell: row.fingerprint for row in read_rows(results)} == {row.cell: row.fingerprint for row in rows}


def test_a_changed_config_runs_again(tmp_path: Path):
    config, base = tmp_path / "own.yaml", tmp_path / "other.yaml"
    config.write_text("_BASE_: other.yaml\n")
    base.write_text("x: 1\n")
    cell = Cell("a", {}, (python_step(tmp_path / "a", WORK, "0", f"--config={config}"),), dict)
    fingerprints = []
    for text in ("x: 1\n", "x: 2\n"):
        base.write_text(text)
        (row,) = run_cells([cell], tmp_path / "results.jsonl")
        fingerprints.append(row.fingerprint)
    assert len(set(fingerprints)) == 2
    assert journal(tmp_path) == ["a", "a"]


def test_the_place_of_the_results_does_not_count(tmp_path: Path):
    prints = []
    for name in ("here", "there"):
        folder = tmp_path / name
        prints.append(engine.step_fingerprints(twelve_cells(folder), folder / "results.jsonl"))
    assert prints[0] == prints[1]
    assert len({fingerprint for chain in prints[0].values() for fingerprint in chain}) == 24


def test_a_failure_leaves_the_rest_alone_and_is_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    results, switch = tmp_path / "results.jsonl", tmp_path / "switch"
    code = "import os, sys; print('what went wrong'); os.path.exists(sys.argv[2]) or sys.exit(3); " + (
        "open(sys.argv[1], 'w').close()"
    )
    cells = [
        Cell("bad", {}, (python_step(tmp_path / "bad", code, str(switch)),), dict),
        working_cell(tmp_path, "after", needs=("bad",)),
        working_cell(tmp_path, "other"),
    ]
    with pytest.raises(UserError, match=r"1 of 3 cells failed, and 1 more did not run") as error:
        run_cells(cells, results)
    assert f"bad: exit code 3. Log: {tmp_path}/logs/bad.log" in str(error.value)
    assert "what went wrong" in caplog.text
    assert [row.cell for row in read_rows(results)] == ["other"]
    switch.touch()
    assert len(run_cells(cells, results)) == 3
    assert journal(tmp_path) == ["other-0", "after-0"]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("pass", "wrote no "),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL, .* memory runs out"),
    ],
)
def test_a_step_without_its_file_has_failed(tmp_path: Path, code: str, message: str):
    with pytest.raises(UserError, match=message):
        run_cells([Cell("a", {}, (python_step(tmp_path / "a", code),), dict)], tmp_path / "results.jsonl")


def test_numbers_that_cannot_be_read_are_a_failure(tmp_path: Path):
    cell = replace(working_cell(tmp_path, "a"), read=lambda: {"x": json.loads("{")})
    with pytest.raises(UserError, match="its numbers cannot be read: JSONDecodeError"):
        run_cells([cell], tmp_path / "results.jsonl")
    with pytest.raises(UserError, match="its numbers cannot be read: ValueError: x is nan"):
        run_cells([replace(cell, read=lambda: {"x": float("nan")})], tmp_path / "results.jsonl")
    (row,) = run_cells([replace(cell, read=lambda: {"x": 1})], tmp_path / "results.jsonl")
    assert row.numbers == {"x": 1.0}
    assert journal(tmp_path) == ["a-0"]


def test_a_step_continues_where_an_attempt_left_off(tmp_path: Path):
    """The first attempt fails halfway. The second has the words to continue; a changed command starts afresh."""
    run, results = tmp_path / "run", tmp_path / "results.jsonl"
    code = (
        "import os, sys; from pathlib import Path; run = Path(sys.argv[1]).parent; run.mkdir(exist_ok=True); "
        "half = run / 'half'; resumed = '--resume' in sys.argv; assert half.exists() == resumed, 'leftovers'; "
        "half.touch(); resumed or sys.exit(1); Path(sys.argv[1]).write_text('x')"
    )
    step = python_step(run / "done", code, resume=("--resume",), resume_if=run / "half", folder=run)
    cell = Cell("a", {}, (step,), dict)
    with pytest.raises(UserError, match="exit code 1"):
        run_cells([cell], results)
    (row,) = run_cells([cell], results)
    assert not row.commands[0].endswith(" --resume")
    changed = replace(cell, steps=(replace(step, arguments=(*step.arguments, "changed")),))
    with pytest.raises(UserError, match="exit code 1"):  # as the first attempt, not because of leftovers
        run_cells([changed], results)
    assert "leftovers" not in (tmp_path / "logs/a.log").read_text().rpartition("$ ")[2].partition("\n")[2]


def test_a_needed_cell_without_its_files_runs_again(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Only if an unfinished cell needs them, once, and at the cost of the new run."""
    results = tmp_path / "results.jsonl"
    cells = [working_cell(tmp_path, "a"), working_cell(tmp_path, "b", needs=("a",))]
    run_cells(cells, results)
    (tmp_path / "a-0").unlink()
    record = tmp_path / "logs/a.json"
    record.write_text(re.sub(r'"cpu_seconds": [\d.]+', '"cpu_seconds": 1000.0', record.read_text()))
    run_cells(cells, results)
    assert journal(tmp_path) == ["a-0", "b-0"]
    (again, _, _) = run_cells([*cells, working_cell(tmp_path, "c", needs=("a",))], results)
    assert journal(tmp_path) == ["a-0", "b-0", "a-0", "c-0"]
    assert "were removed. Again: a" in caplog.text
    assert (again.cost["cpu_seconds"] or 0) < 1000


def test_a_needed_cell_that_removes_its_files_runs_once(tmp_path: Path):
    file, results = tmp_path / "a-0", tmp_path / "results.jsonl"
    cell = replace(working_cell(tmp_path, "a"), read=lambda: {"x": file.unlink() or 1.0})
    assert len(run_cells([cell, working_cell(tmp_path, "b", needs=("a",))], results)) == 2
    assert journal(tmp_path) == ["a-0", "b-0"]


def test_a_torn_last_line_is_ignored_and_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    results = tmp_path / "results.jsonl"
    cells = [working_cell(tmp_path, "a"), working_cell(tmp_path, "b")]
    run_cells(cells, results)
    whole = results.read_bytes()
    for cut in range(len(whole.splitlines(keepends=True)[0]) + 1, len(whole) - 1, 97):
        results.write_bytes(whole[:cut])
        caplog.clear()
        assert [row.cell for row in read_rows(results)] == ["a"]
        assert "torn" in caplog.text
    assert len(run_cells(cells, results)) == 2
    assert [json.loads(line)["cell"] for line in results.read_text().splitlines()] == ["a", "b"]
    assert journal(tmp_path) == ["a-0", "b-0"]  # the command had ended: only its row was missing


def test_a_whole_last_line_without_its_end_stays(tmp_path: Path):
    results = tmp_path / "results.jsonl"
    run_cells([working_cell(tmp_path, "a")], results)
    results.write_bytes(results.read_bytes().rstrip())
    run_cells([working_cell(tmp_path, "b")], results)
    assert [row.cell for row in read_rows(results)] == ["a", "b"]


def test_a_strange_line_is_an_error(tmp_path: Path):
    results = tmp_path / "results.jsonl"
    results.write_text('{"cell": "a"}\n{"x": 1}\n')
    with pytest.raises(UserError, match=r"results.jsonl: line 1 is no row"):
        read_rows(results)


def test_two_jobs_run_at_the_same_time(tmp_path: Path):
    """Each of two cells waits for a file of the other."""
    code = "import sys, time\nopen(sys.argv[1] + '.here', 'w').close()\n" + (
        "end = time.time() + 30\nimport os\nwhile not os.path.exists(sys.argv[2]):\n"
        "    assert time.time() < end\n    time.sleep(0.01)\nopen(sys.argv[1], 'w').close()"
    )
    pairs = [("a", "b"), ("b", "a")]
    cells = [
        Cell(mine, {}, (python_step(tmp_path / mine, code, str(tmp_path / f"{other}.here")),), dict)
        for mine, other in pairs
    ]
    rows = run_cells(cells, tmp_path / "results.jsonl", jobs=2)
    assert len(rows) == 2
    assert [row.cost["energy_joules"] for row in rows] == [None, None]


def test_threads_and_gpus_of_a_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    code = "import os, sys; open(sys.argv[1], 'w').write(str([os.environ.get(key) for key in sys.argv[2:]]))"
    keys = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    cells = [Cell(name, {}, (python_step(tmp_path / name, code, *keys),), dict) for name in "ab"]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(engine, "count_cores", lambda: 7)
    rows = run_cells(cells, tmp_path / "results.jsonl", gpus=[3, 5])
    assert sorted((tmp_path / name).read_text() for name in "ab") in (["['3', '3']", "['3', '5']"], ["['3', '3']"] * 2)
    assert all(row.cost["gpu_seconds"] == row.cost["wall_seconds"] for row in rows)


def test_no_cell_starts_that_would_not_fit(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    cells = [
        replace(working_cell(tmp_path, name), estimate=estimate) for name, estimate in (("long", 1e6), ("short", 1))
    ]
    caplog.set_level(logging.INFO)
    rows = run_cells(cells, tmp_path / "results.jsonl", minutes=5)
    assert [row.cell for row in rows] == ["short"]
    assert "no time is left: 1 of 2 cells are finished" in caplog.text
    assert run_cells(cells[:1], tmp_path / "results.jsonl", minutes=0) == []


def test_estimates_follow_what_was_measured(tmp_path: Path):
    row = replace(run_cells([working_cell(tmp_path, "a")], tmp_path / "results.jsonl")[0], cost={"wall_seconds": 30.0})
    a, b = (replace(working_cell(tmp_path, name), estimate=estimate) for name, estimate in (("a", 10.0), ("b", 40.0)))
    assert engine.expected_seconds(b, [(a, row)]) == 120.0
    assert engine.expected_seconds(replace(b, estimate=0.0), [(a, row)]) == 30.0
    other = replace(b, facts={"kind": "other"})
    assert engine.expected_seconds(other, [(a, row)]) == 120.0
    assert engine.expected_seconds(replace(other, estimate=0.0), [(a, row)]) == 0.0
    assert engine.expected_seconds(other, []) == 40.0
    assert engine.expected_seconds(other, [(replace(a, estimate=0.0), row)]) == 40.0


@pytest.mark.parametrize(
    ("names", "needs", "message"),
    [
        (("a", "a"), (), "unique"),
        (("../a",), (), "safe"),
        (("a",), ("b",), "needs b, which"),
        (("a",), ("a",), "need each other"),
    ],
)
def test_a_grid_that_contradicts_itself_is_refused(
    tmp_path: Path, names: tuple[str, ...], needs: tuple[str, ...], message: str
):
    with pytest.raises(ValueError, match=message):
        run_cells(
            [replace(working_cell(tmp_path, "x", needs=needs), name=name) for name in names], tmp_path / "r.jsonl"
        )
    assert not (tmp_path / "logs").exists()


def start(folder: Path, jobs: int = 1) -> subprocess.Popen[str]:
    """Start the twelve cells in a program of their own.

    A shell's background jobs ignore Ctrl-C, and so would their programs: the program gets the default again.
    """
    program = PROGRAMS / "tests/crossmae/experiments/tiny_grid.py"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        command = [sys.executable, str(program), str(folder), str(jobs)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=PROGRAMS)
    finally:
        signal.signal(signal.SIGINT, before)


def wait_for_start(process: subprocess.Popen[str]) -> None:
    """Wait until the program runs a command."""
    assert process.stderr is not None
    while "step " not in (line := process.stderr.readline()):
        assert line, process.communicate()


def contents(folder: Path) -> dict[str, str]:
    """The files that finished steps wrote."""
    return {path.name: path.read_text() for path in folder.glob("[abcd][012]-[01]")}


def test_killed_at_any_time_the_grid_continues(tmp_path: Path):
    """SIGKILL of the program ends its commands; what is finished stays; nothing runs twice at the same time."""
    seed = int(time.time())
    rng = random.Random(seed)
    kept: dict[str, str] = {}
    for _ in range(4):
        process = start(tmp_path, jobs=2)
        wait_for_start(process)
        time.sleep(rng.uniform(0.0, 0.8))
        process.kill()
        process.communicate()
        time.sleep(0.1)
        now = contents(tmp_path)
        assert kept.items() <= now.items(), f"seed {seed}"
        time.sleep(1.0)  # longer than a command works, unless the machine is very busy
        assert contents(tmp_path) == now, f"seed {seed}"
        kept = now
    rows = run_cells(twelve_cells(tmp_path), tmp_path / "results.jsonl", jobs=2)
    assert len(rows) == 12
    assert all(row.numbers == {"files": 2.0} for row in rows)
    assert kept.items() <= contents(tmp_path).items()
    assert not (tmp_path / "overlap").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_commands_and_then_the_program(tmp_path: Path, number: signal.Signals, code: int):
    process = start(tmp_path)
    wait_for_start(process)
    time.sleep(0.2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == code
    assert "The same command continues." in errors
    now = contents(tmp_path)
    time.sleep(0.3)
    assert contents(tmp_path) == now
    assert len(now) < 24


def test_two_programs_share_a_grid(tmp_path: Path):
    both = [start(tmp_path, jobs=2) for _ in range(2)]
    ends = [process.communicate(timeout=SECONDS) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    assert all("12 rows" in errors for _, errors in ends)
    assert sorted(journal(tmp_path)) == sorted(contents(tmp_path))  # each of the 24 steps ran once
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 12
