"""Writing weights in the layout of another program: one function per target, listed in `TARGETS`."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crossmae import __version__
from crossmae.checkpoints.report import Entry, LoadReport
from crossmae.checkpoints.weights import (
    FORMAT,
    PICKLED_METADATA,
    PIXEL_MEAN,
    PIXEL_STD,
    UNKNOWN,
    VERSION,
    Weights,
    check_destination,
    encoder_home,
    encoder_tensors,
    save_weights,
    write_file,
)
from crossmae.errors import UserError
from crossmae.files import sha256

DETECTRON2_PREFIX = "backbone.net."
LICENCE = "licence"
NON_COMMERCIAL = (
    "The source has the layout of the published CrossMAE and MAE files. If it is one of them, or "
    "was trained from one: those weights are licensed CC BY-NC 4.0 (non-commercial), "
    "and converted weights keep that licence."
)
_PUBLISHED_FORMATS = ("crossmae", "mae", "encoder", "finetuned", "linear_probe")


def convert_to_detectron2(weights: Weights, destination: Path, *, force: bool = False) -> LoadReport:
    """Write the encoder under the names of detectron2's ViTDet backbone, `backbone.net.*`.

    The class token is dropped, because that backbone has none; norm, decoder and heads as well. `pos_embed`
    keeps the row of the class token, as detectron2 expects. Tensors are bit-equal to the source's.

    Args:
        weights: any file with a ViT encoder; of a detector, too.
        destination: `.pth` or `.pkl`, which detectron2's own checkpointer reads as well, or `.safetensors`.
        force: overwrite.

    Raises:
        UserError: no encoder, another suffix, or the destination can not be written.
    """
    check_conversion(weights.path, destination, "detectron2", force=force)
    encoder = {name: tensor for name, tensor in encoder_tensors(weights).items() if name != "cls_token"}
    kept = {f"{DETECTRON2_PREFIX}{name}": tensor for name, tensor in encoder.items()}
    metadata = provenance(weights) | {FORMAT: "detectron2"}
    if destination.suffix == ".safetensors":
        save_weights(destination, kept, metadata, force=force)
    elif destination.suffix == ".pth":
        content = _detectron2_file(kept, metadata)
        write_file(destination, lambda file: torch.save(content, file), force=force)
    else:
        content = _detectron2_file({name: _array(tensor) for name, tensor in kept.items()}, metadata)
        write_file(destination, lambda file: _pickle(content, file), force=force)
    return _report(weights, encoder, f"as {DETECTRON2_PREFIX}*", destination, "detectron2's ViT")


def convert_to_crossmae(weights: Weights, destination: Path, *, force: bool = False) -> LoadReport:
    """Write a whole pretraining model, CrossMAE or MAE, as safetensors: same names, bit-equal tensors.

    Raises:
        UserError: the source is not a whole pretraining model, another suffix, or the destination can not be
            written.
    """
    check_conversion(weights.path, destination, "crossmae", force=force)
    if weights.format not in ("crossmae", "mae"):
        raise UserError(
            f"{weights.path}: of format {weights.format}; only whole pretraining models become --to crossmae"
        )
    save_weights(destination, weights.tensors, provenance(weights) | {FORMAT: "crossmae"}, force=force)
    return _report(weights, weights.tensors, "", destination)


@dataclass(frozen=True)
class Target:
    """A layout to convert to: the function that writes it, and the suffixes it can write."""

    convert: Callable[..., LoadReport]
    suffixes: tuple[str, ...]


TARGETS = {
    "detectron2": Target(convert_to_detectron2, (".pth", ".pkl", ".safetensors")),
    "crossmae": Target(convert_to_crossmae, (".safetensors",)),
}


def check_conversion(source: Path, destination: Path, to: str, *, force: bool = False) -> None:
    """Whatever can be known before a large file is read.

    Raises:
        UserError: unknown target, a suffix it does not write, or a destination that must not be written.
    """
    if to not in TARGETS:
        raise UserError(f"--to {to}: unknown format; known: {', '.join(TARGETS)}")
    if destination.suffix not in TARGETS[to].suffixes:
        known = ", ".join(TARGETS[to].suffixes)
        raise UserError(f"{destination}: the suffix says the kind of file to write; for --to {to} one of {known}")
    if destination.exists() and source.exists() and destination.samefile(source):
        raise UserError(f"{destination}: source and destination are the same file; the source is never touched")
    check_destination(destination, force=force)


def licence_notice(weights: Weights) -> str | None:
    """What to know about the licence of these weights, or None where nothing points to somebody else's."""
    if LICENCE in weights.metadata:
        return weights.metadata[LICENCE]
    ours = VERSION in weights.metadata
    return NON_COMMERCIAL if weights.format in _PUBLISHED_FORMATS and not ours else None


def provenance(weights: Weights) -> dict[str, str]:
    """Metadata for a converted file: what the source says of itself, and where the weights come from.

    Nothing is assumed: the pixel statistics are "unknown" where the source does not record them. Of a file
    that was converted before, the first source stays on record.
    """
    source = {
        "source_file": weights.path.name,
        "source_sha256": sha256(weights.path),
        "source_format": weights.format,
    }
    metadata = {PIXEL_MEAN: UNKNOWN, PIXEL_STD: UNKNOWN} | source | weights.metadata
    metadata["converter_version"] = __version__
    notice = licence_notice(weights)
    return metadata | {LICENCE: notice} if notice else metadata


def _detectron2_file(model: Mapping[str, Any], metadata: dict[str, str]) -> dict[str, Any]:
    """What detectron2's checkpointer expects: explicit names, so no guessing by suffix (its issue 4566)."""
    author = f"crossmae {__version__}"
    return {
        "model": dict(model),
        "__author__": author,
        "matching_heuristics": False,
        PICKLED_METADATA: metadata,
    }


def _array(tensor: Tensor) -> np.ndarray:
    """numpy has no bfloat16; float32 holds it exactly."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _pickle(content: Any, path: Path) -> None:
    with open(path, "wb") as file:
        pickle.dump(content, file, protocol=4)


def _report(
    weights: Weights, used: Mapping[str, Tensor], reason: str, destination: Path, place: str = "it"
) -> LoadReport:
    home = encoder_home(weights.tensors) or ""
    report = LoadReport(str(weights.path), str(destination))
    for name, tensor in weights.tensors.items():
        shape = tuple(tensor.shape)
        if name in used or name.removeprefix(home) in used:
            report.entries.append(Entry(name, "used", reason, file_shape=shape))
        else:
            report.entries.append(Entry(name, "dropped", f"no place in {place}", file_shape=shape))
    return report
