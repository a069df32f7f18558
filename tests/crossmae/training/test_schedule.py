"""Proves that a plan counts micro-batches and periods right, and that a setting without effect is announced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from crossmae.data.batches import BatchPlan
from crossmae.training.schedule import Plan, ignored_settings, lr_rule, make_plan
from tests.crossmae.pretraining.test_train import make_config


def plan(batch_size: int = 4, images: int = 13, world_size: int = 1, **sections: Any) -> Plan:
    sections["optim"] = sections.get("optim", {}) | {"batch_size": batch_size}
    config = make_config(Path("images"), Path("out"), **sections)
    batches = BatchPlan(images, batch_size, 0, 0, world_size)
    return make_plan(config, batches, torch.device("cpu"), "fp32")


def test_every_micro_batch_belongs_to_one_step() -> None:
    """3 batches an epoch, 4 epochs, 5 in a step: 12 batches in 3 steps."""
    with pytest.raises(ValueError, match="a step needs 5 batches"):
        plan(optim={"accumulate": 5})
    made = plan(images=26, optim={"accumulate": 5}, schedule={"epochs": 2})
    assert (made.batches_per_epoch, made.total_batches, made.total_steps) == (6, 12, 3)
    assert [made.batches_done(step) for step in range(5)] == [0, 5, 10, 12, 12]
    assert made.epoch(3) == 2


def test_a_period_ends_in_the_step_that_reaches_it() -> None:
    """Epochs end inside steps; each ends once, and the last step ends everything."""
    made = plan(images=26, optim={"accumulate": 4}, schedule={"epochs": 5})  # 6 batches an epoch, 8 steps
    ends = [step for step in range(1, 9) if made.ends_period(step, 1)]
    assert ends == [2, 3, 5, 6, 8]
    assert [step for step in range(1, 9) if made.ends_period(step, 2)] == [3, 6, 8]


@pytest.mark.parametrize(
    ("rule", "factor", "words"),
    [
        ("published", 1 / 3, "base_lr 0.001 * 64 / 256 * 0.25 / 0.75 (lr_rule published: predict / mask ratio)"),
        ("none", 1.0, "base_lr 0.001 * 64 / 256 (lr_rule none)"),
        ("inverse", 3.0, "base_lr 0.001 * 64 / 256 * 0.75 / 0.25 (lr_rule inverse: mask / predict ratio)"),
    ],
)
def test_the_learning_rate_counts_every_image_of_a_step(rule: str, factor: float, words: str) -> None:
    optim = {"base_lr": 1e-3, "lr_rule": rule, "accumulate": 2, "batch_size": 8}
    config = make_config(Path("images"), Path("out"), optim=optim)
    made = make_plan(config, BatchPlan(1000, 8, 0, 0, 4), torch.device("cpu"), "fp32")
    assert made.images_per_step == 64
    assert made.peak_lr == pytest.approx(1e-3 * 64 / 256 * factor)
    assert lr_rule(config, made) == words


def test_settings_without_effect_are_named() -> None:
    quiet = make_config(Path("images"), Path("out"))
    assert ignored_settings(quiet, has_shards=False) == {}
    loud = make_config(
        Path("images"),
        Path("out"),
        model={"decoder": "self", "fuse_input": False},
        optim={"lr": 1e-3, "lr_rule": "none"},
        validation={"images": 5},
        probe={"k": 3},
        data={"broken_budget": 0.5, "shuffle_shards": 3},
    )
    assert sorted(key for keys in ignored_settings(loud, has_shards=False).values() for key in keys) == [
        "data.broken_budget",
        "data.shuffle_shards",
        "model.fuse_input",
        "optim.base_lr",
        "optim.lr_rule",
        "probe.k",
        "validation.images",
    ]
