"""What an evaluation leaves in its folder.

    FOLDER/evaluation.json        numbers, classes, most frequent confusions; written last: the rest is complete then
    FOLDER/per_class.csv          the classes of evaluation.json as a table
    FOLDER/predictions.csv        a row per sample: label, loss, best classes with their probabilities
    FOLDER/confusion.csv, .png    samples, true class (row) by predicted class (column)
    FOLDER/calibration.png        whether probabilities mean what they say
    FOLDER/features.safetensors   `features` (M, E) of some samples, their `labels` and `indices`

Where an image can have several labels there is no confusion and no calibration; without features, no file of them.
Shares are of 1, not percent. What is not defined for lack of samples is null in JSON and empty in tables.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file

from crossmae.classification.evaluation.figures import calibration_figure, confusion_figure
from crossmae.classification.evaluation.metrics import Predictions, Scores
from crossmae.files import ODD_BYTES, make_folder, sync_folder, write_atomically, write_json
from crossmae.reports.figures import save_figure

EVALUATION = "evaluation.json"
CONFUSION_CSV, CONFUSION_PNG = "confusion.csv", "confusion.png"
PER_CLASS = "per_class.csv"
PREDICTIONS = "predictions.csv"
CALIBRATION = "calibration.png"
FEATURES = "features.safetensors"
FILES = (EVALUATION, CONFUSION_CSV, CONFUSION_PNG, PER_CLASS, PREDICTIONS, CALIBRATION, FEATURES)

MOST_PAIRS = 20  # confusions in evaluation.json
DIGITS = 6  # after the decimal point
BETWEEN_LABELS = "; "


def write_evaluation(
    folder: Path,
    predictions: Predictions,
    scores: Scores,
    class_names: Sequence[str],
    sample_names: Callable[[int], str],
    about: Mapping[str, Any],
) -> None:
    """Write the files of an evaluation; those of an earlier one go, but only once all new ones are complete.

    Args:
        folder: made if need be.
        predictions: of the whole data set.
        scores: of these, by `score`.
        class_names: C names to show.
        sample_names: the name of a sample by its index in the source.
        about: what was evaluated on what, kept in evaluation.json as it is; has to be JSON.

    Raises:
        ValueError: not as many names as classes, or NaN in `about`.
        UserError: the folder can not be written in.
    """
    if len(class_names) != len(scores.classes):
        raise ValueError(f"class_names: expected {len(scores.classes)} names, got {len(class_names)}")
    make_folder(folder, "output_dir")
    with TemporaryDirectory(prefix=".evaluation-", dir=folder) as name:
        new = Path(name)
        _write_tables(new, predictions, scores, class_names, sample_names)
        _write_pictures(new, scores, class_names)
        _write_features(new, predictions)
        write_json(new / EVALUATION, evaluation_record(scores, class_names, about))
        _replace(folder, new)


def evaluation_record(scores: Scores, class_names: Sequence[str], about: Mapping[str, Any]) -> dict[str, Any]:
    """Content of evaluation.json, what matters most first."""
    interval = scores.top1_interval
    record: dict[str, Any] = {
        "samples": scores.samples,
        "numbers": {name: _number(value) for name, value in scores.numbers().items()},
        "top1_interval": None if interval is None else [_number(end) for end in interval],
        "classes": _class_rows(scores, class_names),
        "most_confused": [
            {
                "true": class_names[pair.true],
                "predicted": class_names[pair.predicted],
                "count": pair.count,
                "share": _number(pair.share),
            }
            for pair in scores.most_confused(MOST_PAIRS)
        ],
        "calibration": [{key: _number(value) for key, value in asdict(one).items()} for one in scores.bins],
    }
    return {key: value for key, value in record.items() if value not in (None, [])} | {"about": dict(about)}


def _class_rows(scores: Scores, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Average precision stands only where it is defined for this kind of labels."""
    rows = []
    for name, one in zip(class_names, scores.classes, strict=True):
        values = {key: _number(value) for key, value in asdict(one).items() if key != "ap"}
        rows.append({"name": name} | values | ({} if one.ap is None else {"ap": _number(one.ap)}))
    return rows


def _number(value: float) -> float | None:
    """For people and JSON: few digits, None for NaN; counts stay as they are."""
    if isinstance(value, int):
        return value
    return None if math.isnan(value) else round(value, DIGITS)


def _write_tables(
    folder: Path,
    predictions: Predictions,
    scores: Scores,
    class_names: Sequence[str],
    sample_names: Callable[[int], str],
) -> None:
    classes = _class_rows(scores, class_names)
    _write_csv(folder / PER_CLASS, [list(classes[0]), *(list(row.values()) for row in classes)])
    _write_csv(folder / PREDICTIONS, _prediction_rows(predictions, class_names, sample_names))
    if scores.confusion is not None:
        rows = zip(class_names, scores.confusion.tolist(), strict=True)
        _write_csv(folder / CONFUSION_CSV, [["true \\ predicted", *class_names], *([name, *row] for name, row in rows)])


def _prediction_rows(
    predictions: Predictions, class_names: Sequence[str], sample_names: Callable[[int], str]
) -> Iterator[list[Any]]:
    best = range(1, predictions.top_classes.shape[1] + 1)
    yield ["name", "label", "loss", "correct", *(column for k in best for column in (f"top{k}", f"score{k}"))]
    columns = (predictions.indices, predictions.losses, predictions.correct.int())
    top = (predictions.top_classes, predictions.top_scores)
    labels = _label_names(predictions, class_names)
    rows = zip(*(column.tolist() for column in (*columns, *top)), labels, strict=True)
    for index, loss, correct, classes, shares, label in rows:
        ranked = [cell for at, share in zip(classes, shares, strict=True) for cell in (class_names[at], _fixed(share))]
        yield [sample_names(index), label, _fixed(loss), correct, *ranked]


def _label_names(predictions: Predictions, class_names: Sequence[str]) -> Iterator[str]:
    """Of each sample; several are joined."""
    if not predictions.multi_label:
        yield from (class_names[label] for label in predictions.labels.tolist())
        return
    for row in predictions.labels:
        yield BETWEEN_LABELS.join(class_names[label] for label in row.nonzero()[:, 0].tolist())


def _fixed(value: float) -> str:
    return f"{value:.{DIGITS}f}"


def _write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    def write(temporary: Path) -> None:
        with open(temporary, "w", encoding="utf-8", errors=ODD_BYTES, newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)

    write_atomically(path, write)


def _write_pictures(folder: Path, scores: Scores, class_names: Sequence[str]) -> None:
    if scores.confusion is not None:
        save_figure(confusion_figure(scores.confusion, class_names), folder / CONFUSION_PNG)
        save_figure(calibration_figure(scores.bins), folder / CALIBRATION)


def _write_features(folder: Path, predictions: Predictions) -> None:
    features, indices = predictions.features, predictions.feature_indices
    if features is None or indices is None:
        return
    indices = indices.contiguous()
    labels = predictions.labels[torch.searchsorted(predictions.indices, indices)]
    tensors = {"features": features.contiguous(), "labels": labels, "indices": indices}
    write_atomically(folder / FEATURES, lambda temporary: save_file(tensors, temporary))


def _replace(folder: Path, new: Path) -> None:
    """Put new files in place of old ones; while that is not done, there is no evaluation.json."""
    (folder / EVALUATION).unlink(missing_ok=True)
    for name in reversed(FILES):
        if (new / name).exists():
            os.replace(new / name, folder / name)
        else:
            (folder / name).unlink(missing_ok=True)
    sync_folder(folder)
