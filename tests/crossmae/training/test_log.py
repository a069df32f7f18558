"""Proves what the log of a run survives and where else it goes."""

from __future__ import annotations

import errno
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from torch.utils.tensorboard import SummaryWriter

from crossmae.errors import UserError
from crossmae.training.log import RunLog, start_wandb, truncate_log
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
    with pytest.raises(UserError, match=r'log\.wandb \(null does.*pip install -e "\.\[wandb\]"'):
        start_wandb("mine", tmp_path, {}, resumed=False)


def test_wandb_gets_every_value_and_a_resumed_run_keeps_its_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, Any]] = []
    fake: Any = types.ModuleType("wandb")
    fake.init = lambda **given: started.append(given)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for resumed in (False, True, False):
        start_wandb("mine", tmp_path, {"optim": {"batch_size": 4}}, resumed)
    first, resumed, fresh = (given["id"] for given in started)
    assert first == resumed != fresh
    assert started[0]["project"] == "mine"
    assert started[0]["config"]["optim"]["batch_size"] == 4


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
