"""Shard files by paths, globs and brace lists, on this machine or at any URL that fsspec supports."""

from __future__ import annotations

import errno
import glob
import logging
import math
import os
import re
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from crossmae.data.paths import match_pattern
from crossmae.errors import UserError

MOST_NAMES, MOST_BRACES = 1_000_000, 20  # files and pairs of braces of a brace list
MAX_OPEN = 128  # files per process; the usual limit of the system is 1,024
PAUSES = (1.0, 2.0, 4.0)  # seconds between attempts of a remote read, so that a run survives short network failures

# Entries of fsspec's file information that change when a file changes. Every file system has some of these entries.
MARKS = ("ETag", "etag", "md5Hash", "Content-MD5", "generation", "LastModified", "Last-Modified", "mtime", "created")

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredFile:
    """A file on this machine or on a remote file system.

    Attributes:
        name: name for messages.
        path: path of the file within its file system.
        url: URL that opens the file system with fsspec; "" for a file on this machine.
    """

    name: str
    path: str
    url: str = ""

    @property
    def identity(self) -> str:
        """Text that identifies the file, in most cases also under different names."""
        if not self.url:
            return os.path.realpath(self.path)
        return f"{self.url} {self.path}" if "::" in self.url else self.name

    def inside(self, name: str) -> StoredFile:
        """Return the file `name` in this folder."""
        return StoredFile(f"{self.name.rstrip('/')}/{name}", f"{self.path.rstrip('/')}/{name}", self.url)

    def sibling(self, name: str) -> StoredFile:
        """Return the file `name` in the same folder."""
        folder, slash, own = self.path.rpartition("/")
        shown = self.name.removesuffix(own)
        return StoredFile(f"{shown}{name}", f"{folder}{slash}{name}", self.url)


def is_url(value: str) -> bool:
    """Check whether a text is `protocol://...`, or several chained with `::`."""
    return "://" in value or "::" in value


