"""Proves learning rates (method specification, 1.9), shortened ones, and counts of batches, periods and images."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from crossmae.data.batches import BatchPlan
from crossmae.training.schedule import Schedule, lr_at, make_schedule
from tests.crossmae.pretraining.runs import make_config


def plan(batch_size: int = 4, images: int = 13, world_size: int = 1, **sections: Any) -> Schedule:
    sections["optim"] = sections.get("optim", {}) | {"batch_size": batch_size}
    config = make_config(Path("images"), Path("out"), **sections)
    return make_schedule(BatchPlan(images, batch_size, 0, 0, world_size), config.optim, config.schedule)


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


def test_a_step_counts_every_image_and_the_factor_scales_its_learning_rate() -> None:
    config = make_config(Path("images"), Path("out"), optim={"base_lr": 1e-3, "accumulate": 2, "batch_size": 8})
    made = make_schedule(BatchPlan(1000, 8, 0, 0, 4), config.optim, config.schedule, lr_factor=3.0)
    assert (made.images_per_step, made.images_per_batch) == (64, 32)
    assert made.peak_lr == pytest.approx(1e-3 * 64 / 256 * 3)


def test_schedule_is_warm_up_then_half_a_cosine() -> None:
    values = [lr_at(step, 1.0, 10, 110, 0.1) for step in range(111)]
    assert values[:11] == pytest.approx([step / 10 for step in range(11)])
    assert values[60] == pytest.approx(0.1 + 0.9 * 0.5)  # half way down
    assert values[110] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(values[10:]))
    assert values[35] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert lr_at(0, 1.0, 0, 10) == 1.0


def test_a_shortened_run_follows_the_rest_of_its_curve_in_fewer_steps() -> None:
    """Up to the cut nothing changes; from there, each step covers more of the curve, which ends as it would have."""
    made = plan(images=400, schedule={"epochs": 10, "warmup_epochs": 1, "min_lr": 1e-4})  # 100 steps an epoch
    short = made.shorten(400, 600)
    assert (short.total_steps, short.last_step, short.total_batches) == (600, 600, 600)
    assert [short.lr_at(step) for step in range(401)] == [made.lr_at(step) for step in range(401)]
    # 200 steps cover the 600 that were left: every third rate of the original.
    assert [short.lr_at(400 + step) for step in range(201)] == [made.lr_at(400 + 3 * step) for step in range(201)]
    assert short.lr_at(600) == 1e-4
    # In the warm-up, the rest of the warm-up is compressed, too.
    early = made.shorten(50, 525)
    assert [early.lr_at(50 + step) for step in range(476)] == [made.lr_at(50 + 2 * step) for step in range(476)]


def test_a_run_is_shortened_twice_and_keeps_its_own_end() -> None:
    made = plan(images=400, schedule={"epochs": 10, "max_steps": 700})
    twice = made.shorten(400, 800).shorten(600, 700)
    assert [twice.lr_at(600 + step) for step in range(101)] == [made.lr_at(700 + 3 * step) for step in range(101)]
    assert [twice.lr_at(step) for step in (401, 500, 600)] == [made.shorten(400, 800).lr_at(s) for s in (401, 500, 600)]
    assert made.shorten(400, 800).last_step == 700
    assert twice.plan()["cuts"] == ((400, 1000, 800), (600, 800, 700))
