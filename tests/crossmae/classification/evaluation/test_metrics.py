"""Proves that every number equals a slow count, sample by sample, on any number of processes the same to the bit."""

from __future__ import annotations

import math
from dataclasses import astuple, fields, replace

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from torch import Tensor

from crossmae.classification.evaluation.metrics import (
    BINS,
    Predictions,
    accuracy_of,
    calibration_bins,
    calibration_error,
    mean_of,
    merge,
    score,
)
from crossmae.errors import UserError
from tests.crossmae.classification.made_up import predictions_of, random_predictions, rows_of


def assert_equal(one: Predictions, other: Predictions) -> None:
    for field in fields(Predictions):
        left, right = getattr(one, field.name), getattr(other, field.name)
        assert (left is None and right is None) or torch.equal(left, right), field.name


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 50])
def test_any_number_of_processes_gives_the_same_to_the_bit(ranks: int, several: bool) -> None:
    """Also with more processes than samples, and with rows in any order."""
    whole = random_predictions(41, 4, several)
    generator = torch.Generator().manual_seed(ranks)
    owner = torch.randint(ranks, (41,), generator=generator)
    shuffled = torch.randperm(41, generator=generator)
    parts = [rows_of(whole, shuffled[owner[shuffled] == rank]) for rank in range(ranks)]
    merged = merge(parts, 41)
    assert_equal(merged, whole)
    assert score(merged, 4).numbers() == score(whole, 4).numbers()


def test_processes_without_samples_may_know_no_shapes() -> None:
    whole, nothing = random_predictions(6, 3), torch.empty(0)
    empty = Predictions(nothing.long(), nothing.long(), nothing, nothing.long(), nothing)
    assert_equal(merge([empty, whole, empty], 6), whole)
    without = replace(whole, features=None, feature_indices=None)
    assert_equal(merge([without], 6), without)
    none = torch.empty(0, dtype=torch.int64)
    assert_equal(merge([replace(whole, features=torch.empty(0, 7), feature_indices=none)], 6), without)


@pytest.mark.parametrize(("rows", "count"), [([0, 1, 3], 4), ([0, 1, 1, 2], 3), ([0, 1, 2], 2), ([], 2), ([], 0)])
def test_each_sample_needs_exactly_one_row(rows: list[int], count: int) -> None:
    part = rows_of(random_predictions(6, 3), torch.tensor(rows, dtype=torch.int64))
    with pytest.raises(ValueError, match=f"{len(rows)} rows for {count} samples"):
        merge([part], count)


def slow_share(hits: list[bool]) -> float:
    return sum(hits) / len(hits) if hits else math.nan


def test_numbers_of_one_label_equal_a_slow_count() -> None:
    classes = 8
    data = random_predictions(300, classes)
    labels, best = data.labels.tolist(), data.top_classes.tolist()
    found = score(data, classes)
    assert found.samples == 300
    assert found.loss == pytest.approx(math.fsum(data.losses.tolist()) / 300, rel=1e-12)
    assert found.top1 == slow_share([top[0] == label for label, top in zip(labels, best, strict=True)])
    assert found.top5 == slow_share([label in top for label, top in zip(labels, best, strict=True)])
    assert 0.3 < found.top1 < found.top5 < 1
    matrix = [[0] * classes for _ in range(classes)]
    for label, top in zip(labels, best, strict=True):
        matrix[label][top[0]] += 1
    assert found.confusion is not None
    assert found.confusion.tolist() == matrix
    recalls = []
    for index, one in enumerate(found.classes):
        of_class = [top[0] == index for label, top in zip(labels, best, strict=True) if label == index]
        taken = [label == index for label, top in zip(labels, best, strict=True) if top[0] == index]
        assert (one.samples, one.predictions, one.ap) == (len(of_class), len(taken), None)
        assert one.recall == pytest.approx(slow_share(of_class), nan_ok=True)
        assert one.precision == pytest.approx(slow_share(taken))
        assert one.f1 == pytest.approx(f1_score(data.labels == index, data.top_classes[:, 0] == index))
        recalls += [slow_share(of_class)] if of_class else []
    assert len(recalls) == classes - 1, "one class has no samples"
    assert math.isnan(found.classes[-1].recall)
    assert found.balanced_accuracy == pytest.approx(sum(recalls) / len(recalls))
    assert set(found.numbers()) == {"loss", "top1", "top5", "balanced_accuracy", "ece"}
    interval = accuracy_of(data.top_classes[:, 0], data.labels)
    assert found.top1_interval == (interval.low, interval.high)


def test_calibration_equals_a_slow_count() -> None:
    data = random_predictions(400, 6)
    found = score(data, 6)
    gap = 0.0
    for number, one in enumerate(found.bins):
        low, high = number / BINS, (number + 1) / BINS
        rows = [row for row, share in enumerate(data.top_scores[:, 0].tolist()) if low < share <= high]
        assert (one.low, one.high, one.samples) == (low, high, len(rows))
        confidence = slow_share([data.top_scores[row, 0].item() for row in rows])  # type: ignore[misc]
        accuracy = slow_share([data.correct[row].item() for row in rows])  # type: ignore[misc]
        assert one.confidence == pytest.approx(confidence, nan_ok=True)
        assert one.accuracy == pytest.approx(accuracy, nan_ok=True)
        gap += len(rows) / 400 * abs(accuracy - confidence) if rows else 0
    assert len(found.bins) == BINS
    assert found.ece == pytest.approx(gap)


