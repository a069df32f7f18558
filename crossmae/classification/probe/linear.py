"""Linear probing as published, on cached features: batch norm without weights, one linear layer, LARS.

The published protocol draws a new random crop of every image in every epoch (method specification, section 1.11); here
the features of one central crop are all there is, which takes minutes instead of hours.

Shapes: N training images, E width, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import Lars
from torch import Tensor, nn
from tqdm import tqdm

from crossmae.data.batches import keyed_randomness
from crossmae.training.schedule import lr_at

MOMENTUM, TRUST = 0.9, 0.001
STD = 0.01  # of the first weights


@dataclass(frozen=True)
class LinearSettings:
    """How the head is trained.

    Attributes:
        batch_size: images per step; those that do not fill a batch are left out of an epoch, others each time.
        base_lr: learning rate per 256 images of a batch.
    """

    epochs: int = 90
    warmup_epochs: float = 10
    batch_size: int = 512
    base_lr: float = 0.1

    @property
    def peak_lr(self) -> float:
        """Learning rate after the warm-up."""
        return self.base_lr * self.batch_size / 256

    def reach(self, images: int) -> float:
        """How far LARS can move the head, at most, in logarithms of its weights' norm.

        A step moves the weights by lr * 0.001 of their norm, ten times that with momentum; the learning rate is half
        its peak on average. The published schedule reaches over 200 on ImageNet. Below 1 the head ends about where it
        started: with few images there are too few steps.
        """
        steps = self.epochs * (images // self.batch_size)
        return steps * self.peak_lr / 2 * TRUST / (1 - MOMENTUM)


def linear_head(width: int, num_classes: int) -> nn.Sequential:
    """Batch norm without weights and a linear layer of small random weights, (B, E) to (B, K)."""
    linear = nn.Linear(width, num_classes)
    nn.init.trunc_normal_(linear.weight, std=STD, a=-4 * STD, b=4 * STD)  # see `crossmae.classification.vit`
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.BatchNorm1d(width, affine=False, eps=1e-6), linear)


def lars(module: nn.Module, lr: float, weight_decay: float = 0.0) -> Lars:
    """LARS as published for linear probing (method specification, section 1.11), over what is trainable.

    Matrices move by lr * 0.001 * norm(w) / norm(gradient), or with weight decay (which is published as 0) by
    lr * 0.001 * norm(w) / (norm(gradient) + decay * norm(w)) times gradient + decay * w, as in arXiv 1708.03888.
    Biases, like everything of one axis, move by plain SGD without decay. Momentum is 0.9.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if parameter.ndim > 1]
    vectors = [parameter for parameter in trainable if parameter.ndim <= 1]
    groups: list[dict[str, Any]] = [
        # timm's adapts a group without weight decay only if it is told to.
        {"params": matrices, "weight_decay": weight_decay, "always_adapt": True},
        {"params": vectors, "weight_decay": 0.0, "always_adapt": False},
    ]
    return Lars(groups, lr=lr, momentum=MOMENTUM, trust_coeff=TRUST, eps=0.0)


def train_linear(
    features: Tensor, labels: Tensor, num_classes: int, settings: LinearSettings, seed: int
) -> nn.Sequential:
    """A trained head, in evaluation mode; all randomness is of the seed.

    Args:
        features: (N, E), not standardised: the batch norm does that. The head is trained on their device.
        labels: (N,) on that device.

    Raises:
        ValueError: the images do not fill one batch.
    """
    count, per_epoch = len(features), len(features) // settings.batch_size
    if per_epoch == 0:
        raise ValueError(f"a batch of {settings.batch_size} needs as many images, got {count}")
    with keyed_randomness(seed):
        head = linear_head(features.shape[1], num_classes).to(features.device)
        orders = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    peak, warmup, total = settings.peak_lr, settings.warmup_epochs * per_epoch, settings.epochs * per_epoch
    optimizer = lars(head, peak)
    for epoch in tqdm(range(settings.epochs), f"linear, seed {seed}", leave=False, unit="epoch", dynamic_ncols=True):
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
    """Classes (M,) that a head gives features (M, E)."""
    return torch.cat([head(part.float()).argmax(dim=1) for part in features.split(chunk)])
