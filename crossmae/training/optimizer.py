"""Parameter groups of pretraining (method specification, section 1.9), and updates in mixed precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

MAX_SKIPPED = 20  # steps in a row that fp16 may skip because a gradient is not finite


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Group trainable parameters: biases and norms (one-dimensional) without decay, others with it.

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
        True where fp16 skipped the update, because a gradient was not finite.
    """
    scale = scaler.get_scale()  # 1 without fp16
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale() < scale
