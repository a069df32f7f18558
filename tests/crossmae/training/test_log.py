"""Proves what the log of a run survives, where else it goes, and that the estimated time is that of the steps."""

from __future__ import annotations

import errno
import json
import struct
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event
from torch.utils.tensorboard import SummaryWriter

from crossmae.errors import UserError
from crossmae.training import log as log_module
from crossmae.training.log import RunLog, TimeAhead, name_processors, start_wandb, truncate_log
from crossmae.training.schedule import Schedule


def test_a_log_is_cut_after_the_step_that_a_run_goes_on_from(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(
        '{"step": 0, "val_loss": 2}\n{"step": 1}\n[5]\n'
        '{"step": 2, "loss": 1}\n{"step": 2, "val_loss": 1}\n{"step": 3}\n{"ste'
    )
    assert [row["step"] for row in truncate_log(path, 2)] == [0, 1, 2]
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2]
    assert truncate_log(tmp_path / "none.jsonl", 2) == []


def test_without_wandb_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r'log\.wandb \(leave it out.*pip install -e "\.\[wandb\]"'):
        start_wandb("mine", "log.wandb", tmp_path, {}, resumed=False)


def test_wandb_gets_every_value_and_a_resumed_run_keeps_its_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, Any]] = []
    fake: Any = types.ModuleType("wandb")
    fake.init = lambda **given: started.append(given)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for resumed in (False, True, False):
        start_wandb("mine", "log.wandb", tmp_path, {"optim": {"batch_size": 4}}, resumed)
    first, resumed, fresh = (given["id"] for given in started)
    assert first == resumed != fresh
    assert started[0]["project"] == "mine"
    assert started[0]["config"]["optim"]["batch_size"] == 4


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_tensorboard_gets_the_bytes_of_a_picture(mode: str, tmp_path: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (5, 7, 4), np.uint8)).convert(mode)
    picture.save(tmp_path / "picture.png")
    schedule = Schedule(8, 1, 4, 1, 2, 8, 8, 8, 0.0, 0.1, 0.0)
    with RunLog(tmp_path, schedule, 0, resumed=False, is_main=True, word="train", wandb=None) as records:
        records.image(3, "validation/1", tmp_path / "picture.png")
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, found = path.read_bytes(), []
    while data:  # length, checksum, event, checksum
        (length,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + length])
        found += [(event.step, value.tag, value.image) for value in event.summary.value]
        data = data[16 + length :]
    ((step, tag, image),) = found
    assert (step, tag, image.height, image.width) == (3, "validation/1", 5, 7)
    assert image.encoded_image_string == (tmp_path / "picture.png").read_bytes()


def test_training_goes_on_without_tensorboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its writer reports a full disk some lines later."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    schedule = Schedule(8, 1, 4, 1, 2, 8, 8, 8, 0.0, 0.1, 0.0)
    with RunLog(tmp_path, schedule, 0, False, True, "test", None) as records:
        records.record(1, {"loss": 1.0})
        monkeypatch.setattr(SummaryWriter, "add_scalar", full)
        for step in (2, 3):
            records.record(step, {"loss": 1.0})
    assert [row["step"] for row in map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())] == [1, 2, 3]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "TensorBoard ends, training continues: No space left on device" in caplog.text


CPU = torch.device("cpu")


class Clock:
    """A clock that moves when it is told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(log_module, "clock", clock)
    return clock


@pytest.mark.parametrize("first", [0, 860], ids=["new", "resumed"])
def test_the_estimate_is_the_time_of_the_steps_that_remain(
    clock: Clock, caplog: pytest.LogCaptureFixture, first: int
) -> None:
    """Neither the slow first step nor a save counts, and it is logged once."""
    caplog.set_level("INFO")
    ahead = TimeAhead(1860, lambda step: (), {}, CPU, 1)
    for step in range(first + 1, first + 9):
        clock.now += 100 if step == first + 1 else 1.8
        ahead.count(step)
        if step == first + 2:
            clock.now += 40
            ahead.leave_out(40)
    # After 3 steps of 1.8 s and at least 5 s: 5.4 s, 4 steps are done.
    (line,) = [record.getMessage() for record in caplog.records]
    left = 1860 - first - 4
    minutes = round(left * 1.8 / 60)
    threads = name_processors(CPU, 1)
    assert threads == f"this machine ({torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)})"
    expected = f"about {minutes} min for the remaining {left:,} steps on {threads}; stop any time with Ctrl-C"
    assert line == expected


def test_the_estimate_has_evaluations_as_soon_as_their_time_is_known(
    clock: Clock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    schedule = Schedule(8, 1, 4, 1, 2, 1000, 1000, 1000, 0.0, 0.1, 0.0)
    records = RunLog(tmp_path, schedule, 0, False, False, "test", None)
    due = {100: ("validation", "pictures"), 500: ("pictures",), 1000: ("validation", "pictures")}
    ahead = TimeAhead(1000, lambda step: due.get(step, ()), records.seconds, CPU, 2)
    with records.timed("pictures"):  # before the first step
        clock.now += 60
    for step in range(1, 103):
        clock.now += 6
        for kind in due.get(step, ()):
            with records.timed(kind):
                clock.now += 1200 if kind == "validation" else 120
            ahead.leave_out(1200 if kind == "validation" else 120)
        ahead.count(step)
    first, second = [record.getMessage() for record in caplog.records]
    threads = name_processors(CPU, 2)
    # 996 steps of 6 s and three times 60 s; then 900 steps, 1,200 s and two times 120 s.
    assert first == (
        f"about 103 min for the remaining 996 steps and 3 evaluations on {threads}, without 2 evaluations of unknown "
        "time; stop any time with Ctrl-C"
    )
    assert second == (
        f"about 114 min for the remaining 900 steps and 3 evaluations on {threads}; stop any time with Ctrl-C"
    )


def test_one_very_long_step_is_enough(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    ahead = TimeAhead(100, lambda step: (), {}, CPU, 1)
    for step in (1, 2):
        clock.now += 600
        ahead.count(step)
    assert caplog.records[0].getMessage().startswith("about 16 h 20 min for the remaining 98 steps on ")
