"""The plan of the pipeline: how a budget of time becomes epochs of pretraining and steps of detection."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from crossmae.errors import UserError, counted
from crossmae.reports.page import format_seconds

PRETRAIN_SHARE = 40.0  # percent of the training time
PAGE_SECONDS = 20.0  # for the page, at the end
MOST_PRETRAIN_EPOCHS = 800  # as published; more passes over few images show the encoder nothing new
MOST_DETECT_EPOCHS = 100  # the longest published schedule of ViTDet
FEWEST_DETECT_EPOCHS = 8  # with fewer, smaller images are the better use of the time
FEWEST_DETECT_STEPS = 50
FEW_DETECT_STEPS = 400  # with fewer, heads that start from random weights may find almost nothing
FEW_DETECT_IMAGES = 50  # labelled
SMALL_OBJECT = 16  # pixels of the longer side, as the detector sees it: a patch
LEAST_TRAINING = 0.4  # share of the budget that is left for training, without an error
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Timing:
    """Measured seconds of a training.

    Attributes:
        overhead: start, evaluations and pages; all that is not a step.
        step: one step.
        images: images of a step.
    """

    overhead: float
    step: float
    images: int


@dataclass(frozen=True)
class Length:
    """Length of a training.

    Attributes:
        images: training images, of which a large data set may have more.
        epochs: passes over `images`. Pretraining has whole epochs.
    """

    images: int
    epochs: float
    steps: int
    seconds: float


@dataclass(frozen=True)
class TimePlan:
    """Lengths of the trainings within a budget.

    Attributes:
        pretrain, detect: None: this training is left out.
        detectors: number of detectors, which are trained one after the other.
        spent: seconds until now.
    """

    budget: float
    spent: float
    pretrain: Length | None
    detect: Length | None
    detectors: int

    @property
    def seconds(self) -> float:
        """Expected seconds of everything."""
        trainings = (self.pretrain.seconds if self.pretrain else 0.0) + (
            self.detectors * self.detect.seconds if self.detect else 0.0
        )
        return self.spent + trainings + PAGE_SECONDS


def parse_duration(text: str, key: str) -> float:
    """Parse a duration such as "30m", "1h30m" or "45s" into seconds.

    Raises UserError for other words, and for a duration that is not positive.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*([smh])", text.strip().lower())
    if not parts or "".join(f"{number}{unit}" for number, unit in parts) != re.sub(r"\s", "", text.lower()):
        raise UserError(f"{key}: {text!r} is no duration. Write for example 30m, 2h or 1h30m.")
    seconds = sum(float(number) * UNITS[unit] for number, unit in parts)
    if seconds <= 0:
        raise UserError(f"{key}: {text!r} is not positive. Give a longer time.")
    return seconds


def refuse_short_budget(budget: float, fixed: float, *, at_least: bool = False) -> None:
    """Raise UserError if too little of a budget is left for training.

    The message names a budget that suffices.

    Args:
        fixed: seconds of everything that is not a step of a training.
        at_least: not everything was measured yet, so it may be more.
    """
    if budget - fixed < LEAST_TRAINING * budget:
        enough = math.ceil(fixed / (1 - LEAST_TRAINING) / 60)
        raise UserError(
            f"--budget: {format_seconds(budget)} is too short: start, evaluations and pages take "
            f"{'at least ' if at_least else ''}{format_seconds(fixed)} of it. Give {enough}m or more."
        )


