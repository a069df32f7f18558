"""The named sizes (method specification, section 1.1).

This module does not import torch, because importing torch takes seconds and configs are checked before.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Decoder = Literal["cross", "cross_self", "self"]
DECODERS: tuple[Decoder, ...] = ("cross", "cross_self", "self")


@dataclass(frozen=True)
class Size:
    """Constructor arguments of a named size. The decoder heads have width 32."""

    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    decoder_embed_dim: int
    decoder_num_heads: int


SIZES = {
    "tiny_patch16": Size(16, 192, 12, 3, 128, 4),
    "small_patch16": Size(16, 384, 12, 6, 256, 8),
    "base_patch16": Size(16, 768, 12, 12, 512, 16),
    "large_patch16": Size(16, 1024, 24, 16, 512, 16),
    "huge_patch14": Size(14, 1280, 32, 16, 512, 16),
}
# Published defaults: all released CrossMAE models have 12 decoder blocks, all released MAE models 8.
FAMILIES: dict[str, dict[str, Any]] = {
    "crossmae_vit": {"decoder": "cross", "decoder_depth": 12},
    "mae_vit": {"decoder": "self", "decoder_depth": 8},
}
# Arguments of CrossMAE that are off by default. Files record them only if they are on.
OFF_BY_DEFAULT = {"mask_block": 1, "class_tokens": 1}


def list_models() -> list[str]:
    """List all names that `create_model` accepts."""
    return [f"{family}_{size}" for family in FAMILIES for size in SIZES]


def model_arguments(name: str) -> dict[str, Any]:
    """Return the constructor arguments of a named size."""
    for family, arguments in FAMILIES.items():
        size = SIZES.get(name.removeprefix(f"{family}_"))
        if name.startswith(f"{family}_") and size is not None:
            return asdict(size) | arguments
    raise ValueError(f"unknown model {name!r}; known: {', '.join(list_models())}")
