"""Logs of a running training: JSON lines, TensorBoard, Weights & Biases, pictures, a progress bar."""

from __future__ import annotations

import importlib
import json
import logging
import math
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter as clock
from types import TracebackType
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from crossmae.data.broken import Broken
from crossmae.data.parallel import Progress
from crossmae.data.sources import Source
from crossmae.errors import UserError, counted, import_extra, rough_time
from crossmae.files import is_number, name_write_errors, read_json_lines, write_text
from crossmae.reports.figures import save_figure
from crossmae.training.schedule import Schedule

log = logging.getLogger(__name__)

_METRICS = {
    "val_loss": "validation loss",
    "knn_accuracy": "kNN accuracy",
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "mean_ap": "mean average precision",
}
NAMES = {
    f"{key}{suffix}": name + words
    for key, name in _METRICS.items()
    for suffix, words in (("", ""), ("_ema", " of the averaged weights"))
}
LOG, BROKEN = "log.jsonl", "broken.jsonl"
EVALUATION = "evaluation"  # the kind of evaluation of a trainer that has only one
# Steps that are timed after the first one, for at least so many seconds. After LONG_SECONDS, one step is enough.
TIMED_STEPS, TIMED_SECONDS, LONG_SECONDS = 3, 5.0, 60.0


class RunLog:
    """Log writers of a run, as a context manager that closes the writers.

    Args:
        step: step that the run continues from. Log lines after this step are dropped, because the steps are run again.
            So are the measurements of this step.
        resumed: true if the run continues from a checkpoint. Otherwise the logs of an earlier attempt are deleted.

    Attributes:
        seconds: time of the last evaluation of each kind.
    """

    def __init__(
        self, folder: Path, schedule: Schedule, step: int, resumed: bool, is_main: bool, word: str, wandb: Any
    ) -> None:
        self.folder, self.schedule, self.first_step = folder, schedule, step
        self.is_main, self.word, self.wandb = is_main, word, wandb
        self.writers = ExitStack()
        self.board: SummaryWriter | None = None
        self.rows: list[dict[str, Any]] = []
        self.seconds: dict[str, float] = {}
        if is_main and resumed:
            self.rows = truncate_log(folder / LOG, step)
        elif is_main:
            (folder / LOG).unlink(missing_ok=True)
            shutil.rmtree(folder / "tensorboard", ignore_errors=True)

    def __enter__(self) -> RunLog:
        if self.wandb is not None:
            self.writers.callback(self.wandb.finish)
        if self.is_main:
            self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.first_step + 1)
            self.writers.callback(self.close_board)
            self.lines = self.writers.enter_context(open(self.folder / LOG, "a", encoding="utf-8"))
        counts = (self.schedule.last_step, "step", self.first_step)
        bar: Progress[Any] = Progress((), self.word, *counts, shown=self.is_main)
        self.bar = self.writers.enter_context(bar)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.writers.__exit__(kind, error, trace)

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Time an evaluation of some kind, for estimates."""
        begun = clock()
        yield
        self.seconds[kind] = clock() - begun

    def close_board(self) -> None:
        """Write what TensorBoard has not written yet."""
        self.show(lambda board: board.close())

    def progress(self, step: int, losses: Mapping[str, float], values: Mapping[str, float], memory: float) -> None:
        """Log the progress of training, and update the progress bar.

        Args:
            losses: "loss", and its parts if there are several.
            values: "lr", "images_per_second", "data_wait_share" (of the time), and numbers of the task.
            memory: in GB.
        """
        self.record(step, {**losses, **values, "memory_gb": memory})
        speed, waiting = values["images_per_second"], values["data_wait_share"]
        rate = f"{speed:.0f}" if speed >= 10 else f"{speed:.2g}"
        shown = f"loss {losses['loss']:.4f}, lr {values['lr']:.2e}, {rate} img/s, waiting for data {waiting:.0%}"
        self.bar.note(f"{shown}, {memory:.1f} GB")

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Write values to the log, TensorBoard and Weights & Biases."""
        if not self.is_main:
            return
        rounded = {key: float(f"{value:.6g}") for key, value in values.items()}
        line = {"step": step, "epoch": round(self.schedule.epoch(step), 4), **rounded}
        self.rows.append(line)
        with name_write_errors(self.folder / LOG):
            self.lines.write(json.dumps(line) + "\n")
            self.lines.flush()
        for key, value in values.items():
            self.show(partial(SummaryWriter.add_scalar, tag=key, scalar_value=value, global_step=step))
        if self.wandb is not None:
            self.wandb.log(dict(values), step=step)

    def picture(self, step: int, name: str, figure: Figure) -> None:
        """Save a figure as `name`/step-<8 digits>.png and to TensorBoard."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        path = folder / f"step-{step:08d}.png"
        save_figure(figure, path)
        self.image(step, name, path)
        if self.wandb is not None:
            self.wandb.log({name: importlib.import_module("wandb").Image(str(path))}, step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        """Show a PNG file in TensorBoard, without encoding it again."""
        with Image.open(path) as picture:
            width, height = picture.size
            channels = len(picture.getbands())
        encoded = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=path.read_bytes())
        summary = Summary(value=[Summary.Value(tag=name, image=encoded)])
        self.show(lambda board: board._get_file_writer().add_summary(summary, step))

    def show(self, add: Callable[[SummaryWriter], object]) -> None:
        """Add something to TensorBoard.

        If its files cannot be written, training continues without TensorBoard.
        """
        if self.board is None:
            return
        try:
            add(self.board)
        except OSError as error:
            log.warning("%s: TensorBoard ends, training continues: %s", self.folder / "tensorboard", error.strerror)
            self.board = None

    def announce(self, step: int, values: Mapping[str, float]) -> None:
        """Record and log the values measured at a step."""
        self.record(step, values)
        if self.is_main:
            log.info("step %d: %s", step, describe(values))

    def summary(self) -> list[str]:
        """Summarise the first and last value of each metric."""
        lines = []
        for key, name in NAMES.items():
            found = [(row["step"], row[key]) for row in self.rows if key in row]
            if len(found) > 1:
                (first_step, first), (last_step, last) = found[0], found[-1]
                start = "of the weights it started from" if first_step == 0 else f"at step {first_step}"
                lines.append(f"{name}: {first:.4f} {start}, {last:.4f} at step {last_step}")
        return lines


class TimeAhead:
    """Estimate of the time until the end of a run, logged when its first steps are timed.

    Real steps are timed: the clock is read, and the host waits for the device twice. So weights and random numbers
    are those of a run without an estimate. The first step is left out, because it compiles and starts workers.

    Args:
        due: names the kinds of evaluations after a step.
        seconds: time of an evaluation of each kind. If a kind is missing, the estimate is logged again when its time
            is known.
    """

    def __init__(
        self,
        last_step: int,
        due: Callable[[int], Sequence[str]],
        seconds: Mapping[str, float],
        device: torch.device,
        processes: int,
    ) -> None:
        self.last_step, self.due, self.seconds, self.device = last_step, due, seconds, device
        self.place = name_processors(device, processes)
        self.begun, self.first = 0.0, -1
        self.step_seconds: float | None = None
        self.lacking: set[str] = set()  # kinds of evaluations whose time is not known
        self.is_done = False

    def count(self, step: int) -> None:
        """Count a step, and log the estimate after enough steps."""
        if self.is_done:
            return
        if self.first < 0:
            wait_for(self.device)
            self.begun, self.first = clock(), step
        elif self.step_seconds is None:
            steps, seconds = step - self.first, clock() - self.begun
            if (steps >= TIMED_STEPS and seconds >= TIMED_SECONDS) or seconds >= LONG_SECONDS:
                wait_for(self.device)
                self.step_seconds = (clock() - self.begun) / steps
                self.log(step)
        elif self.lacking <= self.seconds.keys():
            self.log(step)

    def leave_out(self, seconds: float) -> None:
        """Exclude the time of saving and evaluating."""
        self.begun += seconds

    def log(self, step: int) -> None:
        """Log the estimate after a step."""
        steps = self.last_step - step
        ahead = Counter(kind for later in range(step + 1, self.last_step + 1) for kind in self.due(later))
        known = Counter({kind: number for kind, number in ahead.items() if kind in self.seconds})
        self.lacking = ahead.keys() - known.keys()
        self.is_done = not self.lacking
        seconds = steps * (self.step_seconds or 0) + sum(self.seconds[kind] * known[kind] for kind in known)
        numbers = (known.total(), ahead.total() - known.total())
        if steps:
            log.info("%s", describe_time_ahead(steps, seconds, *numbers, self.place))


def describe_time_ahead(steps: int, seconds: float, evaluations: int, others: int, place: str) -> str:
    """Describe the time until the end of a run in a sentence.

    Args:
        evaluations, others: number of evaluations within these seconds, and of those whose time is not known.
    """
    included = f" and {counted(evaluations, 'evaluation')}" if evaluations else ""
    without = f", without {counted(others, 'evaluation')} of unknown time" if others else ""
    work = f"the remaining {counted(steps, 'step')}{included}"
    return f"about {rough_time(seconds)} for {work} on {place}{without}; stop any time with Ctrl-C"


def name_processors(device: torch.device, processes: int) -> str:
    """Name the threads or GPUs that compute a run."""
    if device.type == "cpu":
        each = counted(torch.get_num_threads(), "thread")
        return f"this machine ({each if processes == 1 else f'{processes} processes of {each}'})"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return f"this machine ({name})" if processes == 1 else f"{processes} x {name}"


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has computed everything that was queued."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def announce_steps(schedule: Schedule, step: int, rule: str) -> None:
    """Log the number of steps and the `rule` for the learning rate."""
    left_out = schedule.images - schedule.batches_per_epoch * schedule.images_per_batch
    log.info(
        "%s, %d per step, %.4g steps per epoch%s",
        counted(schedule.images, "image"),
        schedule.images_per_step,
        schedule.batches_per_epoch / schedule.accumulate,
        f"; {left_out} that fill no batch are left out of an epoch, others each time" if left_out else "",
    )
    if schedule.last_step == 0:
        log.info("schedule.max_steps is 0: the initial weights are written, and nothing is trained")
        return
    if schedule.last_step < schedule.total_steps:
        words = "schedule.max_steps ends the run at step %d of %d, at a learning rate of %.3g"
        log.info(words, schedule.last_step, schedule.total_steps, schedule.lr_at(schedule.last_step - 1))
    log.info("steps %d to %d, peak learning rate %.3g = %s", step + 1, schedule.last_step, schedule.peak_lr, rule)


def describe(values: Mapping[str, float]) -> str:
    """Format numbers with their metric names."""
    return ", ".join(f"{NAMES.get(key, key.replace('_', ' '))} {value:.4f}" for key, value in values.items())


class BrokenImages:
    """List of the broken images that a process replaced. Each image is listed once, also after restarts.

    Args:
        path: file of the list, JSON lines with the keys name and reason.
        resumed: continue the list of an earlier part of this run.
    """

    def __init__(self, path: Path, source: Source, budget: float, resumed: bool) -> None:
        self.path, self.source, self.most = path, source, math.floor(budget * len(source))
        if not resumed:
            path.unlink(missing_ok=True)
        self.known = {row["name"] for row in read_json_lines(path, name=str)}

    def add(self, broken: Sequence[Broken]) -> None:
        """Count and list new broken images."""
        for image in broken:
            name = self.source.name(image.index)
            if name in self.known:
                continue
            self.known.add(name)
            row = {"name": name, "reason": image.message}
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            log.warning("another image stands in for a broken one (%d so far): %s", len(self.known), image.message)
        if len(self.known) > self.most:
            raise UserError(
                f"data.broken_budget: {len(self.known)} of {len(self.source)} images are broken, {self.most} are "
                f"allowed. Repair the images that {self.path} lists, or raise the budget."
            )


def truncate_log(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop what follows the training line of `step`. Return the rest.

    Measurements of `step` are dropped, too.
    """
    rows = [{key: one for key, one in row.items() if is_number(one)} for row in read_json_lines(path, step=float)]
    rows = [row for row in rows if row["step"] < step or (row["step"] == step and "loss" in row)]
    if path.exists():
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def start_wandb(project: str, key: str, folder: Path, settings: Mapping[str, Any], resumed: bool) -> Any:
    """Start or continue a run of Weights & Biases.

    Args:
        key: name of the setting that names the project, for the errors.
    """
    wandb = import_extra("wandb", f"{key} (leave it out to do without)", "wandb")
    identity = folder / "wandb_id.txt"
    if not (resumed and identity.exists()):
        write_text(identity, secrets.token_hex(4))
    try:
        return wandb.init(
            project=project,
            name=folder.resolve().name,
            id=identity.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(folder),
            config=dict(settings),
        )
    except Exception as error:  # many kinds of errors: no account, no network, no such project
        raise UserError(
            f"{key}: Weights & Biases cannot be used: {' '.join(str(error).split())}. Run `wandb login`, set "
            f"WANDB_MODE=offline, or leave {key} out."
        ) from error
