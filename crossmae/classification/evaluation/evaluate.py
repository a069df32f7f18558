"""Evaluation of a classifier on every image of a source, each exactly once on any number of processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from crossmae.classification.data import CentreViews, LabelledBatch, evaluation_loader, readable_batches
from crossmae.classification.evaluation.metrics import Predictions, merge
from crossmae.data.pixels import Normalize
from crossmae.data.sources.subset import evenly_spaced
from crossmae.training.processes import Ranks

TOP = 5  # classes of a sample that are kept


@dataclass(frozen=True)
class EvaluationSet:
    """Images to evaluate on, and how they are read.

    Attributes:
        views: of the images of data.val, with targets.
        mean, std: per channel, of pixels in 0-1.
        batch_size: images per process.
        workers: processes that read images.
        features: at most so many samples, evenly spaced, keep their features.
    """

    views: CentreViews
    mean: tuple[float, ...]
    std: tuple[float, ...]
    batch_size: int
    workers: int
    features: int


def evaluate(
    model: nn.Module, data: EvaluationSet, device: torch.device, autocast: torch.autocast, ranks: Ranks
) -> Predictions:
    """Predict all images, each process its share, and gather the predictions everywhere.

    Args:
        model: from `build_vit`, on the device; left in the mode in which it was.
        autocast: precision of the encoder; probabilities and losses are float32.

    Raises:
        UserError: an image cannot be read, in all processes.
    """
    indices = range(ranks.rank, len(data.views), ranks.world_size)
    mine = ranks.together(lambda: list(_predict(model, data, indices, device, autocast, ranks.is_main)))
    return merge([part for of_rank in ranks.gather(mine) for part in of_rank], len(data.views))


def _predict(
    model: Any, data: EvaluationSet, indices: range, device: torch.device, autocast: torch.autocast, show: bool
) -> Iterator[Predictions]:
    with_features = torch.tensor(evenly_spaced(len(data.views), data.features), dtype=torch.int64)
    normalize = Normalize(data.mean, data.std, device)
    loader = evaluation_loader(data.views, indices, data.batch_size, data.workers, device.type == "cuda")
    bar = tqdm(loader, "evaluate", leave=False, unit="batch", dynamic_ncols=True, disable=not show)
    with _evaluation_mode(model), torch.no_grad():
        for batch in readable_batches(bar, "data.val"):
            with autocast:
                tokens = model.forward_features(normalize(batch.to(device).images))
                pooled = model.forward_head(tokens, pre_logits=True)
                logits = model.head(pooled)
            yield _predictions(batch, logits.float().cpu(), pooled.cpu(), with_features)


def _predictions(batch: LabelledBatch, logits: Tensor, pooled: Tensor, with_features: Tensor) -> Predictions:
    several = batch.targets.ndim == 2
    scores = logits.sigmoid() if several else logits.softmax(dim=1)
    if several:
        losses = F.binary_cross_entropy_with_logits(logits, batch.targets, reduction="none").mean(dim=1)
    else:
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
