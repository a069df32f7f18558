"""The pretraining loop.

One process, one device. Everything that a restart needs is the step number and the optimizer's state: the learning rate
is a function of the step, and the data are a function of (seed, step), see crossmae/data.py.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import yaml
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as VF
from tqdm import tqdm

import crossmae
from crossmae.checkpoint import MODEL, complete_checkpoints, latest_checkpoint, read_state, save_checkpoint
from crossmae.config import PretrainConfig
from crossmae.data import Batch, BatchPlan, PretrainImages, Unreadable, build_loader
from crossmae.errors import UserError
from crossmae.figures import reconstruct, reconstruction_figure
from crossmae.files import make_folder, write_atomically, write_text
from crossmae.images import check_images, find_images, read_image
from crossmae.model import CrossMAE
from crossmae.optim import lr_at, parameter_groups, scaled_lr
from crossmae.variants import create_model, model_arguments
from crossmae.versions import versions
from crossmae.weights import FORMAT, MODEL_ARGUMENTS, PIXEL_MEAN, PIXEL_STD, STEP, VERSION, load_model

log = logging.getLogger(__name__)

WEIGHTS, LOG, CONFIG = "model.safetensors", "log.jsonl", "config.yaml"


@dataclass(frozen=True)
class Plan:
    """Numbers of a run that follow from config and data; printed at the start, saved with checkpoints."""

    images: int
    images_per_step: int
    steps_per_epoch: int
    total_steps: int
    last_step: int
    warmup_steps: float
    peak_lr: float
    device: str
    precision: str


def pretrain(config: PretrainConfig, resume: bool = False) -> Path:
    """Train one model as the config says; returns the file of its final weights.

    Where the weights come from: 1. with `resume`, the latest complete checkpoint in config.output_dir; 2. scratch.

    Reads every key of `PretrainConfig`.

    Raises:
        UserError: bad data, a folder in use by another run, an impossible combination of settings, a loss that is not
            finite.
    """
    # 1. Everything that can be wrong is looked at before anything is written.
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("WORLD_SIZE is over 1, but pretraining runs in one process so far; start it without torchrun")
    device, precision = choose_device(config)
    model = build_model(config)
    paths = find_images(config.data.train, "data.train")
    val_paths = find_images(config.data.val, "data.val") if config.data.val else paths
    batches = BatchPlan(len(paths), config.optim.batch_size, config.runtime.seed)
    plan = make_plan(config, batches, device, precision)
    start = find_start(config.output_dir, resume)
    if config.data.check:
        check_images(paths)
    preview = load_preview(config, model, val_paths[: config.log.reconstruct_images])

    # 2. Build what trains, and restore it.
    make_folder(config.output_dir, "output_dir")
    model.to(device)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.optim.weight_decay),
        lr=plan.peak_lr,
        betas=config.optim.betas,
        fused=True,
    )
    step = restore(start, model, optimizer, config, plan) if start else 0
    # Weights of an earlier end would hide the newer checkpoints of this run from those who read the folder.
    (config.output_dir / WEIGHTS).unlink(missing_ok=True)
    announce(config, plan, model, step)
    if step == plan.last_step:
        log.info("the run is complete already: %d of %d steps are done", step, plan.last_step)

    # 3. Train.
    run = Run(config, plan, model, optimizer, step, preview)
    dataset = PretrainImages(
        paths,
        pixel_size(model),
        model.num_patches,
        config.data.crop_scale,
        config.data.flip,
        config.runtime.seed,
    )
    accumulate = config.optim.accumulate
    loader = build_loader(
        dataset,
        batches,
        step * accumulate,
        plan.last_step * accumulate,
        config.data.workers,
        device.type == "cuda",
    )
    with run:
        train_steps(run, iter(loader))

    # 4. The final weights, where people look for them.
    weights = config.output_dir / WEIGHTS
    source = complete_checkpoints(config.output_dir)[-1] / MODEL
    write_atomically(weights, lambda path: path.write_bytes(source.read_bytes()))
    log.info("final weights: %s", weights)
    return weights


class Run:
    """The state of a run and what it writes; a context manager that closes its writers."""

    def __init__(
        self,
        config: PretrainConfig,
        plan: Plan,
        model: CrossMAE,
        optimizer: torch.optim.Optimizer,
        step: int,
        preview: tuple[Tensor, Tensor] | None,
    ) -> None:
        self.config, self.plan, self.model, self.optimizer, self.step = config, plan, model, optimizer, step
        self.preview = preview
        self.device = torch.device(plan.device)
        self.normalize = v2.Normalize(config.data.mean, config.data.std)

    def __enter__(self) -> Run:
        folder = self.config.output_dir
        text = yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False)
        write_text(folder / CONFIG, text)
        truncate_log(folder / LOG, self.step)
        self.lines = open(folder / LOG, "a", encoding="utf-8")
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=self.step)
        self.bar = tqdm(total=self.plan.last_step, initial=self.step, desc="pretrain", unit="step", dynamic_ncols=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        self.board.close()
        self.lines.close()

    def forward_backward(self, batch: Batch) -> Tensor:
        """Loss of one micro-batch, detached; gradients are added up."""
        batch = batch.to(self.device)
        imgs = self.normalize(batch.images.float() / 255)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.plan.precision == "bf16"):
            out = self.model(imgs, self.config.model.mask_ratio, self.config.model.predict_ratio, batch.noise)
        (out.loss / self.config.optim.accumulate).backward()
        return out.loss.detach()

    def optimizer_step(self) -> float:
        """Clip, update at the step's learning rate, clear the gradients; returns that learning rate."""
        plan, clip = self.plan, self.config.optim.clip_grad
        lr = lr_at(self.step, plan.peak_lr, plan.warmup_steps, plan.total_steps, self.config.schedule.min_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return lr

    def record(self, values: dict[str, float]) -> None:
        """One line of the log, one point of every TensorBoard curve, and the live line."""
        rounded = {key: float(f"{value:.6g}") for key, value in values.items()}
        line = {"step": self.step, "epoch": round(self.step / self.plan.steps_per_epoch, 4), **rounded}
        self.lines.write(json.dumps(line) + "\n")
        self.lines.flush()
        for key, value in values.items():
            self.board.add_scalar(key, value, self.step)
        self.bar.set_postfix_str(
            f"loss {values['loss']:.4f}, lr {values['lr']:.2e}, {values['images_per_second']:.0f} img/s, "
            f"waiting for data {values['data_wait_share']:.0%}, {values['memory_gb']:.1f} GB"
        )

    def draw(self) -> None:
        """Write a picture of reconstructions of the preview images."""
        if self.preview is None:
            return
        images, noise = (t.to(self.device) for t in self.preview)
        mean, std, ratio = self.config.data.mean, self.config.data.std, self.config.model.mask_ratio
        panels = reconstruct(self.model, self.normalize(images.float() / 255), ratio, noise, mean, std)
        figure = reconstruction_figure(panels, f"step {self.step}, {ratio:.0%} of the patches masked")
        folder = self.config.output_dir / "reconstructions"
        folder.mkdir(exist_ok=True)
        path = folder / f"step-{self.step:08d}.png"
        write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
        self.board.add_figure("reconstructions", figure, self.step)

    def save(self) -> None:
        """Write a checkpoint of the current step."""
        config, plan = self.config, self.plan
        record = {
            "step": self.step,
            "batches_consumed": self.step * config.optim.accumulate,
            "plan": dataclasses.asdict(plan),
            "config": config.model_dump(mode="json"),
            "versions": versions(),
        }
        state = {
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "fingerprint": fingerprint(config, plan),
        }
        tensors = {name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}
        metadata = weight_metadata(config, self.step)
        save_checkpoint(config.output_dir, self.step, tensors, metadata, state, record, config.checkpoint.keep)


def train_steps(run: Run, batches: Any) -> None:
    """Steps until the plan's last one; logs, draws and saves on the way.

    Raises:
        UserError: a broken image, or a loss that is not finite; names the files or the step. The last checkpoint stays.
    """
    config, plan = run.config, run.plan
    window, losses, waited = time.perf_counter(), [], 0.0
    while run.step < plan.last_step:
        for _ in range(config.optim.accumulate):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            if isinstance(batch, Unreadable):
                raise UserError(batch.message)
            losses.append(run.forward_backward(batch))
        lr = run.optimizer_step()
        run.step += 1
        run.bar.update()
        last = run.step == plan.last_step
        save = last or run.step % (config.checkpoint.every_epochs * plan.steps_per_epoch) == 0
        draw = last or run.step % (config.log.reconstruct_every_epochs * plan.steps_per_epoch) == 0
        if save or run.step % config.log.every_steps == 0:
            loss, elapsed = finite_mean(losses, run.step, lr), time.perf_counter() - window
            images = len(losses) * config.optim.batch_size
            run.record(
                {
                    "loss": loss,
                    "lr": lr,
                    "images_per_second": images / elapsed,
                    "data_wait_share": waited / elapsed,
                    "memory_gb": memory_gb(run.device),
                }
            )
            losses, waited = [], 0.0
        if draw:
            run.draw()
        if save:
            run.save()
        if not losses:
            window = time.perf_counter()  # pictures and checkpoints are not part of the speed


def choose_device(config: PretrainConfig) -> tuple[torch.device, str]:
    """The device and the precision that "auto" stands for here.

    Raises:
        UserError: a device that this machine does not have.
    """
    name = config.runtime.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"runtime.device: {name!r} can not be used: {str(error).splitlines()[0]}") from None
    precision = config.runtime.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    return device, precision


