"""Fine-tuning and linear probing: train a classifier on labelled images.

The initial weights come from one of three places. With --resume: the latest complete checkpoint of the run, which also
has the best score. Otherwise from `model.init`, a file in any format that `crossmae.checkpoints.weights` reads. Without
`model.init`, they are random.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from crossmae.checkpoints.formats.facts import MODEL_KEYS, assumed
from crossmae.checkpoints.metadata import CLASSES, FORMAT, recorded_arguments, recorded_names
from crossmae.checkpoints.provenance import inherited, recorded_inheritance
from crossmae.checkpoints.reading.files import find_file
from crossmae.checkpoints.run_checkpoint import MODEL
from crossmae.checkpoints.weights import Weights, read_weights, save_weights
from crossmae.classification.classifier import BEST, CLASSIFIER, PLAIN, ClassifierRecord, classifier_metadata
from crossmae.classification.data import (
    CentreViews,
    LabelledImages,
    TrainImages,
    Views,
    collate_labelled,
    find_classes,
    label_targets,
    read_class_names,
    warn_of_absent,
)
from crossmae.classification.evaluation.evaluate import EvaluationSet, evaluate, write_results
from crossmae.classification.evaluation.metrics import ClassificationScores, score
from crossmae.classification.probe.linear import lars
from crossmae.classification.report import FOLDER, write_report
from crossmae.classification.train.augment import keyed_everywhere, train_view
from crossmae.classification.train.config import (
    ClassifierConfig,
    EvaluationConfig,
    FinetuneConfig,
    FinetuneOptimConfig,
    LabelledDataConfig,
)
from crossmae.classification.train.objective import Objective
from crossmae.classification.vit import Architecture, architecture_of, build_vit, load_encoder_weights, parameter_groups
from crossmae.data.batches import BatchPlan
from crossmae.data.broken import NEVER_REPLACED, Broken, find_broken, refuse_broken, warn_of_depth
from crossmae.data.pixels import Normalize, published_crop_pct
from crossmae.data.sources import open_named, warn_of_overlap
from crossmae.data.sources.source import choose_per_class
from crossmae.errors import UserError, named_by, shorten
from crossmae.files import check_writable
from crossmae.models.class_names import pair_names, rows_by_name, start_notes
from crossmae.models.sizes import SIZES
from crossmae.pretraining.initial_weights import compare_pixels, say_assumed
from crossmae.training.devices import describe_place
from crossmae.training.log import EVALUATION, NAMES, RunLog, announce_steps, describe
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
from crossmae.training.state import Diverged, Losses, TrainingState

log = logging.getLogger(__name__)

_CLASS_LAYERS = ("head.weight", "head.bias", "head.1.weight", "head.1.bias")  # one row per class


def finetune(config: FinetuneConfig, resume: bool = False) -> Path:
    """Train a classifier, and return the path of its last weights.

    The best weights are in the same folder. For several processes, see `crossmae.training.loop.train`.

    Raises:
        UserError: data or weights are wrong, data.train and data.val have different classes, another run uses the
            folder, settings contradict each other, or a loss is not finite.
    """
    if not config.data.train:
        raise UserError("data.train: missing. Name labelled images to train on.")
    if config.model.init is None and config.model.name is None:
        raise UserError("model: neither init nor name is given. Name weights to start from, or a size without weights.")
    train(config.run_settings(), partial(build_job, config, resume))
    return config.output_dir / WEIGHTS


def build_job(config: FinetuneConfig, resume: bool, ranks: Ranks, device: torch.device, precision: str) -> Job:
    """Build and check model, data and schedule. Write nothing."""
    data, optim, seed, channels = config.data, config.optim, config.runtime.seed, config.model.in_chans
    check_writable(config.output_dir, "output_dir")
    start = find_start(config.output_dir, resume, "fine-tuning")
    if config.model.init is not None and not start:
        with named_by("model.init", config.model.init):
            find_file(config.model.init)  # before the data are read, which takes minutes
    # The labelled images, and the schedule, which depends on their number.
    labelled = open_labelled(config, ranks)
    source, classes = labelled.train, labelled.classes
    order = (ranks.rank, ranks.world_size, source.groups, data.shuffle_shards)
    batches = BatchPlan(len(source), optim.batch_size, seed, *order)
    schedule = make_schedule(batches, optim, config.schedule)
    schedule = shorten_schedule(schedule, start, config.schedule.shorten_to, "schedule.shorten_to")
    # Settings that must not change on resuming. They include the classes, and the evaluation crop that decides the best
    # weights.
    fingerprint = config.fingerprint(schedule.images, precision, ranks.world_size) | {
        "classes": json.dumps(classes, ensure_ascii=False),
        "evaluation.crop_pct": str(config.evaluation.crop_pct),
        IMAGE_NAMES: source.digest(labelled=True),
    }
    complete = is_complete(start, schedule.last_step, fingerprint)
    # The model, with its initial weights.
    size, model, origin = build_model(config.model, data, seed, classes, start)
    model.set_grad_checkpointing(config.runtime.activation_checkpointing)
    crop_pct = config.evaluation.crop_pct or published_crop_pct(size.img_size)
    # The augmented images, and the loss.
    view = train_view(size.img_size, data.crop_scale, data.flip, data.auto_augment, data.color_jitter, data.mean)
    images = TrainImages(source, labelled.targets, view, seed, channels, data.bit_depth, data.broken)
    objective = Objective(config.loss, data, labelled, optim.batch_size, device)
    broken = check_labelled(labelled, channels, data, ranks) if data.check and not complete else []
    model = model.to(device)
    record = ClassifierRecord(
        pool=config.model.pool,
        head=config.model.head,
        classes=classes,
        class_names=labelled.class_names,
        multi_label=data.separator is not None,
        mean=data.mean,
        std=data.std,
        bit_depth=data.bit_depth,
        crop_pct=crop_pct,
    )

    def metadata(step: int) -> dict[str, str]:
        return classifier_metadata(size, record, step) | origin

    def announce(step: int) -> None:
        announce_model(model, size, record, describe_place(device, precision, ranks.world_size))
        if ignored := config.ignored(source.groups is not None):
            log.info("ignored: %s", "; ".join(f"{', '.join(keys)} ({reason})" for reason, keys in ignored.items()))
        rule = "optim.lr" if optim.lr else f"base_lr {optim.base_lr:g} * {schedule.images_per_step} / 256"
        announce_steps(schedule, step, rule)

    return Job(
        word="finetune",
        kind="fine-tuning",
        model=model,
        optimizer=build_optimizer(model, optim, schedule.peak_lr),
        open_batches=image_batches(images, batches, data.workers, device.type == "cuda", collate_labelled),
        name_images=image_names(source),
        watch_broken=broken_watch(source, broken, data.broken_budget, ranks),
        loss=partial(classification_loss, objective, Normalize(data.mean, data.std, device), seed, ranks.rank),
        schedule=schedule,
        saves_after=lambda step: config.saves_after(step, schedule.ends_period),
        fingerprint=fingerprint,
        start=start,
        is_complete=complete,
        metadata=metadata,
        announce=announce,
        finals=(WEIGHTS, EMA_WEIGHTS),
        write_finals=partial(write_weights, config.output_dir, optim.ema, metadata),
        callbacks=build_judge(config, labelled, size, crop_pct, schedule, metadata),
    )


def classification_loss(
    objective: Objective, normalize: Normalize, seed: int, rank: int, model: nn.Module, batch: Any, number: int
) -> Losses:
    """Augment a micro-batch and compute its loss.

    The random numbers depend on `seed`, `rank` and the `number` of the batch only.
    """
    device = normalize.mean.device
    pixels, targets = (tensor.to(device, non_blocking=True) for tensor in (batch.images, batch.targets))
    with keyed_everywhere(seed, 1, number, rank + 1, device=device):  # differs from the key of every sample
        images, targets = objective.augment(normalize(pixels), targets)
        logits = model(images)
    return {"loss": objective.loss(logits.float(), targets)}


@dataclass(frozen=True)
class Judge(Callbacks):
    """Evaluations of a run, if it has `data`, and its best weights.

    `metadata` returns the metadata of the weights at a step. `about` describes the images in evaluation.json. With
    `is_probe`, only the head is trained.
    """

    folder: Path
    data: EvaluationSet | None
    schedule: Schedule
    settings: EvaluationConfig
    metadata: Callable[[int], dict[str, str]]
    class_names: tuple[str, ...]
    about: dict[str, Any]
    is_probe: bool

    def begin(self, state: TrainingState, records: RunLog) -> None:
        """Remove an earlier attempt, and put frozen layers into evaluation mode."""
        if state.step == 0 and state.ranks.is_main:
            (self.folder / BEST).unlink(missing_ok=True)
            shutil.rmtree(self.folder / FOLDER, ignore_errors=True)
        if self.is_probe:
            state.model.eval()
            state.model.get_submodule("head").train()

    def due(self, step: int) -> tuple[str, ...]:
        """Name the evaluation at the end of a period."""
        is_due = self.data is not None and self.schedule.ends_period(step, self.settings.every_epochs)
        return (EVALUATION,) if is_due else ()

    def measure(self, state: TrainingState, records: RunLog) -> None:
        """Evaluate if it is due, and keep the best weights."""
        step = state.step
        if self.data is None or not self.due(step):
            return
        with records.timed(EVALUATION):
            self.evaluate(self.data, state, records)

    def evaluate(self, data: EvaluationSet, state: TrainingState, records: RunLog) -> None:
        """Evaluate, and keep the best weights."""
        step, values = state.step, dict[str, float]()
        for suffix, model in state.models.items():
            for buffer in model.buffers():  # average running statistics: all processes must evaluate the same model
                if buffer.is_floating_point():
                    buffer.copy_(state.ranks.mean(buffer.clone()))
            predictions = evaluate(model, data, state.device, state.autocast, state.ranks)
            scores = score(predictions, len(self.class_names))
            values |= {f"{name}{suffix}": value for name, value in headline(scores).items()}
            if not all(map(math.isfinite, values.values())):
                raise Diverged(f"the evaluation on data.val is not finite ({describe(values)})")
            if is_best(state.kept, step, scores, suffix) and state.ranks.is_main:
                record = {f"best_{key}": str(value) for key, value in state.kept["best"].items()}
                save_weights(self.folder / BEST, model.state_dict(), self.metadata(step) | record, force=True)
                about = {"weights": BEST, "weights_are": "averaged" if suffix else "as trained"}
                about |= {"step": step, "epoch": self.schedule.epoch(step)} | self.about
                how = (self.class_names, about, self.settings.hardest)
                write_results(self.folder / FOLDER, data.images, predictions, scores, *how)
        records.announce(step, values)

    def finish(self) -> None:
        """Log the best weights, and write the report page."""
        best = self.folder / BEST
        if best.is_file():
            with safe_open(best, "pt") as file:
                found = file.metadata()
            name = NAMES[found["best_metric"]]
            log.info("best: %s %.4f at step %s: %s", name, float(found["best_score"]), found["best_step"], best)
        log.info("report: %s", write_report(self.folder))


def build_judge(
    config: FinetuneConfig,
    labelled: LabelledImages,
    size: Architecture,
    crop_pct: float,
    schedule: Schedule,
    metadata: Callable[[int], dict[str, str]],
) -> Judge:
    """Build the evaluations on data.val, with the metadata of their files."""
    data, settings, evaluated = config.data, config.evaluation, None
    if labelled.val is not None and labelled.val_targets is not None:
        views = Views(size.img_size, crop_pct, data.mean, data.std, data.bit_depth)
        images = CentreViews(labelled.val, labelled.val_targets, views)
        batch_size = settings.batch_size or config.optim.batch_size
        evaluated = EvaluationSet(images, batch_size, data.workers, settings.features)
    return Judge(
        folder=config.output_dir,
        data=evaluated,
        schedule=schedule,
        settings=settings,
        metadata=metadata,
        class_names=labelled.class_names,
        about={"data": data.val, "data_root": data.val_root and str(data.val_root)},
        is_probe=config.model.freeze,
    )


def build_optimizer(model: VisionTransformer, optim: FinetuneOptimConfig, peak_lr: float) -> torch.optim.Optimizer:
    """Build the optimizer: with layer decay, or LARS for a linear probe."""
    if optim.name == "lars":
        return lars(model, peak_lr, optim.weight_decay)
    groups = parameter_groups(model, optim.weight_decay, optim.layer_decay)
    return make_optimizer(optim.name, model, groups, peak_lr, optim.betas)


def announce_model(model: nn.Module, size: Architecture, record: ClassifierRecord, place: str) -> None:
    """Log architecture, training device and classes with their names."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    words = "ViT of width %d, depth %d, patch %d for %d x %d pixels, pool %s: %s trainable parameters, on %s"
    log.info(words, size.embed_dim, size.depth, size.patch_size, *size.img_size, record.pool, f"{trainable:,}", place)
    pairs = zip(record.classes, record.class_names, strict=True)
    names = [name if name == shown else f"{name} ({shown})" for name, shown in pairs]
    several = ", several per image" if record.multi_label else ""
    log.info("%d classes%s: %s", len(names), several, shorten(names, most=20))


