"""Proves when a run may continue, and that a complete run stays as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from crossmae.errors import UserError
from crossmae.pretraining.train import pretrain
from tests.crossmae.pretraining.runs import make_config


def test_a_used_folder_needs_resume_and_the_same_settings(images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pretrain(make_config(images, run, schedule={"max_steps": 1}))
    with pytest.raises(UserError, match=r"already holds a run .* --resume"):
        pretrain(make_config(images, run))
    with pytest.raises(UserError, match=r"other settings: .*optim\.base_lr was 0\.1, is 0\.2"):
        pretrain(make_config(images, run, optim={"base_lr": 0.2}), resume=True)


def test_a_complete_run_only_gets_its_weights_back(images: Path, tmp_path: Path) -> None:
    config = make_config(images, tmp_path / "run", optim={"ema": 0.9}, schedule={"max_steps": 3})
    weights = pretrain(config)
    before = {name: (tmp_path / "run" / name).read_bytes() for name in ("model.safetensors", "log.jsonl")}
    averaged = load_file(tmp_path / "run" / "model_ema.safetensors")
    for name in ("model.safetensors", "model_ema.safetensors"):
        (tmp_path / "run" / name).unlink()
    assert pretrain(config, resume=True) == weights
    assert {name: (tmp_path / "run" / name).read_bytes() for name in before} == before
    again = load_file(tmp_path / "run" / "model_ema.safetensors")
    assert all(torch.equal(averaged[name], again[name]) for name in averaged)
