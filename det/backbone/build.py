"""`build_backbone`: the backbone without a detector, for other heads and frameworks."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from crossmae.checkpoints.formats.facts import assumed, assumed_lines
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
    """Build a ViT with the simple feature pyramid.

    Neither a config nor detectron2's registry is needed.

    Args:
        name: a named size, for example `crossmae_vit_base_patch16`. Patches of 14 pixels become 16 pixels.
        weights: file of an encoder in any format of `crossmae.checkpoints.weights.read_weights`. None: random weights.
        img_size: image side in pixels that the relative positions of global blocks fit. They are resized for other
            sizes.
        overrides: arguments of `det.ViT` that replace arguments of the named size: `window_size`, `global_blocks`,
            `drop_path`, `rel_pos`, `pos_embed_mode`, `activation_checkpointing`, ...

    Returns:
        A module whose `net` is the encoder. It maps normalised images (B, 3, h, w), with sides that are multiples of
        32, to {"p2": (B, out_channels, h / 4, w / 4), "p3": ..., "p4": ..., "p5": ...,
        "p6": (B, out_channels, h / 64, w / 64)}.

    Raises:
        ValueError: the name or an argument is unknown.
        UserError: the file cannot be read, or its weights do not fit. Nothing was loaded then.
    """
    size = model_arguments(name)
    arguments: dict[str, Any] = {key: size[key] for key in ENCODER_SIZE}
    arguments["patch_size"] = 16
    # The last block of each quarter, as in ViTDet (section 3).
    arguments["global_blocks"] = tuple(arguments["depth"] * quarter // 4 - 1 for quarter in (1, 2, 3, 4))
    source = None
    if weights is not None:
        source = fit_patches(read_weights(weights), 16)
        pretrained = encoder_arguments(encoder_tensors(source), source.metadata).get("img_size")
        if not isinstance(pretrained, int):
            sides = " x ".join(map(str, pretrained)) if pretrained else "unknown"
            raise UserError(
                f"{source.path}: the position embeddings are for images of size {sides}, not for square ones. "
                "Resample them with tools/convert_checkpoint.py."
            )
        arguments["pretrain_img_size"] = pretrained
    net = ViT(img_size, **arguments | overrides)
    if source is not None:
        report = load(net, source, part="encoder", new=NEW, dropped=DROPPED)
        log.info("weights from %s (%s): %s", source.path, source.format, report.summary())
        given = [name for name in ("num_heads",) if name in overrides]
        for line in assumed_lines(assumed(report.assumed, given), {"num_heads": "num_heads"}):
            log.info("%s: %s", source.path, line)
    return build_pyramid(net, out_channels)
