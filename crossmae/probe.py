"""How good frozen features are: k nearest neighbours on what the encoder gives for labelled images.

Shapes: B batch, L patches, E width, N training images, M validation images.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from crossmae.model import CrossMAE
from crossmae.vit import ViTEncoder

Pool = Literal["avg", "cls"]

SIMILARITIES = 1 << 24  # values of the similarity matrix held at a time: 64 MB
CONSTANT = 1e-6  # a deviation below this share of the mean is rounding, not signal


def pool_tokens(tokens: Tensor, pool: Pool) -> Tensor:
    """Tokens (B, L + 1, E), class token first, to features (B, E): the patches' mean, or the class token.

    Raises:
        ValueError: an unknown `pool`.
    """
    if pool not in get_args(Pool):
        raise ValueError(f"pool must be one of {', '.join(get_args(Pool))}, got {pool!r}")
    return tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(dim=1)


def encode_tokens(encoder: ViTEncoder, imgs: Tensor) -> Tensor:
    """Tokens (B, L + 1, E) of the last block that pretraining trains, every patch visible.

    With fused maps that is the last fused block: those after it were never run and hold random numbers; nothing
    normalises its output before it is mixed, so nothing does here. A model without fusion (and decoder="self") ends in
    `norm`, which its decoder reads through, so it is applied. A bare encoder gives its last block as it is.

    Args:
        imgs: (B, C, H, W) normalised pixels.
    """
    tokens = encoder.embed(imgs)
    if not isinstance(encoder, CrossMAE):
        return encoder.features(tokens, [encoder.depth - 1])[0]
    if encoder.fused_blocks:
        return encoder.features(tokens, encoder.fused_blocks[-1:])[0]
    return encoder.norm(encoder.features(tokens, [encoder.depth - 1])[0])


@torch.no_grad()
def encode_images(encoder: ViTEncoder, batches: Iterable[Tensor], pool: Pool = "avg") -> Tensor:
    """Features (N, E) of all images, float32 on the CPU; see `encode_tokens`.

    The encoder is left in the mode, training or not, in which it was.

    Args:
        batches: normalised pixels (B, C, H, W) on any device, in order.

    Raises:
        ValueError: an unknown `pool`, or no batch at all.
    """
    device, was_training = encoder.cls_token.device, encoder.training
    encoder.eval()
    try:
        features = [pool_tokens(encode_tokens(encoder, imgs.to(device)), pool).float().cpu() for imgs in batches]
    finally:
        encoder.train(was_training)
    if not features:
        raise ValueError("no images to encode")
    return torch.cat(features)


def standardize(train: Tensor, val: Tensor) -> tuple[Tensor, Tensor]:
    """Features (N, E) and (M, E) with the mean of `train` taken off and its deviation divided out, per dimension.

    A few dimensions of MAE features are far larger than the rest and would decide every similarity; the batch norm in
    front of the linear probe of the MAE paper (arXiv 2111.06377, A.1) does the same. Dimensions that do not vary in
    `train` become 0.
    """
    train64 = train.double()
    mean, std = train64.mean(dim=0), train64.std(dim=0, correction=0)
    std = torch.where(std > CONSTANT * mean.abs(), std, torch.inf)
    return ((train64 - mean) / std).float(), ((val.double() - mean) / std).float()


@torch.no_grad()
def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int | None = None,
) -> float:
    """Share of the validation images that a weighted vote of their k nearest training images classifies rightly.

    Similarity is the cosine; a neighbour's vote weighs exp(similarity / temperature), as in arXiv 1805.01978, section
    3.4. Equal votes go to the lowest class.

    Args:
        train_features, val_features: (N, E) and (M, E).
        train_labels, val_labels: (N,) and (M,) classes from 0.
        k: neighbours; at most N.
        chunk: validation images compared at a time; None keeps the similarities under 64 MB. Does not change the
            result.

    Raises:
        ValueError: k outside 1 .. N, a temperature that is not positive, labels outside 0 .. num_classes - 1 or not
            one per image, or nothing to validate on.
    """
    _check_labels("train", train_features, train_labels, num_classes)
    _check_labels("val", val_features, val_labels, num_classes)
    if not 1 <= k <= len(train_features):
        raise ValueError(f"k must be between 1 and the {len(train_features)} training images, got {k}")
    if temperature <= 0:
        raise ValueError(f"temperature must be over 0, got {temperature}")
    train = F.normalize(train_features.float(), dim=1)
    chunk = chunk or max(SIMILARITIES // len(train), 1)
    right = 0
    for features, labels in zip(val_features.float().split(chunk), val_labels.split(chunk), strict=True):
        similarity, nearest = (F.normalize(features, dim=1) @ train.T).topk(k, dim=1)  # (chunk, k)
        # Only ratios of votes count: with the best neighbour's set to 1, a low temperature can not overflow.
        votes = ((similarity - similarity[:, :1]) / temperature).exp().double()
        totals = votes.new_zeros(len(features), num_classes).scatter_add_(1, train_labels[nearest], votes)
        right += int((totals.argmax(dim=1) == labels).sum())
    return right / len(val_labels)


def knn_probe(
    encoder: ViTEncoder,
    train: tuple[Iterable[Tensor], Tensor],
    val: tuple[Iterable[Tensor], Tensor],
    num_classes: int,
    pool: Pool = "avg",
    standardized: bool = True,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """`knn_accuracy` of an encoder; `train` and `val` are batches of normalised pixels and all their labels."""
    features = encode_images(encoder, train[0], pool), encode_images(encoder, val[0], pool)
    if standardized:
        features = standardize(*features)
    return knn_accuracy(features[0], train[1], features[1], val[1], num_classes, k, temperature)


def _check_labels(name: str, features: Tensor, labels: Tensor, num_classes: int) -> None:
    if len(features) == 0 or labels.shape != (len(features),):
        raise ValueError(f"{name}: expected one label per image, got {tuple(labels.shape)} for {len(features)} images")
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        low, high = int(labels.min()), int(labels.max())
        raise ValueError(
            f"{name}: labels must be 0 .. {num_classes - 1} for {num_classes} classes, got {low} .. {high}"
        )
