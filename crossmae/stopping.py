"""Stopping a run between two steps, when somebody asks for it."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Inside, the first Ctrl-C or SIGTERM is only noted, as `number`; the second one ends the process as ever.

    A handler that saved would meet half a step; so it notes, and the loop saves.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def __enter__(self) -> StopRequest:
        self.can_listen = threading.current_thread() is threading.main_thread()
        if self.can_listen:
            self.before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._restore()

    def _note(self, number: int, _: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        if self.can_listen:
            for number, handler in self.before.items():
                signal.signal(number, handler)


def ignore_interrupts(_: int) -> None:
    """For workers: Ctrl-C reaches the whole group of processes, and the main one decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
