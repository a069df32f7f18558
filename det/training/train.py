"""Training and evaluation of a detector. `crossmae.training.loop` runs the steps, as for every trainer."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng

from crossmae.checkpoints.metadata import safetensors_metadata
from crossmae.checkpoints.provenance import inherited, recorded_inheritance
from crossmae.checkpoints.run_checkpoint import MODEL
from crossmae.files import check_writable, make_folder
from crossmae.training import loop
from crossmae.training.config import RunSettings
from crossmae.training.devices import open_device
from crossmae.training.processes import Ranks, find_ranks, process_group
from crossmae.training.resume import is_complete, shorten_schedule
from det.backbone.record import describe_shrunk, detector_metadata, size_metadata, training_metadata
from det.backbone.weights import build_detector, build_trained, find_detector, load_weights
from det.classes import Classes, classes_of, pair_categories, registered_classes, remember_classes, without_spare
from det.config import FINAL, RECORD, flatten, read_keys
from det.data.coco import check_classes, check_registered, read_registered
from det.data.loader import (
    WORKERS_KEY,
    NamingMapper,
    build_train_loader,
    check_objects_left,
    training_records,
    training_samples,
)
from det.evaluation.evaluate import evaluate
from det.evaluation.report import write_report
from det.evaluation.run_files import describe_images
from det.inference.precision import check_precision
from det.library_warnings import library_warnings_ignored
from det.training.checkpoint import data_names, find_checkpoint, record_run, shared_settings, write_final
from det.training.console import log_file
from det.training.evaluations import Evaluations, Results
from det.training.optimizer import describe_schedule, parameter_groups, resolve_schedule
from det.training.steps import DetectorLoss, in_parts

log = logging.getLogger(__name__)


@library_warnings_ignored()
def train(cfg: CfgNode, resume: bool = False) -> Results:
    """Train and evaluate one detector.

    The weights come from 1. the last checkpoint in `OUTPUT_DIR`, with `resume`; 2. `MODEL.WEIGHTS`; or 3. random
    numbers. A resumed run equals an uninterrupted run. For several processes, see `crossmae.training.loop.train`.
    Returns the results of the last evaluation, see `evaluate`.

    Raises:
        UserError: data, weights or settings are wrong (nothing has been written then); or a loss, a gradient or a
            weight is not finite.
    """
    check_precision(cfg.TEST.PRECISION, torch.device(cfg.MODEL.DEVICE))
    check_registered(cfg.DATASETS.TRAIN, "DATASETS.TRAIN", "training data")
    check_registered(cfg.DATASETS.TEST, "DATASETS.TEST")
    if not cfg.DATASETS.TEST:
        log.info("no validation data, so no weights are the best. Name them with --val-json.")
    with log_file(Path(cfg.OUTPUT_DIR), find_ranks().is_main) as start_file:  # nothing is written before all checks
        job = loop.train(run_settings(cfg), lambda ranks, device, _: build_job(cfg, resume, start_file, ranks, device))
    return cast(Evaluations, job.callbacks).results


def run_settings(cfg: CfgNode) -> RunSettings:
    """Return the settings that do not depend on the task."""
    solver = read_keys(cfg).SOLVER
    return RunSettings(
        folder=Path(cfg.OUTPUT_DIR),
        folder_key="OUTPUT_DIR",
        device=cfg.MODEL.DEVICE,
        device_key="MODEL.DEVICE",
        precision=solver.AMP.PRECISION if solver.AMP.ENABLED else "fp32",
        precision_key="SOLVER.AMP.PRECISION",
        lr_key="SOLVER.BASE_LR",
        workers_key=WORKERS_KEY,
        settings=json.loads(json.dumps(cfg)),
        config_text=cfg.dump(),
        against_divergence=f"Lower SOLVER.BASE_LR (now {solver.BASE_LR:g}) or raise SOLVER.WARMUP_ITERS (now "
        f"{solver.WARMUP_ITERS}), and start again in another OUTPUT_DIR.",
        against_full_memory="Double SOLVER.ACCUMULATE, or set MODEL.VIT.ACTIVATION_CHECKPOINTING=True.",
        ema=solver.EMA.DECAY if solver.EMA.ENABLED else None,
        keep=solver.CHECKPOINTS_KEPT,
        timeout_minutes=cfg.TIMEOUT_MINUTES,
        wandb=cfg.WANDB or None,
        wandb_key="WANDB",
    )


def build_job(
    cfg: CfgNode, resume: bool, start_file: Callable[[], None], ranks: Ranks, device: torch.device
) -> loop.Job:
    """Build and check model, data and schedule, without writing files."""
    keys, folder = read_keys(cfg), Path(cfg.OUTPUT_DIR)
    solver, depth = keys.SOLVER, keys.MODEL.VIT.DEPTH
    check_writable(folder, "OUTPUT_DIR")
    seed_all_rng(cfg.SEED)
    # The training images, and the schedule that follows from their number.
    records, listed = training_records(cfg)
    if len(records) < listed:
        log.info("training images: %s", describe_images(len(records), listed))
    check_objects_left(records, NamingMapper(cfg, True))
    samples = training_samples(cfg, records)
    check_classes(cfg.DATASETS.TRAIN, cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    classes = registered_classes(cfg.DATASETS.TRAIN[0])
    check_evaluated(classes, cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.DATASETS.TEST)
    start = find_checkpoint(folder, resume)
    schedule = resolve_schedule(solver, keys.TEST, len(samples), ranks.world_size)
    schedule = shorten_schedule(schedule, start, solver.SHORTEN_TO or None, "SOLVER.SHORTEN_TO")
    log.info("%s", describe_schedule(schedule, solver, len(samples), depth))
    open_loader = partial(
        build_train_loader,
        samples,
        solver.IMS_PER_BATCH,
        parts=solver.ACCUMULATE,
        workers=cfg.DATALOADER.NUM_WORKERS,
        rank=ranks.rank,
        world_size=ranks.world_size,
        pin_memory=device.type == "cuda",
    )
    open_loader(range(0))  # the sizes are checked now
    # The initial weights: a checkpoint of this run, given weights, or random weights.
    model = build_detector(cfg)
    remember_classes(model, classes)
    settings = shared_settings(dict(flatten(cfg)), len(samples), ranks.world_size)
    fingerprint = {key: json.dumps(value) for key, value in settings.items()}
    complete = is_complete(start, schedule.last_step, fingerprint, FINAL, "OUTPUT_DIR")
    loaded = None if start else load_weights(model, cfg)
    origin = recorded_inheritance(start / MODEL) if start else inherited()
    if loaded:
        origin = inherited(loaded.licence, loaded.assumed, Path(cfg.MODEL.WEIGHTS).name)
    values, data = dict(flatten(cfg)), data_names(cfg.DATASETS.TRAIN, cfg.DATASETS.TEST)
    metadata = origin | detector_metadata(values, classes) | training_metadata(values, data, len(samples))
    metadata |= size_metadata([(one["height"], one["width"]) for one in records if "height" in one and "width" in one])
    # The optimizer, and the evaluations.
    groups = parameter_groups(model, solver, depth)
    # detectron2 clips in the optimizer's step. With a loss scaler, a fused step would clip scaled gradients.
    fused = not (solver.AMP.ENABLED and solver.AMP.PRECISION == "fp16")
    adamw_class = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)
    adamw = adamw_class(groups, lr=schedule.peak_lr, betas=solver.BETAS, fused=fused)
    loss = DetectorLoss(
        cfg.SEED,
        solver.ACCUMULATE,
        ranks.rank,
        is_logged=lambda steps: steps % RunSettings.log_every == 0 or schedule.saves_after(steps),
    )

    def start_run() -> None:
        start_file()
        record_run(
            folder, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST, settings, schedule.last_step, listed, ranks.world_size
        )

    return loop.Job(
        word="train",
        kind="detection",
        model=model,
        optimizer=adamw,
        open_batches=in_parts(open_loader, solver.ACCUMULATE),
        name_images=part_names,
        watch_broken=lambda folder, resumed: ignore_batch,
        loss=loss,
        schedule=schedule,
        saves_after=schedule.saves_after,
        fingerprint=fingerprint,
        start=start,
        is_complete=complete,
        metadata=lambda step: metadata,
        announce=lambda step: None,
        callbacks=Evaluations(
            folder=folder,
            evaluate=partial(evaluate, cfg) if cfg.DATASETS.TEST else None,
            period=schedule.eval_period,
            last_step=schedule.last_step,
            start_run=start_run,
            metadata=lambda step: metadata,
            loss=loss,
        ),
        finals=(FINAL,),
        write_finals=partial(write_final, folder, solver.EMA.ENABLED, metadata),
    )


def part_names(part: list[Any]) -> Callable[[], list[str]]:
    """Return a function that names the images of a part."""
    names = [str(sample["file_name"]) for sample in part]
    return lambda: names


def ignore_batch(_: Any) -> None:
    """Watch no broken images: they end the run."""


def check_evaluated(classes: Classes | None, number: int, names: Sequence[str]) -> None:
    """Reject data sets with classes that the detector does not have."""
    for name in names:
        if (registered := registered_classes(name)) is not None:
            metadata = MetadataCatalog.get(name)
            where, counts = str(metadata.get("json_file", name)), metadata.get("class_image_count", [])
            empty = {row["id"] for row in counts if not row["image_count"]}
            pair_categories(classes, number, without_spare(registered, classes, empty, where).names, where)


def warn_of_shrunk(weights: Path, name: str, shortest: int, longest: int) -> None:
    """Warn of test images that are shrunk more than training images."""
    entries = read_registered(name)[0]["images"]
    entries = [one for one in entries if {"file_name", "height", "width"} <= one.keys()]
    sizes = {str(one["file_name"]): (one["height"], one["width"]) for one in entries}
    metadata = safetensors_metadata(find_detector(weights))
    if line := describe_shrunk(metadata, sizes, shortest, longest):
        log.warning("%s", line)


@library_warnings_ignored()
def evaluate_only(cfg: CfgNode) -> Results:
    """Evaluate the detector in `MODEL.WEIGHTS` on `DATASETS.TEST`.

    If `OUTPUT_DIR` has a training run, the results are written to `OUTPUT_DIR/evaluation`. Raises UserError, and writes
    nothing, if there are no test data or the weights are not a whole detector.
    """
    check_registered(cfg.DATASETS.TEST, "DATASETS.TEST", "data to evaluate on")
    cfg, ranks = cfg.clone(), find_ranks()
    device = open_device(cfg.MODEL.DEVICE, "MODEL.DEVICE", ranks.local_rank, ranks.world_size)
    check_precision(cfg.TEST.PRECISION, device)
    with process_group(ranks, device, cfg.TIMEOUT_MINUTES):
        model = build_trained(cfg)
        check_evaluated(classes_of(model), cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.DATASETS.TEST)
        folder = Path(cfg.OUTPUT_DIR)
        if (folder / RECORD).is_file():
            folder = folder / "evaluation"
            cfg.OUTPUT_DIR = str(folder)
            log.info("OUTPUT_DIR has a training run, so the evaluation goes to %s", folder)
        make_folder(folder, "OUTPUT_DIR")
        with log_file(folder, ranks.is_main) as start_file:
            start_file()
            results = evaluate(cfg, model)
            if comm.is_main_process():
                inputs = cfg.INPUT
                warn_of_shrunk(
                    Path(cfg.MODEL.WEIGHTS), cfg.DATASETS.TEST[0], inputs.MIN_SIZE_TEST, inputs.MAX_SIZE_TEST
                )
                log.info("report in %s", write_report(folder))
    return results
