"""Self-attention on a grid of tokens: over the whole grid or in windows, with decomposed relative positions.

Source: Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection" (arXiv 2203.16527). Relative
positions follow MViTv2 (arXiv 2112.01526, section 4.1). Shapes: B batch; h and w rows and columns of the whole grid; H
and W rows and columns that one attention covers (a window or the whole grid), N = H * W; E width, d width of a head, n
heads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossmae.models.layers import Attention
from det.backbone.blocked_attention import blocked_attention
from det.config import RelPosAttention

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
        rel_pos_attention: how relative positions are added to the scores. The results are equal except for rounding.
            `auto`: `blocks` on CPUs, `folded` on other devices and in exported graphs.
            `blocks`: the matrix of scores is computed for a block of queries at a time, twice in training.
            `folded`: relative positions become extra channels of queries and keys, for kernels of plain attention.
            `materialized`: an N x N matrix of relative positions is added. This is the reference.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int = 0,
        rel_pos_size: int = 0,
        rel_pos_attention: RelPosAttention = "auto",
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
        h, w = x.shape[1:3]
        H, W = (self.window_size or h), (self.window_size or w)
        qkv = self.qkv(x)  # (B, h, w, 3E); projected before padding, because padding equals the bias
        if h % H or w % W:
            qkv = pad_grid(qkv, self.qkv.bias.to(qkv.dtype), -h % H, -w % W)
        q, k, v = split_windows(qkv, (H, W), self.num_heads)
        if not self.has_rel_pos:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            rows, columns = relative_scores(q, (H, W), self.rel_pos_h, self.rel_pos_w)
            out = self._choose(q.device)(q, k, v, rows, columns)
        return self.proj(join_windows(out, (H, W), qkv.shape[1:3])[:, :h, :w])

    def _choose(self, device: torch.device) -> Callable[..., Tensor]:
        if self.rel_pos_attention == "materialized":
            return materialized_attention
        blocks = device.type == "cpu" and not torch.compiler.is_compiling()
        if self.rel_pos_attention == "blocks" or (self.rel_pos_attention == "auto" and blocks):
            return blocked_attention
        return folded_attention


def split_windows(qkv: Tensor, window: tuple[int, int], heads: int) -> tuple[Tensor, ...]:
    """Split queries, keys and values of a grid into windows.

    The grid is (B, h, w, 3E), and `window` H, W divides h and w. The three results are contiguous, (B * windows, n, N,
    d).
    """
    (B, h, w, E3), (H, W) = qkv.shape, window
    cells = qkv.reshape(B, h // H, H, w // W, W, 3, heads, E3 // 3 // heads)
    return cells.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, -1, heads, H * W, E3 // 3 // heads).unbind(0)


def join_windows(x: Tensor, window: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Join windows to a grid.

    Windows (B * windows, n, N, d) of H, W tokens become (B, h, w, n * d).
    """
    (_, n, _, d), (H, W), (h, w) = x.shape, window, grid
    cells = x.reshape(-1, h // H, w // W, n, H, W, d)
    return cells.permute(0, 1, 4, 2, 5, 3, 6).reshape(-1, h, w, n * d)


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
