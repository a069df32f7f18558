"""The pretraining loop, in one process or in one per GPU.

Everything that a restart needs is the step number and the optimizer's state: the learning rate is a function of the
step, and the data are a function of (seed, step), see crossmae/data.py.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil
import torch
import yaml
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import crossmae
from crossmae.checkpoint import MODEL, complete_checkpoints, read_state, save_checkpoint, step_of
from crossmae.config import PretrainConfig
from crossmae.data import (
    Batch,
    BatchPlan,
    Broken,
    Normalize,
    PretrainImages,
    Unreadable,
    build_loader,
    find_broken,
    refuse_broken,
    warn_of_depth,
)
from crossmae.device import open_device
from crossmae.distributed import Ranks, find_ranks, process_group
from crossmae.errors import UserError
from crossmae.figures import fused_map_names, fusion_figure, reconstruction_figure
from crossmae.files import check_writable, make_folder, write_atomically, write_text
from crossmae.health import Health
from crossmae.model import CrossMAE
from crossmae.optim import lr_at, parameter_groups
from crossmae.plan import Plan, announce, choose_precision, fingerprint, make_plan
from crossmae.pretrained import BIT_DEPTH
from crossmae.run_log import BROKEN, BrokenImages, RunLog, live_line
from crossmae.sources import Source
from crossmae.start import EMA_WEIGHTS, WEIGHTS, build_model, check_settings, find_start, start_from
from crossmae.stopping import StopRequest
from crossmae.validation import HeldOut, Neighbours, model_size, open_named, warn_of_overlap
from crossmae.variants import model_arguments
from crossmae.versions import versions
from crossmae.weights import FORMAT, MODEL_ARGUMENTS, PIXEL_MEAN, PIXEL_STD, STEP, VERSION, load_model, save_weights

log = logging.getLogger(__name__)

CONFIG = "config.yaml"
MAX_SKIPPED = 20  # steps in a row that fp16 may skip because a gradient is not finite


def pretrain(config: PretrainConfig, resume: bool = False) -> Path:
    """Train one model as the config says; returns the file of its final weights.

    Reads every key of `PretrainConfig`. Where the weights come from: see `crossmae.start`. Started by torchrun, each
    process trains on its share of every batch; the first one writes.

    Raises:
        UserError: bad data, a folder in use by another run, an impossible combination of settings, a loss that is not
            finite.
    """
    ranks = find_ranks()
    device = open_device(config.runtime.device, "runtime.device", ranks.local_rank, ranks.world_size)
    precision = choose_precision(config, device)
    with process_group(ranks, device):
        try:
            return _pretrain(config, resume, ranks, device, precision)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the GPU's memory is full ({str(error).splitlines()[0]}); halve optim.batch_size and double "
                "optim.accumulate, or set runtime.activation_checkpointing=true; the last checkpoint stays"
            ) from error


def _pretrain(config: PretrainConfig, resume: bool, ranks: Ranks, device: torch.device, precision: str) -> Path:
    # 1. Everything that can be wrong is looked at before anything is written.
    ready = ranks.together(lambda: prepare(config, resume, ranks, device, precision))
    model, source, plan, start = ready.model, ready.source, ready.plan, ready.start
    same_everywhere(ranks, step_of(start) if start else 0, plan, config)
    if start and step_of(start) >= plan.last_step:
        log.info("the run is complete: %s has reached step %d of %d", start, step_of(start), plan.last_step)
        return write_final(config, start) if ranks.is_main else config.output_dir / WEIGHTS

    # 2. Build what trains, and restore it.
    make_folder(config.output_dir, "output_dir")
    model.to(device)
    run = Run(config, plan, ranks, model, device, source, start)
    run.broken.add(ready.broken)
    announce(config, plan, model, run.step, source.groups is not None)
    records = RunLog(config, plan, run.step, ranks.is_main, resumed=start is not None)
    if ranks.is_main:
        # Weights of an earlier end would hide the newer checkpoints of this run from those who read the folder.
        for name in (WEIGHTS, EMA_WEIGHTS):
            (config.output_dir / name).unlink(missing_ok=True)
        write_text(config.output_dir / CONFIG, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))

    # 3. Train.
    first, last = plan.batches_done(run.step), plan.batches_done(plan.last_step)
    on_gpu = device.type == "cuda"
    dataset = build_dataset(config, source, model)
    loader = build_loader(dataset, ready.batches, first, last, config.data.workers, on_gpu)
    with records, StopRequest(patient=ranks.world_size > 1) as request:
        train_steps(run, iter(loader), ready.judges, records, request)

    # 4. The final weights, where people look for them.
    if ranks.is_main:
        for line in records.summary():
            log.info(line)
        write_final(config, complete_checkpoints(config.output_dir)[-1])
    ranks.wait()
    return config.output_dir / WEIGHTS


@dataclasses.dataclass(frozen=True)
class Ready:
    """What a run needs, all of it looked at; `start` is the checkpoint to go on from."""

    model: CrossMAE
    source: Source
    batches: BatchPlan
    plan: Plan
    start: Path | None
    broken: list[Broken]
    judges: Judges


def prepare(config: PretrainConfig, resume: bool, ranks: Ranks, device: torch.device, precision: str) -> Ready:
    """Build the model, open the data and work out the plan, without writing anything.

    Raises:
        UserError: see `pretrain`.
    """
    check_writable(config.output_dir, "output_dir")
    model = build_model(config)
    source = open_named(config, "data.train")
    if ranks.is_main:
        warn_of_depth(source, config.data.bit_depth)
    data, optim = config.data, config.optim
    batches = BatchPlan(
        len(source),
        optim.batch_size,
        config.runtime.seed,
        ranks.rank,
        ranks.world_size,
        source.groups,
        data.shuffle_shards,
    )
    plan = make_plan(config, batches, device, precision)
    start = find_start(config.output_dir, resume)
    if start and step_of(start) < plan.last_step:
        check_settings(start, config, plan)
    if config.model.init and not start:
        arguments = model_arguments(config.model.name) | config.model.arguments()
        start_from(model, config.model.init.expanduser(), arguments, data)
    judges = Judges(config, model, source, ranks)
    broken: list[Broken] = []
    if data.check and not (start and step_of(start) >= plan.last_step):
        share = range(ranks.rank, len(source), ranks.world_size)
        broken = find_broken(source, share, config.model.in_chans, data.bit_depth)
        if data.broken == "error":
            refuse_broken(broken, "repair or remove what is broken, or set data.broken=substitute")
    return Ready(model, source, batches, plan, start, broken, judges)


def same_everywhere(ranks: Ranks, step: int, plan: Plan, config: PretrainConfig) -> None:
    """Make sure that all processes are about to do the same.

    Raises:
        UserError: they are not, in all of them.
    """
    told = ranks.gather({"step": str(step)} | fingerprint(config, plan))
    differing = sorted(key for key in told[0] if len({str(one[key]) for one in told}) > 1)
    if differing:
        values = "; ".join(f"{key} is {', '.join(one[key] for one in told)}" for key in differing)
        raise UserError(
            f"the processes do not agree: {values}; every machine needs the same images, and output_dir on storage "
            "that all of them share"
        )


def write_final(config: PretrainConfig, checkpoint: Path) -> Path:
    """Put the weights of a checkpoint, and their average where there is one, where people look for them."""
    weights = config.output_dir / WEIGHTS
    write_atomically(weights, lambda path: path.write_bytes((checkpoint / MODEL).read_bytes()))
    if config.optim.ema and "ema" in (state := read_state(checkpoint)):  # gigabytes, of a large model
        metadata = weight_metadata(config, int(state["step"])) | {"ema_decay": str(config.optim.ema)}
        save_weights(config.output_dir / EMA_WEIGHTS, state["ema"], metadata, force=True)
    log.info("final weights: %s", weights)
    return weights


def build_dataset(config: PretrainConfig, source: Source, model: CrossMAE) -> PretrainImages:
    """The training images as the config wants them."""
    data = config.data
    return PretrainImages(
        source,
        model_size(model),
        model.num_patches,
        data.crop_scale,
        data.flip,
        config.runtime.seed,
        config.model.in_chans,
        data.bit_depth,
        data.broken,
    )


class Run:
    """What is trained, and how: model, optimizer, position."""

    def __init__(
        self,
        config: PretrainConfig,
        plan: Plan,
        ranks: Ranks,
        model: CrossMAE,
        device: torch.device,
        source: Source,
        start: Path | None,
    ) -> None:
        self.config, self.plan, self.ranks, self.model, self.device = config, plan, ranks, model, device
        self.step = self.skipped = 0
        self.losses: list[Tensor] = []  # of the micro-batches since the last line of the log
        optim = config.optim
        groups = parameter_groups(model, optim.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=plan.peak_lr, betas=optim.betas, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=plan.precision == "fp16")
        dtype = torch.float16 if plan.precision == "fp16" else torch.bfloat16
        self.autocast = torch.autocast(device.type, dtype, enabled=plan.precision != "fp32")
        self.normalize = Normalize(config.data.mean, config.data.std, device)
        state = None
        if start:
            log.info("going on from %s", start)
            load_model(model, start / MODEL)
            state = read_state(start)
        self.ema = ModelEmaV3(model, optim.ema, use_warmup=True) if optim.ema else None
        # Only steps are compiled: evaluation has other shapes, which would make those of a step dynamic, too.
        self.parallel: nn.Module = cast(nn.Module, torch.compile(model)) if config.runtime.compile else model
        if ranks.world_size > 1:
            ids = [device] if device.type == "cuda" else None
            self.parallel = DistributedDataParallel(
                self.parallel, ids, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        name = BROKEN if ranks.is_main else f"broken.rank{ranks.rank}.jsonl"
        path = config.output_dir / name
        self.broken = BrokenImages(path, source, config.data.broken_budget, resumed=start is not None)
        if state is not None:
            self._load(state)

    def _load(self, state: dict[str, Any]) -> None:
        self.step = int(state["step"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.skipped = int(state["skipped"])
        self.losses = [loss.to(self.device) for loss in state["losses"]]
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])

    def forward_backward(self, batch: Batch, micro_batches: int, last: bool) -> Tensor:
        """Loss of one micro-batch, detached; gradients are added up, and with the last one shared among processes."""
        self.broken.add(batch.broken)
        batch = batch.to(self.device)
        imgs = self.normalize(batch.images)
        model = self.parallel
        local = model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()
        with local:
            with self.autocast:
                out = model(imgs, self.config.model.mask_ratio, self.config.model.predict_ratio, batch.noise)
            self.scaler.scale(out.loss / micro_batches).backward()
        return out.loss.detach()

    def optimizer_step(self) -> float:
        """Clip, update at the step's learning rate, clear the gradients; returns that learning rate.

        Raises:
            UserError: fp16 gradients were not finite for too many steps in a row.
        """
        plan, clip = self.plan, self.config.optim.clip_grad
        lr = lr_at(self.step, plan.peak_lr, plan.warmup_steps, plan.total_steps, self.config.schedule.min_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if clip is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        scale = self.scaler.get_scale()  # 1 without fp16
        self.scaler.step(self.optimizer)
        self.scaler.update()
        was_skipped = self.scaler.get_scale() < scale
        self.skipped = self.skipped + 1 if was_skipped else 0
        if self.skipped >= MAX_SKIPPED:
            raise UserError(
                f"fp16 skipped {self.skipped} steps in a row up to step {self.step + 1}, because gradients were not "
                "finite; the last checkpoint stays. Use runtime.precision=bf16 or fp32, or lower optim.base_lr"
            )
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.ema is not None and not was_skipped:
            self.ema.update(self.model, self.step)
        return lr

    def check_weights(self) -> None:
        """Make sure that what is about to be saved can be used.

        Raises:
            UserError: some weight is not finite.
        """
        norms = torch.stack(torch._foreach_norm([p.detach() for p in self.model.parameters()]))
        if not bool(norms.isfinite().all()):
            raise UserError(
                f"a weight is not finite after step {self.step}; the last checkpoint stays. Lower optim.base_lr, set "
                "optim.clip_grad, or use runtime.precision=fp32"
            )

    def save(self) -> None:
        """Write a checkpoint of the current step."""
        config, plan = self.config, self.plan
        record = {
            "step": self.step,
            "batches_consumed": plan.batches_done(self.step),
            "plan": dataclasses.asdict(plan),
            "config": config.model_dump(mode="json"),
            "fingerprint": fingerprint(config, plan),
            "versions": versions(),
        }
        state = {
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped": self.skipped,
            "losses": [loss.cpu() for loss in self.losses],
        }
        if self.ema is not None:
            state["ema"] = self.ema.module.state_dict()
        tensors = {name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}
        metadata = weight_metadata(config, self.step)
        save_checkpoint(config.output_dir, self.step, tensors, metadata, state, record, config.checkpoint.keep)


class Judges:
    """What a run is looked at with from outside: held-out loss, pictures, neighbours."""

    def __init__(self, config: PretrainConfig, model: CrossMAE, source: Source, ranks: Ranks) -> None:
        val = open_named(config, "data.val") if config.data.val else None
        if val and ranks.is_main:
            warn_of_overlap(source, "data.train", val, "data.val")
        self.held_out = HeldOut(config, val, model, config.validation.images, ranks) if val else None
        self.preview = None
        if ranks.is_main and config.log.pictures:
            policy = "error" if val else config.data.broken
            self.preview = HeldOut(config, val or source, model, config.log.pictures, Ranks(), policy)
        self.neighbours = Neighbours(config, model) if config.probe.train and ranks.is_main else None

    def judge(self, run: Run, records: RunLog, validate: bool, probe: bool) -> None:
        """Measure the held-out loss and the neighbours' accuracy, of the averaged weights as well, and log both."""
        values: dict[str, float] = {}
        models = {"": run.model} if run.ema is None else {"": run.model, "_ema": run.ema.module}
        for suffix, model in models.items():
            if validate and self.held_out:
                values[f"val_loss{suffix}"] = self.held_out.loss(model, run.device, run.autocast)
            if probe and self.neighbours:
                values[f"knn_accuracy{suffix}"] = self.neighbours.accuracy(model, run.device)
        if not all(map(math.isfinite, values.values())):
            raise UserError(f"at step {run.step} the held-out loss is not finite; the last checkpoint stays")
        if values:
            records.record(run.step, values)
            records.announce(run.step, values)

    def draw(self, run: Run, records: RunLog) -> None:
        """Pictures of reconstructions and of the fusion weights."""
        if self.preview is not None:
            panels = self.preview.panels(run.model, run.device, run.config.log.pictures)
            title = f"step {run.step}, {run.config.model.mask_ratio:.0%} of the patches masked"
            records.picture(run.step, "reconstructions", reconstruction_figure(panels, title))
        if run.ranks.is_main and run.model.fused_blocks and run.config.log.pictures:
            names = fused_map_names(run.model)
            weights = run.model.wfm.linear.weight.detach().float().cpu()
            records.picture(run.step, "fusion", fusion_figure(weights, names, f"fusion weights at step {run.step}"))


