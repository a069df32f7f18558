"""Training and evaluation of a detector: detectron2's loop over `StepTrainer` and hooks, in a repeatable order."""

from __future__ import annotations

import logging
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import get_detection_dataset_dicts
from detectron2.engine import HookBase, create_ddp_model, default_writers, hooks
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from timm.utils import ModelEmaV3
from torch import nn

from crossmae.errors import UserError
from crossmae.files import make_folder, write_text
from crossmae.training.signals import StopRequest
from det.backbone.weights import build_detector, load_weights
from det.config import BEST, BEST_RECORD, CONFIG, METRICS, RECORD, SolverKeys, leaf_keys, lookup, read_keys
from det.data.coco import check_classes, check_registered
from det.data.copy_paste import build_copy_paste
from det.data.loader import KeyedSamples, NamingMapper, build_train_loader
from det.evaluation.evaluate import evaluate
from det.evaluation.report import write_report
from det.training.checkpoint import AtomicCheckpointer, find_checkpoint
from det.training.console import early_log, log_file
from det.training.hooks import EvaluationHook, ProgressBar, StopBetweenSteps
from det.training.optimizer import StepSchedule, build_scheduler, describe_schedule, parameter_groups, resolve_schedule
from det.training.record import check_continues, record_run, shared_settings
from det.training.steps import StepTrainer

log = logging.getLogger(__name__)

WRITING_PERIOD = 20  # steps between two rows of the log
PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}


def train(cfg: CfgNode, resume: bool = False) -> dict[str, dict[str, float]]:
    """Train and evaluate one detector.

    Weights come from 1. the last checkpoint in `OUTPUT_DIR`, with `resume`; 2. `MODEL.WEIGHTS`; 3. random numbers.
    The random numbers of a step come from `SEED` and its number, and its images from a plan, so that a resumed run
    equals an uninterrupted one.

    Args:
        cfg: from `load_det_config`.
        resume: continue from the last checkpoint, if there is one.

    Returns:
        The results of the last evaluation, see `evaluate`.

    Raises:
        UserError: bad data, weights or settings, before anything is written; or a loss, a gradient or a weight that is
            not finite.
    """
    check_data_sets(cfg.DATASETS.TRAIN, cfg.DATASETS.TEST)
    keys, folder = read_keys(cfg), Path(cfg.OUTPUT_DIR)
    solver, depth = keys.SOLVER, keys.MODEL.VIT.DEPTH
    with early_log() as early:  # nothing is written before everything has been checked
        seed_all_rng(cfg.SEED)
        records = get_detection_dataset_dicts(cfg.DATASETS.TRAIN, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
        check_classes((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST), cfg.MODEL.ROI_HEADS.NUM_CLASSES)
        schedule = resolve_schedule(solver, keys.TEST, len(records))
        log.info("%s", describe_schedule(schedule, solver, len(records), depth))
        copy_paste = build_copy_paste(keys.INPUT.COPY_PASTE.ENABLED, keys.INPUT.COPY_PASTE.PROB, cfg.MODEL.PIXEL_MEAN)
        batches = partial(
            build_train_loader,
            KeyedSamples(records, NamingMapper(cfg, True), cfg.SEED, copy_paste),
            solver.IMS_PER_BATCH,
            parts=solver.ACCUMULATE,
            workers=cfg.DATALOADER.NUM_WORKERS,
            rank=comm.get_rank(),
            world_size=comm.get_world_size(),
        )
        loader = batches(range(schedule.max_iter))
        model = build_detector(cfg)
        checkpoint = find_checkpoint(folder, resume)
        settings = shared_settings({key: lookup(cfg, key) for key in leaf_keys(cfg)}, len(records))
        if checkpoint is None:
            load_weights(model, cfg)
        else:
            check_continues(folder, settings)
        groups = parameter_groups(model, solver, schedule.base_lr, depth)
        adamw = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)(groups, lr=schedule.base_lr, betas=solver.BETAS)
        trainer = build_trainer(model, loader, adamw, solver, cfg.SEED)
        average = None if trainer.average is None else trainer.average.module
        checkpointer = AtomicCheckpointer(model, str(folder), average, trainer=weakref.proxy(trainer))
        evaluation = None
        if cfg.DATASETS.TEST:
            weights = trainer.model if average is None else average
            evaluation = EvaluationHook(schedule.eval_period, partial(evaluate, cfg, weights), checkpointer)
        trainer.register_hooks([
            hooks.IterationTimer(),
            hooks.LRScheduler(adamw, build_scheduler(adamw, solver, schedule)),
            *build_savers(checkpointer, schedule.checkpoint_period, solver.CHECKPOINTS_KEPT),
            evaluation,  # after the checkpoint, so that its failure loses nothing
        ])  # fmt: skip
        first = 0
        if checkpoint is not None:
            first = checkpointer.resume(checkpoint, schedule.max_iter)
            trainer.data_loader = batches(range(first, schedule.max_iter))
        if comm.is_main_process():
            start_folder(folder, cfg.dump(), fresh=checkpoint is None)
            record_run(folder, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST, settings, schedule.max_iter)
            # A row at every evaluation at least: the numbers of evaluations replace each other.
            period = min((evaluation and schedule.eval_period) or WRITING_PERIOD, WRITING_PERIOD)
            trainer.register_hooks([hooks.PeriodicWriter(default_writers(str(folder), schedule.max_iter), period)])
    with log_file(folder, early), StopRequest(patient=comm.get_world_size() > 1) as request:
        trainer.register_hooks([StopBetweenSteps(checkpointer, request)])
        run_steps(trainer, first, schedule)
        results = evaluation.results if evaluation else {}
        if comm.is_main_process():
            log.info("report in %s", write_report(folder))
            if results:
                log.info("the numbers are those of the final weights; %s holds the best", BEST)
    return results


