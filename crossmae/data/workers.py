"""Loader workers: processes that leave signals to the main process, and whose death is explained."""

from __future__ import annotations

import errno
import logging
import multiprocessing.queues
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import AuthenticationError
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
from torch.utils.data import DataLoader, Dataset

from crossmae.errors import UserError, repeat_command

log = logging.getLogger(__name__)

# Signals that ask a run to stop: Ctrl-C, SLURM's, systemd's and `timeout`'s, a closed terminal's, `sbatch --signal`'s.
NAMES_OF_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
SIGNALS: tuple[signal.Signals, ...] = tuple(getattr(signal, name) for name in NAMES_OF_SIGNALS if hasattr(signal, name))
SHARED_MEMORY = Path("/dev/shm")
DEATH_SECONDS = 5.0  # longest time from the first trace of a worker's death to its end
NO_SHARED_MEMORY_EXIT_CODE, NO_FILES_EXIT_CODE, FAILED_EXIT_CODE = 75, 76, 77  # of a worker that cannot send a batch
_DEAD = re.compile(r"DataLoader worker \(pid(?:\(s\))? (\d+)[\d, ]*\) (?:is killed by signal: (\w[\w ]*)|exited)")
_CAUGHT = re.compile(r"Caught \w+ in DataLoader worker process (\d+)")
_EXIT_CODE = re.compile(r"exit code (\d+)")
MEMORY, SHARED = "memory ran out", "shared memory ran out"
CAUSES = {  # of a signal's name, and of an exit code
    "Killed": MEMORY,
    "Bus error": SHARED,
    "Segmentation fault": "a library crashed, perhaps on an image",
    "Aborted": "a library gave up",
    "Terminated": "another process ended it",
    str(NO_SHARED_MEMORY_EXIT_CODE): SHARED,
    str(NO_FILES_EXIT_CODE): "too few open files are allowed (ulimit -n)",
    str(FAILED_EXIT_CODE): "it could not send a batch, and printed why",
}


@contextmanager
def blocked_signals() -> Iterator[None]:
    """Block the run's signals, for example until new processes are ready.

    Windows cannot block signals.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def prepare_worker(_: int) -> None:
    """Ignore the run's signals, and end if a batch cannot be sent."""
    ignore_signals()
    sys.excepthook = _report_unless_cut_off
    # By default, the batch would be dropped, and the main process would wait for it forever.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_unsent)  # type: ignore[attr-defined]


def ignore_signals() -> None:
    """Ignore the run's signals except SIGTERM from the parent.

    Ctrl-C, SLURM, systemd and `timeout` signal every process of a run. Only the main process decides when to stop.
    SIGTERM from the main process must end the worker, because Python waits for its workers on exit. Only a thread can
    find out which process sent a signal.
    """
    others = set(SIGNALS) - {signal.SIGTERM}
    for number in others:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_with_parent, daemon=True).start()
    else:  # on macOS, torch ends a worker after any SIGTERM
        others.add(signal.SIGTERM)
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        signal.pthread_sigmask(signal.SIG_UNBLOCK, others)


def _end_with_parent() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)  # torch reports an error for any other exit code


