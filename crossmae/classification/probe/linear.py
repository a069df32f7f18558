"""Linear probing on cached features: batch norm without weights, one linear layer, LARS.

The published protocol draws a new random crop of every image in every epoch (method specification, section 1.11). With
cached features of one central crop, the probe takes minutes instead of hours.

Shapes: N training images, E width, K classes.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from timm.optim import Lars
from torch import Tensor, nn

from crossmae.classification.evaluation.metrics import accuracy_of, mean_of
from crossmae.classification.probe.cache import CachedFeatures
from crossmae.classification.probe.config import LinearConfig
from crossmae.classification.vit import build_head
from crossmae.data.batches import keyed_randomness
from crossmae.data.parallel import Progress
from crossmae.training.schedule import lr_at

MOMENTUM, TRUST = 0.9, 0.001


def peak_lr(settings: LinearConfig) -> float:
    """Compute the learning rate after warm-up."""
    return settings.base_lr * settings.batch_size / 256


def reach(settings: LinearConfig, images: int) -> float:
    """Bound the change of the head's norm under LARS, in logarithms.

    A step changes the weights by at most lr * 0.001 of their norm, or ten times as much with momentum. The average
    learning rate is half the peak. The published schedule has a bound over 200 on ImageNet. A bound below 1 means that
    few images give too few steps: the head hardly moves from its initial weights.
    """
    steps = settings.epochs * (images // settings.batch_size)
    return steps * peak_lr(settings) / 2 * TRUST / (1 - MOMENTUM)


def run_linear(
    train: CachedFeatures,
    val: CachedFeatures,
    num_classes: int,
    settings: LinearConfig,
    device: torch.device,
) -> dict[str, Any]:
    """Train and test a head for every seed."""
    features, labels, others = (tensor.to(device) for tensor in (train.features, train.labels, val.features))
    runs: list[dict[str, Any]] = []
    for seed in settings.seeds:
        head = train_linear(features, labels, num_classes, settings, seed)
        on_val = asdict(accuracy_of(classify(head, others), val.labels))
        on_train = accuracy_of(classify(head, features), train.labels)
        runs.append({"seed": seed, "val": on_val, "train_accuracy": on_train.accuracy})
    mean = asdict(mean_of([run["val"]["accuracy"] for run in runs]))
    shown = settings.model_dump(exclude={"seeds"})
    return {"settings": shown, "reach": reach(settings, len(labels)), "runs": runs, "mean": mean}


def lars(module: nn.Module, lr: float, weight_decay: float = 0.0) -> Lars:
    """Build LARS as published for linear probing (method specification, section 1.11).

    Matrices move along their gradient by lr * 0.001 * norm(w) / norm(gradient). With weight decay (published as 0),
    they move by lr * 0.001 * norm(w) / (norm(gradient) + decay * norm(w)) times gradient + decay * w, as in arXiv
    1708.03888. Biases and other one-dimensional tensors move by plain SGD without weight decay. Momentum is 0.9.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if parameter.ndim > 1]
    vectors = [parameter for parameter in trainable if parameter.ndim <= 1]
    groups: list[dict[str, Any]] = [
        # If weight decay is 0, timm's Lars adapts a group only with always_adapt.
        {"params": matrices, "weight_decay": weight_decay, "always_adapt": True},
        {"params": vectors, "weight_decay": 0.0, "always_adapt": False},
    ]
    return Lars(groups, lr=lr, momentum=MOMENTUM, trust_coeff=TRUST, eps=0.0)


def train_linear(features: Tensor, labels: Tensor, num_classes: int, settings: LinearConfig, seed: int) -> nn.Module:
    """Train a head on features (N, E) and labels (N,).

    All random numbers come from the seed. There must be at least one batch. Returns the head in evaluation mode, on the
    device of the features.
    """
    count, per_epoch = len(features), len(features) // settings.batch_size
    with keyed_randomness(seed):
        head = build_head(features.shape[1], num_classes, "batchnorm").to(features.device)
        orders = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    peak, warmup, total = peak_lr(settings), settings.warmup_epochs * per_epoch, settings.epochs * per_epoch
    optimizer = lars(head, peak)
    for epoch in Progress(range(settings.epochs), f"linear, seed {seed}", leave=False, unit="epoch"):
        order = torch.randperm(count, generator=orders).to(features.device)
        for index in range(per_epoch):
            for group in optimizer.param_groups:
                group["lr"] = lr_at(epoch * per_epoch + index, peak, warmup, total)
            chosen = order[index * settings.batch_size : (index + 1) * settings.batch_size]
            loss = nn.functional.cross_entropy(head(features[chosen].float()), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return head.eval()


@torch.no_grad()
def classify(head: nn.Module, features: Tensor, chunk: int = 4096) -> Tensor:
    """Predict the classes (M,) of features (M, E)."""
    return torch.cat([head(part.float()).argmax(dim=1) for part in features.split(chunk)])
