"""Predictions without a model, for tests: random, or such that every number is known."""

from __future__ import annotations

import torch
from torch import Tensor

from crossmae.classification.evaluation.metrics import Predictions


def predictions_of(logits: Tensor, labels: Tensor, features: Tensor | None = None) -> Predictions:
    """As evaluation makes them; of logits (N, C) and labels (N,) int64 or (N, C) bool, with features of odd samples."""
    indices = torch.arange(len(labels))
    odd = indices[1::2]
    kept = {} if features is None else {"features": features[odd], "feature_indices": odd}
    if labels.ndim == 2:
        scores = logits.sigmoid()
        losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none")
        top = scores.topk(min(5, logits.shape[1]))
        return Predictions(indices, labels, losses.mean(dim=1), top.indices, top.values, scores, **kept)
    top = logits.softmax(dim=1).topk(min(5, logits.shape[1]))
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return Predictions(indices, labels, losses, top.indices, top.values, **kept)


def random_predictions(count: int, classes: int, several: bool = False, seed: int = 0) -> Predictions:
    """Better than chance; the last class has no sample."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, classes, generator=generator)
    features = torch.randn(count, 7, generator=generator)
    if several:
        labels = torch.rand(count, classes, generator=generator) < 0.3
        labels[:, -1] = False
        return predictions_of(logits + 2 * labels - 1, labels, features)
    labels = torch.randint(classes - 1, (count,), generator=generator)
    return predictions_of(logits + 2 * torch.nn.functional.one_hot(labels, classes), labels, features)


def rows_of(predictions: Predictions, rows: Tensor) -> Predictions:
    """What a process that was given these rows, in this order, would have."""
    has = torch.isin(predictions.feature_indices, predictions.indices[rows])
    return Predictions(
        predictions.indices[rows],
        predictions.labels[rows],
        predictions.losses[rows],
        predictions.top_classes[rows],
        predictions.top_scores[rows],
        None if predictions.scores is None else predictions.scores[rows],
        predictions.features[has],
        predictions.feature_indices[has],
    )
