"""Classification metrics from predictions. Each sample is counted exactly once.

Shapes: N samples, C classes, K = min(5, C) best classes of a sample. All shares are fractions of 1, not percent. NaN
means undefined for lack of samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crossmae.classification import LABEL_THRESHOLD
from crossmae.errors import UserError, shorten

BINS = 15  # bins of the calibration error, as in arXiv 1706.04599
CONFIDENCE = 0.95  # level of every interval


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions for a data set, on the CPU, one row per sample, sorted by index.

    Attributes:
        indices: (N,) int64 positions in the source, each exactly once.
        labels: (N,) int64, or (N, C) bool where an image can have several labels.
        losses: (N,) float32 cross entropy, or mean binary cross entropy, of each sample.
        top_classes: (N, K) int64, best first.
        top_scores: (N, K) float32 probabilities of `top_classes`: softmax, or sigmoid for several labels.
        scores: (N, C) float32 probabilities of all classes, kept for several labels only.
        features: (M, E) float32 inputs of the head for the samples `feature_indices` (M,) int64, in rising order.
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
        """True if an image can have several labels, or no labels."""
        return self.labels.ndim == 2

    @property
    def correct(self) -> Tensor:
        """Rows (N,) bool: True if the predicted classes are exactly the labels."""
        if self.scores is None:
            return self.top_classes[:, 0] == self.labels
        return ((self.scores >= LABEL_THRESHOLD) == self.labels).all(dim=1)


def merge(parts: Sequence[Predictions], count: int) -> Predictions:
    """Merge the predictions of all processes.

    The result is bit-identical to the predictions of one process.

    Args:
        parts: predictions of each process, with rows in any order. A process may have no samples.
        count: number of samples in the data set. The indices are 0 .. count - 1.

    Raises:
        ValueError: the data set is empty, or a sample has no row or several rows.
    """
    filled = [part for part in parts if len(part.indices)]
    indices = torch.cat([torch.empty(0, dtype=torch.int64), *(part.indices for part in filled)])
    order = indices.argsort()
    if not count or not torch.equal(indices[order], torch.arange(count)):
        raise ValueError(f"predictions: {len(indices)} rows for {count} samples. Give exactly one row per sample.")

    def rows(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in filled])[order]

    kept = [part for part in filled if part.features is not None and len(part.features)]
    features, feature_indices = None, None
    if kept:
        feature_indices, places = torch.cat([part.feature_indices for part in kept]).sort()  # type: ignore[misc]
        features = torch.cat([part.features for part in kept])[places]  # type: ignore[misc]
    labels, losses, top_classes, top_scores = map(rows, ("labels", "losses", "top_classes", "top_scores"))
    scores = None if filled[0].scores is None else rows("scores")
    return Predictions(indices[order], labels, losses, top_classes, top_scores, scores, features, feature_indices)


@dataclass(frozen=True)
class Accuracy:
    """Share of correctly classified images with Wilson's 95% interval.

    The interval covers the random choice of images, not of training runs.
    """

    accuracy: float
    low: float
    high: float
    right: int
    images: int


@dataclass(frozen=True)
class Mean:
    """Mean of several runs with Student's 95% interval. The interval is None for one run."""

    mean: float
    low: float | None
    high: float | None
    runs: int


def wilson(right: int, images: int) -> tuple[float, float]:
    """Compute Wilson's 95% interval of a share of independently drawn images."""
    from scipy import stats  # slow import

    interval = stats.binomtest(right, images).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def accuracy_of(predicted: Tensor, labels: Tensor) -> Accuracy:
    """Compare predicted classes (M,) with the true classes (M,)."""
    right, images = int((predicted.cpu() == labels.cpu()).sum()), len(labels)
    return Accuracy(right / images, *wilson(right, images), right, images)


def mean_of(values: Sequence[float]) -> Mean:
    """Average one or more accuracies, with an interval between 0 and 1."""
    found = student_mean(values)
    if found.low is None or found.high is None:
        return found
    return Mean(found.mean, max(found.low, 0.0), min(found.high, 1.0), found.runs)


def student_mean(values: Sequence[float]) -> Mean:
    """Average one or more numbers of any size, such as differences."""
    from scipy import stats  # slow import

    numbers = torch.tensor(values, dtype=torch.float64)
    mean, runs = float(numbers.mean()), len(values)
    if runs == 1:
        return Mean(mean, None, None, 1)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, runs - 1)) * float(numbers.std()) / math.sqrt(runs)
    return Mean(mean, mean - half, mean + half, runs)


@dataclass(frozen=True)
class ClassMetrics:
    """Metrics of one class: counts in labels and predictions, and average precision for several labels."""

    samples: int
    predictions: int
    recall: float
    precision: float
    f1: float
    ap: float | None = None


@dataclass(frozen=True)
class Bin:
    """Samples with a top-1 probability in (low, high]: their mean probability and share of correct predictions."""

    low: float
    high: float
    samples: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class ClassificationScores:
    """Metrics of a data set. Metrics that do not apply to this kind of labels are None.

    Attributes:
        loss: mean loss of all samples.
        classes: metrics of each of the C classes.
        top1_interval: Wilson's 95% interval of `top1`.
        top5: top-5 accuracy, if there are more than 5 classes.
        balanced_accuracy, mean_ap: mean recall and mean average precision of the classes that have samples.
        confusion: (C, C) numbers of samples by true class (row) and predicted class (column).
        micro_f1: F1 over all pairs of sample and class, at a score of 0.5.
        macro_f1: mean F1 of the classes that appear in labels or predictions.
    """

    samples: int
    loss: float
    classes: tuple[ClassMetrics, ...]
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
        """Return the metrics of the whole data set that apply, by name."""
        names = ("loss", "top1", "top5", "balanced_accuracy", "ece", "mean_ap", "micro_f1", "macro_f1")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def most_confused(self, limit: int) -> list[tuple[int, int, int]]:
        """List the most frequent confusions as (true, predicted, samples).

        Confusions of equal frequency are sorted by class.
        """
        if self.confusion is None:
            return []
        wrong = self.confusion.copy()
        np.fill_diagonal(wrong, 0)
        places = np.argwhere(wrong)
        order = np.argsort(-wrong[tuple(places.T)], kind="stable")[:limit]
        return [(true, predicted, int(wrong[true, predicted])) for true, predicted in places[order].tolist()]


