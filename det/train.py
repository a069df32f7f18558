"""Training a detector: detectron2's trainer with AdamW and layer decay, a repeatable order, and atomic checkpoints."""

from __future__ import annotations

import json
import logging
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import detectron2
import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, get_detection_dataset_dicts
from detectron2.engine import AMPTrainer, DefaultTrainer, HookBase, SimpleTrainer, TrainerBase, create_ddp_model, hooks
from detectron2.layers.batch_norm import LayerNorm as ChannelFirstLayerNorm
from detectron2.modeling import build_model
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.solver import build_lr_scheduler
from detectron2.solver.build import maybe_add_gradient_clipping, reduce_param_groups
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from torch import nn
from tqdm import tqdm

from crossmae.errors import UserError
from crossmae.files import make_folder, sha256, write_atomically, write_json, write_text
from crossmae.versions import versions
from det.coco import check_registered
from det.config import leaf_keys, lookup
from det.data import build_train_loader, refuse_unreadable
from det.evaluate import evaluate
from det.weights import load_weights

log = logging.getLogger(__name__)

LOG, CONFIG, RECORD = "log.txt", "config.yaml", "run.json"
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, ChannelFirstLayerNorm)
# What a run and its continuation must share: it decides the order of data, the model and the schedule.
_SHARED = ("SEED", "DATASETS.TRAIN", "DATALOADER.FILTER_EMPTY_ANNOTATIONS", "INPUT.", "MODEL.", "SOLVER.")
# What of it may differ: where and how long to train, and what only evaluation reads.
_FREE = ("MODEL.DEVICE", "MODEL.WEIGHTS", "SOLVER.AMP.", "SOLVER.CHECKPOINT_PERIOD", "SOLVER.MAX_ITER")


def train(cfg: CfgNode, resume: bool = False) -> dict[str, dict[str, float]]:
    """Train and evaluate one detector.

    Where the weights come from: 1. with `resume`, the last checkpoint in `OUTPUT_DIR`; 2. `MODEL.WEIGHTS`; 3. random.

    Args:
        cfg: from `load_det_config`.
        resume: go on from the last checkpoint, if there is one.

    Returns:
        The results of the last evaluation, see `evaluate`.

    Raises:
        UserError: bad data, weights or settings, before anything is written; or a loss that is not finite.
    """
    check_registered(cfg.DATASETS.TRAIN, "DATASETS.TRAIN")
    check_registered(cfg.DATASETS.TEST, "DATASETS.TEST")
    if not cfg.DATASETS.TRAIN:
        raise UserError("no training data: name it with --train-json and --train-images")
    trainer = Trainer(cfg, resume)
    with log_file(Path(cfg.OUTPUT_DIR)):
        trainer.train()
    return trainer.results


def evaluate_only(cfg: CfgNode) -> dict[str, dict[str, float]]:
    """Evaluate the detector in `MODEL.WEIGHTS` on `DATASETS.TEST`.

    Raises:
        UserError: no test data, or no whole detector in `MODEL.WEIGHTS`. Nothing is written then.
    """
    check_registered(cfg.DATASETS.TEST, "DATASETS.TEST")
    if not cfg.DATASETS.TEST:
        raise UserError("no data to evaluate on: name it with --val-json and --val-images")
    model = build_model(cfg)
    load_weights(model, cfg, detector_only=True)
    make_folder(Path(cfg.OUTPUT_DIR), "OUTPUT_DIR")
    with log_file(Path(cfg.OUTPUT_DIR)):
        return evaluate(cfg, create_ddp_model(model, broadcast_buffers=False))


