"""Proves that settings of the model are found wherever trainers keep them, and those of other models are not."""

from __future__ import annotations

import argparse
import json
from typing import Any

import pytest
import torch

from crossmae.checkpoints.reading.settings import trainer_settings

TENSORS = {"blocks.0.norm1.weight": torch.ones(2)}


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (TENSORS, {}),
        ({"state_dict": TENSORS, "epoch": 3, "args": {"lr": 0.1}}, {}),
        ({"state_dict": TENSORS, "arch": "vit_small_patch16_224"}, {"name": ["vit_small_patch16_224"]}),
        ({"model": TENSORS, "args": argparse.Namespace(num_heads=3, lr=1.0)}, {"num_heads": [3]}),
        ({"state_dict": TENSORS, "hyper_parameters": {"vit": {"num_heads": 3, "img_size": [32, 64]}}},
         {"num_heads": [3], "img_size": [[32, 64]]}),
        ({"model": TENSORS, "config": {"decoder": {"num_heads": 16}, "encoder": {"num_heads": 3}}}, {"num_heads": [3]}),
        ({"model": TENSORS, "args": {"num_heads": True, "arch": "x" * 101}}, {}),
        ({"teacher": TENSORS, "args": argparse.Namespace(arch="vit_small")}, {"name": ["vit_small"], "family": "dino"}),
        ({"arch": "vit_small", "state_dict": {"module.momentum_encoder.cls_token": torch.ones(1)}},
         {"name": ["vit_small"], "family": "moco-v3"}),
        ([TENSORS], {}),
    ],
)  # fmt: skip
def test_settings(content: Any, found: dict[str, Any]) -> None:
    assert json.loads(trainer_settings(content).get("trainer_settings", "{}")) == found


def test_cycles_and_depth_are_bounded() -> None:
    content: dict[str, Any] = {"num_heads": 3}
    content["again"] = content
    assert json.loads(trainer_settings(content)["trainer_settings"]) == {"num_heads": [3]}
