"""The training loop, of pretraining and of fine-tuning, in one process or in one per GPU.

Everything that a restart needs is the step number and the optimizer's state: the learning rate is a function of the
step, and the data are a function of (seed, step), see crossmae/data/batches.py.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import yaml
from torch import Tensor, nn

from crossmae.checkpoints.run_checkpoint import MODEL, complete_checkpoints, read_state, step_of
from crossmae.checkpoints.weights import save_weights
from crossmae.data.batches import BatchPlan
from crossmae.data.broken import Broken, Unreadable, find_broken, refuse_broken
from crossmae.data.sources import Source
from crossmae.errors import UserError
from crossmae.files import make_folder, write_atomically, write_text
from crossmae.training.config import RunConfig
from crossmae.training.devices import choose_precision, open_device
from crossmae.training.log import RunLog, live_line
from crossmae.training.processes import Ranks, find_ranks, process_group
from crossmae.training.schedule import Plan, fingerprint
from crossmae.training.signals import StopRequest
from crossmae.training.start import EMA_WEIGHTS, WEIGHTS
from crossmae.training.state import Run, finite_mean, memory_gb

log = logging.getLogger(__name__)

CONFIG = "config.yaml"
Config = TypeVar("Config", bound=RunConfig)


@dataclass(frozen=True)
class Ready:
    """What a run needs, all of it looked at; `start` is the checkpoint to go on from."""

    model: nn.Module
    source: Source
    batches: BatchPlan
    plan: Plan
    start: Path | None
    broken: list[Broken]


class Task(ABC, Generic[Config]):
    """What one kind of training brings to the loop.

    Attributes:
        word: what the progress bar calls it.
    """

    word: str

    def __init__(self, config: Config, ranks: Ranks, device: torch.device, precision: str) -> None:
        self.config, self.ranks, self.device, self.precision = config, ranks, device, precision

    @abstractmethod
    def prepare(self, resume: bool) -> Ready:
        """Build the model, open the data and work out the plan, without writing anything.

        Raises:
            UserError: see the function that runs the task.
        """

    @abstractmethod
    def announce(self, ready: Ready, step: int) -> None:
        """Tell what is about to happen, in numbers."""

    @abstractmethod
    def optimizer(self, model: nn.Module, plan: Plan) -> torch.optim.Optimizer:
        """Of the model on its device."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Of a micro-batch that comes from the loader."""

    @abstractmethod
    def loader(self, ready: Ready, first: int, last: int) -> Iterator[Any]:
        """Micro-batches `first` .. `last` - 1 of the plan; each has `broken`, or is `Unreadable`."""

    @abstractmethod
    def metadata(self, step: int) -> dict[str, str]:
        """What travels with the weights: how to build the model, and how its pixels were normalised."""

    @abstractmethod
    def begin(self, run: Run, records: RunLog) -> None:
        """Before the first step of a new run or of its continuation."""

    @abstractmethod
    def look(self, run: Run, records: RunLog) -> None:
        """What is due after a step: measurements, pictures. Before a checkpoint, so that it holds what was found."""

    def logged(self, run: Run, records: RunLog, loss: float) -> None:  # nothing, unless a task has more to say
        """After a line of the log with the mean loss."""

    def finish(self) -> None:
        """After the last step, when the final weights are written; in the process that writes."""

    def decisive(self) -> dict[str, str]:
        """What, beside the settings, must not change between a run and its continuation."""
        return {}


def train(make_task: Callable[[Ranks, torch.device, str], Task[Any]], config: RunConfig, resume: bool) -> Path:
    """Do all of a task's steps; returns the file of its final weights.

    Started by torchrun, each process trains on its share of every batch; the first one writes.

    Raises:
        UserError: bad data, a folder in use by another run, an impossible combination of settings, a loss that is not
            finite.
    """
    ranks = find_ranks()
    device = open_device(config.runtime.device, "runtime.device", ranks.local_rank, ranks.world_size)
    precision = choose_precision(config.runtime.precision, device)
    with process_group(ranks, device):
        try:
            return _train(make_task(ranks, device, precision), resume)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the GPU's memory is full ({str(error).splitlines()[0]}); halve optim.batch_size and double "
                "optim.accumulate, or set runtime.activation_checkpointing=true; the last checkpoint stays"
            ) from error


def _train(task: Task[Any], resume: bool) -> Path:
    # 1. Everything that can be wrong is looked at before anything is written.
    config, ranks = task.config, task.ranks
    ready = ranks.together(lambda: task.prepare(resume))
    plan, start = ready.plan, ready.start
    same_everywhere(task, step_of(start) if start else 0, plan)
    if start and step_of(start) >= plan.last_step:
        log.info("the run is complete: %s has reached step %d of %d", start, step_of(start), plan.last_step)
        if ranks.is_main:
            write_final(task, start)
            task.finish()
        ranks.wait()
        return config.output_dir / WEIGHTS

    # 2. Build what trains, and restore it.
    make_folder(config.output_dir, "output_dir")
    model = ready.model.to(task.device)
    run = Run(config, plan, ranks, model, ready.source, task.optimizer(model, plan), task.loss, start)
    run.broken.add(ready.broken)
    task.announce(ready, run.step)
    records = RunLog(config, plan, run.step, ranks.is_main, resumed=start is not None, word=task.word)
    if ranks.is_main:
        # Weights of an earlier end would hide the newer checkpoints of this run from those who read the folder.
        for name in (WEIGHTS, EMA_WEIGHTS):
            (config.output_dir / name).unlink(missing_ok=True)
        write_text(config.output_dir / CONFIG, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))

    # 3. Train.
    batches = task.loader(ready, plan.batches_done(run.step), plan.batches_done(plan.last_step))
    with records, StopRequest(patient=ranks.world_size > 1) as request:
        train_steps(task, run, batches, records, request)

    # 4. The final weights, where people look for them.
    if ranks.is_main:
        for line in records.summary():
            log.info(line)
        write_final(task, complete_checkpoints(config.output_dir)[-1])
        task.finish()
    ranks.wait()
    return config.output_dir / WEIGHTS


