"""Fine-tuning and linear probing: what `crossmae.training.loop` does not know about it.

Where the weights come from: with --resume, the latest complete checkpoint of the run, which also knows the best score
so far; else `model.init`, a file of any format that `crossmae.checkpoints.weights` reads; else random ones.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from crossmae.checkpoints.metadata import recorded_arguments
from crossmae.checkpoints.provenance import inherited, licence_notice
from crossmae.checkpoints.reading.files import find_file
from crossmae.checkpoints.run_checkpoint import MODEL, step_of
from crossmae.checkpoints.weights import Weights, read_weights, save_weights
from crossmae.classification.classifier import BEST, ClassifierRecord, classifier_metadata
from crossmae.classification.data import (
    CentreViews,
    LabelledImages,
    TrainImages,
    collate_labelled,
    find_classes,
    label_targets,
    read_class_names,
    warn_of_absent,
)
from crossmae.classification.evaluation.evaluate import EvaluationSet, evaluate
from crossmae.classification.evaluation.metrics import ClassificationScores, Predictions, score
from crossmae.classification.evaluation.results import write_results
from crossmae.classification.probe.linear import lars
from crossmae.classification.report import write_report
from crossmae.classification.run_files import FOLDER
from crossmae.classification.train.augment import TrainView, keyed_everywhere
from crossmae.classification.train.config import FinetuneConfig
from crossmae.classification.train.objective import Objective
from crossmae.classification.vit import Architecture, architecture_of, build_vit, load_encoder_weights, parameter_groups
from crossmae.data.sources import Source
from crossmae.data.sources.subset import choose_per_class
from crossmae.data.training_images import (
    Normalize,
    build_loader,
    find_broken,
    published_crop_pct,
    refuse_broken,
    warn_of_depth,
)
from crossmae.errors import UserError
from crossmae.files import check_writable
from crossmae.models.sizes import SIZES
from crossmae.pretraining.start import compare_pixels
from crossmae.pretraining.validation import NEVER_REPLACED, open_named, warn_of_overlap
from crossmae.training.log import NAMES, RunLog, describe
from crossmae.training.loop import Ready, Task, check_images, plan_batches, train
from crossmae.training.processes import Ranks
from crossmae.training.schedule import Plan, announce_steps, given_in_vain, plan_steps
from crossmae.training.start import check_settings, find_start
from crossmae.training.state import Run

MOST_LISTED = 20  # classes that the log names

log = logging.getLogger(__name__)


def finetune(config: FinetuneConfig, resume: bool = False) -> Path:
    """Train a classifier as the config says; returns the file of its last weights, beside which are the best ones.

    Reads every key of `FinetuneConfig`. In several processes: see `crossmae.training.loop.train`.

    Raises:
        UserError: bad data or weights, classes that differ between data.train and data.val, a folder in use by another
            run, an impossible combination of settings, a loss that is not finite.
    """
    if not config.data.train:
        raise UserError("missing key 'data.train': the labelled images to train on; pass data.train=...")
    if config.model.init is None and config.model.name is None:
        raise UserError(
            "model: name or init is needed: a size to train from random weights, or weights to start from; pass "
            "model.init=..."
        )
    return train(lambda *where: Finetuning(config, *where), config, resume)


class Finetuning(Task[FinetuneConfig]):
    """Classes of labelled images."""

    word = "finetune"

    def prepare(self, resume: bool) -> Ready:
        """See `Task.prepare`."""
        config, ranks, data, optim = self.config, self.ranks, self.config.data, self.config.optim
        check_writable(config.output_dir, "output_dir")
        start = find_start(config.output_dir, resume)
        if config.model.init is not None and not start:
            find_file(config.model.init)  # before minutes are spent on the data
        self.labelled = open_labelled(config, ranks)
        source = self.labelled.train
        batches = plan_batches(config, source, ranks)
        images_per_step = optim.batch_size * optim.accumulate * ranks.world_size
        peak = optim.lr or optim.base_lr * images_per_step / 256
        plan = plan_steps(config, batches, self.device, self.precision, peak)
        is_complete = start is not None and step_of(start) >= plan.last_step
        if start and not is_complete:
            check_settings(start, config, plan, self.decisive())
        self.architecture, model, self.licence = build_model(config, len(self.labelled.classes), start)
        self.crop_pct = config.evaluation.crop_pct or published_crop_pct(self.architecture.img_size)
        self.view = TrainView(
            self.architecture.img_size, data.crop_scale, data.flip, data.auto_augment, data.color_jitter, data.mean
        )
        self.normalize = Normalize(data.mean, data.std, self.device)
        self.objective = Objective(config, self.labelled, self.device)
        broken = []
        if data.check and not is_complete:
            broken = check_images(config, source, config.model.in_chans, ranks)
            if self.labelled.val is not None:
                refuse_broken_val(config, self.labelled.val, ranks)
        return Ready(model, source, batches, plan, start, broken)

    def announce(self, ready: Ready, step: int) -> None:
        """See `Task.announce`."""
        config, plan, size = self.config, ready.plan, self.architecture
        trainable = sum(p.numel() for p in ready.model.parameters() if p.requires_grad)
        words = "ViT of width %d, depth %d, patch %d for %d x %d pixels, pool %s: %s trainable parameters, on %s"
        sizes = (size.embed_dim, size.depth, size.patch_size, *size.img_size, config.model.pool)
        log.info(words, *sizes, f"{trainable:,}", plan.place)
        several = ", several per image" if config.data.separator is not None else ""
        names = [
            name if name == shown else f"{name} ({shown})"
            for name, shown in zip(self.labelled.classes, self.labelled.class_names, strict=True)
        ]
        listed = ", ".join(names[:MOST_LISTED]) + (", ..." if len(names) > MOST_LISTED else "")
        log.info("%d classes%s: %s", len(names), several, listed)
        if ignored := ignored_settings(config, ready.source.groups is not None):
            log.info("ignored: %s", ignored)
        rule = "optim.lr" if config.optim.lr else f"base_lr {config.optim.base_lr:g} * {plan.images_per_step} / 256"
        announce_steps(config, plan, step, rule)

    def optimizer(self, model: nn.Module, plan: Plan) -> torch.optim.Optimizer:
        """AdamW by layers, or LARS for a head alone."""
        optim = self.config.optim
        if optim.name == "lars":
            return lars(model, plan.peak_lr, optim.weight_decay)
        groups = parameter_groups(cast(VisionTransformer, model), optim.weight_decay, optim.layer_decay)
        return torch.optim.AdamW(groups, lr=plan.peak_lr, betas=optim.betas, fused=True)

    def loader(self, ready: Ready, first: int, last: int) -> Iterator[Any]:
        """See `Task.loader`."""
        config, data = self.config, self.config.data
        dataset = TrainImages(
            ready.source,
            self.labelled.targets,
            self.view,
            config.runtime.seed,
            config.model.in_chans,
            data.bit_depth,
            data.broken,
        )
        self.number = first
        return iter(
            build_loader(
                dataset, ready.batches, first, last, data.workers, self.device.type == "cuda", collate_labelled
            )
        )

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Of one micro-batch; its randomness is keyed by its number in the run."""
        batch = batch.to(self.device)
        key = (self.config.runtime.seed, 1, self.number, self.ranks.rank + 1)  # never that of a sample
        self.number += 1
        with keyed_everywhere(*key, device=self.device):
            images, targets = self.objective.augment(self.normalize(batch.images), batch.targets)
            logits = model(images)
        return self.objective.loss(logits.float(), targets)

    def metadata(self, step: int) -> dict[str, str]:
        """See `Task.metadata`."""
        config, data = self.config, self.config.data
        record = ClassifierRecord(
            pool=config.model.pool,
            head=config.model.head,
            classes=self.labelled.classes,
            class_names=self.labelled.class_names,
            multi_label=data.separator is not None,
            mean=data.mean,
            std=data.std,
            bit_depth=data.bit_depth,
            crop_pct=self.crop_pct,
        )
        return classifier_metadata(self.architecture, record, step) | inherited(self.licence)

    def decisive(self) -> dict[str, str]:
        """The classes, and the view in which the best weights are looked for."""
        classes = json.dumps(self.labelled.classes, ensure_ascii=False)
        return {"classes": classes, "evaluation.crop_pct": str(self.config.evaluation.crop_pct)}

    def begin(self, run: Run, records: RunLog) -> None:
        """Remove what an earlier try without a checkpoint left; set what is frozen to evaluation mode."""
        if run.step == 0 and run.ranks.is_main:
            (self.config.output_dir / BEST).unlink(missing_ok=True)
            shutil.rmtree(self.config.output_dir / FOLDER, ignore_errors=True)
        if self.config.model.freeze:
            run.model.eval()
            run.model.get_submodule("head").train()

    def look(self, run: Run, records: RunLog) -> None:
        """Evaluate where an epoch ends, and keep the weights if they are the best so far."""
        data = self.evaluation_set()
        if data is None or not run.plan.ends_period(run.step, self.config.evaluation.every_epochs):
            return
        values: dict[str, float] = {}
        for suffix, model in run.models.items():
            self.share_statistics(model)
            predictions = evaluate(model, data, run.device, run.autocast, run.ranks)
            scores = score(predictions, len(self.labelled.classes))
            values |= {f"{name}{suffix}": value for name, value in headline(scores).items()}
            if not all(map(math.isfinite, values.values())):
                raise UserError(
                    f"at step {run.step} an evaluation is not finite: {describe(values)}; the last checkpoint stays"
                )
            if is_best(run, scores, suffix) and run.ranks.is_main:
                self.keep_best(run, model, predictions, scores)
        records.record(run.step, values)
        records.announce(run.step, values)

    def finish(self) -> None:
        """Say which weights are the best, and write the page of the run."""
        folder = self.config.output_dir
        if (folder / BEST).is_file():
            with safe_open(folder / BEST, "pt") as file:
                found = file.metadata()
            name = NAMES[found["best_metric"]]
            log.info(
                "best: %s %.4f at step %s: %s", name, float(found["best_score"]), found["best_step"], folder / BEST
            )
        log.info("report: %s", write_report(folder))

    def evaluation_set(self) -> EvaluationSet | None:
        """What is evaluated on, if anything."""
        config, val, targets = self.config, self.labelled.val, self.labelled.val_targets
        if val is None or targets is None:
            return None
        channels, depth = config.model.in_chans, config.data.bit_depth
        return EvaluationSet(
            val,
            "data.val",
            CentreViews(val, targets, self.architecture.img_size, self.crop_pct, channels, depth),
            config.data.mean,
            config.data.std,
            config.evaluation.batch_size or config.optim.batch_size,
            config.data.workers,
            config.evaluation.features,
        )

    def share_statistics(self, model: nn.Module) -> None:
        """Give all processes the mean of their running statistics, so that they evaluate the same model."""
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.copy_(self.ranks.mean(buffer.clone()))

    def keep_best(self, run: Run, model: nn.Module, predictions: Predictions, scores: ClassificationScores) -> None:
        """Write the weights, and what they answered."""
        config, best = self.config, run.kept["best"]
        record = {f"best_{key}": str(value) for key, value in best.items()}
        tensors = model.state_dict()
        save_weights(config.output_dir / BEST, tensors, self.metadata(run.step) | record, force=True)
        assert self.labelled.val is not None
        about = {
            "weights": BEST,
            "weights_are": "averaged" if best["averaged"] else "as trained",
            "step": run.step,
            "epoch": run.plan.epoch(run.step),
            "data": config.data.val,
            "data_root": str(config.data.val_root) if config.data.val_root else None,
            "in_chans": config.model.in_chans,
            "bit_depth": config.data.bit_depth,
            "img_size": list(self.architecture.img_size),
            "crop_pct": self.crop_pct,
        }
        write_results(
            config.output_dir / FOLDER,
            predictions,
            scores,
            self.labelled.val,
            self.labelled.class_names,
            about,
            config.evaluation.hardest,
        )


