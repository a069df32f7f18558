"""Proves what a signal does to a run: the first is noted, SIGTERM never kills, a second Ctrl-C does where it may."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from crossmae.data.workers import Loader
from crossmae.training.processes import Ranks
from crossmae.training.signals import StopRequest


@pytest.fixture(autouse=True)
def foreground() -> Iterator[None]:
    """Ctrl-C as in a terminal: tests may run in the background, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_first_signal_is_noted_and_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopRequest() as request:
        assert request.number is None
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert request.number == signal.SIGTERM
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_ctrl_c_ends_one_process() -> None:
    with pytest.raises(KeyboardInterrupt), StopRequest():  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_several_processes_wait_for_each_other() -> None:
    with StopRequest(Ranks(world_size=2)) as request:
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
        assert request.number == signal.SIGINT


def test_what_is_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopRequest() as request:
        signal.raise_signal(signal.SIGINT)
        assert request.number is None
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells who sent a signal")
def test_a_worker_ends_at_its_parents_sigterm_alone() -> None:
    """Python waits for its workers when it exits: a worker that ignored its parent would keep a failed run forever."""
    batches = iter(Loader(range(100), 1, batch_size=1))  # type: ignore[arg-type]
    worker = batches._workers[0]
    next(batches)
    for name in ("TERM", "INT"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    worker.join(timeout=0.5)
    assert worker.is_alive()
    assert len(list(batches)) == 99
    batches = iter(Loader(range(100), 1, batch_size=1))  # type: ignore[arg-type]
    worker = batches._workers[0]
    worker.terminate()
    worker.join(timeout=10)
    assert worker.exitcode == 0
