"""Small pretraining runs, and what tests compare of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from crossmae.checkpoints.run_checkpoint import complete_checkpoints, read_state
from crossmae.models.crossmae import CrossMAE
from crossmae.models.sizes import model_arguments
from crossmae.pretraining.config import PretrainConfig
from crossmae.pretraining.initial_weights import build_model


def make_config(images: Path, output: Path, **sections: Any) -> PretrainConfig:
    values: dict[str, Any] = {
        "output_dir": output,
        "data": {"train": str(images), "workers": 0},
        "model": {
            "name": "crossmae_vit_tiny_patch16",
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": 16,
            "depth": 2,
            "num_heads": 2,
            "decoder_embed_dim": 16,
            "decoder_depth": 2,
            "decoder_num_heads": 2,
        },
        "optim": {"batch_size": 4, "base_lr": 0.1},
        "schedule": {"epochs": 4, "warmup_epochs": 1},
        "runtime": {"device": "cpu"},
        "log": {"every_steps": 1, "pictures": 0},  # drawing takes longer than training so little
        "checkpoint": {"every_epochs": 1},
    }
    for section, changes in sections.items():
        values[section] = values.get(section, {}) | changes if isinstance(changes, dict) else changes
    return PretrainConfig.model_validate(values)


def arguments(config: PretrainConfig) -> dict[str, Any]:
    return model_arguments(config.model.name) | config.model.arguments()


def build(config: PretrainConfig) -> CrossMAE:
    """The untrained model of a run."""
    return build_model(arguments(config), config.runtime.seed, 0.75, 0.25)


def digest(run: Path) -> dict[str, Any]:
    """Everything that an exact resume must reproduce."""
    folder = complete_checkpoints(run)[-1]
    state = read_state(folder)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {
        "weights": load_file(folder / "model.safetensors"),
        "moments": state["optimizer"]["state"],
        "curve": [(line["step"], line["loss"], line["lr"]) for line in lines if "loss" in line],
    }


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first["curve"] == second["curve"]
    assert first["weights"].keys() == second["weights"].keys()
    assert all(torch.equal(first["weights"][key], second["weights"][key]) for key in first["weights"])
    for index, moments in first["moments"].items():
        assert all(torch.equal(value, second["moments"][index][key]) for key, value in moments.items())


def log_lines(run: Path, key: str) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line[key]) for line in lines if key in line]


def judged(labelled: Path) -> dict[str, Any]:
    return {
        "data": {"val": str(labelled / "val")},
        "validation": {"every_epochs": 2},
        "probe": {
            "train": str(labelled / "train"),
            "val": str(labelled / "val"),
            "every_epochs": 2,
            "k": 3,
        },
        "log": {"pictures_every_steps": 5, "pictures": 2},
    }
