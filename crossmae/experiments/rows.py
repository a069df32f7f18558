"""Rows of results: JSON lines, appended when a cell of an experiment ends. Records of the attempts until then."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from crossmae.errors import PROGRAMS, UserError
from crossmae.experiments.commands import FREE, Cost
from crossmae.files import load_json, write_json
from crossmae.files.claim import locked

log = logging.getLogger(__name__)

SCORED_KINDS = ("detect", "classify")  # cells that end with a score


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


_ROW = TypeAdapter(Row)


def read_rows(results: Path) -> list[Row]:
    """Read the newest row of every cell, in the file's order.

    Without the file, there are no rows. A torn last line is ignored with a warning: its cell runs again.

    Raises UserError if another line is not a row.
    """
    lines = results.read_bytes().split(b"\n") if results.exists() else []
    rows: dict[str, Row] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = _ROW.validate_python(load_json(line))
        except ValueError:
            if number < len(lines):
                raise UserError(f"{results}: line {number} is no row of results. Remove the line.") from None
            log.warning("%s: the last line is torn and ignored: its cell runs again", results)
            continue
        rows.pop(row.cell, None)
        rows[row.cell] = row
    return list(rows.values())


def is_torn(line: bytes) -> bool:
    """Return true for a JSON line whose end was never written."""
    try:
        load_json(line or b"0")
    except ValueError:
        return True
    return False


def append_row(results: Path, row: Row) -> None:
    """Append a row with one write, and flush it to disk.

    A torn last line is removed first.
    """
    line = json.dumps(asdict(row), ensure_ascii=False, allow_nan=False).encode() + b"\n"
    with open(results, "a+b") as file, locked(file):
        file.seek(0)
        complete, newline, last = file.read().rpartition(b"\n")
        if is_torn(last):
            file.truncate(len(complete + newline))
            last = b""
        file.write(b"\n" * bool(last) + line)
        file.flush()
        os.fsync(file.fileno())


class Attempts:
    """The record of a cell's attempts: what was started, and what it cost. A small file next to the log.

    Args:
        folder: folder of the logs.
        cell: name of the cell.
        fingerprints: hashes of the cell's steps, as the cell is now. Steps with another hash are forgotten.
    """

    def __init__(self, folder: Path, cell: str, fingerprints: Sequence[str]) -> None:
        self.path, self.fingerprints = folder / f"{cell}.json", fingerprints
        try:
            known = load_json(self.path.read_text("utf-8"))["steps"]
            costs = [Cost(**step["cost"]) if step["fingerprint"] == mine else None
                     for step, mine in zip(known, fingerprints, strict=False)]  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError):  # a first attempt
            costs = []
        self.costs: list[Cost | None] = [*costs, *[None] * (len(fingerprints) - len(costs))][: len(fingerprints)]

    def was_started(self, number: int) -> bool:
        """Return true if the step was started before with the same command."""
        return self.costs[number] is not None

    def record(self, number: int, cost: Cost) -> None:
        """Store the cost of a step that was started."""
        self.costs[number] = cost
        steps = [
            {"fingerprint": mine if spent else "", "cost": asdict(spent or FREE)}
            for mine, spent in zip(self.fingerprints, self.costs, strict=False)
        ]
        write_json(self.path, {"steps": steps})

    def forget(self, numbers: Sequence[int]) -> None:
        """Forget steps whose files were removed, with their cost."""
        for number in numbers:
            self.costs[number] = None

    @property
    def cost(self) -> Cost:
        """The cost of all steps and attempts."""
        total = FREE
        for spent in self.costs:
            total = total + spent if spent else total
        return total


def command_line(arguments: Sequence[str]) -> str:
    """Write a command for a shell in the repository's root."""
    words = ["python" if word == sys.executable else word.removeprefix(f"{PROGRAMS}{os.sep}") for word in arguments]
    return shlex.join(words)


def now() -> str:
    """Write the time in UTC, ISO 8601."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
