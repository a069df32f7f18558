"""The CrossMAE encoder as a detectron2 backbone: ViTDet's plain backbone and simple feature pyramid.

Sources: Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection" (arXiv 2203.16527), and method
specification, section 3.1. Shapes: B batch, H and W rows and columns of patches, E width. Tensors have the names of the
published checkpoints, with the prefix `net.` in the pyramid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.layers.batch_norm import LayerNorm as ChannelFirstLayerNorm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, SimpleFeaturePyramid
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.utils import get_abs_pos
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crossmae.errors import UserError
from crossmae.models.encoder import patch_grid
from crossmae.models.layers import Block, PatchEmbed
from crossmae.models.positions import sincos_pos_embed
from det.backbone.attention import SpatialAttention
from det.config import PosEmbed, RelPosAttention

SCALE_FACTORS = (4.0, 2.0, 1.0, 0.5)
# Types of devices on which pyramid, proposals and heads compute channels-last. Results are equal except for rounding.
CHANNELS_LAST = ("cpu", "cuda")
NORMS = ("", "LN", "GN", "BN", "SyncBN", "FrozenBN")
# Keys of MODEL.VIT. In lower case, they are names of arguments.
ENCODER_KEYS = (
    *("IMG_SIZE", "PRETRAIN_IMG_SIZE", "PATCH_SIZE", "EMBED_DIM", "DEPTH", "NUM_HEADS", "MLP_RATIO", "DROP_PATH"),
    *("WINDOW_SIZE", "GLOBAL_BLOCKS", "REL_POS", "ACTIVATION_CHECKPOINTING"),
)
PYRAMID_KEYS = ("OUT_CHANNELS", "SCALE_FACTORS", "NORM", "MAX_POOL_LEVEL", "SQUARE_PAD", "SQUARE_PAD_TEST")


class ViT(Backbone):
    """The CrossMAE encoder on images of any size, without class token and final norm.

    Linear weights start as Xavier uniform. Position embeddings start as sine-cosine and are trained. Relative positions
    start at zero.

    The position embeddings of pretraining are fitted to an image of another size in one of three ways:

    | `pos_embed_mode` | position embeddings of the image                                           | source          |
    | ---------------- | -------------------------------------------------------------------------- | --------------- |
    | `resize`         | resized (bicubic)                                                          | ViTDet          |
    | `tiled`          | resized to a window, and repeated in every window                          | 2311.05613, 4.2 |
    | `absolute_win`   | `tiled`, plus a second table, trained from zero, resized over the image    | 2311.05613, 4.1 |

    Args:
        img_size: image side in pixels that the relative positions of global blocks fit; a multiple of `patch_size`.
        pretrain_img_size: image side in pixels in pretraining. It decides the size of `pos_embed`.
        patch_size: side of a square patch in pixels.
        mlp_ratio: hidden width of the MLP divided by E.
        drop_path: rate of stochastic depth in the last block. It grows linearly from 0 in the first block.
        window_size: side of a window in patches, for all blocks except the global blocks. 0 makes every block global.
        global_blocks: indices of the blocks that attend over the whole image.
        pos_embed_mode: see the table above. Without windows, a tile has the size of the position embeddings.
        activation_checkpointing: recompute every block in the backward pass, instead of storing its activations.
    """

    def __init__(
        self,
        img_size: int = 1024,
        pretrain_img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        window_size: int = 14,
        global_blocks: Sequence[int] = (2, 5, 8, 11),
        rel_pos: bool = True,
        pos_embed_mode: PosEmbed = "resize",
        rel_pos_attention: RelPosAttention = "auto",
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.patch_size, self.embed_dim, self.depth, self.num_heads = patch_size, embed_dim, depth, num_heads
        self.pretrain_img_size, self.mlp_ratio = pretrain_img_size, mlp_ratio
        self.pos_embed_mode, self.activation_checkpointing = pos_embed_mode, activation_checkpointing
        self.frozen_stages = -1
        grid, table = patch_grid(img_size, patch_size)[0], patch_grid(pretrain_img_size, patch_size)
        self.tile = window_size or table[0]
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.pos_embed = nn.Parameter(sincos_pos_embed(embed_dim, table))
        if pos_embed_mode == "absolute_win":
            self.pos_embed_global = nn.Parameter(torch.zeros(1, table[0] * table[1], embed_dim))
        self.blocks = nn.ModuleList()
        for index in range(depth):
            rate = drop_path * index / max(depth - 1, 1)
            window = 0 if index in global_blocks else window_size
            block = Block(embed_dim, num_heads, mlp_ratio, rate)
            side = (window or grid) if rel_pos else 0
            block.attn = SpatialAttention(embed_dim, num_heads, window, side, rel_pos_attention)
            self.blocks.append(block)
        self.apply(_init_linear)

    def forward(self, imgs: Tensor) -> dict[str, Tensor]:
        """Encode images (B, C, h, w) to {"last_feat": (B, E, H, W)}."""
        if imgs.shape[-2] % self.patch_size or imgs.shape[-1] % self.patch_size:
            sides = tuple(imgs.shape[-2:])
            raise ValueError(f"images: {sides} does not fit the patches. Pad to multiples of {self.patch_size} pixels.")
        x = self.patch_embed(imgs)  # (B, H, W, E)
        x = x + self.positions(x.shape[1], x.shape[2])
        x = x.contiguous()  # the convolution has channels first, and every norm and linear layer would copy them
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        features = x.permute(0, 3, 1, 2)
        return {"last_feat": features if x.device.type in CHANNELS_LAST else features.contiguous()}

    def positions(self, H: int, W: int) -> Tensor:
        """Compute position embeddings (1, H, W, E) for H x W patches."""
        if self.pos_embed_mode == "resize":
            return get_abs_pos(self.pos_embed, True, (H, W))
        tile = get_abs_pos(self.pos_embed, True, (self.tile, self.tile))
        tiles = tile.repeat(1, math.ceil(H / self.tile), math.ceil(W / self.tile), 1)[:, :H, :W]
        if self.pos_embed_mode == "tiled":
            return tiles
        return tiles + get_abs_pos(self.pos_embed_global, False, (H, W))

    def freeze(self, stages: int) -> None:
        """Freeze the first stages.

        -1 freezes nothing. 0 freezes patch embedding and positions. n also freezes the first n blocks. Frozen blocks
        drop no paths, and their relative positions stay at zero. The second table of `absolute_win` is always trained.
        """
        if stages > self.depth:
            raise ValueError(f"FROZEN_STAGES {stages} is more than DEPTH. Use at most {self.depth}.")
        self.frozen_stages = stages
        for name, parameter in self.named_parameters():
            if stages >= 0 and name.startswith(("patch_embed.", "pos_embed")) and name != "pos_embed_global":
                parameter.requires_grad_(False)
        for block in self.blocks[: max(stages, 0)]:
            block.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> ViT:
        """Set the mode. Frozen blocks stay in evaluation mode."""
        super().train(mode)
        for block in self.blocks[: max(self.frozen_stages, 0)]:
            block.eval()
        return self

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {"last_feat": ShapeSpec(channels=self.embed_dim, stride=self.patch_size)}


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class ChannelLayerNorm(ChannelFirstLayerNorm):
    """detectron2's LayerNorm over the channels of (B, C, H, W), in one fused call instead of eight calls."""

    def forward(self, x: Tensor) -> Tensor:
        last = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return last.permute(0, 3, 1, 2)