def open_labelled(config: FinetuneConfig, ranks: Ranks) -> LabelledImages:
    """Open both sources; their labels as positions among the classes of data.train.

    Raises:
        UserError: no labels, or data.val has classes that data.train has not.
    """
    data = config.data
    source = open_named(config, "data.train")
    if ranks.is_main:
        warn_of_depth(source, data.bit_depth)
    classes = find_classes(source, "data.train", data.separator)
    if data.per_class is not None:
        source = choose_per_class(source, data.per_class, config.runtime.seed, "data.per_class")
    targets = label_targets(source, "data.train", classes, data.separator)
    names = read_class_names(data.class_names, classes)
    if data.val is None:
        return LabelledImages(source, targets, classes, names, None, None)
    val = open_named(config, "data.val")
    val_targets = label_targets(val, "data.val", classes, data.separator)
    if data.separator is not None and not bool(val_targets.any()):
        raise UserError("data.val: no image has any label, so nothing can be evaluated")
    if ranks.is_main:
        warn_of_overlap(source, "data.train", val, "data.val")
        for key, these in (("data.train", targets), ("data.val", val_targets)):
            warn_of_absent(these, key, classes)
    return LabelledImages(source, targets, classes, names, val, val_targets)


def refuse_broken_val(config: FinetuneConfig, val: Source, ranks: Ranks) -> None:
    """Look at every image of data.val before anything is trained.

    Raises:
        UserError: one is broken.
    """
    share = range(ranks.rank, len(val), ranks.world_size)
    broken = find_broken(val, share, config.model.in_chans, config.data.bit_depth)
    refuse_broken(broken, f"data.val: repair or remove what is broken: {NEVER_REPLACED}")


