"""Loss of a classifier, and augmentation of a batch on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from crossmae.classification.data import LabelledImages
from crossmae.classification.train.config import LabelledDataConfig, LossConfig
from crossmae.errors import UserError, shorten


class Objective:
    """Loss of a classifier with class weights, and augmentation of a batch, on the device.

    Raises the errors of `class_weights`.
    """

    def __init__(
        self, loss: LossConfig, data: LabelledDataConfig, images: LabelledImages, batch_size: int, device: torch.device
    ) -> None:
        several, num_classes = data.separator is not None, len(images.classes)
        weights = class_weights(loss.class_weights, images.targets, images.classes)
        self.weights = None if weights is None else weights.to(device)
        self.smoothing, self.mixes, self.several = loss.smoothing, loss.mixes, several
        self.erase = RandomErasing(data.erase, mode=data.erase_mode, max_count=data.erase_count, device=str(device))
        # With several labels per image, each image is its own class: the mixed target matrix tells which images were
        # mixed.
        self.mix = Mixup(
            loss.mixup,
            loss.cutmix,
            loss.cutmix_minmax,
            loss.mixup_prob,
            loss.mixup_switch_prob,
            loss.mixup_mode,
            label_smoothing=0.0 if several else loss.smoothing,
            num_classes=batch_size if several else num_classes,
        )

    def augment(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Erase regions, then mix images.

        Mixing replaces the targets by probabilities (B, N).
        """
        images = self.erase(images)
        if self.mixes and self.several:
            images, shares = self.mix(images, torch.arange(len(images), device=images.device))  # (B, B)
            targets = shares @ targets
        elif self.mixes:
            images, targets = self.mix(images, targets)
        return images, targets

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Compute the cross entropy, binary if there are several labels."""
        if self.several:
            targets = targets * (1 - self.smoothing) + 0.5 * self.smoothing
            return F.binary_cross_entropy_with_logits(logits, targets, self.weights)
        smoothing = 0.0 if self.mixes else self.smoothing
        return F.cross_entropy(logits, targets, self.weights, label_smoothing=smoothing)


def class_weights(
    given: Literal["balanced"] | Mapping[str, float] | None, targets: Tensor, classes: Sequence[str]
) -> Tensor | None:
    """Compute the class weights (N,) of the loss.

    None means equal weights. With "balanced", a weight is images / (classes * images of the class). Classes without a
    given weight have 1. `targets` are the classes of the training images.

    Raises:
        UserError: a weight is for an unknown class, or "balanced" was given and a class has no images.
    """
    if given is None:
        return None
    if given == "balanced":
        counts = torch.bincount(targets, minlength=len(classes))
        if not bool(counts.all()):
            absent = [classes[index] for index in (counts == 0).nonzero()[:, 0].tolist()]
            raise UserError(
                f"loss.class_weights: balanced needs an image of every class, there is none of {shorten(absent)}. "
                "Leave them out, or give weights by class."
            )
        return len(targets) / (len(classes) * counts.float())
    if unknown := sorted(given.keys() - set(classes)):
        known = f"no class of data.train. Its classes are {shorten(classes)}."
        raise UserError(f"loss.class_weights: {shorten(unknown)}: {known}")
    return torch.tensor([given.get(name, 1.0) for name in classes], dtype=torch.float32)
