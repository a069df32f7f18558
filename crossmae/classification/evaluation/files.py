"""Files of an evaluation, written while the images can still be read.

    FOLDER/evaluation.json        numbers, classes, most frequent confusions; written after the other files
    FOLDER/per_class.csv          the classes of evaluation.json as a table
    FOLDER/predictions.csv        a row per sample: label, loss, best classes with their probabilities
    FOLDER/confusion.csv, .png    number of samples by true class (row) and predicted class (column)
    FOLDER/calibration.png        accuracy by probability
    FOLDER/features.safetensors   `features` (M, E) of some samples, with their `labels` and `indices`
    FOLDER/embedding.png          a map of these features
    FOLDER/hardest/01.jpg ...     wrongly classified images, highest loss first; .png if a small image was enlarged
    FOLDER/hardest/hardest.json   their true and predicted classes; written after all pictures

If an image can have several labels, the confusion and calibration files are missing. Without features, the files of
features and embedding are missing. Shares are fractions of 1, not percent. Values that are undefined for lack of
samples are null in JSON and empty in tables.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from crossmae.classification import LABEL_THRESHOLD
from crossmae.classification.evaluation.figures import calibration_figure, confusion_figure, map_figure
from crossmae.classification.evaluation.metrics import ClassificationScores, Predictions
from crossmae.data.pixels import to_tensor, to_unit_range
from crossmae.errors import UserError
from crossmae.files import make_folder, stream_text, sync_folder, temporary_folder, write_atomically, write_json
from crossmae.pretraining.figures import DARK, to_display, whole_scale
from crossmae.reports.figures import save_figure

EVALUATION, PER_CLASS_CSV, PREDICTIONS_CSV = "evaluation.json", "per_class.csv", "predictions.csv"
CONFUSION_CSV, CONFUSION_PNG, CALIBRATION = "confusion.csv", "confusion.png", "calibration.png"
FEATURES, EMBEDDING = "features.safetensors", "embedding.png"
FILES = (EVALUATION, CONFUSION_CSV, CONFUSION_PNG, PER_CLASS_CSV, PREDICTIONS_CSV, CALIBRATION, FEATURES, EMBEDDING)

RECORDED_PAIRS = 20  # most frequent confusions in evaluation.json
DIGITS = 6  # after the decimal point
BETWEEN_LABELS = "; "


def write_evaluation(
    folder: Path,
    predictions: Predictions,
    scores: ClassificationScores,
    class_names: Sequence[str],
    sample_names: Callable[[int], str],
    about: Mapping[str, Any],
) -> None:
    """Write the files of an evaluation and replace an earlier evaluation.

    The earlier evaluation stays until all new files are complete. `sample_names` returns the name of a sample by its
    index in the source. `about` has JSON facts about weights and data, copied to evaluation.json.

    Raises:
        ValueError: `about` has a NaN.
        UserError: the folder is not writable.
    """
    make_folder(folder, "output_dir")
    with temporary_folder(folder / EVALUATION) as new:
        classes = _class_rows(scores, class_names)
        _write_csv(new / PER_CLASS_CSV, [list(classes[0]), *(list(row.values()) for row in classes)])
        _write_csv(new / PREDICTIONS_CSV, _prediction_rows(predictions, class_names, sample_names))
        if scores.confusion is not None:
            counts = zip(class_names, scores.confusion.tolist(), strict=True)
            header = ["true \\ predicted", *class_names]
            _write_csv(new / CONFUSION_CSV, [header, *([name, *row] for name, row in counts)])
            with mpl.rc_context({"savefig.bbox": "tight"}):
                save_figure(confusion_figure(scores.confusion, class_names), new / CONFUSION_PNG)
            save_figure(calibration_figure(scores.bins), new / CALIBRATION)
        _write_features(new, predictions, class_names)
        write_json(new / EVALUATION, _record(scores, classes) | {"about": dict(about)})
        (folder / EVALUATION).unlink(missing_ok=True)  # replaced last
        for name in reversed(FILES):
            if (new / name).exists():
                os.replace(new / name, folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
        sync_folder(folder)


def _record(scores: ClassificationScores, classes: list[dict[str, Any]]) -> dict[str, Any]:
    """Build the content of evaluation.json, most important values first."""
    confused = [
        {
            "true": classes[true]["name"],
            "predicted": classes[predicted]["name"],
            "count": count,
            "share": _number(count / scores.classes[true].samples),
        }
        for true, predicted, count in scores.most_confused(RECORDED_PAIRS)
    ]
    record = {
        "samples": scores.samples,
        "numbers": {name: _number(value) for name, value in scores.numbers().items()},
        "top1_interval": scores.top1_interval and [_number(end) for end in scores.top1_interval],
        "classes": classes,
        "most_confused": confused,
        "calibration": [{key: _number(value) for key, value in asdict(one).items()} for one in scores.bins],
    }
    return {key: value for key, value in record.items() if value not in (None, [])}


def _class_rows(scores: ClassificationScores, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Build a row per class, with average precision for several labels."""
    return [
        {"name": name} | {key: _number(value) for key, value in asdict(one).items() if value is not None}
        for name, one in zip(class_names, scores.classes, strict=True)
    ]


def _number(value: float) -> float | None:
    """Round a number to `DIGITS` digits. Return None for NaN."""
    return None if math.isnan(value) else round(value, DIGITS)


