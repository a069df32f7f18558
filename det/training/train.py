"""Training a detector: detectron2's trainer with a repeatable order, steps in parts, and atomic checkpoints."""

from __future__ import annotations

import json
import logging
import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

import detectron2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, get_detection_dataset_dicts
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, create_ddp_model, hooks
from detectron2.solver import build_lr_scheduler
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from PIL import Image
from timm.utils import ModelEmaV3
from torch import nn
from tqdm import tqdm

from crossmae.errors import UserError
from crossmae.files import ODD_BYTES, make_folder, read_json, sha256, write_json, write_text
from crossmae.training.signals import StopRequest
from crossmae.training.versions import versions
from det.backbone.weights import build_detector, load_weights
from det.config import leaf_keys, lookup
from det.data.coco import check_classes, check_registered
from det.data.loader import build_train_loader, refuse_unreadable
from det.evaluation.evaluate import evaluate
from det.evaluation.pictures import find_pictures
from det.evaluation.report import write_report
from det.evaluation.run_files import BEST, BEST_RECORD, CONFIG, LOG, METRICS, PICTURES, RECORD, TASKS
from det.training.checkpoint import AtomicCheckpointer
from det.training.optimizer import build_optimizer, resolve_schedule
from det.training.steps import StepTrainer

log = logging.getLogger(__name__)

LOGGED_CLASSES = 100
WRITING_PERIOD = 20
PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}
# What a run and its continuation must share: it decides the order of data, the model and the schedule.
_SHARED = ("SEED", "DATASETS.TRAIN", "DATALOADER.FILTER_EMPTY_ANNOTATIONS", "INPUT.", "MODEL.", "SOLVER.")
# What of it may differ: where and how long to train, and what only evaluation reads.
_FREE = (
    "MODEL.DEVICE",
    "MODEL.WEIGHTS",
    "MODEL.VIT.ACTIVATION_CHECKPOINTING",
    "MODEL.VIT.ATTENTION",
    "SOLVER.ACCUMULATE",
    "SOLVER.EPOCHS",
    "SOLVER.AMP.",
    "SOLVER.CHECKPOINT",
    "SOLVER.MAX_ITER",
)


def train(cfg: CfgNode, resume: bool = False) -> dict[str, dict[str, float]]:
    """Train and evaluate one detector.

    Where the weights come from: 1. with `resume`, the last checkpoint in `OUTPUT_DIR`; 2. `MODEL.WEIGHTS`; 3. random.

    Args:
        cfg: from `load_det_config`.
        resume: go on from the last checkpoint, if there is one.

    Returns:
        The results of the last evaluation, see `evaluate`.

    Raises:
        UserError: bad data, weights or settings, before anything is written; or a loss, a gradient or a weight that is
            not finite.
    """
    check_registered(cfg.DATASETS.TRAIN, "DATASETS.TRAIN")
    check_registered(cfg.DATASETS.TEST, "DATASETS.TEST")
    if not cfg.DATASETS.TRAIN:
        raise UserError("no training data: name it with --train-json and --train-images")
    if not cfg.DATASETS.TEST:
        log.info("no validation data (--val-json, or DATASETS.TEST without --train-json): no weights are the best")
    early = MemoryHandler(10_000)
    logging.getLogger().addHandler(early)
    try:
        trainer = Trainer(cfg, resume)
    finally:
        logging.getLogger().removeHandler(early)
    with log_file(Path(cfg.OUTPUT_DIR), early), StopRequest(patient=comm.get_world_size() > 1) as request:
        trainer.register_hooks([StopBetweenSteps(trainer.checkpointer, request)])
        trainer.train()
        if comm.is_main_process():
            log.info("report in %s", write_report(Path(cfg.OUTPUT_DIR)))
            if trainer.results:
                log.info("the numbers are those of the final weights; %s holds the best", BEST)
    return trainer.results


def evaluate_only(cfg: CfgNode) -> dict[str, dict[str, float]]:
    """Evaluate the detector in `MODEL.WEIGHTS` on `DATASETS.TEST`.

    Results of a training are not written over: if `OUTPUT_DIR` holds one, these go to `OUTPUT_DIR/evaluation`.

    Raises:
        UserError: no test data, or no whole detector in `MODEL.WEIGHTS`. Nothing is written then.
    """
    check_registered(cfg.DATASETS.TEST, "DATASETS.TEST")
    if not cfg.DATASETS.TEST:
        raise UserError("no data to evaluate on: name it with --val-json and --val-images")
    model = build_detector(cfg)
    load_weights(model, cfg, detector_only=True)
    if Path(cfg.OUTPUT_DIR, RECORD).is_file():
        cfg = cfg.clone()
        cfg.OUTPUT_DIR = str(Path(cfg.OUTPUT_DIR, "evaluation"))
        log.info("OUTPUT_DIR holds a training, so the evaluation goes to %s", cfg.OUTPUT_DIR)
    make_folder(Path(cfg.OUTPUT_DIR), "OUTPUT_DIR")
    with log_file(Path(cfg.OUTPUT_DIR)):
        results = evaluate(cfg, create_ddp_model(model, broadcast_buffers=False))
        if comm.is_main_process():
            log.info("report in %s", write_report(Path(cfg.OUTPUT_DIR)))
    return results


