"""Proves what a command line shows: one line for what users cause, a traceback for what they do not."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from crossmae.errors import INTERRUPTED_EXIT_CODE, USER_ERROR_EXIT_CODE, UserError, run_cli


def raising(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (UserError("data.train:  no\tsuch folder"), USER_ERROR_EXIT_CODE, "error: data.train: no such folder\n"),
        (UserError("no\n| table |"), USER_ERROR_EXIT_CODE, "error: no\n| table |\n"),
        (OSError(errno.ENOSPC, "No space left", "a.pth"), USER_ERROR_EXIT_CODE, "error: a.pth: No space left\n"),
        (MemoryError(), USER_ERROR_EXIT_CODE, "error: there is not enough memory for this\n"),
        (KeyboardInterrupt(), INTERRUPTED_EXIT_CODE, "interrupted\n"),
    ],
)
def test_the_users_trouble_is_one_line(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, shown: str
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        run_cli(raising(error))
    assert exit_info.value.code == code
    assert capsys.readouterr().err == shown


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError(errno.ENOTTY, "a bug")])
def test_our_own_trouble_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error), match="a bug"):
        run_cli(raising(error))
