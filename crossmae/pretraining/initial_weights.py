"""Initial weights of a run, from one of three sources.

1. With --resume: the latest complete checkpoint in the run's folder, with the optimizer state and the position.
2. `model.init`: a whole model or an encoder, in any format that `crossmae.checkpoints.weights` reads.
3. Random weights, which depend only on the seed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from crossmae.checkpoints.formats.facts import MODEL_KEYS, Facts, ModelFact, assumed, assumed_lines
from crossmae.checkpoints.formats.recognition import mix_up
from crossmae.checkpoints.load_report import LoadReport
from crossmae.checkpoints.loading import load
from crossmae.checkpoints.metadata import BIT_DEPTH, PIXEL_MEAN, PIXEL_STD, assumed_names, recorded_arguments
from crossmae.checkpoints.pretrained import whole_facts
from crossmae.checkpoints.weights import Weights, encoder_tensors, read_weights
from crossmae.errors import UserError, counted
from crossmae.files import load_json
from crossmae.models.crossmae import MODEL_DEFAULTS, CrossMAE, resolve_blocks
from crossmae.training.config import DataConfig

log = logging.getLogger(__name__)


def build_model(arguments: Mapping[str, Any], seed: int, mask_ratio: float, predict_ratio: float) -> CrossMAE:
    """Build the model with random weights that depend only on the seed."""
    torch.manual_seed(seed)
    try:
        model = CrossMAE(**arguments)
        model.patch_counts(mask_ratio, predict_ratio)
    except ValueError as error:
        raise UserError(f"model: {error}") from None
    return model


def start_from(model: CrossMAE, path: Path, arguments: Mapping[str, Any], data: DataConfig) -> LoadReport:
    """Load the weights of a file into a new model.

    Position embeddings, patch filters and channels are converted to the size of the model: see
    `crossmae.checkpoints.load`.

    Returns a report. If the file's decoder was loaded, the report's `assumed` also has the assumed values of the
    decoder. Raises UserError, before any weights are loaded, if the encoders differ in more than their input.
    """
    weights = read_weights(path)
    if "cls_token" not in encoder_tensors(weights):
        wanted = "weights with the class token that pretraining needs"
        raise mix_up(weights.path, weights.format, weights.metadata, wanted)
    held = encoder_tensors(weights)["cls_token"].shape
    if len(held) == 3 and held[1] != model.class_tokens:
        raise UserError(
            f"model.init: {weights.path} has {counted(held[1], 'class token')}. Set model.class_tokens={held[1]}."
        )
    compare_pixels(weights, data)
    recorded = recorded_arguments(weights.metadata)
    free = {"img_size", "mask_block", *assumed_names(weights.metadata)}
    differing = [key for key in recorded if key not in free and not _same(key, recorded, arguments)]
    if not differing and _is_of(model, weights):
        report = load(model, weights, dropped=(r"norm\.",), resample=True)
        settings = MODEL_DEFAULTS | dict(arguments)
        for name, fact in assumed(whole_facts(weights, arguments)).items():
            if name in MODEL_KEYS and name not in report.assumed:
                report.assumed[name] = replace(fact, value=settings[name])
        log.info("model.init: the whole model comes from %s%s", weights.path, _changes(report))
        return report
    fresh = tuple(rf"{name}\." for name, _ in model.named_children() if name not in ("patch_embed", "blocks"))
    report = load(model, weights, part="encoder", new=(*fresh, "mask_token", "decoder_pos_embed"), resample=True)
    why = f" (the file's model has other {', '.join(differing)})" if differing else ""
    log.info(
        "model.init: the encoder comes from %s%s; the decoder starts from random weights%s",
        weights.path,
        _changes(report),
        why,
    )
    return report


def _is_of(model: CrossMAE, weights: Weights) -> bool:
    shapes = {name: tensor.shape for name, tensor in weights.tensors.items()}
    return all(
        name in shapes
        and (shapes[name] == tensor.shape or (name.endswith("pos_embed") and shapes[name][-1] == tensor.shape[-1]))
        for name, tensor in model.state_dict().items()
    )


def _changes(report: LoadReport) -> str:
    done = [f"{entry.name}: {entry.reason}" for entry in report.entries if entry.status == "resampled"]
    return f", {'; '.join(done)}" if done else ""


def _same(key: str, recorded: Mapping[str, Any], arguments: Mapping[str, Any]) -> bool:
    theirs, mine = recorded[key], arguments.get(key, MODEL_DEFAULTS.get(key))
    if key == "fuse_blocks":
        depth = int(arguments["depth"])
        theirs, mine = (resolve_blocks(None if value is None else tuple(value), depth) for value in (theirs, mine))
    return bool(theirs == mine)


def say_assumed(facts: Facts, keys: Mapping[str, str]) -> None:
    """Log the values that the file of `model.init` does not tell."""
    for line in assumed_lines(facts, keys):
        log.info("model.init: %s", line)


def compare_pixels(weights: Weights, data: DataConfig) -> None:
    """Log whether weights were trained with other or unknown pixel statistics."""
    for key, name, mine in (
        (PIXEL_MEAN, "mean", list(data.mean)),
        (PIXEL_STD, "std", list(data.std)),
        (BIT_DEPTH, "bit_depth", data.bit_depth),
    ):
        try:
            theirs = load_json(weights.metadata.get(key, ""))
        except ValueError:
            say_assumed({key: ModelFact(mine, "assumed", "from this run")}, {key: f"data.{name}"})
            continue
        if theirs != mine:
            log.warning("model.init: %s was trained with data.%s=%s, this run has %s", weights.path, name, theirs, mine)
