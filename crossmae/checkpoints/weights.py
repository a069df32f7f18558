"""Weight files: read every supported layout safely, describe its content, write files atomically."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from crossmae.checkpoints.formats.facts import encoder_facts
from crossmae.checkpoints.formats.huggingface import check_model_type, read_config
from crossmae.checkpoints.formats.keys import ENCODER_HOMES, encoder_home, to_plain
from crossmae.checkpoints.formats.recognition import recognise
from crossmae.checkpoints.formats.timm_folder import timm_metadata
from crossmae.checkpoints.metadata import recorded_arguments, signed
from crossmae.checkpoints.reading.candidates import split_choice
from crossmae.checkpoints.reading.files import HUB_CONFIG, HUB_FILES, find_file, read_tensors
from crossmae.checkpoints.reading.quantized import refuse_quantized
from crossmae.errors import UserError, shorten
from crossmae.files import check_destination, name_write_errors, write_atomically
from crossmae.models.encoder import ENCODER_PREFIXES, patch_grid

_FILTERS = ("patch_embed.proj.weight", "patch_embed.projection.weight", "patch_embeddings.projection.weight")


@dataclass(frozen=True)
class Weights:
    """The tensors of one file.

    Attributes:
        path: path of the weight file, even if the path of a folder was given.
        format: "crossmae" or "mae" (whole pretraining models), "encoder", "finetuned", "linear_probe",
            "detectron2" (only an encoder under `backbone.net.`), "detector" (an encoder under `backbone.net.` and other
            tensors), or "unknown".
        tensors: tensors on the CPU, without wrappers such as `module.`. A tensor without a plain name keeps the name in
            the file.
        metadata: strings, see `crossmae.checkpoints.metadata`.
        layout, sources, notes: see `keys.Translated`.
        beside: names of other content in the file: "optimizer", "epoch", "args", ...
        resampled: plain names of the tensors that were resampled.
    """

    path: Path
    format: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    layout: str = "plain"
    sources: dict[str, tuple[str, ...]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    beside: tuple[str, ...] = ()
    resampled: frozenset[str] = frozenset()


def read_weights(
    path: str | Path, *, finite: bool = True, ema: bool = False, trust: bool = False, img_size: Any = None
) -> Weights:
    """Read a weight file of any kind without running anything in it.

    Args:
        path: a file or a folder. The kind of a file is detected by its content, not its suffix: safetensors; a `.pth`
            or `.pt` file with a state dict or in the layout of the published CrossMAE and MAE files; or a `.pkl` of
            numpy arrays as detectron2 writes. A folder is a pretraining run (its final model is read, else its latest
            complete checkpoint), one checkpoint of a run, or a transformers or timm folder, sharded or not. If a file
            has several encoders, FILE::NAME reads one of them.
        finite: raise an error for NaN and infinity.
        ema: read the averaged weights. Raises an error if the file has none.
        trust: run any code in a pickle, after a warning with the file's SHA-256. Only the converter sets this.
        img_size: image size of training. Needed if the grid is not square and is not recorded in the file.

    Raises:
        UserError: the file does not exist; the folder has no weights; the file is empty, damaged, a web page or a
            git-lfs pointer; it refers to code; it is not a state dict; its weights are quantized; its digest differs
            from the recorded digest; or it has NaN or infinity.
    """
    file, (_, choice) = find_file(Path(path)), split_choice(Path(path))
    contents = read_tensors(file, ema=ema, trust=trust, choice=choice)
    if finite:
        check_finite(contents.tensors, file)
    return replace(translated(file, contents.tensors, contents.metadata, img_size), beside=contents.beside)


def translated(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str], img_size: Any = None) -> Weights:
    """Translate the tensors of a file, and add the metadata in config.json.

    Raises UserError if the tensors are quantized or cannot be translated.
    """
    refuse_quantized(tensors, file)
    in_folder = file.name in HUB_FILES  # then config.json in the same folder describes this file
    if in_folder:
        check_model_type(file.parent)
    if what := recognise(tensors):
        raise UserError(f"{file}: {what}")
    beside = timm_metadata(file.parent) if in_folder else {}
    try:
        found = to_plain(tensors, _known_grid(tensors, beside | metadata, img_size))
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    if in_folder and found.layout.startswith("hf-") and (file.parent / HUB_CONFIG).is_file():
        beside = read_config(file.parent, found.tensors)
    metadata = beside | metadata  # metadata in the file override config.json
    return Weights(
        file, detect_format(found.tensors), found.tensors, metadata, found.layout, found.sources, found.notes
    )


def detect_format(tensors: Mapping[str, Any]) -> str:
    """Detect the kind of model by its tensor names, see `Weights.format`."""
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
    known = (*ENCODER_PREFIXES, "norm.", "fc_norm.", "pooler.", "encoder_mask_token", "masked_embed")
    return "encoder" if all(name.startswith(known) for name in names) else "unknown"


def encoder_tensors(weights: Weights) -> dict[str, Tensor]:
    """Return the encoder's tensors under plain names.

    Raises UserError if the weights have no encoder.
    """
    home = encoder_home(weights.tensors)
    if home is None:
        homes = ", ".join(repr(f"{prefix}patch_embed.proj.weight") for prefix in reversed(ENCODER_HOMES))
        seen = shorten(list(weights.tensors))
        raise UserError(f"{weights.path}: has no ViT encoder. Its tensors are {seen}, and none of {homes}.")
    return encoder_part(plain_tensors(weights))


def plain_tensors(weights: Weights) -> dict[str, Tensor]:
    """Return the tensors that have the encoder's prefix, without the prefix."""
    home = encoder_home(weights.tensors)
    held = weights.tensors.items() if home is not None else ()
    return {name.removeprefix(home or ""): tensor for name, tensor in held if name.startswith(home or "")}


