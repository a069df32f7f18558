"""The optimizer of a detector and the numbers of its schedule: layer decay, a learning rate rule, epochs."""

from __future__ import annotations

import logging
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers.batch_norm import LayerNorm as ChannelFirstLayerNorm
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.solver.build import maybe_add_gradient_clipping, reduce_param_groups
from torch import nn

log = logging.getLogger(__name__)

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, ChannelFirstLayerNorm)
_POSITIONS = ("pos_embed", "pos_embed_global", "rel_pos_h", "rel_pos_w")
# Warm-up takes no more of a run: detectron2 would warm up to a rate that has fallen already.
LONGEST_WARMUP = 0.1


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW over `parameter_groups`, with `SOLVER.CLIP_GRADIENTS` if enabled."""
    optimizer = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)
    return optimizer(parameter_groups(cfg, model), lr=cfg.SOLVER.BASE_LR, betas=cfg.SOLVER.BETAS)


def parameter_groups(cfg: CfgNode, model: nn.Module) -> list[dict[str, Any]]:
    """Trainable parameters by learning rate and weight decay (method specification, section 3.1).

    The learning rate of encoder layer i of n is BASE_LR * LAYER_DECAY ** (n + 1 - i): 0 is patch embedding and
    positions, i block i - 1, n + 1 everything outside the encoder. `WEIGHT_DECAY_NORM` is for norms,
    `WEIGHT_DECAY_POS` for absolute and relative positions. Norms are told by type, because detectron2's own list misses
    its channel-first LayerNorm.
    """
    groups = []
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            decay = cfg.SOLVER.WEIGHT_DECAY
            if isinstance(module, _NORMS):
                decay = cfg.SOLVER.WEIGHT_DECAY_NORM
            elif name in _POSITIONS:
                decay = cfg.SOLVER.WEIGHT_DECAY_POS
            full = f"{module_name}.{name}"
            factor = get_vit_lr_decay_rate(full, cfg.SOLVER.LAYER_DECAY, cfg.MODEL.VIT.DEPTH)
            groups.append({"params": [parameter], "lr": cfg.SOLVER.BASE_LR * factor, "weight_decay": decay})
    return reduce_param_groups(groups)


def resolve_schedule(cfg: CfgNode, num_images: int) -> CfgNode:
    """A copy of a config with the numbers of detectron2's schedule, in steps, instead of rules; says what they are.

    - `BASE_LR` * `IMS_PER_BATCH` / `REFERENCE_BATCH`: the linear rule, where there is a reference;
    - `MAX_ITER` from `EPOCHS`, `STEPS` from `DECAY_AT`, periods from `TEST.EVAL_EPOCHS`, rounded to whole steps;
    - `WARMUP_ITERS` at most a tenth of the run, and a checkpoint at every evaluation at least.

    Args:
        cfg: of the run; it is not changed.
        num_images: that are trained on.
    """
    resolved = cfg.clone()
    resolved.defrost()
    solver, batch = resolved.SOLVER, cfg.SOLVER.IMS_PER_BATCH
    if solver.REFERENCE_BATCH:
        solver.BASE_LR *= batch / solver.REFERENCE_BATCH
        solver.BASE_LR_END *= batch / solver.REFERENCE_BATCH
    if solver.EPOCHS:
        solver.MAX_ITER = max(1, round(solver.EPOCHS * num_images / batch))
    solver.WARMUP_ITERS = min(solver.WARMUP_ITERS, max(1, int(LONGEST_WARMUP * solver.MAX_ITER)))
    if solver.WARMUP_ITERS < cfg.SOLVER.WARMUP_ITERS:
        log.info("SOLVER.WARMUP_ITERS is %d, a tenth of the run", solver.WARMUP_ITERS)
    steps = [round(share * solver.MAX_ITER) for share in solver.DECAY_AT] or solver.STEPS
    solver.STEPS = tuple(sorted({step for step in steps if step < solver.MAX_ITER}))
    if resolved.TEST.EVAL_EPOCHS:
        resolved.TEST.EVAL_PERIOD = max(1, round(resolved.TEST.EVAL_EPOCHS * num_images / batch))
        solver.CHECKPOINT_PERIOD = min(solver.CHECKPOINT_PERIOD, resolved.TEST.EVAL_PERIOD)
    solver.REFERENCE_BATCH, solver.EPOCHS, solver.DECAY_AT, resolved.TEST.EVAL_EPOCHS = 0, 0.0, (), 0.0
    log.info("%s", describe_schedule(cfg, resolved, num_images))
    return resolved


def describe_schedule(cfg: CfgNode, resolved: CfgNode, num_images: int) -> str:
    """The schedule of a run in one line."""
    solver, batch = resolved.SOLVER, cfg.SOLVER.IMS_PER_BATCH
    epochs = solver.MAX_ITER * batch / num_images
    parts = f" in {solver.ACCUMULATE} parts" if solver.ACCUMULATE > 1 else ""
    rule = f" (= {cfg.SOLVER.BASE_LR:g} x {batch} / {cfg.SOLVER.REFERENCE_BATCH})" if cfg.SOLVER.REFERENCE_BATCH else ""
    lowest = solver.BASE_LR * solver.LAYER_DECAY ** (cfg.MODEL.VIT.DEPTH + 1)
    layers = f", {lowest:.3g} in the first layer" if solver.LAYER_DECAY < 1 else ""
    if solver.LR_SCHEDULER_NAME == "WarmupCosineLR":
        decay = f", then along a cosine to {solver.BASE_LR_END:g}"
    else:
        decay = "".join(f", x {solver.GAMMA:g} after step {step:,}" for step in solver.STEPS)
    return (
        f"{solver.MAX_ITER:,} steps of {batch} images{parts}: {epochs:.4g} epochs of {num_images:,} images; "
        f"learning rate {solver.BASE_LR:.3g}{rule}{layers}, after {solver.WARMUP_ITERS:,} steps of warm-up{decay}"
    )
