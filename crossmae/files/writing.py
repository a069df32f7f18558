"""Write files that are complete or absent, with errors that name the file, the free space and a remedy."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from crossmae.errors import UserError, describe_disk_error, free_space
from crossmae.files.expansion import why_unexpanded
from crossmae.files.leftovers import probe_name, temporary_name

# Error handler for text files that contain names. Bytes that are not UTF-8 become escapes, which JSON can decode.
ODD_BYTES = "backslashreplace"
# Errors without a number by which libraries report that a file cannot be written: torch, NumPy, Pillow.
LIBRARY_ERRORS = re.compile(
    r"PytorchStreamWriter failed|inline_container|iostream error|Parent directory .* does not exist"
    r"|File .* cannot be opened|requested and \d+ written|encoder error -\d+"
)
RUST_ERROR = re.compile(r"\(os error (\d+)\)")  # safetensors
PROBE_BYTES = 1 << 20
UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP)  # some network file systems cannot flush a folder


class WriteError(UserError, OSError):
    """A file that cannot be written.

    Attributes:
        path: the file.
        errno: number of the operating system's error; None: unknown.
    """

    path: Path

    def __reduce__(self) -> tuple[Any, ...]:
        return _write_error, (self.args[0], self.path, self.errno, self.strerror)


def _write_error(message: str, path: Path, number: int | None, reason: str | None) -> WriteError:
    error = WriteError(message)
    error.path, error.errno, error.strerror = path, number, reason
    return error


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, then rename it.

    The temporary file has the same name, in a temporary folder next to `path`, because some libraries leave files next
    to those they write. The content is on disk before the file is renamed. If anything fails, `path` is unchanged and
    the temporary folder is removed. Only a killed process leaves the folder behind: see `leftovers.sweep`.

    Raises WriteError if the file cannot be written, also for errors of the libraries that `write` calls.
    """
    with temporary_folder(path) as folder:
        temporary = folder / path.name
        write(temporary)
        allow_reading(temporary)
        sync_file(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Make a folder next to `path` for files that will replace it.

    The folder is removed at the end. Raises WriteError like `name_write_errors`.
    """
    folder = path.with_name(temporary_name(path.name))
    try:
        with name_write_errors(path):
            folder.mkdir(exist_ok=True)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def name_write_errors(path: Path) -> Iterator[None]:
    """Turn a failure to write `path` into a WriteError.

    Other errors stay as they are: mistakes of the program, and errors that name a file elsewhere.
    """
    try:
        yield
    except Exception as error:  # libraries have types of their own
        cause = _cause(error, path)
        if cause is None:
            raise
        if cause.errno in (None, errno.ENOENT) and not os.path.isdir(path.parent):  # unlike Path.is_dir, never raises
            cause = FileNotFoundError(errno.ENOENT, f"there is no folder {path.parent}")
        message = f"{path}: cannot be written: {describe_disk_error(cause, path.parent)}"
        raise _write_error(message, path, cause.errno, cause.strerror) from error


def _cause(error: BaseException, path: Path) -> OSError | None:
    """Find the operating system's error behind an error, if it concerns `path`."""
    text, folder = " ".join(str(error).split()), path.with_name(temporary_name(path.name))
    if isinstance(error, WriteError) and folder not in error.path.parents:
        return None  # has been named
    if isinstance(error, OSError) and error.errno is not None:
        named = [Path(os.fsdecode(name)) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
        ours = (path, *path.parents, folder)
        return error if not named or any(name in ours or folder in name.parents for name in named) else None
    if type(error).__name__ == "SafetensorError" and (found := RUST_ERROR.search(text)):
        return OSError(int(found[1]), os.strerror(int(found[1])))
    if not (isinstance(error, OSError | RuntimeError) and LIBRARY_ERRORS.search(text)):
        return None
    earlier = error.__context__
    if isinstance(earlier, OSError) and earlier.errno is not None:
        return earlier
    return _probe(path, folder) or OSError(None, text[:200])


def _probe(path: Path, folder: Path) -> OSError | None:
    """Find out why a library failed, by writing more."""
    try:
        with open(folder / path.name, "ab") as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error
    return None


def put_in_place(new: Path, path: Path) -> None:
    """Rename a folder to `path` at once.

    The rename is flushed to disk. An existing folder at `path` is afterwards at `new`. Systems without an exchange of
    names rename twice: a process that is killed in between leaves the existing folder under a name that ends with
    .replaced.
    """
    if not path.exists():
        os.rename(new, path)
    elif not _exchange(new, path):
        old = path.with_name(f"{path.name}.replaced")
        os.rename(path, old)
        os.rename(new, path)
        os.rename(old, new)
    sync_folder(path.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names at once. False: the system cannot."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    here = -100  # AT_FDCWD
    if call(here, os.fsencode(first), here, os.fsencode(second), ctypes.c_uint(2)) == 0:  # RENAME_EXCHANGE
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS):
        return False
    raise OSError(number, os.strerror(number), str(second))


def allow_reading(path: Path) -> None:
    """Give a file the default permissions, which safetensors does not."""
    path.chmod(0o666 & ~_umask())


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically, with other bytes escaped, such as \\udcff."""
    stream_text(path, lambda file: file.write(text))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def stream_text(path: Path, write: Callable[[TextIO], object]) -> None:
    """Let `write` fill a UTF-8 file atomically, with `write_text`'s escapes."""

    def fill(temporary: Path) -> None:
        with open(temporary, "w", encoding="utf-8", errors=ODD_BYTES, newline="") as file:
            write(file)

    write_atomically(path, fill)


class JsonArray:
    """A JSON array that is written entry by entry, one entry per line."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.count = file, 0
        file.write("[")

    def add(self, entry: Any) -> None:
        """Write one entry."""
        text = json.dumps(entry, ensure_ascii=False, allow_nan=False)
        self.file.write(f",\n{text}" if self.count else f"\n{text}")
        self.count += 1

    def close(self) -> None:
        """Write the end of the array. The file stays open."""
        self.file.write("\n]")


def sync_file(path: Path) -> None:
    """Flush the content of a file to disk."""
    with open(path, "rb" if os.name == "posix" else "r+b") as file:  # Windows flushes only what may be written
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush the renames in a folder to disk.

    Windows opens no folders, and flushes renames itself.
    """
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


def check_space(folder: Path, needed_bytes: float, key: str) -> None:
    """Check that a folder's disk has room for `needed_bytes`.

    Raises UserError if there is less free space. The message has both numbers, and names `key`, the config key or flag
    of the folder.
    """
    there, free = free_space(folder)
    if free is not None and free < needed_bytes:
        raise UserError(
            f"{key}: {folder} needs {needed_bytes / 1e9:.3g} GB, but only {free / 1e9:.3g} GB are free in {there}. "
            "Free space, or name another folder."
        )


def make_folder(folder: Path, key: str) -> None:
    """Create a folder, and test that files can be written there.

    Raises UserError if the folder cannot be created or written. The message names `key`, the config key or flag of the
    folder.
    """
    if why := why_unexpanded(folder):
        raise UserError(f"{key}: {folder}: {why}")
    probe = folder / probe_name()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
        raise UserError(f"{key}: cannot write in {folder}: {describe_disk_error(error, folder)}") from None


def check_writable(folder: Path, key: str) -> None:
    """Check that a folder can be written, without changing the folder."""
    if why := why_unexpanded(folder):
        raise UserError(f"{key}: {folder}: {why}")
    there = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())
    if not there.is_dir():
        raise UserError(f"{key}: cannot write in {folder}: {there} is a file. Name another folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{key}: cannot write in {folder}: no permission in {there}. Name another folder.")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_destination(path: Path, *, force: bool = False) -> None:
    """Raise UserError if the file exists and must not be overwritten."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder. Name the file to write.")
    if path.exists() and not force:
        raise UserError(f"{path}: exists already. Name another file, or overwrite it with --force.")
