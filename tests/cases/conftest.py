"""Writes the inputs of ../shared/cases once per session, and runs tools on them in this process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tools.command_line import exit_code

CASES = Path(__file__).parents[3] / "shared/cases"
Written = Callable[..., Path]
Tool = Callable[..., tuple[int, str]]


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Run a generator of ../shared/cases, such as `detection/generate.py`, and return the folder of its files."""
    done: dict[tuple[str, ...], Path] = {}

    def write(script: str, *names: str) -> Path:
        if not (CASES / script).is_file():
            pytest.skip(f"../shared/cases/{script} is not there")
        key = (script, *names)
        if key not in done:
            folder = tmp_path_factory.mktemp(Path(script).stem)
            command = [sys.executable, str(CASES / script), str(folder), *names]
            subprocess.run(command, check=True, capture_output=True, cwd=folder)
            done[key] = folder
        return done[key]

    return write


@pytest.fixture
def tool(capfd: pytest.CaptureFixture[str]) -> Tool:
    """Run the main function of a tool as its command line does, and return its exit code and everything printed."""

    def run(main: Callable[[list[str]], None], *arguments: str | Path) -> tuple[int, str]:
        capfd.readouterr()
        code = exit_code(main, *map(str, arguments))
        output, errors = capfd.readouterr()
        return code, output + errors

    return run
