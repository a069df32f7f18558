"""The pretraining loop, in one process or in one per GPU.

Everything that a restart needs is the step number and the optimizer's state: the learning rate is a function of the
step, and the data are a function of (seed, step), see crossmae/data.py.
"""

from __future__ import annotations

import dataclasses
import json
import logging
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
from torchvision.transforms import v2

import crossmae
from crossmae.checkpoint import MODEL, complete_checkpoints, save_checkpoint
from crossmae.config import PretrainConfig
from crossmae.data import Batch, BatchPlan, PretrainImages, Unreadable, build_loader, check_source, to_unit_range
from crossmae.device import open_device
from crossmae.distributed import Ranks, find_ranks, process_group
from crossmae.errors import UserError
from crossmae.figures import fused_map_names, fusion_figure, reconstruction_figure
from crossmae.files import make_folder, write_atomically, write_text
from crossmae.health import Health
from crossmae.model import CrossMAE
from crossmae.optim import lr_at, parameter_groups
from crossmae.plan import Plan, announce, choose_precision, fingerprint, make_plan
from crossmae.pretrained import BIT_DEPTH
from crossmae.run_log import BROKEN, BrokenImages, RunLog, live_line
from crossmae.sources import Source
from crossmae.start import EMA_WEIGHTS, WEIGHTS, build_model, find_start, restore, start_from
from crossmae.validation import HeldOut, Neighbours, model_size, open_named
from crossmae.variants import model_arguments
from crossmae.versions import versions
from crossmae.weights import FORMAT, MODEL_ARGUMENTS, PIXEL_MEAN, PIXEL_STD, STEP, VERSION, save_weights

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
    device = open_device(config.runtime.device, "runtime.device", ranks.local_rank)
    precision = choose_precision(config, device)
    with process_group(ranks, device):
        return _pretrain(config, resume, ranks, device, precision)


