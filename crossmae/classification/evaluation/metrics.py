"""How good a classifier's answers are, from the answers alone.

`Predictions` holds what every number needs of every sample, each of which counts once: `merge` puts the parts of
several processes together, `score` counts. What the model itself answers may differ between batches in the last digit.
N samples, C classes, K = min(5, C) best classes of a sample. All shares are of 1, not percent; NaN is "not defined" for
lack of samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, confusion_matrix
from torch import Tensor

from crossmae.classification.evaluation.intervals import wilson
from crossmae.errors import UserError

BINS = 15  # of the calibration error, as in arXiv 1706.04599
THRESHOLD = 0.5  # score from which a class counts as predicted where an image can have several
MOST_NAMED = 5  # samples that an error message lists


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a classifier answered for a data set, one row per sample, rows by rising index; all tensors on the CPU.

    Attributes:
        indices: (N,) int64 positions in the source, each exactly once.
        labels: (N,) int64, or (N, C) bool where an image can have several labels.
        losses: (N,) float32 cross entropy, or mean binary cross entropy, of each sample.
        top_classes: (N, K) int64, best first.
        top_scores: (N, K) float32 probabilities of these: softmax, or sigmoid for several labels.
        scores: (N, C) float32, kept for several labels only.
        features: (M, E) float32 pooled features, before the head, of the samples `feature_indices`.
        feature_indices: (M,) int64, rising.
    """

    indices: Tensor
    labels: Tensor
    losses: Tensor
    top_classes: Tensor
    top_scores: Tensor
    scores: Tensor | None = None
    features: Tensor | None = None
    feature_indices: Tensor | None = None

    @property
    def multi_label(self) -> bool:
        """Whether an image can have several labels, or none."""
        return self.labels.ndim == 2

    @property
    def correct(self) -> Tensor:
        """(N,) bool: the best class is the label; of several, all labels are predicted and no other class is."""
        if self.scores is None:
            return self.top_classes[:, 0] == self.labels
        return ((self.scores >= THRESHOLD) == self.labels).all(dim=1)


def merge(parts: Sequence[Predictions], count: int) -> Predictions:
    """The predictions of all processes as one: the same, to the bit, as of a single process.

    Args:
        parts: of each process, rows in any order; a process may have had no samples.
        count: samples of the data set; their indices are 0 .. count - 1.

    Raises:
        ValueError: a sample is missing, there twice, or not of the data set; names it. The same for features, except
            that they may be missing.
    """
    filled = [part for part in parts if len(part.indices)]
    indices = _cat([part.indices for part in filled])
    _check_indices(indices, count, "predictions")
    missing = torch.bincount(indices, minlength=count) == 0
    if missing.any():
        raise ValueError(f"predictions: no row for {_samples(missing.nonzero()[:, 0])} of {count}")
    if not filled:
        raise ValueError("predictions: a data set without samples")
    order = indices.argsort()

    def rows(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in filled])[order]

    features, feature_indices = _merge_features(filled, count)
    return Predictions(
        indices=indices[order],
        labels=rows("labels"),
        losses=rows("losses"),
        top_classes=rows("top_classes"),
        top_scores=rows("top_scores"),
        scores=None if filled[0].scores is None else rows("scores"),
        features=features,
        feature_indices=feature_indices,
    )


def _merge_features(parts: Sequence[Predictions], count: int) -> tuple[Tensor | None, Tensor | None]:
    kept = [
        (part.features, part.feature_indices)
        for part in parts
        if part.features is not None and part.feature_indices is not None and len(part.features)
    ]
    if not kept:
        return None, None
    indices = _cat([its_indices for _, its_indices in kept])
    _check_indices(indices, count, "features")
    order = indices.argsort()
    return torch.cat([features for features, _ in kept])[order], indices[order]


def _cat(indices: Sequence[Tensor]) -> Tensor:
    return torch.cat([torch.empty(0, dtype=torch.int64), *indices])


def _check_indices(indices: Tensor, count: int, what: str) -> None:
    outside = indices[(indices < 0) | (indices >= count)]
    if len(outside):
        raise ValueError(f"{what}: a row for {_samples(outside.unique())}, but the data set has {count}")
    doubled = torch.bincount(indices, minlength=count) > 1
    if doubled.any():
        raise ValueError(f"{what}: more than one row for {_samples(doubled.nonzero()[:, 0])}; each counts once")


def _samples(indices: Tensor) -> str:
    """ "sample 3", "samples 3, 4, 8, 9, 12 and 40 more"."""
    named, more = ", ".join(map(str, indices[:MOST_NAMED].tolist())), len(indices) - MOST_NAMED
    return f"sample{'s' if len(indices) > 1 else ''} {named}" + (f" and {more} more" if more > 0 else "")


