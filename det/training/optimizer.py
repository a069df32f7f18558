"""Parameter groups of a detector, and its schedule in steps: layer decay, learning rate, epochs."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.layers.batch_norm import LayerNorm as ChannelFirstLayerNorm
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.solver import LRMultiplier, WarmupParamScheduler
from detectron2.solver.build import reduce_param_groups
from fvcore.common.param_scheduler import CosineParamScheduler, MultiStepParamScheduler
from torch import nn

from det.config import EvaluationKeys, SolverKeys

log = logging.getLogger(__name__)

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, ChannelFirstLayerNorm)
_POSITIONS = ("pos_embed", "pos_embed_global", "rel_pos_h", "rel_pos_w")
# As a fraction of the run. With a longer warm-up, detectron2 would warm up to a rate that has already decayed.
LONGEST_WARMUP = 0.1


def parameter_groups(model: nn.Module, solver: SolverKeys, base_lr: float, depth: int) -> list[dict[str, Any]]:
    """Group trainable parameters by learning rate and weight decay.

    Source: method specification, section 3.1. `depth` is the number n of blocks. The learning rate of encoder layer i
    is base_lr * LAYER_DECAY ** (n + 1 - i). Layer 0 is patch embedding and positions, layer i is block i - 1, and layer
    n + 1 is everything outside the encoder. `WEIGHT_DECAY_NORM` applies to norms, and `WEIGHT_DECAY_POS` to absolute
    and relative positions. Norms are recognised by type, because detectron2's own list lacks its channel-first
    LayerNorm.
    """
    groups = []
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            decay = solver.WEIGHT_DECAY
            if isinstance(module, _NORMS):
                decay = solver.WEIGHT_DECAY_NORM
            elif name in _POSITIONS:
                decay = solver.WEIGHT_DECAY_POS
            factor = get_vit_lr_decay_rate(f"{module_name}.{name}", solver.LAYER_DECAY, depth)
            groups.append({"params": [parameter], "lr": base_lr * factor, "weight_decay": decay})
    return reduce_param_groups(groups)


@dataclass(frozen=True)
class StepSchedule:
    """A detector's schedule in optimizer steps."""

    max_iter: int
    base_lr: float  # after warm-up, for layers outside the encoder
    base_lr_end: float  # at the end of a cosine schedule
    warmup_iters: int  # at most a tenth of the run
    steps: tuple[int, ...]  # steps after which the learning rate falls
    eval_period: int  # 0: evaluate only at the end
    checkpoint_period: int


def resolve_schedule(solver: SolverKeys, test: EvaluationKeys, num_images: int) -> StepSchedule:
    """Convert epochs and fractions of a run to steps.

    If there is a `REFERENCE_BATCH`, the learning rate is scaled linearly with the batch size. With `EVAL_EPOCHS`, there
    is at least one checkpoint per evaluation. `num_images` is the size of the training set.
    """
    batch = solver.IMS_PER_BATCH
    factor = batch / solver.REFERENCE_BATCH if solver.REFERENCE_BATCH else 1.0
    max_iter = max(1, round(solver.EPOCHS * num_images / batch)) if solver.EPOCHS else solver.MAX_ITER
    warmup = min(solver.WARMUP_ITERS, max(1, int(LONGEST_WARMUP * max_iter)))
    if warmup < solver.WARMUP_ITERS:
        log.info("SOLVER.WARMUP_ITERS is %d, a tenth of the run", warmup)
    steps = [round(share * max_iter) for share in solver.DECAY_AT] or solver.STEPS
    eval_period, checkpoint_period = test.EVAL_PERIOD, solver.CHECKPOINT_PERIOD
    if test.EVAL_EPOCHS:
        eval_period = max(1, round(test.EVAL_EPOCHS * num_images / batch))
        checkpoint_period = min(checkpoint_period, eval_period)
    return StepSchedule(
        max_iter=max_iter,
        base_lr=solver.BASE_LR * factor,
        base_lr_end=solver.BASE_LR_END * factor,
        warmup_iters=warmup,
        steps=tuple(sorted({step for step in steps if step < max_iter})),
        eval_period=eval_period,
        checkpoint_period=checkpoint_period,
    )


def describe_schedule(schedule: StepSchedule, solver: SolverKeys, num_images: int, depth: int) -> str:
    """Describe the schedule of a run in one line."""
    batch = solver.IMS_PER_BATCH
    epochs = schedule.max_iter * batch / num_images
    parts = f" in {solver.ACCUMULATE} parts" if solver.ACCUMULATE > 1 else ""
    rule = f" (= {solver.BASE_LR:g} x {batch} / {solver.REFERENCE_BATCH})" if solver.REFERENCE_BATCH else ""
    lowest = schedule.base_lr * solver.LAYER_DECAY ** (depth + 1)
    layers = f", {lowest:.3g} in the first layer" if solver.LAYER_DECAY < 1 else ""
    if solver.LR_SCHEDULER_NAME == "WarmupCosineLR":
        decay = f", then along a cosine to {schedule.base_lr_end:g}"
    else:
        decay = "".join(f", x {solver.GAMMA:g} after step {step:,}" for step in schedule.steps)
    return (
        f"{schedule.max_iter:,} steps of {batch} images{parts}: {epochs:.4g} epochs of {num_images:,} images; learning "
        f"rate {schedule.base_lr:.3g}{rule}{layers}, after {schedule.warmup_iters:,} steps of warm-up{decay}"
    )


def build_scheduler(optimizer: torch.optim.Optimizer, solver: SolverKeys, schedule: StepSchedule) -> LRMultiplier:
    """Build a warm-up, followed by a cosine or drops by `GAMMA`."""
    if solver.LR_SCHEDULER_NAME == "WarmupCosineLR":
        after = CosineParamScheduler(1, schedule.base_lr_end / schedule.base_lr)
    else:
        factors = [solver.GAMMA**drops for drops in range(len(schedule.steps) + 1)]
        after = MultiStepParamScheduler(factors, milestones=schedule.steps, num_updates=schedule.max_iter)
    warmup = schedule.warmup_iters / schedule.max_iter
    whole = WarmupParamScheduler(after, solver.WARMUP_FACTOR, warmup, solver.WARMUP_METHOD, solver.RESCALE_INTERVAL)
    return LRMultiplier(optimizer, multiplier=whole, max_iter=schedule.max_iter)
