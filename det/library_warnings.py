"""Warnings of libraries under detection that neither the caller nor the user can fix."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Text at the start of the warning, its category, and the module that it is attributed to.
KNOWN: tuple[tuple[str, type[Warning], str], ...] = (
    # The category and the words differ between versions of torch, and of Python.
    ("`torch.jit.script` is (deprecated|not supported)", Warning, r"torch\.jit"),
    ("torch.meshgrid: in an upcoming release", UserWarning, r"torch\.functional"),
    ("The given NumPy array is not writable", UserWarning, r"(detectron2|det)\."),
    ("__array__ implementation doesn't accept a copy keyword", DeprecationWarning, r"pycocotools\."),
    ("Importing from timm.models.layers is deprecated", FutureWarning, r"timm\."),
)
TRACING_NOTE = "is_fx_tracing will return true for both"  # logged by torch when detectron2 asks


@contextmanager
def library_warnings_ignored() -> Iterator[None]:
    """Ignore the known warnings in a block or a decorated function."""
    with warnings.catch_warnings():
        ignore_library_warnings()
        yield


def ignore_library_warnings() -> None:
    """Ignore the known warnings from now on."""
    for text, category, module in KNOWN:
        warnings.filterwarnings("ignore", text, category, module)


def drop_tracing_note() -> None:
    """Drop one message of torch's log."""
    logging.getLogger("torch.fx._symbolic_trace").addFilter(_is_no_tracing_note)


def _is_no_tracing_note(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(TRACING_NOTE)
