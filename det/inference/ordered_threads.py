"""Encoding of predictions in threads while the device computes, with the results in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch

from crossmae.data.parallel import map_in_order
from crossmae.data.workers import own_cores
from crossmae.errors import UserError, printable

T = TypeVar("T")
R = TypeVar("R")

MOST_THREADS = 4


def host_threads(device: torch.device) -> int:
    """Choose the number of threads that work while the device computes.

    On a CPU it is 0, because the model uses the processors itself.
    """
    return 0 if device.type == "cpu" else max(min(MOST_THREADS, own_cores() - 1), 1)


def encode_in_order(
    function: Callable[[T], R], items: Iterable[T], threads: int, name: Callable[[T], str]
) -> Iterator[R]:
    """Apply a function to items, with `map_in_order` if there are threads.

    Args:
        threads: number of threads. 0 calls the function between two items.
        name: names an item for errors.

    Raises:
        RuntimeError: the function fails. The message names the item.
    """

    def call(item: T) -> R:
        try:
            return function(item)
        except (UserError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RuntimeError(f"{printable(name(item))}: the predictions cannot be encoded: {reason}") from error

    return map_in_order(call, items, threads) if threads else map(call, items)
