"""Claims of folders: one run at a time, and one kind of run for ever."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from crossmae.errors import UserError
from crossmae.files.leftovers import is_running
from crossmae.files.reading import read_side_file, special_kind
from crossmae.files.writing import make_folder, write_json

log = logging.getLogger(__name__)

CLAIM_LOCK, CLAIM_RECORD = ".claim.lock", ".claim.json"
HEARTBEAT_SECONDS = 5.0  # the process of a claim touches the record so often
WATCH_SECONDS = 12.0  # longest time that a claim watches the record of another machine
SILENT_SECONDS = 60.0  # a record that was not touched for so long is not watched
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)  # errors of file systems without locks

# Windows has neither these locks nor forks. There, the record alone decides.
fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None

_locked_files: set[IO[bytes]] = set()


@contextmanager
def claim(folder: Path, kind: str, key: str = "output_dir", keeps_kind: bool = True) -> Iterator[None]:
    """Claim a folder for this process, creating the folder if necessary.

    The claim is a lock of the operating system, so it ends with the process in any case. A record next to it has kind,
    machine, process and time. The record of a killed process is logged, and the folder taken over. Where a file system
    has no locks, or they hold on one machine only, the record decides: its process touches it every few seconds.

    Args:
        kind: kind of run, such as "pretraining". The folder keeps the kind of its first claim.
        key: config key or flag of the folder, for the error.
        keeps_kind: False: the folder keeps no kind, and no file of the claim.

    Raises:
        UserError: another process has claimed the folder, or the folder is of another kind.
    """
    make_folder(folder, key)
    lock, has_lock = _open_lock(folder / CLAIM_LOCK, key)
    with lock:
        record = _read_record(folder / CLAIM_RECORD)
        _check_kind(folder, record.get("kind"), kind, key)
        if has_lock is False or _is_alive(folder, record, has_lock=has_lock is True):
            raise _in_use(folder, record, key)
        if "process" in record:
            log.warning("%s: %s ended without notice; its folder is taken over", folder, _holder(record))
        try:
            with _recorded(folder / CLAIM_RECORD, kind), _closed_in_children(lock):
                yield
        finally:
            for name in () if keeps_kind else (CLAIM_RECORD, CLAIM_LOCK):
                with suppress(OSError):
                    (folder / name).unlink()


def check_folder(folder: Path, kind: str, key: str = "output_dir") -> None:
    """Reject a folder of another kind of run, without claiming it.

    Raises UserError as `claim` does. Writes and logs nothing.
    """
    _check_kind(folder, _peek_record(folder).get("kind"), kind, key)


def check_unused(folder: Path, key: str = "output_dir") -> None:
    """Reject a folder that another process uses, by its record alone.

    Raises UserError as `claim` does. Writes nothing and does not wait. A process on another machine counts if it has
    touched its record lately.
    """
    record = _peek_record(folder)
    process = record.get("process")
    try:
        touched = (folder / CLAIM_RECORD).stat().st_mtime
    except OSError:
        return
    if record.get("host") == socket.gethostname():
        is_used = isinstance(process, int) and process != os.getpid() and is_running(process, touched)
    else:
        is_used = process is not None and time.time() - touched < SILENT_SECONDS
    if is_used:
        raise _in_use(folder, record, key)


def _peek_record(folder: Path) -> dict[str, Any]:
    """Read the record of a folder.

    A damaged record counts as none, because `claim` logs it.
    """
    try:
        return read_side_file(folder / CLAIM_RECORD)
    except UserError:
        return {}


def keep_kind(folder: Path, kind: str, key: str = "output_dir") -> None:
    """Record the kind of a folder that several processes share.

    The folder is created if necessary. Unlike `claim`, this function keeps no process of the same kind away.

    Args:
        kind: see `claim`.
        key: see `claim`.

    Raises UserError if the folder is of another kind.
    """
    make_folder(folder, key)
    known = _read_record(folder / CLAIM_RECORD).get("kind")
    _check_kind(folder, known, kind, key)
    if known != kind:
        write_json(folder / CLAIM_RECORD, {"kind": kind})


def _check_kind(folder: Path, known: object, kind: str, key: str) -> None:
    if isinstance(known, str) and known != kind:
        raise UserError(f"{key}: {folder} is the folder of a {known} run, not of {kind}. Name another folder.")


def _in_use(folder: Path, record: dict[str, Any], key: str) -> UserError:
    return UserError(
        f"{key}: {folder} is in use by {_holder(record)}. Wait for its end or stop it, or name another folder."
    )


def _open_lock(path: Path, key: str) -> tuple[IO[bytes], bool | None]:
    """Open the lock file, and lock it without waiting."""
    while True:
        try:
            if found := special_kind(path):
                raise OSError(errno.EINVAL, f"it is {found}", str(path))
            lock = open(path, "ab", buffering=0)  # noqa: SIM115 - it stays open as long as the claim
            has_lock = lock_now(lock)
            if not has_lock or (path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat())):
                return lock, has_lock
            lock.close()  # the holder has removed the file just now: lock the new one
        except OSError as error:
            raise UserError(f"{path}: cannot be opened: {error.strerror}. Remove it, or name another {key}.") from None


def _read_record(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return read_side_file(path)
    except UserError as error:
        log.warning("ignoring the record of earlier runs: %s", error)
        return {}


def _holder(record: dict[str, Any]) -> str:
    """Describe the process of a record."""
    if "process" not in record:
        return "another process"
    kind, process, host, started = (str(record.get(name))[:80] for name in ("kind", "process", "host", "started"))
    return f"a {kind} run: process {process} on {host}, since {started}"


def _is_alive(folder: Path, record: dict[str, Any], has_lock: bool) -> bool:
    """Find out whether the process of a record still runs.

    Args:
        has_lock: this process has the lock. False: the file system has no locks.
    """
    path = folder / CLAIM_RECORD
    if "process" not in record:
        return False
    try:
        touched = path.stat().st_mtime
        if record.get("host") == socket.gethostname():
            process = record["process"]
            return not has_lock and isinstance(process, int) and is_running(process, touched)
        os.utime(folder / CLAIM_LOCK)  # by the clock of the file system
        if (folder / CLAIM_LOCK).stat().st_mtime - touched > SILENT_SECONDS:
            return False
        log.info("%s: watching for %.0f s whether %s still runs", folder, WATCH_SECONDS, _holder(record))
        end = time.monotonic() + WATCH_SECONDS
        while time.monotonic() < end:
            time.sleep(WATCH_SECONDS / 20)
            with open(path, "rb") as file:  # opening makes a network file system look again
                if os.fstat(file.fileno()).st_mtime != touched:
                    return True
    except OSError:
        return False
    return False


@contextmanager
def _recorded(path: Path, kind: str) -> Iterator[None]:
    """Keep a record of this process, then leave its kind."""
    started = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    write_json(path, {"kind": kind, "host": socket.gethostname(), "process": os.getpid(), "started": started})
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):
                os.utime(path)

    threading.Thread(target=touch, name="claim", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        try:
            write_json(path, {"kind": kind})
        except UserError as error:
            log.warning("the claim of %s cannot be ended: %s", path.parent, error)


@contextmanager
def _closed_in_children(lock: IO[bytes]) -> Iterator[None]:
    """Keep the lock out of forked processes, which may live longer."""
    _locked_files.add(lock)
    try:
        yield
    finally:
        _locked_files.discard(lock)


def _close_in_child() -> None:
    for lock in _locked_files:
        lock.close()
    _locked_files.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def lock_now(file: IO[bytes]) -> bool | None:
    """Lock an open file without waiting.

    The lock ends when the file is closed in this process and all processes that inherited it.

    Returns:
        False if another process has the lock, None if the file system has no locks.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno == errno.EACCES:
            return False
        if error.errno in NO_LOCKS:
            return None
        raise
    return True


@contextmanager
def locked(file: IO[bytes]) -> Iterator[None]:
    """Wait for the lock of an open file, for a few writes."""
    if fcntl is None:
        yield
        return
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)
