"""Images in tar shards, with access to any sample by index."""

from __future__ import annotations

import glob
import logging
import os
from collections import Counter
from collections.abc import Sequence
from itertools import repeat
from typing import Any

import numpy as np

from crossmae.data.parallel import map_in_order
from crossmae.data.paths import count_names, describe_lack, file_kind, log_unread
from crossmae.data.sources.shard_files import (
    RangeReader,
    StoredFile,
    change_marks,
    find_files,
    is_url,
    locate,
    read_small,
)
from crossmae.data.sources.source import HEAD, PackedStrings, Source
from crossmae.data.sources.tar_index import (
    INDEX_NAME,
    PROGRESS_NAME,
    FolderIndex,
    ShardIndex,
    index_shard,
    is_image_extension,
    read_folder_index,
)
from crossmae.errors import UserError, counted, printable, shorten

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")

log = logging.getLogger(__name__)


class TarShards(Source):
    """The images of tar shards, ordered by shard."""

    def __init__(
        self,
        shards: Sequence[StoredFile],
        indexes: Sequence[ShardIndex],
        description: str,
        classes: tuple[str, ...] = (),
    ) -> None:
        self.description = description
        self._shards = tuple(shards)
        self._names = PackedStrings(name for index in indexes for name in index.names)
        self._offsets = np.array([offset for index in indexes for offset in index.offsets], dtype=np.int64)
        self._sizes = np.array([size for index in indexes for size in index.sizes], dtype=np.int64)
        self.groups = np.cumsum([0, *(len(index.names) for index in indexes[:-1])], dtype=np.int64)
        self._reader = RangeReader()
        self.use_labels([label for index in indexes for label in index.labels], classes)

    def __len__(self) -> int:
        return len(self._names)

    def _shard(self, index: int) -> StoredFile:
        assert self.groups is not None
        return self._shards[int(np.searchsorted(self.groups, index, side="right")) - 1]

    def name(self, index: int) -> str:
        return f"{self._shard(index).name}/{self._names[index]}"

    def read(self, index: int) -> bytes:
        shard, size = self._shard(index), int(self._sizes[index])
        try:
            data = self._reader.read(shard, int(self._offsets[index]), size)
        except Exception as error:  # file systems raise errors of their own libraries
            reason = (error.strerror if isinstance(error, OSError) else None) or error or type(error).__name__
            raise UserError(f"{printable(self.name(index))}: cannot be read: {reason}. Check the shard.") from error
        if len(data) == size:
            return data
        name = printable(self.name(index))
        if len(data) > size:
            raise UserError(f"{name}: the server sends whole files only. Use simplecache::{shard.name}.")
        raise UserError(f"{name}: the shard ends in it, because it was replaced or cut off. Start again.")

    def tail(self, index: int, length: int = 16) -> bytes:
        size = int(self._sizes[index])
        length = min(length, size)
        return self._part(index, size - length, length)

    def head(self, index: int, length: int = HEAD) -> bytes:
        return self._part(index, 0, min(length, int(self._sizes[index])))

    def _part(self, index: int, start: int, length: int) -> bytes:
        try:
            return self._reader.read(self._shard(index), int(self._offsets[index]) + start, length)
        except Exception:  # as in `read`, which then reports the error
            return b""


