"""Signals that stop a run between two steps, or between two batches of an evaluation."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType, TracebackType
from typing import NoReturn, TypeVar

from crossmae.data.workers import SIGNALS
from crossmae.training.processes import Ranks

T = TypeVar("T")

# Several processes agree on a stop about every so many seconds. torchrun and SLURM kill them 30 seconds after a signal.
AGREEMENT_SECONDS = 2.0


class StopAsked(Exception):
    """A signal asks to stop, in all processes at the same batch of an evaluation."""


class StopRequest:
    """Request to stop, set as `number` by one of `crossmae.data.workers.SIGNALS`.

    The signal handler only stores the number of the signal, because a signal may arrive in the middle of a step. The
    loop saves a checkpoint after the step. Several processes stop together: they exchange the number in a step or batch
    that they all compute from the slowest process's seconds per step, so that its time is bounded.

    Args:
        ranks: the processes that stop together. torchrun forwards Ctrl-C to processes that already received it from
            the terminal, so several processes also ignore a second Ctrl-C.
    """

    current: StopRequest | None = None

    def __init__(self, ranks: Ranks = Ranks()) -> None:  # noqa: B008 - it is immutable
        self.ranks = ranks
        self.number: int | None = None
        self.is_alone = False  # only the main process measures now
        self.period, self.since, self.begun = 1, 0, time.monotonic()

    def __enter__(self) -> StopRequest:
        self.can_listen = threading.current_thread() is threading.main_thread()
        if self.can_listen:
            # Keep ignoring signals that the shell ignores, such as Ctrl-C for background jobs and SIGHUP for nohup.
            heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self.before = {number: signal.signal(number, self._note) for number in heard}
        StopRequest.current = self
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        StopRequest.current = None
        if self.can_listen:
            for number, handler in self.before.items():
                signal.signal(number, handler)

    def is_agreed(self) -> bool:
        """Count one step or batch. Return true if all processes stop now.

        All processes call this after the same steps and batches.
        """
        self.since += 1
        if self.ranks.world_size == 1 or self.is_alone:
            return self.number is not None
        if self.since < self.period:
            return False
        seconds = (time.monotonic() - self.begun) / self.since
        told = self.ranks.gather((self.number or 0, seconds))
        self.number = max(number for number, _ in told) or None
        slowest = max(seconds for _, seconds in told)
        self.period = max(int(AGREEMENT_SECONDS / max(slowest, 1e-6)), 1)
        self.since, self.begun = 0, time.monotonic()
        return self.number is not None

    def start_clock(self) -> None:
        """Forget the time of earlier steps or batches.

        All processes call this together.
        """
        self.period, self.since, self.begun = 1, 0, time.monotonic()

    def end(self) -> NoReturn:
        """End the run after a stop request.

        Raises:
            KeyboardInterrupt: After Ctrl-C.
            SystemExit: After another signal, with 128 + its number.
        """
        if self.number is None or self.number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self.number)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.number = self.number or number
        if number == signal.SIGINT and self.ranks.world_size == 1:
            signal.signal(number, self.before[signal.SIGINT])


def until_stop(batches: Iterable[T], ranks: Ranks, count: int) -> Iterator[T]:
    """Yield batches of an evaluation until a signal asks to stop.

    Raises StopAsked then.

    Args:
        ranks: the processes that evaluate together: all, or the main process in `in_main_process`.
        count: number of this process's batches. The processes may have different numbers.
    """
    request = StopRequest.current
    if request is None or (ranks.world_size != request.ranks.world_size and not request.is_alone):
        yield from batches
        return
    shared = min(ranks.gather(count))
    request.start_clock()
    for number, batch in enumerate(batches):
        if number < shared and request.is_agreed():
            raise StopAsked
        yield batch
    request.start_clock()


def in_main_process(measure: Callable[[], T]) -> T | None:
    """Measure in the main process, while the others wait.

    A signal to the main process stops all processes. All processes call this together.

    Returns:
        What `measure` returns. None in the other processes.

    Raises:
        StopAsked: In all processes, if `until_stop` in `measure` ended early.
    """
    request, value, number = StopRequest.current, None, None
    if request is None:
        return measure()
    if request.ranks.is_main:
        request.is_alone = True
        try:
            value = measure()
        except StopAsked:
            number = request.number
        finally:
            request.is_alone = False
    number = request.ranks.gather(number)[0]
    request.start_clock()
    if number is not None:
        request.number = number
        raise StopAsked
    return value