def score(predictions: Predictions, num_classes: int) -> ClassificationScores:
    """Compute all metrics of a data set with at least one sample.

    Raises:
        UserError: a loss or a probability is not finite. The error names the samples.
    """
    _check_finite(predictions)
    # numpy computes the sums, because sums of torch depend on the number of threads.
    loss = float(predictions.losses.double().numpy().mean())
    compute = _score_several_labels if predictions.multi_label else _score_one_label
    return compute(predictions, num_classes, loss)


def _score_one_label(predictions: Predictions, num_classes: int, loss: float) -> ClassificationScores:
    from sklearn.metrics import confusion_matrix  # slow import

    labels, top = predictions.labels.numpy(), predictions.top_classes.numpy()  # (N,), (N, K)
    correct = predictions.correct.numpy()
    confusion = confusion_matrix(labels, top[:, 0], labels=np.arange(num_classes)).astype(np.int64)
    classes = _class_metrics(np.diagonal(confusion), confusion.sum(axis=1), confusion.sum(axis=0))
    bins = calibration_bins(predictions.top_scores[:, 0].double().numpy(), correct)
    return ClassificationScores(
        len(labels),
        loss,
        classes,
        top1=float(correct.mean()),
        top1_interval=wilson(int(correct.sum()), len(labels)),
        top5=float((top == labels[:, None]).any(axis=1).mean()) if num_classes > top.shape[1] else None,
        balanced_accuracy=_mean([one.recall for one in classes]),
        ece=calibration_error(bins),
        bins=bins,
        confusion=confusion,
    )


def _score_several_labels(predictions: Predictions, num_classes: int, loss: float) -> ClassificationScores:
    from sklearn.metrics import average_precision_score  # slow import

    assert predictions.scores is not None
    labels, scores = predictions.labels.numpy(), predictions.scores.numpy()  # (N, C)
    predicted = scores >= LABEL_THRESHOLD
    hits, samples, guesses = (labels & predicted).sum(axis=0), labels.sum(axis=0), predicted.sum(axis=0)
    ap = [
        float(average_precision_score(labels[:, index], scores[:, index])) if samples[index] else math.nan
        for index in range(num_classes)
    ]
    classes = _class_metrics(hits, samples, guesses, ap)
    micro_f1, macro_f1 = _ratio(2 * hits.sum(), samples.sum() + guesses.sum()), _mean([one.f1 for one in classes])
    return ClassificationScores(len(labels), loss, classes, mean_ap=_mean(ap), micro_f1=micro_f1, macro_f1=macro_f1)


def calibration_bins(confidence: NDArray[np.float64], correct: NDArray[np.bool_]) -> tuple[Bin, ...]:
    """Sort samples (N,) into bins (0, 1/15], (1/15, 2/15], ... by probability.

    scikit-learn's calibration_curve drops empty bins and counts (arXiv 1706.04599, section 2).
    """
    edges = (np.arange(BINS + 1) / BINS).tolist()
    places = np.digitize(confidence, edges[1:-1], right=True)
    bins = []
    for place, (low, high) in enumerate(pairwise(edges)):
        inside = places == place
        sums = float(confidence[inside].sum()), int(correct[inside].sum())
        bins.append(Bin(low, high, int(inside.sum()), *(_ratio(one, int(inside.sum())) for one in sums)))
    return tuple(bins)


def calibration_error(bins: Sequence[Bin]) -> float:
    """Compute the expected calibration error (arXiv 1706.04599, equation 3)."""
    gaps = sum(one.samples * abs(one.accuracy - one.confidence) for one in bins if one.samples)
    return _ratio(gaps, sum(one.samples for one in bins))


def _class_metrics(
    hits: NDArray[np.int64], samples: NDArray[np.int64], predictions: NDArray[np.int64], ap: Sequence[float | None] = ()
) -> tuple[ClassMetrics, ...]:
    counts = zip(hits.tolist(), samples.tolist(), predictions.tolist(), ap or [None] * len(hits), strict=True)
    return tuple(
        ClassMetrics(has, taken, _ratio(hit, has), _ratio(hit, taken), _ratio(2 * hit, has + taken), own_ap)
        for hit, has, taken, own_ap in counts
    )


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else math.nan


def _mean(values: Sequence[float]) -> float:
    """Average the values that are not NaN, with exact rounding."""
    defined = [value for value in values if not math.isnan(value)]
    return _ratio(math.fsum(defined), len(defined))


def _check_finite(predictions: Predictions) -> None:
    finite = predictions.losses.isfinite() & predictions.top_scores.isfinite().all(dim=1)
    if predictions.scores is not None:
        finite &= predictions.scores.isfinite().all(dim=1)
    if not finite.all():
        samples = shorten([str(index) for index in predictions.indices[~finite].tolist()])
        raise UserError(
            f"samples {samples}: the model's output is not finite, by damaged weights, a diverged training, or fp16. "
            "Evaluate in bf16 or fp32, or take other weights."
        )
