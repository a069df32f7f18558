"""Find a weight file, detect its kind, and read its tensors."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from crossmae.checkpoints.metadata import check_digest
from crossmae.checkpoints.reading import detector_file, first_line, hub_advice, pretrained_folder
from crossmae.checkpoints.reading.candidates import split_choice
from crossmae.checkpoints.reading.other_files import (
    failed_download,
    other_file,
    other_folder,
    other_text,
    weight_files,
)
from crossmae.checkpoints.reading.settings import trainer_settings
from crossmae.checkpoints.reading.torch_file import ZIP, read_torch_file
from crossmae.checkpoints.reading.trusted import read_trusted
from crossmae.checkpoints.reading.unpickle import damaged, read_numpy_pickle
from crossmae.checkpoints.reading.wrappers import one_model, pickled_metadata, published_settings, state_dict
from crossmae.checkpoints.run_checkpoint import FOLDER, MANIFEST, MODEL, defect, latest_checkpoint
from crossmae.errors import UserError, shorten
from crossmae.files import load_json, why_unexpanded

log = logging.getLogger(__name__)

# Names of weight files in folders of transformers and timm. An index lists the shards of a large model.
HUB_FILES = (MODEL, f"{MODEL}.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
HUB_CONFIG = "config.json"
_STEP_FOLDER = re.compile(r"step-\d+")
_PART = re.compile(r"-\d{5}-of-(\d{5})\.(?:safetensors|bin|pt|pth)$")
_WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".pkl", ".bin", ".ckpt", ".h5", ".msgpack", ".npz", ".onnx")
_PICKLE = b"\x80"
_LEGACY_TORCH = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # torch before version 1.6 pickled this magic number first


@dataclass(frozen=True)
class Contents:
    """The content of one weight file, or of all shards of one model.

    Attributes:
        tensors: the tensors on the CPU, without wrappers.
        beside: names of other content in the file: "optimizer", "epoch", "model_ema", "momentum_encoder (152 tensors)".
        averaged: true for averaged weights (EMA).
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    beside: tuple[str, ...] = ()
    averaged: bool = False


def read_tensors(path: Path, *, ema: bool = False, trust: bool = False, choice: str = "") -> Contents:
    """Read a weight file, or all shards of an index.

    `read_weights` documents the arguments and errors.
    """
    kind = file_kind(path)
    if kind == "index":
        held = _read_shards(path, trust)
    else:
        held, choice = _read_one(path, kind, ema=ema, trust=trust, choice=choice)
    tensors, left_out = one_model(held.tensors, path, ema=ema and not held.averaged, choice=choice)
    return Contents(tensors, held.metadata, held.beside + left_out, ema or held.averaged)


def find_file(path: Path) -> Path:
    """Return the weight file or the index of shards at a path.

    In a folder of tools/run.py, it is that of the pretraining.

    Raises UserError if the path does not exist or the folder has no weights.
    """
    path, _ = split_choice(path)
    if os.path.isfile(path):  # False for a name that is too long
        _refuse_part(path)
        return path
    if os.path.isdir(path):
        return _find_in_folder(path)
    if why := why_unexpanded(path):
        raise UserError(f"{path}: {why}")
    full = path.absolute()
    parent = next(folder for folder in full.parents if os.path.isdir(folder))
    where = "" if full == path else f" ({full})"
    raise UserError(
        f"{path}: no such file or folder{where}. Correct the path: the nearest folder that exists is {parent}."
        f"{hub_advice(path)}"
    )


def _refuse_part(path: Path) -> None:
    """Raise UserError for one of several parts of a model."""
    match = _PART.search(path.name)
    if match and int(match[1]) > 1:
        index = next(iter(sorted(path.parent.glob("*.index.json"))), None)
        remedy = (
            f"Name the index {index.name}" if index else "Put all parts and their index (.index.json) into a folder"
        )
        raise UserError(f"{path}: one of {int(match[1])} parts of a model. {remedy}.")


def file_kind(path: Path) -> str:
    """Return "safetensors", "torch", "pickle" or "index", detected by the first bytes.

    Raises UserError if the file is empty, cannot be read or is another kind of file.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Check its permissions.") from None
    if what := failed_download(head):
        raise UserError(f"{path}: {what}")
    if head.startswith(ZIP) and path.suffix != ".distcp":
        return "torch"
    if head.lstrip().startswith(b"{"):
        return "index"
    if head[8:9] == b"{":
        return "safetensors"
    if head.startswith(_PICKLE):
        return "torch" if _LEGACY_TORCH in head[:32] else "pickle"
    if what := other_file(path, head):
        raise UserError(f"{path}: {what}")
    raise UserError(
        f"{path}: not a weight file ({path.stat().st_size:,} bytes, starting with {head[:12]!r}). Name a "
        "file of torch.save (.pth, .pt), a safetensors file, or a .pkl of numpy arrays."
    )


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read memory-mapped tensors and the metadata of a safetensors file."""
    if "\ufffd" in os.fsencode(path).decode("utf-8", "replace"):
        raise UserError(f"{path}: safetensors opens paths in UTF-8 only. Rename the file and its folders.")
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())  # the handle itself cannot be iterated
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except MemoryError:
        raise
    except Exception as error:  # safetensors raises its own error type, and errors of torch and Python
        raise damaged(path, error) from None