def _prediction_rows(
    predictions: Predictions, class_names: Sequence[str], sample_names: Callable[[int], str]
) -> Iterator[list[Any]]:
    best = range(1, predictions.top_classes.shape[1] + 1)
    yield ["name", "label", "loss", "correct", *(column for k in best for column in (f"top{k}", f"score{k}"))]
    top = predictions.top_classes, predictions.top_scores
    columns = (predictions.indices, predictions.losses, predictions.correct.int(), *top)
    for *row, label in zip(*(column.tolist() for column in columns), predictions.labels, strict=True):
        index, loss, correct, classes, shares = row
        true = label.nonzero()[:, 0].tolist() if predictions.multi_label else [int(label)]
        ranked = [cell for at, share in zip(classes, shares, strict=True) for cell in (class_names[at], _fixed(share))]
        yield [sample_names(index), BETWEEN_LABELS.join(class_names[at] for at in true), _fixed(loss), correct, *ranked]


def _fixed(value: float) -> str:
    return f"{value:.{DIGITS}f}"


def _write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    stream_text(path, lambda file: csv.writer(file, lineterminator="\n").writerows(rows))


def _write_features(folder: Path, predictions: Predictions, class_names: Sequence[str]) -> None:
    """Write the kept features and, if there are enough, their map."""
    features, indices = predictions.features, predictions.feature_indices
    if features is None or indices is None:
        return
    rows = torch.searchsorted(predictions.indices, indices.contiguous())
    labels = predictions.labels[rows]
    if len(features) > 2:
        title = f"Features of {len(features):,} of {len(predictions.indices):,} images"
        shown = None if predictions.multi_label else labels.numpy()
        figure = map_figure(features.numpy(), shown, ~predictions.correct[rows].numpy(), class_names, title)
        save_figure(figure, folder / EMBEDDING)
    tensors = {"features": features.contiguous(), "labels": labels, "indices": indices.contiguous()}
    write_atomically(folder / FEATURES, lambda temporary: save_file(tensors, temporary))


HARDEST, HARDEST_RECORD = "hardest", "hardest.json"
JPEG: dict[str, Any] = {"format": "JPEG", "quality": 88, "subsampling": 0}
PICTURE_SIDE = 224  # approximate length of the longer side of a picture, in pixels


def write_hardest(
    folder: Path,
    predictions: Predictions,
    read: Callable[[int], Image.Image | Tensor],
    class_names: Sequence[str],
    sample_names: Callable[[int], str],
    most: int = 24,
) -> None:
    """Replace the pictures of the hardest images, at most `most`.

    `read` returns an image by index.
    """
    target = folder / HARDEST
    make_folder(target, "hardest images")
    for old in [target / HARDEST_RECORD, *target.glob("[0-9]*.jpg"), *target.glob("[0-9]*.png")]:
        old.unlink(missing_ok=True)
    wrong = (~predictions.correct).nonzero()[:, 0]
    order = predictions.losses[wrong].argsort(descending=True, stable=True)[:most]
    entries = []
    for number, row in enumerate(wrong[order].tolist(), start=1):
        index = int(predictions.indices[row])
        entry = {"name": sample_names(index), "index": index, **_verdict(predictions, row, class_names)}
        try:
            picture, enlarged = display_picture(read(index))
            entry["picture"] = f"{number:02d}.{'png' if enlarged else 'jpg'}"
            kind = {"format": "PNG", "optimize": True} if enlarged else JPEG
            write_atomically(target / entry["picture"], partial(picture.save, **kind))
        except UserError as error:
            entry |= {"picture": None, "fault": str(error)}
        entries.append(entry)
    write_json(target / HARDEST_RECORD, {"wrong": len(wrong), "images": entries})


def _verdict(predictions: Predictions, row: int, class_names: Sequence[str]) -> dict[str, Any]:
    loss = float(predictions.losses[row])
    if predictions.scores is None:
        best = int(predictions.top_classes[row, 0])
        # The cross entropy is the negative logarithm of the probability of the true class.
        true = [[class_names[int(predictions.labels[row])], math.exp(-loss)]]
        return {"loss": loss, "true": true, "predicted": [[class_names[best], float(predictions.top_scores[row, 0])]]}
    scores = predictions.scores[row]
    order = scores.argsort(descending=True, stable=True).tolist()
    named = [[class_names[at], float(scores[at])] for at in order]
    true = [one for at, one in zip(order, named, strict=True) if predictions.labels[row, at]]
    return {"loss": loss, "true": true, "predicted": [one for one in named if one[1] >= LABEL_THRESHOLD]}


def display_picture(pixels: Image.Image | Tensor) -> tuple[Image.Image, bool]:
    """Convert any image to RGB with sides near PICTURE_SIDE pixels.

    Images of 16 bits that use little of their range, such as 12-bit data, are brightened. Returns the picture, and True
    if it was enlarged. The scale of an enlargement is an integer.
    """
    tensor = to_tensor(pixels)
    values = to_display(to_unit_range(tensor)[None])[0]  # (3, H, W)
    brightest = float(values.max())
    if tensor.is_floating_point() and 0 < brightest < DARK:
        values = values / brightest
    picture = Image.fromarray(torch.round(values * 255).byte().permute(1, 2, 0).contiguous().numpy())
    scale = whole_scale(picture.height, picture.width, PICTURE_SIDE)
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    how = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    return picture.resize(size, how), scale > 1
