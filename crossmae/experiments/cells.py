"""Grids of cells: units of work whose rows of results land in one file, and that continue after anything."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, BinaryIO

from crossmae import __version__
from crossmae.errors import UserError, shorten
from crossmae.experiments.commands import (
    FREE,
    ROOT,
    Cost,
    EnergyMeter,
    RunningCommand,
    count_cores,
    describe_machine,
    find_gpus,
)
from crossmae.files import make_folder, sha256, write_json
from crossmae.reports.page import format_seconds

log = logging.getLogger(__name__)

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


@dataclass(frozen=True)
class Row:
    """The result of a cell: one line of results.jsonl.

    Attributes:
        cost: the fields of `crossmae.experiments.commands.Cost`, summed over all steps and attempts.
        commands: command lines, as run in the root of the repository.
        fingerprint: hash of everything that decides the result.
        finished: time in UTC, ISO 8601.
    """

    cell: str
    facts: Mapping[str, str | int | float | None]
    numbers: Mapping[str, float]
    cost: Mapping[str, float | None]
    commands: Sequence[str] = ()
    fingerprint: str = ""
    machine: Mapping[str, Any] = field(default_factory=dict)
    finished: str = ""


def read_rows(results: Path) -> list[Row]:
    """Read the newest row of every cell, in the order of the file; [] without the file.

    A torn last line is ignored with a warning: its cell runs again.

    Raises UserError if another line is not a row.
    """
    lines = results.read_bytes().split(b"\n") if results.exists() else []
    rows: dict[str, Row] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = Row(**json.loads(line))
        except (ValueError, TypeError):
            if number < len(lines):
                raise UserError(f"{results}: line {number} is no row of results. Remove the line.") from None
            log.warning("%s: the last line is torn and ignored: its cell runs again", results)
            continue
        rows.pop(row.cell, None)
        rows[row.cell] = row
    return list(rows.values())


def append_row(results: Path, row: Row) -> None:
    """Append a row with one write, and wait until it is on disk. A torn last line is removed."""
    line = json.dumps(asdict(row), ensure_ascii=False, allow_nan=False).encode() + b"\n"
    with open(results, "a+b") as file, _locked(file):
        file.seek(0)
        before = file.read()
        file.truncate(before.rfind(b"\n") + 1)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _locked(file: BinaryIO) -> Iterator[None]:
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)
