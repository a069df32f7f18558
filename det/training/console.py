"""Log messages of detection: on the console, and in `log.txt`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path

from crossmae.errors import ConsoleHandler, PrintableFormatter
from crossmae.files import ODD_BYTES
from det.config import LOG


def set_up_console() -> None:
    """Show the log messages for the user, in every process."""
    if not any(isinstance(handler, ConsoleHandler) for handler in logging.getLogger().handlers):
        logging.getLogger().addHandler(ConsoleHandler())
        logging.getLogger().setLevel(logging.INFO)


@contextmanager
def log_file(folder: Path, is_main: bool) -> Iterator[Callable[[], None]]:
    """Write all log messages to `log.txt`.

    Yields the function that starts the file. It is called when the run has its folder.
    """
    if not is_main:
        yield lambda: None
        return
    early, root, files = MemoryHandler(10_000), logging.getLogger(), ExitStack()
    root.addHandler(early)

    def start() -> None:
        file = logging.FileHandler(folder / LOG, encoding="utf-8", errors=ODD_BYTES)
        files.callback(file.close)
        file.setFormatter(PrintableFormatter("[%(asctime)s] %(name)s %(levelname)s: %(message)s"))
        early.setTarget(file)
        early.flush()
        early.capacity = 1  # from now on, every message goes to the file at once

    try:
        yield start
    finally:
        root.removeHandler(early)
        early.close()
        files.close()
