"""The CrossMAE encoder as a detectron2 backbone: ViTDet's plain backbone and simple feature pyramid.

Source: Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection" (arXiv 2203.16527) and method
specification, section 3.1. Shapes: B batch, H and W rows and columns of patches, E width, d width of a head, n side of
the grid that one attention sees. Key names are those of the published checkpoints, under `net.` in the pyramid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, SimpleFeaturePyramid
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.utils import get_abs_pos, window_partition, window_unpartition
from torch import Tensor, nn

from crossmae.errors import UserError
from crossmae.layers import Attention, Block, PatchEmbed
from crossmae.pos_embed import sincos_pos_embed
from crossmae.vit import patch_grid

SCALE_FACTORS = (4.0, 2.0, 1.0, 0.5)
NORMS = ("", "LN", "GN", "BN", "SyncBN", "FrozenBN")


class SpatialAttention(Attention):
    """Self-attention on a grid of tokens, in windows or over the whole grid, with decomposed relative positions.

    Windows that reach over the edge are padded with zero tokens behind the norm, as in ViTDet: what attention sees
    there are keys and values equal to the bias of `qkv`, and they are not masked.

    Args:
        dim: width E.
        num_heads: attention heads.
        window_size: side of a window in tokens; 0 attends over the whole grid.
        rel_pos_size: side of the grid that the relative position tables are made for; 0 makes none.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int = 0, rel_pos_size: int = 0) -> None:
        super().__init__(dim, num_heads)
        self.window_size = window_size
        self.has_rel_pos = rel_pos_size > 0
        if self.has_rel_pos:
            shape = (2 * rel_pos_size - 1, dim // num_heads)
            self.rel_pos_h = nn.Parameter(torch.zeros(shape))
            self.rel_pos_w = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, E) to (B, H, W, E)."""
        if not self.window_size:
            return self._attend(x)
        windows, padded = window_partition(x, self.window_size)  # (B * windows, window, window, E)
        return window_unpartition(self._attend(windows), self.window_size, padded, x.shape[1:3])

    def _attend(self, x: Tensor) -> Tensor:
        B, H, W, E = x.shape
        qkv = self.qkv(x).view(B, H * W, 3, self.num_heads, E // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, H * W, d)
        bias = self._rel_pos_bias(q, H, W) if self.has_rel_pos else None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(out.transpose(1, 2).reshape(B, H, W, E))

    def _rel_pos_bias(self, q: Tensor, H: int, W: int) -> Tensor:
        """(B, heads, H * W, d) queries, not scaled, to what is added to their (B, heads, H * W, H * W) scores."""
        B, heads, _, d = q.shape
        q = q.view(B, heads, H, W, d)
        Rh, Rw = relative_positions(self.rel_pos_h, H), relative_positions(self.rel_pos_w, W)
        rows = torch.einsum("bnhwd,hkd->bnhwk", q, Rh)  # (B, heads, H, W, H)
        columns = torch.einsum("bnhwd,wkd->bnhwk", q, Rw)  # (B, heads, H, W, W)
        # Contiguous before they are added, or the sum, heads * (H * W)^2 numbers, would have to be copied.
        bias = rows.contiguous()[..., :, None] + columns.contiguous()[..., None, :]
        return bias.reshape(B, heads, H * W, H * W)


def relative_positions(table: Tensor, size: int) -> Tensor:
    """Rows of a relative position table for every (query, key) pair of one axis.

    A table made for another size is resized linearly, as detectron2 does (`get_rel_pos`).

    Args:
        table: (2n - 1, d), from the most negative distance to the most positive.
        size: tokens along the axis.

    Returns:
        (size, size, d); entry [i, j] belongs to the distance i - j.
    """
    if table.shape[0] != 2 * size - 1:
        table = F.interpolate(table.t()[None], size=2 * size - 1, mode="linear")[0].t()
    index = torch.arange(size, device=table.device)
    return table[index[:, None] - index[None, :] + size - 1]


class ViT(Backbone):
    """The CrossMAE encoder on images of any size: no class token, no final norm.

    Linear weights start as Xavier uniform, as in pretraining, positions as the sine-cosine table (trained on from
    there, as in ViTDet), relative positions at zero.

    Args:
        img_size: pixels of a side that relative positions of global blocks are made for; a multiple of `patch_size`.
        pretrain_img_size: pixels of a side in pretraining, which decides the size of `pos_embed`.
        patch_size: side of a square patch in pixels.
        in_chans: image channels.
        embed_dim: width E.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over E.
        drop_path: rate of stochastic depth in the last block; it grows linearly from 0 in the first.
        window_size: side in patches of the windows in all blocks but the global ones; 0 makes every block global.
        global_blocks: indices of the blocks that attend over the whole image.
        rel_pos: add decomposed relative positions in every block.
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
    ) -> None:
        super().__init__()
        self.patch_size, self.embed_dim, self.depth, self.num_heads = patch_size, embed_dim, depth, num_heads
        self.pretrain_img_size, self.mlp_ratio = pretrain_img_size, mlp_ratio
        grid = patch_grid(img_size, patch_size)[0]
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.pos_embed = nn.Parameter(sincos_pos_embed(embed_dim, patch_grid(pretrain_img_size, patch_size)))
        self.blocks = nn.ModuleList()
        for index in range(depth):
            rate = drop_path * index / max(depth - 1, 1)
            window = 0 if index in global_blocks else window_size
            block = Block(embed_dim, num_heads, mlp_ratio, rate)
            block.attn = SpatialAttention(embed_dim, num_heads, window, (window or grid) if rel_pos else 0)
            self.blocks.append(block)
        self.apply(_init_linear)

    def forward(self, imgs: Tensor) -> dict[str, Tensor]:
        """(B, C, h, w) images, sides multiples of the patch, to {"last_feat": (B, E, h / p, w / p)}."""
        if imgs.shape[-2] % self.patch_size or imgs.shape[-1] % self.patch_size:
            raise ValueError(f"image sides must be multiples of {self.patch_size} pixels, got {tuple(imgs.shape[-2:])}")
        x = self.patch_embed(imgs)  # (B, H, W, E)
        x = x + get_abs_pos(self.pos_embed, True, x.shape[1:3])
        for block in self.blocks:
            x = block(x)
        return {"last_feat": x.permute(0, 3, 1, 2)}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of the one feature map."""
        return {"last_feat": ShapeSpec(channels=self.embed_dim, stride=self.patch_size)}


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class FeaturePyramid(SimpleFeaturePyramid):
    """detectron2's pyramid, with batches padded to what encoder and pyramid can divide.

    Upstream spells the key of that number otherwise than its reader does, so that images of odd sizes fail there unless
    they are padded to a square.
    """

    @property
    def padding_constraints(self) -> dict[str, int]:
        """What `ImageList.from_tensors` pads a batch to, in pixels."""
        divisor = max(self._size_divisibility, self.net.patch_size)
        return {"size_divisibility": divisor, "square_size": self._square_pad}


def build_pyramid(
    net: ViT,
    out_channels: int = 256,
    scale_factors: Sequence[float] = SCALE_FACTORS,
    norm: str = "LN",
    max_pool_level: bool = True,
    square_pad: int = 0,
) -> SimpleFeaturePyramid:
    """The simple feature pyramid over an encoder (arXiv 2203.16527, section 3); the encoder becomes its `net`.

    Args:
        net: the encoder.
        out_channels: channels of every level.
        scale_factors: resolution of each level over that of the encoder, falling by halves; 4, 2, 1 and 0.5 exist.
        norm: norm behind each convolution; "" is none.
        max_pool_level: add one coarser level by subsampling the last (p6 of five levels).
        square_pad: pad every batch to a square of so many pixels; 0 pads to the largest image.

    Raises:
        ValueError: the patch size is no power of two, so that the levels have no whole strides; factors or a norm that
            do not exist.
    """
    factors = tuple(scale_factors)
    first = SCALE_FACTORS.index(factors[0]) if factors and factors[0] in SCALE_FACTORS else 0
    if not factors or factors != SCALE_FACTORS[first : first + len(factors)]:
        raise ValueError(f"SCALE_FACTORS must be neighbours of {list(SCALE_FACTORS)}, got {list(factors)}")
    if norm not in NORMS:
        raise ValueError(f"NORM must be one of {', '.join(NORMS[1:])}, or empty for none, got {norm!r}")
    if net.patch_size & (net.patch_size - 1):
        raise ValueError(f"the feature pyramid needs a patch size that is a power of two, got {net.patch_size}")
    top_block = None
    if max_pool_level:
        top_block = LastLevelMaxPool()
        top_block.in_feature = f"p{int(math.log2(net.patch_size / scale_factors[-1]))}"
    return FeaturePyramid(net, "last_feat", out_channels, scale_factors, top_block, norm, square_pad)


@BACKBONE_REGISTRY.register()
def build_crossmae_vitdet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SimpleFeaturePyramid:
    """`MODEL.BACKBONE.NAME: build_crossmae_vitdet_backbone`: encoder and pyramid from `MODEL.VIT.*`."""
    vit = cfg.MODEL.VIT
    try:
        net = ViT(
            img_size=vit.IMG_SIZE,
            pretrain_img_size=vit.PRETRAIN_IMG_SIZE,
            patch_size=vit.PATCH_SIZE,
            in_chans=input_shape.channels,
            embed_dim=vit.EMBED_DIM,
            depth=vit.DEPTH,
            num_heads=vit.NUM_HEADS,
            mlp_ratio=vit.MLP_RATIO,
            drop_path=vit.DROP_PATH,
            window_size=vit.WINDOW_SIZE,
            global_blocks=vit.GLOBAL_BLOCKS,
            rel_pos=vit.REL_POS,
        )
        pyramid = build_pyramid(net, vit.OUT_CHANNELS, vit.SCALE_FACTORS, vit.NORM, vit.MAX_POOL_LEVEL, vit.SQUARE_PAD)
    except ValueError as error:
        raise UserError(f"MODEL.VIT: {error}") from error
    levels = list(pyramid.output_shape())
    for key, names in (
        ("MODEL.RPN.IN_FEATURES", cfg.MODEL.RPN.IN_FEATURES),
        ("MODEL.ROI_HEADS.IN_FEATURES", cfg.MODEL.ROI_HEADS.IN_FEATURES),
    ):
        if not set(names) <= set(levels):
            raise UserError(
                f"{key} is {list(names)}, but MODEL.VIT.PATCH_SIZE {vit.PATCH_SIZE} gives the levels {levels}"
            )
    return pyramid
