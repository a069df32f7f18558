"""Interface of every kind of data set: encoded images by their index, and labels if the data set has any."""

from __future__ import annotations

import hashlib
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crossmae.data.images import IMAGE_LIMITS, ImageLimits
from crossmae.data.sources.labels import unify_labels
from crossmae.errors import UserError, counted, printable, shorten
from crossmae.files import open_file, read_end, read_file

HEAD = 1 << 16  # bytes that hold the header of nearly every image

log = logging.getLogger(__name__)


class PackedStrings:
    """A long list of strings, stored in two arrays.

    With a list of objects, reference counting would copy the list into every worker.
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
    """Images of one data set by index 0 .. len - 1, readable in any process.

    Copies of a source are pickled and sent to the loader's workers, so a pickled source has no open files.

    Attributes:
        description: text for the log, such as "1,600 images in the folder X".
        classes: names of the classes; () without labels.
        doubts: reasons why the classes may be wrong, for those who train on them.
        groups: index of the first image of every shard. Samples of one shard are cheap to read together. None without
            shards.
        limits: largest number of pixels of an image, and the keys that messages name.
    """

    description: str
    limits: ImageLimits = IMAGE_LIMITS
    classes: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    groups: NDArray[np.int64] | None = None
    _labels: NDArray[np.int64] | None = None
    # End of the sentence that begins with the description, if there are no labels.
    _no_labels = (
        "have no labels. Labels come from a folder with one subfolder per class, a list with a column `label` or "
        "`class`, tar shards with a .cls or .json next to every image, or a Hugging Face data set with a ClassLabel "
        "column."
    )

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """Return the sample's name for messages: a path, or `shard.tar/key.jpg`."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """Read the encoded file of a sample.

        Raises UserError if the file cannot be read. The message names the sample.
        """

    def tail(self, index: int, length: int = 16) -> bytes:
        """Read the last bytes of the file, or b"" if unreadable."""
        try:
            return self.read(index)[-length:]
        except UserError:
            return b""

    def head(self, index: int, length: int = HEAD) -> bytes:
        """Read the first bytes of the file, or b"" if unreadable."""
        try:
            return self.read(index)[:length]
        except UserError:
            return b""

    def stamp(self, index: int) -> str:
        """Return a text that changes whenever the sample changes."""
        return hashlib.sha256(self.read(index)).hexdigest()

    def digest(self, labelled: bool) -> str:
        """Hash the names of all samples, and their labels if `labelled`.

        The order matters. A data set that is moved as a whole keeps its digest.
        """
        names = [self.name(index) for index in range(len(self))]
        shared = ""
        with suppress(ValueError):  # absolute and relative names have no folder in common
            shared = os.path.commonpath([os.path.dirname(min(names)), os.path.dirname(max(names))])
        found = hashlib.sha256("\n".join(name[len(shared) :] for name in names).encode(errors="surrogateescape"))
        if labelled:
            found.update(self.labels().tobytes())
        return found.hexdigest()[:16]

    def label(self, index: int) -> int:
        """Return the sample's class as an index into `classes`.

        Raises UserError if the source has no labels.
        """
        if self._labels is None:
            raise UserError(f"{self.description} {self._no_labels}")
        return int(self._labels[index])

    def labels(self) -> NDArray[np.int64]:
        """Return the classes (N,) of all samples.

        Raises UserError if the source has no labels.
        """
        self.label(0)
        assert self._labels is not None
        return self._labels

    def use_labels(self, texts: Sequence[str | None], order: Sequence[str] = ()) -> None:
        """Set one label per sample, or none if labels are missing.

        If only some samples have a label, a warning is logged and no labels are used.

        Args:
            order: all classes, if their order is known. Otherwise labels that differ in spaces or case only are one
                class, the classes are sorted, and whole numbers are sorted by value.
        """
        labels, notes = (list(texts), []) if order else unify_labels(texts)
        labelled = [label for label in labels if label]
        if len(labelled) < len(labels):
            if labelled:
                lacking = [index for index, label in enumerate(labels) if not label]
                first = printable(self.name(lacking[0]))
                why = f"there is none for {counted(len(lacking), 'sample')}, the first is {first}"
                self.leave_unlabelled(why, f"Label them, or leave them out: {len(labelled):,} would be left")
            return
        for note in notes:
            log.warning("%s: %s", self.description, note)
        self.classes = tuple(order) or _sorted_classes(set(labelled))
        positions = {name: position for position, name in enumerate(self.classes)}
        self._labels = np.array([positions[text] for text in labelled], dtype=np.int64)

    def leave_unlabelled(self, why: str, remedy: str, warn: bool = True) -> None:
        """Use no labels, and keep the reason for `label`."""
        if warn:
            log.warning("%s: labels are not used, %s", self.description, why)
        self.classes, self._labels = (), None
        self._no_labels = f"have no labels: {why}. {remedy}."


def _sorted_classes(names: set[str]) -> tuple[str, ...]:
    if all(name.isascii() and name.isdigit() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


class ImageFiles(Source):
    """Image files on this machine."""

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
        return self._paths[index]

    def read(self, index: int) -> bytes:
        return read_file(self.name(index))

    def stamp(self, index: int) -> str:
        path = self.name(index)
        try:
            status = os.stat(path)
        except OSError as error:
            raise UserError(f"{printable(path)}: cannot be read: {error.strerror}") from error
        return f"{status.st_size}:{status.st_mtime_ns}"

    def tail(self, index: int, length: int = 16) -> bytes:
        return read_end(self.name(index), length)

    def head(self, index: int, length: int = HEAD) -> bytes:
        try:
            with open_file(self.name(index)) as file:
                return file.read(length)
        except OSError:
            return b""


class Subset(Source):
    """The samples `chosen` of a source. Names and classes stay as in the source."""

    def __init__(self, source: Source, chosen: Sequence[int] | NDArray[np.int64]) -> None:
        self._source, self._chosen = source, np.asarray(chosen, dtype=np.int64)
        self.description = f"{len(self._chosen):,} of the {source.description}"
        self.classes, self.limits = source.classes, source.limits
        if source.classes:
            self._labels = source.labels()[self._chosen]

    def __len__(self) -> int:
        return len(self._chosen)

    def name(self, index: int) -> str:
        return self._source.name(int(self._chosen[index]))

    def read(self, index: int) -> bytes:
        return self._source.read(int(self._chosen[index]))

    def tail(self, index: int, length: int = 16) -> bytes:
        return self._source.tail(int(self._chosen[index]), length)

    def head(self, index: int, length: int = HEAD) -> bytes:
        return self._source.head(int(self._chosen[index]), length)

    def stamp(self, index: int) -> str:
        return self._source.stamp(int(self._chosen[index]))


def choose_per_class(source: Source, count: int, seed: int, key: str) -> Subset:
    """Draw `count` samples of every class, in the source's order.

    Raises UserError if there are no labels, or a class has fewer samples. The message names these classes.
    """
    labels = source.labels()
    members = [np.flatnonzero(labels == index) for index in range(len(source.classes))]
    short = [f"{name} ({len(own)})" for name, own in zip(source.classes, members, strict=True) if len(own) < count]
    if short:
        raise UserError(f"{key}: fewer than {count} images of {shorten(short)}. Lower it.")
    rng = np.random.default_rng(seed)
    return Subset(source, np.sort(np.concatenate([rng.choice(own, count, replace=False) for own in members])))


def evenly_spaced(length: int, most: int) -> list[int]:
    """Choose at most `most` evenly spaced indices below `length`."""
    count = min(length, most)
    return [index * length // count for index in range(count)]
