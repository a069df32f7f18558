"""CrossMAE and plain MAE pretraining models.

Shapes: B batch, L patches, V visible, M predicted, K class tokens, E encoder width, D decoder width, N decoder blocks,
F fused maps. P = patch_size ** 2 * channels is the number of values in a patch.

Written from the method specification (sections 1.3 to 1.8) of arXiv 2401.14391. Key names and shapes are the published
names and shapes.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crossmae.models.encoder import ViTEncoder
from crossmae.models.layers import Block, CrossBlock, LayerNorm
from crossmae.models.linear import Linear
from crossmae.models.masking import MaskCounts, check_blocks, gather_patches, gather_tokens, mask_counts, split_patches
from crossmae.models.positions import sincos_pos_embed
from crossmae.models.sizes import DECODERS, Decoder, model_arguments

# Reads and writes the files of a model. Imported on use, because a model itself needs torch and timm only.
_FILES = "crossmae.checkpoints.pretrained"


@dataclass(frozen=True)
class CrossMAEOutput:
    """Result of a forward pass: pred[b, i] is the reconstruction of patch predict_idx[b, i].

    Attributes:
        loss: scalar, float32; mean squared error over the masked patches that were predicted.
        pred: (B, M, P); values of a patch in the order row, column, channel. M = L for decoder="self".
        visible_idx: (B, V) patches that the encoder saw, in the order of the noise.
        predict_idx: (B, M) decoded patches in raster order; all L patches for decoder="self".
    """

    loss: Tensor
    pred: Tensor
    visible_idx: Tensor
    predict_idx: Tensor


class FeatureMixer(nn.Module):
    """Learned mix of encoder feature maps, a different mix for every decoder block (paper, 3.4).

    Each pair (decoder block, map) has one scalar, shared over tokens and channels, without softmax and without bias.
    """

    def __init__(self, num_maps: int, num_mixes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(num_maps, num_mixes, bias=False)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Mix F maps (B, ...) into N contiguous maps, one per block."""
        stacked = torch.stack(maps)  # (F, B, K + V, E); stacked on the last axis, a mix would not be contiguous
        mixes = self.linear.weight.to(stacked.dtype) @ stacked.flatten(1)  # (N, B * (K + V) * E)
        return mixes.view(-1, *stacked.shape[1:])