def plan_batches(config: RunConfig, source: Source, ranks: Ranks) -> BatchPlan:
    """Which images make up which batch of this process.

    Raises:
        UserError: not even one batch per epoch.
    """
    seed, at_once = config.runtime.seed, config.data.shuffle_shards
    return BatchPlan(len(source), config.optim.batch_size, seed, ranks.rank, ranks.world_size, source.groups, at_once)


def check_images(config: RunConfig, source: Source, channels: int, ranks: Ranks) -> list[Broken]:
    """Look at every training image, shared out among the processes; what is broken, where others may stand in for it.

    Raises:
        UserError: something is broken, and nothing may.
    """
    share = range(ranks.rank, len(source), ranks.world_size)
    broken = find_broken(source, share, channels, config.data.bit_depth)
    if config.data.broken == "error":
        refuse_broken(broken, "data.train", "Repair or remove what is broken, or set data.broken=substitute.")
    return broken


def same_everywhere(task: Task[Any], step: int, plan: Plan) -> None:
    """Make sure that all processes are about to do the same.

    Raises:
        UserError: they are not, in all of them.
    """
    told = task.ranks.gather({"step": str(step)} | fingerprint(task.config, plan) | task.decisive())
    differing = sorted(key for key in told[0] if len({str(one[key]) for one in told}) > 1)
    if differing:
        values = "; ".join(f"{key} is {', '.join(one[key] for one in told)}" for key in differing)
        raise UserError(
            f"the processes do not agree: {values}; every machine needs the same images, and output_dir on storage "
            "that all of them share"
        )


def write_final(task: Task[Any], checkpoint: Path) -> Path:
    """Put the weights of a checkpoint, and their average where there is one, where people look for them."""
    folder, decay = task.config.output_dir, task.config.optim.ema
    weights = folder / WEIGHTS
    write_atomically(weights, lambda path: path.write_bytes((checkpoint / MODEL).read_bytes()))
    if decay and "ema" in (state := read_state(checkpoint)):  # gigabytes, of a large model
        metadata = task.metadata(int(state["step"])) | {"ema_decay": str(decay)}
        save_weights(folder / EMA_WEIGHTS, state["ema"], metadata, force=True)
    log.info("final weights: %s", weights)
    return weights


def train_steps(task: Task[Any], run: Run, batches: Iterator[Any], records: RunLog, request: StopRequest) -> None:
    """Steps until the plan's last one; logs, looks and saves on the way.

    Raises:
        UserError: a broken image, or a loss that is not finite; names the files or the step. The last checkpoint stays.
    """
    config, plan = run.config, run.plan
    task.begin(run, records)
    window, losses, waited = time.perf_counter(), run.losses, 0.0
    while run.step < plan.last_step:
        micro_batches = plan.batches_done(run.step + 1) - plan.batches_done(run.step)
        for number in range(1, micro_batches + 1):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            if isinstance(batch, Unreadable):
                raise UserError(f"{batch.message}; repair or remove it, or set data.broken=substitute")
            losses.append(run.forward_backward(batch, micro_batches, last=number == micro_batches))
        lr = run.optimizer_step()
        step = run.step
        records.bar.update()
        if is_due_to_save(run) or step % config.log.every_steps == 0:
            loss = finite_mean(losses, step, lr, run.ranks)  # waits for the device, so the time after it is true
            elapsed = time.perf_counter() - window
            values = {
                "loss": loss,
                "lr": lr,
                "images_per_second": len(losses) * config.optim.batch_size * plan.world_size / elapsed,
                "data_wait_share": waited / elapsed,
                "memory_gb": memory_gb(run.device),
            }
            records.record(step, values, live_line(**values))
            task.logged(run, records, loss)
            window, waited = time.perf_counter(), 0.0
            losses.clear()
        paused = time.perf_counter()
        look_and_save(task, run, records)
        window += time.perf_counter() - paused  # looking and checkpoints are not part of the speed
        stop_if_asked(task, run, request, at_line=not losses)


def look_and_save(task: Task[Any], run: Run, records: RunLog) -> None:
    """What is due after a step: what the task looks at, a checkpoint."""
    save = is_due_to_save(run)
    if save:
        run.check_weights()
    task.look(run, records)
    if save and run.ranks.is_main:
        run.save(task.metadata(run.step), task.decisive())


def stop_if_asked(task: Task[Any], run: Run, request: StopRequest, at_line: bool) -> None:
    """Save and end, if a signal asked for it; several processes agree on it at the lines of the log.

    Raises:
        KeyboardInterrupt: after Ctrl-C.
        SystemExit: after SIGTERM.
    """
    if run.ranks.world_size > 1:
        if not at_line:
            return
        request.number = max(run.ranks.gather(request.number or 0)) or None
    if request.number is None:
        return
    if run.ranks.is_main and run.step < run.plan.last_step:
        run.check_weights()
        run.save(task.metadata(run.step), task.decisive())
    run.ranks.wait()
    log.info("stopped after step %d, which is saved; the same command with --resume goes on from there", run.step)
    request.end()


def is_due_to_save(run: Run) -> bool:
    """Whether a checkpoint follows the step that was just done."""
    every = run.config.checkpoint
    return run.plan.ends_period(run.step, every.every_epochs) or bool(
        every.every_steps and run.step % every.every_steps == 0
    )