def build_model(config: PretrainConfig) -> CrossMAE:
    """The model in its initial state, which depends on the seed alone.

    Raises:
        UserError: names the section for every setting that the model refuses.
    """
    torch.manual_seed(config.runtime.seed)
    try:
        model = create_model(config.model.name, **config.model.arguments())
        counts = model.patch_counts(config.model.mask_ratio, config.model.predict_ratio)
    except ValueError as error:
        raise UserError(f"model: {error}") from None
    log.info("%d patches per image: %d visible, %d dropped, %d predicted", model.num_patches, *counts)
    return model


def make_plan(config: PretrainConfig, batches: BatchPlan, device: torch.device, precision: str) -> Plan:
    """Work out steps and learning rate.

    Raises:
        UserError: fewer batches per epoch than micro-batches per step.
    """
    optim, schedule = config.optim, config.schedule
    steps_per_epoch = batches.batches_per_epoch // optim.accumulate
    if steps_per_epoch == 0:
        raise UserError(
            f"optim.accumulate: a step needs {optim.accumulate} batches of {optim.batch_size} images, one "
            f"epoch of {batches.num_images} images has {batches.batches_per_epoch}; lower one of the two"
        )
    if schedule.warmup_epochs > schedule.epochs:
        raise UserError(f"schedule.warmup_epochs: {schedule.warmup_epochs} exceeds schedule.epochs {schedule.epochs}")
    total = batches.batches_per_epoch * schedule.epochs // optim.accumulate
    images_per_step = optim.batch_size * optim.accumulate
    predict_ratio = config.model.mask_ratio if is_plain(config) else config.model.predict_ratio
    lr = optim.lr or scaled_lr(optim.base_lr, images_per_step, config.model.mask_ratio, predict_ratio, optim.lr_rule)
    return Plan(
        images=batches.num_images,
        images_per_step=images_per_step,
        steps_per_epoch=steps_per_epoch,
        total_steps=total,
        last_step=min(total, schedule.max_steps or total),
        warmup_steps=schedule.warmup_epochs * batches.batches_per_epoch / optim.accumulate,
        peak_lr=lr,
        device=str(device),
        precision=precision,
    )


