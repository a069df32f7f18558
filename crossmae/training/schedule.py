"""What a pretraining run will do, in numbers that follow from its config and data."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from crossmae.data.batches import BatchPlan
from crossmae.errors import UserError
from crossmae.models.crossmae import CrossMAE
from crossmae.models.sizes import model_arguments
from crossmae.training.config import PretrainConfig, ProbeConfig, RunConfig
from crossmae.training.optimizer import lr_at, scaled_lr

# Sections, and keys of data, that may change between a run and its continuation.
NOT_DECISIVE = {"output_dir", "log", "validation", "probe", "health", "evaluation", "checkpoint"}
NOT_DECISIVE_DATA = {"train", "root", "val", "val_root", "check", "broken_budget", "workers", "class_names"}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """Numbers of a run; printed at the start, saved with checkpoints.

    Attributes:
        images: of the training source.
        world_size: processes.
        batches_per_epoch: micro-batches of each process in an epoch.
        accumulate: micro-batches in a step; the very last step has what is left.
        images_per_step: over all processes and micro-batches.
        total_batches, total_steps: micro-batches of each process, and steps, of the whole schedule.
        last_step: where this run stops; the same unless schedule.max_steps says less.
        warmup_steps: with the learning rate rising.
        peak_lr: learning rate after that.
        device, precision: what "auto" stands for here.
    """

    images: int
    world_size: int
    batches_per_epoch: int
    accumulate: int
    images_per_step: int
    total_batches: int
    total_steps: int
    last_step: int
    warmup_steps: float
    peak_lr: float
    device: str
    precision: str

    @property
    def place(self) -> str:
        """Device, processes and precision, in words."""
        more = f" and {self.world_size - 1} more processes" if self.world_size > 1 else ""
        return f"{self.device}{more} in {self.precision}"

    def batches_done(self, step: int) -> int:
        """Micro-batches that `step` steps consume: the position in the data."""
        return min(step * self.accumulate, self.total_batches)

    def epoch(self, step: int) -> float:
        """Epochs done after `step` steps."""
        return self.batches_done(step) / self.batches_per_epoch

    def ends_period(self, step: int, epochs: int) -> bool:
        """Whether a period of `epochs` epochs ends in step `step`, counted from 1; the last step ends all."""
        period = self.batches_per_epoch * epochs
        return step == self.last_step or self.batches_done(step) // period > self.batches_done(step - 1) // period


def make_plan(config: PretrainConfig, batches: BatchPlan, device: torch.device, precision: str) -> Plan:
    """Work out steps and learning rate of pretraining; errors as `plan_steps`."""
    optim, model = config.optim, config.model
    predict_ratio = model.mask_ratio if is_plain(config) else model.predict_ratio
    images_per_step = optim.batch_size * optim.accumulate * batches.world_size
    peak = optim.lr or scaled_lr(optim.base_lr, images_per_step, model.mask_ratio, predict_ratio, optim.lr_rule)
    return plan_steps(config, batches, device, precision, peak)


def plan_steps(config: RunConfig, batches: BatchPlan, device: torch.device, precision: str, peak: float) -> Plan:
    """Work out the steps of any training whose learning rate reaches `peak`.

    Raises:
        UserError: fewer batches per epoch than micro-batches per step, or a warm-up longer than the run.
    """
    optim, schedule = config.optim, config.schedule
    per_epoch = batches.batches_per_epoch
    if per_epoch < optim.accumulate:
        raise UserError(
            f"optim.accumulate: a step needs {optim.accumulate} batches of {optim.batch_size} images, one "
            f"epoch of {batches.num_images} images has {per_epoch}; lower one of the two"
        )
    if schedule.warmup_epochs > schedule.epochs:
        raise UserError(f"schedule.warmup_epochs: {schedule.warmup_epochs} exceeds schedule.epochs {schedule.epochs}")
    total_batches = per_epoch * schedule.epochs
    total = math.ceil(total_batches / optim.accumulate)
    images_per_step = optim.batch_size * optim.accumulate * batches.world_size
    if schedule.min_lr > peak:
        raise UserError(f"schedule.min_lr: {schedule.min_lr:g} is above the peak learning rate, {peak:.3g}")
    return Plan(
        images=batches.num_images,
        world_size=batches.world_size,
        batches_per_epoch=per_epoch,
        accumulate=optim.accumulate,
        images_per_step=images_per_step,
        total_batches=total_batches,
        total_steps=total,
        last_step=min(total, schedule.max_steps or total),
        warmup_steps=schedule.warmup_epochs * per_epoch / optim.accumulate,
        peak_lr=peak,
        device=str(device),
        precision=precision,
    )


def is_plain(config: PretrainConfig) -> bool:
    """Whether the decoder is plain MAE's, to which the predict ratio does not apply."""
    return (config.model.decoder or model_arguments(config.model.name)["decoder"]) == "self"