class Trainer(DefaultTrainer):
    """detectron2's default trainer, built in an order that writes nothing before everything has been checked.

    Every iteration seeds torch by `SEED`, its number and the rank, and the data come by plan, so that a resumed run
    repeats what an uninterrupted one would have done.
    """

    def __init__(self, cfg: CfgNode, resume: bool = False) -> None:
        TrainerBase.__init__(self)  # not DefaultTrainer's: that opens its log files first
        seed_all_rng(cfg.SEED)
        self.cfg, self.start_iter, self.max_iter = cfg, 0, cfg.SOLVER.MAX_ITER
        self.results: dict[str, dict[str, float]] = {}
        self.records = get_detection_dataset_dicts(cfg.DATASETS.TRAIN, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
        loader = self._loader(first=0)
        model = build_model(cfg)
        self.checkpointer = AtomicCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        resume = self._find_checkpoint(resume)
        settings = shared_settings(cfg, len(self.records))
        if resume:
            check_continues(Path(cfg.OUTPUT_DIR), settings)
        else:
            load_weights(model, cfg)
        optimizer = build_optimizer(cfg, model)
        self._trainer = _inner_trainer(cfg, create_ddp_model(model, broadcast_buffers=False), loader, optimizer)
        self.scheduler = build_lr_scheduler(cfg, optimizer)
        self.register_hooks(self.build_hooks())
        if resume:
            path = self.checkpointer.get_checkpoint_file()
            self.checkpointer.load(path)
            self.start_iter = self.iter + 1  # the checkpoint holds the iteration that had just ended
            self.data_loader = self._loader(first=self.start_iter)
            log.info("resuming after iteration %d from %s", self.start_iter, path)
        if comm.is_main_process():
            record_run(cfg, settings)
            self.register_hooks([hooks.PeriodicWriter(self.build_writers(), period=20)])

    def _loader(self, first: int) -> Any:
        rank, world_size = comm.get_rank(), comm.get_world_size()
        return NamedFailures(build_train_loader(self.cfg, self.records, first, rank, world_size))

    def _find_checkpoint(self, resume: bool) -> bool:
        """Whether to go on from a checkpoint; an error where a new run would overwrite an old one."""
        folder, found = self.cfg.OUTPUT_DIR, self.checkpointer.has_checkpoint()
        if found and not resume:
            raise UserError(f"OUTPUT_DIR: {folder} already holds a run; pass --resume to go on, or name another folder")
        if resume and not found:
            log.info("--resume: no checkpoint in %s yet, starting from MODEL.WEIGHTS", folder)
        if found and not Path(self.checkpointer.get_checkpoint_file()).is_file():
            raise UserError(f"{folder}/last_checkpoint names a file that does not exist; name the right one in it")
        return found

    def build_hooks(self) -> list[HookBase]:
        """What happens between iterations; evaluation comes after the checkpoint, so that its failure loses nothing."""
        cfg = self.cfg
        steps: list[HookBase] = [hooks.IterationTimer(), hooks.LRScheduler()]
        if comm.is_main_process():
            steps += [ProgressBar(), hooks.PeriodicCheckpointer(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD)]
        if cfg.DATASETS.TEST:
            steps.append(hooks.EvalHook(cfg.TEST.EVAL_PERIOD, self._evaluate))
        return steps

    def _evaluate(self) -> dict[str, dict[str, float]]:
        self.results = evaluate(self.cfg, self.model)
        return self.results

    def run_step(self) -> None:
        """One iteration; a loss that is not finite ends the run with one line."""
        key = np.random.SeedSequence([self.cfg.SEED, self.iter, comm.get_rank()])
        torch.manual_seed(int(key.generate_state(1, np.uint64)[0] >> np.uint64(1)))
        try:
            super().run_step()
        except FloatingPointError as error:
            raise UserError(
                f"training diverged at iteration {self.iter}: {' '.join(str(error).split())} Lower SOLVER.BASE_LR "
                f"(it is {self.cfg.SOLVER.BASE_LR}) or raise SOLVER.WARMUP_ITERS ({self.cfg.SOLVER.WARMUP_ITERS})"
            ) from error


class AtomicCheckpointer(DetectionCheckpointer):
    """detectron2's checkpoints, but a reader sees a whole file or none, and resuming is strict."""

    def save(self, name: str, **kwargs: Any) -> None:
        """Write `<name>.pth`, then name it in `last_checkpoint`."""
        if not self.save_dir or not self.save_to_disk:
            return
        state = {key: value.state_dict() for key, value in self.checkpointables.items()}
        data = {"model": self.model.state_dict(), **state, **kwargs}
        write_atomically(Path(self.save_dir, f"{name}.pth"), lambda path: torch.save(data, path))
        self.tag_last_checkpoint(f"{name}.pth")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Name the newest checkpoint."""
        tag = Path(self.save_dir, "last_checkpoint")
        write_text(tag, last_filename_basename)

    def _load_file(self, filename: str) -> Any:
        try:
            return super()._load_file(filename)
        except Exception as error:  # torch raises pickle errors, runtime errors and others for the same cause
            raise UserError(
                f"{filename}: can not be read: {' '.join(str(error).split())[:300]}; name an older checkpoint in "
                f"{Path(self.save_dir, 'last_checkpoint')}"
            ) from error

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        wrong = [*incompatible.missing_keys, *incompatible.unexpected_keys]
        wrong += [name for name, *_ in incompatible.incorrect_shapes]
        if wrong:
            raise UserError(
                f"{self.get_checkpoint_file()} is of another model than the config: {len(wrong)} tensors are missing, "
                f"left over or of another shape, like {wrong[0]}; resume with the config it was trained with"
            )


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


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW over `parameter_groups`, with `SOLVER.CLIP_GRADIENTS` if enabled."""
    optimizer = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)
    return optimizer(parameter_groups(cfg, model), lr=cfg.SOLVER.BASE_LR, betas=cfg.SOLVER.BETAS)


