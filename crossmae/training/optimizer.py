"""Learning rate rule, schedule and parameter groups of pretraining (method specification, section 1.9); updates."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

MAX_SKIPPED = 20  # steps in a row that fp16 may skip because a gradient is not finite
# predict_ratio / mask_ratio scales the published lr; "inverse" and "none" are the published code's two
# alternatives.
LR_RULES = {
    "published": lambda mask, predict: predict / mask,
    "none": lambda mask, predict: 1.0,
    "inverse": lambda mask, predict: mask / predict,
}


def scaled_lr(base_lr: float, images_per_step: int, mask_ratio: float, predict_ratio: float, rule: str) -> float:
    """Peak learning rate: base_lr * images / 256 * factor of the rule.

    Args:
        base_lr: learning rate per 256 images.
        images_per_step: over all processes and accumulated micro-batches.
        mask_ratio, predict_ratio: shares of all patches.
        rule: "published", "none" or "inverse".
    """
    return base_lr * images_per_step / 256 * LR_RULES[rule](mask_ratio, predict_ratio)


def lr_at(step: int, peak: float, warmup_steps: float, total_steps: int, min_lr: float = 0.0) -> float:
    """Learning rate of step `step`, from 0: linear warm-up from 0, then half a cosine down to `min_lr`."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    return min_lr + (peak - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: biases and norms (one-dimensional) without decay, all others with it.

    As published, `cls_token`, `mask_token` and `wfm.linear.weight` are decayed.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
    ]


def scaled_step(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> bool:
    """Update the weights and the scale of gradients.

    Returns:
        Whether fp16 skipped the update, because a gradient was not finite.
    """
    scale = scaler.get_scale()  # 1 without fp16
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale() < scale
