"""One training loop for all tasks, in one process or in one process per GPU.

A restart needs only the step number and the state of the optimizer. The learning rate is a function of the step, and
the data are a function of (seed, step): see `crossmae.data.batches`.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from crossmae.checkpoints.run_checkpoint import MODEL, complete_checkpoints, read_state, step_of
from crossmae.checkpoints.weights import save_weights
from crossmae.data.batches import BatchPlan, KeyedImages, build_loader
from crossmae.data.broken import Broken, Unreadable, find_broken, refuse_broken
from crossmae.data.sources import Source
from crossmae.errors import UserError
from crossmae.files import make_folder, write_atomically, write_text
from crossmae.training.config import RunConfig
from crossmae.training.devices import choose_precision, open_device
from crossmae.training.log import BROKEN, BrokenImages, RunLog, start_wandb
from crossmae.training.processes import Ranks, find_ranks, process_group
from crossmae.training.resume import EMA_WEIGHTS, WEIGHTS, check_agreement
from crossmae.training.schedule import Schedule
from crossmae.training.signals import StopRequest
from crossmae.training.state import Loss, TrainingState, memory_gb

log = logging.getLogger(__name__)

CONFIG = "config.yaml"


class Callbacks:
    """Task-specific work between steps. By default, every callback does nothing."""

    def begin(self, state: TrainingState, records: RunLog) -> None:
        """Prepare for the first step after a start or a restart."""

    def after_log(self, state: TrainingState, records: RunLog, loss: float) -> None:
        """Check the mean loss after a line of the log was written."""

    def measure(self, state: TrainingState, records: RunLog) -> None:
        """Measure and draw everything due at this step, before a checkpoint."""

    def finish(self) -> None:
        """Report the final weights. Called in the main process only."""


@dataclass(frozen=True)
class Job:
    """Everything that the loop needs from a task, built and checked before any file is written.

    Attributes:
        images, batches, collate: training images, the order of the images, and the function that stacks a micro-batch.
        broken: training images that were found broken.
        loss: computes the loss of (model, micro-batch, number of the micro-batch in the run).
        fingerprint: settings that must not change when the run is resumed.
        start: checkpoint to continue from; None: a new run.
        metadata: returns the metadata for the weights of a step. Weight files contain this metadata.
        announce: logs the next steps after a given step.
    """

    word: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    images: KeyedImages
    batches: BatchPlan
    collate: Callable[[list[Any]], Any]
    broken: list[Broken]
    loss: Loss
    schedule: Schedule
    fingerprint: dict[str, str]
    start: Path | None
    metadata: Callable[[int], dict[str, str]]
    announce: Callable[[int], None]
    callbacks: Callbacks


def train(config: RunConfig, build_job: Callable[[Ranks, torch.device, str], Job]) -> Path:
    """Run a job to its last step, and return the weight file.

    With torchrun, each process trains on its share of every batch. Only the first process writes files.
    """
    ranks = find_ranks()
    device = open_device(config.runtime.device, "runtime.device", ranks.local_rank, ranks.world_size)
    precision = choose_precision(config.runtime.precision, device)
    with process_group(ranks, device):
        try:
            job = ranks.together(lambda: build_job(ranks, device, precision))
            check_agreement(ranks, step_of(job.start) if job.start else 0, job.fingerprint)
            start, last_step = job.start, job.schedule.last_step
            final = start if start and step_of(start) >= last_step else None
            if final:
                log.info("the run is complete: %s has reached step %d of %d", start, step_of(final), last_step)
            else:
                run_job(config, job, ranks, precision)
            if ranks.is_main:
                final = final or complete_checkpoints(config.output_dir)[-1]
                write_final(final, config.output_dir, config.optim.ema, job.metadata)
                job.callbacks.finish()
            ranks.wait()
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"optim.batch_size: the GPU's memory is full ({str(error).splitlines()[0]}). The last "
                "checkpoint stays. Halve optim.batch_size and double optim.accumulate, or set "
                "runtime.activation_checkpointing=true."
            ) from error
    return config.output_dir / WEIGHTS


def run_job(config: RunConfig, job: Job, ranks: Ranks, precision: str) -> None:
    """Restore the training state, open the logs, and run the steps."""
    folder, optim, schedule, resumed = config.output_dir, config.optim, job.schedule, job.start is not None
    settings = config.model_dump(mode="json")
    make_folder(folder, "output_dir")
    values = (optim.ema, optim.clip_grad, config.runtime.compile)
    state = TrainingState(job.model, job.optimizer, ranks, precision, *values, job.start)
    name = BROKEN if ranks.is_main else f"broken.rank{ranks.rank}.jsonl"
    broken = BrokenImages(folder / name, job.images.source, config.data.broken_budget, resumed)
    broken.add(job.broken)
    job.announce(state.step)
    wandb = start_wandb(config.log.wandb, folder, settings, resumed) if ranks.is_main and config.log.wandb else None
    records = RunLog(folder, schedule, state.step, resumed, ranks.is_main, job.word, wandb)
    if ranks.is_main:
        # Final weights of an earlier attempt must not be mistaken for the weights of this run.
        for name in (WEIGHTS, EMA_WEIGHTS):
            (folder / name).unlink(missing_ok=True)
        write_text(folder / CONFIG, yaml.safe_dump(settings, sort_keys=False))
    plan = dataclasses.asdict(schedule) | {"device": str(state.device), "precision": precision}
    del plan["min_lr"]
    about = {"plan": plan, "config": settings, "fingerprint": job.fingerprint}

    def save() -> None:
        if ranks.is_main:
            record = {"batches_consumed": schedule.batches_done(state.step), **about}
            state.save(folder, config.checkpoint.keep, job.metadata(state.step), record)

    def is_due(step: int) -> bool:
        every_epochs, every_steps = config.checkpoint.every_epochs, config.checkpoint.every_steps
        return schedule.ends_period(step, every_epochs) or (every_steps is not None and step % every_steps == 0)

    span = schedule.batches_done(state.step), schedule.batches_done(schedule.last_step)
    on_gpu = state.device.type == "cuda"
    batches = iter(build_loader(job.images, job.batches, *span, config.data.workers, on_gpu, job.collate))
    with records, StopRequest(patient=ranks.world_size > 1) as request:
        train_steps(job, state, batches, broken, records, request, save, is_due, config.log.every_steps)
        if schedule.last_step == 0:  # only the initial weights are wanted
            save()
    for line in records.summary():
        log.info(line)


def train_steps(
    job: Job,
    state: TrainingState,
    batches: Iterator[Any],
    broken: BrokenImages,
    records: RunLog,
    request: StopRequest,
    save: Callable[[], None],
    is_due: Callable[[int], bool],
    log_every: int,
) -> None:
    """Run the training steps and save checkpoints.

    Raises UserError if an image is broken or the loss is not finite. The last checkpoint stays.
    """
    schedule, losses = job.schedule, state.losses
    job.callbacks.begin(state, records)
    window, waited = time.perf_counter(), 0.0
    while state.step < schedule.last_step:
        numbers = schedule.micro_batches(state.step)
        for number in numbers:
            # Fetch a micro-batch.
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            if isinstance(batch, Unreadable):
                raise UserError(f"{batch.message.rstrip('.')}. Repair or remove it, or set data.broken=substitute.")
            broken.add(batch.broken)
            # Forward and backward: gradients of the micro-batches add up.
            is_last = number == numbers[-1]
            losses.append(state.forward_backward(job.loss, batch, number, len(numbers), is_last))
        # Clip, and update.
        lr = schedule.lr_at(state.step)
        state.update(lr)
        records.bar.update()
        # Log.
        step = state.step
        saves = is_due(step)
        if saves or step % log_every == 0:
            loss = state.mean_loss(lr)  # waits for the device, so that the time is measured correctly
            elapsed = time.perf_counter() - window
            speed = len(losses) * schedule.images_per_batch / elapsed
            records.progress(step, loss, lr, speed, waited / elapsed, memory_gb(state.device))
            job.callbacks.after_log(state, records, loss)
            window, waited = time.perf_counter(), 0.0
            losses.clear()
        # Measure, and save a checkpoint.
        paused = time.perf_counter()
        if saves:
            state.check_weights()
        job.callbacks.measure(state, records)
        if saves:
            save()
        window += time.perf_counter() - paused  # the speed excludes measuring and saving
        # Stop if a signal requested it.
        stop_if_asked(state, request, save, is_last=step == schedule.last_step)


def stop_if_asked(state: TrainingState, request: StopRequest, save: Callable[[], None], is_last: bool) -> None:
    """Save a checkpoint and end the run if a signal requested it."""
    if state.ranks.world_size > 1:
        if state.losses:
            return
        request.number = max(state.ranks.gather(request.number or 0)) or None
    if request.number is None:
        return
    if not is_last:
        state.check_weights()
        save()
    state.ranks.wait()
    log.info("stopped after step %d, which is saved; the same command with --resume continues from there", state.step)
    request.end()


def check_images(source: Source, channels: int, bit_depth: int, policy: str, ranks: Ranks) -> list[Broken]:
    """Find broken training images. Each process checks its share."""
    share = range(ranks.rank, len(source), ranks.world_size)
    broken = find_broken(source, share, channels, bit_depth)
    if policy == "error":
        refuse_broken(broken, "data.train", "Repair or remove what is broken, or set data.broken=substitute.")
    return broken


def write_final(checkpoint: Path, folder: Path, decay: float | None, metadata: Callable[[int], dict[str, str]]) -> None:
    """Copy the weights of a checkpoint to the run folder."""
    weights = folder / WEIGHTS
    write_atomically(weights, lambda path: path.write_bytes((checkpoint / MODEL).read_bytes()))
    state = read_state(checkpoint) if decay else {}  # may have gigabytes, so it is read only if needed
    if "ema" in state:
        about = metadata(int(state["step"])) | {"ema_decay": str(decay)}
        save_weights(folder / EMA_WEIGHTS, state["ema"], about, force=True)
    log.info("final weights: %s", weights)
