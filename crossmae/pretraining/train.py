"""Pretraining: reconstruct masked patches of unlabelled images.

This module has the pretraining job and the loss. `crossmae.training.loop.train_steps` runs the steps.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

import crossmae
from crossmae.checkpoints.formats.facts import MODEL_KEYS, assumed
from crossmae.checkpoints.metadata import BIT_DEPTH, FORMAT, MODEL_ARGUMENTS, PIXEL_MEAN, PIXEL_STD, STEP, VERSION
from crossmae.checkpoints.provenance import inherited, recorded_inheritance
from crossmae.checkpoints.run_checkpoint import MODEL
from crossmae.data.batches import BatchPlan
from crossmae.data.broken import warn_of_depth
from crossmae.data.pixels import Normalize
from crossmae.data.sources import Source, open_named, warn_of_overlap
from crossmae.errors import named_by
from crossmae.files import check_writable
from crossmae.models.crossmae import MAE, CrossMAE
from crossmae.models.sizes import model_arguments
from crossmae.pretraining.config import PretrainConfig, PretrainDataConfig
from crossmae.pretraining.figures import fused_map_names, fusion_figure, reconstruction_figure
from crossmae.pretraining.images import DecodedCrops, PretrainImages, collate_decoded, collate_pretraining, images_on
from crossmae.pretraining.initial_weights import build_model, say_assumed, start_from
from crossmae.pretraining.validation import Health, HeldOut, Neighbours
from crossmae.training.devices import describe_place
from crossmae.training.log import RunLog, announce_steps, describe
from crossmae.training.loop import (
    Callbacks,
    Job,
    broken_watch,
    check_images,
    image_batches,
    image_names,
    train,
    write_weights,
)
from crossmae.training.optimizers import make_optimizer
from crossmae.training.processes import Ranks
from crossmae.training.resume import EMA_WEIGHTS, IMAGE_NAMES, WEIGHTS, find_start, is_complete, shorten_schedule
from crossmae.training.schedule import Schedule, make_schedule
from crossmae.training.signals import in_main_process
from crossmae.training.state import Diverged, Losses, TrainingState

log = logging.getLogger(__name__)

VALIDATION, NEIGHBOURS, PICTURES = "held-out loss", "nearest neighbours", "pictures"  # kinds of evaluations


def pretrain(config: PretrainConfig, resume: bool = False) -> Path:
    """Train a model and return the file of its final weights.

    See `crossmae.pretraining.initial_weights` for the first weights, `crossmae.training.loop.train` for processes.

    Raises UserError if the data are bad, the folder is in use by another run, settings contradict each other, or the
    loss is not finite.
    """
    width = (model_arguments(config.model.name) | config.model.arguments())["embed_dim"]
    train(replace(config.run_settings(), width=width), partial(build_job, config, resume))
    return config.output_dir / WEIGHTS


def build_job(config: PretrainConfig, resume: bool, ranks: Ranks, device: torch.device, precision: str) -> Job:
    """Build and check model, data and schedule, without writing files."""
    # The model, with random weights.
    data, optim, seed, mask_ratio = config.data, config.optim, config.runtime.seed, config.model.mask_ratio
    check_writable(config.output_dir, "output_dir")
    arguments = model_arguments(config.model.name) | config.model.arguments()
    model = build_model(arguments, seed, mask_ratio, config.model.predict_ratio)
    model.activation_checkpointing = config.runtime.activation_checkpointing
    # The training images, and the schedule that follows from their number.
    images, batches = open_images(data, model, optim.batch_size, seed, ranks)
    source = images.source
    collate = partial(collate_decoded, model.img_size) if data.crop_on == "device" else collate_pretraining
    if data.crop_on == "device" and device.type == "cpu":
        log.warning("data.crop_on=device: there is no GPU, so crops are slower than with data.crop_on=cpu")
    predict_ratio = model.scored_ratio(mask_ratio, config.model.predict_ratio)
    factor, rule = lr_factor(optim.lr_rule, mask_ratio, predict_ratio)
    start = find_start(config.output_dir, resume, "pretraining")
    schedule = make_schedule(batches, optim, config.schedule, factor)
    schedule = shorten_schedule(schedule, start, config.schedule.shorten_to, "schedule.shorten_to")
    # The initial weights: a checkpoint of this run, given weights, or random weights.
    fingerprint = config.fingerprint(schedule.images, precision, ranks.world_size)
    fingerprint[IMAGE_NAMES] = source.digest(labelled=False)
    complete = is_complete(start, schedule.last_step, fingerprint)
    origin = recorded_inheritance(start / MODEL) if start else inherited()
    if config.model.init and not start:
        with named_by("model.init", config.model.init):
            report = start_from(model, config.model.init, arguments, data)
        given = [key for key in config.model.model_fields_set if getattr(config.model, key) is not None]
        found = assumed(report.assumed, given=[key for key in given if key in MODEL_KEYS])
        say_assumed(found, MODEL_KEYS)
        origin = inherited(report.licence, found, config.model.init.name)
    # The measurements, and a check of every image.
    normalize = Normalize(data.mean, data.std, device)
    judges = build_judges(config, model, source, schedule, ranks, normalize)
    check = data.check and not complete
    broken = check_images(source, model.in_chans, data.bit_depth, data.broken, ranks) if check else []
    # The optimizer.
    model = model.to(device)
    groups = parameter_groups(model, optim.weight_decay)
    optimizer = make_optimizer(optim.name, model, groups, schedule.peak_lr, optim.betas)

    def metadata(step: int) -> dict[str, str]:
        pixels = {PIXEL_MEAN: json.dumps(data.mean), PIXEL_STD: json.dumps(data.std), BIT_DEPTH: str(data.bit_depth)}
        about = {FORMAT: "crossmae", MODEL_ARGUMENTS: json.dumps(arguments), VERSION: crossmae.__version__}
        return about | pixels | {STEP: str(step)} | origin

    def announce(step: int) -> None:
        place = describe_place(device, precision, ranks.world_size)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        counts = (model.num_patches, *model.patch_counts(mask_ratio, predict_ratio))
        log.info("%s: %.1f M trainable parameters, on %s", config.model.name, trainable / 1e6, place)
        log.info("%d patches per image: %d visible, %d dropped, %d predicted", *counts)
        for reason, keys in config.ignored(isinstance(model, MAE), source.groups is not None).items():
            log.info("ignored, because %s: %s", reason, ", ".join(keys))
        computed = f"base_lr {optim.base_lr:g} * {schedule.images_per_step} / 256{rule}"
        announce_steps(schedule, step, "optim.lr" if optim.lr else computed)

    return Job(
        word="pretrain",
        kind="pretraining",
        model=model,
        optimizer=optimizer,
        open_batches=image_batches(images, batches, data.workers, device.type == "cuda", collate),
        name_images=image_names(source),
        watch_broken=broken_watch(source, broken, data.broken_budget, ranks),
        loss=partial(reconstruction_loss, normalize, mask_ratio, predict_ratio),
        schedule=schedule,
        saves_after=lambda step: config.saves_after(step, schedule.ends_period),
        fingerprint=fingerprint,
        start=start,
        is_complete=complete,
        metadata=metadata,
        announce=announce,
        callbacks=judges,
        finals=(WEIGHTS, EMA_WEIGHTS),
        write_finals=partial(write_weights, config.output_dir, optim.ema, metadata),
    )


def open_images(
    data: PretrainDataConfig, model: CrossMAE, batch_size: int, seed: int, ranks: Ranks
) -> tuple[PretrainImages, BatchPlan]:
    """Open the training images, and plan their batches."""
    source = open_named(data.train, "data.train", data.root, data.limits)
    if ranks.is_main:
        warn_of_depth(source, data.bit_depth)
    crop = (model.img_size, model.num_patches, data.crop_scale, data.flip)
    kind = DecodedCrops if data.crop_on == "device" else PretrainImages
    images = kind(source, *crop, seed, model.in_chans, data.bit_depth, data.broken)
    order = (ranks.rank, ranks.world_size, source.groups, data.shuffle_shards)
    return images, BatchPlan(len(source), batch_size, seed, *order)


def reconstruction_loss(
    normalize: Normalize, mask_ratio: float, predict_ratio: float, model: nn.Module, batch: Any, number: int
) -> Losses:
    """Compute the loss of the predicted patches of a micro-batch."""
    device = normalize.mean.device
    images, noise = images_on(device, batch.images), batch.noise.to(device, non_blocking=True)
    return {"loss": model(normalize(images), mask_ratio, predict_ratio, noise).loss}


@dataclass(frozen=True)
class Judges(Callbacks):
    """Measurements during a run: held-out loss, nearest neighbours, pictures, health of the training loss.

    Attributes:
        held_out: images for the held-out loss; None: no held-out loss.
        preview: images for the pictures; None: no pictures.
        validate_every, probe_every: epochs between two measurements.
        draw_every: steps between two pictures.
        is_given: the run started from given weights, so the loss may fall only a little.
    """

    schedule: Schedule
    held_out: HeldOut | None
    neighbours: Neighbours | None
    preview: HeldOut | None
    validate_every: int
    probe_every: int
    draw_every: int
    health: Health
    is_given: bool

    def begin(self, state: TrainingState, records: RunLog) -> None:
        """Measure and draw before the first step of a new run."""
        if state.step == 0:
            self.judge(state, records, validate=True, probe=True)
            self.draw(state, records)

    def after_log(self, state: TrainingState, records: RunLog, loss: float) -> None:
        """Warn if the loss is not as expected."""
        if state.ranks.is_main:
            first = math.inf if self.is_given else next(float(row["loss"]) for row in records.rows if "loss" in row)
            for warning in self.health.warnings(state.step / self.schedule.total_steps, loss, first):
                log.warning(warning)

    def periods_end(self, step: int) -> tuple[bool, bool, bool]:
        """Tell which periods end: held-out loss, neighbours, pictures.

        All processes have the same answer, also if only the main process has the images.
        """
        validate, probe = (self.schedule.ends_period(step, every) for every in (self.validate_every, self.probe_every))
        return validate, probe, step == self.schedule.last_step or step % self.draw_every == 0

    def due(self, step: int) -> tuple[str, ...]:
        there = {VALIDATION: self.held_out, NEIGHBOURS: self.neighbours, PICTURES: self.preview}
        pairs = zip(there.items(), self.periods_end(step), strict=True)
        return tuple(kind for (kind, images), is_due in pairs if is_due and images is not None)

    def measure(self, state: TrainingState, records: RunLog) -> None:
        validate, probe, draw = self.periods_end(state.step)
        self.judge(state, records, validate, probe)
        if draw:
            self.draw(state, records)

    def judge(self, state: TrainingState, records: RunLog, validate: bool, probe: bool) -> None:
        """Measure held-out loss and accuracy, also of averaged weights."""
        models = cast(dict[str, CrossMAE], state.models)
        values: dict[str, float] = {}
        if validate and self.held_out:
            with records.timed(VALIDATION):
                for suffix, model in models.items():
                    values[f"val_loss{suffix}"] = self.held_out.loss(model, state.autocast)
        if probe:
            with records.timed(NEIGHBOURS):
                for suffix, model in models.items():
                    accuracy = in_main_process(partial(self.accuracy, model))
                    if accuracy is not None:
                        values[f"knn_accuracy{suffix}"] = accuracy
        if not all(map(math.isfinite, values.values())):
            raise Diverged(f"the held-out loss is not finite ({describe(values)})")
        if values:
            records.announce(state.step, values)

    def accuracy(self, model: CrossMAE) -> float | None:
        """Classify by nearest neighbours.

        None without labelled images, and outside the main process.
        """
        return self.neighbours.accuracy(model) if self.neighbours else None

    def draw(self, state: TrainingState, records: RunLog) -> None:
        """Draw reconstructions and fusion weights."""
        model, step = cast(CrossMAE, state.model), state.step
        if self.preview is None:
            return
        title = f"step {step}, {self.preview.mask_ratio:.0%} of the patches masked"
        with records.timed(PICTURES):
            records.picture(step, "reconstructions", reconstruction_figure(self.preview.panels(model), title))
            if model.fused_blocks:
                weights, names = model.wfm.linear.weight, fused_map_names(model)
                records.picture(step, "fusion", fusion_figure(weights, names, f"fusion weights at step {step}"))


def build_judges(
    config: PretrainConfig, model: CrossMAE, source: Source, schedule: Schedule, ranks: Ranks, normalize: Normalize
) -> Judges:
    """Read the held-out images and the labelled images."""
    warmup = schedule.warmup_steps / schedule.total_steps
    count, health = config.log.pictures, config.health
    data, probe, size = config.data, config.probe, config.optim.batch_size
    val = open_named(data.val, "data.val", data.val_root, data.limits) if data.val else None
    if val and ranks.is_main:
        warn_of_overlap(source, "data.train", val, "data.val")
    views = (config.model.mask_ratio, normalize, data.bit_depth, size)
    held_out = HeldOut(val, model, config.validation.images, ranks, *views) if val else None
    preview = neighbours = None
    if ranks.is_main and count:
        policy, key = "error" if val else data.broken, "data.val" if val else "data.train"
        preview = HeldOut(val or source, model, count, Ranks(), *views, policy, key)
    if ranks.is_main and probe.train and probe.val:
        train = open_named(probe.train, "probe.train", limits=data.limits)
        test = open_named(probe.val, "probe.val", limits=data.limits)
        warn_of_overlap(train, "probe.train", test, "probe.val")
        neighbours = Neighbours(train, test, model, normalize, data.bit_depth, size, probe)
    return Judges(
        schedule=schedule,
        held_out=held_out,
        neighbours=neighbours,
        preview=preview,
        validate_every=config.validation.every_epochs,
        probe_every=config.probe.every_epochs,
        draw_every=config.log.pictures_every_steps,
        health=Health(health.band, health.measured_on, config.model.norm_pix_loss, warmup, schedule.total_steps),
        is_given=config.model.init is not None,
    )


def lr_factor(rule: str, mask_ratio: float, predict_ratio: float) -> tuple[float, str]:
    """Return the factor of `optim.lr_rule` on the learning rate, and its arithmetic.

    "published": method specification, 1.9. "none" and "inverse" are alternatives in the published code.
    """
    if rule == "none":
        return 1.0, " (lr_rule none)"
    above, below, ratio = predict_ratio, mask_ratio, "predict / mask"
    if rule == "inverse":
        above, below, ratio = mask_ratio, predict_ratio, "mask / predict"
    return above / below, f" * {above:g} / {below:g} (lr_rule {rule}: {ratio} ratio)"


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Group trainable parameters by weight decay.

    Biases and norms (one-dimensional) have no decay. All other parameters are decayed, including `cls_token`,
    `mask_token` and `wfm.linear.weight`, as published.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
    ]
