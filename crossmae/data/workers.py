"""Loader workers: processes that leave signals to the main process."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader, Dataset

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def blocked_signals() -> Iterator[None]:
    """Block the run's signals, for example until new processes are ready."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals(_: int) -> None:
    """Ignore the run's signals except SIGTERM from the parent.

    Ctrl-C, SLURM, systemd and `timeout` signal every process of a run. Only the main process decides when to stop.
    SIGTERM from the main process must end the worker, because Python waits for its workers on exit. Only a thread can
    find out which process sent a signal.
    """
    for number in set(SIGNALS) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        threading.Thread(target=_end_with_parent, daemon=True).start()
    else:  # on macOS, torch ends a worker after any SIGTERM
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _end_with_parent() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)  # torch reports an error for any other exit code


def usable_workers(asked: int) -> int:
    """Limit the number of workers to the cores available to this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    if asked > cores:
        log.info("%d processes read images, not %d: there are no more cores", cores, asked)
    return min(asked, cores)


class Loader(DataLoader[Any]):
    """A DataLoader whose workers leave Ctrl-C and SIGTERM to the main process."""

    def __init__(self, dataset: Dataset[Any], workers: int, **named: Any) -> None:
        super().__init__(dataset, num_workers=workers, worker_init_fn=ignore_signals, **named)

    def __iter__(self) -> Any:
        with blocked_signals():
            return super().__iter__()