def train_steps(run: Run, batches: Any, judges: Judges, records: RunLog, request: StopRequest) -> None:
    """Steps until the plan's last one; logs, judges, draws and saves on the way.

    Raises:
        UserError: a broken image, or a loss that is not finite; names the files or the step. The last checkpoint stays.
    """
    config, plan = run.config, run.plan
    health = build_health(run, records)
    if run.step == 0:  # what there is to be better than
        judges.judge(run, records, validate=True, probe=True)
        judges.draw(run, records)
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
            for warning in health.warnings(step / plan.total_steps, loss) if run.ranks.is_main else ():
                log.warning(warning)
            window, waited = time.perf_counter(), 0.0
            losses.clear()
        paused = time.perf_counter()
        look_and_save(run, judges, records)
        window += time.perf_counter() - paused  # judging, pictures and checkpoints are not part of the speed
        stop_if_asked(run, request, at_line=not losses)


def stop_if_asked(run: Run, request: StopRequest, at_line: bool) -> None:
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
        run.save()
    run.ranks.wait()
    log.info("stopped after step %d, which is saved; the same command with --resume goes on from there", run.step)
    request.end()


def is_due_to_save(run: Run) -> bool:
    """Whether a checkpoint follows the step that was just done."""
    every = run.config.checkpoint
    return run.plan.ends_period(run.step, every.every_epochs) or bool(
        every.every_steps and run.step % every.every_steps == 0
    )


