"""Proves what the log of a run survives and where else it goes."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from crossmae.errors import UserError
from crossmae.training.log import start_wandb, truncate_log


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
