"""Grids of cells: units of work whose rows of results land in one file, and that continue after anything."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, BinaryIO

from crossmae import __version__
from crossmae.errors import PROGRAMS, UserError, shorten
from crossmae.experiments.commands import FREE, EnergyMeter, RunningCommand, count_cores, describe_machine, find_gpus
from crossmae.experiments.rows import Attempts, Row, append_row, command_line, now, read_rows
from crossmae.files import make_folder, sha256
from crossmae.files.claim import lock_now
from crossmae.files.leftovers import SHARED_SECONDS, sweep
from crossmae.reports.page import format_seconds

log = logging.getLogger(__name__)

LOGS = "logs"
SHOWN_LINES = 15  # of the log of a failed cell
POLL_SECONDS, RECORD_SECONDS, BUSY_SECONDS = 0.05, 10.0, 2.0
LEAST_LEFT = 0.1  # share of its expected time that an interrupted cell needs at least
SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


@dataclass(frozen=True)
class Step:
    """A command of a cell. It runs in the root of the repository.

    Attributes:
        arguments: words after the interpreter.
        done: file that the command writes last. The step is skipped if the file exists and the command is unchanged.
        resume: words to append if `resume_if` exists.
        folder: folder that belongs to this step. It is removed before the command starts without `resume`. None:
            the command copes with what earlier attempts left. Name it only if nothing else writes there.
    """

    arguments: tuple[str, ...]
    done: Path
    resume: tuple[str, ...] = ()
    resume_if: Path | None = None
    folder: Path | None = None


@dataclass(frozen=True)
class Cell:
    """A unit of work of a grid, with numbers at its end.

    Attributes:
        name: unique name, safe as the name of a file.
        facts: what the cell is, copied into its row. Cells of the same "kind" cost about the same.
        read: returns the numbers from the files of the finished steps.
        needs: cells that must be finished first.
        estimate: expected CPU seconds. 0: unknown.
    """

    name: str
    facts: Mapping[str, str | int | float | None]
    steps: tuple[Step, ...]
    read: Callable[[], Mapping[str, float]]
    needs: tuple[str, ...] = ()
    estimate: float = 0.0


class FailedCells(UserError):
    """Cells failed.

    Attributes:
        reasons: why, by cell.
    """

    def __init__(self, message: str, details: Sequence[str], reasons: Mapping[str, str]) -> None:
        super().__init__(message, *details)
        self.reasons = reasons


def run_cells(
    cells: Sequence[Cell],
    results: Path,
    *,
    jobs: int = 1,
    gpus: Sequence[int] = (),
    minutes: float | None = None,
) -> list[Row]:
    """Run the unfinished cells of a grid, and return the rows.

    The rows are those of the finished cells, in the order of `cells`. A cell is finished if its row is in the file and
    has the cell's fingerprint. Otherwise the cell continues with its first unfinished step. A finished cell runs again
    if an unfinished cell needs it and the files of its steps were removed. The output of the commands
    is in a folder logs/ next to `results`, with a record of the attempts. Several calls may work on the same grid: no
    cell runs twice at the same time. After SIGKILL, the commands are killed, too, and the next call continues.

    Args:
        results: file with a JSON line for each finished cell.
        jobs: number of cells at once. Each gets its share of the cores, unless OMP_NUM_THREADS is set. Energy is
            measured only if one cell runs at a time, because the counters belong to the machine.
        gpus: indices of GPUs. If given, one cell runs on each of them, and `jobs` has no effect.
        minutes: start no cell that is expected to end later than so many minutes from now.

    Raises:
        FailedCells: cells failed. The message names them and their logs. The next call runs them again.
        ValueError: the cells contradict each other.
        KeyboardInterrupt: after Ctrl-C, once all commands have ended. A second Ctrl-C kills the commands.
        SystemExit: after SIGTERM, once all commands have ended.
    """
    from crossmae.training.signals import StopRequest  # imports torch, which takes seconds

    check_cells(cells)
    make_folder(results.parent / LOGS, "results")
    sweep(results.parent / LOGS, min_age=SHARED_SECONDS)
    grid = GridRun(cells, results, list(gpus) or [None] * max(jobs, 1), minutes)
    with StopRequest() as request:
        try:
            grid.run(lambda: request.number is not None)
        finally:
            grid.kill()
    if request.number is not None:
        log.warning("stopped: %s. The same command continues.", grid.describe_progress())
        request.end()
    grid.raise_failures()
    return [grid.rows[cell.name] for cell in cells if cell.name in grid.rows]


def has_files(step: Step) -> bool:
    """Return true if a step has its file, or can continue."""
    return any(path and (PROGRAMS / path).exists() for path in (step.done, step.resume_if))


def finished_rows(cells: Sequence[Cell], results: Path) -> dict[str, Row]:
    """Read the rows of the finished cells, by name.

    A row of a cell that has changed since does not count.
    """
    return fitting_rows(results, step_fingerprints(cells, results))


def fitting_rows(results: Path, fingerprints: Mapping[str, Sequence[str]]) -> dict[str, Row]:
    """Read the rows that fit `step_fingerprints`, by name of the cell."""
    rows = {row.cell: row for row in read_rows(results)}
    return {
        name: rows[name] for name, own in fingerprints.items() if name in rows and rows[name].fingerprint == own[-1]
    }


def check_cells(cells: Sequence[Cell]) -> None:
    """Check names and needs.

    Raises ValueError if a name is taken twice or unsafe, or if needs are unknown or circular.
    """
    names = [cell.name for cell in cells]
    for cell in cells:
        if not SAFE_NAME.fullmatch(cell.name) or names.count(cell.name) > 1:
            raise ValueError(f"{cell.name!r}: a cell's name must be unique and safe as the name of a file.")
        if unknown := set(cell.needs) - set(names):
            raise ValueError(f"{cell.name}: needs {', '.join(sorted(unknown))}, which the grid does not have.")
    try:
        TopologicalSorter({cell.name: cell.needs for cell in cells}).prepare()
    except CycleError as error:
        raise ValueError(f"cells need each other: {', '.join(error.args[1])}.") from None


def step_fingerprints(cells: Sequence[Cell], results: Path) -> dict[str, list[str]]:
    """Compute a hash for each step of each cell.

    The hash of the last step is the fingerprint of the cell. A hash covers the version of this package, the command,
    the configs that the command names, the earlier steps of the cell, and the cells that it needs. The place of
    repository and results has no influence.
    """
    places = {str(results.parent.resolve()): "@", str(results.parent): "@", str(PROGRAMS): "."}
    by_name, found = {cell.name: cell for cell in cells}, dict[str, list[str]]()
    for name in TopologicalSorter({cell.name: cell.needs for cell in cells}).static_order():
        cell = by_name[name]
        chain = [hash_of([__version__, *(found[need][-1] for need in cell.needs)])]
        for step in cell.steps:
            text = json.dumps(step.arguments)
            for place, sign in places.items():
                text = text.replace(json.dumps(place)[1:-1], sign)
            chain.append(hash_of([chain[-1], text, *config_hashes(step.arguments)]))
        found[name] = chain[1:] or chain
    return {cell.name: found[cell.name] for cell in cells}


def hash_of(values: Sequence[str]) -> str:
    """Hash a list of texts to 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def config_hashes(arguments: Sequence[str]) -> list[str]:
    """Hash the configs that a command names, and their bases."""
    ahead, found = (
        [word.rpartition("=")[2] for word in arguments if word.endswith((".yaml", ".yml"))],
        dict[Path, str](),
    )
    while ahead:
        word = ahead.pop()
        path = next((place / word for place in (PROGRAMS, PROGRAMS / "configs") if (place / word).is_file()), None)
        if path and path not in found:
            found[path] = sha256(path)
            bases = re.findall(r"^_BASE_: *[\"']?([^\"'\s]+)", path.read_text("utf-8", errors="replace"), re.MULTILINE)
            ahead += [str(path.parent / base) for base in bases]
    return sorted(found.values())


