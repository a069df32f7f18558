"""Weight files: read any of them safely, load them strictly, write them atomically.

Every tensor of file and model is accounted for before anything is loaded; what may be missing or left over is
named at the call site. Silent partial loading is the costliest failure of transfer learning, so there is no
lenient mode.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from crossmae.checkpoints.files import file_kind, find_file, read_safetensors, state_dict, without_wrappers
from crossmae.checkpoints.report import ENCODER_HOMES, Entry, LoadReport
from crossmae.checkpoints.unpickle import read_numpy_pickle, read_torch_file
from crossmae.errors import UserError
from crossmae.files import write_atomically
from crossmae.variants import SIZES
from crossmae.vit import ENCODER_PREFIXES

# Keys of the metadata in our safetensors files; all values are strings.
FORMAT = "format"  # "crossmae": a pretraining model of this toolkit; "detectron2": a converted encoder
MODEL_ARGUMENTS = "model"  # JSON: CrossMAE(**arguments)
PIXEL_MEAN, PIXEL_STD = "pixel_mean", "pixel_std"  # JSON lists, RGB, for pixels scaled to 0 .. 1
VERSION, STEP = "version", "step"
UNKNOWN = "unknown"  # what a converted file says where its source did not record a value
# Where our .pth and .pkl files keep the same metadata, beside the tensors.
PICKLED_METADATA = "crossmae_metadata"
# JSON of the settings that a published file holds in a namespace.
PUBLISHED_ARGUMENTS = "published_args"

MAX_NAMES = 5
_BLOCK = re.compile(r"blocks\.(\d+)\.")


@dataclass(frozen=True)
class Weights:
    """The tensors of one file.

    Attributes:
        path: the file itself, also where a folder was given.
        format: "crossmae" or "mae" (whole pretraining models), "encoder", "finetuned", "linear_probe",
            "detectron2" (an encoder under `backbone.net.`), "detector" (that and more), or "unknown".
        tensors: on the CPU, without the wrappers `module.`, `_orig_mod.` and `model.`.
        metadata: strings; of our own files the keys above, else what the file says about itself.
    """

    path: Path
    format: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read_weights(path: str | Path) -> Weights:
    """Read a weight file, whatever wrote it, without running anything in it.

    Args:
        path: a `.safetensors` file; a `.pth` or `.pt` file: a state dict or the layout of the published
            CrossMAE and MAE files; a `.pkl` of numpy arrays as detectron2 writes; or a folder: a pretraining
            run (its final model, else its latest complete checkpoint) or one checkpoint of a run. Contents
            decide, not the suffix.

    Raises:
        UserError: no such file; a folder without weights; empty, damaged, a web page or a git-lfs pointer;
            refers to code; not a state dict; holds NaN or infinity.
    """
    file = find_file(Path(path))
    kind = file_kind(file)
    metadata: dict[str, str] = {}
    if kind == "safetensors":
        tensors, metadata = read_safetensors(file)
    else:
        content = read_torch_file(file) if kind == "torch" else read_numpy_pickle(file)
        metadata = _pickled_metadata(content)
        tensors = state_dict(content, file)
    tensors = without_wrappers(tensors)
    _check_finite(tensors, file)
    return Weights(file, detect_format(tensors), tensors, metadata)


def detect_format(tensors: Mapping[str, Any]) -> str:
    """What kind of model the keys belong to (method specification, section 1.3); see `Weights.format`."""
    home = encoder_home(tensors)
    if home is None:
        return "unknown"
    names = {name.removeprefix(home) for name in tensors}
    if home == "backbone.net.":
        return "detectron2" if all(name.startswith(home) for name in tensors) else "detector"
    if "wfm.linear.weight" in names or "decoder_blocks.0.cross_attn.q.weight" in names:
        return "crossmae"
    if "decoder_embed.weight" in names:
        return "mae"
    if "head.0.running_mean" in names and "head.1.weight" in names:
        return "linear_probe"
    if "head.weight" in names:
        return "finetuned"
    return "encoder" if all(name.startswith((*ENCODER_PREFIXES, "norm.")) for name in names) else "unknown"


def encoder_tensors(weights: Weights) -> dict[str, Tensor]:
    """The encoder under its plain keys: `cls_token`, `pos_embed`, `patch_embed.*`, `blocks.*`.

    The final norm, the decoder and heads are left out.

    Raises:
        UserError: the file holds no encoder.
    """
    home = encoder_home(weights.tensors)
    if home is None:
        seen = ", ".join(list(weights.tensors)[:MAX_NAMES])
        homes = ", ".join(repr(f"{prefix}patch_embed.proj.weight") for prefix in reversed(ENCODER_HOMES))
        raise UserError(f"{weights.path}: no ViT encoder in it: none of {homes}; its first tensors are {seen}")
    plain = {name.removeprefix(home): tensor for name, tensor in weights.tensors.items() if name.startswith(home)}
    return {name: tensor for name, tensor in plain.items() if name.startswith(ENCODER_PREFIXES)}


def encoder_arguments(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Constructor arguments of `ViTEncoder` as far as plain encoder keys tell them.

    Args:
        tensors: see `encoder_tensors`.
        metadata: of the file; settles `num_heads`, which no shape shows, and the sides of a grid that is not
            square.

    Returns:
        `embed_dim`, `depth`, `patch_size`, `in_chans`, `mlp_ratio`, and where known `img_size` (an int for a
        square, else (height, width)) and `num_heads`.

    Raises:
        UserError: no patch embedding.
    """
    patches = tensors.get("patch_embed.proj.weight")
    if patches is None or patches.ndim != 4:
        raise UserError("no patch_embed.proj.weight of shape (E, C, p, p), so not the encoder of a plain ViT")
    E, C, p, _ = patches.shape
    depth = 1 + max((int(found[1]) for name in tensors if (found := _BLOCK.match(name))), default=-1)
    arguments: dict[str, Any] = {"embed_dim": E, "depth": depth, "patch_size": p, "in_chans": C}
    if "blocks.0.mlp.fc1.weight" in tensors:
        arguments["mlp_ratio"] = tensors["blocks.0.mlp.fc1.weight"].shape[0] / E
    if side := _square_side(tensors.get("pos_embed")):
        arguments["img_size"] = side * p
    if heads := {size.embed_dim: size.num_heads for size in SIZES.values()}.get(E):
        arguments["num_heads"] = heads
    recorded = recorded_arguments(metadata or {})
    if "img_size" in recorded:
        arguments["img_size"] = _int_if_square(recorded["img_size"])
    return arguments | {key: recorded[key] for key in ("num_heads",) if key in recorded}


