"""Steps and learning rates of a run, computed from the settings and the size of the data set."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, TypeVar

from crossmae.data.batches import BatchPlan
from crossmae.errors import UserError
from crossmae.training.config import ScheduleConfig, StepConfig

AnySchedule = TypeVar("AnySchedule", bound="Schedule")


@dataclass(frozen=True)
class Schedule:
    """Step counts and learning rates of a run, logged at the start and saved with checkpoints.

    Attributes:
        batches_per_epoch: micro-batches of each process in an epoch.
        accumulate: micro-batches in a step. The last step of the schedule may have fewer.
        images_per_step: images of a step over all processes and micro-batches (the global batch size).
        total_batches, total_steps: micro-batches of each process, and steps, in the whole schedule.
        last_step: step at which this run stops; `total_steps` unless schedule.max_steps is lower.
        warmup_steps: steps with a rising learning rate.
        cuts: rows of (step, total before, total after), one for each time that the run was shortened.
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
    min_lr: float
    cuts: tuple[tuple[int, int, int], ...] = field(default=(), kw_only=True)

    @property
    def steps_per_epoch(self) -> float:
        """Steps in an epoch, not rounded."""
        return self.batches_per_epoch / self.accumulate

    @property
    def images_per_batch(self) -> int:
        """Images of a micro-batch over all processes."""
        return self.images_per_step // self.accumulate

    def batches_done(self, step: int) -> int:
        """Count the micro-batches of `step` steps, the position in the data."""
        return min(step * self.accumulate, self.total_batches)

    def micro_batches(self, step: int) -> range:
        """Return the micro-batch numbers of the next step after `step` steps."""
        return range(self.batches_done(step), self.batches_done(step + 1))

    def epoch(self, step: int) -> float:
        """Compute the number of epochs after `step` steps."""
        return self.batches_done(step) / self.batches_per_epoch

    def ends_period(self, step: int, epochs: int) -> bool:
        """Check that `step` ends the run or a period of `epochs` epochs."""
        period = self.batches_per_epoch * epochs
        return step == self.last_step or self.batches_done(step) // period > self.batches_done(step - 1) // period

    def plan(self) -> dict[str, Any]:
        """Return the counts and rates for the record of a checkpoint."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key != "min_lr"}

    def lr_at(self, step: int) -> float:
        """Compute the learning rate of step `step`, counted from 0."""
        total = self.cuts[0][1] if self.cuts else self.total_steps
        return lr_at(self.uncut(step), self.peak_lr, self.warmup_steps, total, self.min_lr)

    def shorten(self: AnySchedule, step: int, total_steps: int) -> AnySchedule:
        """Shorten the run to `total_steps` from `step` on.

        The learning rates of the steps that were left are those of fewer steps: the curve is compressed.
        """
        return dataclasses.replace(
            self,
            total_batches=min(total_steps * self.accumulate, self.total_batches),
            total_steps=total_steps,
            last_step=min(self.last_step, total_steps),
            cuts=(*self.cuts, (step, self.total_steps, total_steps)),
        )

    def uncut(self, step: float) -> float:
        """Return the step of the unshortened schedule with the same learning rate."""
        for at, before, after in reversed(self.cuts):
            if step > at:
                step = at + (step - at) * (before - at) / (after - at)
        return step


def make_schedule(batches: BatchPlan, optim: StepConfig, schedule: ScheduleConfig, lr_factor: float = 1.0) -> Schedule:
    """Compute steps and learning rates.

    Args:
        lr_factor: factor on base_lr * images per step / 256; ignored if optim.lr is given.

    Raises:
        UserError: If an epoch has fewer batches than a step has micro-batches, the warm-up is longer than the run, or
            the lowest learning rate is above the highest.
    """
    per_epoch, accumulate = batches.batches_per_epoch, optim.accumulate
    if per_epoch < accumulate:
        raise UserError(
            f"optim.accumulate: a step needs {accumulate} batches of {batches.batch_size} images, one epoch of "
            f"{batches.num_images} images has {per_epoch}. Lower optim.accumulate or optim.batch_size."
        )
    if schedule.warmup_epochs > schedule.epochs:
        raise UserError(
            f"schedule.warmup_epochs: {schedule.warmup_epochs:g} exceeds the {schedule.epochs} epochs. Lower it."
        )
    images_per_step = batches.batch_size * accumulate * batches.world_size
    peak = optim.lr or optim.base_lr * images_per_step / 256 * lr_factor
    if schedule.min_lr > peak:
        raise UserError(f"schedule.min_lr: {schedule.min_lr:g} is above the peak learning rate {peak:.3g}. Lower it.")
    total_batches = per_epoch * schedule.epochs
    total = math.ceil(total_batches / accumulate)
    return Schedule(
        images=batches.num_images,
        world_size=batches.world_size,
        batches_per_epoch=per_epoch,
        accumulate=accumulate,
        images_per_step=images_per_step,
        total_batches=total_batches,
        total_steps=total,
        last_step=total if schedule.max_steps is None else min(total, schedule.max_steps),
        warmup_steps=schedule.warmup_epochs * per_epoch / accumulate,
        peak_lr=peak,
        min_lr=schedule.min_lr,
    )


def lr_at(step: float, peak: float, warmup_steps: float, total_steps: int, min_lr: float = 0.0) -> float:
    """Compute the learning rate: linear warm-up, then half a cosine to `min_lr`."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    return min_lr + (peak - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
