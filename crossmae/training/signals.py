"""Requests to stop a run between two steps."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from types import FrameType, TracebackType
from typing import NoReturn

from crossmae.data.workers import SIGNALS


class StopRequest:
    """Request to stop: Ctrl-C and SIGTERM are only noted, as `number`.

    A handler that saved would meet half a step; so it notes, and the loop saves.

    Args:
        patient: no second Ctrl-C either: torchrun hands on to its processes what they got from the terminal already.
    """

    def __init__(self, patient: bool) -> None:
        self.patient = patient
        self.number: int | None = None

    def __enter__(self) -> StopRequest:
        self.can_listen = threading.current_thread() is threading.main_thread()
        if self.can_listen:
            # What a shell has told to be ignored, as Ctrl-C is in the background, stays ignored.
            heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self.before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self.can_listen:
            for number, handler in self.before.items():
                signal.signal(number, handler)

    def end(self) -> NoReturn:
        """End the run that was asked to stop.

        Raises:
            KeyboardInterrupt: after Ctrl-C.
            SystemExit: after SIGTERM.
        """
        if self.number is None or self.number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self.number)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.number = self.number or number
        if number == signal.SIGINT and not self.patient:
            signal.signal(number, self.before[signal.SIGINT])


def pass_on_sigterm() -> None:
    """Pass SIGTERM to the children of this process, and end with them."""
    signal.signal(signal.SIGTERM, _end_children)


def _end_children(number: int, _: FrameType | None) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)
    for child in multiprocessing.active_children():
        child.terminate()
    raise SystemExit(128 + number)  # Python waits for the children then