def open_labelled(config: FinetuneConfig, ranks: Ranks) -> LabelledImages:
    """Open both sources, with labels as classes of data.train."""
    data = config.data
    source = open_named(data.train, "data.train", data.root, data.limits)
    if ranks.is_main:
        warn_of_depth(source, data.bit_depth)
    classes = find_classes(source, "data.train", data.separator)
    if data.per_class is not None:
        source = choose_per_class(source, data.per_class, config.runtime.seed, "data.per_class")
    targets = label_targets(source, "data.train", classes, data.separator)
    names = read_class_names(data.class_names, classes)
    if data.val is None:
        return LabelledImages(source, targets, classes, names, None, None)
    val = open_named(data.val, "data.val", data.val_root, data.limits)
    val_targets = label_targets(val, "data.val", classes, data.separator)
    if data.separator is not None and not bool(val_targets.any()):
        raise UserError("data.val: no image has any label. Label some images, or set data.val=null.")
    if ranks.is_main:
        warn_of_overlap(source, "data.train", val, "data.val")
        for key, these in (("data.train", targets), ("data.val", val_targets)):
            warn_of_absent(these, key, classes)
    return LabelledImages(source, targets, classes, names, val, val_targets)


def check_labelled(labelled: LabelledImages, channels: int, data: LabelledDataConfig, ranks: Ranks) -> list[Broken]:
    """Find broken training images, and refuse broken validation images."""
    broken = check_images(labelled.train, channels, data.bit_depth, data.broken, ranks)
    if labelled.val is not None:
        mine = range(ranks.rank, len(labelled.val), ranks.world_size)
        refuse_broken(find_broken(labelled.val, mine, channels, data.bit_depth), "data.val", NEVER_REPLACED)
    return broken


