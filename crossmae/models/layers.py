"""Building blocks of the encoder and of the three decoders.

Shapes: B batch, L tokens of the input sequence, S tokens of the context with width E, D width of the queries. Module
and parameter names are the published names (method specification, section 1.3).
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossmae.models.linear import Linear, linear
from crossmae.models.masking import gather_patches

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


class PatchEmbed(nn.Module):
    """Embedding of non-overlapping patches as tokens, by one strided convolution."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, imgs: Tensor, idx: Tensor | None = None) -> Tensor:
        """Embed all patches, or only the patches `idx` (B, K).

        The tokens are (B, H / p, W / p, E) or (B, K, E).
        """
        if idx is None:
            return self.proj(imgs).permute(0, 2, 3, 1)
        patches = gather_patches(imgs, idx, self.proj.kernel_size[0])
        return linear(patches.flatten(2), self.proj.weight.flatten(1), self.proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        _check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Apply self-attention to tokens (B, L, E), and keep the shape."""
        B, L, E = x.shape
        qkv = self.qkv(x).view(B, L, 3, self.num_heads, E // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, L, E / heads)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(B, L, E))


class CrossAttention(nn.Module):
    """Cross-attention from queries of width D to a context of width E (paper, 3.2)."""

    def __init__(self, dim: int, context_dim: int, num_heads: int) -> None:
        super().__init__()
        _check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.q = Linear(dim, dim)
        self.kv = Linear(context_dim, 2 * dim)  # first half keys, second half values
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Attend from queries (B, L, D) to the context (B, S, E)."""
        B, L, D = x.shape
        S, heads = context.shape[1], self.num_heads
        q = self.q(x).view(B, L, heads, D // heads).transpose(1, 2)  # (B, heads, L, D / heads)
        k, v = self.kv(context).view(B, S, 2, heads, D // heads).permute(2, 0, 3, 1, 4)  # (B, heads, S, D / heads)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(B, L, D))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, with timm's names of the parameters."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token of (B, L, E), and keep the shape."""
        return self.fc2(self.act(self.fc1(x)))


class DropPath(nn.Module):
    """Stochastic depth: in training, samples lose the branch with probability `drop_prob` (arXiv 1603.09382)."""

    share: Tensor  # of the samples that keep the branch

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.register_buffer("share", torch.tensor(1 - drop_prob), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Set random samples of x (B, ...) to 0.

        The other samples are divided by the expected share of kept samples.
        """
        if not self.training:
            return x
        shape = (len(x),) + (1,) * (x.ndim - 1)
        if torch.compiler.is_compiling():
            # Code that reads the probability from a tensor is compiled once for the different rates of all blocks.
            return x * ((torch.rand(shape, device=x.device) < self.share) / self.share).to(x.dtype)
        if self.drop_prob == 0:
            return x
        kept = 1 - self.drop_prob
        # Drawn like timm's DropPath: the same seed drops the same samples.
        drawn = x.new_empty(shape).bernoulli_(kept)
        return x * (drawn / kept)


class Block(nn.Module):
    """Pre-norm transformer block: self-attention, then MLP, each with a residual."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Update tokens (B, L, E), and keep the shape."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class CrossBlock(nn.Module):
    """Decoder block: optional self-attention of predicted tokens, cross-attention, MLP (paper, 3.2, 4.3)."""

    def __init__(
        self, dim: int, context_dim: int, num_heads: int, mlp_ratio: float = 4.0, self_attention: bool = False
    ) -> None:
        super().__init__()
        self.has_self_attention = self_attention
        if self_attention:
            self.norm0 = LayerNorm(dim)
            self.self_attn = Attention(dim, num_heads)
        self.norm1 = LayerNorm(dim)
        self.cross_attn = CrossAttention(dim, context_dim, num_heads)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, context: Tensor, context_norm: nn.Module | None = None) -> Tensor:
        """Update tokens (B, M, D) from a context (B, S, E).

        Args:
            context_norm: norm of the context. None: the context is normalised.
        """
        context = context if context_norm is None else context_norm(context)
        if self.has_self_attention:
            x = x + self.self_attn(self.norm0(x))
        x = x + self.cross_attn(self.norm1(x), context)
        return x + self.mlp(self.norm2(x))


def _check_heads(dim: int, num_heads: int) -> None:
    if dim % num_heads:
        raise ValueError(
            f"a width of {dim} cannot be split over {num_heads} attention heads. Choose a divisor of {dim}."
        )
