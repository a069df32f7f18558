"""One training loop for all tasks, in one process or in one process per GPU.

A restart needs only the step number and the state of the optimizer. The learning rate is a function of the step, and
the data are a function of (seed, step): see `crossmae.data.batches`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from crossmae.checkpoints.run_checkpoint import (
    MODEL,
    CheckpointWriter,
    check_checkpoint_space,
    checkpoint_bytes,
    checkpoint_names,
    complete_checkpoints,
    drop_older,
    latest_checkpoint,
    read_state,
    step_of,
    sweep_run,
)
from crossmae.checkpoints.weights import save_weights
from crossmae.data.batches import BatchPlan, KeyedImages, build_loader
from crossmae.data.broken import Broken, Unreadable, find_broken, refuse_broken
from crossmae.data.sources import Source
from crossmae.data.workers import explain_dead_workers
from crossmae.errors import USER_ERROR_EXIT_CODE, UserError, repeat_command, shorten
from crossmae.files import write_atomically, write_text
from crossmae.files.claim import claim
from crossmae.training.config import RunSettings
from crossmae.training.devices import choose_compilation, choose_precision, open_device
from crossmae.training.log import BROKEN, BrokenImages, RunLog, TimeAhead, start_wandb
from crossmae.training.processes import Ranks, find_ranks, process_group
from crossmae.training.resume import EMA_WEIGHTS, WEIGHTS, check_agreement, resumed_precision
from crossmae.training.schedule import Schedule
from crossmae.training.signals import StopAsked, StopRequest
from crossmae.training.state import Diverged, Loss, TrainingState, memory_gb

log = logging.getLogger(__name__)

CONFIG = "config.yaml"
OPTIMIZER_COPIES = 2  # tensors of AdamW for each parameter
MOST_UNREAD = 100  # largest number of steps until the host learns of a gradient that is not finite
MOST_SUSPECTS = 8  # largest number of images that an error of divergence names

NameImages = Callable[[], list[str]]


class Callbacks:
    """Task-specific work between steps. By default, every callback does nothing."""

    def begin(self, state: TrainingState, records: RunLog) -> None:
        """Prepare for the first step after a start or a restart."""

    def after_log(self, state: TrainingState, records: RunLog, loss: float) -> None:
        """Check the mean loss after a line of the log was written."""

    def numbers(self) -> dict[str, float]:
        """Return more numbers of the last step for the log."""
        return {}

    def due(self, step: int) -> tuple[str, ...]:
        """Name the kinds of evaluations that `measure` makes after this step."""
        return ()

    def measure(self, state: TrainingState, records: RunLog) -> None:
        """Measure and draw everything due at this step.

        A checkpoint of the step is complete before. A restart from the checkpoint measures again.
        """

    def finish(self) -> None:
        """Report the final weights. Called in the main process only."""


@dataclass(frozen=True)
class Job:
    """Everything that the loop needs from a task, built and checked before any file is written.

    Attributes:
        word, kind: name of the progress bar, and of the run in the record of its folder.
        open_batches: returns micro-batches from one number to before another number of the run. It raises UserError for
            an image that cannot be read.
        name_images: returns a function that names the images of a micro-batch, for errors. It must not hold the pixels.
        watch_broken: counts the broken images of a micro-batch, with the folder of the run and whether it was resumed.
        loss: computes the losses of (model, micro-batch, number of the micro-batch in the run).
        saves_after: true for the steps after which a checkpoint is due.
        fingerprint: settings that must not change when the run is resumed.
        start: checkpoint to continue from; None: a new run.
        is_complete: true if the run has its final weights.
        metadata: returns the metadata for the weights of a step. Weight files contain this metadata.
        announce: logs the next steps after a given step.
        finals: names of the final weight files in the run's folder.
        write_finals: writes them from a checkpoint.
    """

    word: str
    kind: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    open_batches: Callable[[int, int], Iterator[Any]]
    name_images: Callable[[Any], NameImages]
    watch_broken: Callable[[Path, bool], Callable[[Any], None]]
    loss: Loss
    schedule: Schedule
    saves_after: Callable[[int], bool]
    fingerprint: dict[str, str]
    start: Path | None
    is_complete: bool
    metadata: Callable[[int], dict[str, str]]
    announce: Callable[[int], None]
    callbacks: Callbacks
    finals: tuple[str, ...]
    write_finals: Callable[[Path], None]


def train(run: RunSettings, build_job: Callable[[Ranks, torch.device, str], Job]) -> Job:
    """Run a job to its last step, and return it.

    With torchrun, each process trains on its share of every batch. Only the first process writes files.
    """
    ranks = find_ranks()
    device = open_device(run.device, run.device_key, ranks.local_rank, ranks.world_size)
    wanted = resumed_precision(run.precision, run.folder)
    precision = choose_precision(wanted, device, run.precision_key, run.width)
    with process_group(ranks, device, run.timeout_minutes), explained_memory(run), ExitStack() as stack:
        found = checkpoint_names(run.folder)
        job = ranks.together(lambda: build_job(ranks, device, precision))
        check_agreement(ranks, step_of(job.start) if job.start else 0, job.fingerprint, run.folder_key)
        ranks.together(lambda: stack.enter_context(claimed(run, job, found)) if ranks.is_main else None)
        final = job.start
        if job.is_complete and final:
            last = job.schedule.last_step
            log.info("the run is complete: %s has reached step %d of %d", final, step_of(final), last)
        else:
            run_job(run, job, ranks, precision)
            final = complete_checkpoints(run.folder)[-1] if ranks.is_main else None
        if final and ranks.is_main:
            job.write_finals(final)
            job.callbacks.finish()
        ranks.wait()
    return job


@contextmanager
def explained_memory(run: RunSettings) -> Iterator[None]:
    """Explain full GPU memory, failed compilation, and workers that were killed."""
    try:
        with explain_dead_workers(run.workers_key, lambda: latest_checkpoint(run.folder)):
            yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{run.device_key}: the GPU's memory is full ({str(error).splitlines()[0]}). The last "
            f"checkpoint stays. {run.against_full_memory}"
        ) from error
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo.", "torch._inductor.")):
            raise
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise UserError(
            f"{run.compile_key}: torch cannot compile the blocks: {reason}. Set {run.compile_key}=false."
        ) from error


@contextmanager
def claimed(run: RunSettings, job: Job, found: list[str]) -> Iterator[None]:
    """Claim the folder of a run, and clean it.

    Args:
        found: checkpoints in the folder before the job was built.

    Raises:
        UserError: The folder is in use or of another kind, it has changed since the job was built, or its disk has no
            room for the checkpoints.
    """
    with claim(run.folder, job.kind, run.folder_key):
        if checkpoint_names(run.folder) != found:
            raise UserError(
                f"{run.folder_key}: another run has just written checkpoints in {run.folder}. Start this run again."
            )
        sweep_run(run.folder)
        if job.start:
            drop_older(run.folder, job.start, run.keep)
        weights = sum(tensor.numel() * tensor.element_size() for tensor in job.model.state_dict().values())
        checkpoint = checkpoint_bytes(weights, OPTIMIZER_COPIES, run.ema is not None)
        more = weights * 2 * (1 if run.ema is None else 2)  # the final and the best weights
        if not job.is_complete:
            check_checkpoint_space(run.folder, checkpoint, more, run.keep or 1, run.folder_key)
        yield


def run_job(run: RunSettings, job: Job, ranks: Ranks, precision: str) -> None:
    """Restore the training state, open the logs, and run the steps."""
    folder, schedule, resumed = run.folder, job.schedule, job.start is not None
    device = next(job.model.parameters()).device
    compiled, sentence = choose_compilation(run.compiled, device)
    if compiled:
        torch.compiler.reset()  # torch limits the variants of a function, and counts those of earlier runs
    values = (run.ema, run.clip_grad, compiled, job.start, steps_unread(device))
    state = TrainingState(job.model, job.optimizer, ranks, precision, *values)
    watch = job.watch_broken(folder, resumed)
    job.announce(state.step)
    if sentence:
        log.info("%s", sentence)
    wandb = (
        start_wandb(run.wandb, run.wandb_key, folder, run.settings, resumed) if ranks.is_main and run.wandb else None
    )
    records = RunLog(folder, schedule, state.step, resumed, ranks.is_main, job.word, wandb)
    if ranks.is_main:
        # Final weights of an earlier attempt must not be mistaken for the weights of this run.
        for name in job.finals:
            (folder / name).unlink(missing_ok=True)
        write_text(folder / CONFIG, run.config_text)
    plan = {"device": str(state.device), "precision": precision} | schedule.plan()
    about = {"plan": plan, "config": run.settings, "fingerprint": job.fingerprint}

    writer = CheckpointWriter()

    def save() -> None:
        state.check_gradients()
        state.check_weights()
        record = {"batches_consumed": schedule.batches_done(state.step), **about}
        state.save(writer, folder, run.keep, job.metadata(state.step), record)

    batches = job.open_batches(schedule.batches_done(state.step), schedule.batches_done(schedule.last_step))
    with records, StopRequest(ranks) as request, writer:
        steps = TrainingSteps(job, state, records, request, writer, save, watch, run)
        steps.run(batches, resumed)
    for line in records.summary():
        log.info(line)


def steps_unread(device: torch.device) -> int:
    """Return the largest number of steps between two checks of the gradients.

    A GPU computes ahead while the host prepares the next steps. A check in every step would make the host wait.
    """
    return MOST_UNREAD if device.type == "cuda" else 1


class TrainingSteps:
    """Training steps, checkpoints and measurements of a job, from the step of `state` to the last one.

    Args:
        save: begins to write a checkpoint by `writer`.
        watch: counts the broken images of a micro-batch.
    """

    def __init__(
        self,
        job: Job,
        state: TrainingState,
        records: RunLog,
        request: StopRequest,
        writer: CheckpointWriter,
        save: Callable[[], None],
        watch: Callable[[Any], None],
        settings: RunSettings,
    ) -> None:
        self.job, self.state, self.records, self.request = job, state, records, request
        self.writer, self.save, self.watch, self.settings = writer, save, watch, settings
        self.saved: int | None = None  # step of the last checkpoint
        self.ahead = TimeAhead(
            job.schedule.last_step, job.callbacks.due, records.seconds, state.device, state.ranks.world_size
        )
        # Step and images of the micro-batches of the current step, and of steps whose gradients are not checked yet.
        self.names: list[tuple[int, NameImages]] = []
        self.start_window()

    def run(self, batches: Iterator[Any], resumed: bool) -> None:
        """Run to the last step.

        Raises UserError if an image is broken, or a loss, a gradient or a weight is not finite. The last checkpoint
        stays. A stop request ends the run as in `StopRequest.end`.
        """
        self.saved = self.state.step if resumed else None
        try:
            try:
                self.run_steps(batches, resumed)
            except StopAsked:
                self.stop()
        except Diverged as error:
            self.explain(error)

    def run_steps(self, batches: Iterator[Any], resumed: bool) -> None:
        """Run to the last step, with all measurements.

        Raises StopAsked after a stop request, and Diverged.
        """
        state, last_step = self.state, self.job.schedule.last_step
        with state.evaluating():
            self.job.callbacks.begin(state, self.records)
            if resumed:
                self.job.callbacks.measure(state, self.records)  # it may have been cut off
        if last_step == 0:  # only the initial weights are wanted
            self.save()
        self.request.start_clock()
        self.start_window()
        while state.step < last_step:
            self.step(batches)
            self.log_and_save()
            if self.request.is_agreed() and state.step < last_step:
                raise StopAsked

    def step(self, batches: Iterator[Any]) -> None:
        """Make one optimizer step."""
        job, state = self.job, self.state
        numbers = job.schedule.micro_batches(state.step)
        self.forget_names()
        for number in numbers:
            # Fetch a micro-batch.
            asked = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - asked
            self.watch(batch)
            self.names.append((state.step, job.name_images(batch)))
            # Forward and backward: gradients of the micro-batches add up.
            is_last = number == numbers[-1]
            state.losses.append(state.forward_backward(job.loss, batch, number, len(numbers), is_last))
        # Check, clip, and update.
        self.lr = job.schedule.lr_at(state.step)
        state.update(self.lr)
        self.forget_names()
        self.records.bar.update()
        self.done += len(numbers)

    def log_and_save(self) -> None:
        """Log, save and measure if this is due after a step."""
        job, state = self.job, self.state
        saves = job.saves_after(state.step)
        logs = saves or state.step % self.settings.log_every == 0
        due = job.callbacks.due(state.step)
        if logs or due or state.step == job.schedule.last_step:
            state.check_gradients()
            self.forget_names()
        if logs:
            losses = state.mean_losses()  # waits for the device, so that the time is measured correctly
            elapsed = time.perf_counter() - self.begun
            speed = self.done * job.schedule.images_per_batch / elapsed
            more = {"lr": self.lr, "images_per_second": speed, "data_wait_share": self.waited / elapsed}
            self.records.progress(state.step, losses, more | job.callbacks.numbers(), memory_gb(state.device))
            job.callbacks.after_log(state, self.records, losses["loss"])
            self.start_window()
            state.losses.clear()
        paused = time.perf_counter()
        self.writer.check()
        if saves:
            self.save()
            self.saved = state.step
        if due:
            self.writer.wait()
        with state.evaluating():
            job.callbacks.measure(state, self.records)
        pause = time.perf_counter() - paused
        self.begun += pause  # the speed excludes measuring and saving
        self.ahead.leave_out(pause)
        self.ahead.count(state.step)

    def forget_names(self) -> None:
        """Forget the images of steps whose gradients were finite."""
        if not self.state.unread:
            self.names.clear()

    def start_window(self) -> None:
        """Begin to measure the speed for the next line of the log."""
        self.begun, self.waited, self.done = time.perf_counter(), 0.0, 0

    def stop(self) -> NoReturn:
        """Save a checkpoint unless there is one, and end the run."""
        step = self.state.step
        if step and self.saved != step:
            self.save()
        self.writer.wait()
        self.state.ranks.wait()
        if step:
            log.info("stopped after step %d, which is saved. %s to continue", step, repeat_command())
        else:
            log.info("stopped before the first step; nothing is saved")
        self.request.end()

    def suspects(self) -> tuple[bool, list[str]]:
        """Return the images of losses that are not finite, after True.

        If all losses of the step are finite, return all images of the step, after False.
        """
        recent = self.state.losses[-len(self.names) :] if self.names else []
        of_step = [
            (names, losses.values())
            for (step, names), losses in zip(self.names, recent, strict=False)
            if step == self.state.step
        ]
        bad = [names for names, losses in of_step if not all(bool(loss.isfinite()) for loss in losses)]
        return bool(bad), [name for names in (bad or [names for names, _ in of_step]) for name in names()]

    def explain(self, error: Diverged) -> NoReturn:
        """Raise UserError, with the names of the suspected images."""
        state, run = self.state, self.settings
        told = [(True, self.names[-1][1]() if self.names else [])]
        if error.is_shared:
            told = state.ranks.gather(self.suspects())
            if not state.ranks.is_main:
                raise SystemExit(USER_ERROR_EXIT_CODE)  # only the main process reports the error
        culprits = [names for is_bad, names in told if is_bad] or [names for _, names in told]
        images = shorten([name for names in culprits for name in names], MOST_SUSPECTS)
        seen = f", with the images {images}" if images else ""
        lr = f"learning rate {self.job.schedule.lr_at(min(state.step, self.job.schedule.last_step - 1)):.3g}"
        scale = f", scale {state.scaler.get_scale():g}" if state.scaler.is_enabled() else ""
        raise UserError(
            f"{run.lr_key}: training diverged after step {state.step} ({lr}{scale}): {error}{seen}. "
            f"The last checkpoint stays. {run.against_divergence}"
        ) from error


def image_batches(
    images: KeyedImages, plan: BatchPlan, workers: int, pin_memory: bool, collate: Callable[[list[Any]], Any]
) -> Callable[[int, int], Iterator[Any]]:
    """Return `Job.open_batches` of keyed images."""

    def open_batches(first: int, last: int) -> Iterator[Any]:
        for batch in build_loader(images, plan, first, last, workers, pin_memory, collate):
            if isinstance(batch, Unreadable):
                raise UserError(f"{batch.message.rstrip('.')}. Repair or remove it, or set data.broken=substitute.")
            yield batch

    return open_batches


def image_names(source: Source) -> Callable[[Any], NameImages]:
    """Return `Job.name_images` of keyed images."""

    def name_images(batch: Any) -> NameImages:
        indices = batch.indices
        return lambda: [source.name(index) for index in indices.tolist()]

    return name_images


def broken_watch(
    source: Source, found: list[Broken], budget: float, ranks: Ranks
) -> Callable[[Path, bool], Callable[[Any], None]]:
    """Return `Job.watch_broken` of keyed images.

    `found` are the broken images that were found before training.
    """

    def open_list(folder: Path, resumed: bool) -> Callable[[Any], None]:
        name = BROKEN if ranks.is_main else f"broken.rank{ranks.rank}.jsonl"
        broken = BrokenImages(folder / name, source, budget, resumed)
        broken.add(found)
        return lambda batch: broken.add(batch.broken)

    return open_list


def check_images(source: Source, channels: int, bit_depth: int, policy: str, ranks: Ranks) -> list[Broken]:
    """Find broken training images. Each process checks its share."""
    share = range(ranks.rank, len(source), ranks.world_size)
    broken = find_broken(source, share, channels, bit_depth)
    if policy == "error":
        refuse_broken(broken, "data.train", "Repair or remove what is broken, or set data.broken=substitute.")
    return broken


def write_weights(
    folder: Path, decay: float | None, metadata: Callable[[int], dict[str, str]], checkpoint: Path
) -> None:
    """Copy the weights of a checkpoint to the run folder."""
    weights = folder / WEIGHTS
    write_atomically(weights, lambda path: path.write_bytes((checkpoint / MODEL).read_bytes()))
    state = read_state(checkpoint, mapped=True) if decay else {}  # may have gigabytes, so it is read only if needed
    if "ema" in state:
        about = metadata(int(state["step"])) | {"ema_decay": str(decay)}
        save_weights(folder / EMA_WEIGHTS, state["ema"], about, force=True)
    log.info("final weights: %s", weights)