class CrossMAE(ViTEncoder):
    """Masked autoencoder whose decoder cross-attends from masked to visible tokens.

    `CrossMAE(decoder="self")` returns an instance of the subclass `MAE`.

    Args:
        img_size, patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio: see `ViTEncoder`.
        decoder_embed_dim, decoder_depth, decoder_num_heads: width D, blocks N and heads of the decoder.
        decoder: "cross" (CrossMAE), "cross_self" (the ablation that adds self-attention among predicted tokens) or
            "self" (plain MAE; see `MAE` for the arguments that it ignores).
        fuse_blocks: encoder blocks whose outputs are mixed for the decoder. None: every block. A tuple contains block
            indices; negative indices count from the end. `()`: no fusion, and every decoder block receives the output
            of the last block after a final norm `norm`. Blocks after the last fused block are frozen and never run.
        fuse_input: also mix the tokens before the first block. Has no effect without fusion.
        norm_pix_loss: standardise each target patch by its mean and unbiased variance (1e-6 inside the root).
        mask_block: side in patches of the square blocks that are masked; must divide the grid. See `masking`.
        class_tokens: see `ViTEncoder`. The decoder also reads them.

    Attributes:
        arguments: arguments of the constructor by name.
        metadata: metadata of the file that the weights come from, empty for a new model.
    """

    def __new__(cls, *_: Any, decoder: Decoder = "cross", **__: Any) -> CrossMAE:
        """Choose the class that has the requested decoder."""
        return super().__new__(MAE if decoder == "self" and cls is CrossMAE else cls)

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 12,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        *,
        decoder: Decoder = "cross",
        fuse_blocks: tuple[int, ...] | None = None,
        fuse_input: bool = True,
        norm_pix_loss: bool = True,
        mask_block: int = 1,
        class_tokens: int = 1,
    ) -> None:
        given = locals()
        super().__init__(img_size, patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio, class_tokens)
        self.arguments = {name: given[name] for name in MODEL_DEFAULTS}
        self.metadata: dict[str, str] = {}
        check_blocks(self.grid, mask_block, patch_size)
        if decoder not in DECODERS:
            raise ValueError(f"decoder {decoder!r} is unknown. Choose one of {', '.join(DECODERS)}.")
        self.decoder, self.norm_pix_loss, self.mask_block = decoder, norm_pix_loss, mask_block
        self.fused_blocks = resolve_blocks(fuse_blocks, depth)
        self.fuse_input = fuse_input and bool(self.fused_blocks)

        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(sincos_pos_embed(decoder_embed_dim, self.grid), requires_grad=False)
        if self.fused_blocks:
            self.wfm = FeatureMixer(len(self.fused_blocks) + self.fuse_input, decoder_depth)
            self.dec_norms = nn.ModuleList(LayerNorm(embed_dim) for _ in range(decoder_depth))
            for block in self.blocks[self.fused_blocks[-1] + 1 :]:
                block.requires_grad_(False)
        else:
            self.norm = LayerNorm(embed_dim)
        self.build_decoder_blocks(decoder_embed_dim, decoder_depth, decoder_num_heads, mlp_ratio)
        self.decoder_norm = LayerNorm(decoder_embed_dim)
        self.decoder_pred = Linear(decoder_embed_dim, patch_size**2 * in_chans)
        self.init_weights()

    def build_decoder_blocks(self, dim: int, depth: int, num_heads: int, mlp_ratio: float) -> None:
        """Build `decoder_blocks`: `depth` blocks of width `dim`."""
        among = self.decoder == "cross_self"
        self.decoder_blocks = nn.ModuleList(
            CrossBlock(dim, self.embed_dim, num_heads, mlp_ratio, among) for _ in range(depth)
        )

    @classmethod
    def from_pretrained(cls, path: str | Path) -> CrossMAE:
        """Load a whole model: a file, a run or a saved folder.

        The model is in evaluation mode. `crossmae.checkpoints.pretrained.load_pretrained` also returns the pixel
        statistics, and has the errors.
        """
        model: CrossMAE = import_module(_FILES).load_model(path)
        return model

    def save_pretrained(
        self, folder: str | Path, *, licence: str = "", base_model: str = "", force: bool = False
    ) -> Path:
        """Save `model.safetensors` and a model card `README.md`.

        `crossmae.checkpoints.formats.model_folder.save_folder` documents the arguments, result and errors.
        """
        options = {"licence": licence, "base_model": base_model, "force": force}
        saved: Path = import_module(_FILES).save_model(self, folder, **options)
        return saved

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise as published (method specification, sections 1.6 and 1.7).

        | tensor                                    | distribution                                        |
        | ----------------------------------------- | --------------------------------------------------- |
        | Linear weights, including `wfm.linear`    | Xavier uniform (qkv and kv as one matrix)           |
        | Linear biases                             | 0                                                   |
        | LayerNorm weight, bias                    | 1, 0                                                |
        | `patch_embed.proj.weight`                 | Xavier uniform on its (E, C * p * p) view           |
        | `patch_embed.proj.bias`                   | torch's default for Conv2d                          |
        | `cls_token`, `mask_token`                 | normal, standard deviation 0.02                     |
        | `pos_embed`, `decoder_pos_embed`          | sine-cosine, fixed                                  |

        For the mixing weights, the paper states a normal distribution with standard deviation 1 / sqrt(K). Every
        released checkpoint started from Xavier uniform values, and so does this model.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.embed_dim, -1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self, imgs: Tensor, mask_ratio: float = 0.75, predict_ratio: float = 0.25, noise: Tensor | None = None
    ) -> CrossMAEOutput:
        """Mask and encode the images, decode, and compute the loss.

        Args:
            imgs: (B, C, H, W) normalised pixels.
            mask_ratio: share of all patches that the encoder does not see.
            predict_ratio: share of all patches that is decoded; at most `mask_ratio`; ignored by "self".
            noise: (B, L) values that decide the masking; drawn uniformly if None.

        Raises:
            ValueError: If the image or noise has a wrong shape, or the ratios leave no patch visible or predicted.
        """
        if noise is None:
            noise = torch.rand(imgs.shape[0], self.num_patches, device=imgs.device)
        counts = self.patch_counts(mask_ratio, predict_ratio)
        visible_idx, predict_idx = split_patches(noise, counts, self.grid, self.mask_block)
        contexts = self.encode(imgs, visible_idx)
        return self.reconstruct(imgs, contexts, visible_idx, predict_idx)

    def patch_counts(self, mask_ratio: float, predict_ratio: float) -> MaskCounts:
        """Count visible, dropped and predicted patches per image."""
        return mask_counts(self.num_patches, mask_ratio, self.scored_ratio(mask_ratio, predict_ratio))

    def scored_ratio(self, mask_ratio: float, predict_ratio: float) -> float:
        """Return the share of all patches that the loss compares."""
        return predict_ratio

    def encode(self, imgs: Tensor, visible_idx: Tensor | None = None) -> list[Tensor]:
        """Encode the context (B, K + V, E) of each decoder block.

        Without fusion, every context is the output of the last block after `norm`.
        """
        tokens = self.embed(imgs, visible_idx)
        if not self.fused_blocks:
            return [self.norm(self.features(tokens, [self.depth - 1])[0])] * len(self.decoder_blocks)
        maps = self.features(tokens, self.fused_blocks)
        return list(self.wfm([tokens, *maps] if self.fuse_input else maps))

    def reconstruct(
        self, imgs: Tensor, contexts: list[Tensor], visible_idx: Tensor, predict_idx: Tensor
    ) -> CrossMAEOutput:
        """Decode the patches predict_idx (B, M), and compute their loss."""
        pred = self.decode(contexts, predict_idx)
        return CrossMAEOutput(self.loss(pred, imgs, predict_idx), pred, visible_idx, predict_idx)

    def decode(self, contexts: list[Tensor], predict_idx: Tensor) -> Tensor:
        """Predict patches (B, M) as (B, M, P).

        With decoder="cross", the prediction of a patch does not depend on the other decoded patches (1.4).
        """
        positions = self.decoder_pos_embed[:, 1:].expand(predict_idx.shape[0], -1, -1)
        x = gather_tokens(positions, predict_idx) + self.mask_token  # (B, M, D)
        for index, block in enumerate(self.decoder_blocks):
            # A block also normalises its context, so that compilation fuses the norm with the products after it.
            norm = self.dec_norms[index] if self.fused_blocks else None
            x = self.run_block(block, x, contexts[index], norm)
        return self.decoder_pred(self.decoder_norm(x))

    def loss(self, pred: Tensor, imgs: Tensor, idx: Tensor) -> Tensor:
        """Compute the loss of predictions (B, M, P) for patches idx."""
        return (pred.float() - self.targets(imgs, idx)).square().mean()

    def targets(self, imgs: Tensor, idx: Tensor) -> Tensor:
        """Cut out target values (B, M, P) of patches idx."""
        patches = gather_patches(imgs, idx, self.patch_size).permute(0, 1, 3, 4, 2).flatten(2).float()
        if not self.norm_pix_loss:
            return patches
        mean, std = patch_statistics(patches)
        return (patches - mean) / std