def _report_unless_cut_off(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Report an error of a thread, unless the main process hung up."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


def _end_unsent(error: BaseException, _: object) -> None:
    """End a worker whose batch cannot be sent."""
    text = str(error)
    if _is_about_shared_memory(text):
        os._exit(NO_SHARED_MEMORY_EXIT_CODE)
    if "Too many open files" in text or getattr(error, "errno", None) == errno.EMFILE:
        os._exit(NO_FILES_EXIT_CODE)
    sys.stderr.write(f"{type(error).__name__}: {text}\n")
    sys.stderr.flush()
    os._exit(FAILED_EXIT_CODE)


def _is_about_shared_memory(text: str) -> bool:
    return "shared memory" in text or "file </torch_" in text


def own_cores() -> int:
    """Count the cores of this process, among the processes that torchrun started."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


def usable_workers(asked: int) -> int:
    """Limit the number of workers to the cores available to this process."""
    cores = own_cores()
    if asked > cores:
        log.info("%d processes read images, not %d: there are no more cores", cores, asked)
    return min(asked, cores)


class DeadWorker(UserError):
    """A worker that ended before its time."""


@contextmanager
def explain_dead_workers(
    key: str = "data.workers",
    last_checkpoint: Callable[[], Path | None] | None = None,
    number_of: Callable[[int], str] = lambda process: f"process {process}",
) -> Iterator[None]:
    """Turn torch's error about a dead worker into a DeadWorker.

    torch raises the error in a signal handler, so it comes out of any line of the main thread. Put a whole run into
    this context.

    Args:
        key: config key of the number of workers.
        last_checkpoint: finds the checkpoint to continue from, for the message.
        number_of: names a worker by the number of its process.
    """
    try:
        yield
    except DeadWorker as error:
        message = str(error)
        raise DeadWorker(message + _describe_checkpoint(last_checkpoint)) from error
    except RuntimeError as error:
        found = _find_end(error)
        if not found:
            raise
        worker, ended, cause = found
        name = number_of(worker) if isinstance(worker, int) else worker
        raise DeadWorker(
            f"{key}: a worker that reads images ({name}) {ended}. Probable cause: {cause} ({_describe_memory()}). "
            f"Lower {key}, where 0 reads in the training process, or enlarge shared memory (docker run --shm-size=8g)."
            f"{_describe_checkpoint(last_checkpoint)}"
        ) from error


def _find_end(error: RuntimeError) -> tuple[int | str, str, str] | None:
    """Find (worker, its end, probable cause) in torch's error.

    The worker is the number of its process, or a description.
    """
    text = str(error)
    if (caught := _CAUGHT.search(text)) and _is_about_shared_memory(text):
        return f"worker {int(caught[1]) + 1}", "could not make a batch", SHARED
    if not _DEAD.search(text):
        return None
    # While the loader waits, torch raises a second error, without the reason.
    texts = [text for text in (text, str(error.__cause__)) if _DEAD.search(text)]
    text = next((text for text in texts if "killed by" in text or _EXIT_CODE.search(text)), text)
    code, found = _EXIT_CODE.search(text), _DEAD.search(text)
    assert found is not None
    how = found[2]
    cause = CAUSES.get(how or (code[1] if code else ""), f"{MEMORY}, or {SHARED}")
    return (
        int(found[1]),
        f"was killed by a signal ({how})" if how else f"ended{f' with {code[0]}' if code else ''}",
        cause,
    )


def _describe_memory() -> str:
    memory = f"{psutil.virtual_memory().available / 1e9:.3g} GB of memory available"
    try:
        return f"{memory}, {shutil.disk_usage(SHARED_MEMORY).free / 1e9:.3g} GB free in {SHARED_MEMORY}"
    except OSError:
        return memory


def _describe_checkpoint(find: Callable[[], Path | None] | None) -> str:
    if find is None:
        return ""
    found = find()
    return f" {repeat_command()} to continue from {found}." if found else " There is no checkpoint yet."


class Loader(DataLoader[Any]):
    """A DataLoader whose workers leave signals to the main process, and whose dead workers are explained.

    Args:
        key: config key of the number of workers, for errors.
    """

    def __init__(self, dataset: Dataset[Any], workers: int, key: str = "data.workers", **named: Any) -> None:
        super().__init__(dataset, num_workers=workers, worker_init_fn=prepare_worker, **named)
        self.key = key

    def __iter__(self) -> Any:
        with blocked_signals():
            batches = super().__iter__()
        return _Batches(batches, self.key) if self.num_workers else batches


class _Batches:
    """The batches of a loader with workers."""

    def __init__(self, batches: Any, key: str) -> None:
        self.batches, self.key = batches, key

    def __iter__(self) -> _Batches:
        return self

    def __len__(self) -> int:
        return len(self.batches)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batches, name)

    def __next__(self) -> Any:
        try:
            with explain_dead_workers(self.key, number_of=self._name):
                return self._next()
        except DeadWorker:
            with suppress(RuntimeError):  # about another dead worker
                self.batches._shutdown_workers()
            raise

    def _next(self) -> Any:
        try:
            return next(self.batches)
        except (OSError, EOFError, AuthenticationError, RuntimeError) as error:
            # The main process asks a worker for the memory of a batch: a dead worker does not answer. And torch's error
            # may lack the reason.
            is_other = isinstance(error, RuntimeError) and not _DEAD.search(str(error))
            dead = None if is_other or _CAUGHT.search(str(error)) else self._find_dead()
            if dead is None:
                raise
            name = signal.strsignal(-dead.exitcode) if dead.exitcode < 0 else None
            end = f"is killed by signal: {name}" if name else f"exited unexpectedly with exit code {dead.exitcode}"
            raise RuntimeError(f"DataLoader worker (pid {dead.pid}) {end}.") from error

    def _find_dead(self) -> Any:
        """Find a worker that ended, also a little later than its answer."""
        end = time.monotonic() + DEATH_SECONDS
        while time.monotonic() < end:
            if dead := next((worker for worker in self.workers if worker.exitcode), None):
                return dead
            time.sleep(0.02)
        return None

    def _name(self, process: int) -> str:
        workers = self.workers
        number = next((n for n, worker in enumerate(workers, start=1) if worker.pid == process), None)
        return f"worker {number} of {len(workers)}, process {process}" if number else f"process {process}"

    @property
    def workers(self) -> list[multiprocessing.Process]:
        """The processes."""
        return list(self.batches._workers)