def fingerprint(config: RunConfig, plan: Plan) -> dict[str, str]:
    """What must not change between a run and its continuation, as text by key."""
    sections = set(type(config).model_fields) - NOT_DECISIVE
    values: dict[str, dict[str, Any]] = config.model_dump(mode="json", include=sections)
    values["data"] = {key: value for key, value in values["data"].items() if key not in NOT_DECISIVE_DATA}
    values["schedule"].pop("max_steps")
    values["model"].pop("init")
    values["runtime"] = {"seed": values["runtime"]["seed"]}
    flat = {f"{section}.{key}": json.dumps(value) for section, keys in values.items() for key, value in keys.items()}
    return flat | {"images": str(plan.images), "precision": plan.precision, "processes": str(plan.world_size)}


def announce(config: PretrainConfig, plan: Plan, model: CrossMAE, step: int, has_shards: bool) -> None:
    """Tell what is about to happen, in numbers."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log.info("%s: %.1f M trainable parameters, on %s", config.model.name, trainable / 1e6, plan.place)
    counts = model.patch_counts(config.model.mask_ratio, config.model.predict_ratio)
    log.info("%d patches per image: %d visible, %d dropped, %d predicted", model.num_patches, *counts)
    for reason, keys in ignored_settings(config, has_shards).items():
        log.info("ignored, because %s: %s", reason, ", ".join(keys))
    announce_steps(config, plan, step, lr_rule(config, plan))


def announce_steps(config: RunConfig, plan: Plan, step: int, rule: str) -> None:
    """Tell how many steps are about to be done, and their learning rate, which comes from `rule`."""
    left_out = plan.images - plan.batches_per_epoch * config.optim.batch_size * plan.world_size
    log.info(
        "%d images, %d per step, %.4g steps per epoch%s",
        plan.images,
        plan.images_per_step,
        plan.batches_per_epoch / plan.accumulate,
        f"; {left_out} that fill no batch are left out of an epoch, others each time" if left_out else "",
    )
    if plan.last_step < plan.total_steps:
        reached = lr_at(plan.last_step - 1, plan.peak_lr, plan.warmup_steps, plan.total_steps, config.schedule.min_lr)
        words = "schedule.max_steps ends the run at step %d of %d, at a learning rate of %.3g"
        log.info(words, plan.last_step, plan.total_steps, reached)
    log.info("steps %d to %d, peak learning rate %.3g = %s", step + 1, plan.last_step, plan.peak_lr, rule)


def ignored_settings(config: PretrainConfig, has_shards: bool) -> dict[str, list[str]]:
    """Keys that were given but have no effect, by the reason why."""
    model, data = config.model, config.data
    without_fusion = not is_plain(config) and model.fuse_blocks == ()
    probe = set(ProbeConfig.model_fields) - {"train", "val"}
    cases = [
        (is_plain(config), "decoder is 'self'", "model", {"fuse_blocks", "fuse_input", "predict_ratio"}),
        (without_fusion, "model.fuse_blocks is empty", "model", {"fuse_input"}),
        (config.optim.lr is not None, "optim.lr is given", "optim", {"base_lr", "lr_rule"}),
        (data.val is None, "data.val is not given", "validation", {"every_epochs", "images"}),
        (data.val is None, "data.val is not given", "data", {"val_root"}),
        (data.broken == "error", "data.broken is error", "data", {"broken_budget"}),
        (not has_shards, "data.train has no shards", "data", {"shuffle_shards"}),
        (config.probe.train is None, "probe.train is not given", "probe", probe),
        (not config.health.band, "health.band is not given", "health", {"measured_on"}),
    ]
    return given_in_vain(config, cases)


def given_in_vain(config: RunConfig, cases: Sequence[tuple[bool, str, str, set[str]]]) -> dict[str, list[str]]:
    """Of each case that applies, its reason and those of its keys, in a section, that were given."""
    ignored: dict[str, list[str]] = {}
    for applies, reason, section, keys in cases:
        values = getattr(config, section)
        given = [key for key in sorted(keys & values.model_fields_set) if getattr(values, key) is not None]
        if applies and given:
            ignored.setdefault(reason, []).extend(f"{section}.{key}" for key in given)
    return ignored


def lr_rule(config: PretrainConfig, plan: Plan) -> str:
    """How the peak learning rate was worked out, as arithmetic."""
    optim, model = config.optim, config.model
    if optim.lr:
        return "optim.lr"
    predict = model.mask_ratio if is_plain(config) else model.predict_ratio
    factors = {
        "published": f" * {predict:g} / {model.mask_ratio:g} (lr_rule published: predict / mask ratio)",
        "none": " (lr_rule none)",
        "inverse": f" * {model.mask_ratio:g} / {predict:g} (lr_rule inverse: mask / predict ratio)",
    }
    return f"base_lr {optim.base_lr:g} * {plan.images_per_step} / 256{factors[optim.lr_rule]}"
