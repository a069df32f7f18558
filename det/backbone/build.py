"""The backbone without detector, for other heads and frameworks: `build_backbone`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from crossmae.checkpoints.loading import load
from crossmae.checkpoints.weights import encoder_arguments, encoder_tensors, read_weights
from crossmae.errors import UserError
from crossmae.models.sizes import model_arguments
from det.backbone.vit import FeaturePyramid, ViT, build_pyramid
from det.backbone.weights import DROPPED, NEW, fit_patches

log = logging.getLogger(__name__)

ENCODER_SIZE = ("embed_dim", "depth", "num_heads")


def build_backbone(
    name: str,
    weights: str | Path | None = None,
    img_size: int = 1024,
    *,
    out_channels: int = 256,
    **overrides: Any,
) -> FeaturePyramid:
    """Build a ViT with the simple feature pyramid, without config or registry.

    Args:
        name: a named size, for example `crossmae_vit_base_patch16`; patches of 14 pixels become 16.
        weights: an encoder of any known format, see `crossmae.checkpoints.weights.read_weights`; None: random weights.
        img_size: pixels of a side that relative positions of global blocks are made for; others are resized to.
        overrides: arguments of `det.ViT` that replace those of the name: `window_size`, `global_blocks`, `drop_path`,
            `rel_pos`, `pos_embed_mode`, `activation_checkpointing`, ...

    Returns:
        A module from normalised images (B, 3, h, w), sides multiples of 32, to {"p2": (B, out_channels, h / 4, w / 4),
        "p3": ..., "p4": ..., "p5": ..., "p6": (B, out_channels, h / 64, w / 64)}. Its encoder is `.net`.

    Raises:
        ValueError: an unknown name or argument.
        UserError: a file that cannot be read, or does not fit; nothing was loaded.
    """
    size = model_arguments(name)
    arguments: dict[str, Any] = {key: size[key] for key in ENCODER_SIZE}
    arguments["patch_size"] = 16
    arguments["global_blocks"] = evenly_spaced_blocks(arguments["depth"])
    source = None
    if weights is not None:
        source = fit_patches(read_weights(weights), 16)
        pretrained = encoder_arguments(encoder_tensors(source), source.metadata).get("img_size")
        if not isinstance(pretrained, int):
            raise UserError(f"{source.path}: the position table is of {pretrained} pixels, a square one is needed")
        arguments["pretrain_img_size"] = pretrained
    net = ViT(img_size, **arguments | overrides)
    if source is not None:
        report = load(net, source, part="encoder", new=NEW, dropped=DROPPED)
        log.info("weights from %s (%s): %s", source.path, source.format, report.summary())
    return build_pyramid(net, out_channels)


def evenly_spaced_blocks(depth: int) -> tuple[int, ...]:
    """Choose the last block of each quarter, as ViTDet does (section 3)."""
    return tuple(depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4))
