"""What the command lines of detection show while they work."""

from __future__ import annotations

import logging
import sys
import warnings

from detectron2.utils import comm
from tqdm import tqdm

# What libraries warn of that neither their caller nor the user can change.
LIBRARY_WARNINGS = ("The given NumPy array is not writable", "torch.meshgrid: in an upcoming release", "Glyph ")


def set_up_console() -> None:
    """Show log lines, less those that concern nobody; again in every process."""
    for text in LIBRARY_WARNINGS:
        warnings.filterwarnings("ignore", text, UserWarning)
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    if not any(isinstance(handler, ConsoleHandler) for handler in logging.getLogger().handlers):
        logging.getLogger().addHandler(ConsoleHandler())
        logging.getLogger().setLevel(logging.INFO)


class ConsoleHandler(logging.Handler):
    """Shows what concerns the user, above the progress bar: our own lines, and the warnings of everybody else."""

    def filter(self, record: logging.LogRecord) -> bool:
        """detectron2 logs a traceback of every error that ends training; the error itself is shown by the tool."""
        if record.name == "detectron2.engine.train_loop":
            return False
        if record.levelno < logging.WARNING and not comm.is_main_process():
            return False
        return record.levelno >= logging.WARNING or record.name.split(".")[0] in ("det", "crossmae")

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line without tearing the bar."""
        tqdm.write(self.format(record), file=sys.stderr)
