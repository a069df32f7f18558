"""Quality of frozen features: k-nearest-neighbour accuracy on labelled images.

Shapes: B batch, L patches, K class tokens, E width, N training images, M other images.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from crossmae.models.crossmae import CrossMAE
from crossmae.models.encoder import ViTEncoder
from crossmae.pretraining.config import FeaturePool, Pool

VALUES = 1 << 24  # largest number of similarities in memory at a time: 64 MB
CONSTANT = 1e-6  # a deviation below this share of the mean is a rounding error


def pool_tokens(tokens: Tensor, pool: FeaturePool, class_tokens: int = 1) -> Tensor:
    """Pool tokens (B, K + L, E), class tokens first, to features.

    Args:
        pool: "avg": mean of the patch tokens (B, E); "cls": mean of the class tokens (B, E); "cls_avg": both
            concatenated (B, 2 E).
        class_tokens: K.
    """
    if pool not in get_args(FeaturePool):
        raise ValueError(f"pool: {pool!r} is unknown. Choose one of {', '.join(get_args(FeaturePool))}.")
    if pool == "cls":
        return tokens[:, :class_tokens].mean(dim=1)
    mean = tokens[:, class_tokens:].mean(dim=1)
    return mean if pool == "avg" else torch.cat([tokens[:, :class_tokens].mean(dim=1), mean], dim=1)


def encode_tokens(encoder: ViTEncoder, imgs: Tensor) -> Tensor:
    """Encode images with the last trained block: (B, K + L, E).

    With fusion, the last trained block is the last fused block, whose output the decoder reads without a norm. A model
    without fusion, including decoder="self", ends with `norm`, which is applied. A bare encoder has no norm.

    Args:
        imgs: (B, C, H, W) normalised pixels, every patch visible.
    """
    tokens = encoder.embed(imgs)
    if isinstance(encoder, CrossMAE) and encoder.fused_blocks:
        return encoder.features(tokens, encoder.fused_blocks[-1:])[0]
    (last,) = encoder.features(tokens, [encoder.depth - 1])
    return encoder.norm(last) if isinstance(encoder, CrossMAE) else last


@torch.no_grad()
def encode_images(encoder: ViTEncoder, batches: Iterable[Tensor], pool: Pool = "avg") -> Tensor:
    """Encode all images to features (N, E), float32 on the CPU.

    The encoder stays in training or evaluation mode.

    Args:
        batches: normalised pixels (B, C, H, W) on any device, in order; at least one batch.
    """
    device, was_training, count = encoder.cls_token.device, encoder.training, encoder.class_tokens
    encoder.eval()
    try:
        features = [pool_tokens(encode_tokens(encoder, imgs.to(device)), pool, count).float().cpu() for imgs in batches]
    finally:
        encoder.train(was_training)
    return torch.cat(features)


def feature_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Compute mean and deviation (E,), infinite for constant dimensions."""
    parts = features.split(max(VALUES // features.shape[1], 1))
    mean = torch.stack([part.double().sum(dim=0) for part in parts]).sum(dim=0) / len(features)
    squares = torch.stack([(part.double() - mean).square().sum(dim=0) for part in parts])
    std = (squares.sum(dim=0) / len(features)).sqrt()
    return mean, torch.where(std > CONSTANT * mean.abs(), std, torch.inf)


def scale(features: Tensor, statistics: tuple[Tensor, Tensor]) -> Tensor:
    """Standardise features (N, E) by `feature_statistics` to float32."""
    mean, std = statistics
    scaled = torch.empty(features.shape, dtype=torch.float32, device=features.device)
    rows = max(VALUES // features.shape[1], 1)
    for part, target in zip(features.split(rows), scaled.split(rows), strict=True):
        target.copy_((part.double() - mean) / std)
    return scaled


def standardize(train: Tensor, val: Tensor) -> tuple[Tensor, Tensor]:
    """Standardise features (N, E) and (M, E) with statistics of `train`.

    A few dimensions of MAE features are far larger than the rest and would dominate every similarity. The batch norm
    before the linear probe of the MAE paper (arXiv 2111.06377, A.1) has the same purpose. Dimensions that are constant
    in `train` become 0.
    """
    statistics = feature_statistics(train)
    return scale(train, statistics), scale(val, statistics)


@torch.no_grad()
def nearest(train: Tensor, queries: Tensor, k: int, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Find the k nearest training images of every query, nearest first.

    Args:
        train, queries: features (N, E) and (M, E). The similarity is the cosine.
        k: number of neighbours; at most N, or N - 1 with `own`.
        own: (M,) position in `train` of each query itself, which is excluded (leave-one-out).

    Returns:
        Similarities (M, k) and positions in `train` (M, k).
    """
    train = F.normalize(train.float(), dim=1)
    chunk = max(VALUES // len(train), 1)  # number of queries per chunk
    parts = []
    for first in range(0, len(queries), chunk):
        similarity = F.normalize(queries[first : first + chunk].float(), dim=1) @ train.T  # (chunk, N)
        if own is not None:
            similarity.scatter_(1, own[first : first + chunk, None], -torch.inf)
        parts.append(similarity.topk(k, dim=1))
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def vote(similarity: Tensor, labels: Tensor, num_classes: int, temperature: float) -> Tensor:
    """Predict classes (M,) by a vote. Ties give the lowest class.

    The weight of a neighbour is exp(similarity / temperature), as in arXiv 1805.01978, section 3.4.

    Args:
        similarity, labels: (M, k) similarities and labels of the neighbours, nearest first.
    """
    chunk = max(VALUES // num_classes, 1)
    winners = []
    for near, classes in zip(similarity.split(chunk), labels.split(chunk), strict=True):
        # Only ratios of votes matter. The best neighbour has weight 1, so that a low temperature cannot overflow.
        votes = ((near - near[:, :1]) / temperature).exp().double()
        winners.append(votes.new_zeros(len(near), num_classes).scatter_add_(1, classes, votes).argmax(dim=1))
    return torch.cat(winners)


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Compute the share of validation images that `vote` classifies correctly.

    Args:
        train_features, val_features: (N, E) and (M, E).
        train_labels, val_labels: (N,) and (M,) classes 0 .. num_classes - 1.
    """
    similarity, positions = nearest(train_features, val_features, k)
    predicted = vote(similarity, train_labels[positions], num_classes, temperature)
    return int((predicted == val_labels).sum()) / len(val_labels)
