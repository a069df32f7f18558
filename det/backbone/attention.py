"""Self-attention on a grid of tokens: over the whole grid or in windows, with decomposed relative positions.

Source: Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection" (arXiv 2203.16527). Relative
positions follow MViTv2 (arXiv 2112.01526, section 4.1). Shapes: B batch; h and w rows and columns of the whole grid; H
and W rows and columns that one attention covers (a window or the whole grid), N = H * W; E width, d width of a head, n
heads.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from detectron2.modeling.backbone.utils import window_partition, window_unpartition
from torch import Tensor, nn

from crossmae.models.layers import Attention

RelPosAttention = Literal["folded", "materialized"]
# Attention kernels without an N x N matrix support heads up to this width. In half precision, they need q, k and v of
# equal width.
WIDEST_HEAD = 256


class SpatialAttention(Attention):
    """Self-attention on a grid of tokens, in windows or over the whole grid, with decomposed relative positions.

    Windows that extend over the edge of the grid are padded as in ViTDet. Padded queries, keys and values equal the
    bias of `qkv`, and are not masked.

    Args:
        window_size: side of a window in tokens. 0 attends over the whole grid.
        rel_pos_size: side of the grid that the relative position tables fit. 0 makes no tables.
        rel_pos_attention: `folded` puts relative positions into extra channels of queries and keys, and needs no N x N
            matrix. `materialized` adds an N x N matrix of relative positions to the scores, and is the reference. The
            results are equal except for rounding.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int = 0,
        rel_pos_size: int = 0,
        rel_pos_attention: RelPosAttention = "folded",
    ) -> None:
        super().__init__(dim, num_heads)
        self.window_size, self.rel_pos_attention = window_size, rel_pos_attention
        self.has_rel_pos = rel_pos_size > 0
        if self.has_rel_pos:
            shape = (2 * rel_pos_size - 1, dim // num_heads)
            self.rel_pos_h = nn.Parameter(torch.zeros(shape))
            self.rel_pos_w = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        """Attend over a grid of tokens (B, h, w, E)."""
        qkv = self.qkv(x)  # (B, h, w, 3E); projected before padding, because padding equals the bias
        if not self.window_size:
            return self.proj(self._attend(qkv))
        h, w = x.shape[1:3]
        whole = pad_grid(qkv, self.qkv.bias.to(qkv.dtype), -h % self.window_size, -w % self.window_size)
        windows, padded = window_partition(whole, self.window_size)  # (B * windows, window, window, 3E)
        return self.proj(window_unpartition(self._attend(windows), self.window_size, padded, (h, w)))

    def _attend(self, qkv: Tensor) -> Tensor:
        B, H, W, E3 = qkv.shape
        split = qkv.reshape(B, H * W, 3, self.num_heads, E3 // 3 // self.num_heads)
        q, k, v = split.permute(2, 0, 3, 1, 4)  # each (B, n, N, d)
        if not self.has_rel_pos:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            rows, columns = relative_scores(q, (H, W), self.rel_pos_h, self.rel_pos_w)
            attend = folded_attention if self.rel_pos_attention == "folded" else materialized_attention
            out = attend(q, k, v, rows, columns)
        return out.transpose(1, 2).reshape(B, H, W, E3 // 3)


def pad_grid(x: Tensor, fill: Tensor, bottom: int, right: int) -> Tensor:
    """Pad a grid (B, h, w, C) with `fill` (C,)."""
    if right:
        x = torch.cat([x, fill.expand(x.shape[0], x.shape[1], right, -1)], dim=2)
    if bottom:
        x = torch.cat([x, fill.expand(x.shape[0], bottom, x.shape[2], -1)], dim=1)
    return x


def relative_scores(q: Tensor, grid: tuple[int, int], rel_pos_h: Tensor, rel_pos_w: Tensor) -> tuple[Tensor, Tensor]:
    """Compute relative scores (B, n, N, H) and (B, n, N, W).

    The scores depend on the row and the column of the key. q (B, n, N, d) are queries that are not scaled, on a grid H,
    W.
    """
    B, n, N, d = q.shape
    H, W = grid
    q = q.reshape(B, n, H, W, d)
    rows = torch.einsum("bnhwd,hkd->bnhwk", q, relative_positions(rel_pos_h, H))
    columns = torch.einsum("bnhwd,wkd->bnhwk", q, relative_positions(rel_pos_w, W))
    return rows.reshape(B, n, N, H), columns.reshape(B, n, N, W)


def relative_positions(table: Tensor, size: int) -> Tensor:
    """Look up relative positions for every (query, key) pair of one axis.

    The table (2n - 1, d) runs from the most negative to the most positive distance. It is resized linearly to `size`,
    as in detectron2 (`get_rel_pos`). In the result (size, size, d), entry [i, j] belongs to the distance i - j.
    """
    if table.shape[0] != 2 * size - 1:
        table = F.interpolate(table.t()[None], size=2 * size - 1, mode="linear")[0].t()
    index = torch.arange(size, device=table.device)
    return table[index[:, None] - index[None, :] + size - 1]


def folded_attention(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Attend with relative scores, but without an N x N matrix.

    Source: FlashBias, arXiv 2505.12044. q' = [q / sqrt(d), rows, columns] and k' = [k, one-hot(row), one-hot(column)]
    have the same product, so that any kernel for plain attention works. All gradients are exact. q, k, v and the result
    are (B, n, N, d). `rows` and `columns` are from `relative_scores`.
    """
    B, n, N, d = q.shape
    H, W = rows.shape[-1], columns.shape[-1]
    width = d + H + W + -(d + H + W) % 8  # kernels need multiples of 8
    row, column = (torch.eye(side, dtype=k.dtype, device=k.device) for side in (H, W))
    cells = torch.cat([row.repeat_interleave(W, dim=0), column.repeat(H, 1)], dim=1)  # (N, H + W)
    q = torch.cat([q * d**-0.5, rows, columns, q.new_zeros(1).expand(B, n, N, width - d - H - W)], dim=-1)
    k = F.pad(torch.cat([k, cells.expand(B, n, -1, -1)], dim=-1), (0, width - d - H - W))
    half = q.dtype in (torch.float16, torch.bfloat16)
    if width <= WIDEST_HEAD and (half or q.device.type == "cpu"):
        v = F.pad(v, (0, width - d))
    return F.scaled_dot_product_attention(q, k, v, scale=1.0)[..., :d]


def materialized_attention(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Attend with an N x N matrix of biases: the slow reference."""
    B, n, N, _ = q.shape
    # Make both contiguous first. Otherwise their sum of n * N^2 numbers would be copied.
    bias = rows.contiguous()[..., :, None] + columns.contiguous()[..., None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.reshape(B, n, N, N))