def is_plain(config: PretrainConfig) -> bool:
    """Whether the decoder is plain MAE's, to which the predict ratio does not apply."""
    return (config.model.decoder or model_arguments(config.model.name)["decoder"]) == "self"


def find_start(run: Path, resume: bool) -> Path | None:
    """The checkpoint to go on from, or None for a new run.

    Raises:
        UserError: the folder holds a run and `resume` was not asked for, or weights without a checkpoint.
    """
    latest = latest_checkpoint(run)
    if latest and not resume:
        raise UserError(
            f"output_dir: {run} already holds a run ({latest.name}); pass --resume to go on, or name another"
        )
    if not latest and (run / WEIGHTS).exists():
        raise UserError(
            f"output_dir: {run} holds {WEIGHTS} but no complete checkpoint to go on from; name another folder"
        )
    if resume and not latest:
        log.info("--resume: no complete checkpoint in %s, starting from scratch", run)
    return latest


def restore(folder: Path, model: CrossMAE, optimizer: torch.optim.Optimizer, config: PretrainConfig, plan: Plan) -> int:
    """Load a checkpoint into model and optimizer; returns its step.

    Raises:
        UserError: the checkpoint is of a run whose settings differ in what decides data, model or schedule.
    """
    state = read_state(folder)
    mine, theirs = fingerprint(config, plan), state["fingerprint"]
    changed = [f"{key} was {theirs.get(key)}, is {mine[key]}" for key in mine if mine[key] != theirs.get(key)]
    if changed:
        raise UserError(
            f"--resume: {folder} is of a run with other settings: {'; '.join(changed)}; data paths, "
            "output, log, checkpoint and schedule.max_steps may change, for anything else start in another folder"
        )
    load_model(model, folder / MODEL)
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def fingerprint(config: PretrainConfig, plan: Plan) -> dict[str, str]:
    """What must not change between a run and its continuation, as text by key."""
    values = config.model_dump(mode="json", include={"model", "optim", "schedule", "data", "runtime"})
    values["data"] = {key: values["data"][key] for key in ("crop_scale", "flip", "mean", "std")}
    values["schedule"].pop("max_steps")
    values["runtime"] = {"seed": values["runtime"]["seed"]}
    flat = {f"{section}.{key}": json.dumps(value) for section, keys in values.items() for key, value in keys.items()}
    return flat | {"images": str(plan.images), "precision": plan.precision}


