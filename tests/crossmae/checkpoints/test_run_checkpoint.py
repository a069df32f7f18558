"""Proves that only complete checkpoints count, and that the last good one is never lost."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from crossmae.checkpoints.run_checkpoint import (
    MANIFEST,
    MODEL,
    STATE,
    complete_checkpoints,
    latest_checkpoint,
    read_state,
    save_checkpoint,
)
from crossmae.errors import UserError
from crossmae.files import writing


def save(run: Path, step: int, keep: int = 2) -> Path:
    tensors = {"weight": torch.full((3,), float(step))}
    return save_checkpoint(run, step, tensors, {"step": str(step)}, {"step": step}, {"config": {}}, keep)


def steps(run: Path) -> list[int]:
    return [int(folder.name.removeprefix("step-")) for folder in complete_checkpoints(run)]


def test_round_trip_and_retention(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        folder = save(tmp_path, step)
    assert steps(tmp_path) == [2, 3]
    assert latest_checkpoint(tmp_path) == folder
    assert torch.equal(load_file(folder / MODEL)["weight"], torch.full((3,), 3.0))
    assert read_state(folder) == {"step": 3}
    assert not list(tmp_path.rglob("*.tmp"))


def test_latest_complete_wins_over_a_zoo_of_bad_entries(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = save(tmp_path, 1, keep=9)
    (save(tmp_path, 2, keep=9) / MANIFEST).unlink()
    (save(tmp_path, 3, keep=9) / STATE).unlink()
    torn = save(tmp_path, 4, keep=9) / MODEL
    torn.write_bytes(torn.read_bytes()[:-1])
    flipped = save(tmp_path, 5, keep=9) / MODEL
    content = bytearray(flipped.read_bytes())
    content[-1] ^= 1
    flipped.write_bytes(content)
    (save(tmp_path, 6, keep=9) / MANIFEST).write_text("{")
    (tmp_path / "checkpoints" / "step-latest").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(tmp_path) == good
    for name, reason in [
        ("step-00000002", "never completed"),
        ("step-00000003", "no bytes"),
        ("step-00000004", "bytes instead of"),
        ("step-00000005", "SHA-256"),
        ("step-00000006", "damaged"),
        ("step-latest", "its name"),
    ]:
        assert any(name in line and reason in line for line in caplog.messages), name
    assert sorted(tmp_path.rglob("*")) == before  # looking deletes nothing


def test_a_crash_at_any_rename_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, keep=1)
    replace, renames = os.replace, 4  # model, state, record, manifest
    for crash_at in range(renames):
        calls = 0

        def crash(source: Path, target: Path, crash_at: int = crash_at) -> None:
            nonlocal calls
            if calls == crash_at:
                raise OSError("no space left on device")
            calls += 1
            replace(source, target)

        monkeypatch.setattr(writing.os, "replace", crash)
        with pytest.raises(OSError, match="no space"):
            save(tmp_path, 2, keep=1)
        assert steps(tmp_path) == [1]
    monkeypatch.setattr(writing.os, "replace", replace)
    save(tmp_path, 2, keep=1)
    assert steps(tmp_path) == [2]


def test_state_is_read_without_running_code(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (os.system, (f"touch {tmp_path}/sentinel",))

    folder = save(tmp_path, 1)
    torch.save({"step": Payload()}, folder / STATE)
    with pytest.raises(UserError, match=r"state\.pt"):
        read_state(folder)
    assert not (tmp_path / "sentinel").exists()


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