@dataclass(frozen=True)
class ClassScore:
    """How one class fared.

    Attributes:
        samples: that have it as label.
        predictions: samples for which it was predicted: as the best class; for several labels, with a score of at
            least 0.5.
        recall: share of its samples for which it was predicted; with one label per image this is its accuracy.
        precision: share of its predictions that are right.
        f1: their harmonic mean, 0 where it was only missed or only predicted wrongly.
        ap: average precision; None with one label per image.
    """

    samples: int
    predictions: int
    recall: float
    precision: float
    f1: float
    ap: float | None = None


@dataclass(frozen=True)
class Bin:
    """The samples whose top-1 probability is over `low` and at most `high`, with its mean and their accuracy."""

    low: float
    high: float
    samples: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class ConfusedPair:
    """So many samples of one class that were taken for another, and which share they are of the true class."""

    true: int
    predicted: int
    count: int
    share: float


@dataclass(frozen=True, eq=False)
class Scores:
    """What `score` counted; None where it does not apply to this kind of labels.

    Attributes:
        samples: all, N.
        loss: mean over the samples.
        classes: one for each class.
        top1: share of samples whose best class is the label.
        top1_interval: 95% interval of `top1` (Wilson), for samples drawn independently.
        top5: share of samples whose label is among the K best classes; None where there are no others.
        balanced_accuracy: mean of the classes' accuracies, without the classes that have no samples.
        ece: expected calibration error, from `bins`.
        bins: 15 of equal width.
        confusion: (C, C) samples, true class by predicted class.
        mean_ap: mean average precision, without the classes that have no samples.
        micro_f1: F1 of all pairs of sample and class, at a score of 0.5.
        macro_f1: mean of the classes' F1, without the classes that are neither in labels nor in predictions.
    """

    samples: int
    loss: float
    classes: tuple[ClassScore, ...]
    top1: float | None = None
    top1_interval: tuple[float, float] | None = None
    top5: float | None = None
    balanced_accuracy: float | None = None
    ece: float | None = None
    bins: tuple[Bin, ...] = ()
    confusion: NDArray[np.int64] | None = None
    mean_ap: float | None = None
    micro_f1: float | None = None
    macro_f1: float | None = None

    def numbers(self) -> dict[str, float]:
        """The numbers of the whole data set by their names above, those that apply."""
        names = ("loss", "top1", "top5", "balanced_accuracy", "ece", "mean_ap", "micro_f1", "macro_f1")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def most_confused(self, limit: int) -> list[ConfusedPair]:
        """The most frequent confusions, at most `limit`; equal counts in order of the classes."""
        if self.confusion is None:
            return []
        wrong = self.confusion.copy()
        np.fill_diagonal(wrong, 0)
        places = np.argwhere(wrong)
        order = np.argsort(-wrong[tuple(places.T)], kind="stable")[:limit]
        return [
            ConfusedPair(true, predicted, count := int(wrong[true, predicted]), count / self.classes[true].samples)
            for true, predicted in places[order].tolist()
        ]


def score(predictions: Predictions, num_classes: int) -> Scores:
    """All numbers that these predictions give.

    Raises:
        ValueError: no samples, a label or a predicted class outside 0 .. num_classes - 1, or shapes that do not fit.
        UserError: a loss or a probability is not finite; names the sample.
    """
    _check(predictions, num_classes)
    # By numpy, because torch's sums depend on the number of threads.
    loss = float(predictions.losses.double().numpy().mean())
    score_labels = _score_several_labels if predictions.multi_label else _score_one_label
    return score_labels(predictions, num_classes, loss)


def _score_one_label(predictions: Predictions, num_classes: int, loss: float) -> Scores:
    labels, top = predictions.labels.numpy(), predictions.top_classes.numpy()  # (N,), (N, K)
    correct = predictions.correct.numpy()
    confusion = confusion_matrix(labels, top[:, 0], labels=np.arange(num_classes)).astype(np.int64)
    classes = _class_scores(np.diagonal(confusion), confusion.sum(axis=1), confusion.sum(axis=0))
    bins = calibration_bins(predictions.top_scores[:, 0].double().numpy(), correct)
    return Scores(
        samples=len(labels),
        loss=loss,
        classes=classes,
        top1=float(correct.mean()),
        top1_interval=wilson(int(correct.sum()), len(labels)),
        top5=float((top == labels[:, None]).any(axis=1).mean()) if num_classes > top.shape[1] else None,
        balanced_accuracy=_mean([one.recall for one in classes]),
        ece=calibration_error(bins),
        bins=bins,
        confusion=confusion,
    )


