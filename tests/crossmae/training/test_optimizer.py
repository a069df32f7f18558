"""Proves learning rates and parameter groups against the method specification (1.6, 1.9, section 6)."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from crossmae.models.crossmae import create_model
from crossmae.pretraining.train import parameter_groups
from crossmae.training.schedule import lr_at


def test_schedule_is_warm_up_then_half_a_cosine() -> None:
    values = [lr_at(step, 1.0, 10, 110, 0.1) for step in range(111)]
    assert values[:11] == pytest.approx([step / 10 for step in range(11)])
    assert values[60] == pytest.approx(0.1 + 0.9 * 0.5)  # half way down
    assert values[110] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(values[10:]))
    assert values[35] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert lr_at(0, 1.0, 0, 10) == 1.0


def test_vit_base_has_the_published_groups() -> None:
    with torch.device("meta"):
        model = create_model("crossmae_vit_base_patch16")
    without, with_decay = parameter_groups(model, 0.05)
    assert (len(without["params"]), len(with_decay["params"])) == (232, 113)
    assert (without["weight_decay"], with_decay["weight_decay"]) == (0.0, 0.05)
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for group in (without, with_decay) for p in group["params"]} == trainable
    decayed = {id(p) for p in with_decay["params"]}
    assert {id(model.cls_token), id(model.mask_token), id(model.wfm.linear.weight)} <= decayed
