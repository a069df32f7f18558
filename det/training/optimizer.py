"""Parameter groups of a detector, and its schedule in steps: layer decay, learning rate, epochs."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

from detectron2.layers.batch_norm import LayerNorm as ChannelFirstLayerNorm
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import reduce_param_groups
from fvcore.common.param_scheduler import CosineParamScheduler, MultiStepParamScheduler, ParamScheduler
from torch import nn

from crossmae.errors import counted
from crossmae.training.schedule import Schedule
from det.config import EvaluationKeys, SolverKeys

log = logging.getLogger(__name__)

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, ChannelFirstLayerNorm)
_POSITIONS = ("pos_embed", "pos_embed_global", "rel_pos_h", "rel_pos_w")
# As a fraction of the run. With a longer warm-up, detectron2 would warm up to a rate that has already decayed.
LONGEST_WARMUP = 0.1


def parameter_groups(model: nn.Module, solver: SolverKeys, depth: int) -> list[dict[str, Any]]:
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
            groups.append({"params": [parameter], "lr_scale": factor, "weight_decay": decay})
    return reduce_param_groups(groups)


@dataclass(frozen=True)
class StepSchedule(Schedule):
    """A detector's schedule in optimizer steps.

    Attributes:
        lr_end: learning rate at the end of a cosine schedule.
        milestones: steps after which the learning rate falls.
        eval_period: steps between evaluations. 0: evaluate only at the end.
        checkpoint_period: steps between checkpoints.
        multiplier: factor on `peak_lr` at a share of the run.
    """

    lr_end: float
    milestones: tuple[int, ...]
    eval_period: int
    checkpoint_period: int
    multiplier: ParamScheduler

    def lr_at(self, step: int) -> float:
        """Compute the learning rate of step `step`, counted from 0."""
        total = self.cuts[0][1] if self.cuts else self.total_steps
        return self.peak_lr * float(self.multiplier(self.uncut(step) / total))

    @property
    def steps_per_epoch(self) -> float:
        return self.images / self.images_per_step

    def shorten(self, step: int, total_steps: int) -> StepSchedule:
        """Shorten the run to `total_steps` from `step` on, milestones included."""
        share = (total_steps - step) / (self.total_steps - step)
        moved = tuple(at if at <= step else round(step + (at - step) * share) for at in self.milestones)
        return replace(super().shorten(step, total_steps), milestones=moved)

    def plan(self) -> dict[str, Any]:
        return {key: value for key, value in super().plan().items() if key != "multiplier"}

    def saves_after(self, step: int) -> bool:
        """Tell whether a checkpoint is due after a step."""
        return step == self.last_step or step % self.checkpoint_period == 0


def resolve_schedule(solver: SolverKeys, test: EvaluationKeys, num_images: int, processes: int = 1) -> StepSchedule:
    """Convert epochs and fractions of a run to steps.

    If there is a `REFERENCE_BATCH`, the learning rate is scaled linearly with the batch size. There is a checkpoint
    before each evaluation with `EVAL_EPOCHS`. `num_images` is the size of the training set.
    """
    batch, parts = solver.IMS_PER_BATCH, solver.ACCUMULATE
    factor = batch / solver.REFERENCE_BATCH if solver.REFERENCE_BATCH else 1.0
    total = max(1, round(solver.EPOCHS * num_images / batch)) if solver.EPOCHS else solver.MAX_ITER
    warmup = min(solver.WARMUP_ITERS, max(1, int(LONGEST_WARMUP * total)))
    if warmup < solver.WARMUP_ITERS:
        log.info("SOLVER.WARMUP_ITERS is %d, a tenth of the run", warmup)
    steps = [round(share * total) for share in solver.DECAY_AT] or solver.STEPS
    milestones = tuple(sorted({step for step in steps if step < total}))
    eval_period, checkpoint_period = test.EVAL_PERIOD, solver.CHECKPOINT_PERIOD
    if test.EVAL_EPOCHS:
        eval_period = max(1, round(test.EVAL_EPOCHS * num_images / batch))
        checkpoint_period = min(checkpoint_period, eval_period)
    return StepSchedule(
        images=num_images,
        world_size=processes,
        batches_per_epoch=max(num_images // batch, 1) * parts,
        accumulate=parts,
        images_per_step=batch,
        total_batches=total * parts,
        total_steps=total,
        last_step=total,
        warmup_steps=warmup,
        peak_lr=solver.BASE_LR * factor,
        min_lr=0.0,
        lr_end=solver.BASE_LR_END * factor,
        milestones=milestones,
        eval_period=eval_period,
        checkpoint_period=checkpoint_period,
        multiplier=lr_multiplier(solver, total, warmup, milestones),
    )


def describe_schedule(schedule: StepSchedule, solver: SolverKeys, num_images: int, depth: int) -> str:
    """Describe the schedule of a run in one line."""
    batch = solver.IMS_PER_BATCH
    epochs = schedule.total_steps * batch / num_images
    parts = f" in {solver.ACCUMULATE} parts" if solver.ACCUMULATE > 1 else ""
    rule = f" (= {solver.BASE_LR:g} x {batch} / {solver.REFERENCE_BATCH})" if solver.REFERENCE_BATCH else ""
    lowest = schedule.peak_lr * solver.LAYER_DECAY ** (depth + 1)
    layers = f", {lowest:.3g} in the first layer" if solver.LAYER_DECAY < 1 else ""
    if solver.LR_SCHEDULER_NAME == "WarmupCosineLR":
        decay = f", then along a cosine to {schedule.lr_end:g}"
    else:
        decay = "".join(f", x {solver.GAMMA:g} after step {step:,}" for step in schedule.milestones)
    return (
        f"{counted(schedule.total_steps, 'step')} of {counted(batch, 'image')}{parts}: {epochs:.4g} "
        f"{'epoch' if epochs == 1 else 'epochs'} of "
        f"{counted(num_images, 'image')}; "
        f"learning rate {schedule.peak_lr:.3g}{rule}{layers}, "
        f"after {counted(int(schedule.warmup_steps), 'step')} of warm-up{decay}"
    )


def lr_multiplier(solver: SolverKeys, total: int, warmup: int, milestones: tuple[int, ...]) -> ParamScheduler:
    """Build the warm-up, followed by a cosine or drops by `GAMMA`."""
    if solver.LR_SCHEDULER_NAME == "WarmupCosineLR":
        after = CosineParamScheduler(1, solver.BASE_LR_END / solver.BASE_LR)
    else:
        factors = [solver.GAMMA**drops for drops in range(len(milestones) + 1)]
        after = MultiStepParamScheduler(factors, milestones=milestones, num_updates=total)
    share = warmup / total
    return WarmupParamScheduler(after, solver.WARMUP_FACTOR, share, solver.WARMUP_METHOD, solver.RESCALE_INTERVAL)
