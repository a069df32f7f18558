"""Some samples of a source, as a source of their own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from crossmae.data.images import MAX_NAMES
from crossmae.data.sources.source import Source
from crossmae.errors import UserError


class Subset(Source):
    """The samples `chosen` of a source, which keep their names and the source's classes.

    Args:
        source: any.
        chosen: positions in it.
    """

    def __init__(self, source: Source, chosen: Sequence[int] | NDArray[np.int64]) -> None:
        self._source, self._chosen = source, np.asarray(chosen, dtype=np.int64)
        self.description = f"{len(self._chosen):,} of the {source.description}"
        self.classes = source.classes
        if source.classes:
            self._labels = source.labels()[self._chosen]

    def __len__(self) -> int:
        return len(self._chosen)

    def name(self, index: int) -> str:
        """As in the source."""
        return self._source.name(int(self._chosen[index]))

    def read(self, index: int) -> bytes:
        """See `Source.read`."""
        return self._source.read(int(self._chosen[index]))

    def tail(self, index: int, length: int = 16) -> bytes:
        """See `Source.tail`."""
        return self._source.tail(int(self._chosen[index]), length)

    def stamp(self, index: int) -> str:
        """See `Source.stamp`."""
        return self._source.stamp(int(self._chosen[index]))


def choose_per_class(source: Source, count: int, seed: int, key: str) -> Subset:
    """So many samples of every class, drawn by a seed, in the order of the source.

    Raises:
        UserError: no labels, or a class with fewer samples; names them.
    """
    labels = source.labels()
    members = [np.flatnonzero(labels == index) for index in range(len(source.classes))]
    short = [f"{name} ({len(own)})" for name, own in zip(source.classes, members, strict=True) if len(own) < count]
    if short:
        more = f" and {len(short) - MAX_NAMES} more" if len(short) > MAX_NAMES else ""
        raise UserError(f"{key}: fewer than {count} images of {', '.join(short[:MAX_NAMES])}{more}")
    rng = np.random.default_rng(seed)
    return Subset(source, np.sort(np.concatenate([rng.choice(own, count, replace=False) for own in members])))
