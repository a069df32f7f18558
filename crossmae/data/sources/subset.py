"""A choice of samples of a source: evenly spaced, or some of every class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from crossmae.data.sources.source import Source
from crossmae.errors import UserError, shorten


class Subset(Source):
    """The samples `chosen` of a source, which keep their names and the source's classes."""

    def __init__(self, source: Source, chosen: Sequence[int] | NDArray[np.int64]) -> None:
        self._source, self._chosen = source, np.asarray(chosen, dtype=np.int64)
        self.description = f"{len(self._chosen):,} of the {source.description}"
        self.classes = source.classes
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

    def stamp(self, index: int) -> str:
        return self._source.stamp(int(self._chosen[index]))


def choose_per_class(source: Source, count: int, seed: int, key: str) -> Subset:
    """Draw `count` samples of every class, in the source's order.

    Raises:
        UserError: no labels, or a class with fewer samples; names them.
    """
    labels = source.labels()
    members = [np.flatnonzero(labels == index) for index in range(len(source.classes))]
    short = [f"{name} ({len(own)})" for name, own in zip(source.classes, members, strict=True) if len(own) < count]
    if short:
        raise UserError(f"{key}: fewer than {count} images of {shorten(short)}")
    rng = np.random.default_rng(seed)
    return Subset(source, np.sort(np.concatenate([rng.choice(own, count, replace=False) for own in members])))


def evenly_spaced(length: int, most: int) -> list[int]:
    """Choose at most `most` indices below `length`, at equal distances."""
    count = min(length, most)
    return [index * length // count for index in range(count)]
