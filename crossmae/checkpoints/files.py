"""From a path to named tensors: find the file, tell its kind, take the tensors out of their wrappers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from crossmae.checkpoints.unpickle import damaged
from crossmae.errors import UserError
from crossmae.run_checkpoint import FOLDER, MANIFEST, MODEL, defect, latest_checkpoint

WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
WRAPPER_PREFIXES = ("module.", "_orig_mod.", "model.")
MAX_NAMES = 5
_STEP_FOLDER = re.compile(r"step-\d+")
_WEB_PAGE = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<error")
_GIT_LFS = b"version https://git-lfs"
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_LEGACY_TORCH = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # the magic number that torch pickled first until version 1.6


def find_file(path: Path) -> Path:
    """The weight file that a path means: itself, or the weights of a run's or a checkpoint's folder.

    Raises:
        UserError: no such path, or a folder without weights.
    """
    path = path.expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        return _find_in_folder(path)
    full = path.absolute()
    parent = next(folder for folder in full.parents if folder.is_dir())
    where = "" if full == path else f", that is {full}"
    raise UserError(f"no such file or folder: {path}{where}; the nearest folder that exists is {parent}")


def file_kind(path: Path) -> str:
    """ "safetensors", "torch" or "pickle", by the first bytes: suffixes of weight files are often wrong.

    Raises:
        UserError: empty, a web page, a git-lfs pointer, or nothing that holds weights.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise UserError(f"{path}: can not be read: {error.strerror}") from None
    if not head:
        raise UserError(f"{path}: the file is empty (0 bytes); copy or download it again")
    if head.lstrip().lower().startswith(_WEB_PAGE):
        raise UserError(f"{path}: a web page, not weights; the download got an error or log-in page, check its address")
    if head.startswith(_GIT_LFS):
        raise UserError(f"{path}: a git-lfs pointer, not the file itself; run `git lfs pull` where it comes from")
    if head.startswith(_ZIP):
        return "torch"
    if head[8:9] == b"{":
        return "safetensors"
    if head.startswith(_PICKLE):
        return "torch" if _LEGACY_TORCH in head[:32] else "pickle"
    raise UserError(
        f"{path}: not a weight file ({path.stat().st_size:,} bytes, starting with {head[:12]!r}); expected "
        "what torch.save writes (.pth, .pt), safetensors, or a .pkl of numpy arrays"
    )


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata.

    Raises:
        UserError: truncated or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())  # the handle itself can not be iterated
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(path, error) from None


def state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """The tensors in what a pickle held, out of `WRAPPERS`; arrays become tensors."""
    for _ in WRAPPERS:
        inner = [
            content[key] for key in WRAPPERS if isinstance(content, Mapping) and isinstance(content.get(key), Mapping)
        ]
        content = inner[0] if inner else content
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{path}: not a state dict: holds {_describe(content)} where names and tensors are expected")
    wrong = [key for key, value in content.items() if not isinstance(value, Tensor | np.ndarray)]
    if wrong:
        kind = type(content[wrong[0]]).__name__
        raise UserError(
            f"{path}: not a state dict: {wrong[0]!r} is of type {kind}, not a tensor; "
            f"the file holds {_describe(content)}"
        )
    return {str(name): _dense(value, name, path) for name, value in content.items()}


def without_wrappers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Strip the prefixes that DDP, torch.compile and trainers put before every name."""
    prefix = next((p for p in WRAPPER_PREFIXES if tensors and all(name.startswith(p) for name in tensors)), None)
    if prefix is None:
        return tensors
    return without_wrappers({name.removeprefix(prefix): tensor for name, tensor in tensors.items()})


def _find_in_folder(folder: Path) -> Path:
    if (folder / MANIFEST).exists() or _STEP_FOLDER.fullmatch(folder.name):
        reason = defect(folder)
        if reason:
            raise UserError(f"{folder}: not a complete checkpoint: {reason}; take another step of the run")
        return folder / MODEL
    if (folder / MODEL).is_file():
        return folder / MODEL
    checkpoint = latest_checkpoint(folder)
    if checkpoint is None:
        raise UserError(
            f"{folder}: a folder without weights: neither {MODEL}, which a pretraining run writes at its "
            f"end, nor a complete checkpoint {FOLDER}/step-*/; name a weight file or the folder of a run"
        )
    return checkpoint / MODEL


def _describe(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    keys = [repr(key) for key in content]
    return (
        f"a dict with the keys {', '.join(keys[:MAX_NAMES])}{', ...' if len(keys) > MAX_NAMES else ''}"
        if keys
        else "an empty dict"
    )


def _dense(value: Tensor | np.ndarray, name: str, path: Path) -> Tensor:
    """A copy of its own: tensors in a file may be views of one storage, which safetensors can not hold."""
    try:
        if isinstance(value, np.ndarray):
            return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("="), order="C"))
        return value.detach().clone(memory_format=torch.contiguous_format)
    except (TypeError, RuntimeError) as error:
        kind = value.dtype if isinstance(value, np.ndarray) else value.layout
        raise UserError(f"{path}: {name} is not a plain array of numbers ({kind}): {error}") from None
