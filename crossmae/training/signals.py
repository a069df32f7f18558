"""Signals that stop a run between two steps."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from types import FrameType, TracebackType
from typing import NoReturn

from crossmae.data.workers import SIGNALS


class StopRequest:
    """Request to stop, set by Ctrl-C or SIGTERM as `number`.

    The signal handler only stores the number of the signal, because a signal may arrive in the middle of a step. The
    loop saves a checkpoint after the step.

    Args:
        patient: also ignore a second Ctrl-C. torchrun forwards Ctrl-C to processes that already received it from the
            terminal.
    """

    def __init__(self, patient: bool) -> None:
        self.patient = patient
        self.number: int | None = None

    def __enter__(self) -> StopRequest:
        self.can_listen = threading.current_thread() is threading.main_thread()
        if self.can_listen:
            # Keep ignoring signals that the shell ignores, such as Ctrl-C for background jobs.
            heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self.before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self.can_listen:
            for number, handler in self.before.items():
                signal.signal(number, handler)

    def end(self) -> NoReturn:
        """End the run after a stop request.

        Raises:
            KeyboardInterrupt: After Ctrl-C.
            SystemExit: After SIGTERM.
        """
        if self.number is None or self.number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self.number)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.number = self.number or number
        if number == signal.SIGINT and not self.patient:
            signal.signal(number, self.before[signal.SIGINT])


def pass_on_sigterm() -> None:
    """Forward SIGTERM to the children of this process, then exit."""
    signal.signal(signal.SIGTERM, _end_children)


def _end_children(number: int, _: FrameType | None) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)
    for child in multiprocessing.active_children():
        child.terminate()
    raise SystemExit(128 + number)  # on exit, Python waits for the children
