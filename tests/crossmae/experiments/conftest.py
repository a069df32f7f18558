"""Runs the commands of a grid in this process: a process of its own takes longer to start than to train on noise.

tests/crossmae/experiments/test_cells.py has the processes, their signals, costs and ends.
"""

from __future__ import annotations

import io
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from typing import Any, BinaryIO

import pytest

from crossmae.errors import PROGRAMS
from crossmae.experiments import cells
from crossmae.experiments.commands import Cost
from tests.tools.command_line import exit_code


class CommandInProcess:
    """A command that has ended when it is made. It takes the place of `RunningCommand`."""

    def __init__(self, command: Sequence[str], log: BinaryIO, environment: Mapping[str, str], *_: Any) -> None:
        script, *words = command[1:]
        name = words.pop(0) if script == "-m" else script.removesuffix(".py").replace("/", ".")
        main = import_module(name).main
        root, started = logging.getLogger(), (time.monotonic(), time.process_time())
        handlers, level = list(root.handlers), root.level
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(PROGRAMS)
            patch.setattr(sys, "argv", [script, *words])
            for key, value in environment.items():
                patch.setenv(key, value)
            printed = io.StringIO()
            with redirect_stdout(printed), redirect_stderr(printed):
                self.code = exit_code(main, *words)
            log.write(printed.getvalue().encode(errors="backslashreplace"))
        root.handlers, root.level = handlers, level
        self.cost = Cost(time.process_time() - started[1], time.monotonic() - started[0], None, None, 1)

    def poll(self) -> int:
        """Return the exit code."""
        return self.code


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every command of a grid in this process."""
    monkeypatch.setattr(cells, "RunningCommand", CommandInProcess)
