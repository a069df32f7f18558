"""Training and evaluation of a detector: detectron2's loop with `StepTrainer` and hooks, in a repeatable order."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, get_detection_dataset_dicts
from detectron2.engine import HookBase, create_ddp_model, default_writers, hooks
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from timm.utils import ModelEmaV3

from crossmae.checkpoints.provenance import inherited
from crossmae.errors import UserError
from crossmae.files import make_folder, write_text
from crossmae.training.signals import StopRequest
from det.backbone.weights import build_detector, build_trained, load_weights
from det.classes import Classes, classes_of, pair_categories, remember_classes, without_spare
from det.config import BEST, BEST_RECORD, CONFIG, METRICS, RECORD, flatten, read_keys
from det.data.coco import check_classes, check_registered, registered_classes
from det.data.loader import NamingMapper, build_train_loader, check_objects_left, training_samples
from det.evaluation.evaluate import evaluate
from det.evaluation.report import write_report
from det.library_warnings import library_warnings_ignored
from det.training.checkpoint import AtomicCheckpointer, check_continues, find_checkpoint, record_run, shared_settings
from det.training.console import early_log, log_file
from det.training.hooks import EvaluationHook, ProgressBar, StopBetweenSteps
from det.training.optimizer import StepSchedule, build_scheduler, describe_schedule, parameter_groups, resolve_schedule
from det.training.steps import StepTrainer

log = logging.getLogger(__name__)

WRITING_PERIOD = 20  # steps between two log entries
PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}


@library_warnings_ignored()
def train(cfg: CfgNode, resume: bool = False) -> dict[str, dict[str, float]]:
    """Train and evaluate one detector.

    The weights come from 1. the last checkpoint in `OUTPUT_DIR`, with `resume`; 2. `MODEL.WEIGHTS`; or 3. random
    numbers. A resumed run equals an uninterrupted run. Returns the results of the last evaluation, see `evaluate`.

    Raises:
        UserError: data, weights or settings are wrong (nothing has been written then); or a loss, a gradient or a
            weight is not finite.
    """
    check_registered(cfg.DATASETS.TRAIN, "DATASETS.TRAIN", "training data")
    check_registered(cfg.DATASETS.TEST, "DATASETS.TEST")
    if not cfg.DATASETS.TEST:
        log.info("no validation data, so no weights are the best. Name them with --val-json.")
    keys, folder = read_keys(cfg), Path(cfg.OUTPUT_DIR)
    solver, depth = keys.SOLVER, keys.MODEL.VIT.DEPTH
    with early_log() as early:  # nothing is written before all checks have passed
        seed_all_rng(cfg.SEED)
        records = get_detection_dataset_dicts(cfg.DATASETS.TRAIN, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
        check_objects_left(records, NamingMapper(cfg, True))
        samples = training_samples(cfg, records)
        check_classes(cfg.DATASETS.TRAIN, cfg.MODEL.ROI_HEADS.NUM_CLASSES)
        classes = registered_classes(cfg.DATASETS.TRAIN[0])
        check_evaluated(classes, cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.DATASETS.TEST)
        schedule = resolve_schedule(solver, keys.TEST, len(samples))
        log.info("%s", describe_schedule(schedule, solver, len(samples), depth))
        batches = partial(
            build_train_loader,
            samples,
            solver.IMS_PER_BATCH,
            parts=solver.ACCUMULATE,
            workers=cfg.DATALOADER.NUM_WORKERS,
            rank=comm.get_rank(),
            world_size=comm.get_world_size(),
        )
        loader = batches(range(schedule.max_iter))
        model = build_detector(cfg)
        remember_classes(model, classes)
        checkpoint = find_checkpoint(folder, resume)
        settings = shared_settings(dict(flatten(cfg)), len(samples))
        loaded = None
        if checkpoint is None:
            loaded = load_weights(model, cfg)
        else:
            check_continues(folder, settings)
        groups = parameter_groups(model, solver, schedule.base_lr, depth)
        adamw = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)(groups, lr=schedule.base_lr, betas=solver.BETAS)
        average = ModelEmaV3(model, solver.EMA.DECAY, use_warmup=True, warmup_power=1) if solver.EMA.ENABLED else None
        precision = PRECISIONS[solver.AMP.PRECISION] if solver.AMP.ENABLED else None
        wrapped = create_ddp_model(model, broadcast_buffers=False)
        trainer = StepTrainer(wrapped, loader, adamw, cfg.SEED, solver.ACCUMULATE, precision, average)
        averaged = average.module if average else None
        checkpointer = AtomicCheckpointer(model, str(folder), averaged, trainer=weakref.proxy(trainer))
        checkpointer.metadata = inherited(None, loaded.assumed) if loaded else {}
        evaluation = None
        if cfg.DATASETS.TEST:
            evaluated = partial(evaluate, cfg, averaged or wrapped)
            evaluation = EvaluationHook(schedule.eval_period, evaluated, checkpointer)
        trainer.register_hooks([
            hooks.IterationTimer(),
            hooks.LRScheduler(adamw, build_scheduler(adamw, solver, schedule)),
            *build_savers(checkpointer, schedule.checkpoint_period, solver.CHECKPOINTS_KEPT),
            evaluation,  # after the checkpoint, so that a failed evaluation loses no training
        ])  # fmt: skip
        first = 0
        if checkpoint is not None:
            first = checkpointer.resume(checkpoint, schedule.max_iter)
            trainer.data_loader = batches(range(first, schedule.max_iter))
        if comm.is_main_process():
            if checkpoint is None:  # a run that was interrupted before its first checkpoint may have left records
                for name in (BEST, BEST_RECORD, METRICS):
                    (folder / name).unlink(missing_ok=True)
            make_folder(folder, "OUTPUT_DIR")
            write_text(folder / CONFIG, cfg.dump())
            record_run(folder, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST, settings, schedule.max_iter)
            # At least one row per evaluation. Otherwise a later evaluation would replace an earlier one.
            period = min((evaluation and schedule.eval_period) or WRITING_PERIOD, WRITING_PERIOD)
            trainer.register_hooks([hooks.PeriodicWriter(default_writers(str(folder), schedule.max_iter), period)])
    with log_file(folder, early), StopRequest(patient=comm.get_world_size() > 1) as request:
        trainer.register_hooks([StopBetweenSteps(checkpointer, request)])
        run_steps(trainer, first, schedule)
        results = evaluation.results if evaluation else {}
        if comm.is_main_process():
            log.info("report in %s", write_report(folder))
            if results and (folder / BEST).is_file():
                log.info("these are the results of the final weights. The best weights are in %s", BEST)
    return results


def check_evaluated(classes: Classes | None, number: int, names: Sequence[str]) -> None:
    """Reject data sets with classes that the detector does not have."""
    for name in names:
        if (registered := registered_classes(name)) is not None:
            metadata = MetadataCatalog.get(name)
            where, counts = str(metadata.get("json_file", name)), metadata.get("class_image_count", [])
            empty = {row["id"] for row in counts if not row["image_count"]}
            pair_categories(classes, number, without_spare(registered, classes, empty, where).names, where)


def build_savers(checkpointer: AtomicCheckpointer, period: int, kept: int) -> list[HookBase]:
    """Build the first process's progress bar and periodic checkpoints."""
    if not comm.is_main_process():
        return []
    saver = hooks.PeriodicCheckpointer(checkpointer, period, max_to_keep=kept or None)
    # Count checkpoints from before a resume. Otherwise they would be kept for ever.
    saver.recent_checkpoints = [str(path) for path in sorted(Path(checkpointer.save_dir).glob("model_[0-9]*.pth"))]
    return [ProgressBar(), saver]