def encoder_part(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the encoder's tensors from tensors under plain names."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith(ENCODER_PREFIXES)}


def encoder_arguments(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Find constructor arguments of `ViTEncoder`, see `facts.encoder_facts`.

    Assumed values are included. Raises UserError like `facts.encoder_facts`.
    """
    facts = encoder_facts(tensors, metadata)
    return {key: fact.value for key, fact in facts.items() if key not in ("norm_eps", "activation")}


def save_weights(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, force: bool = False
) -> None:
    """Write a safetensors file with a digest, atomically, creating missing folders.

    Raises:
        UserError: the file exists and `force` is not set, or the file cannot be written.
    """
    path = Path(path)
    check_destination(path, force=force)
    with name_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: write_safetensors(file, tensors, metadata))


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with a digest, at exactly this path."""
    packed = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(packed, path, signed(packed, metadata))


def check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise UserError if any tensor has NaN or infinity."""
    if found := describe_non_finite(tensors):
        raise UserError(f"{path}: {found}. The run that wrote it diverged: use an earlier checkpoint.")


def describe_non_finite(tensors: Mapping[str, Tensor]) -> str:
    """Describe the tensors that have NaN or infinity, or return ""."""
    bad = non_finite(tensors)
    return f"{len(bad)} of {len(tensors)} tensors hold NaN or infinity: {shorten(bad)}" if bad else ""


def non_finite(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """List the tensors that have NaN or infinity."""
    # torch.isfinite does not support 8-bit floats
    wide = ((name, tensor.float() if tensor.dtype.itemsize == 1 else tensor) for name, tensor in tensors.items())
    return tuple(name for name, tensor in wide if not _is_finite(tensor))


def _is_finite(tensor: Tensor) -> bool:
    # A finite sum has finite terms. It takes a fraction of the time of the exact check, which an overflow still needs.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def _known_grid(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], img_size: Any) -> tuple[int, int] | None:
    size = img_size or recorded_arguments(metadata).get("img_size")
    filters = next((tensor for name, tensor in tensors.items() if name.endswith(_FILTERS) and tensor.ndim == 4), None)
    if size is None or filters is None:
        return None
    try:
        return patch_grid(size if isinstance(size, int) else tuple(size), filters.shape[-1])
    except (ValueError, TypeError) as error:
        raise UserError(f"img_size {size}: {error}") from None


def plain_size(value: Any) -> Any:
    """Return one number for a square size, for comparisons."""
    if isinstance(value, (tuple, list)) and len(value) == 2:
        return value[0] if value[0] == value[1] else tuple(value)
    return value