def expand_braces(pattern: str) -> list[str]:
    """Expand `a{0..2}`, `{08..11}` (keeps leading zeros) and `{x,y}`.

    Raises UserError for more than `MOST_NAMES` names.
    """
    parts = re.findall(r"\{([^{}]*)\}", pattern)
    spans = [re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", part) for part in parts]
    counts = [int(span[2]) - int(span[1]) + 1 if span else part.count(",") + 1
              for part, span in zip(parts, spans, strict=True)]  # fmt: skip
    if len(parts) > MOST_BRACES or math.prod(max(count, 1) for count in counts) > MOST_NAMES:
        raise UserError(f"{pattern}: names more than {MOST_NAMES:,} files. Name fewer, or a pattern with *.")
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    span = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", match[1])
    if span:
        width = len(span[1]) if span[1].startswith("0") else 0
        choices = [str(number).zfill(width) for number in range(int(span[1]), int(span[2]) + 1)]
    else:
        choices = match[1].split(",")
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [name for choice in choices for name in expand_braces(f"{before}{choice}{after}")]


def find_files(pattern: str, key: str) -> list[StoredFile]:
    """List the files of a path, URL, glob (sorted) or brace list."""
    patterns = [pattern] if os.path.exists(pattern) else expand_braces(pattern)
    files = [file for one in patterns for file in _glob(one, key)]
    if not files:
        raise UserError(f"{key}: {pattern} names no file. Count upwards in its range.")
    return files


def locate(value: str, key: str) -> StoredFile:
    """Locate the file or folder of a path or URL."""
    if is_url(value):
        filesystem, path = open_filesystem(value, key)
        if not isinstance(filesystem, LocalFileSystem):
            return StoredFile(str(filesystem.unstrip_protocol(path)), path, value)
        value = path
    path = os.path.expanduser(value)
    return StoredFile(path, path)


def _glob(pattern: str, key: str) -> list[StoredFile]:
    place = locate(pattern, key)
    if not glob.has_magic(place.path) or (not place.url and os.path.exists(place.path)):
        return [place]
    if not place.url:
        return [StoredFile(path, path) for path in match_pattern(place.path, key)]
    filesystem, path = open_filesystem(pattern, key)
    found = [StoredFile(str(filesystem.unstrip_protocol(one)), one, pattern) for one in sorted(filesystem.glob(path))]
    if not found:
        raise UserError(f"{key}: no file matches {pattern}. Correct the pattern.")
    return found


def open_filesystem(url: str, key: str) -> tuple[Any, str]:
    """Open the file system of a URL, cached by fsspec."""
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        why = str(error).rstrip(".")
        raise UserError(
            f"{key}: {url} cannot be opened: {why}. Correct the URL, or install the package for its protocol."
        ) from None
    return filesystem, path


def change_marks(file: StoredFile) -> dict[str, str]:
    """Return the size, as "bytes", and other values that detect changes."""
    if not file.url:
        status = os.stat(file.path)
        return {"bytes": str(status.st_size), "mtime": str(status.st_mtime_ns)}
    info = _patiently(lambda: open_filesystem(file.url, file.name)[0].info(file.path), file.name)
    return {"bytes": str(info["size"]), **{mark: str(info[mark]) for mark in MARKS if mark in info}}


def open_file(file: StoredFile) -> BinaryIO:
    """Open a file for reading."""
    if not file.url:
        return open(file.path, "rb")
    opened: BinaryIO = open_filesystem(file.url, file.name)[0].open(file.path, "rb")
    return opened


def read_small(file: StoredFile) -> bytes | None:
    """Read a whole file, or return None if missing or forbidden."""
    try:
        if not file.url:
            with open(file.path, "rb") as opened:
                return opened.read()
        content: bytes = _patiently(lambda: open_filesystem(file.url, file.name)[0].cat_file(file.path), file.name)
        return content
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None


class RangeReader:
    """Reader of byte ranges of files, for many threads. The most recent local files stay open.

    A pickled copy opens the files again. The class has no lock, because a fork could leave a lock locked. Each
    operation on the dict is atomic.
    """

    def __init__(self) -> None:
        self._open: dict[str, _Descriptor] = {}

    def __reduce__(self) -> tuple[type[RangeReader], tuple[()]]:
        return RangeReader, ()

    def read(self, file: StoredFile, start: int, size: int) -> bytes:
        """Read at most `size` bytes from `start`.

        Raises OSError if the file cannot be read. Remote file systems also raise errors of their own libraries.
        """
        if not file.url:
            descriptor = self._descriptor(file.path)  # keeps the file open if another thread clears the dict
            return os.pread(descriptor.number, size, start)
        filesystem = open_filesystem(file.url, file.name)[0]
        data: bytes = _patiently(lambda: filesystem.cat_file(file.path, start=start, end=start + size), file.name)
        return data

    def _descriptor(self, path: str) -> _Descriptor:
        descriptor = self._open.get(path)
        if descriptor is None:
            if len(self._open) >= MAX_OPEN:
                self._open.clear()
            try:
                opened = _Descriptor(path)
            except OSError as error:
                if error.errno != errno.EMFILE:
                    raise
                self._open.clear()  # the system allows fewer open files
                opened = _Descriptor(path)
            descriptor = self._open.setdefault(path, opened)
        return descriptor


class _Descriptor:
    """A file descriptor that is closed when its last reference is deleted."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.number)  # also at the end of the program, unlike `__del__`


def _patiently(read: Callable[[], T], name: str) -> T:
    """Call `read`, and repeat it after errors that may be temporary."""
    for pause in PAUSES:
        try:
            return read()
        except (FileNotFoundError, PermissionError, UserError):
            raise
        except Exception as error:  # file systems raise errors of their own libraries
            log.warning("%s: reading failed (%s); trying again in %g s", name, error or type(error).__name__, pause)
            time.sleep(pause)
    return read()
