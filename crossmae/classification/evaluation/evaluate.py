"""Evaluation of a classifier: every image is predicted exactly once, on any number of processes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossmae.classification.classifier import Classifier, load_classifier
from crossmae.classification.data import (
    CentreViews,
    LabelledBatch,
    Views,
    evaluation_batches,
    label_targets,
    warn_of_absent,
)
from crossmae.classification.evaluation.files import write_evaluation, write_hardest
from crossmae.classification.evaluation.metrics import ClassificationScores, Predictions, merge, score
from crossmae.classification.report import CONFIG, FOLDER, write_report
from crossmae.classification.train.config import EvaluationConfig, LabelledDataConfig
from crossmae.data.pixels import Normalize
from crossmae.data.sources import Source, open_source
from crossmae.data.sources.source import evenly_spaced
from crossmae.errors import UserError, named_by, shorten
from crossmae.files import check_writable, sha256
from crossmae.models.class_names import LISTED, list_names, pair_names
from crossmae.training.devices import choose_precision, open_autocast, open_device
from crossmae.training.processes import Ranks, find_ranks, process_group
from crossmae.training.signals import until_stop
from crossmae.training.versions import versions

TOP = 5  # number of best classes recorded for each sample

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationSet:
    """Images in batches per process. Features are kept for `features` evenly spaced samples."""

    images: CentreViews
    batch_size: int
    workers: int
    features: int


def evaluate(
    model: nn.Module, data: EvaluationSet, device: torch.device, autocast: torch.autocast, ranks: Ranks
) -> Predictions:
    """Predict all images and gather the predictions in every process.

    Each process predicts its share of the images. The `model`, from `build_vit`, keeps its mode (training or
    evaluation). Probabilities and losses are always float32.

    Raises:
        UserError: an image cannot be read. All processes raise it.
    """
    indices = range(ranks.rank, len(data.images), ranks.world_size)
    mine = ranks.together(lambda: list(_predict(model, data, indices, device, autocast, ranks)))
    return merge([part for of_rank in ranks.gather(mine) for part in of_rank], len(data.images))


def _predict(
    model: Any, data: EvaluationSet, indices: range, device: torch.device, autocast: torch.autocast, ranks: Ranks
) -> Iterator[Predictions]:
    with_features = torch.tensor(evenly_spaced(len(data.images), data.features), dtype=torch.int64)
    normalize = Normalize(data.images.views.mean, data.images.views.std, device)
    how = (data.batch_size, data.workers, device.type == "cuda", "evaluate", "data.val", ranks.is_main)
    with _evaluation_mode(model), torch.no_grad():
        batches = evaluation_batches(data.images, indices, *how)
        for batch in until_stop(batches, ranks, -(-len(indices) // data.batch_size)):
            with autocast:
                tokens = model.forward_features(normalize(batch.images.to(device, non_blocking=True)))
                pooled = model.forward_head(tokens, pre_logits=True)
                logits = model.head(pooled)
            yield _predictions(batch, logits.float().cpu(), pooled.cpu(), with_features)


def _predictions(batch: LabelledBatch, logits: Tensor, pooled: Tensor, with_features: Tensor) -> Predictions:
    several = batch.targets.ndim == 2
    if several:
        scores = logits.sigmoid()
        losses = F.binary_cross_entropy_with_logits(logits, batch.targets, reduction="none").mean(dim=1)
    else:
        scores = logits.softmax(dim=1)
        losses = F.cross_entropy(logits, batch.targets, reduction="none")
    top_scores, top_classes = scores.topk(min(TOP, scores.shape[1]), dim=1)
    kept = torch.isin(batch.indices, with_features)
    return Predictions(
        indices=batch.indices,
        labels=batch.targets.bool() if several else batch.targets,
        losses=losses,
        top_classes=top_classes,
        top_scores=top_scores,
        scores=scores if several else None,
        features=pooled[kept].float(),
        feature_indices=batch.indices[kept],
    )


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


def write_results(
    folder: Path,
    images: CentreViews,
    predictions: Predictions,
    scores: ClassificationScores,
    class_names: Sequence[str],
    about: Mapping[str, Any],
    hardest: int,
) -> None:
    """Write all files of an evaluation, with facts about the `images`."""
    source, views = images.source, images.views
    facts = {
        **about,
        "in_chans": len(views.mean),
        "bit_depth": views.bit_depth,
        "img_size": list(views.size),
        "crop_pct": views.crop_pct,
        "samples": source.description,
        "versions": versions(),
    }
    write_evaluation(folder, predictions, scores, class_names, source.name, facts)
    write_hardest(folder, predictions, images.read, class_names, source.name, hardest)


def evaluate_only(
    weights: str | Path,
    output_dir: Path,
    data: LabelledDataConfig,
    settings: EvaluationConfig,
    batch_size: int,
    device: str = "auto",
    precision: str = "auto",
    force: bool = False,
) -> ClassificationScores:
    """Evaluate a classifier on `data.val`, and write results and report.

    The model, its classes and its pixel statistics come from the file. Training images are not needed.

    Args:
        weights: a classifier's file, or the folder of a run, whose best weights are taken.
        batch_size: images per process, if `settings` has no batch size.
        force: replace the results of an earlier evaluation.

    Raises:
        UserError: the file is not a classifier, output_dir already has results, data.val is missing, a label is unknown
            to the classifier, or an image cannot be read.
    """
    ranks = find_ranks()
    opened = open_device(device, "runtime.device", ranks.local_rank, ranks.world_size)
    precision = choose_precision(precision, opened)
    with process_group(ranks, opened):
        try:
            ranks.together(lambda: _check_output(output_dir, force))
            classifier = ranks.together(lambda: _load_named(weights, settings.img_size))
            classifier, found = ranks.together(lambda: _open_images(classifier, data, settings, batch_size))
            if ranks.is_main:
                log.info("data.val: %s", found.images.source.description)
                if classifier.multi_label:
                    warn_of_absent(found.images.targets, "data.val", classifier.classes)
                for sentence in classifier.assumed:
                    log.info("assumed: %s", sentence)
            autocast = open_autocast(precision, opened)
            predictions = evaluate(classifier.model.to(opened), found, opened, autocast, ranks)
        except torch.OutOfMemoryError as error:
            words = str(error).splitlines()[0]
            raise UserError(f"evaluation.batch_size: the GPU's memory is full ({words}). Lower it.") from error
        scores = score(predictions, len(classifier.classes))
        if ranks.is_main:
            about = {
                "weights": str(classifier.path),
                "weights_sha256": sha256(classifier.path),
                "assumed": list(classifier.assumed),
                "data": data.val,
                "data_root": data.val_root and str(data.val_root),
                "precision": precision,
                "softmax": None if classifier.multi_label else settings.softmax,
            }
            how = (classifier.class_names, about, settings.hardest)
            write_results(output_dir / FOLDER, found.images, predictions, scores, *how)
            log.info("report: %s", write_report(output_dir))
        ranks.wait()
    return scores


def _load_named(weights: str | Path, img_size: int | tuple[int, int] | None) -> Classifier:
    with named_by("--eval-only", weights):
        return load_classifier(weights, img_size)


def _check_output(folder: Path, force: bool) -> None:
    check_writable(folder, "output_dir")
    if (folder / CONFIG).exists():
        raise UserError(f"output_dir: {folder} has a run with its own evaluation. Name another folder.")
    if (folder / FOLDER).exists() and not force:
        raise UserError(
            f"output_dir: {folder} has an evaluation already. Name another folder, or replace it with --force."
        )


def _open_images(
    classifier: Classifier, data: LabelledDataConfig, settings: EvaluationConfig, batch_size: int
) -> tuple[Classifier, EvaluationSet]:
    if data.val is None:
        raise UserError("data.val: missing. Name labelled images to evaluate on.")
    if classifier.multi_label and data.separator is None:
        raise UserError("data.separator: the classifier predicts several labels per image. Name their separator.")
    if not classifier.multi_label and data.separator is not None:
        raise UserError("data.separator: the classifier predicts one label per image. Leave it out.")
    source = open_source(data.val, "data.val", data.val_root, data.limits)
    classifier = match_classes(classifier, source, settings.softmax)
    targets = label_targets(source, "data.val", classifier.classes, data.separator)
    how = (settings.crop_pct or classifier.crop_pct, classifier.mean, classifier.std, classifier.bit_depth)
    images = CentreViews(source, targets, Views(classifier.architecture.img_size, *how))
    return classifier, EvaluationSet(images, settings.batch_size or batch_size, data.workers, settings.features)


def match_classes(classifier: Classifier, source: Source, softmax: Literal["all", "present"]) -> Classifier:
    """Compare the classes of a classifier with the classes in data.val.

    A classifier without class names gets the names of the data, in their order, if there are as many. If the data have
    some of the classes, `softmax` decides among which classes an image is classified. Labels that are no classes are
    left to `label_targets`.
    """
    source.label(0)
    names, number = source.classes, len(classifier.classes)
    if classifier.multi_label:  # every class is a decision of its own
        return classifier
    if not classifier.names_known and len(names) == number and not set(names) <= set(classifier.classes):
        words = "data.val: %s does not record the names of its %d classes. They are taken for the data's, in order: %s"
        log.warning(words, classifier.path, number, shorten(names, LISTED))
        return replace(classifier, classes=names, class_names=names)
    pairs = pair_names(names, classifier.classes)
    if pairs.unknown or not pairs.absent:
        return classifier
    counted = f"data.val: has {len(names)} of the classifier's {number} classes, not {list_names(pairs.absent)}"
    if softmax == "all" or len(names) < 2:
        advice = "evaluation.softmax=present chooses among the present classes only"
        log.warning("%s. The softmax is over all classes, so images can be taken for these. %s", counted, advice)
        return classifier
    log.warning("%s. The softmax is over the present classes only (evaluation.softmax)", counted)
    return classifier.only([name for name in classifier.classes if name not in pairs.absent])