def load_preview(config: PretrainConfig, model: CrossMAE, paths: list[Path]) -> tuple[Tensor, Tensor] | None:
    """Images (B, 3, H, W) uint8, resized and centre-cropped, and noise (B, L), the same in every run."""
    if not paths:
        return None
    size = pixel_size(model)
    images = []
    for path in paths:
        image = VF.resize(read_image(path), [max(size)], antialias=True)
        images.append(VF.pil_to_tensor(VF.center_crop(image, list(size))))
    noise = np.random.default_rng(0).random((len(paths), model.num_patches), dtype=np.float32)
    return torch.stack(images), torch.from_numpy(noise)


def pixel_size(model: CrossMAE) -> tuple[int, int]:
    """Height and width of the model's images."""
    return model.grid[0] * model.patch_size, model.grid[1] * model.patch_size


def announce(config: PretrainConfig, plan: Plan, model: CrossMAE, step: int) -> None:
    """Tell what is about to happen, in numbers."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rule = (
        "optim.lr"
        if config.optim.lr
        else f"base_lr {config.optim.base_lr:g} * {plan.images_per_step} / 256, {config.optim.lr_rule}"
    )
    log.info(
        "%s: %.1f M trainable parameters, on %s in %s",
        config.model.name,
        trainable / 1e6,
        plan.device,
        plan.precision,
    )
    unused = (
        {"fuse_blocks", "fuse_input", "predict_ratio"} & config.model.model_fields_set if is_plain(config) else set()
    )
    if unused:
        log.info("ignored, because decoder is 'self': %s", ", ".join(f"model.{key}" for key in sorted(unused)))
    log.info("%d images, %d per step, %d steps per epoch", plan.images, plan.images_per_step, plan.steps_per_epoch)
    log.info("steps %d to %d, peak learning rate %.3g (%s)", step + 1, plan.last_step, plan.peak_lr, rule)


def finite_mean(losses: list[Tensor], step: int, lr: float) -> float:
    """Mean of the losses since the last line.

    Raises:
        UserError: one of them is not finite.
    """
    mean = torch.stack(losses).mean().item()
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


def truncate_log(path: Path, step: int) -> None:
    """Drop the lines after `step`, which a resumed run will write again."""
    if path.exists():
        kept = [line for line in path.read_text(encoding="utf-8").splitlines(True) if _step_of(line) <= step]
        write_text(path, "".join(kept))


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):
        return float("inf")  # a line torn by a kill


def weight_metadata(config: PretrainConfig, step: int) -> dict[str, str]:
    """What travels with the weights: how to build the model, and how its pixels were normalised."""
    arguments = model_arguments(config.model.name) | config.model.arguments()
    return {
        FORMAT: "crossmae",
        MODEL_ARGUMENTS: json.dumps(arguments),
        PIXEL_MEAN: json.dumps(config.data.mean),
        PIXEL_STD: json.dumps(config.data.std),
        VERSION: crossmae.__version__,
        STEP: str(step),
    }
