"""Where shards are: paths, globs and brace lists, on this machine or behind any URL that fsspec knows."""

from __future__ import annotations

import glob
import itertools
import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from crossmae.errors import UserError

MAX_OPEN = 128  # files per process; the usual limit of the system is 1,024
PAUSES = (1.0, 2.0, 4.0)  # seconds between the tries of a remote read: a run must outlast a hiccup of the network

# Entries of fsspec's file information that change when a file does; every file system has some of them.
CHANGE_MARKS = (
    "ETag",
    "etag",
    "md5Hash",
    "Content-MD5",
    "generation",
    "LastModified",
    "Last-Modified",
    "mtime",
    "created",
)

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredFile:
    """A file on this machine or elsewhere.

    Attributes:
        name: for messages.
        path: within its file system.
        url: what fsspec needs to open the file system; "" on this machine.
    """

    name: str
    path: str
    url: str = ""

    @property
    def identity(self) -> str:
        """The same for the same file however it was named, so far as that can be told."""
        if not self.url:
            return os.path.realpath(self.path)
        return f"{self.url} {self.path}" if "::" in self.url else self.name

    def inside(self, name: str) -> StoredFile:
        """The file `name` in this folder."""
        return StoredFile(f"{self.name.rstrip('/')}/{name}", f"{self.path.rstrip('/')}/{name}", self.url)

    def sibling(self, name: str) -> StoredFile:
        """The file `name` in the same folder."""
        folder, slash, own = self.path.rpartition("/")
        shown = self.name.removesuffix(own)
        return StoredFile(f"{shown}{name}", f"{folder}{slash}{name}", self.url)


def is_url(value: str) -> bool:
    """Whether fsspec has to open it: `protocol://...`, or several such chained with `::`."""
    return "://" in value or "::" in value


def expand_braces(pattern: str) -> list[str]:
    """`a{0..2}` to a0, a1, a2; `{08..11}` keeps the zeros; `{x,y}` to x, y. Without braces: the pattern alone."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if span:
        width = len(span[1]) if span[1].startswith("0") else 0
        choices = [str(number).zfill(width) for number in range(int(span[1]), int(span[2]) + 1)]
    else:
        choices = match[1].split(",")
    before, after = pattern[: match.start()], pattern[match.end() :]
    return list(itertools.chain.from_iterable(expand_braces(f"{before}{choice}{after}") for choice in choices))


def find_files(pattern: str, key: str) -> list[StoredFile]:
    """The files that a path, URL, glob or brace list names; globs sorted, braces in their order.

    Raises:
        UserError: a glob that nothing matches, or a file system that fsspec does not know.
    """
    files: list[StoredFile] = []
    for one in [pattern] if os.path.exists(pattern) else expand_braces(pattern):
        found = _glob(one, key)
        if not found:
            raise UserError(f"{key}: no file matches {one}")
        files += found
    if not files:
        raise UserError(f"{key}: {pattern} names no file: its range is empty")
    return files


def locate(value: str, key: str) -> StoredFile:
    """The one file or folder of a path or URL, whether it is there or not.

    Raises:
        UserError: a file system that fsspec does not know.
    """
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
        return [StoredFile(path, path) for path in sorted(glob.glob(place.path, recursive=True))]
    filesystem, path = open_filesystem(pattern, key)
    return [StoredFile(str(filesystem.unstrip_protocol(one)), one, pattern) for one in sorted(filesystem.glob(path))]


def open_filesystem(url: str, key: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it. fsspec keeps one per process and URL.

    Raises:
        UserError: unknown protocol, or its package is not installed.
    """
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{key}: {url}: {error}") from None
    return filesystem, path


def change_marks(file: StoredFile) -> dict[str, str]:
    """The file's size, under "bytes", and what else changes when it does.

    Raises:
        FileNotFoundError: it is not there.
    """
    if not file.url:
        status = os.stat(file.path)
        return {"bytes": str(status.st_size), "mtime": str(status.st_mtime_ns)}
    info = _patiently(lambda: open_filesystem(file.url, file.name)[0].info(file.path), file.name)
    return {"bytes": str(info["size"]), **{mark: str(info[mark]) for mark in CHANGE_MARKS if mark in info}}


def open_file(file: StoredFile) -> BinaryIO:
    """The file, open for reading."""
    if not file.url:
        return open(file.path, "rb")
    opened: BinaryIO = open_filesystem(file.url, file.name)[0].open(file.path, "rb")
    return opened


def read_small(file: StoredFile) -> bytes | None:
    """The whole file, or None if there is none or it may not be read."""
    try:
        if not file.url:
            with open(file.path, "rb") as opened:
                return opened.read()
        content: bytes = _patiently(lambda: open_filesystem(file.url, file.name)[0].cat_file(file.path), file.name)
        return content
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None


class RangeReader:
    """Reads pieces of files, from many threads; keeps the latest files of this machine open.

    A pickled copy opens them anew. There is no lock that a fork could leave locked: each step on the dict is atomic.
    """

    def __init__(self) -> None:
        self._open: dict[str, _Descriptor] = {}

    def __reduce__(self) -> tuple[type[RangeReader], tuple[()]]:
        return RangeReader, ()

    def read(self, file: StoredFile, start: int, size: int) -> bytes:
        """Bytes `start` .. `start + size` - 1, fewer where the file ends.

        Raises:
            OSError: and whatever else the file system raises.
        """
        if not file.url:
            descriptor = self._descriptor(file.path)  # held until it is read, though another thread may let go of it
            return os.pread(descriptor.number, size, start)
        filesystem = open_filesystem(file.url, file.name)[0]
        data: bytes = _patiently(lambda: filesystem.cat_file(file.path, start=start, end=start + size), file.name)
        return data

    def _descriptor(self, path: str) -> _Descriptor:
        descriptor = self._open.get(path)
        if descriptor is None:
            if len(self._open) >= MAX_OPEN:
                self._open.clear()
            descriptor = self._open.setdefault(path, _Descriptor(path))
        return descriptor


class _Descriptor:
    """A file descriptor that is closed with its last reference."""

    def __init__(self, path: str) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


def _patiently(read: Callable[[], T], name: str) -> T:
    """Call `read` again after an error that may pass."""
    for pause in PAUSES:
        try:
            return read()
        except (FileNotFoundError, PermissionError, UserError):
            raise
        except Exception as error:  # file systems raise errors of their own libraries
            log.warning("%s: reading failed (%s); trying again in %g s", name, error or type(error).__name__, pause)
            time.sleep(pause)
    return read()