def parameter_groups(cfg: CfgNode, model: nn.Module) -> list[dict[str, Any]]:
    """Trainable parameters by learning rate and weight decay (method specification, section 3.1).

    The learning rate of encoder layer i of n is BASE_LR * LAYER_DECAY ** (n + 1 - i): 0 is patch embedding and
    positions, i block i - 1, n + 1 everything outside the encoder. No decay on `pos_embed`, `WEIGHT_DECAY_NORM` on
    norms. Those are told by type here, because detectron2's own list misses its channel-first LayerNorm.
    """
    groups = []
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            decay = cfg.SOLVER.WEIGHT_DECAY_NORM if isinstance(module, _NORMS) else cfg.SOLVER.WEIGHT_DECAY
            full = f"{module_name}.{name}"
            factor = get_vit_lr_decay_rate(full, cfg.SOLVER.LAYER_DECAY, cfg.MODEL.VIT.DEPTH)
            hyper = {"lr": cfg.SOLVER.BASE_LR * factor, "weight_decay": 0.0 if name == "pos_embed" else decay}
            groups.append({"params": [parameter], **hyper})
    return reduce_param_groups(groups)


def _inner_trainer(cfg: CfgNode, model: nn.Module, loader: Any, optimizer: torch.optim.Optimizer) -> SimpleTrainer:
    if not cfg.SOLVER.AMP.ENABLED:
        return SimpleTrainer(model, loader, optimizer)
    half = cfg.SOLVER.AMP.PRECISION == "fp16"
    scaler = torch.amp.GradScaler("cuda", enabled=half)  # bf16 has the range of fp32 and needs none
    precision = torch.float16 if half else torch.bfloat16
    return AMPTrainer(model, loader, optimizer, grad_scaler=scaler, precision=precision)


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


def record_run(cfg: CfgNode, settings: dict[str, Any]) -> None:
    """Create `OUTPUT_DIR` with the resolved config, and the versions, data and shared settings that it is made with."""
    folder = Path(cfg.OUTPUT_DIR)
    make_folder(folder, "OUTPUT_DIR")
    write_text(folder / CONFIG, cfg.dump())
    sets = {name: MetadataCatalog.get(name) for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)}
    data = {name: {"json": meta.get("json_file"), "images": meta.get("image_root")} for name, meta in sets.items()}
    libraries = versions() | {"detectron2": detectron2.__version__}
    write_json(folder / RECORD, {"versions": libraries, "data": data, "settings": settings})


@contextmanager
def log_file(folder: Path) -> Iterator[None]:
    """Inside, everything that is logged goes to `log.txt`, too."""
    if not comm.is_main_process():
        yield
        return
    handler = logging.FileHandler(folder / LOG, encoding="utf-8")
    handler.setFormatter(logging.Formatter("[%(asctime)s] %(name)s %(levelname)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


class ConsoleHandler(logging.Handler):
    """Shows what concerns the user, above the progress bar: our own lines, and the warnings of everybody else."""

    def filter(self, record: logging.LogRecord) -> bool:
        """detectron2 logs a traceback of every error that ends training; the error itself is shown by the tool."""
        if record.name == "detectron2.engine.train_loop":
            return False
        return record.levelno >= logging.WARNING or record.name.split(".")[0] in ("det", "crossmae")

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line without tearing the bar."""
        tqdm.write(self.format(record), file=sys.stderr)
