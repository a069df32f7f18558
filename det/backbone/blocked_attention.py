"""Exact attention with relative scores in blocks of queries, for CPUs.

A block's matrix of scores fits into the processor's cache, and only one such matrix exists at a time. The backward pass
computes the matrix again. Shapes: G images, windows and heads together; N = H * W tokens; d width of a head; R queries
of a block; g members of G in a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Scores of a block: 2 MB in float32, which fit into the cache of a core or of its neighbours.
BLOCK_SCORES = 2**19


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Attend with relative scores, in blocks of queries.

    Memory is linear in N, in the backward pass, too. Half precision is computed in float32. All gradients are exact,
    but cannot be differentiated again. q, k, v and the result are (B, n, N, d). `rows` (B, n, N, H) and `columns`
    (B, n, N, W) are from `relative_scores`.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        inputs = (value.to(dtype).flatten(0, 1) for value in (q, k, v, rows, columns))
        out: Tensor = _BlockedAttention.apply(*inputs)
    return out.view(q.shape).to(q.dtype)


class _BlockedAttention(torch.autograd.Function):
    """Attention of (G, N, d), with relative scores (G, N, H) and (G, N, W)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        out = torch.empty_like(v)
        for block, weights, _ in _blocks(q, k, rows, columns):
            torch.bmm(weights, v[block[0]], out=out[block])
        ctx.save_for_backward(q, k, v, rows, columns, out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        q, k, v, rows, columns, out = ctx.saved_tensors
        scale, sides = q.shape[-1] ** -0.5, (rows.shape[-1], columns.shape[-1])
        of_k, of_v = torch.zeros_like(k), torch.zeros_like(v)
        of_q, of_rows, of_columns = (torch.empty_like(value) for value in (q, rows, columns))
        with torch.autocast(q.device.type, enabled=False):
            means = (grad * out).sum(-1, keepdim=True)  # (G, N, 1): mean gradient of the weights of each query
            for block, weights, spare in _blocks(q, k, rows, columns):
                members = block[0]
                of_v[members].baddbmm_(weights.mT, grad[block])
                of_scores = torch.bmm(grad[block], v[members].mT, out=spare).sub_(means[block]).mul_(weights)
                torch.bmm(of_scores, k[members], out=of_q[block])
                of_k[members].baddbmm_(of_scores.mT, q[block], alpha=scale)
                torch.sum(of_scores.unflatten(-1, sides), 3, out=of_rows[block])
                torch.sum(of_scores.unflatten(-1, sides), 2, out=of_columns[block])
        return of_q.mul_(scale), of_k, of_v, of_rows, of_columns


def block_shape(members: int, tokens: int) -> tuple[int, int]:
    """Choose the members of a block, and the queries of each."""
    queries = min(tokens, max(BLOCK_SCORES // tokens, 1))
    return min(members, max(BLOCK_SCORES // (queries * tokens), 1)), queries


def _blocks(
    q: Tensor, k: Tensor, rows: Tensor, columns: Tensor
) -> Iterator[tuple[tuple[slice, slice], Tensor, Tensor]]:
    """Yield the index, attention weights and spare memory of each block.

    The index has members and queries. The next block overwrites the two tensors (g, R, N).
    """
    (G, N, d), (H, W) = q.shape, (rows.shape[-1], columns.shape[-1])
    g, R = block_shape(G, N)
    buffers = q.new_empty(2, g * R * N)
    for member in range(0, G, g):
        members = slice(member, min(member + g, G))
        for query in range(0, N, R):
            block = members, slice(query, min(query + R, N))
            q_, rows_, columns_ = q[block], rows[block], columns[block]
            shape = (*q_.shape[:2], N)
            scores, weights = (buffer[: shape[0] * shape[1] * N].view(shape) for buffer in buffers)
            torch.add(rows_[..., None], columns_[..., None, :], out=scores.view(*shape[:2], H, W))
            scores.baddbmm_(q_, k[members].mT, alpha=d**-0.5)
            yield block, torch.softmax(scores, -1, out=weights), scores
