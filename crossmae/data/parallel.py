"""Long work: its progress for the user, and threads with ordered results and bounded memory."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from operator import length_hint
from time import monotonic as clock
from typing import Generic, TypeVar

from tqdm import tqdm

from crossmae.errors import rough_time

READERS = 16  # threads that read files: network disks are slow, but serve many requests at once
AHEAD = 4  # results per thread that may wait for the consumer
FIRST_SECONDS, LINE_SECONDS = 10.0, 30.0  # from the first item to the first line, and between two lines

T = TypeVar("T")
R = TypeVar("R")


class Progress(Generic[T]):
    """Progress of long work on stderr: a bar on a terminal, else a line about every 30 seconds.

    Iterate over it, or call `update` after each item.

    Args:
        items: what is counted, if it is iterated over.
        total: number of items; None: the length of `items`, if they have one.
        first: number of items that were done before.
        leave: keep the bar at the end, or write a last line.
        shown: false: show nothing.
    """

    def __init__(
        self,
        items: Iterable[T] = (),
        word: str = "",
        total: int | None = None,
        unit: str = "item",
        first: int = 0,
        leave: bool = True,
        shown: bool = True,
    ) -> None:
        self.items, self.word, self.unit, self.leave, self.done = items, word, unit, leave, first
        self.total = length_hint(items) or None if total is None else total
        has_terminal = sys.stderr is not None and sys.stderr.isatty()
        self.writes = shown and not has_terminal
        self.bar = tqdm(
            desc=word,
            total=self.total,
            initial=first,
            unit=unit,
            leave=leave,
            dynamic_ncols=True,
            disable=not (shown and has_terminal),
        )
        self.noted = ""
        self.due = 0.0  # time of the next line
        self.start: tuple[float, int] | None = None  # time and count after the first item, which is often slow

    def __enter__(self) -> Progress[T]:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.leave = self.leave and kind is None  # the last line of a failed run is its error
        self.close()

    def __iter__(self) -> Iterator[T]:
        with self:
            for item in self.items:
                yield item
                self.update()

    def update(self, count: int = 1) -> None:
        """Count finished items."""
        self.done += count
        self.bar.update(count)
        now = clock()
        if self.start is None:
            self.start, self.due = (now, self.done), now + FIRST_SECONDS
        if self.writes and now >= self.due:
            self.write(now)

    def note(self, text: str) -> None:
        """Show a text, such as the loss, from now on."""
        self.noted = text
        self.bar.set_postfix_str(text)

    def close(self) -> None:
        """End the bar, or write the last line."""
        self.bar.close()
        if self.writes and self.leave and self.start:
            self.write(clock())
        self.writes = False

    def write(self, now: float) -> None:
        """Write a line: count, what was noted, and the remaining time."""
        self.due = now + LINE_SECONDS
        whole = f" of {self.total:,}" if self.total else ""
        parts = [f"{self.word}: {self.unit} {self.done:,}{whole}", self.noted]
        begun, before = self.start or (now, self.done)
        if self.total and before < self.done < self.total:
            left = (self.total - self.done) * (now - begun) / (self.done - before)
            parts.append(f"about {rough_time(left)} left")
        with suppress(OSError):  # who reads the lines may be gone, and the work continues
            sys.stderr.write(", ".join(filter(None, parts)) + "\n")
            sys.stderr.flush()


def map_in_order(function: Callable[[T], R], items: Iterable[T], threads: int = READERS, bar: str = "") -> Iterator[R]:
    """Map `items` in threads, at most AHEAD items per thread ahead.

    Useful for functions that release Python's global lock, such as reading files and decoding images. The first
    exception ends the iteration.
    """
    waiting: deque[Future[R]] = deque()
    progress: Progress[T] = Progress(word=bar, total=length_hint(items), leave=False, shown=bool(bar))
    with ThreadPoolExecutor(threads) as pool, progress:
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