def _score_several_labels(predictions: Predictions, num_classes: int, loss: float) -> Scores:
    assert predictions.scores is not None  # checked
    labels, scores = predictions.labels.numpy(), predictions.scores.numpy()  # (N, C)
    predicted = scores >= THRESHOLD
    hits, samples, guesses = ((labels & predicted).sum(axis=0), labels.sum(axis=0), predicted.sum(axis=0))
    ap = [
        float(average_precision_score(labels[:, index], scores[:, index])) if samples[index] else math.nan
        for index in range(num_classes)
    ]
    classes = _class_scores(hits, samples, guesses, ap)
    return Scores(
        samples=len(labels),
        loss=loss,
        classes=classes,
        mean_ap=_mean(ap),
        micro_f1=_ratio(2 * hits.sum(), samples.sum() + guesses.sum()),
        macro_f1=_mean([one.f1 for one in classes]),
    )


def calibration_bins(confidence: NDArray[np.float64], correct: NDArray[np.bool_]) -> tuple[Bin, ...]:
    """Samples by their top-1 probability (N,), in bins (0, 1/15], (1/15, 2/15], ...: arXiv 1706.04599, section 2."""
    edges = np.arange(BINS + 1) / BINS
    places = np.digitize(confidence, edges[1:-1], right=True)
    bins = []
    for place in range(BINS):
        inside = places == place
        count = int(inside.sum())
        sums = float(confidence[inside].sum()), int(correct[inside].sum())
        bins.append(Bin(float(edges[place]), float(edges[place + 1]), count, *(_ratio(one, count) for one in sums)))
    return tuple(bins)


def calibration_error(bins: Sequence[Bin]) -> float:
    """Expected calibration error: mean gap between accuracy and confidence, bins weighted by their samples.

    arXiv 1706.04599, equation 3.
    """
    gaps = sum(one.samples * abs(one.accuracy - one.confidence) for one in bins if one.samples)
    return _ratio(gaps, sum(one.samples for one in bins))


def _class_scores(
    hits: NDArray[np.int64], samples: NDArray[np.int64], predictions: NDArray[np.int64], ap: Sequence[float] = ()
) -> tuple[ClassScore, ...]:
    """Of each class: samples for which it was predicted rightly, that have it, and for which it was predicted."""
    return tuple(
        ClassScore(has, said, _ratio(hit, has), _ratio(hit, said), _ratio(2 * hit, has + said), *ap[index : index + 1])
        for index, (hit, has, said) in enumerate(
            zip(hits.tolist(), samples.tolist(), predictions.tolist(), strict=True)
        )
    )


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else math.nan


def _mean(values: Sequence[float]) -> float:
    """Mean of what is defined."""
    defined = [value for value in values if not math.isnan(value)]
    return _ratio(math.fsum(defined), len(defined))


def _check(predictions: Predictions, num_classes: int) -> None:
    count, best = len(predictions.indices), min(5, num_classes)
    if count == 0:
        raise ValueError("predictions: no samples to score")
    shapes = {"losses": (count,), "top_classes": (count, best), "top_scores": (count, best)}
    shapes |= {"labels": (count, num_classes) if predictions.multi_label else (count,)}
    shapes |= {"scores": (count, num_classes)} if predictions.multi_label else {}
    for name, shape in shapes.items():
        value: Tensor | None = getattr(predictions, name)
        if value is None or value.shape != shape:
            got = None if value is None else tuple(value.shape)
            raise ValueError(f"predictions: {name} must be {shape} for {num_classes} classes, got {got}")
    for name in ("top_classes",) if predictions.multi_label else ("labels", "top_classes"):
        value = getattr(predictions, name)
        low, high = int(value.min()), int(value.max())
        if low < 0 or high >= num_classes:
            raise ValueError(f"predictions: {name} must be 0 .. {num_classes - 1}, got {low} .. {high}")
    _check_finite(predictions)


def _check_finite(predictions: Predictions) -> None:
    finite = predictions.losses.isfinite() & predictions.top_scores.isfinite().all(dim=1)
    if predictions.scores is not None:
        finite &= predictions.scores.isfinite().all(dim=1)
    if not finite.all():
        where = _samples(predictions.indices[~finite])
        raise UserError(
            f"the model's output for {where} is not finite (NaN or infinite): its weights are damaged, its training "
            "diverged, or its numbers overflow in fp16 (then evaluate in bf16 or fp32)"
        )