def recorded_arguments(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The constructor arguments of `CrossMAE` that a file of ours records; {} where it records none.

    Raises:
        UserError: the record is not a JSON object.
    """
    text = metadata.get(MODEL_ARGUMENTS, "{}")
    try:
        arguments = json.loads(text)
    except json.JSONDecodeError:
        arguments = None
    if not isinstance(arguments, dict):
        raise UserError(f"metadata {MODEL_ARGUMENTS!r} of a weight file: expected a JSON object, got {text[:80]!r}")
    return arguments


def load_encoder(
    model: nn.Module,
    weights: Weights | str | Path,
    *,
    new: tuple[str, ...] = (),
    dropped: tuple[str, ...] = (),
) -> LoadReport:
    """Load the encoder of any file into a model whose encoder has the plain keys.

    Args:
        model: a `ViTEncoder`, or another module with its key names.
        weights: read already, or where to read.
        new: regular expressions, matched from the start of a key, for tensors of the model that the file may
            lack.
        dropped: the same for encoder tensors of the file that the model may lack. Norm, decoder and heads of
            the file are never wanted, and reported as dropped.

    Raises:
        UserError: a tensor is missing, left over or of another shape; the message holds the table. Nothing
            was loaded.
    """
    weights = weights if isinstance(weights, Weights) else read_weights(weights)
    source = encoder_tensors(weights)
    report = _compare(model, weights, source, new, dropped)
    home = encoder_home(weights.tensors) or ""
    others = [name for name in weights.tensors if name.removeprefix(home) not in source]
    report.entries += [Entry(name, "dropped", "not part of the encoder") for name in others]
    _load(model, weights, source, report)
    return report


def load_model(
    model: nn.Module,
    weights: Weights | str | Path,
    *,
    new: tuple[str, ...] = (),
    dropped: tuple[str, ...] = (),
) -> LoadReport:
    """Load a whole model, key by key; arguments and errors as `load_encoder`."""
    weights = weights if isinstance(weights, Weights) else read_weights(weights)
    report = _compare(model, weights, weights.tensors, new, dropped)
    _load(model, weights, weights.tensors, report)
    return report


def save_weights(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, force: bool = False
) -> None:
    """Write safetensors atomically: a reader sees the old file or the whole new one.

    Raises:
        UserError: the file exists and `force` is not set, or the disk refuses.
    """
    packed = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_file(Path(path), lambda file: save_file(packed, file, dict(metadata)), force=force)


def write_file(path: Path, write: Callable[[Path], Any], *, force: bool = False) -> None:
    """Let `write` fill a new file, atomically, and make its folder if need be.

    Raises:
        UserError: as `check_destination`, or the disk refuses.
    """
    check_destination(path, force=force)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, write)
    except OSError as error:
        raise UserError(f"{path}: can not be written: {error.strerror or error}") from None


def check_destination(path: Path, *, force: bool = False) -> None:
    """Refuse to write over something.

    Raises:
        UserError: the path is a folder, or a file and `force` is not set.
    """
    if path.is_dir():
        raise UserError(f"{path}: a folder; name the file to write")
    if path.exists() and not force:
        raise UserError(f"{path}: exists already and is left as it is; name another file, or overwrite it with --force")


def _pickled_metadata(content: Any) -> dict[str, str]:
    """Metadata of our own pickled files, and the settings in published ones."""
    if not isinstance(content, Mapping):
        return {}
    ours = content.get(PICKLED_METADATA)
    metadata = {str(key): str(value) for key, value in ours.items()} if isinstance(ours, Mapping) else {}
    if isinstance(content.get("args"), argparse.Namespace):
        metadata[PUBLISHED_ARGUMENTS] = json.dumps(vars(content["args"]), default=str, sort_keys=True)
    return metadata


def _check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        more = f" and {len(bad) - MAX_NAMES} more" if len(bad) > MAX_NAMES else ""
        raise UserError(
            f"{path}: {len(bad)} of {len(tensors)} tensors hold NaN or infinity: "
            f"{', '.join(bad[:MAX_NAMES])}{more}; the run that wrote it diverged, take an earlier checkpoint"
        )


def encoder_home(tensors: Mapping[str, Any]) -> str | None:
    """The prefix under which the keys of an encoder are, or None: no encoder that we know."""
    return next((home for home in ENCODER_HOMES if f"{home}patch_embed.proj.weight" in tensors), None)


def _int_if_square(img_size: Any) -> int | tuple[int, int]:
    """Equal sides as one number, so that sizes can be compared."""
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    return int(height) if height == width else (int(height), int(width))


def _square_side(pos_embed: Tensor | None) -> int | None:
    """Patches along a side, of a square table with or without a class row."""
    rows = 0 if pos_embed is None or pos_embed.ndim != 3 else pos_embed.shape[1]
    sides = [math.isqrt(count) for count in (rows - 1, rows) if count > 0 and math.isqrt(count) ** 2 == count]
    return sides[0] if sides else None


def _compare(
    model: nn.Module,
    weights: Weights,
    source: Mapping[str, Tensor],
    new: tuple[str, ...],
    dropped: tuple[str, ...],
) -> LoadReport:
    """Account for every tensor of `source` and of the model."""
    report = LoadReport(str(weights.path), type(model).__name__)
    target = model.state_dict()
    for name, tensor in target.items():
        report.entries.append(_compare_one(name, source.get(name), tensor, new))
    for name, tensor in source.items():
        if name not in target:
            accepted = _matches(name, dropped)
            reason = "not wanted by the model" if accepted else "unexpected, the model has no such tensor"
            report.entries.append(Entry(name, "dropped", reason, file_shape=tuple(tensor.shape), accepted=accepted))
    return report


def _compare_one(name: str, found: Tensor | None, wanted: Tensor, new: tuple[str, ...]) -> Entry:
    shape = tuple(wanted.shape)
    if found is None:
        accepted = _matches(name, new)
        reason = "keeps its initial value" if accepted else "missing from the file"
        return Entry(name, "new", reason, model_shape=shape, accepted=accepted)
    if found.shape != wanted.shape:
        return Entry(name, "mismatched", "", tuple(found.shape), shape, accepted=False)
    reason = "" if found.dtype == wanted.dtype else f"{_dtype(found)} to {_dtype(wanted)}"
    return Entry(name, "used", reason, shape, shape)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(re.match(pattern, name) for pattern in patterns)


def _load(model: nn.Module, weights: Weights, source: Mapping[str, Tensor], report: LoadReport) -> None:
    """Copy what the report calls used, or raise before anything is copied."""
    problem = _different_architecture(model, weights)
    if not problem and not report.ok:
        problem = "see the tensors marked !" if report.count("used") else "no tensor is in both"
    if problem:
        headline = f"{weights.path} ({weights.format}) does not fit {report.target}: {problem}"
        raise UserError(f"{headline}. Nothing was loaded.\n{report.table()}")
    model.load_state_dict({name: source[name] for name in report.names("used")}, strict=False)


def _different_architecture(model: nn.Module, weights: Weights) -> str:
    """How the encoders of file and model differ in constructor arguments, or ""."""
    target = model.state_dict()
    if encoder_home(weights.tensors) is None or "patch_embed.proj.weight" not in target:
        return ""
    held = encoder_arguments(encoder_tensors(weights), weights.metadata)
    expected = encoder_arguments(target)
    if isinstance(grid := getattr(model, "grid", None), tuple):
        expected["img_size"] = _int_if_square([side * expected["patch_size"] for side in grid])
    # No shape shows the number of heads: only what the file records is compared with what the model has.
    heads = getattr(dict(model.named_modules()).get("blocks.0.attn"), "num_heads", None)
    if heads is None or "num_heads" not in recorded_arguments(weights.metadata):
        held.pop("num_heads", None)
    expected["num_heads"] = heads
    differing = [key for key in held if held[key] != expected.get(key, held[key])]
    if not differing:
        return ""
    values = [", ".join(f"{key} {arguments[key]}" for key in differing) for arguments in (held, expected)]
    return f"the file holds a ViT with {values[0]}; the model expects {values[1]}"