class RunningCell:
    """A cell that runs: the current command, and the lock that keeps other calls away.

    Args:
        lock: the open log. It is locked until it is closed.
        gpu: GPU that the cell uses. None: no GPU.
        meter: measure energy.

    Attributes:
        failure: reason of the failure; "": none.
    """

    def __init__(
        self,
        cell: Cell,
        lock: BinaryIO,
        attempts: Attempts,
        environment: Mapping[str, str],
        gpu: int | None,
        meter: bool,
    ) -> None:
        self.cell, self.lock, self.attempts, self.environment = cell, lock, attempts, environment
        self.gpu, self.meter = gpu, meter
        self.number, self.failure, self.log_start = -1, "", 0
        self.command: RunningCommand | None = None
        self.log_path = Path(lock.name)

    def is_step_done(self, number: int) -> bool:
        """Return true if a step ended with its present command."""
        return self.attempts.was_started(number) and (PROGRAMS / self.cell.steps[number].done).exists()

    def start_next_step(self) -> bool:
        """Start the next unfinished step. Return false if there is none."""
        self.number += 1
        while self.number < len(self.cell.steps) and self.is_step_done(self.number):
            self.number += 1
        if self.number == len(self.cell.steps):
            return False
        step = self.cell.steps[self.number]
        arguments = [sys.executable, *step.arguments, *self._words_to_resume(step)]
        self.before = self.attempts.costs[self.number] or FREE
        self.attempts.record(self.number, self.before)
        self.recorded = time.monotonic()
        with open(self.log_path, "ab") as file:
            file.write(f"\n{now()} $ {command_line(arguments)}\n".encode(errors="backslashreplace"))
            file.flush()
            meter = EnergyMeter(self.gpu) if self.meter else None
            self.command = RunningCommand(arguments, file, self.environment, self.gpu is not None, meter)
        return True

    def _words_to_resume(self, step: Step) -> tuple[str, ...]:
        """Return the words that continue an earlier attempt, or clean up."""
        if self.attempts.was_started(self.number) and step.resume_if and (PROGRAMS / step.resume_if).exists():
            return step.resume
        (PROGRAMS / step.done).unlink(missing_ok=True)
        if step.folder:
            shutil.rmtree(PROGRAMS / step.folder, ignore_errors=True)
        return ()

    def poll(self) -> bool:
        """Return true if the current command has ended. Record its cost."""
        assert self.command is not None
        code = self.command.poll()
        if code is None and time.monotonic() - self.recorded < RECORD_SECONDS:
            return False
        self.recorded = time.monotonic()
        self.attempts.record(self.number, self.before + self.command.cost)
        if code is None:
            return False
        if code < 0:
            hint = ", which is what happens when memory runs out" if code == -signal.SIGKILL else ""
            self.failure = f"killed by {signal.Signals(-code).name}{hint}"
        elif code:
            self.failure = f"exit code {code}"
        elif not (PROGRAMS / self.cell.steps[self.number].done).exists():
            self.failure = f"wrote no {self.cell.steps[self.number].done}"
        self.command = None
        return True

    def read_log(self) -> list[str]:
        """Read the last attempt's output, without overwritten progress bars."""
        with open(self.log_path, "rb") as file:
            file.seek(self.log_start)
            lines = file.read().decode(errors="replace").split("\n")
        shown = [line.rstrip().rpartition("\r")[2].strip() for line in lines]
        return [line for line in shown if line]

    def row(self, fingerprint: str, machine: Mapping[str, Any]) -> Row:
        """Read the numbers of the finished cell."""
        commands = [command_line([sys.executable, *step.arguments]) for step in self.cell.steps]
        numbers = {key: float(value) for key, value in self.cell.read().items()}
        if odd := [key for key, value in numbers.items() if not math.isfinite(value)]:
            raise ValueError(f"{odd[0]} is {numbers[odd[0]]}")
        cost = self.attempts.cost.numbers()
        return Row(self.cell.name, dict(self.cell.facts), numbers, cost, commands, fingerprint, machine, now())


