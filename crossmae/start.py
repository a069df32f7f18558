"""Where the weights of a run come from.

1. With --resume: the latest complete checkpoint in the run's own folder, with the optimizer and the position.
2. `model.init`: a whole model, or an encoder, of any format that `crossmae.checkpoints.weights` reads.
3. Random ones, which depend on the seed alone.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from crossmae.checkpoints.report import LoadReport
from crossmae.checkpoints.weights import (
    MODEL_ARGUMENTS,
    PIXEL_MEAN,
    PIXEL_STD,
    Weights,
    encoder_arguments,
    encoder_tensors,
    load_encoder,
    load_model,
    read_weights,
    recorded_arguments,
)
from crossmae.config import DataConfig, PretrainConfig, RunConfig
from crossmae.errors import UserError
from crossmae.model import CrossMAE, resolve_blocks
from crossmae.plan import Plan, fingerprint
from crossmae.pos_embed import sincos_pos_embed
from crossmae.pretrained import BIT_DEPTH
from crossmae.run_checkpoint import RECORD, latest_checkpoint
from crossmae.variants import create_model

log = logging.getLogger(__name__)

WEIGHTS, EMA_WEIGHTS = "model.safetensors", "model_ema.safetensors"


def build_model(config: PretrainConfig) -> CrossMAE:
    """The model with random weights, which depend on the seed alone.

    Raises:
        UserError: names the section for every setting that the model refuses.
    """
    torch.manual_seed(config.runtime.seed)
    try:
        model = create_model(config.model.name, **config.model.arguments())
        model.patch_counts(config.model.mask_ratio, config.model.predict_ratio)
    except ValueError as error:
        raise UserError(f"model: {error}") from None
    model.activation_checkpointing = config.runtime.activation_checkpointing
    return model


def find_start(run: Path, resume: bool) -> Path | None:
    """The checkpoint to go on from, or None for a new run.

    Raises:
        UserError: the folder holds a run and `resume` was not asked for, or weights without a checkpoint.
    """
    latest = latest_checkpoint(run)
    if latest and not resume:
        raise UserError(
            f"output_dir: {run} already holds a run ({latest.name}); pass --resume to go on, or name another"
        )
    if not latest and (run / WEIGHTS).exists():
        raise UserError(
            f"output_dir: {run} holds {WEIGHTS} but no complete checkpoint to go on from; name another folder"
        )
    if resume and not latest:
        log.info("--resume: no complete checkpoint in %s, starting from scratch", run)
    return latest


def check_settings(folder: Path, config: RunConfig, plan: Plan, extra: Mapping[str, str] | None = None) -> None:
    """Make sure that a run can go on from a checkpoint.

    Args:
        extra: what the kind of training adds to the fingerprint.

    Raises:
        UserError: it is of a run whose settings differ in what decides data, model or schedule.
    """
    theirs: dict[str, str] = json.loads((folder / RECORD).read_text(encoding="utf-8")).get("fingerprint", {})
    mine = fingerprint(config, plan) | dict(extra or {})
    changed = [f"{key} was {theirs.get(key)}, is {mine[key]}" for key in mine if mine[key] != theirs.get(key)]
    if changed:
        raise UserError(
            f"--resume: {folder} is of a run with other settings: {'; '.join(changed)}; what decides model, batches "
            "and schedule, and the number of processes and images, can not change: for that start in another folder"
        )


def start_from(model: CrossMAE, path: Path, arguments: Mapping[str, Any], data: DataConfig) -> LoadReport:
    """Give a new model the weights of a file: all of them where the file holds this very model, else the encoder's.

    A fixed sine-cosine position table is made anew for the model's grid; a learned one is resized to it.

    Args:
        model: changed in place.
        path: see `read_weights`.
        arguments: that the model was built with, see `CrossMAE`.
        data: how this run reads pixels; another way in the file is a warning.

    Raises:
        UserError: the encoders do not agree in anything but the grid; nothing was loaded.
    """
    weights = read_weights(path)
    compare_pixels(weights, data)
    recorded = recorded_arguments(weights.metadata)
    weights = _for_grid(weights, model)
    differing = [key for key in recorded if key != "img_size" and not _same(key, recorded, arguments)]
    tensors = model.state_dict()
    has_all = all(weights.tensors.get(name, _NONE).shape == tensor.shape for name, tensor in tensors.items())
    if has_all and not differing:
        report = load_model(model, weights, dropped=(r"norm\.",))
        log.info("model.init: the whole model comes from %s", weights.path)
        return report
    new = tuple(rf"{name}\." for name, _ in model.named_children() if name not in ("patch_embed", "blocks"))
    report = load_encoder(model, weights, new=(*new, "mask_token", "decoder_pos_embed"))
    why = f" (the file's model has other {', '.join(differing)})" if differing else ""
    log.info("model.init: the encoder comes from %s; the decoder starts from random weights%s", weights.path, why)
    return report


def _same(key: str, recorded: Mapping[str, Any], arguments: Mapping[str, Any]) -> bool:
    """Whether a file's model and ours agree in an argument; None of fuse_blocks is all of them."""
    theirs, mine = recorded[key], arguments.get(key, _DEFAULTS.get(key))
    if key == "fuse_blocks":
        depth = int(arguments["depth"])
        theirs, mine = (resolve_blocks(None if value is None else tuple(value), depth) for value in (theirs, mine))
    return bool(theirs == mine)


