"""Work in threads, with ordered results and bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from operator import length_hint
from typing import TypeVar

from tqdm import tqdm

READERS = 16  # threads that read files: network disks are slow, but serve many requests at once
AHEAD = 4  # results per thread that may wait for the consumer

T = TypeVar("T")
R = TypeVar("R")


def map_in_order(function: Callable[[T], R], items: Iterable[T], threads: int = READERS, bar: str = "") -> Iterator[R]:
    """Map `items` in threads, at most AHEAD items per thread ahead.

    Useful for functions that release Python's global lock, such as reading files and decoding images. The first
    exception ends the iteration.
    """
    waiting: deque[Future[R]] = deque()
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=length_hint(items), desc=bar, leave=False, dynamic_ncols=True, disable=not bar) as progress,
    ):
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= AHEAD * threads:
                    yield waiting.popleft().result()
                    progress.update()
            while waiting:
                yield waiting.popleft().result()
                progress.update()
        finally:
            for future in waiting:
                future.cancel()