def _read_one(
    path: Path, kind: str, *, ema: bool = False, trust: bool = False, choice: str = ""
) -> tuple[Contents, str]:
    """Read one file, and return the choice that is left for `one_model`."""
    if kind == "safetensors":
        tensors, metadata = read_safetensors(path)
        return Contents(tensors, check_digest(tensors, metadata, path)), choice
    read = read_torch_file if kind == "torch" else read_numpy_pickle
    content = read_trusted(path, kind) if trust else read(path)
    tensors, beside, averaged, choice = state_dict(content, path, ema=ema, choice=choice)
    metadata = check_digest(tensors, pickled_metadata(content, path), path)
    return Contents(
        tensors, published_settings(content) | trainer_settings(content) | metadata, beside, averaged
    ), choice


def _read_shards(path: Path, trust: bool) -> Contents:
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for shard, names in _weight_map(path).items():
        file = path.parent / shard
        kind = file_kind(file)
        if kind == "index":
            raise UserError(f"{path}: names an index as a shard, {shard}. Download the index again.")
        held, _ = _read_one(file, kind, trust=trust)
        differing = sorted(names ^ held.tensors.keys())
        if differing:
            odd = shorten([name[:60] for name in differing])
            raise UserError(
                f"{file}: {path.name} lists other tensors, they differ in {odd}. Download both files again."
            )
        tensors |= held.tensors
        metadata |= held.metadata
    return Contents(tensors, metadata)


def _weight_map(path: Path) -> dict[str, set[str]]:
    """Return the names of the tensors in each shard."""
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        index: Any = load_json(text)
    except ValueError as error:
        raise (UserError(f"{path}: {what}") if (what := other_text(path, text)) else damaged(path, error)) from None
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(shard, str) for shard in names.values()):
        raise UserError(f"{path}: {other_text(path, text)}")
    shards: dict[str, set[str]] = {}
    for name, shard in names.items():
        shards.setdefault(shard, set()).add(name)
    outside = [shard for shard in shards if Path(shard).name != shard]
    if outside:
        raise UserError(f"{path}: names {outside[0][:200]!r}, a file outside its folder. Download the index again.")
    missing = sorted(shard for shard in shards if not (path.parent / shard).is_file())
    if missing:
        raise UserError(
            f"{path}: {len(missing)} of {len(shards)} shards are missing: {shorten(missing)}. Download them."
        )
    return shards


def _find_in_folder(folder: Path) -> Path:
    if (folder / MANIFEST).exists() or _STEP_FOLDER.fullmatch(folder.name):
        reason = defect(folder)
        if reason:
            raise UserError(f"{folder}: not a complete checkpoint: {reason}. Take another step of the run.")
        return folder / MODEL
    found = next((folder / name for name in HUB_FILES if (folder / name).is_file()), None)
    if found:
        if others := sorted(path.name for path in folder.glob(f"{found.stem}_[0-9]*{found.suffix}")):
            log.warning("%s: %s is read, not %s. Name a file to read another one.", folder, found.name, shorten(others))
        return found
    if detector := detector_file(folder):
        return detector
    if (pretrained := pretrained_folder(folder)) != folder:
        return _find_in_folder(pretrained)
    checkpoint = latest_checkpoint(folder.parent if folder.name == FOLDER else folder)
    if checkpoint:
        return checkpoint / MODEL
    if deepspeed := _deepspeed_file(folder):
        return deepspeed
    if what := other_folder(folder):
        raise UserError(f"{folder}: {what}")
    missing = f"without {MODEL}, a complete checkpoint {FOLDER}/step-*/ of a run, and {HUB_CONFIG} of other libraries"
    if (folder / HUB_CONFIG).is_file():
        missing = f"with {HUB_CONFIG}, but none of {', '.join(HUB_FILES)}"
    weights = weight_files(folder, _WEIGHT_SUFFIXES)
    parts = [name for name in weights if _PART.search(name)]
    if parts:
        _refuse_part(folder / parts[0])
    remedy = f"one of its files: {shorten(weights)}" if weights else "a weight file or the folder of a run"
    raise UserError(f"{folder}: a folder without weights, {missing}. Name {remedy}.")


def _deepspeed_file(folder: Path) -> Path | None:
    """Find the model in a checkpoint of DeepSpeed.

    Raises UserError if the model is in several parts.
    """
    name = first_line(folder / "latest")
    inside = folder / Path(name).name if name else folder
    parts = sorted(inside.glob("*model_states.pt"))
    if len(parts) > 1 or (not parts and list(islice(inside.glob("*optim_states.pt"), 1))):
        raise UserError(
            f"{folder}: a DeepSpeed checkpoint in several parts. Run `python zero_to_fp32.py . OUT` in the folder with "
            "the file `latest`, and name the file in OUT."
        )
    return parts[0] if parts else None


def shards(path: Path) -> list[Path]:
    """Return the files that an index lists, or [] for other files."""
    return [path.parent / name for name in sorted(_weight_map(path))] if file_kind(path) == "index" else []
