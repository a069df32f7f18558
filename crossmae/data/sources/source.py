"""What every kind of data looks like from outside: encoded images by their index, with labels where there are any."""

from __future__ import annotations

import hashlib
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crossmae.errors import UserError
from crossmae.files import printable

log = logging.getLogger(__name__)


class PackedStrings:
    """A long list of strings in two arrays: a list of objects would be copied into every worker by reference counting.

    Args:
        strings: any, also file names that are not valid UTF-8.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        encoded = [os.fsencode(string) for string in strings]
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._ends = np.cumsum([len(one) for one in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._bytes[start : self._ends[index]].tobytes())


class Source(ABC):
    """Images of one data set, any of them by its index 0 .. len - 1, in any process.

    Copies of it go to the workers of a loader, so it holds no open file when it is pickled.

    Attributes:
        description: for the log, such as "1,600 images in the folder X".
        classes: names of the classes where the source has labels, else ().
        groups: first index of every shard, where samples of one shard are cheap to read together; None elsewhere.
    """

    description: str
    classes: tuple[str, ...] = ()
    groups: NDArray[np.int64] | None = None
    _labels: NDArray[np.int64] | None = None
    _unlabelled: Sequence[int] = ()  # samples without a label, where others have one

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """What a message calls the sample: a path, or `shard.tar/key.jpg`."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The encoded file.

        Raises:
            UserError: it can not be read; names the sample.
        """

    def tail(self, index: int, length: int = 16) -> bytes:
        """The last bytes of the encoded file, which tell whether it is whole; b"" where it can not be read."""
        try:
            return self.read(index)[-length:]
        except UserError:
            return b""

    def stamp(self, index: int) -> str:
        """What changes whenever the sample does, told as cheaply as the source can; here by its contents.

        Raises:
            UserError: it can not be read.
        """
        return hashlib.sha256(self.read(index)).hexdigest()

    def label(self, index: int) -> int:
        """The sample's class as a position in `classes`.

        Raises:
            UserError: the source has no labels.
        """
        if self._labels is None:
            if self._unlabelled:
                raise UserError(
                    f"{self.description}: {len(self._unlabelled):,} of them have no label, the first is "
                    f"{printable(self.name(self._unlabelled[0]))}; label or remove them"
                )
            raise UserError(
                f"{self.description} have no labels; labels come from a folder with one subfolder per class, a list "
                "with a column `label` or `class`, tar shards with a .cls or .json beside every image, or a Hugging "
                "Face data set with a ClassLabel column"
            )
        return int(self._labels[index])

    def labels(self) -> NDArray[np.int64]:
        """(N,) classes of all samples; errors as `label`."""
        self.label(0)
        assert self._labels is not None
        return self._labels

    def use_labels(self, texts: Sequence[str | None], order: Sequence[str] = ()) -> None:
        """Take one label per sample, or none at all where any is missing, which the log then says.

        Args:
            texts: a label per sample.
            order: all classes, if it is known; else those that occur, sorted, whole numbers by their value.
        """
        labelled = [text for text in texts if text]
        if len(labelled) < len(texts):
            if labelled:
                self._unlabelled = [index for index, text in enumerate(texts) if not text]
                lacking = len(self._unlabelled)
                log.warning("%s: labels are not used, %s samples have none", self.description, f"{lacking:,}")
            return
        self.classes = tuple(order) or _sorted_classes(set(labelled))
        positions = {name: position for position, name in enumerate(self.classes)}
        self._labels = np.array([positions[text] for text in labelled], dtype=np.int64)


def _sorted_classes(names: set[str]) -> tuple[str, ...]:
    if all(name.isascii() and name.isdigit() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


class ImageFiles(Source):
    """Image files anywhere on this machine.

    Args:
        paths: the files.
        description: see `Source`.
        labels: one text per file, or None.
    """

    def __init__(
        self, paths: Sequence[Path] | Sequence[str], description: str, labels: Sequence[str | None] | None = None
    ) -> None:
        self.description = description
        self._paths = PackedStrings(map(str, paths))
        if labels is not None:
            self.use_labels(labels)

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        """The path."""
        return self._paths[index]

    def read(self, index: int) -> bytes:
        """See `Source.read`."""
        path = self.name(index)
        try:
            with open(path, "rb") as file:
                return file.read()
        except OSError as error:
            raise UserError(f"{printable(path)}: can not be read: {error.strerror}") from error

    def stamp(self, index: int) -> str:
        """See `Source.stamp`: size and time of the file."""
        path = self.name(index)
        try:
            status = os.stat(path)
        except OSError as error:
            raise UserError(f"{printable(path)}: can not be read: {error.strerror}") from error
        return f"{status.st_size}:{status.st_mtime_ns}"

    def tail(self, index: int, length: int = 16) -> bytes:
        """See `Source.tail`; reads no more than that."""
        try:
            with open(self.name(index), "rb") as file:
                file.seek(0, os.SEEK_END)
                file.seek(max(file.tell() - length, 0))
                return file.read()
        except OSError:
            return b""


def evenly_spaced(length: int, most: int) -> list[int]:
    """At most `most` of the indices 0 .. length - 1, at equal distances."""
    count = min(length, most)
    return [index * length // count for index in range(count)]
