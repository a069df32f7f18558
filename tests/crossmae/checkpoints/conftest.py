"""Limits for tests of hostile and damaged files: address space, and the time of one read."""

from __future__ import annotations

import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from crossmae.errors import UserError

SECONDS = 2.0
MEMORY = 256 << 20


class TooSlow(BaseException):
    """No `except Exception` keeps it from ending the test."""


@contextmanager
def in_time() -> Iterator[None]:
    """An error of a read must be about the file: one of failed allocation means that too much was asked for."""

    def stop(*_: Any) -> None:
        raise TooSlow

    handler = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    except UserError as error:
        if any(word in str(error).lower() for word in ("memory", "alloc")):
            raise AssertionError(error) from None
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


@pytest.fixture
def bounded() -> Iterator[Any]:
    """Little more address space than the process has; a context that ends what takes too long."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    yield in_time
    resource.setrlimit(resource.RLIMIT_AS, before)
