"""Pretraining: what `crossmae.training.loop` does not know about it."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import crossmae
from crossmae.checkpoints.metadata import FORMAT, MODEL_ARGUMENTS, PIXEL_MEAN, PIXEL_STD, STEP, VERSION
from crossmae.checkpoints.pretrained import BIT_DEPTH
from crossmae.checkpoints.provenance import inherited, recorded_licence
from crossmae.checkpoints.run_checkpoint import MODEL, step_of
from crossmae.data.batches import build_loader
from crossmae.data.broken import warn_of_depth
from crossmae.data.pixels import Normalize
from crossmae.data.sources import Source, open_named, warn_of_overlap
from crossmae.errors import UserError
from crossmae.files import check_writable
from crossmae.models.crossmae import CrossMAE
from crossmae.models.sizes import model_arguments
from crossmae.pretraining.figures import fused_map_names, fusion_figure, reconstruction_figure
from crossmae.pretraining.health import Health
from crossmae.pretraining.images import PretrainImages, collate_pretraining
from crossmae.pretraining.start import build_model, start_from
from crossmae.pretraining.validation import HeldOut, Neighbours, model_size
from crossmae.training.config import PretrainConfig
from crossmae.training.log import RunLog
from crossmae.training.loop import Ready, Task, check_images, plan_batches, train
from crossmae.training.optimizer import parameter_groups
from crossmae.training.processes import Ranks
from crossmae.training.schedule import Plan, announce, make_plan
from crossmae.training.start import check_settings, find_start
from crossmae.training.state import Run

log = logging.getLogger(__name__)


def pretrain(config: PretrainConfig, resume: bool = False) -> Path:
    """Train one model as the config says; returns the file of its final weights.

    Reads every key of `PretrainConfig`. Where the weights come from: see `crossmae.pretraining.start`.
    In several processes: see `crossmae.training.loop.train`.

    Raises:
        UserError: bad data, a folder in use by another run, an impossible combination of settings, a loss that is not
            finite.
    """
    return train(lambda *where: Pretraining(config, *where), config, resume)


class Pretraining(Task[PretrainConfig]):
    """Reconstruction of masked patches."""

    word = "pretrain"

    def prepare(self, resume: bool) -> Ready:
        """See `Task.prepare`."""
        config, ranks = self.config, self.ranks
        check_writable(config.output_dir, "output_dir")
        model = build_model(config)
        source = open_named(config.data.train, "data.train", config.data.root)
        if ranks.is_main:
            warn_of_depth(source, config.data.bit_depth)
        data = config.data
        batches = plan_batches(config, source, ranks)
        plan = make_plan(config, batches, self.device, self.precision)
        start = find_start(config.output_dir, resume)
        is_complete = start is not None and step_of(start) >= plan.last_step
        if start and not is_complete:
            check_settings(start, config, plan)
        self.licence = recorded_licence(start / MODEL) if start else None
        if config.model.init and not start:
            arguments = model_arguments(config.model.name) | config.model.arguments()
            self.licence = start_from(model, config.model.init.expanduser(), arguments, data).licence
        self.normalize = Normalize(data.mean, data.std, self.device)
        self.judges = Judges(config, model, source, ranks, self.normalize)
        broken = check_images(config, source, model.in_chans, ranks) if data.check and not is_complete else []
        return Ready(model, source, batches, plan, start, broken)

    def announce(self, ready: Ready, step: int) -> None:
        """See `Task.announce`."""
        announce(self.config, ready.plan, cast(CrossMAE, ready.model), step, ready.source.groups is not None)

    def optimizer(self, model: nn.Module, plan: Plan) -> torch.optim.Optimizer:
        """AdamW; biases and norms without decay."""
        optim = self.config.optim
        groups = parameter_groups(model, optim.weight_decay)
        return torch.optim.AdamW(groups, lr=plan.peak_lr, betas=optim.betas, fused=True)

    def loader(self, ready: Ready, first: int, last: int) -> Iterator[Any]:
        """See `Task.loader`."""
        dataset = build_dataset(self.config, ready.source, cast(CrossMAE, ready.model))
        on_gpu = self.device.type == "cuda"
        return iter(
            build_loader(dataset, ready.batches, first, last, self.config.data.workers, on_gpu, collate_pretraining)
        )

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Of the predicted patches."""
        batch = batch.to(self.device)
        imgs, settings = self.normalize(batch.images), self.config.model
        loss: Tensor = model(imgs, settings.mask_ratio, settings.predict_ratio, batch.noise).loss
        return loss

    def metadata(self, step: int) -> dict[str, str]:
        """See `Task.metadata`."""
        return weight_metadata(self.config, step) | inherited(self.licence)

    def begin(self, run: Run, records: RunLog) -> None:
        """Measure and draw what there is to be better than."""
        self.health = build_health(run, self.config, records)
        if run.step == 0:
            self.judges.judge(run, records, validate=True, probe=True)
            self.judges.draw(run, records)

    def logged(self, run: Run, records: RunLog, loss: float) -> None:
        """Warn where the loss is not as it should be."""
        for warning in self.health.warnings(run.step / run.plan.total_steps, loss) if run.ranks.is_main else ():
            log.warning(warning)

    def look(self, run: Run, records: RunLog) -> None:
        """See `Task.look`."""
        config, plan, step = self.config, run.plan, run.step
        self.judges.judge(
            run,
            records,
            validate=plan.ends_period(step, config.validation.every_epochs),
            probe=plan.ends_period(step, config.probe.every_epochs),
        )
        if step == plan.last_step or step % config.log.pictures_every_steps == 0:
            self.judges.draw(run, records)


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


