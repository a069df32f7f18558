"""Proves how `auto` chooses a precision: what a run has recorded, else what is faster on the device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from crossmae.training.devices import BF16_WIDTH, choose_precision, multiplies_bf16
from crossmae.training.resume import resumed_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize("has_bf16", [True, False])
@pytest.mark.parametrize("width", [0, BF16_WIDTH - 1, BF16_WIDTH])
def test_auto_takes_bf16_on_a_cpu_that_multiplies_it_and_for_wide_models(
    monkeypatch: pytest.MonkeyPatch, has_bf16: bool, width: int
) -> None:
    monkeypatch.setattr("crossmae.training.devices.multiplies_bf16", lambda: has_bf16)
    expected = "bf16" if has_bf16 and width == BF16_WIDTH else "fp32"
    assert choose_precision("auto", CPU, width=width) == expected


@pytest.mark.parametrize("recorded", ["fp32", "bf16"])
def test_a_resumed_run_keeps_its_precision(monkeypatch: pytest.MonkeyPatch, recorded: str, tmp_path: Path) -> None:
    write_record(tmp_path, 1, {"fingerprint": {"precision": recorded}})
    for has_bf16 in (True, False):
        monkeypatch.setattr("crossmae.training.devices.multiplies_bf16", lambda has_bf16=has_bf16: has_bf16)
        assert choose_precision(resumed_precision("auto", tmp_path), CPU, width=BF16_WIDTH) == recorded
    assert choose_precision(resumed_precision("fp16", tmp_path), CPU, width=BF16_WIDTH) == "fp16"


@pytest.mark.parametrize("names, expected", [(["avx512_bf16"], True), (["amx_bf16"], True), (["avx2"], False)])
def test_capabilities_are_those_of_torch(monkeypatch: pytest.MonkeyPatch, names: list[str], expected: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(names, True), raising=False)
    assert multiplies_bf16() is expected
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert multiplies_bf16() is False


def write_record(run: Path, step: int, content: Any) -> None:
    folder = run / f"checkpoints/step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    (folder / "run.json").write_text(json.dumps(content))


def test_the_precision_is_that_of_the_newest_checkpoint_that_records_one(tmp_path: Path) -> None:
    assert resumed_precision("auto", tmp_path) == "auto"
    for step, precision in enumerate(["fp32", "bf16"]):
        write_record(tmp_path, step, {"fingerprint": {"precision": precision}})
        assert resumed_precision("auto", tmp_path) == precision
    for step, odd in enumerate([[], {}, {"fingerprint": 3}, {"fingerprint": {"precision": ["fp32"]}}], start=2):
        write_record(tmp_path, step, odd)
        assert resumed_precision("auto", tmp_path) == "bf16"
