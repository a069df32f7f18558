"""Fixed two-dimensional sine-cosine position embeddings (method specification, section 1.7)."""

from __future__ import annotations

import torch
from torch import Tensor


def sincos_pos_embed(dim: int, grid: tuple[int, int]) -> Tensor:
    """Compute position embeddings (1, L + 1, dim) of a patch grid.

    The first row, of the class token, is zero. The first half of the width encodes the column, the second half the row.
    Each half contains all sines, then all cosines, with base 10000 and integer positions. The computation uses float64,
    as the published MAE does. The published CrossMAE uses float32, and its values differ by up to 3e-6.

    Args:
        dim: width of a token; a multiple of 4.
        grid: rows and columns of patches.
    """
    if dim % 4:
        raise ValueError(f"a width of {dim} has no sine-cosine table. Choose a width divisible by 4.")
    rows, columns = grid
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    table = torch.cat([_sincos(dim // 2, x.flatten()), _sincos(dim // 2, y.flatten())], dim=1)
    return torch.cat([torch.zeros(1, dim, dtype=torch.float64), table]).unsqueeze(0).float()


def _sincos(dim: int, positions: Tensor) -> Tensor:
    frequencies = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angles = positions[:, None] * frequencies[None, :]
    return torch.cat([angles.sin(), angles.cos()], dim=1)