class Judges:
    """What a run is looked at with from outside: held-out loss, pictures, neighbours."""

    def __init__(
        self, config: PretrainConfig, model: CrossMAE, source: Source, ranks: Ranks, normalize: Normalize
    ) -> None:
        self.config, data, size = config, config.data, config.optim.batch_size
        val = open_named(data.val, "data.val", data.val_root) if data.val else None
        if val and ranks.is_main:
            warn_of_overlap(source, "data.train", val, "data.val")
        views = (config.model.mask_ratio, normalize, data.bit_depth, size)
        self.held_out = HeldOut(val, model, config.validation.images, ranks, *views) if val else None
        self.preview = None
        if ranks.is_main and config.log.pictures:
            policy = "error" if val else config.data.broken
            self.preview = HeldOut(val or source, model, config.log.pictures, Ranks(), *views, policy)
        self.neighbours, probe = None, config.probe
        if probe.train and probe.val and ranks.is_main:
            train, test = open_named(probe.train, "probe.train"), open_named(probe.val, "probe.val")
            warn_of_overlap(train, "probe.train", test, "probe.val")
            settings = (probe.images, probe.k, probe.temperature, probe.pool)
            self.neighbours = Neighbours(train, test, model, normalize, data.bit_depth, size, *settings)

    def judge(self, run: Run, records: RunLog, validate: bool, probe: bool) -> None:
        """Measure the held-out loss and the neighbours' accuracy, of the averaged weights as well, and log both."""
        values: dict[str, float] = {}
        for suffix, model in cast(dict[str, CrossMAE], run.models).items():
            if validate and self.held_out:
                values[f"val_loss{suffix}"] = self.held_out.loss(model, run.autocast)
            if probe and self.neighbours:
                values[f"knn_accuracy{suffix}"] = self.neighbours.accuracy(model)
        if not all(map(math.isfinite, values.values())):
            raise UserError(f"at step {run.step} the held-out loss is not finite; the last checkpoint stays")
        if values:
            records.record(run.step, values)
            records.announce(run.step, values)

    def draw(self, run: Run, records: RunLog) -> None:
        """Pictures of reconstructions and of the fusion weights."""
        model, config = cast(CrossMAE, run.model), self.config
        if self.preview is not None:
            panels = self.preview.panels(model)
            title = f"step {run.step}, {config.model.mask_ratio:.0%} of the patches masked"
            records.picture(run.step, "reconstructions", reconstruction_figure(panels, title))
        if run.ranks.is_main and model.fused_blocks and config.log.pictures:
            names = fused_map_names(model)
            weights = model.wfm.linear.weight.detach().float().cpu()
            records.picture(run.step, "fusion", fusion_figure(weights, names, f"fusion weights at step {run.step}"))


def build_health(run: Run, config: PretrainConfig, records: RunLog) -> Health:
    """The watch over the loss; a resumed run knows its first loss, one from given weights has not far to fall."""
    plan = run.plan
    first = next((float(row["loss"]) for row in records.rows if "loss" in row), None)
    if config.model.init:
        first = math.inf
    warmup = plan.warmup_steps / plan.total_steps
    return Health(config.health.band, config.health.measured_on, config.model.norm_pix_loss, warmup, first)


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
