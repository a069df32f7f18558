"""Hooks of a detector's training: evaluation, best weights, stop between two steps, progress bar."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from PIL import Image
from tqdm import tqdm

from crossmae.files import read_json, write_json
from crossmae.training.signals import StopRequest
from det.config import BEST, BEST_RECORD, PICTURES
from det.evaluation.pictures import find_pictures
from det.evaluation.report import write_report
from det.evaluation.run_files import TASKS
from det.training.checkpoint import AtomicCheckpointer

log = logging.getLogger(__name__)

LOGGED_CLASSES = 100  # LVIS has 1,203 classes: too many curves for TensorBoard
STOP_PERIOD = 20  # the processes agree on a stop every so many steps

_Results = dict[str, dict[str, float]]


class EvaluationHook(hooks.EvalHook):
    """detectron2's evaluation, extended: it keeps the best weights. It is skipped if the last step failed.

    `period` is the number of steps between evaluations. 0 evaluates only at the end.
    """

    def __init__(self, period: int, evaluate: Callable[[], _Results], checkpointer: AtomicCheckpointer) -> None:
        super().__init__(period, self._run)
        self.evaluate, self.checkpointer = evaluate, checkpointer
        self.results: _Results = {}

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()

    def _run(self) -> _Results:
        done = min(self.trainer.iter + 1, self.trainer.max_iter)  # detectron2's last count is one too high
        self.results = self.evaluate()
        if comm.is_main_process():
            folder = Path(self.checkpointer.save_dir)
            values = ", ".join(f"{TASKS[task]} AP {numbers['AP']:.1f}" for task, numbers in self.results.items())
            log.info("after %d steps: %s", done, values)
            keep_best(self.checkpointer, self.results, done)
            for number, path in enumerate(find_pictures(folder / PICTURES), start=1):
                self.trainer.storage.put_image(f"validation/{number}", np.asarray(Image.open(path)).transpose(2, 0, 1))
            if self.trainer.iter + 1 < self.trainer.max_iter:  # the last report is written after all other files
                write_report(folder)
        many = sum(key.startswith("AP-") for key in next(iter(self.results.values()), {})) > LOGGED_CLASSES
        return {
            task: {key: value for key, value in numbers.items() if not (many and key.startswith("AP-"))}
            for task, numbers in self.results.items()
        }


def keep_best(checkpointer: AtomicCheckpointer, results: _Results, iteration: int) -> None:
    """Write `model_best.pth` if the AP is the highest so far.

    The AP of masks is compared, or of boxes if there are no masks.
    """
    task = "segm" if "segm" in results else "bbox"
    metric, found = f"{task}/AP", results[task]["AP"]
    path = Path(checkpointer.save_dir, BEST_RECORD)
    best = read_json(path).get(metric, -math.inf) if path.is_file() else -math.inf
    if not found > best:  # NaN is never better
        return
    record = {"iteration": iteration, metric: found}
    checkpointer.write(BEST, {"model": checkpointer.weights()["model"]} | record)
    write_json(path, record)
    log.info("%s: %s %.2f after %d iterations", BEST, metric, found, iteration)


class StopBetweenSteps(HookBase):
    """Stop of the run after Ctrl-C or SIGTERM, with a checkpoint."""

    def __init__(self, checkpointer: AtomicCheckpointer, request: StopRequest) -> None:
        self.checkpointer, self.request = checkpointer, request

    def after_step(self) -> None:
        """End the run if any process was asked to stop.

        Raises KeyboardInterrupt after Ctrl-C, and SystemExit after SIGTERM.
        """
        done = self.trainer.iter + 1
        if comm.get_world_size() > 1:
            if done % STOP_PERIOD:
                return
            self.request.number = max(comm.all_gather(self.request.number or 0)) or None
        if self.request.number is None or done >= self.trainer.max_iter:
            return
        if comm.is_main_process():
            self.checkpointer.save(f"model_{self.trainer.iter:07d}", iteration=self.trainer.iter)
        log.info("stopped and saved after %d steps. The same command with --resume continues from there.", done)
        self.request.end()


class ProgressBar(HookBase):
    """Progress bar with steps done, time left, loss and learning rate."""

    def before_train(self) -> None:
        start, total = self.trainer.start_iter, self.trainer.max_iter
        self.bar = tqdm(initial=start, total=total, desc="train", unit="it", dynamic_ncols=True)

    def after_step(self) -> None:
        loss, lr = (self.trainer.storage.history(name).latest() for name in ("total_loss", "lr"))
        self.bar.set_postfix(loss=f"{loss:.3f}", lr=f"{lr:.1e}", refresh=False)
        self.bar.update()

    def after_train(self) -> None:
        self.bar.close()
