"""Stages: commands that run one after the other, are recorded, and are reused by the next run.

A stage is one command line of a tool. The line is printed before it runs, so that it can be copied and changed. A
finished stage is reused if its command and its config are unchanged and no earlier stage ran again. After a failure,
the next run continues with the failed stage. stages.json in the output folder records time and memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossmae import __version__
from crossmae.errors import COMMANDS, IN_WHEEL, PROGRAMS, USER_ERROR_EXIT_CODE, UserError, is_subcommand, name_commands
from crossmae.experiments.commands import run_command
from crossmae.files import make_folder, read_json, sha256, write_json
from crossmae.reports.page import format_bytes, format_seconds

# Do not import torch or matplotlib here: they would slow down a command that has nothing to do.

RECORDS = "stages.json"
STOPPED = "stopped"  # status of a stage that a signal ended
RESUME = "--resume"  # the flag of a tool that can continue its own run


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        tool: file of the command, such as "tools/pretrain.py".
        words: arguments of the tool.
        outputs: names of files in the output folder. They are removed before the stage runs, and must exist afterwards.
            A stage whose words have `RESUME` keeps the outputs of its own unfinished run.
        config: file that decides the outcome in addition to the command; None without such a file.
    """

    name: str
    title: str
    tool: str
    words: tuple[str, ...]
    outputs: tuple[str, ...]
    config: Path | None = None

    @property
    def arguments(self) -> list[str]:
        """Program and arguments, for the operating system.

        Under `crossmae NAME`, a stage is a subcommand, too. So its messages name commands in the same way.
        """
        name = next((name for name, tool in COMMANDS.items() if tool == self.tool and is_subcommand()), None)
        words = [self.tool] if name is None else ["tools/command.py", name]
        return [sys.executable, str(PROGRAMS / words[0]), *words[1:], *self.words]

    @property
    def command(self) -> str:
        """Command line for a shell. Its paths are those of the words."""
        return self._line(self.words)

    @property
    def short_command(self) -> str:
        """Command line for the current folder, with the shortest paths."""
        return self._line([_shorten(word) for word in self.words])

    def _line(self, words: Sequence[str]) -> str:
        if IN_WHEEL or (is_subcommand() and self.tool in COMMANDS.values()):
            return name_commands(shlex.join(["python", self.tool, *words]))
        tool = _from_here(PROGRAMS / self.tool, str(PROGRAMS / self.tool))
        return shlex.join([_from_here(Path(sys.executable), "python"), tool, *words])

    @property
    def fingerprint(self) -> str:
        """Hash of version, command and config, which decide the outcome."""
        decisive = [__version__, self.tool, self.words, sha256(self.config) if self.config else ""]
        return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()


def _from_here(path: Path, otherwise: str) -> str:
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else otherwise


def _shorten(word: str) -> str:
    """Write an absolute path relative to the current folder, if shorter.

    The word is a path or KEY=PATH.
    """
    key, equals, value = word.rpartition("=") if not os.path.isabs(word) else ("", "", word)
    if not os.path.isabs(value):
        return word
    here = os.path.relpath(os.path.realpath(value), os.path.realpath(os.curdir))
    is_same = os.path.realpath(here) == os.path.realpath(value)
    return f"{key}{equals}{here}" if is_same and len(here) < len(value) and not here.startswith("-") else word


def run_stages(stages: Iterable[Stage], folder: Path, *, total: int, fresh: bool = False) -> float:
    """Run the unfinished stages. Return the total seconds of all stages.

    Each stage is recorded in stages.json. Once a stage has run, all later stages run as well, because their inputs are
    new. A generator of stages can decide on a stage by what earlier stages wrote.

    Args:
        total: number of stages, for the messages.
        fresh: run every stage again.

    Raises:
        UserError: a stage failed, or stages.json was not written by this program.
    """
    make_folder(folder, "--output")
    known = {} if fresh else _read_records(folder / RECORDS)
    is_new = fresh  # an earlier stage has run: what a later stage left belongs to other inputs
    records: list[dict[str, Any]] = []
    for number, stage in enumerate(stages, start=1):
        head = f"[{number}/{total}] {stage.name}"
        record = known.get(stage.name, {}) if not is_new else {}
        is_same = record.get("fingerprint") == stage.fingerprint
        if is_same and record.get("status") == "done" and all((folder / name).exists() for name in stage.outputs):
            records.append(record)
            how = "reused, took"
        else:
            keeps = is_same and record.get("status") != "done" and RESUME in stage.words
            is_new, how = True, "done in"
            print(f"\n{head}: {stage.title}\n$ {stage.short_command}", flush=True)
            record = _run_stage(stage, records, folder, record if keeps else None)
        peak = format_bytes(record["peak_memory_bytes"])
        print(f"{head}: {how} {format_seconds(record['seconds'])}, peak memory {peak}", flush=True)
    return sum(record["seconds"] for record in records)


def _run_stage(
    stage: Stage, records: list[dict[str, Any]], folder: Path, earlier: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Run a stage. Append its record, and return it.

    Args:
        earlier: record of the same command, which continues with its outputs. Its time counts, too. None: the outputs
            are removed.

    Raises UserError if the stage fails or does not write its outputs, and what `run_command` raises.
    """
    record = {"name": stage.name, "title": stage.title, "command": stage.command, "fingerprint": stage.fingerprint}
    seconds_before, peak_before = (earlier.get(key, 0) if earlier else 0 for key in ("seconds", "peak_memory_bytes"))
    records.append(record | {"status": "started", "seconds": seconds_before, "peak_memory_bytes": peak_before})
    write_json(folder / RECORDS, {"stages": records})
    if earlier is None:
        _remove([folder / name for name in stage.outputs])
    started, peak, failure = time.perf_counter(), 0, STOPPED
    try:
        code, peak = run_command(stage.arguments)
        absent = [str(folder / name) for name in stage.outputs if not (folder / name).exists()]
        failure = f"wrote no {', '.join(absent)}" if absent else ""
        if code < 0:
            hint = ", which is what happens when memory runs out" if code == -signal.SIGKILL else ""
            failure = f"killed by {signal.Signals(-code).name}{hint}"
        elif code:
            failure = f"exit code {code}"
    finally:
        seconds = round(time.perf_counter() - started, 3)
        status = {"": "done", STOPPED: STOPPED}.get(failure, "failed")
        total = round(seconds_before + seconds, 3)
        records[-1] |= {"status": status, "seconds": total, "peak_memory_bytes": max(peak, peak_before)}
        write_json(folder / RECORDS, {"stages": records})
    if failure:
        is_input = code == USER_ERROR_EXIT_CODE
        advice = "Correct what the line above says, then repeat the command" if is_input else "Repeat the command"
        raise UserError(
            f"stage {stage.name}: failed after {format_seconds(seconds)}: {failure}. {advice}: it continues "
            f"with this stage. The command of the stage is: {stage.short_command}"
        )
    return records[-1]


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:  # of a link, only the link is removed
            path.unlink(missing_ok=True)


def _read_records(path: Path) -> dict[str, dict[str, Any]]:
    try:
        return {stage["name"]: stage for stage in read_json(path)["stages"]} if path.exists() else {}
    except (TypeError, KeyError):
        raise UserError(f"{path}: was not written by this program. Start again with --fresh.") from None
