"""What stays of an evaluation: numbers, tables and pictures in one folder; and evaluating a file of weights alone."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from crossmae.classification.classifier import Classifier, load_classifier
from crossmae.classification.data import CentreViews, label_targets, warn_of_absent
from crossmae.classification.evaluation.evaluate import EvaluationSet, evaluate
from crossmae.classification.evaluation.files import write_evaluation
from crossmae.classification.evaluation.hardest import write_hardest
from crossmae.classification.evaluation.metrics import Predictions, Scores, score
from crossmae.classification.report import write_report
from crossmae.classification.run_files import CONFIG, FOLDER
from crossmae.classification.train.config import FinetuneConfig
from crossmae.data.pixels import read_pixels
from crossmae.data.sources import Source, open_named
from crossmae.errors import UserError
from crossmae.files import check_writable, make_folder, sha256
from crossmae.training.devices import choose_precision, open_autocast, open_device
from crossmae.training.processes import Ranks, find_ranks, process_group
from crossmae.training.versions import versions

log = logging.getLogger(__name__)


def write_results(
    folder: Path,
    predictions: Predictions,
    scores: Scores,
    source: Source,
    class_names: Sequence[str],
    about: Mapping[str, Any],
    hardest: int,
) -> None:
    """Write everything that people look at after an evaluation.

    Args:
        folder: made if need be; files of an earlier evaluation are replaced.
        predictions, scores: of `source`.
        class_names: to show.
        about: facts for evaluation.json; `in_chans` and `bit_depth` are how images are read.
        hardest: pictures of what is most wrong.
    """
    make_folder(folder, "output_dir")
    facts = {**about, "samples": source.description, "versions": versions()}
    write_evaluation(folder, predictions, scores, class_names, source.name, facts)
    channels, bit_depth = int(about["in_chans"]), int(about["bit_depth"])
    write_hardest(
        folder,
        predictions,
        lambda index: read_pixels(source, index, channels, bit_depth),
        class_names,
        source.name,
        hardest,
    )


def evaluate_only(config: FinetuneConfig, weights: str | Path, force: bool = False) -> Scores:
    """Evaluate a classifier on data.val, and write the results and their page; no data to train on is needed.

    Model, classes and pixels are those of the file. Of the config count data.val and data.val_root, output_dir,
    evaluation, runtime, data.workers and optim.batch_size.

    Args:
        weights: a classifier's file, or the folder of a run, whose best weights are taken.
        force: replace the results of an earlier call.

    Raises:
        UserError: no classifier, results in output_dir already, no data.val, labels that the classifier does not know,
            or a broken image.
    """
    ranks = find_ranks()
    device = open_device(config.runtime.device, "runtime.device", ranks.local_rank, ranks.world_size)
    precision = choose_precision(config.runtime.precision, device)
    with process_group(ranks, device):
        try:
            ranks.together(lambda: check_folder(config, force))
            return _evaluate_only(config, weights, device, precision, ranks)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the GPU's memory is full ({str(error).splitlines()[0]}); lower evaluation.batch_size"
            ) from error


def _evaluate_only(
    config: FinetuneConfig, weights: str | Path, device: torch.device, precision: str, ranks: Ranks
) -> Scores:
    classifier = ranks.together(lambda: load_classifier(weights, config.evaluation.img_size))
    for sentence in classifier.assumed:
        log.info("assumed: %s", sentence)
    source = ranks.together(lambda: open_named(config.data.val, "data.val", config.data.val_root))
    data = ranks.together(lambda: evaluation_set(config, classifier, source))
    if ranks.is_main:
        warn_of_absent(data.views.targets, "data.val", classifier.classes)
    autocast = open_autocast(precision, device)
    predictions = evaluate(classifier.model.to(device), data, device, autocast, ranks)
    scores = score(predictions, len(classifier.classes))
    if ranks.is_main:
        about = {
            "weights": str(classifier.path),
            "weights_sha256": sha256(classifier.path),
            "assumed": list(classifier.assumed),
            "data": config.data.val,
            "data_root": str(config.data.val_root) if config.data.val_root else None,
            "in_chans": classifier.architecture.in_chans,
            "bit_depth": classifier.bit_depth,
            "img_size": list(classifier.architecture.img_size),
            "crop_pct": data.views.crop_pct,
            "precision": precision,
        }
        folder = config.output_dir / FOLDER
        write_results(folder, predictions, scores, source, classifier.class_names, about, config.evaluation.hardest)
        log.info("report: %s", write_report(config.output_dir))
    ranks.wait()
    return scores


def check_folder(config: FinetuneConfig, force: bool) -> None:
    """Make sure that there is something to evaluate on, and that nothing is replaced by it.

    Raises:
        UserError: there is not, or something would be.
    """
    folder = config.output_dir
    if config.data.val is None:
        raise UserError("missing key 'data.val': the labelled images to evaluate on; pass data.val=...")
    check_writable(folder, "output_dir")
    if (folder / CONFIG).exists():
        raise UserError(
            f"output_dir: {folder} holds a run, whose own evaluation would be replaced; name another folder"
        )
    if (folder / FOLDER).exists() and not force:
        raise UserError(f"output_dir: {folder} holds an evaluation; name another folder, or replace it with --force")


def evaluation_set(config: FinetuneConfig, classifier: Classifier, source: Source) -> EvaluationSet:
    """The images of data.val as a classifier sees them, under its classes."""
    separator = config.data.separator
    if classifier.multi_label and separator is None:
        raise UserError("data.separator: the classifier gives several labels per image; say what stands between them")
    if not classifier.multi_label and separator is not None:
        raise UserError("data.separator: the classifier gives one label per image; leave it out")
    targets = label_targets(source, "data.val", classifier.classes, separator)
    shape = classifier.architecture
    crop_pct = config.evaluation.crop_pct or classifier.crop_pct
    return EvaluationSet(
        source,
        "data.val",
        CentreViews(source, targets, shape.img_size, crop_pct, shape.in_chans, classifier.bit_depth),
        classifier.mean,
        classifier.std,
        config.evaluation.batch_size or config.optim.batch_size,
        config.data.workers,
        config.evaluation.features,
    )