class MAE(CrossMAE):
    """Plain masked autoencoder. The decoder reconstructs all patches by self-attention over all tokens.

    Args:
        args, arguments: see `CrossMAE`. `fuse_blocks`, `fuse_input` and `predict_ratio` are ignored: the loss is
            computed over all masked patches.
    """

    def __init__(self, *args: Any, **arguments: Any) -> None:
        super().__init__(*args, **arguments | {"decoder": "self", "fuse_blocks": ()})

    def build_decoder_blocks(self, dim: int, depth: int, num_heads: int, mlp_ratio: float) -> None:
        """Build `decoder_embed` and `decoder_blocks`: `depth` blocks of width `dim`."""
        self.decoder_embed = Linear(self.embed_dim, dim)
        self.decoder_blocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio) for _ in range(depth))

    def scored_ratio(self, mask_ratio: float, predict_ratio: float) -> float:
        """Return the share of all patches that are masked."""
        return mask_ratio

    def reconstruct(
        self, imgs: Tensor, contexts: list[Tensor], visible_idx: Tensor, predict_idx: Tensor
    ) -> CrossMAEOutput:
        """Decode all patches, and compute the loss of patches predict_idx (B, M)."""
        x = self.decoder_embed(contexts[-1])  # (B, K + V, D): class tokens and visible tokens
        B, _, D = x.shape
        K, positions = self.class_tokens, self.decoder_pos_embed
        where = visible_idx.unsqueeze(-1).expand(-1, -1, D)
        masked = self.mask_token.to(x.dtype).expand(B, self.num_patches, D)
        x = torch.cat([x[:, :K], masked.scatter(1, where, x[:, K:])], dim=1)  # (B, K + L, D)
        x = x + torch.cat([positions[:, :1].expand(-1, K, -1), positions[:, 1:]], dim=1)
        for block in self.decoder_blocks:
            x = self.run_block(block, x)
        pred = self.decoder_pred(self.decoder_norm(x))[:, K:]  # (B, L, P)
        loss = self.loss(gather_tokens(pred, predict_idx), imgs, predict_idx)
        every_idx = torch.arange(self.num_patches, device=pred.device).expand(B, -1)
        return CrossMAEOutput(loss, pred, visible_idx, every_idx)


