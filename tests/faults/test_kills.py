"""Proves that a run killed at any file event or time resumes to the bytes of an unbroken run, and leaves nothing.

The tests of this folder mirror no module: each holds a promise of all trainers against a fault from outside.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from crossmae.checkpoints.run_checkpoint import latest_checkpoint, step_of
from tests.faults.conftest import Whole, WholeOf
from tests.faults.digests import differences, digest
from tests.faults.trainers import TRAINERS
from tests.faults.zygote import Zygote

FEW = 3  # kills per trainer in `make test`, each trainer at other kinds of events
PIECES, PER_PIECE = 8, 25  # kills per trainer of the slow test, in pieces of a few minutes
COMMIT = re.compile(r"rename checkpoints/step-(\d{8}) from .*")
TEMPORARY = re.compile(r"\.tmp$|\.tmp/|/\.evaluation-|\.write-test")
GROWING = ("log.jsonl", "broken.jsonl", "log.txt", ".claim.lock")  # files that grow by whole lines


def committed(record: Path) -> int:
    """Return the step of the last checkpoint that was committed for certain, 0 without one."""
    events = record.read_text().splitlines() if record.exists() else []
    return max([int(found[1]) for event in events[:-1] if (found := COMMIT.fullmatch(event))], default=0)


def problems_after_kill(whole: Whole, zygote: Zygote, folder: Path, events: list[int], seconds: float = 0) -> list[str]:
    """Kill a run at events, or after a time, resume it to its end, and return what differs from the unbroken run.

    Args:
        events: numbers of the events at which the run and its resumptions are killed.
        seconds: if not 0, time after which the run is killed.
    """
    run, found, words = folder / "run", [], whole.words
    for number, event in enumerate(events or [10**9]):
        record = folder / f"events{number}.txt"
        fault = {"act": "kill", "event": event, "record": str(record)}
        started = whole.trainer.start(zygote, words, folder, fault)
        if seconds:
            time.sleep(seconds)
            started.signal_group(9)
        code = started.wait()
        if code not in (-9, 0):
            found.append(f"exit code {code}: {started.printed[-2000:]}")
        least, latest = committed(record), latest_checkpoint(run)
        if least > (step_of(latest) if latest else 0):
            found.append(f"step {least} was committed, and {latest} is found")
        words = [*whole.words, "--resume"]
    last = whole.trainer.start(zygote, words, folder)
    if code := last.wait():
        return [*found, f"--resume: exit code {code}: {last.printed[-2000:]}"]
    return found + differences(whole.digest, digest(run))


def report(whole: Whole, events: list[int], found: list[str]) -> list[str]:
    """Name the kill of every problem."""
    where = ", ".join(f"{event} ({whole.events[event]})" for event in events if event < len(whole.events))
    return [f"killed at {where or 'a random time'}: {problem}" for problem in found]


def spread_over_kinds(events: list[str], seed: int) -> Iterator[int]:
    """Yield the numbers of all events in random order, the kinds by turns, the same turns for all trainers."""
    generator, turns = random.Random(seed), random.Random(seed)
    kinds = sorted({event.split()[0] for event in events})
    numbers = {kind: [n for n, event in enumerate(events) if event.startswith(f"{kind} ")] for kind in kinds}
    for found in numbers.values():
        generator.shuffle(found)
    while any(numbers.values()):
        for kind in turns.sample(kinds, len(kinds)):
            if numbers[kind]:
                yield numbers[kind].pop()


def unsafe_events(events: list[str]) -> list[str]:
    """Find files written under their own name, renames of content that is not on disk, and folders never flushed."""
    found, unflushed, renamed = [], set(), set()
    for event in events:
        kind, _, rest = event.partition(" ")
        path, _, source = rest.partition(" from ")
        if kind in ("open", "write"):
            unflushed.add(path)
            if not TEMPORARY.search(path) and path not in GROWING:
                found.append(f"{event}: under the file's own name")
        elif kind == "fsync":
            unflushed.discard(path)
            renamed.discard(path)
        elif kind == "rename":
            if any(name == source or name.startswith(f"{source}/") for name in unflushed):
                found.append(f"{event}: before its content is flushed")
            renamed.add(str(Path(path).parent))
    return found + [f"{path}: a file was renamed, and then the folder is not flushed" for path in sorted(renamed)]


@pytest.mark.parametrize("name", TRAINERS)
def test_every_file_is_flushed_and_then_renamed(name: str, whole_of: WholeOf) -> None:
    """A kill of the process cannot show this: only a power failure loses what is not flushed."""
    events = whole_of(name).events
    assert sum(COMMIT.fullmatch(event) is not None for event in events) > 2  # or this file misses the commits
    found = unsafe_events(events)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", TRAINERS)
def test_a_killed_run_resumes_to_the_unbroken_one(name: str, whole_of: WholeOf, zygote: Zygote, tmp_path: Path) -> None:
    whole, found = whole_of(name), []
    start = list(TRAINERS).index(name) * FEW
    for event in islice(spread_over_kinds(whole.events, seed=0), start, start + FEW):
        found += report(whole, [event], problems_after_kill(whole, zygote, tmp_path / str(event), [event]))
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("piece", range(PIECES))
@pytest.mark.parametrize("name", TRAINERS)
def test_many_kills(name: str, piece: int, whole_of: WholeOf, zygote: Zygote, tmp_path: Path) -> None:
    """In every piece: 17 kills at events of all kinds, 4 at random times, and 2 runs that are killed twice."""
    whole, generator, found = whole_of(name), random.Random(piece), []
    numbers = list(spread_over_kinds(whole.events, seed=0))[piece::PIECES]
    cases = [([event], 0.0) for event in numbers[: PER_PIECE - 8]]
    cases += [([], generator.uniform(0.05, whole.seconds)) for _ in range(4)]
    cases += [([generator.randrange(len(whole.events)), generator.randrange(60)], 0.0) for _ in range(2)]
    for number, (events, seconds) in enumerate(cases):
        found += report(whole, events, problems_after_kill(whole, zygote, tmp_path / str(number), events, seconds))
    assert not found, "\n".join(found)