def look_and_save(run: Run, judges: Judges, records: RunLog) -> None:
    """What is due after a step: measurements, pictures, a checkpoint."""
    config, plan, step = run.config, run.plan, run.step
    save = is_due_to_save(run)
    if save:
        run.check_weights()
    judges.judge(
        run,
        records,
        validate=plan.ends_period(step, config.validation.every_epochs),
        probe=plan.ends_period(step, config.probe.every_epochs),
    )
    if step == plan.last_step or step % config.log.pictures_every_steps == 0:
        judges.draw(run, records)
    if save and run.ranks.is_main:
        run.save()


def build_health(run: Run, records: RunLog) -> Health:
    """The watch over the loss; a resumed run knows its first loss, one from given weights has not far to fall."""
    config, plan = run.config, run.plan
    first = next((float(row["loss"]) for row in records.rows if "loss" in row), None)
    if config.model.init:
        first = math.inf
    warmup = plan.warmup_steps / plan.total_steps
    return Health(config.health.band, config.health.measured_on, config.model.norm_pix_loss, warmup, first)


def finite_mean(losses: list[Tensor], step: int, lr: float, ranks: Ranks) -> float:
    """Mean of the losses since the last line, over all processes, so that all of them stop together.

    Raises:
        UserError: one of them is not finite.
    """
    mean = ranks.mean(torch.stack(losses).mean()).item()
    if not np.isfinite(mean):
        raise UserError(
            f"the loss is {mean} at step {step} (learning rate {lr:.3g}); the last checkpoint stays. "
            "Lower optim.base_lr, set optim.clip_grad, or use runtime.precision=fp32"
        )
    return mean


def memory_gb(device: torch.device) -> float:
    """Peak memory in GB: of the device, or on a CPU the resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return float(psutil.Process().memory_info().rss) / 1e9


def weight_metadata(config: PretrainConfig, step: int) -> dict[str, str]:
    """What travels with the weights: how to build the model, and how its pixels were normalised."""
    arguments = model_arguments(config.model.name) | config.model.arguments()
    return {
        FORMAT: "crossmae",
        MODEL_ARGUMENTS: json.dumps(arguments),
        PIXEL_MEAN: json.dumps(config.data.mean),
        PIXEL_STD: json.dumps(config.data.std),
        BIT_DEPTH: str(config.data.bit_depth),
        VERSION: crossmae.__version__,
        STEP: str(step),
    }