def test_a_probability_on_a_border_is_in_the_lower_bin() -> None:
    borders = np.arange(BINS + 1) / BINS
    counts = [one.samples for one in calibration_bins(borders, np.ones(BINS + 1, bool))]
    assert counts == [2] + [1] * (BINS - 1), "0 is with those up to 1/15"
    sure = calibration_bins(np.ones(4), np.array([True, True, True, False]))
    assert calibration_error(sure) == 0.25


def test_the_most_confused_pairs() -> None:
    labels = torch.tensor([0] * 10 + [1] * 4 + [2] * 5)
    answers = torch.tensor([0] * 7 + [1] * 3 + [0] * 3 + [1] + [2, 2, 2, 2, 0])
    data = predictions_of(torch.nn.functional.one_hot(answers, 4).float(), labels)
    assert score(data, 4).most_confused(3) == [(0, 1, 3), (1, 0, 3), (2, 0, 1)]
    assert len(score(data, 4).most_confused(2)) == 2


def test_equally_frequent_confusions_are_in_order_of_the_classes() -> None:
    found = score(random_predictions(2000, 20), 20)
    assert found.confusion is not None
    counts = {place: count for place, count in np.ndenumerate(found.confusion) if count and place[0] != place[1]}
    slow = sorted(counts, key=lambda place: (-counts[place], place))
    assert [place for *place, _ in found.most_confused(400)] == [list(place) for place in slow]


def slow_average_precision(labels: Tensor, scores: Tensor) -> float:
    """Mean over the positives of the precision among what has at least their score."""
    positives = scores[labels]
    return float(np.mean([float(labels[scores >= one].float().mean()) for one in positives]))


@pytest.mark.parametrize("classes", [1, 5])
def test_numbers_of_several_labels_equal_slow_ones(classes: int) -> None:
    data = random_predictions(120, classes + 1, several=True)
    if classes == 1:  # a matrix of one column is easily taken for the two classes "no" and "yes"
        data = predictions_of(torch.logit(data.scores[:, :1]), data.labels[:, :1])
    labels, scores, several = data.labels, data.scores, data.labels.shape[1]
    assert scores is not None
    found = score(data, several)
    predicted = scores >= 0.5
    each = [slow_average_precision(labels[:, index], scores[:, index]) for index in range(classes)]
    assert [one.ap for one in found.classes[:classes]] == pytest.approx(each)
    assert found.mean_ap == pytest.approx(sum(each) / classes)
    for index, one in enumerate(found.classes):
        assert one.samples == int(labels[:, index].sum())
        assert one.f1 == pytest.approx(f1_score(labels[:, index], predicted[:, index]))
    assert found.micro_f1 == pytest.approx(f1_score(labels.ravel(), predicted.ravel()))
    assert found.macro_f1 == pytest.approx(sum(one.f1 for one in found.classes) / several)
    assert found.loss == pytest.approx(math.fsum(data.losses.tolist()) / 120, rel=1e-12)
    assert (found.top1, found.ece, found.confusion, found.most_confused(5)) == (None, None, None, [])
    assert set(found.numbers()) == {"loss", "mean_ap", "micro_f1", "macro_f1"}
    exact = [bool((labels[row] == predicted[row]).all()) for row in range(120)]
    assert data.correct.tolist() == exact


def test_a_class_in_no_label_is_left_out_of_the_mean() -> None:
    data = random_predictions(50, 4, several=True)
    found = score(data, 4)
    assert found.classes[-1].ap is not None
    assert math.isnan(found.classes[-1].ap)
    assert found.mean_ap == pytest.approx(np.mean([one.ap for one in found.classes[:-1]]))
    never = predictions_of(torch.full((5, 2), -1.0), torch.zeros(5, 2, dtype=torch.bool))
    assert all(math.isnan(score(never, 2).numbers()[name]) for name in ("mean_ap", "micro_f1", "macro_f1"))


@pytest.mark.parametrize("name", ["losses", "top_scores", "scores"])
def test_a_model_that_answers_with_nan_is_an_error_of_the_user(name: str) -> None:
    data = random_predictions(5, 3, several=True)
    getattr(data, name)[3] = math.nan
    with pytest.raises(UserError, match="samples 3: the model's output is not finite"):
        score(data, 3)


Z = 1.959963984540054  # of the normal distribution, two-sided, 95%


@pytest.mark.parametrize(("right", "images"), [(0, 7), (7, 7), (1, 2), (90, 100), (7248, 10000)])
def test_wilson(right: int, images: int) -> None:
    labels = torch.zeros(images, dtype=torch.long)
    predicted = (torch.arange(images) >= right).long()
    found = accuracy_of(predicted, labels)
    share = right / images
    centre = (share + Z**2 / (2 * images)) / (1 + Z**2 / images)
    half = Z / (1 + Z**2 / images) * math.sqrt(share * (1 - share) / images + Z**2 / (4 * images**2))
    assert (found.right, found.images, found.accuracy) == (right, images, share)
    assert found.low == pytest.approx(centre - half, abs=1e-9)
    assert found.high == pytest.approx(centre + half, abs=1e-9)


STUDENT = 4.302652729911275 * 0.1 / math.sqrt(3)  # t of two degrees of freedom


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.5, 0.6, 0.7], (0.6, 0.6 - STUDENT, 0.6 + STUDENT, 3)),
        ([0.0, 0.9], (0.45, 0.0, 1.0, 2)),  # the interval stays between 0 and 1
        ([0.25], (0.25, None, None, 1)),
    ],
)
def test_mean_and_students_interval(values: list[float], expected: tuple[float | None, ...]) -> None:
    assert astuple(mean_of(values)) == pytest.approx(expected)