def _pretrain(config: PretrainConfig, resume: bool, ranks: Ranks, device: torch.device, precision: str) -> Path:
    # 1. Everything that can be wrong is looked at before anything is written.
    model = build_model(config)
    source = open_named(config, "data.train")
    batches = BatchPlan(
        len(source),
        config.optim.batch_size,
        config.runtime.seed,
        ranks.rank,
        ranks.world_size,
        source.groups,
        config.data.shuffle_shards,
    )
    plan = make_plan(config, batches, device, precision)
    start = find_start(config.output_dir, resume)
    log.info("data.train: %s", source.description)
    broken = check_source(source, config.data.broken) if config.data.check and ranks.is_main else []
    if config.model.init and not start:
        start_from(model, config.model.init.expanduser(), config.data.mean)
    judges = Judges(config, model, source, ranks)

    # 2. Build what trains, and restore it.
    make_folder(config.output_dir, "output_dir")
    model.to(device)
    run = Run(config, plan, ranks, model, device, source)
    run.broken.add(broken)
    if start:
        run.load(restore(start, model, config, plan))
    ranks.wait()  # nobody writes before everybody has looked
    announce(config, plan, model, run.step)
    if ranks.is_main:
        # Weights of an earlier end would hide the newer checkpoints of this run from those who read the folder.
        for name in (WEIGHTS, EMA_WEIGHTS):
            (config.output_dir / name).unlink(missing_ok=True)
        write_text(config.output_dir / CONFIG, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    if run.step == plan.last_step:
        log.info("the run is complete already: %d of %d steps are done", run.step, plan.last_step)

    # 3. Train.
    first, last = plan.batches_done(run.step), plan.batches_done(plan.last_step)
    on_gpu = device.type == "cuda"
    loader = build_loader(build_dataset(config, source, model), batches, first, last, config.data.workers, on_gpu)
    with RunLog(config, plan, run.step, ranks.is_main) as records:
        train_steps(run, iter(loader), judges, records)
        summary = records.summary() if ranks.is_main else []

    # 4. The final weights, where people look for them.
    weights = config.output_dir / WEIGHTS
    if ranks.is_main:
        source_file = complete_checkpoints(config.output_dir)[-1] / MODEL
        write_atomically(weights, lambda path: path.write_bytes(source_file.read_bytes()))
        run.save_ema()
        for line in summary:
            log.info(line)
        log.info("final weights: %s", weights)
    ranks.wait()
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
        self, config: PretrainConfig, plan: Plan, ranks: Ranks, model: CrossMAE, device: torch.device, source: Source
    ) -> None:
        self.config, self.plan, self.ranks, self.model, self.device, self.source = (
            config,
            plan,
            ranks,
            model,
            device,
            source,
        )
        self.step = self.skipped = 0
        optim = config.optim
        groups = parameter_groups(model, optim.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=plan.peak_lr, betas=optim.betas, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=plan.precision == "fp16")
        dtype = torch.float16 if plan.precision == "fp16" else torch.bfloat16
        self.autocast = torch.autocast(device.type, dtype, enabled=plan.precision != "fp32")
        self.normalize = v2.Normalize(config.data.mean, config.data.std)
        self.ema = ModelEmaV3(model, optim.ema, use_warmup=True) if optim.ema else None
        # Only steps are compiled: evaluation has other shapes, which would make those of a step dynamic, too.
        self.parallel: nn.Module = cast(nn.Module, torch.compile(model)) if config.runtime.compile else model
        if ranks.world_size > 1:
            ids = [device] if device.type == "cuda" else None
            self.parallel = DistributedDataParallel(
                self.parallel, ids, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        name = BROKEN if ranks.is_main else f"broken.rank{ranks.rank}.jsonl"
        self.broken = BrokenImages(config.output_dir / name, source, config.data.broken_budget)

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state."""
        self.step = int(state["step"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.skipped = int(state["skipped"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])

    def forward_backward(self, batch: Batch, micro_batches: int, last: bool) -> Tensor:
        """Loss of one micro-batch, detached; gradients are added up, and with the last one shared among processes."""
        self.broken.add(batch.broken)
        batch = batch.to(self.device)
        imgs = self.normalize(to_unit_range(batch.images))
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
        self.scaler.step(self.optimizer)
        before = self.scaler.get_scale()
        self.scaler.update()
        self.skipped = self.skipped + 1 if self.scaler.get_scale() < before else 0
        if self.skipped >= MAX_SKIPPED:
            raise UserError(
                f"fp16 skipped {self.skipped} steps in a row up to step {self.step + 1}, because gradients were not "
                "finite; the last checkpoint stays. Use runtime.precision=bf16 or fp32, or lower optim.base_lr"
            )
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.model, self.step)
        return lr

    def save(self) -> None:
        """Write a checkpoint of the current step."""
        config, plan = self.config, self.plan
        record = {
            "step": self.step,
            "batches_consumed": plan.batches_done(self.step),
            "plan": dataclasses.asdict(plan),
            "config": config.model_dump(mode="json"),
            "versions": versions(),
        }
        state = {
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped": self.skipped,
            "fingerprint": fingerprint(config, plan),
        }
        if self.ema is not None:
            state["ema"] = self.ema.module.state_dict()
        tensors = {name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}
        metadata = weight_metadata(config, self.step)
        save_checkpoint(config.output_dir, self.step, tensors, metadata, state, record, config.checkpoint.keep)

    def save_ema(self) -> None:
        """Write the averaged weights, where there are any."""
        if self.ema is not None:
            metadata = weight_metadata(self.config, self.step) | {"ema_decay": str(self.config.optim.ema)}
            save_weights(self.config.output_dir / EMA_WEIGHTS, self.ema.module.state_dict(), metadata, force=True)


class Judges:
    """What a run is looked at with from outside: held-out loss, pictures, neighbours."""

    def __init__(self, config: PretrainConfig, model: CrossMAE, source: Source, ranks: Ranks) -> None:
        val = open_named(config, "data.val") if config.data.val else None
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
        if values:
            records.record(run.step, values)
            records.announce(run.step, values)

    def draw(self, run: Run, records: RunLog) -> None:
        """Pictures of reconstructions and of the fusion weights."""
        if self.preview is not None:
            panels = self.preview.panels(run.model, run.device, run.config.log.pictures)
            title = f"step {run.step}, {run.config.model.mask_ratio:.0%} of the patches masked"
            records.picture(run.step, "reconstructions", reconstruction_figure(panels, title))
        if run.ranks.is_main and run.model.fused_blocks:
            names = fused_map_names(run.model)
            weights = run.model.wfm.linear.weight.detach().float().cpu()
            records.picture(run.step, "fusion", fusion_figure(weights, names, f"fusion weights at step {run.step}"))


def train_steps(run: Run, batches: Any, judges: Judges, records: RunLog) -> None:
    """Steps until the plan's last one; logs, judges, draws and saves on the way.

    Raises:
        UserError: a broken image, or a loss that is not finite; names the files or the step. The last checkpoint stays.
    """
    config, plan = run.config, run.plan
    warmup = plan.warmup_steps / plan.total_steps
    health = Health(config.health.band, config.health.measured_on, config.model.norm_pix_loss, warmup)
    if run.step == 0:
        judges.judge(run, records, validate=True, probe=True)  # of random weights: what there is to be better than
    window, losses, waited = time.perf_counter(), [], 0.0
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
        save = plan.ends_period(step, config.checkpoint.every_epochs)
        if save or step % config.log.every_steps == 0:
            elapsed = time.perf_counter() - window
            values = {
                "loss": finite_mean(losses, step, lr, run.ranks),
                "lr": lr,
                "images_per_second": len(losses) * config.optim.batch_size * plan.world_size / elapsed,
                "data_wait_share": waited / elapsed,
                "memory_gb": memory_gb(run.device),
            }
            records.record(step, values, live_line(**values))
            for warning in health.warnings(step / plan.total_steps, values["loss"]):
                log.warning(warning)
            losses, waited = [], 0.0
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
        if not losses:
            window = time.perf_counter()  # judging, pictures and checkpoints are not part of the speed


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
