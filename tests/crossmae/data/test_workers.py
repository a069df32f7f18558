"""Proves that workers leave signals to the main process, and that a worker's death is one line, never a hang."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crossmae.data.workers import SIGNALS, DeadWorker, Loader, explain_dead_workers

ROOT = Path(__file__).parents[3]
# torch raises in a signal handler. In a callback of the garbage collection, Python reports this error and drops it.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Slow:
    """A hundred numbers, each of which takes a while."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> int:
        time.sleep(0.02)
        return index


class Dying(Slow):
    """An item whose worker dies in some way."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __getitem__(self, index: int) -> int:
        if index == 10:
            os.kill(os.getpid(), self.number)
        return super().__getitem__(index)


class Unsendable(Slow):
    def __getitem__(self, index: int) -> Any:
        return lambda: index


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """A hang ends this test alone."""

    def fail(*_: object) -> None:
        raise TimeoutError("the loader hangs")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def open_loader(dataset: Any, workers: int = 2, **named: Any) -> Loader:
    return Loader(dataset, workers, batch_size=2, **named)


def test_a_run_hears_every_signal_that_asks_it_to_stop() -> None:
    assert set(SIGNALS) == {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells who sent a signal")
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_worker_ignores_signals_from_elsewhere(number: signal.Signals) -> None:
    batches = iter(open_loader(Slow()))
    workers = batches.workers
    for _ in range(2):  # at once, and in the middle
        for worker in workers:
            subprocess.run(["kill", f"-{number}", str(worker.pid)], check=True)
        next(batches)
    assert all(worker.is_alive() for worker in workers)
    assert len(list(batches)) == 48


@pytest.mark.parametrize(
    ("number", "how", "cause"),
    [
        (signal.SIGKILL, "Killed", "memory ran out"),
        (signal.SIGBUS, "Bus error", "shared memory ran out"),
        (signal.SIGSEGV, "Segmentation fault", "a library crashed"),
    ],
)
def test_a_killed_worker_is_explained(number: int, how: str, cause: str) -> None:
    batches = iter(open_loader(Dying(number), key="DATALOADER.NUM_WORKERS"))
    processes = [worker.pid for worker in batches.workers]
    with pytest.raises(DeadWorker) as caught:
        list(batches)
    found = re.fullmatch(
        r"DATALOADER\.NUM_WORKERS: a worker that reads images \(worker (\d) of 2, process (\d+)\) was killed by a "
        rf"signal \({how}\)\. Probable cause: {cause}.* "
        r"\([\d.]+ GB of memory available, [\d.]+ GB free in /dev/shm\)\. "
        r"Lower DATALOADER\.NUM_WORKERS, where 0 reads in the training process, or enlarge shared memory "
        r"\(docker run --shm-size=8g\)\.",
        str(caught.value),
    )
    assert found, str(caught.value)
    assert processes[int(found[1]) - 1] == int(found[2])


def test_a_worker_that_is_killed_from_outside_is_explained() -> None:
    batches = iter(open_loader(Slow()))
    next(batches)
    os.kill(batches.workers[1].pid, signal.SIGKILL)
    with pytest.raises(DeadWorker, match=r"^data\.workers: .*\(Killed\).*memory ran out"):
        list(batches)


@pytest.mark.parametrize("checkpoint", [None, Path("run/checkpoints/step-00000005")])
def test_a_death_between_two_batches_is_explained_with_the_last_checkpoint(checkpoint: Path | None) -> None:
    """torch raises in a signal handler: here in a step, and in another case while the loader waits."""
    for is_in_a_step in (True, False):
        batches = iter(open_loader(Slow()))
        next(batches)
        explained = explain_dead_workers("data.workers", lambda: checkpoint)
        with pytest.raises(DeadWorker) as caught, explained:  # noqa: PT012
            os.kill(batches.workers[0].pid, signal.SIGKILL)
            if is_in_a_step:
                time.sleep(5)
            list(batches)
        expected = "There is no checkpoint yet."
        if checkpoint:
            expected = f"Repeat the command with --resume to continue from {checkpoint}."
        assert str(caught.value).endswith(f"--shm-size=8g). {expected}")
        assert str(caught.value).count("Lower data.workers") == 1


def test_a_batch_that_cannot_be_sent_ends_the_run(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DeadWorker, match=r"ended with exit code 77\. Probable cause: it could not send a batch, and"):
        list(open_loader(Unsendable(), collate_fn=list))
    assert "Unsendable.__getitem__" in capfd.readouterr().err  # the words before it differ between Pythons


@pytest.mark.parametrize("error", [ConnectionResetError(), FileNotFoundError(), EOFError()], ids=repr)
def test_a_dead_worker_that_does_not_answer_is_explained(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """The main process asks for the memory of a batch, and the worker dies before it answers."""
    batches = iter(open_loader(Slow()))

    def ask_in_vain(*_: object) -> None:
        monkeypatch.undo()
        os.kill(batches.workers[0].pid, signal.SIGKILL)
        raise error

    monkeypatch.setattr(type(batches.batches), "_next_data", ask_in_vain)
    with pytest.raises(DeadWorker, match=r"\(worker 1 of 2, process \d+\) was killed by a signal \(Killed\)"):
        next(batches)
    assert not any(worker.is_alive() for worker in batches.workers)


def test_an_error_of_the_files_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crossmae.data.workers.DEATH_SECONDS", 0.1)
    batches = iter(open_loader(Slow()))
    monkeypatch.setattr(type(batches.batches), "_next_data", lambda _: (_ for _ in ()).throw(OSError("a bug")))
    with pytest.raises(OSError, match="a bug"):
        next(batches)


def test_other_errors_stay_as_they_are() -> None:
    for error in (RuntimeError("a bug"), ValueError("DataLoader worker (pid 1) is killed by signal: Killed.")):
        with pytest.raises(type(error)) as caught, explain_dead_workers():
            raise error
        assert caught.value is error


AS_ON_WINDOWS = """
import signal, types
import torch.multiprocessing
import crossmae.data.workers
lacking = ("pthread_sigmask", "sigwaitinfo", "SIGHUP", "SIGUSR1")
there = {name: value for name, value in vars(signal).items() if name not in lacking}
crossmae.data.workers.signal = types.SimpleNamespace(**there)  # also in the worker, which runs this file first
crossmae.data.workers.SIGNALS = (signal.SIGINT, signal.SIGTERM)
from tests.crossmae.data.test_workers import Numbers, open_loader
if __name__ == "__main__":
    torch.multiprocessing.set_start_method("spawn")
    print([batch.tolist() for batch in open_loader(Numbers(), 1)])
