"""The loss of a classifier, and what is done to a batch on the device before the model sees it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from crossmae.classification.data import LabelledImages
from crossmae.classification.train.config import FinetuneConfig
from crossmae.data.images import MAX_NAMES
from crossmae.errors import UserError


class Objective:
    """The loss, and what is done to a batch on the device before the model sees it.

    Raises:
        UserError: see `class_weights`.
    """

    def __init__(self, config: FinetuneConfig, labelled: LabelledImages, device: torch.device) -> None:
        data, loss, num_classes = config.data, config.loss, len(labelled.classes)
        self.smoothing, self.several, self.mixes = loss.smoothing, data.separator is not None, loss.mixes
        self.weights = class_weights(config, labelled)
        if self.weights is not None:
            self.weights = self.weights.to(device)
        self.erase = RandomErasing(data.erase, mode=data.erase_mode, max_count=data.erase_count, device=str(device))
        # Of several labels per image, the images themselves are the classes: what is mixed with what, as a matrix.
        self.mix = Mixup(
            loss.mixup,
            loss.cutmix,
            loss.cutmix_minmax,
            loss.mixup_prob,
            loss.mixup_switch_prob,
            loss.mixup_mode,
            label_smoothing=0.0 if self.several else loss.smoothing,
            num_classes=config.optim.batch_size if self.several else num_classes,
        )

    def augment(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Erase, then mix; the targets become (B, N) probabilities if images are mixed."""
        images = self.erase(images)
        if self.mixes and self.several:
            images, shares = self.mix(images, torch.arange(len(images), device=images.device))  # (B, B)
            targets = shares @ targets
        elif self.mixes:
            images, targets = self.mix(images, targets)
        return images, targets

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy, whose mixed targets are smooth already, or the binary one for several labels per image."""
        if self.several:
            targets = targets * (1 - self.smoothing) + 0.5 * self.smoothing
            return F.binary_cross_entropy_with_logits(logits, targets, self.weights)
        smoothing = 0.0 if self.mixes else self.smoothing
        return F.cross_entropy(logits, targets, self.weights, label_smoothing=smoothing)


def class_weights(config: FinetuneConfig, labelled: LabelledImages) -> Tensor | None:
    """(N,) weights of the classes in the loss; "balanced" is images / (classes * images of the class).

    Raises:
        UserError: a weight of an unknown class, or "balanced" for a class without images.
    """
    given, targets, num_classes = config.loss.class_weights, labelled.targets, len(labelled.classes)
    if given is None:
        return None
    if given == "balanced":
        counts = torch.bincount(targets, minlength=num_classes)
        if not bool(counts.all()):
            absent = [labelled.classes[index] for index in (counts == 0).nonzero()[:, 0].tolist()]
            raise UserError(
                f"loss.class_weights: balanced needs an image of every class, there is none of "
                f"{', '.join(absent[:MAX_NAMES])}; leave them out, or give weights by class"
            )
        return len(targets) / (num_classes * counts.float())
    unknown = sorted(given.keys() - set(labelled.classes))
    if unknown:
        raise UserError(
            f"loss.class_weights: {', '.join(unknown[:MAX_NAMES])}: no class of data.train, whose first are "
            f"{', '.join(labelled.classes[:MAX_NAMES])}"
        )
    return torch.tensor([given.get(name, 1.0) for name in labelled.classes], dtype=torch.float32)