def build_model(
    settings: ClassifierConfig, data: LabelledDataConfig, seed: int, classes: Sequence[str], start: Path | None
) -> tuple[Architecture, VisionTransformer, dict[str, str]]:
    """Build the model from a checkpoint, `model.init`, or random numbers.

    Returns:
        The architecture, the model, and the metadata that it inherits from its weights.

    Raises:
        UserError: the file has no such encoder, or the sizes do not fit together.
    """
    given = settings.given()
    torch.manual_seed(seed)
    file = start / MODEL if start else settings.init
    with named_by("model.init", file or ""):
        weights = read_weights(file) if file else None
    architecture = architecture_of(weights, **given) if weights else architecture_from(given, str(settings.name))
    model = build_vit(architecture, len(classes), settings.pool, settings.drop_path, settings.head)
    origin = recorded_inheritance(file) if start and file else inherited()
    if weights and not start:
        compare_pixels(weights, data)
        warn_of_untrained_blocks(weights, architecture.depth)
        report = load_encoder_weights(model, weights)
        log.info("model.init: the encoder of %s: %s", weights.path, report.summary())
        found = assumed(report.assumed, () if settings.num_heads is None else ("num_heads",))
        say_assumed(found, MODEL_KEYS)
        origin = inherited(report.licence, found, file.name if file else "")
        if weights.metadata.get(FORMAT) == CLASSIFIER:
            start_head(model, weights, settings, classes)
    if settings.freeze:
        model.requires_grad_(False)
        model.head.requires_grad_(True)
    return architecture, model, origin