def open_shards(value: str, key: str) -> TarShards:
    """Open tar shards by file, folder, glob or brace list.

    If there is an index next to the shards, the index is used. Otherwise each shard is scanned once.

    Raises UserError if no shard is found, or a shard is missing, changed or unusable. The message names the shard.
    """
    shards = _shards_in_folder(value, key) if _names_a_folder(value, key) else find_files(value, key)
    for shard in shards:
        if not shard.path.endswith(".tar"):
            raise UserError(
                f"{key}: {shard.name}: expected a plain .tar file. In a compressed one no image can be read without "
                "all before it."
            )
    marks: list[Any] = list(map_in_order(_marks_or_none, shards))
    if missing := [shard.name for shard, mark in zip(shards, marks, strict=True) if mark is None]:
        raise UserError(
            f"{key}: {len(missing):,} of {len(shards):,} shards are not there: {shorten(missing)}. Copy them."
        )
    index_files = list({shard.sibling(INDEX_NAME): None for shard in shards})
    folders = dict(zip(index_files, map_in_order(read_folder_index, index_files), strict=True))
    ready = [folders[shard.sibling(INDEX_NAME)] for shard in shards]
    jobs = list(zip(shards, marks, ready, strict=True))
    indexes = list(map_in_order(lambda job: _index(*job), jobs, bar="index shards"))

    images = sum(len(index.names) for index in indexes)
    left_out = sum((Counter(index.left_out) for index in indexes), Counter[str]())
    if system := [name for index in indexes for name in index.system]:
        log.info("%s: left out what is hidden or of the system: %s", value, count_names(system))
    spare = {name: count for name, count in left_out.items() if is_image_extension(name[1:])}
    if spare:
        log.warning("%s: unused, as their sample has another image: %s", value, count_names(Counter(spare).elements()))
    unread = Counter[tuple[str, str]]()
    for name, count in left_out.items():
        unread["", file_kind(f"x{name}")] += count if name not in spare else 0
    if not images:
        place = f"the {counted(len(shards), 'shard')} of {value}"
        raise UserError(f"{key}: {describe_lack(place, +unread)}")
    log_unread(value, +unread, repeat("", images))
    full = [(shard, index) for shard, index in zip(shards, indexes, strict=True) if index.names]
    description = f"{counted(images, 'image')} in {counted(len(shards), 'tar shard')} ({value})"
    classes = {folder.classes if folder else () for folder in ready}
    order = classes.pop() if len(classes) == 1 else ()
    return TarShards([shard for shard, _ in full], [index for _, index in full], description, order)


def _names_a_folder(value: str, key: str) -> bool:
    """Check whether `value` is a folder on this machine or a URL."""
    if not is_url(value):
        return os.path.isdir(os.path.expanduser(value))
    place = locate(value, key)
    if not place.url:
        return os.path.isdir(place.path)
    return not place.path.endswith(SHARD_SUFFIXES) and not glob.has_magic(value) and "{" not in value


def _shards_in_folder(value: str, key: str) -> list[StoredFile]:
    """List the shards in a folder's index, else its .tar files."""
    folder = locate(value, key)
    content = read_folder_index(folder.inside(INDEX_NAME))
    if content is not None:
        return [folder.inside(name) for name in content.shards]
    if read_small(folder.inside(PROGRESS_NAME)) is not None:
        raise UserError(
            f"{key}: {value}: make_shards.py has not finished there. Run the same command again to continue."
        )
    return find_files(f"{value.rstrip('/')}/*.tar", key)


def _marks_or_none(shard: StoredFile) -> dict[str, str] | None:
    try:
        return change_marks(shard)
    except FileNotFoundError:
        return None
    except Exception as error:  # file systems raise errors of their own libraries
        raise UserError(
            f"{shard.name}: cannot be found: {error or type(error).__name__}. Check the address."
        ) from error


def _index(shard: StoredFile, marks: dict[str, str], folder: FolderIndex | None) -> ShardIndex:
    """Return a shard's index from the folder's index, else scan it."""
    file = shard.path.rpartition("/")[2]
    if folder is None or file not in folder.shards:
        return index_shard(shard, marks)
    expected = folder.shards[file]["bytes"]
    if marks["bytes"] != str(expected):
        raise UserError(
            f"{shard.name}: has {marks['bytes']} bytes, the {INDEX_NAME} next to it says {expected}: the shard was "
            "changed or cut off. Copy both again, or run the same make_shards.py command again."
        )
    return folder.shard(file)