class FeaturePyramid(SimpleFeaturePyramid):
    """detectron2's pyramid, with batches padded to sides that fit the encoder and the pyramid.

    detectron2 writes and reads the divisor under two different names. Without this class, images of odd sizes would
    fail unless they are padded to a square.
    """

    square_pad_test = 0

    @property
    def padding_constraints(self) -> dict[str, int]:
        """Padding in pixels, as arguments of `ImageList.from_tensors`."""
        divisor = max(self._size_divisibility, self.net.patch_size)
        square = self._square_pad if self.training else self.square_pad_test
        return {"size_divisibility": divisor, "square_size": square}


def build_pyramid(
    net: ViT,
    out_channels: int = 256,
    scale_factors: Sequence[float] = SCALE_FACTORS,
    norm: str = "LN",
    max_pool_level: bool = True,
    square_pad: int = 0,
    square_pad_test: int = 0,
) -> FeaturePyramid:
    """Build the simple feature pyramid over an encoder (arXiv 2203.16527, section 3).

    Args:
        net: the encoder. It becomes the pyramid's `net`.
        out_channels: channels of every level.
        scale_factors: resolution of each level divided by the encoder's resolution: neighbours in 4, 2, 1 and 0.5.
        norm: norm after each convolution. "" uses no norm.
        max_pool_level: add a coarser level by subsampling the last level (p6 after p2 to p5).
        square_pad: in training, pad every batch to a square with this side in pixels. 0 pads to the largest image.
        square_pad_test: the same in evaluation and prediction.
    """
    factors = tuple(scale_factors)
    first = SCALE_FACTORS.index(factors[0]) if factors and factors[0] in SCALE_FACTORS else 0
    if not factors or factors != SCALE_FACTORS[first : first + len(factors)]:
        raise ValueError(f"SCALE_FACTORS {list(factors)} is not possible. Use neighbours of {list(SCALE_FACTORS)}.")
    if norm not in NORMS:
        raise ValueError(f"NORM {norm!r} is unknown. Use {', '.join(NORMS[1:])}, or an empty text for no norm.")
    if net.patch_size & (net.patch_size - 1):
        raise ValueError(
            f"PATCH_SIZE {net.patch_size} is no power of two, which the feature pyramid needs. Use 16; weights with "
            "patches of 14 are resized automatically."
        )
    top_block = None
    if max_pool_level:
        top_block = LastLevelMaxPool()
        top_block.in_feature = f"p{int(math.log2(net.patch_size / scale_factors[-1]))}"
    norm_layer = ChannelLayerNorm if norm == "LN" else norm
    pyramid = FeaturePyramid(net, "last_feat", out_channels, scale_factors, top_block, norm_layer, square_pad)
    pyramid.square_pad_test = square_pad_test
    return pyramid


@BACKBONE_REGISTRY.register()
def build_crossmae_vitdet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FeaturePyramid:
    """Build encoder and pyramid from `MODEL.VIT.*`, for `MODEL.BACKBONE.NAME`."""
    vit = cfg.MODEL.VIT
    try:
        net = ViT(
            in_chans=input_shape.channels,
            pos_embed_mode=vit.POS_EMBED,
            rel_pos_attention=vit.ATTENTION,
            **{name.lower(): vit[name] for name in ENCODER_KEYS},
        )
        net.freeze(vit.FROZEN_STAGES)
        pyramid = build_pyramid(net, **{name.lower(): vit[name] for name in PYRAMID_KEYS})
    except ValueError as error:
        raise UserError(f"MODEL.VIT: {error}") from error
    levels = list(pyramid.output_shape())
    for key in ("RPN", "ROI_HEADS"):
        names = list(cfg.MODEL[key].IN_FEATURES)
        if not set(names) <= set(levels):
            patch = f"MODEL.VIT.PATCH_SIZE {vit.PATCH_SIZE}"
            raise UserError(f"MODEL.{key}.IN_FEATURES: not all of {names} exist with {patch}. Choose from {levels}.")
    return pyramid
