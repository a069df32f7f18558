"""Errors that a user can cause, and their display by every command line.

A library function raises `UserError` with the text `<file or key>: <what is wrong>. <What to do.>` A tool wraps its
main function in `run_cli`, so that the user sees one line instead of a traceback.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from typing import Any

SOME_FAILED_EXIT_CODE = 1
USER_ERROR_EXIT_CODE = 2
INTERRUPTED_EXIT_CODE = 130
BROKEN_PIPE_EXIT_CODE = 141
# Faults of the disk: full, over quota, read-only, no permission, broken.
DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)


class UserError(ValueError):
    """A fault outside the program: a path, a key, a file, a combination of settings."""


def run_cli(main: Callable[[], None]) -> None:
    """Run `main` and turn errors of the user into one line.

    A `UserError` becomes an `error: ...` line on stderr and exit code 2, Ctrl-C exit code 130.
    """
    if isinstance(sys.stdout, TextIOWrapper):  # as Python's stderr: a name that is not UTF-8 ends no tool
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
        return
    except UserError as error:
        message = " ".join(str(error).split()) if "\n" not in str(error) else str(error)
    except BrokenPipeError:  # the reader of the pipe has ended, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(BROKEN_PIPE_EXIT_CODE) from None
    except OSError as error:
        if error.errno not in DISK_TROUBLE:
            raise
        message = f"{error.filename or 'writing'}: {error.strerror}"
    except MemoryError:
        message = "there is not enough memory for this"
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED_EXIT_CODE) from None
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(USER_ERROR_EXIT_CODE)


def exit_if_any(failures: Sequence[str], heading: str) -> None:
    """Print failures under a heading, if any, and exit with code 1."""
    if failures:
        print("\n".join([f"error: {heading}", *failures]), file=sys.stderr)
        raise SystemExit(SOME_FAILED_EXIT_CODE)


def import_extra(module: str, what: str, extra: str = "data") -> Any:
    """Import a library of an extra in setup.py.

    Raises:
        UserError: the library is not installed; the message names `what`, which needs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        library = module.partition(".")[0]
        raise UserError(f'{what} needs {library}: pip install -e ".[{extra}]"') from None


def shorten(names: Sequence[str], most: int = 5, separator: str = ", ") -> str:
    """List the first `most` names, and count the others."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return separator.join(names[:most]) + more