_DEFAULTS = {name: parameter.default for name, parameter in inspect.signature(CrossMAE).parameters.items()}


def compare_pixels(weights: Weights, data: DataConfig) -> None:
    """Warn where a file was trained on pixels made in another way; a converted file may not know how."""
    for key, name, mine in (
        (PIXEL_MEAN, "mean", list(data.mean)),
        (PIXEL_STD, "std", list(data.std)),
        (BIT_DEPTH, "bit_depth", data.bit_depth),
    ):
        try:
            theirs = json.loads(weights.metadata.get(key, ""))
        except json.JSONDecodeError:
            continue
        if theirs != mine:
            log.warning("model.init: %s was trained with data.%s=%s, this run has %s", weights.path, name, theirs, mine)


_NONE = torch.empty(0)


def _for_grid(weights: Weights, model: CrossMAE) -> Weights:
    """The same weights with position tables for the model's grid of patches."""
    encoder = encoder_tensors(weights)
    table = encoder.get("pos_embed")
    arguments = encoder_arguments(encoder, weights.metadata)
    if table is None:
        return weights
    if "img_size" not in arguments:
        raise UserError(f"{weights.path}: the grid of its {table.shape[1] - 1} positions is not square; unknown sides")
    size, p = arguments["img_size"], arguments["patch_size"]
    grid = (size // p, size // p) if isinstance(size, int) else (size[0] // p, size[1] // p)
    if grid == model.grid:
        return weights
    prefix = next(name for name in weights.tensors if name.endswith("pos_embed") and "decoder" not in name)
    tensors = dict(weights.tensors)
    tensors[prefix] = _table_for(table, grid, model.pos_embed, model.grid)
    decoder_table = prefix.replace("pos_embed", "decoder_pos_embed")
    if decoder_table in tensors and tensors[decoder_table].shape[-1] == model.decoder_pos_embed.shape[-1]:
        tensors[decoder_table] = model.decoder_pos_embed.detach()
    log.info("model.init: positions go from a grid of %d x %d to %d x %d", *grid, *model.grid)
    p = model.patch_size
    recorded = recorded_arguments(weights.metadata) | {"img_size": [model.grid[0] * p, model.grid[1] * p]}
    return Weights(weights.path, weights.format, tensors, weights.metadata | {MODEL_ARGUMENTS: json.dumps(recorded)})


def _table_for(table: Tensor, grid: tuple[int, int], wanted: Tensor, new_grid: tuple[int, int]) -> Tensor:
    """The table of a file for another grid: the fixed one of that grid, or resized where it was learned."""
    if table.shape[-1] != wanted.shape[-1]:
        return table  # another width: the comparison of shapes will say so
    if torch.allclose(table.float(), sincos_pos_embed(table.shape[-1], grid), atol=1e-4):
        return wanted.detach()
    return resample_abs_pos_embed(table, new_grid, grid)