# Arguments of `CrossMAE` with their defaults, in order, without `self`.
_, *_arguments = inspect.signature(CrossMAE.__init__).parameters.values()
MODEL_DEFAULTS: dict[str, Any] = {argument.name: argument.default for argument in _arguments}


def create_model(name: str, **overrides: Any) -> CrossMAE:
    """Build a model by name, for example `create_model("crossmae_vit_base_patch16", img_size=448)`.

    `list_models()` has the names. The overrides replace arguments of `CrossMAE` that belong to the named size.

    Raises ValueError if the name is unknown. The message lists the known names.
    """
    return CrossMAE(**model_arguments(name) | overrides)


def resolve_blocks(blocks: tuple[int, ...] | None, depth: int) -> tuple[int, ...]:
    """Convert the blocks to fuse to ascending non-negative indices.

    Raises ValueError if an index is outside -depth .. depth - 1, or a block is named twice.
    """
    if blocks is None:
        return tuple(range(depth))
    wrong = [index for index in blocks if not -depth <= index < depth]
    if wrong:
        raise ValueError(f"fuse_blocks {wrong}: there are {depth} blocks. Choose indices from -{depth} to {depth - 1}.")
    resolved = sorted(index % depth for index in blocks)
    if len(set(resolved)) < len(resolved):
        raise ValueError(f"fuse_blocks {tuple(blocks)} names a block twice, as {resolved}. Name each block once.")
    return tuple(resolved)


def patchify(imgs: Tensor, patch_size: int) -> Tensor:
    """Cut (B, C, H, W) into raster-ordered patches (B, L, P)."""
    B, C, H, W = imgs.shape
    p = patch_size
    x = imgs.view(B, C, H // p, p, W // p, p).permute(0, 2, 4, 3, 5, 1)  # (B, rows, columns, p, p, C)
    return x.reshape(B, (H // p) * (W // p), p * p * C)


def unpatchify(patches: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Invert `patchify`: patches (B, L, P) to (B, C, H, W)."""
    B, _, P = patches.shape
    p = patch_size
    x = patches.view(B, *grid, p, p, P // p**2).permute(0, 5, 1, 3, 2, 4)  # (B, C, rows, p, columns, p)
    return x.reshape(B, P // p**2, grid[0] * p, grid[1] * p)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Compute mean and deviation (..., 1) of each patch (..., P)."""
    return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()
