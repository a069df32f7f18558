"""Evaluations during a detector's training: results in the log, best weights, report."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from crossmae.errors import counted
from crossmae.files import read_json, write_json
from crossmae.training.log import EVALUATION, RunLog
from crossmae.training.loop import Callbacks
from crossmae.training.state import TrainingState
from det.config import BEST, BEST_RECORD, PICTURES
from det.evaluation.pictures import find_pictures
from det.evaluation.report import write_report
from det.evaluation.run_files import TASKS
from det.training.checkpoint import write_detector
from det.training.steps import DetectorLoss

log = logging.getLogger(__name__)

LOGGED_CLASSES = 100  # LVIS has 1,203 classes: too many curves for TensorBoard

Results = dict[str, dict[str, float]]


@dataclass
class Evaluations(Callbacks):
    """Evaluations of a run, and its best weights.

    Attributes:
        evaluate: evaluates a detector. None: there are no validation data.
        period: steps between evaluations. 0: evaluate only at the end.
        start_run: called in the main process before the first step, when the run has its folder.
        metadata: returns the metadata of the weights at a step.
        loss: has the numbers that detectron2 logs in a step.
        results: results of the last evaluation.
    """

    folder: Path
    evaluate: Callable[[nn.Module], Results] | None
    period: int
    last_step: int
    start_run: Callable[[], None]
    metadata: Callable[[int], dict[str, str]]
    loss: DetectorLoss
    results: Results = field(default_factory=dict)

    def begin(self, state: TrainingState, records: RunLog) -> None:
        """Record the run, and remove the best weights of an earlier attempt."""
        if not state.ranks.is_main:
            return
        if state.step == 0:
            for name in (BEST, BEST_RECORD):
                (self.folder / name).unlink(missing_ok=True)
        self.start_run()

    def numbers(self) -> dict[str, float]:
        return self.loss.scalars

    def due(self, step: int) -> tuple[str, ...]:
        """Name the evaluation in every period and after the last step."""
        in_period = step == self.last_step or (self.period > 0 and step % self.period == 0)
        return (EVALUATION,) if self.evaluate is not None and step > 0 and in_period else ()

    def measure(self, state: TrainingState, records: RunLog) -> None:
        """Evaluate if it is due, and keep the best weights."""
        step = state.step
        if self.evaluate is None or not self.due(step):
            return
        model = state.model if state.ema is None else state.ema.module
        with records.timed(EVALUATION):
            self.results = self.evaluate(model)
        if not state.ranks.is_main:
            return
        records.record(step, logged_numbers(self.results))
        values = ", ".join(f"{TASKS[task]} AP {numbers['AP']:.1f}" for task, numbers in self.results.items())
        log.info("after %s: %s", counted(step, "step"), values)
        if is_best(state.kept, self.results, step):
            write_detector(self.folder / BEST, model.state_dict(), self.metadata(step), step)
            write_json(self.folder / BEST_RECORD, state.kept["best"])
            log.info("%s: after %s", BEST, counted(step, "step"))
        for number, path in enumerate(find_pictures(self.folder / PICTURES), start=1):
            records.image(step, f"validation/{number}", path)
        if step < self.last_step:  # the last report is written after all other files
            write_report(self.folder)

    def finish(self) -> None:
        """Write the report of the run."""
        log.info("report in %s", write_report(self.folder))
        if self.results and (self.folder / BEST).is_file():
            if read_json(self.folder / BEST_RECORD).get("iteration") == self.last_step:
                log.info("these are the results of the final weights, which are the best: %s has the same", BEST)
            else:
                log.info("these are the results of the final weights. The best weights are in %s", BEST)


def logged_numbers(results: Results) -> dict[str, float]:
    """Select the defined numbers of an evaluation, without many classes."""
    many = sum(key.startswith("AP-") for key in next(iter(results.values()), {})) > LOGGED_CLASSES
    return {
        f"{task}/{key}": value
        for task, numbers in results.items()
        for key, value in numbers.items()
        if math.isfinite(value) and not (many and key.startswith("AP-"))
    }


def is_best(kept: dict[str, Any], results: Results, step: int) -> bool:
    """Check for the highest AP so far, and store it in `kept`.

    The AP of masks is compared, or of boxes if there are no masks. Undefined AP is never the best.
    """
    task = "segm" if "segm" in results else "bbox"
    metric, found = f"{task}/AP", results[task]["AP"]
    if not found > kept.get("best", {}).get(metric, -math.inf):
        return False
    kept["best"] = {"iteration": step, metric: found}
    return True