def build_model(
    config: FinetuneConfig, num_classes: int, start: Path | None
) -> tuple[Architecture, VisionTransformer, str | None]:
    """The model, with the weights of `model.init` unless a checkpoint is to be loaded; what is known of their licence.

    Raises:
        UserError: the file holds no such encoder, or the sizes do not go together.
    """
    settings, given = config.model, config.model.given()
    torch.manual_seed(config.runtime.seed)
    file = start / MODEL if start else settings.init
    weights = read_weights(file) if file else None
    if weights is not None:
        architecture = architecture_of(weights, **given)
    else:
        architecture = architecture_from(given, config)
    model = build_vit(architecture, num_classes, settings.pool, settings.drop_path, settings.head)
    if weights is not None and not start:
        compare_pixels(weights, config.data)
        warn_of_untrained_blocks(weights, architecture.depth)
        report = load_encoder_weights(model, weights)
        log.info("model.init: the encoder of %s: %s", weights.path, report.summary())
    if settings.freeze:
        model.requires_grad_(False)
        model.head.requires_grad_(True)
    model.set_grad_checkpointing(config.runtime.activation_checkpointing)
    return architecture, model, licence_notice(weights) if weights else None


def warn_of_untrained_blocks(weights: Weights, depth: int) -> None:
    """Say so where pretraining mixed no map of the last blocks: those were never trained."""
    fused = recorded_arguments(weights.metadata).get("fuse_blocks")
    if fused and (last := max(block % depth for block in fused)) < depth - 1:
        words = "model.init: %s was pretrained up to block %d of %d (fuse_blocks); those after it are random"
        log.warning(words, weights.path, last, depth - 1)


