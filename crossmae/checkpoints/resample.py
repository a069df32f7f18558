"""Resample an encoder to another image size, patch size, number of channels or attention window.

All functions compute in float32 and return the dtype of the input. A tensor that already has the right size is returned
unchanged. Tensors of unexpected shapes raise UserError. Symbols in shapes: E width, C channels, p side of a patch in
pixels, h and w rows and columns of patches, d width of an attention head.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from timm.layers import resample_patch_embed
from torch import Tensor

from crossmae.errors import UserError
from crossmae.models.encoder import patch_grid
from crossmae.models.positions import sincos_pos_embed

Grid = tuple[int, int]
Channels = Literal["repeat", "mean", "pad"]

_FILTERS = "patch_embed.proj.weight"
RELATIVE = re.compile(r"blocks\.\d+\.attn\.rel_pos_[hw]")


class Fitted(NamedTuple):
    """A resampled encoder: tensors, a note for each changed tensor, and its new arguments."""

    tensors: dict[str, Tensor]
    notes: dict[str, str]
    arguments: dict[str, Any]


def fit(
    tensors: Mapping[str, Tensor],
    arguments: Mapping[str, Any],
    wanted: Mapping[str, Any],
    *,
    channels: Channels = "repeat",
    fixed: bool = False,
) -> Fitted:
    """Resample the tensors of an encoder that depend on its sizes.

    With `patch_size` but no `img_size`, the grid stays and the image size changes: 224 pixels in patches of 14 become
    256 pixels in patches of 16, as in ViTDet. Position embeddings of a decoder are treated as fixed. `window` changes
    only the smallest tables of relative positions; larger tables belong to global attention and stay.

    Args:
        tensors: tensors of an encoder or a whole pretraining model, under plain names.
        arguments: arguments of the encoder, see `encoder_arguments`.
        wanted: any of `img_size` (one number or (height, width)), `patch_size`, `in_chans`, `window`.
        channels: see `adapt_channels`.
        fixed: true if the model never trains its positions, see `fit_positions`.

    Raises:
        UserError: the sizes are unknown or do not fit together; the patch size or the number of channels would change
            for a model with a decoder, which predicts pixels; or `window` is set without relative positions.
    """
    _check_wanted(tensors, arguments, wanted)
    sizes = dict(arguments) | {key: wanted[key] for key in ("patch_size", "in_chans") if key in wanted}
    pixels = wanted if "img_size" in wanted else arguments
    if "img_size" in pixels:
        grid = _grid(pixels["img_size"], (sizes if pixels is wanted else arguments)["patch_size"])
        h, w = (side * sizes["patch_size"] for side in grid)
        sizes["img_size"] = h if h == w else (h, w)
    changed = _fit_filters(tensors, sizes["patch_size"], sizes["in_chans"], channels)
    if "img_size" in wanted:
        changed |= _fit_tables(tensors, arguments, grid, fixed)
    if "window" in wanted:
        changed |= _fit_window(tensors, wanted["window"])
    fitted = dict(tensors) | {name: tensor for name, (tensor, _) in changed.items()}
    return Fitted(fitted, {name: note for name, (_, note) in changed.items()}, sizes)


def resample_positions(table: Tensor, grid: Grid, new_grid: Grid, *, class_rows: int = 1) -> Tensor:
    """Resample position embeddings to a new grid.

    The table has the shape (1, class_rows + h * w, E). The rows of the class token stay. The resize is bicubic without
    antialiasing, and corners are not aligned, as published (method specification, section 1.10) and in ViTDet. timm's
    `resample_abs_pos_embed` differs: it antialiases, and uses another cubic kernel and border.
    """
    h, w = grid
    if table.ndim != 3 or table.shape[:2] != (1, class_rows + h * w) or not table.shape[2]:
        raise UserError(
            f"pos_embed: the shape {tuple(table.shape)} is not for a grid of {_sides(grid)}. Give the img_size of "
            f"pretraining, or a table of shape (1, {class_rows + h * w}, width)."
        )
    if grid == new_grid:
        return table
    patches = table[:, class_rows:].float().reshape(1, h, w, -1).permute(0, 3, 1, 2)  # (1, E, h, w)
    resized = F.interpolate(patches, new_grid, mode="bicubic", align_corners=False)
    rows = resized.flatten(2).transpose(1, 2)  # (1, new h * new w, E)
    return torch.cat([table[:, :class_rows], rows.to(table.dtype)], dim=1)


def is_sincos(table: Tensor, grid: Grid) -> bool:
    """Check whether position embeddings are sine-cosine, up to rounding."""
    count = grid[0] * grid[1]
    fits = table.ndim == 3 and table.shape[1] in (count, count + 1) and table.shape[2] % 4 == 0
    if not fits or table.is_meta or not table.is_floating_point():
        return False
    expected = sincos_pos_embed(table.shape[2], grid)[:, -table.shape[1] :].to(table.device)
    return torch.allclose(table.float(), expected, rtol=0, atol=max(1e-4, torch.finfo(table.dtype).eps / 2))


def fit_positions(table: Tensor, grid: Grid, new_grid: Grid, *, fixed: bool) -> tuple[Tensor, str]:
    """Fit position embeddings (1, rows, E) to a grid. Describe the change.

    Args:
        fixed: true if the model never trains its positions. Sine-cosine embeddings are then computed again, not
            resampled.
    """
    if grid == new_grid:
        return table, ""
    class_rows = int(table.ndim == 3 and table.shape[1] == 1 + grid[0] * grid[1])
    if fixed and is_sincos(table, grid):
        new = sincos_pos_embed(table.shape[-1], new_grid)[:, 1 - class_rows :].to(table)
        return new, f"sine-cosine positions made again, {_sides(grid)} to {_sides(new_grid)}"
    new = resample_positions(table, grid, new_grid, class_rows=class_rows)
    return new, f"resampled {_sides(grid)} to {_sides(new_grid)}"


def table_grid(rows: int, img_size: int | Grid | None, patch_size: int, wanted: Grid | None = None) -> tuple[Grid, int]:
    """Find the grid and the number of class rows of position embeddings.

    The first case that fits is used:

    | case                 | `rows`                                                                      |
    | -------------------- | --------------------------------------------------------------------------- |
    | the recorded grid    | h * w + 1 or h * w; with a recorded grid, the other cases are not tried     |
    | a square and a class | n * n + 1, with n >= 1                                                      |
    | a square             | n * n                                                                       |
    | the wanted grid      | h * w + 1 or h * w, for the grid of the model to be loaded                  |

    Args:
        rows: number of position embeddings.
        img_size: recorded image size in pixels, or None.
        wanted: grid of the model to be loaded.

    Raises:
        UserError: no case fits.
    """
    if img_size is not None:
        grid = _grid(img_size, patch_size)
        if rows - grid[0] * grid[1] not in (0, 1):
            raise UserError(
                f"img_size: {img_size} with patch_size {patch_size} is a grid of {_sides(grid)}, but pos_embed has "
                f"{rows} rows and not {grid[0] * grid[1]}, or one more for a class token. Give the "
                "img_size of pretraining."
            )
        return grid, rows - grid[0] * grid[1]
    for class_rows in (1, 0):
        side = math.isqrt(max(rows - class_rows, 0))
        if side and side**2 + class_rows == rows:
            return (side, side), class_rows
    if wanted and rows - wanted[0] * wanted[1] in (0, 1):
        return wanted, rows - wanted[0] * wanted[1]
    raise UserError(
        f"pos_embed: {rows} rows are not a square of patches, with or without a class token. Give img_size, the height "
        "and width of the images in pretraining."
    )


def resample_patches(filters: Tensor, patch_size: int) -> Tensor:
    """Resample patch filters (E, C, p, p) to another patch size (FlexiViT).

    If the image is enlarged with its patches (bicubic, antialiased), its tokens stay the same. For smaller patches, the
    new tokens are the least-squares fit.
    """
    _check_filters(filters)
    if filters.shape[-1] == patch_size:
        return filters
    return resample_patch_embed(filters.float(), [patch_size, patch_size]).to(filters.dtype)


def adapt_channels(filters: Tensor, channels: int, how: Channels = "repeat") -> Tensor:
    """Adapt patch filters (E, C, p, p) to another number of channels.

    | `how`    | `channels` | new filters                                           |
    | -------- | ---------- | ----------------------------------------------------- |
    | `repeat` | 1          | the sum of the old filters                            |
    | `repeat` | > 1        | the old filters in order, repeated, times C / channels |
    | `mean`   | any        | the mean of the old filters, times C / channels       |
    | `pad`    | > C        | the old filters, then zeros                           |

    The tokens of a grayscale image stay the same with `mean`, with `repeat` to one channel, and with `repeat` if C
    divides `channels`. With `pad` they stay the same if the first C channels of the image do. For C = 3, `repeat`
    equals timm's `adapt_input_conv`. Raises UserError if `how` is unknown, or `pad` would remove channels.
    """
    _check_filters(filters)
    if how not in get_args(Channels):
        raise UserError(f"channels: unknown method {how!r}. Use one of {', '.join(get_args(Channels))}.")
    C = filters.shape[1]
    if channels == C:
        return filters
    if how == "pad":
        if channels < C:
            raise UserError(f"channels: pad cannot reduce {C} channels to {channels}. Use repeat or mean.")
        return F.pad(filters, (0, 0, 0, 0, 0, channels - C))
    wide = filters.float()
    if how == "mean":
        new = wide.sum(dim=1, keepdim=True).expand(-1, channels, -1, -1) / channels
    elif channels == 1:
        new = wide.sum(dim=1, keepdim=True)
    else:
        new = wide.repeat(1, math.ceil(channels / C), 1, 1)[:, :channels] * (C / channels)
    return new.to(filters.dtype)


def channel_note(old: int, new: int, how: Channels) -> str:
    """Describe a change made by `adapt_channels`."""
    done = {
        "repeat": "summed" if new == 1 else f"{'repeated' if new > old else 'the first ones'}, times {old}/{new}",
        "mean": f"the mean of all, times {old}/{new}",
        "pad": "the further ones zero",
    }
    return f"{old} channels to {new}: {done[how]}"


def window_of(table: Tensor) -> int:
    """Return the window of relative positions (2 * window - 1, d)."""
    if table.ndim != 2 or table.shape[0] % 2 == 0 or not table.shape[1]:
        raise UserError(f"rel_pos: the shape is {tuple(table.shape)}. It must be (2 * window - 1, width of a head).")
    return (table.shape[0] + 1) // 2


def resample_relative(table: Tensor, size: int) -> Tensor:
    """Resample relative positions (rows, d) linearly to the window `size` (in patches).

    detectron2's `get_rel_pos` computes the same.
    """
    if window_of(table) == size:
        return table
    resized = F.interpolate(table.float().t()[None], size=2 * size - 1, mode="linear")[0]  # (d, 2 * size - 1)
    return resized.t().contiguous().to(table.dtype)


def _check_wanted(tensors: Mapping[str, Tensor], arguments: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for key in ("patch_size", "in_chans", "window"):
        if wanted.get(key, 1) < 1:
            raise UserError(f"{key}: {wanted[key]} is too small. It must be at least 1.")
    pixels = [key for key in ("patch_size", "in_chans") if wanted.get(key, arguments[key]) != arguments[key]]
    if pixels and any(name.startswith("decoder_") for name in tensors):
        raise UserError(
            f"{' and '.join(pixels)}: cannot change for a model with a decoder, which predicts pixels. Drop the "
            "decoder with --encoder-only."
        )


def _fit_filters(
    tensors: Mapping[str, Tensor], patch_size: int, in_chans: int, how: Channels
) -> dict[str, tuple[Tensor, str]]:
    old = tensors[_FILTERS]
    if (in_chans, patch_size) == (old.shape[1], old.shape[-1]):
        return {}
    new = adapt_channels(resample_patches(old.float(), patch_size), in_chans, how).to(old.dtype)
    p = old.shape[-1]
    notes = [f"resampled {p} x {p} to {patch_size} x {patch_size} pixels"] if p != patch_size else []
    notes += [channel_note(old.shape[1], in_chans, how)] if old.shape[1] != in_chans else []
    return {_FILTERS: (new, ", ".join(notes))}


def _fit_tables(
    tensors: Mapping[str, Tensor], arguments: Mapping[str, Any], new_grid: Grid, fixed: bool
) -> dict[str, tuple[Tensor, str]]:
    kinds = {"pos_embed": fixed, "pos_embed_global": False, "decoder_pos_embed": True}
    tables = {name: tensors[name] for name in kinds if name in tensors}
    if not tables:
        return {}
    shape = next(iter(tables.values())).shape
    rows = shape[1] if len(shape) == 3 else 0
    grid, _ = table_grid(rows, arguments.get("img_size"), arguments["patch_size"], new_grid)
    fitted = {name: fit_positions(table, grid, new_grid, fixed=kinds[name]) for name, table in tables.items()}
    return fitted if grid != new_grid else {}


def _fit_window(tensors: Mapping[str, Tensor], window: int) -> dict[str, tuple[Tensor, str]]:
    tables = {name: tensor for name, tensor in tensors.items() if RELATIVE.fullmatch(name)}
    if not tables:
        raise UserError("window: has no effect without relative positions (blocks.*.attn.rel_pos_h). Leave it out.")
    old = min(window_of(table) for table in tables.values())
    if old == window:
        return {}
    note = f"resampled, window {old} to {window}"
    return {name: (resample_relative(table, window), note) for name, table in tables.items() if window_of(table) == old}


def _grid(img_size: int | Grid, patch_size: int) -> Grid:
    try:
        return patch_grid(img_size, patch_size)
    except ValueError as error:
        raise UserError(str(error)) from None


def _check_filters(filters: Tensor) -> None:
    if filters.ndim != 4 or filters.shape[2] != filters.shape[3] or not filters.numel():
        raise UserError(f"{_FILTERS}: the shape is {tuple(filters.shape)}. It must be (width, channels, p, p).")


def _sides(grid: Grid) -> str:
    return f"{grid[0]} x {grid[1]}"
