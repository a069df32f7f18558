"""Log messages of detection: on the console, in `log.txt`, and before the run has a folder."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path

from detectron2.utils import comm
from tqdm import tqdm

from crossmae.errors import PrintableFormatter
from crossmae.files import ODD_BYTES
from det.config import LOG


def set_up_console() -> None:
    """Show the log messages for the user, in every process."""
    if not any(isinstance(handler, ConsoleHandler) for handler in logging.getLogger().handlers):
        handler = ConsoleHandler()
        handler.setFormatter(PrintableFormatter())
        logging.getLogger().addHandler(handler)
        logging.getLogger().setLevel(logging.INFO)


class ConsoleHandler(logging.Handler):
    """Console output above the progress bar: messages of this project, and warnings of all libraries."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name == "detectron2.engine.train_loop":  # logs tracebacks of errors that the tool reports
            return False
        if record.levelno < logging.WARNING and not comm.is_main_process():
            return False
        return record.levelno >= logging.WARNING or record.name.split(".")[0] in ("det", "crossmae")

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


@contextmanager
def early_log() -> Iterator[MemoryHandler]:
    """Collect log messages before a run has a folder."""
    handler = MemoryHandler(10_000)
    logging.getLogger().addHandler(handler)
    try:
        yield handler
    finally:
        logging.getLogger().removeHandler(handler)


@contextmanager
def log_file(folder: Path, early: MemoryHandler | None = None) -> Iterator[None]:
    """Write all log messages to `log.txt`, starting with `early`'s messages."""
    if not comm.is_main_process():
        yield
        return
    handler = logging.FileHandler(folder / LOG, encoding="utf-8", errors=ODD_BYTES)
    handler.setFormatter(PrintableFormatter("[%(asctime)s] %(name)s %(levelname)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    if early is not None:
        early.setTarget(handler)
        early.flush()
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