class GridRun:
    """The state of `run_cells`: cells that wait, run, have failed, and have rows.

    Args:
        slots: a GPU, or None, for each cell that may run at the same time.
    """

    def __init__(
        self, cells: Sequence[Cell], results: Path, slots: Sequence[int | None], minutes: float | None
    ) -> None:
        self.cells, self.results, self.slots, self.logs = cells, results, slots, results.parent / LOGS
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.fingerprints = step_fingerprints(cells, results)
        self.failed: dict[str, str] = {}
        self.rows: dict[str, Row] = {}
        self.ended, self.lost = set[str](), set[str]()
        self.running: list[RunningCell] = []
        self.machine, self.gpus = describe_machine(), find_gpus()
        self.update_rows()

    def update_rows(self) -> None:
        """Read the rows that fit the cells, also those of other calls."""
        self.rows = fitting_rows(self.results, self.fingerprints)
        while lost := self.find_lost():
            for name in lost:
                del self.rows[name]
            if new := sorted(lost - self.lost):
                log.warning("files that other cells need were removed. Again: %s", shorten(new))
            self.lost |= lost

    def find_lost(self) -> set[str]:
        """Find finished cells without their files that an unfinished cell needs."""
        needed = {need for cell in self.cells if cell.name not in self.rows for need in cell.needs}
        return {
            cell.name
            for cell in self.cells
            if cell.name in (needed & self.rows.keys()) - self.ended
            if not all((PROGRAMS / step.done).exists() for step in cell.steps)
        }

    def run(self, stop: Callable[[], bool]) -> None:
        """Start cells until none is left, or `stop` returns true."""
        log.info("%s", self.describe_progress())
        looked, told = 0.0, False
        while True:
            if stop():
                self.end_running()
                return
            self.poll()
            ready = self.ready() if len(self.running) < len(self.slots) else []
            if ready and time.monotonic() >= looked:
                started = self.start_one(ready)
                if started:
                    continue
                looked = time.monotonic() + BUSY_SECONDS  # other calls run all that is ready
                if not self.running and not told:
                    log.info("another call runs %s. Waiting for its results", shorten([cell.name for cell in ready]))
                    told = True
                self.update_rows()
            if not self.running and not ready:
                return
            time.sleep(POLL_SECONDS)

    def ready(self) -> list[Cell]:
        """List the cells that can start now."""
        if self.deadline is not None and time.monotonic() >= self.deadline:
            return []
        busy = {running.cell.name for running in self.running}
        return [
            cell
            for cell in self.cells
            if cell.name not in {*self.rows, *self.failed, *busy} and self.rows.keys() >= set(cell.needs)
            if self.deadline is None or time.monotonic() + self.seconds_left(cell) <= self.deadline
        ]

    def start_one(self, ready: Sequence[Cell]) -> bool:
        """Start the first cell that no other call runs, if any."""
        for cell in ready:
            lock = open(self.logs / f"{cell.name}.log", "ab")  # noqa: SIM115 - it stays open while the cell runs
            if lock_now(lock) is False:
                lock.close()
                continue
            self.update_rows()  # another call may have finished the cell just now
            if cell.name in self.rows:
                lock.close()
                return True
            self.start(cell, lock)
            return True
        return False

    def start(self, cell: Cell, lock: BinaryIO) -> None:
        """Start a cell in a free slot."""
        used = [running.gpu for running in self.running if running.gpu is not None]
        slot = next(slot for slot in self.slots if slot not in used)
        environment = {"PYTHONPATH": os.pathsep.join(filter(None, [str(PROGRAMS), os.environ.get("PYTHONPATH")]))}
        if "OMP_NUM_THREADS" not in os.environ:
            environment["OMP_NUM_THREADS"] = str(max(1, count_cores() // len(self.slots)))
        if slot is not None:
            environment |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": str(slot)}
        gpu = slot if slot is not None else next(iter(self.gpus), None)
        attempts = Attempts(self.logs, cell.name, self.fingerprints[cell.name])
        if cell.name in self.lost:
            attempts.forget([number for number, step in enumerate(cell.steps) if not has_files(step)])
        running = RunningCell(cell, lock, attempts, environment, gpu, meter=len(self.slots) == 1)
        self.running.append(running)
        self.advance(running)

    def advance(self, running: RunningCell) -> None:
        """Start the next step of a cell, or write its row."""
        cell = running.cell
        if running.start_next_step():
            step = cell.steps[running.number]
            count = len(self.rows) + len(self.failed) + 1 + self.running.index(running)
            left = format_left(self.seconds_in_all())
            what = f"step {running.number + 1} of {len(cell.steps)}, {Path(step.arguments[0]).name}"
            log.info("[%d/%d] %s: %s%s", count, len(self.cells), cell.name, what, left)
            return
        self.running.remove(running)
        with running.lock:
            try:
                row = running.row(self.fingerprints[cell.name][-1], self.machine)
            except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
                self.fail(running, f"its numbers cannot be read: {type(error).__name__}: {error}")
                return
            append_row(self.results, row)
        self.rows[cell.name] = row
        self.ended.add(cell.name)
        numbers = ", ".join(f"{key} {value:.4g}" for key, value in row.numbers.items())
        spent = format_seconds(row.cost["wall_seconds"] or 0.0)
        log.info("[%d/%d] %s: done in %s: %s", len(self.rows), len(self.cells), cell.name, spent, numbers or "done")

    def poll(self) -> None:
        """Look after the running cells."""
        for running in list(self.running):
            if running.poll():
                if running.failure:
                    self.running.remove(running)
                    running.lock.close()
                    self.fail(running, running.failure)
                else:
                    self.advance(running)

    def fail(self, running: RunningCell, reason: str) -> None:
        """Note a failure, and show the end of the log."""
        name = running.cell.name
        self.failed[name] = reason
        lines = running.read_log()[-SHOWN_LINES:]
        log.error("%s: failed: %s. The end of %s:", name, reason, running.log_path)
        for line in lines:
            log.error("    %s", line)

    def end_running(self) -> None:
        """Ask all commands to save and end, and wait for them."""
        for running in self.running:
            if running.command:
                running.command.send(signal.SIGTERM)
        if self.running:
            log.warning("stopping: %s", shorten([running.cell.name for running in self.running]))
        for running in self.running:
            while not running.poll():
                time.sleep(POLL_SECONDS)
            running.lock.close()
        self.running = []

    def kill(self) -> None:
        """Kill all commands at once."""
        for running in self.running:
            if running.command:
                running.command.kill()
            running.lock.close()
        self.running = []

    def seconds_left(self, cell: Cell) -> float:
        """Estimate the seconds that an unfinished cell still needs. 0: unknown."""
        pairs = [(other, self.rows[other.name]) for other in self.cells if other.name in self.rows]
        seconds = expected_seconds(cell, pairs)
        spent = Attempts(self.logs, cell.name, self.fingerprints[cell.name]).cost.wall_seconds
        return max(seconds - spent, seconds * LEAST_LEFT)

    def seconds_in_all(self) -> float:
        """Estimate the seconds until all cells are finished. 0: unknown."""
        left = [cell for cell in self.cells if cell.name not in {*self.rows, *self.failed}]
        seconds = [self.seconds_left(cell) for cell in left]
        return sum(seconds) / len(self.slots) if all(seconds) else 0.0

    def describe_progress(self) -> str:
        """Count the finished cells, and estimate the time for the rest."""
        finished = f"{len(self.rows)} of {len(self.cells)} cells are finished"
        return finished + format_left(self.seconds_in_all()) * (len(self.rows) < len(self.cells))

    def raise_failures(self) -> None:
        """Raise UserError if cells failed, and report what is left."""
        left = [cell.name for cell in self.cells if cell.name not in {*self.rows, *self.failed}]
        if self.failed:
            failures = [f"{name}: {reason}. Log: {self.logs / name}.log" for name, reason in self.failed.items()]
            waiting = f", and {len(left)} more did not run" if left else ""
            raise FailedCells(
                f"{self.results}: {len(self.failed)} of {len(self.cells)} cells failed{waiting}. Read the logs and "
                "repair the cause. Then the same command runs only what is left.",
                failures,
                self.failed,
            )
        if left:
            log.warning("no time is left: %s. The same command continues.", self.describe_progress())


def expected_seconds(cell: Cell, finished: Sequence[tuple[Cell, Row]], cost: str = "wall_seconds") -> float:
    """Estimate the seconds of a cell from finished cells.

    The cell's own estimate is scaled by what cells of its kind took, or else all cells: the machine may be busy, or
    have many cores. 0: unknown.

    Args:
        cost: "wall_seconds" or "cpu_seconds".
    """
    known = [(other, float(row.cost[cost] or 0.0)) for other, row in finished]
    same = [pair for pair in known if pair[0].facts.get("kind") == cell.facts.get("kind")]
    if same and not (cell.estimate and all(other.estimate for other, _ in same)):
        return sum(seconds for _, seconds in same) / len(same)
    scaled = same or [(other, seconds) for other, seconds in known if other.estimate]
    if not scaled:
        return cell.estimate
    return cell.estimate * sum(seconds for _, seconds in scaled) / sum(other.estimate for other, _ in scaled)


def format_left(seconds: float) -> str:
    """Write the remaining time as the end of a sentence."""
    return f", about {format_seconds(max(seconds, 1))} left in all" if seconds else ""