class Trainer(DefaultTrainer):
    """detectron2's default trainer, built in an order that writes nothing before everything has been checked.

    Random numbers of a step come from `SEED` and its number, and the data by plan, so that a resumed run repeats what
    an uninterrupted one would have done. `cfg` is the config with the schedule in steps, see `resolve_schedule`.
    """

    def __init__(self, cfg: CfgNode, resume: bool = False) -> None:
        TrainerBase.__init__(self)  # not DefaultTrainer's: that opens its log files first
        seed_all_rng(cfg.SEED)
        self.results: dict[str, dict[str, float]] = {}
        self.records = get_detection_dataset_dicts(cfg.DATASETS.TRAIN, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
        check_classes((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST), cfg.MODEL.ROI_HEADS.NUM_CLASSES)
        self.cfg = resolve_schedule(cfg, len(self.records))
        self.start_iter, self.max_iter = 0, self.cfg.SOLVER.MAX_ITER
        loader = self._loader(first=0)
        model = build_detector(self.cfg)
        self.checkpointer = AtomicCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        resume = self._find_checkpoint(resume)
        settings = shared_settings(cfg, len(self.records))
        if resume:
            check_continues(Path(cfg.OUTPUT_DIR), settings)
        else:
            load_weights(model, cfg)
        self._trainer = self._step_trainer(model, loader)
        self.scheduler = build_lr_scheduler(self.cfg, self._trainer.optimizer)
        self.register_hooks(self.build_hooks())
        if resume:
            path = self.checkpointer.get_checkpoint_file()
            self.checkpointer.load(path)
            self.start_iter = self.iter + 1  # the checkpoint holds the iteration that had just ended
            if self.start_iter > self.max_iter:
                raise UserError(f"--resume: {self.start_iter} steps are done already, this run has {self.max_iter}")
            self.data_loader = self._loader(first=self.start_iter)
            log.info("resuming after iteration %d from %s", self.start_iter, path)
        if comm.is_main_process():
            if not resume:  # what a run left that was cut off before its first checkpoint
                for name in (BEST, BEST_RECORD, METRICS):
                    Path(cfg.OUTPUT_DIR, name).unlink(missing_ok=True)
            record_run(cfg, settings, self.max_iter)
            self.register_hooks([hooks.PeriodicWriter(self.build_writers(), period=self._writing_period())])

    def _loader(self, first: int) -> Any:
        rank, world_size = comm.get_rank(), comm.get_world_size()
        return NamedFailures(build_train_loader(self.cfg, self.records, first, rank, world_size))

    def _step_trainer(self, model: nn.Module, loader: Any) -> StepTrainer:
        solver = self.cfg.SOLVER
        average = None
        if solver.EMA.ENABLED:
            average = ModelEmaV3(model, solver.EMA.DECAY, use_warmup=True, warmup_power=1)
            self.checkpointer.average = average.module
        precision = PRECISIONS[solver.AMP.PRECISION] if solver.AMP.ENABLED else None
        optimizer = build_optimizer(self.cfg, model)
        wrapped = create_ddp_model(model, broadcast_buffers=False)
        return StepTrainer(wrapped, loader, optimizer, self.cfg.SEED, solver.ACCUMULATE, precision, average)

    def _find_checkpoint(self, resume: bool) -> bool:
        """Whether to go on from a checkpoint; an error where a new run would overwrite an old one."""
        folder, found = Path(self.cfg.OUTPUT_DIR), self.checkpointer.has_checkpoint()
        if (found or (folder / RECORD).is_file()) and not resume:
            raise UserError(f"OUTPUT_DIR: {folder} already holds a run; pass --resume to go on, or name another folder")
        if resume and not found:
            log.info("--resume: no checkpoint in %s yet, starting from MODEL.WEIGHTS", folder)
        return found and bool(self.checkpointer.get_checkpoint_file())

    def build_hooks(self) -> list[HookBase]:
        """What happens between iterations; evaluation comes after the checkpoint, so that its failure loses nothing."""
        cfg = self.cfg
        steps: list[HookBase] = [hooks.IterationTimer(), hooks.LRScheduler()]
        if comm.is_main_process():
            kept = cfg.SOLVER.CHECKPOINTS_KEPT or None
            saver = hooks.PeriodicCheckpointer(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD, max_to_keep=kept)
            # Those of the run before a resume, so that they are not kept for ever.
            saver.recent_checkpoints = [str(path) for path in sorted(Path(cfg.OUTPUT_DIR).glob("model_[0-9]*.pth"))]
            steps += [ProgressBar(), saver]
        if cfg.DATASETS.TEST:
            steps.append(EvalHook(cfg.TEST.EVAL_PERIOD, self._evaluate))
        return steps

    def _evaluate(self) -> dict[str, dict[str, float]]:
        average = self._trainer.average
        done = min(self.iter + 1, self.max_iter)  # behind the last iteration, detectron2 counts one more
        self.results = evaluate(self.cfg, self.model if average is None else average.module)
        if comm.is_main_process():
            values = ", ".join(f"{TASKS[task]} AP {numbers['AP']:.1f}" for task, numbers in self.results.items())
            log.info("after %d steps: %s", done, values)
            keep_best(self.checkpointer, self.results, done)
            for number, path in enumerate(find_pictures(Path(self.cfg.OUTPUT_DIR, PICTURES)), start=1):
                self.storage.put_image(f"validation/{number}", np.asarray(Image.open(path)).transpose(2, 0, 1))
            if self.iter + 1 < self.max_iter:  # the last one is written when everything else is
                write_report(Path(self.cfg.OUTPUT_DIR))
        return {task: _without_many_classes(numbers) for task, numbers in self.results.items()}

    def _writing_period(self) -> int:
        """Iterations between writings of the log: as many as between evaluations, whose numbers replace each other."""
        period: int = self.cfg.TEST.EVAL_PERIOD if self.cfg.DATASETS.TEST else 0
        return min(period or WRITING_PERIOD, WRITING_PERIOD)

    def run_step(self) -> None:
        """Take one step; a loss or gradient that is not finite ends the run with one line."""
        if torch.cuda.is_available():
            self.storage.put_scalar("peak_memory_bytes", torch.cuda.max_memory_allocated(), smoothing_hint=False)
        try:
            super().run_step()
        except FloatingPointError as error:
            raise UserError(
                f"training diverged at iteration {self.iter}: {' '.join(str(error).split())} Lower SOLVER.BASE_LR "
                f"(it is {self.cfg.SOLVER.BASE_LR:g}) or raise SOLVER.WARMUP_ITERS ({self.cfg.SOLVER.WARMUP_ITERS}), "
                "and start anew in another OUTPUT_DIR"
            ) from error


def _without_many_classes(numbers: dict[str, float]) -> dict[str, float]:
    """What is logged at an evaluation: LVIS would fill TensorBoard with a curve for each of its 1,203 classes."""
    classes = [key for key in numbers if key.startswith("AP-")]
    return numbers if len(classes) <= LOGGED_CLASSES else {key: numbers[key] for key in numbers if key not in classes}


def keep_best(checkpointer: AtomicCheckpointer, results: dict[str, dict[str, float]], iteration: int) -> None:
    """Write `model_best.pth` where the AP of masks, or else of boxes, is the highest of the run so far.

    The record is read from `model_best.json`, so that it also stands after a run that was cut off.
    """
    task = "segm" if "segm" in results else "bbox"
    metric, found = f"{task}/AP", results[task]["AP"]
    path = Path(checkpointer.save_dir, BEST_RECORD)
    best = read_json(path).get(metric, -math.inf) if path.is_file() else -math.inf
    if not found > best:  # NaN is no record either
        return
    record = {"iteration": iteration, metric: found}
    checkpointer.write(BEST, {"model": checkpointer.weights()["model"]} | record)
    write_json(path, record)
    log.info("%s: %s %.2f after %d iterations", BEST, metric, found, iteration)


class StopBetweenSteps(HookBase):
    """After Ctrl-C or SIGTERM, save and end the run; `--resume` goes on from there.

    Args:
        checkpointer: of the run.
        request: where the signal is noted.
    """

    def __init__(self, checkpointer: AtomicCheckpointer, request: StopRequest) -> None:
        self.checkpointer, self.request = checkpointer, request

    def after_step(self) -> None:
        """Ask, in several processes only now and then, because all have to agree.

        Raises:
            KeyboardInterrupt: after Ctrl-C.
            SystemExit: after SIGTERM.
        """
        done = self.trainer.iter + 1
        if comm.get_world_size() > 1:
            if done % WRITING_PERIOD:
                return
            self.request.number = max(comm.all_gather(self.request.number or 0)) or None
        if self.request.number is None or done >= self.trainer.max_iter:
            return
        if comm.is_main_process():
            self.checkpointer.save(f"model_{self.trainer.iter:07d}", iteration=self.trainer.iter)
        log.info("stopped and saved after %d steps; the same command with --resume goes on from there", done)
        self.request.end()


class EvalHook(hooks.EvalHook):
    """detectron2's, but a training that fails in its last step is not evaluated."""

    def after_train(self) -> None:
        """Evaluate at the end, if it has been reached."""
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()


class ProgressBar(HookBase):
    """Iterations done, time left, loss and learning rate on one line."""

    def before_train(self) -> None:
        """Start the line."""
        start, total = self.trainer.start_iter, self.trainer.max_iter
        self.bar = tqdm(initial=start, total=total, desc="train", unit="it", dynamic_ncols=True)

    def after_step(self) -> None:
        """Advance it."""
        loss, lr = (self.trainer.storage.history(name).latest() for name in ("total_loss", "lr"))
        self.bar.set_postfix(loss=f"{loss:.3f}", lr=f"{lr:.1e}", refresh=False)
        self.bar.update()

    def after_train(self) -> None:
        """End it, also after a failure."""
        self.bar.close()


class NamedFailures:
    """A training loader that raises the message of an unreadable sample in the process that shows it."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            refuse_unreadable(batch)
            yield batch


def shared_settings(cfg: CfgNode, num_images: int) -> dict[str, Any]:
    """What a run and its continuation must share, by key, as JSON holds it.

    Args:
        cfg: of the run.
        num_images: that are trained on.
    """
    keys = [key for key in leaf_keys(cfg) if key.startswith(_SHARED) and not key.startswith(_FREE)]
    settings = {key: lookup(cfg, key) for key in keys if not key.endswith("_TEST")}
    files = {name: MetadataCatalog.get(name).get("json_file") for name in cfg.DATASETS.TRAIN}
    settings |= {f"SHA-256 of the json of {name}": sha256(Path(path)) for name, path in files.items() if path}
    settings["number of training images"] = num_images
    settings["processes x SOLVER.ACCUMULATE"] = comm.get_world_size() * cfg.SOLVER.ACCUMULATE
    decoded: dict[str, Any] = json.loads(json.dumps(settings))
    return decoded


def check_continues(folder: Path, settings: dict[str, Any]) -> None:
    """Compare the settings of a continuation with those that the run in `folder` recorded.

    Raises:
        UserError: names what differs, with both values; or the record is gone or damaged.
    """
    try:
        recorded = json.loads((folder / RECORD).read_text(encoding="utf-8"))["settings"]
        keys = recorded.keys() | settings.keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"--resume: {folder / RECORD} is missing or damaged, so that nothing tells whether this is the same run; "
            "start a new one from MODEL.WEIGHTS in another OUTPUT_DIR"
        ) from None
    changed = [
        f"{key} was {recorded.get(key)!r}, now {settings.get(key)!r}"
        for key in sorted(keys)
        if recorded.get(key) != settings.get(key)
    ]
    if changed:
        raise UserError(f"--resume: {folder} holds a run with other settings: {'; '.join(changed)}")


def record_run(cfg: CfgNode, settings: dict[str, Any], iterations: int) -> None:
    """Create `OUTPUT_DIR` with the config, and the classes, versions, data and shared settings of the run."""
    folder = Path(cfg.OUTPUT_DIR)
    make_folder(folder, "OUTPUT_DIR")
    write_text(folder / CONFIG, cfg.dump())
    sets = {name: MetadataCatalog.get(name) for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)}
    data = {name: {"json": meta.get("json_file"), "images": meta.get("image_root")} for name, meta in sets.items()}
    libraries = versions() | {"detectron2": detectron2.__version__, "processes": comm.get_world_size()}
    if torch.cuda.is_available():
        libraries["gpu"] = torch.cuda.get_device_name()
    names = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
    classes = {"classes": list(names.thing_classes), "category_ids": list(names.thing_dataset_id_to_contiguous_id)}
    run = {"iterations": iterations, "versions": libraries, "data": data, "settings": settings}
    write_json(folder / RECORD, classes | run)


@contextmanager
def log_file(folder: Path, early: MemoryHandler | None = None) -> Iterator[None]:
    """Inside, everything that is logged goes to `log.txt`, too, after what `early` has collected."""
    if not comm.is_main_process():
        yield
        return
    handler = logging.FileHandler(folder / LOG, encoding="utf-8", errors=ODD_BYTES)
    handler.setFormatter(logging.Formatter("[%(asctime)s] %(name)s %(levelname)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    if early is not None:
        early.setTarget(handler)
        early.flush()
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
