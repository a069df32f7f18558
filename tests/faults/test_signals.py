"""Proves that a signal to all processes of a run saves it, in a step, an evaluation and a save, and nothing is lost.

SLURM, systemd, `timeout`, a terminal and Ctrl-C signal the whole group: the run and its loader workers.
"""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import pytest

from crossmae.checkpoints.run_checkpoint import complete_checkpoints, step_of
from tests.faults.conftest import Whole, WholeOf
from tests.faults.digests import differences, digest
from tests.faults.trainers import TRAINERS
from tests.faults.zygote import Run, Zygote

CODES = {"SIGTERM": 143, "SIGINT": 130, "SIGHUP": 129, "SIGUSR1": 138}
# The place of the first signal, and the signals. Trainers differ in their steps and evaluations.
OF_EVERY_TRAINER = [
    ("step", ["SIGTERM"]),
    ("judging", ["SIGUSR1"]),
]
OF_ONE_TRAINER = [
    ("saving", ["SIGHUP"]),
    ("first step", ["SIGINT"]),
]
IN_SLOW_TESTS = [
    ("step", ["SIGTERM", "SIGTERM"]),
    ("step", ["SIGINT"]),
    ("step", ["SIGHUP", "SIGTERM"]),
    ("step", ["SIGUSR1"]),
    ("judging", ["SIGTERM"]),
    ("judging", ["SIGINT"]),
    ("judging", ["SIGHUP"]),
    ("saving", ["SIGTERM", "SIGTERM"]),
    ("saving", ["SIGINT"]),
    ("first step", ["SIGTERM"]),
    ("last step", ["SIGTERM"]),
]
ONE = "pretrain"
CASES = [
    pytest.param(
        name,
        place,
        signals,
        id=f"{name}-{place}-{'+'.join(signals)}",
        marks=[] if case in OF_EVERY_TRAINER or (case in OF_ONE_TRAINER and name == ONE) else [pytest.mark.slow],
    )
    for name in TRAINERS
    for case in [*OF_EVERY_TRAINER, *OF_ONE_TRAINER, *IN_SLOW_TESTS]
    for place, signals in [case]
]
# Every trainer takes these the same way.
ONE_IN_EVERY_TEST = [name if name == ONE else pytest.param(name, marks=pytest.mark.slow) for name in TRAINERS]


def signalled(whole: Whole, zygote: Zygote, folder: Path, place: str, signals: list[str]) -> Run:
    """Start a run with two workers, and signal its group at a place."""
    trainer = whole.trainer
    steps = {"first step": 1, "step": 4, "last step": whole.steps}
    call, number = {"judging": trainer.judging, "saving": (trainer.saving, 2)}.get(place, (trainer.step, 0))
    fault = {"act": "wait", "call": call, "number": number or steps[place]}
    run = trainer.start(zygote, [*whole.words, trainer.workers.format(2)], folder, fault)
    run.wait_for_fault()
    for name in signals:
        run.signal_group(getattr(signal, name))
        time.sleep(0.05)
    run.go_on()
    return run


def ends(run: Path) -> list[int]:
    """Return the steps of the complete checkpoints."""
    return [step_of(folder) for folder in complete_checkpoints(run)]


def only_last(content: dict[str, object], last: int) -> dict[str, object]:
    """Leave out the checkpoints before the last: a stop saves one more."""
    other = re.compile(rf"checkpoints/step-(?!{last:08d})")
    return {key: value for key, value in content.items() if not other.match(key)}


@pytest.mark.parametrize("name, place, signals", CASES)
def test_a_signal_saves_the_run_and_nothing_is_lost(
    name: str, place: str, signals: list[str], whole_of: WholeOf, zygote: Zygote, tmp_path: Path
) -> None:
    whole = whole_of(name)
    run = signalled(whole, zygote, tmp_path, place, signals)
    code = run.wait()
    assert "Traceback" not in run.printed, run.printed
    assert code == CODES[signals[0]], run.printed
    assert run.is_gone()
    saved = ends(tmp_path / "run")
    # After the last step, the measurements are left to --resume.
    expected = {"first step": 1, "step": 4, "last step": whole.steps}.get(place)
    assert saved[-1:] == [expected or saved[-1]], run.printed
    assert f"stopped after step {saved[-1]}, which is saved" in run.printed
    if place == "judging":  # the evaluation was cut off, and is made up
        rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
        assert all("lr" in row for row in rows if row["step"] == saved[-1])

    resumed = whole.trainer.start(zygote, [*whole.words, "--resume"], tmp_path)
    assert resumed.wait() == 0, resumed.printed
    contents = [only_last(content, whole.steps) for content in (whole.digest, digest(tmp_path / "run"))]
    # A checkpoint after the last step has the number of workers that it was written with.
    found = [one for one in differences(*contents) if not re.search("workers", one, re.IGNORECASE)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", ONE_IN_EVERY_TEST)
def test_a_second_ctrl_c_ends_the_run_now(name: str, whole_of: WholeOf, zygote: Zygote, tmp_path: Path) -> None:
    """One process does not save then. The workers end, too."""
    run = signalled(whole_of(name), zygote, tmp_path, "step", ["SIGINT", "SIGINT"])
    assert run.wait() == CODES["SIGINT"]
    assert "Traceback" not in run.printed, run.printed
    assert run.is_gone()
    assert 4 not in ends(tmp_path / "run")