"""


class Numbers:
    """Ten numbers."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        return index


def test_workers_start_without_forks_and_signal_masks(tmp_path: Path) -> None:
    """As on Windows, which nothing was run on."""
    (tmp_path / "script.py").write_text(AS_ON_WINDOWS)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "[[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]\n", done.stderr


class Large:
    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> Tensor:
        return torch.zeros(1 << 18)


IN_SMALL_MEMORY = """
import torch
from torch.utils.data import default_collate
from crossmae.data.workers import DeadWorker, Loader
from tests.crossmae.data.test_workers import Large
for collate in (default_collate, torch.stack):  # in the worker's main thread, and in the thread that sends
    try:
        list(Loader(Large(), 2, batch_size=4, collate_fn=collate))
    except DeadWorker as error:
        print(error)
"""


def test_little_shared_memory_is_explained() -> None:
    """Without care, the batch is dropped, and the run waits for it forever."""
    mount = "mount -t tmpfs -o size=2m tmpfs /dev/shm"
    in_a_namespace = ["unshare", "--mount", "sh", "-c"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*in_a_namespace, mount], capture_output=True, check=False).returncode
    ):
        pytest.skip("small shared memory needs the right to mount it")
    command = [*in_a_namespace, f'{mount} && exec "$0" -c "$1"', sys.executable, IN_SMALL_MEMORY]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    first, second = done.stdout.splitlines()
    for line in (first, second):
        assert "Probable cause: shared memory ran out" in line
        assert " 0.00" in line
    assert re.search(r"\(worker [12]\) could not make a batch", first)
    assert re.search(r"\(worker [12] of 2, process \d+\) ended with exit code 75", second)