def start_head(model: VisionTransformer, weights: Weights, settings: ClassifierConfig, classes: Sequence[str]) -> None:
    """Load the rows of a classifier's head by their names.

    Classes that the classifier does not have keep their random rows. The head stays random if its kind or its pooling
    differs, or no class is in both.
    """
    pairs = pair_names(classes, recorded_names(weights.metadata, CLASSES))
    same = all(weights.metadata.get(key) == getattr(settings, key) for key in PLAIN)
    if not same or len(pairs.unknown) == len(classes):
        why = "none of its classes is in data.train" if same else "it is for another model.head or model.pool"
        log.warning("model.init: the head of %s is not used, because %s", weights.path, why)
        return
    for name, own in model.state_dict().items():
        if name.startswith(("head.", "fc_norm.")):
            found, per_class = weights.tensors[name], name in _CLASS_LAYERS
            own.copy_(rows_by_name(own, found, pairs) if per_class else found)
    for note in start_notes(pairs) or ["the head is loaded, too: it is for the same classes"]:
        log.info("model.init: %s: %s", weights.path, note)


def warn_of_untrained_blocks(weights: Weights, depth: int) -> None:
    """Warn about last blocks that were not trained in pretraining."""
    fused = recorded_arguments(weights.metadata).get("fuse_blocks")
    if fused and (last := max(block % depth for block in fused)) < depth - 1:
        words = "model.init: %s was pretrained up to block %d of %d (fuse_blocks). The blocks after it are random"
        log.warning(words, weights.path, last, depth - 1)


