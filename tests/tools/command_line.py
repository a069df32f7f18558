"""Running a tool as its command line does, for the tests of tools."""

from __future__ import annotations

from collections.abc import Callable

from crossmae.errors import run_cli


def exit_code(main: Callable[[list[str]], None], *arguments: str) -> int:
    """Exit code of the command with these arguments."""
    try:
        run_cli(lambda: main(list(arguments)))
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0
