"""A function of many items in threads, with the results in order and few items at a time."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from crossmae.errors import UserError, printable

T = TypeVar("T")
R = TypeVar("R")

MOST_THREADS = 4
ITEMS_PER_THREAD = 4  # items that are computed or wait, for each thread


def host_threads(device: torch.device) -> int:
    """Choose the number of threads that work while the device computes.

    On a CPU it is 0, because the model uses the processors itself.
    """
    if device.type == "cpu":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(min(MOST_THREADS, cores // processes - 1), 1)


def map_in_order(function: Callable[[T], R], items: Iterable[T], threads: int, name: Callable[[T], str]) -> Iterator[R]:
    """Yield `function(item)` for each item, in order.

    At most `ITEMS_PER_THREAD` * `threads` items have been taken whose results have not been yielded. An error of
    `function` or `items` ends the iteration after the running calls.

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

    if threads == 0:
        yield from map(call, items)
        return
    pending: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads, "results") as executor:
        try:
            for item in items:
                pending.append(executor.submit(call, item))
                while pending and (pending[0].done() or len(pending) >= ITEMS_PER_THREAD * threads):
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            executor.shutdown(cancel_futures=True)