def architecture_from(given: dict[str, Any], name: str) -> Architecture:
    """Return the architecture of a named size, by default for 224 pixels."""
    size = SIZES[name.removeprefix("vit_")]
    img_size = given.get("img_size", 224)
    values = {"patch_size": size.patch_size, "mlp_ratio": 4.0} | given
    values["img_size"] = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    try:
        return Architecture(**values)
    except ValueError as error:
        raise UserError(f"model: {error}") from None


def headline(scores: ClassificationScores) -> dict[str, float]:
    """Select the logged metrics of an evaluation. The deciding metric is last."""
    numbers = scores.numbers()
    return {"val_loss": scores.loss} | {key: numbers[key] for key in ("mean_ap", "top5", "top1") if key in numbers}


def is_best(kept: dict[str, Any], step: int, scores: ClassificationScores, suffix: str) -> bool:
    """Check for the best score so far, and store it in `kept`.

    If scores are equal, which is common with few images, the lower loss decides, then the later step.
    """
    metric, value = list(headline(scores).items())[-1]
    best = kept.get("best")
    if best is not None and (value, -scores.loss) < (best["score"], -best["loss"]):
        return False
    kept["best"] = {"score": value, "metric": metric, "loss": scores.loss, "step": step, "averaged": bool(suffix)}
    return True