def run_steps(trainer: StepTrainer, first: int, schedule: StepSchedule) -> None:
    """Train from step `first`. Explain a divergence in the error."""
    try:
        trainer.train(first, schedule.max_iter)
    except FloatingPointError as error:
        raise UserError(
            f"training diverged at iteration {trainer.iter}: {' '.join(str(error).split())} Lower SOLVER.BASE_LR (now "
            f"{schedule.base_lr:g}) or raise SOLVER.WARMUP_ITERS (now {schedule.warmup_iters}), and start again in "
            "another OUTPUT_DIR."
        ) from error


@library_warnings_ignored()
def evaluate_only(cfg: CfgNode) -> dict[str, dict[str, float]]:
    """Evaluate the detector in `MODEL.WEIGHTS` on `DATASETS.TEST`.

    If `OUTPUT_DIR` has a training run, the results are written to `OUTPUT_DIR/evaluation`. Raises UserError, and writes
    nothing, if there are no test data or the weights are not a whole detector.
    """
    check_registered(cfg.DATASETS.TEST, "DATASETS.TEST", "data to evaluate on")
    cfg = cfg.clone()
    model = build_trained(cfg)
    check_evaluated(classes_of(model), cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.DATASETS.TEST)
    folder = Path(cfg.OUTPUT_DIR)
    if (folder / RECORD).is_file():
        cfg, folder = cfg.clone(), folder / "evaluation"
        cfg.OUTPUT_DIR = str(folder)
        log.info("OUTPUT_DIR has a training run, so the evaluation goes to %s", folder)
    make_folder(folder, "OUTPUT_DIR")
    with log_file(folder):
        results = evaluate(cfg, create_ddp_model(model, broadcast_buffers=False))
        if comm.is_main_process():
            log.info("report in %s", write_report(folder))
    return results
