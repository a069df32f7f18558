"""A plain port of the published CrossMAE design, written from the method specification alone: the other side.

Everything is done as the specification describes it (sections 1.4 to 1.8): feature maps are stacked on a new last axis
and mixed by a tiny linear layer, each decoder block normalises a strided slice of the result, all patches are embedded
and cut out, and binary masks select queries and targets. State dicts of `crossmae.CrossMAE` fit. Shapes: N images, L
patches, V visible patches, M predicted patches, E and d widths of encoder and decoder, k maps, D decoder
blocks, S = 1 + V tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Update tokens (N, tokens, width)."""
        return self.fc2(self.act(self.fc1(x)))


class SelfAttention(nn.Module):
    """Attention among all tokens, from one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Update tokens (N, tokens, width)."""
        size, tokens, width = x.shape
        qkv = self.qkv(x).reshape(size, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return self.proj(mixed.transpose(1, 2).reshape(size, tokens, width))


class Attention(nn.Module):
    """Attention of queries of width d to tokens of width E."""

    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(context, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Update queries (N, M, d) from tokens (N, S, E)."""
        size, tokens, width = x.shape
        q = self.q(x).reshape(size, tokens, self.heads, width // self.heads).permute(0, 2, 1, 3)
        kv = self.kv(context).reshape(size, context.shape[1], 2, self.heads, width // self.heads)
        kv = kv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, kv[0], kv[1])
        return self.proj(mixed.transpose(1, 2).reshape(size, tokens, width))


class EncoderBlock(nn.Module):
    """Self-attention and MLP, each after a norm and with a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=EPS), SelfAttention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=EPS), Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        """Update tokens (N, tokens, E)."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class DecoderBlock(nn.Module):
    """Cross-attention and MLP, each after a norm and with a residual."""

    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.cross_attn = nn.LayerNorm(width, eps=EPS), Attention(width, context, heads)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=EPS), Mlp(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Update queries (N, M, d) from normalised tokens (N, S, E)."""
        x = x + self.cross_attn(self.norm1(x), context)
        return x + self.mlp(self.norm2(x))


class WeightedMaps(nn.Module):
    """Linear mix of k maps into D maps, along a new last axis."""

    def __init__(self, maps: int, mixes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(maps, mixes, bias=False)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Mix maps (N, S, E) into (N, S, E, D)."""
        return self.linear(torch.stack(maps, dim=-1))


class PatchConvolution(nn.Module):
    """Embedding of all patches by a strided convolution."""

    def __init__(self, patch_size: int, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """Embed images as tokens (N, L, E)."""
        return self.proj(images).flatten(2).transpose(1, 2)


class PublishedCrossMAE(nn.Module):
    """CrossMAE with fused maps and fused input, for square images.

    Args:
        embed_dim, depth, num_heads: width E, blocks and heads of the encoder.
        decoder_embed_dim, decoder_depth, decoder_num_heads: width d, blocks D and heads of the decoder.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 12,
        decoder_num_heads: int = 16,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        patches = (img_size // patch_size) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + 1, embed_dim), requires_grad=False)
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, patches + 1, decoder_embed_dim), requires_grad=False)
        self.patch_embed = PatchConvolution(patch_size, in_chans, embed_dim)
        self.blocks = nn.ModuleList(EncoderBlock(embed_dim, num_heads) for _ in range(depth))
        self.wfm = WeightedMaps(depth + 1, decoder_depth)
        self.dec_norms = nn.ModuleList(nn.LayerNorm(embed_dim, eps=EPS) for _ in range(decoder_depth))
        self.decoder_blocks = nn.ModuleList(
            DecoderBlock(decoder_embed_dim, embed_dim, decoder_num_heads) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=EPS)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_size**2 * in_chans)

    def forward(self, images: Tensor, mask_ratio: float, predict_ratio: float, noise: Tensor) -> Tensor:
        """Compute the loss of images, with noise (N, L)."""
        x = self.patch_embed(images) + self.pos_embed[:, 1:]
        x, mask = split_tokens(x, noise, mask_ratio, predict_ratio)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        maps = [x]
        for block in self.blocks:
            x = block(x)
            maps.append(x)
        return self.decode_loss(images, self.wfm(maps), mask)

    def decode_loss(self, images: Tensor, mixes: Tensor, mask: Tensor) -> Tensor:
        """Compute the loss from mixes (N, S, E, D) and a mask."""
        size, patches = mask.shape
        queries = (self.decoder_pos_embed[:, 1:] + self.mask_token).expand(size, patches, -1)
        x = queries[mask.bool()].reshape(size, -1, queries.shape[-1])
        for index, block in enumerate(self.decoder_blocks):
            x = block(x, self.dec_norms[index](mixes[..., index]))
        predictions = self.decoder_pred(self.decoder_norm(x))
        return ((predictions - select_targets(images, mask, self.patch_size)) ** 2).mean()


def split_tokens(x: Tensor, noise: Tensor, mask_ratio: float, predict_ratio: float) -> tuple[Tensor, Tensor]:
    """Select visible tokens, and mark predicted tokens.

    Returns tokens (N, V, E) in shuffled order, and a mask (N, L) that is 1 for predicted tokens.
    """
    size, patches, width = x.shape
    visible = int(patches * (1 - mask_ratio))
    dropped = int(patches * (mask_ratio - predict_ratio))
    shuffle = torch.argsort(noise, dim=1)
    restore = torch.argsort(shuffle, dim=1)
    kept = torch.gather(x, 1, shuffle[:, :visible].unsqueeze(-1).repeat(1, 1, width))
    mask = torch.ones(size, patches, device=x.device)
    mask[:, : visible + dropped] = 0
    return kept, torch.gather(mask, 1, restore)


def select_targets(images: Tensor, mask: Tensor, patch_size: int) -> Tensor:
    """Cut out and standardise all patches, then select (N, M, P)."""
    size, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    x = images.reshape(size, channels, rows, patch_size, columns, patch_size)
    x = x.permute(0, 2, 4, 3, 5, 1).reshape(size, rows * columns, patch_size**2 * channels)
    x = (x - x.mean(dim=-1, keepdim=True)) / (x.var(dim=-1, keepdim=True) + EPS) ** 0.5
    return x[mask.bool()].reshape(size, -1, x.shape[-1])