def pretrain_length(seconds: float, images: int, timing: Timing) -> Length:
    """Choose whole epochs that fit into `seconds` of steps, at least one.

    If not even one epoch fits, fewer images are used.
    """
    affordable = max(1, int(seconds / timing.step))
    per_epoch = max(1, images // timing.images)
    if affordable < per_epoch:
        images, per_epoch = affordable * timing.images, affordable
    epochs = min(MOST_PRETRAIN_EPOCHS, affordable // per_epoch)
    steps = epochs * per_epoch
    return Length(images, epochs, steps, timing.overhead + steps * timing.step)


def detect_length(seconds: float, images: int, timing: Timing) -> Length:
    """Choose steps that fit into `seconds` of steps, at most `MOST_DETECT_EPOCHS` epochs."""
    most = math.ceil(MOST_DETECT_EPOCHS * images / timing.images)
    steps = max(1, min(int(seconds / timing.step), max(most, FEWEST_DETECT_STEPS)))
    return Length(images, steps * timing.images / images, steps, timing.overhead + steps * timing.step)


def make_plan(
    budget: float,
    spent: float,
    *,
    pretrain: tuple[int, Timing] | None,
    detect: tuple[int, Timing] | None,
    detectors: int = 1,
    pretrain_share: float = PRETRAIN_SHARE,
) -> TimePlan:
    """Divide what is left of a budget.

    Time that one training cannot use, because it has reached its longest useful length, goes to the other.

    Args:
        budget, spent: seconds.
        pretrain, detect: number of training images and timing; None: this training is left out.
        pretrain_share: percent of the training time, if there are both.

    Raises:
        UserError: start and evaluation leave too little of the budget. The message names a budget that suffices.
    """
    fixed = spent + PAGE_SECONDS
    fixed += pretrain[1].overhead if pretrain else 0.0
    fixed += detectors * detect[1].overhead if detect else 0.0
    refuse_short_budget(budget, fixed)
    left = budget - fixed
    share = pretrain_share / 100 if detect else 1.0
    first = pretrain_length(share * left, *pretrain) if pretrain else None
    used = first.seconds - pretrain[1].overhead if first and pretrain else 0.0
    second = detect_length((left - used) / detectors, *detect) if detect else None
    if first and pretrain and second and detect:  # the detector may have left time over
        unused = left - used - detectors * second.steps * detect[1].step
        first = pretrain_length(used + max(unused, 0.0), *pretrain) if unused > used / 10 else first
    return TimePlan(budget, spent, first, second, detectors)


def is_too_short(length: Length) -> bool:
    """Check whether a detector with smaller images would learn more."""
    return length.epochs < FEWEST_DETECT_EPOCHS or length.steps < FEWEST_DETECT_STEPS


def detect_steps_left(plan: TimePlan, spent: float, timing: Timing, images: int) -> int:
    """Return the steps of each detector that fit into the time left.

    This is for the end of pretraining. The number stays between half and one and a half times the planned number.

    Args:
        spent: seconds until now.
    """
    planned = plan.detect.steps if plan.detect else 0
    left = plan.budget - spent - PAGE_SECONDS - plan.detectors * timing.overhead
    fitting = detect_length(left / plan.detectors, images, timing).steps if left > 0 else 1
    return min(max(fitting, math.ceil(planned / 2)), planned * 3 // 2)


def list_doubts(
    plan: TimePlan, steps: int, timing: Timing, *, object_pixels: float, pretrain_share: float = PRETRAIN_SHARE
) -> list[str]:
    """List reasons why a detector may find almost nothing.

    Args:
        steps: of each detector.
        object_pixels: longer side of the median training object, as the detector sees it; 0: unknown.
        pretrain_share: percent of the training time.
    """
    assert plan.detect is not None
    found, images = [], round(plan.detect.images)
    if images < FEW_DETECT_IMAGES:
        found.append(f"{counted(images, 'labelled image')} with objects: label more, or start from public --weights")
    elif steps < FEW_DETECT_STEPS:
        seconds = plan.detectors * (FEW_DETECT_STEPS - steps) * timing.step / (1 - pretrain_share / 100)
        enough = math.ceil((plan.budget + seconds) / 60)
        found.append(f"{counted(steps, 'step')} of a detector: --budget {enough}m has about {FEW_DETECT_STEPS}")
    if 0 < object_pixels < SMALL_OBJECT:
        found.append(
            f"half of the objects are at most {object_pixels:.0f} pixels long as the detector sees them: cut the "
            "images into smaller ones, or give --size"
        )
    return found


class PlannedStage(NamedTuple):
    """A stage with what it does, and its expected seconds."""

    name: str
    what: str
    seconds: float


def planned_stages(plan: TimePlan, sizes: Sequence[str], detect_steps: int | None = None) -> list[PlannedStage]:
    """List the stages of the plan.

    Args:
        sizes: what pretraining and detection see, in words.
        detect_steps: steps of a detector that were chosen later. The seconds are those of the plan.
    """
    stages = [PlannedStage("done", "look at the data, and measure the speed of this machine", plan.spent)]
    trainings: list[tuple[str, str, Length]] = []
    if plan.pretrain:
        trainings.append(("pretrain", sizes[0], plan.pretrain))
    if plan.detect:
        names = ["detect-own"] if plan.detectors == 1 else ["detect-random", "detect-own"]
        steps = detect_steps or plan.detect.steps
        chosen = replace(plan.detect, steps=steps, epochs=plan.detect.epochs * steps / plan.detect.steps)
        trainings += [(name, sizes[1], chosen) for name in names]
    for name, size, one in trainings:
        length = f"{counted(one.steps, 'step')}, {one.epochs:.3g} epochs of {counted(one.images, 'image')}"
        stages.append(PlannedStage(name, f"{size}, {length}", one.seconds))
    return [*stages, PlannedStage("report", "one page with everything", PAGE_SECONDS)]


def describe_plan(plan: TimePlan, sizes: Sequence[str]) -> str:
    """Write the table of the plan, with the arguments of `planned_stages`."""
    total = PlannedStage("all", f"of a budget of {format_seconds(plan.budget)}", plan.seconds)
    rows = [*planned_stages(plan, sizes), total]
    widths = [max(len(row.name) for row in rows), max(len(row.what) for row in rows)]
    return "\n".join(
        f"  {name:<{widths[0]}}  {what:<{widths[1]}}  about {format_seconds(seconds)}" for name, what, seconds in rows
    )