def architecture_from(given: dict[str, Any], config: FinetuneConfig) -> Architecture:
    """Of random weights: the named size, for 224 pixels unless something else is given."""
    size = SIZES[str(config.model.name).removeprefix("vit_")]
    img_size = given.get("img_size", 224)
    values = {"patch_size": size.patch_size, "mlp_ratio": 4.0} | given
    values["img_size"] = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    try:
        return Architecture(**values)
    except ValueError as error:
        raise UserError(f"model: {error}") from None


def headline(scores: ClassificationScores) -> dict[str, float]:
    """What a line of the log says of an evaluation, the metric that decides last."""
    numbers = scores.numbers()
    return {"val_loss": scores.loss} | {key: numbers[key] for key in ("mean_ap", "top5", "top1") if key in numbers}


def is_best(run: Run, scores: ClassificationScores, suffix: str) -> bool:
    """Whether these weights are the best so far, which is then remembered, over restarts, too.

    Of equal scores, which few images give often, the lower loss decides, then the later step.
    """
    metric, value = list(headline(scores).items())[-1]
    best = run.kept.get("best")
    if best is not None and (value, -scores.loss) < (best["score"], -best["loss"]):
        return False
    best = {"score": value, "metric": metric, "loss": scores.loss, "step": run.step, "averaged": bool(suffix)}
    run.kept["best"] = best
    return True


def ignored_settings(config: FinetuneConfig, has_shards: bool) -> str:
    """Keys that were given but have no effect, each with the reason."""
    data, loss, model = config.data, config.loss, config.model
    cases = [
        (model.freeze, "model.freeze trains the head alone", "model", {"drop_path"}),
        (model.freeze, "model.freeze trains the head alone", "optim", {"layer_decay"}),
        (config.optim.name == "lars", "optim.name is lars", "optim", {"betas"}),
        (config.optim.lr is not None, "optim.lr is given", "optim", {"base_lr"}),
        (loss.cutmix_minmax is not None, "loss.cutmix_minmax is given", "loss", {"cutmix"}),
        (not loss.mixes, "nothing is mixed", "loss", {"mixup_prob", "mixup_switch_prob", "mixup_mode"}),
        (not data.erase, "data.erase is 0", "data", {"erase_mode", "erase_count"}),
        (data.val is None, "data.val is not given", "data", {"val_root"}),
        (data.val is None, "data.val is not given", "evaluation", set(type(config.evaluation).model_fields)),
        (data.broken == "error", "data.broken is error", "data", {"broken_budget"}),
        (not has_shards, "data.train has no shards", "data", {"shuffle_shards"}),
        (True, "it is for --eval-only", "evaluation", {"img_size"}),
    ]
    ignored = given_in_vain(config, cases)
    return "; ".join(f"{', '.join(keys)} ({reason})" for reason, keys in ignored.items())
