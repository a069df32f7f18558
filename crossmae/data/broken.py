"""Broken images: find, reject or replace them."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

from crossmae.data.images import count_frames, header_is_sound, is_deep, is_whole
from crossmae.data.parallel import map_in_order
from crossmae.data.sources import Source
from crossmae.data.sources.source import evenly_spaced
from crossmae.errors import UserError, printable, shorten

T = TypeVar("T")

MAX_SUBSTITUTES = 100  # consecutive broken images that raise an error
LOOKS = 8  # number of images whose bit depth is checked
NEVER_REPLACED = "Repair or remove it: what is evaluated on is never replaced."

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Broken:
    """A sample that could not be read.

    `index` is the position in the source. `message` is the reason, and includes the name of the sample.
    """

    index: int
    message: str


@dataclass(frozen=True)
class Unreadable:
    """An error message in place of a batch. The training process prints the message as one line."""

    message: str


def read_or_next(
    source: Source,
    index: int,
    channels: int,
    bit_depth: int,
    policy: Literal["error", "substitute"],
    read: Callable[[Source, int, int, int], T],
) -> tuple[T, int, tuple[Broken, ...]]:
    """Read a sample, or with "substitute" the next readable sample.

    Args:
        read: `read_pixels` or `read_tensor`.

    Returns:
        Pixels and index of the sample that was read, and the broken samples before it.

    Raises:
        UserError: If the sample cannot be read and `policy` is "error", or MAX_SUBSTITUTES consecutive samples cannot
            be read.
    """
    broken: list[Broken] = []
    for candidate in range(index, index + MAX_SUBSTITUTES):
        position = candidate % len(source)
        try:
            return read(source, position, channels, bit_depth), position, tuple(broken)
        except UserError as error:
            if policy == "error":
                raise
            broken.append(Broken(position, str(error)))
    raise UserError(f"{broken[0].message.rstrip('.')}. {MAX_SUBSTITUTES} images in a row cannot be read. Repair them.")


def find_broken(source: Source, indices: Sequence[int], channels: int = 3, bit_depth: int = 8) -> list[Broken]:
    """Find images that cannot be read: check both ends, decode when unsure."""

    def look(index: int) -> Broken | None:
        sound = partial(header_is_sound, name=source.name(index), channels=channels, limits=source.limits)
        if is_whole(source.tail(index)) and sound(source.head(index)):
            return None
        from crossmae.data.pixels import read_pixels  # slow import

        try:
            read_pixels(source, index, channels, bit_depth)
        except UserError as error:
            return Broken(index, str(error))
        return None

    return [broken for broken in map_in_order(look, indices, bar="check images") if broken is not None]


def refuse_broken(broken: Sequence[Broken], key: str, advice: str = "Repair or remove what is broken.") -> None:
    """Raise a UserError that names the first broken images, if any."""
    if broken:
        raise UserError(f"{key}: {shorten([one.message.rstrip('.') for one in broken], separator='; ')}. {advice}")


def warn_of_depth(source: Source, bit_depth: int) -> None:
    """Warn if sampled images have more bits or frames than are read."""
    deep, frames = False, 1
    for index in evenly_spaced(len(source), LOOKS):
        try:
            data = source.read(index)
        except UserError:
            continue
        name = printable(source.name(index))
        if frames == 1 and (frames := count_frames(io.BytesIO(data))) > 1:
            log.warning("%s has %d frames, of which the first is read", name, frames)
        if bit_depth == 8 and not deep and (deep := is_deep(data)):
            log.warning("%s has more than 8 bits, which are cut; data.bit_depth=16 keeps them", name)