def check_data_sets(train: tuple[str, ...], test: tuple[str, ...]) -> None:
    """Raise a `UserError` unless the data sets of a training exist."""
    check_registered(train, "DATASETS.TRAIN")
    check_registered(test, "DATASETS.TEST")
    if not train:
        raise UserError("no training data: name it with --train-json and --train-images")
    if not test:
        log.info("no validation data (--val-json, or DATASETS.TEST without --train-json): no weights are the best")


def build_trainer(
    model: nn.Module, loader: Any, optimizer: torch.optim.Optimizer, solver: SolverKeys, seed: int
) -> StepTrainer:
    """Build the trainer of single steps, as `SOLVER` says."""
    average = ModelEmaV3(model, solver.EMA.DECAY, use_warmup=True, warmup_power=1) if solver.EMA.ENABLED else None
    precision = PRECISIONS[solver.AMP.PRECISION] if solver.AMP.ENABLED else None
    wrapped = create_ddp_model(model, broadcast_buffers=False)
    return StepTrainer(wrapped, loader, optimizer, seed, solver.ACCUMULATE, precision, average)


def build_savers(checkpointer: AtomicCheckpointer, period: int, kept: int) -> list[HookBase]:
    """Build the progress bar and the periodic checkpoints of the first process."""
    if not comm.is_main_process():
        return []
    saver = hooks.PeriodicCheckpointer(checkpointer, period, max_to_keep=kept or None)
    # Checkpoints of the run before a resume count, so that they are not kept for ever.
    saver.recent_checkpoints = [str(path) for path in sorted(Path(checkpointer.save_dir).glob("model_[0-9]*.pth"))]
    return [ProgressBar(), saver]


def start_folder(folder: Path, config_text: str, *, fresh: bool) -> None:
    """Create the folder of a run with its config."""
    # A run that was cut off before its first checkpoint may have left records.
    for name in (BEST, BEST_RECORD, METRICS) if fresh else ():
        (folder / name).unlink(missing_ok=True)
    make_folder(folder, "OUTPUT_DIR")
    write_text(folder / CONFIG, config_text)


def run_steps(trainer: StepTrainer, first: int, schedule: StepSchedule) -> None:
    """Train from step `first` to the end.

    Raises:
        UserError: a loss or a gradient is not finite.
    """
    try:
        trainer.train(first, schedule.max_iter)
    except FloatingPointError as error:
        raise UserError(
            f"training diverged at iteration {trainer.iter}: {' '.join(str(error).split())} Lower SOLVER.BASE_LR (it "
            f"is {schedule.base_lr:g}) or raise SOLVER.WARMUP_ITERS ({schedule.warmup_iters}), and start again in "
            "another OUTPUT_DIR."
        ) from error


def evaluate_only(cfg: CfgNode) -> dict[str, dict[str, float]]:
    """Evaluate the detector in `MODEL.WEIGHTS` on `DATASETS.TEST`.

    Results of a training are not replaced: if `OUTPUT_DIR` holds a training, these go to `OUTPUT_DIR/evaluation`.

    Raises:
        UserError: no test data, or no whole detector in `MODEL.WEIGHTS`. Nothing is written then.
    """
    check_registered(cfg.DATASETS.TEST, "DATASETS.TEST")
    if not cfg.DATASETS.TEST:
        raise UserError("no data to evaluate on: name it with --val-json and --val-images")
    model = build_detector(cfg)
    load_weights(model, cfg, detector_only=True)
    folder = Path(cfg.OUTPUT_DIR)
    if (folder / RECORD).is_file():
        cfg, folder = cfg.clone(), folder / "evaluation"
        cfg.OUTPUT_DIR = str(folder)
        log.info("OUTPUT_DIR holds a training, so the evaluation goes to %s", folder)
    make_folder(folder, "OUTPUT_DIR")
    with log_file(folder):
        results = evaluate(cfg, create_ddp_model(model, broadcast_buffers=False))
        if comm.is_main_process():
            log.info("report in %s", write_report(folder))
    return results
