"""The plain ViT encoder that every part of the toolkit uses.

Shapes: B batch, L patches, V visible patches, K class tokens, E width. Key names are the published names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crossmae.models.layers import Block, PatchEmbed
from crossmae.models.masking import gather_tokens
from crossmae.models.positions import sincos_pos_embed

ENCODER_PREFIXES = ("cls_token", "pos_embed", "patch_embed.", "blocks.")


def patch_grid(img_size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Count the rows and columns of patches in an image.

    Raises ValueError if a side is not a positive multiple of the patch size. The message names the nearest valid sizes.
    """
    sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(sides) != 2:
        raise ValueError(f"img_size {img_size!r} is not a size. Give one number or (height, width).")
    for side in sides:
        if side < patch_size or side % patch_size:
            lower = max(side // patch_size, 1) * patch_size
            raise ValueError(
                f"img_size {img_size} is not a multiple of patch_size {patch_size}. "
                f"Choose a multiple: the nearest valid sizes are {lower} and {lower + patch_size}."
            )
    return sides[0] // patch_size, sides[1] // patch_size


class ViTEncoder(nn.Module):
    """Patch embedding, class tokens, fixed sine-cosine position embeddings and pre-norm blocks, without a final norm.

    Args:
        img_size: image size in pixels; one number for a square image, or (height, width). Both sides must be multiples
            of `patch_size`.
        patch_size: side of a square patch in pixels.
        mlp_ratio: hidden width of the MLP divided by E.
        class_tokens: number of class tokens, K. Published models have 1; Pixio (arXiv 2512.15715) has 8.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        class_tokens: int = 1,
    ) -> None:
        super().__init__()
        self.grid = patch_grid(img_size, patch_size)
        self.patch_size, self.in_chans, self.embed_dim, self.depth = patch_size, in_chans, embed_dim, depth
        if class_tokens < 1:
            raise ValueError(f"class_tokens {class_tokens} is too small. Choose at least 1.")
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, class_tokens, embed_dim))
        # A parameter without gradient: part of the state dict, as published, but not changed by the optimizer.
        self.pos_embed = nn.Parameter(sincos_pos_embed(embed_dim, self.grid), requires_grad=False)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.activation_checkpointing = False

    @property
    def num_patches(self) -> int:
        """Number of patches of one image, L."""
        return self.grid[0] * self.grid[1]

    @property
    def class_tokens(self) -> int:
        """Number of class tokens, K."""
        return self.cls_token.shape[1]

    @property
    def img_size(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        return self.grid[0] * self.patch_size, self.grid[1] * self.patch_size

    def embed(self, imgs: Tensor, visible_idx: Tensor | None = None) -> Tensor:
        """Embed images as tokens (B, K + V, E), class tokens first.

        Args:
            imgs: (B, C, H, W) normalised pixels of the image size that the model was built for.
            visible_idx: (B, V) patches to keep, in the given order; None: all patches in raster order.
        """
        B, C, H, W = imgs.shape
        expected = (self.in_chans, *self.img_size)
        if expected != (C, H, W):
            raise ValueError(
                f"images of (channels, height, width) {(C, H, W)} do not fit the model. It needs {expected}."
            )
        positions = self.pos_embed[:, 1:]
        if visible_idx is None:
            tokens = self.patch_embed(imgs).flatten(1, 2) + positions  # (B, L, E)
        else:
            tokens = self.patch_embed(imgs, visible_idx) + gather_tokens(positions.expand(B, -1, -1), visible_idx)
        cls_token = self.cls_token + self.pos_embed[:, :1]  # zeros, unless the position embeddings were learned
        return torch.cat([cls_token.expand(B, -1, -1).to(tokens.dtype), tokens], dim=1)

    def features(self, tokens: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Run the blocks, and collect the outputs (B, K + V, E).

        Args:
            tokens: (B, K + V, E) from `embed`.
            blocks: ascending indices of the blocks whose outputs are collected.
        """
        maps = []
        for index, block in enumerate(self.blocks[: blocks[-1] + 1]):
            tokens = self.run_block(block, tokens)
            if index in blocks:
                maps.append(tokens)
        return maps

    def run_block(self, block: nn.Module, *inputs: Any) -> Tensor:
        """Run a block, and recompute activations if `activation_checkpointing` is on."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)
