"""Runs of the tests of faults: the process that forks them, and one unbroken run of every trainer."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from crossmae.checkpoints.run_checkpoint import complete_checkpoints, step_of
from tests.faults.digests import digest
from tests.faults.trainers import TRAINERS, Trainer
from tests.faults.zygote import Zygote


@dataclass(frozen=True)
class Whole:
    """An unbroken run of a trainer.

    Attributes:
        words: command line of the run.
        events: file events in their order, as "kind path".
        digest: comparable content of the run folder.
        steps: length of the run.
        seconds: time of the run.
    """

    trainer: Trainer
    words: list[str]
    events: list[str]
    digest: dict[str, Any]
    steps: int
    seconds: float


WholeOf = Callable[[str], Whole]


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    if sys.platform != "linux":
        pytest.skip("faults are injected on Linux only")
    with Zygote() as started:
        yield started


@pytest.fixture(scope="session")
def whole_of(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> WholeOf:
    """Return a function that returns the unbroken run of a trainer, which is run once."""
    known: dict[str, Whole] = {}

    def find(name: str) -> Whole:
        if name not in known:
            trainer, folder = TRAINERS[name], tmp_path_factory.mktemp(name)
            words, record = trainer.write(folder), folder / "events.txt"
            zygote.load(trainer.tool, trainer.imports)
            begun = time.monotonic()
            run = trainer.start(zygote, words, folder / "whole", {"record": str(record)})
            assert run.wait() == 0, run.printed
            seconds = time.monotonic() - begun
            steps = step_of(complete_checkpoints(run.folder / "run")[-1])
            events = record.read_text().splitlines()
            known[name] = Whole(trainer, words, events, digest(run.folder / "run"), steps, seconds)
        return known[name]

    return find
